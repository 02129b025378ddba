"""How far two distributions are apart, right also where they nearly agree.

Everything rests on d_j = log(q_j / p_j), taken from exact differences of the logits and
not from two rounded logarithms. What is left is an error that all classes share, and it
is taken out again, since the mean of exp(d) under p is 1. Each divergence is then a sum
of terms >= 0, one per class, so it is never negative and keeps its digits near 0.

Types, edges and sources are as in `_information`.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jax_softmax._distributions import (
    Distribution,
    Law,
    Logits,
    Probs,
    at_largest,
    law,
    moving_as,
    of_kept,
    product,
    score_slope,
    weight_ratio,
    with_slopes,
)
from jax_softmax._entries import row_entry
from jax_softmax._exponential import two_sum
from jax_softmax._information import flat, mean_surprise, nats_in
from jax_softmax._partition import compensated_sum, log1p


def cross_entropy_between(
    p: Distribution,
    q: Distribution,
    *,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """The mean surprise of one who expects q, when p is true. At least entropy(p).

        CE = -sum_j p_j log q_j = H(p) + KL(p, q)
        d CE / d z^q_j = q_j - p_j,   d CE / d z^p_j = -p_j (log q_j + CE)

    With Logits for q and integer labels for p, cross_entropy is the short way.

    Args:
        p: the truth. p_j = 0 contributes 0, also where q_j = 0.
        q: the expectation. q_j = 0 where p_j > 0 is an infinite surprise.
        base: of the logarithm; e for nats, 2 for bits.
        where: rows to keep. A dropped row is 0 and has gradient exactly 0.

    Returns:
        CE >= 0, within 4 ULP.

    Raises:
        TypeError: p or q does not say what it is, or is not floating point, or base no
            number.
        ValueError: q is not shaped like p, where not like their rows, or base no base.

    >>> labels = Probs(jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> preds = Probs(jnp.array([[0.3, 0.6, 0.1], [0.2, 0.3, 0.5]]))
    >>> print(cross_entropy_between(labels, preds).mean())
    0.94856
    """
    return of_kept(_cross_entropy, where, unit=nats_in(base), p=p, q=q)


def kl_divergence(
    p: Distribution,
    q: Distribution,
    *,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """What expecting q costs beyond entropy(p), when p is true. 0 only if they agree.

        KL = sum_j p_j log(p_j / q_j) = sum_j p_j (exp(d_j) - 1 - d_j),  d = log(q / p)
        d KL / d z^q_j = q_j - p_j,   d KL / d z^p_j = -p_j (d_j + KL)

    The second sum has no negative term: distributions 1e-6 apart have a KL of 1e-12,
    to six digits.

    Args:
        p: the truth. p_j = 0 contributes 0, also where q_j = 0.
        q: the expectation. q_j = 0 where p_j > 0 makes KL infinite.
        base: of the logarithm; e for nats, 2 for bits.
        where: rows to keep. A dropped row is 0 and has gradient exactly 0.

    Returns:
        KL >= 0, within 6 ULP if both are Logits, and 7 if both are Probs with the same
        sum. If one is Logits and the other Probs, the rounding of the probabilities
        themselves adds up to 1e-6 sqrt(KL).

    Raises:
        TypeError: p or q does not say what it is, or is not floating point, or base no
            number.
        ValueError: q is not shaped like p, where not like their rows, or base no base.

    >>> z = jnp.array([1.0, 2.0, 3.0])
    >>> print(kl_divergence(Logits(z), Logits(z + jnp.array([0.0, 1e-6, 0.0]))))
    8.405389e-14

    Normal distributions, 1 apart and equally wide, are half a nat from each other; a
    wider one is nearer seen from the narrow one than the other way round:

    >>> x = jnp.linspace(-9, 9, 901)
    >>> p, q1, q2, wide = (Logits(-(x**2) / 2), Logits(-((x + 1) ** 2) / 2),
    ...                    Logits(-((x - 1) ** 2) / 2), Logits(-(x**2) / 8))
    >>> kl = [kl_divergence(p, q1), kl_divergence(p, q2)]
    >>> kl += [kl_divergence(p, wide), kl_divergence(wide, p)]
    >>> print(*(f"{value:.3f}" for value in kl))
    0.500 0.500 0.318 0.807
    """
    return of_kept(_kl, where, unit=nats_in(base), p=p, q=q)


def js_divergence(
    p: Distribution,
    q: Distribution,
    *,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Their mean divergence from the distribution halfway: symmetric, at most one bit.

        JS = (KL(p, m) + KL(q, m)) / 2,   m = (p + q) / 2
           = sum_j m_j ((1 + h) log(1 + h) + (1 - h) log(1 - h)) / 2,   h = (q - p) / 2m
        d JS / d z^p_j = p_j (log(p_j / m_j) - KL(p, m)) / 2

    Always finite. (Lin, "Divergence measures based on the Shannon entropy", 1991.)

    Args:
        p: one distribution.
        q: the other. Classes that are 0 in both contribute 0.
        base: of the logarithm; e for nats, 2 for bits.
        where: rows to keep. A dropped row is 0 and has gradient exactly 0.

    Returns:
        0 <= JS <= log 2, within 8 ULP if both are Logits, or both Probs with the same
        sum; otherwise as accurate as kl_divergence.

    Raises:
        TypeError: p or q does not say what it is, or is not floating point, or base no
            number.
        ValueError: q is not shaped like p, where not like their rows, or base no base.

    >>> p, q = Probs(jnp.array([1.0, 0.0])), Probs(jnp.array([0.0, 1.0]))
    >>> print(js_divergence(p, q, base=2))
    1.0
    """
    return of_kept(_js, where, unit=nats_in(base), p=p, q=q)


def mutual_information(
    joint: Distribution,
    *,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """What knowing one variable of a table tells about the other. 0 if independent.

        I = sum_xy p_xy log(p_xy / (p_x p_y)) = KL(p_xy, p_x p_y)
        d I / d z_xy = p_xy (log(p_xy / (p_x p_y)) - I)

    Args:
        joint: a table over its last two axes. The marginals are its own: the textbook
            passes others for this table, and gets 0.72 bits.
        base: of the logarithm; e for nats, 2 for bits.
        where: tables to keep. A dropped one is 0 and has gradient exactly 0.

    Returns:
        I >= 0, within 8 ULP of Logits, and gradient entries within 8 of the largest
        p_xy |log(p_xy / (p_x p_y))|; of Probs, their own rounding adds up to
        1e-6 sqrt(I).

    Raises:
        TypeError: joint does not say what it is, or is not floating point, or base no
            number.
        ValueError: joint has no two axes, where is not shaped like the tables, or
            base is no base.

    >>> table = Probs(jnp.array([[0.1, 0.5], [0.1, 0.3]]))
    >>> print(f"{mutual_information(table, base=2):.6f}")
    0.007403
    """
    return of_kept(_mutual, where, unit=nats_in(base), event_rank=2, joint=joint)


def _cross_entropy(p: Distribution, q: Distribution) -> Array:
    a, b = law(p), law(q)
    slope = score_slope(a.probs, _drops_from_top(a.probs, q, b.drops))
    slopes = slope, _excess(a.probs, b.probs, _log_ratio(p, q, a, b))
    return with_slopes(mean_surprise(a, b), slopes, a.scores, b.scores)


def _kl(p: Distribution, q: Distribution) -> Array:
    a, b = law(p), law(q)
    d = _log_ratio(p, q, a, b)
    return _divergence(a, b.probs, d, _from_top(a.probs, d, p, q), b.scores)


def _js(p: Distribution, q: Distribution) -> Array:
    a, b = law(p), law(q)
    d = _log_ratio(p, q, a, b)
    mean = (a.probs + b.probs) / 2
    value = lax.stop_gradient(compensated_sum(product(mean, _two_sided(d))))
    slopes = (
        _slope_to_halfway(a.probs, b.probs, d, _from_top(a.probs, d, p, q)),
        _slope_to_halfway(b.probs, a.probs, -d, _from_top(b.probs, -d, q, p)),
    )
    return with_slopes(value, slopes, a.scores, b.scores)


def _mutual(joint: Distribution) -> Array:
    table = jnp.asarray(joint[0])
    a = law(type(joint)(flat(table)))
    p = a.probs.reshape(table.shape)
    p_x, p_y = p.sum(-1, keepdims=True), p.sum(-2, keepdims=True)
    product_probs, one_x = p_x * p_y, jnp.where(p_x == 0, 1, p_x)
    one_y = jnp.where(p_y == 0, 1, p_y)
    log_x, log_y = jnp.log(one_x), jnp.log(one_y)
    like = log_x + log_y - a.log_probs.reshape(table.shape)
    d = like
    if isinstance(joint, Logits):
        top = table.max((-2, -1), keepdims=True)
        high, low = _below(table, top)
        log_y = log_y + a.log_total[..., None]
        d = jnp.where(jnp.isfinite(high), _sum(log_x, -high, log_y, -low), like)
    # What the logarithms of the marginals lack moves whole rows or whole columns. The
    # second time it is no larger than d, and so is what rounding leaves of it.
    for axis, one in 2 * ((-1, one_x), (-2, one_y)):
        mean = _excess(p, product_probs, d).sum(axis, keepdims=True) / one
        d = jnp.where(jnp.isfinite(d), d - jnp.log1p(mean), d)
    d = flat(moving_as(like, d))
    return _divergence(a, flat(product_probs), d, d)


def _divergence(p: Law, q: Array, d: Array, moved: Array, *q_scores: Array) -> Array:
    """sum p (exp(d) - 1 - d) with d = log(q / p); a shift of d counts by its square.

    The slope in p takes `moved`, which is d but for a constant.
    """
    far = (d > 2) | (p.probs == 0)
    near_terms = p.probs * _exp_less_line(jnp.where(far, 0, d))
    far_d = jnp.where(far & (p.probs > 0), d, 0)
    terms = jnp.where(far, q - p.probs - p.probs * far_d, near_terms)
    slopes = score_slope(p.probs, -moved), _excess(p.probs, q, d)
    value = lax.stop_gradient(compensated_sum(terms))
    return with_slopes(value, slopes[: 1 + len(q_scores)], p.scores, *q_scores)


def _log_ratio(p: Distribution, q: Distribution, a: Law, b: Law) -> Array:
    """log(q_j / p_j): +inf where p alone is 0, -inf where q alone is, 0 where both."""
    ruled_out = (a.probs == 0) & (b.probs == 0)
    log_p, log_q = (jnp.where(ruled_out, 0, x.log_probs) for x in (a, b))
    like = log_q - log_p
    d, shift = like, 0
    match p, q:
        case Logits(), Logits():
            (z, z_low), (y, y_low) = (
                _below(x.scores, x.scores.max(-1, keepdims=True)) for x in (a, b)
            )
            exact = jnp.isfinite(z) & jnp.isfinite(y)
            precise = _sum(y, -z, a.log_total - b.log_total, y_low - z_low)
            d = jnp.where(exact, precise, like)
        case Probs(), Probs():
            u, v = jnp.asarray(p[0]), jnp.asarray(q[0])
            ruled_in = (u > 0) & (v > 0)
            one_u, one_v = (jnp.where(ruled_in, x, 1) for x in (u, v))
            in_sum = jnp.log(u.sum(-1, keepdims=True) / v.sum(-1, keepdims=True))
            # Beside a larger term the two logarithms' own rounding is the smaller one.
            precise = ruled_in & (jnp.abs(in_sum) < 1)
            d = jnp.where(precise, weight_ratio(one_v, one_u), like)
            shift = jnp.where(precise, in_sum, 0)
    mean = _excess(a.probs, b.probs, d + shift).sum(-1, keepdims=True)
    return moving_as(like, jnp.where(jnp.isfinite(d), d + (shift - jnp.log1p(mean)), d))


def _from_top(p: Array, d: Array, of: Distribution, other: Distribution) -> Array:
    """d less its value at the largest p. Of Logits it is a difference of differences:
    d itself has been rounded at its own size."""
    moved = d - at_largest(p, d)
    match of, other:
        case Logits(), Logits():
            (z, z_low), (y, y_low) = (
                _below(x, row_entry(x, p.argmax(-1))[..., None])
                for x in (jnp.asarray(of[0]), jnp.asarray(other[0]))
            )
            exact = jnp.isfinite(d) & jnp.isfinite(z) & jnp.isfinite(y)
            step = _sum(y, -z, jnp.zeros_like(y), y_low - z_low)
            return moving_as(moved, jnp.where(exact, step, moved))
    return moved


def _drops_from_top(p: Array, q: Distribution, drops: Array) -> Array:
    """log(q_k / q_j), where k has the largest p: rounded once, as drops are not."""
    x = jnp.asarray(q[0])
    top = row_entry(x, p.argmax(-1))[..., None]
    if isinstance(q, Logits):
        from_top = top - x
    else:
        ruled_in = (x > 0) & (top > 0)
        one, one_top = (jnp.where(ruled_in, w, 1) for w in (x, top))
        from_top = jnp.where(ruled_in, weight_ratio(one_top, one), jnp.inf)
    exact = jnp.isfinite(drops) & jnp.isfinite(from_top)
    return moving_as(drops, jnp.where(exact, from_top, drops))


def _excess(p: Array, q: Array, d: Array) -> Array:
    """q - p, where q = p exp(d): nothing cancels while d is small."""
    far = (d > 1) | (p == 0)
    return jnp.where(far, q - p, p * _expm1(jnp.where(far, 0, d)))


def _expm1(d: Array) -> Array:
    """exp(d) - 1 for d <= 2 within 1.5 ULP, where XLA's takes 5."""
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    return jnp.where(near, small + _exp_less_line(small), jnp.exp(d) - 1)


def _exp_less_line(d: Array) -> Array:
    """exp(d) - 1 - d >= 0 for d <= 2, within 4 ULP, near 0 by Taylor's series."""
    near = d > -1
    x, far = jnp.where(near, d, 0), jnp.where(near, -1, d)
    last = 14 if jnp.finfo(d.dtype).bits == 32 else 23
    series = jnp.full_like(x, 1 / math.factorial(last))
    for n in range(last - 1, 1, -1):
        series = series * x + 1 / math.factorial(n)
    return jnp.where(near, x * x * series, (jnp.exp(far) - 1) - far)


def _two_sided(d: Array) -> Array:
    """((1 + h) log(1 + h) + (1 - h) log(1 - h)) / 2 of h = tanh(d / 2): JS per m_j.

    By its even series in h, but where |h| is near 1; there 1 - |h| is no difference.
    """
    less, e = _expm1(-jnp.abs(d)), jnp.exp(-jnp.abs(d))
    size, rest = -less / (1 + e), 2 * e / (1 + e)  # |h| and 1 - |h|
    near = size < 0.7
    x = jnp.where(near, size * size, 0)
    last = 16 if jnp.finfo(d.dtype).bits == 32 else 42
    series = jnp.full_like(x, 1 / (2 * last * (2 * last - 1)))
    for n in range(last - 1, 0, -1):
        series = series * x + 1 / (2 * n * (2 * n - 1))
    lower = rest * jnp.log(jnp.where(rest == 0, 1, rest))
    return jnp.where(near, x * series, ((1 + size) * log1p(size) + lower) / 2)


def _slope_to_halfway(p: Array, q: Array, d: Array, moved: Array) -> Array:
    """The slope of JS in the scores of p: of its half, sum p log(p / m).

    From the largest p, where d is d_k, on, log(p / m) has moved by
    -log((1 + exp(d)) / (1 + exp(d_k))), where m = (p + q) / 2 and d = log(q / p).
    """
    origin, q_top = at_largest(p, d), at_largest(p, q)
    share = q_top / (p.max(-1, keepdims=True) + q_top)  # exp(d_k) / (1 + exp(d_k))
    share = lax.stop_gradient(share)
    d, moved = (jnp.where(p == 0, 0, x) for x in (d, moved))
    near = jnp.abs(moved) < 1
    grown = _expm1(jnp.where(near, moved, 0)) * share
    below = grown < 0
    size = log1p(jnp.where(below, -grown / (1 + grown), grown))  # of a number >= 0
    far = _log_of_one_and(origin) - _log_of_one_and(d)
    s = jnp.where(near, jnp.where(below, size, -size), far)
    return score_slope(p, s) / 2


def _log_of_one_and(d: Array) -> Array:
    """log(1 + exp(d))."""
    return jnp.maximum(d, 0) + log1p(jnp.exp(-jnp.abs(d)))


def _below(z: Array, top: Array) -> tuple[Array, Array]:
    """z - top exactly, as high + low; high is not finite where either is not."""
    high, low = two_sum(z, -top)
    return high, jnp.where(jnp.isfinite(high), low, 0)


def _sum(a: Array, b: Array, c: Array, small: Array) -> Array:
    """a + b + c + small, rounded about once whatever cancels."""
    ab, rest = two_sum(a, b)
    abc, more = two_sum(ab, c)
    return abc + (more + (rest + small))
