"""How far two distributions are apart, right also where they nearly agree.

Each divergence is a sum of terms >= 0, one per class, made of d_j = log(q_j / p_j), so
it is never negative and keeps its digits near 0.

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
    at_largest,
    law,
    of_kept,
    product,
    score_slope,
    with_slopes,
)
from jax_softmax._information import mean_surprise, nats_in
from jax_softmax._log_ratio import (
    drops_from_top,
    excess,
    exp_less_line,
    expm1,
    log_ratio,
    ratio_from_top,
)
from jax_softmax._logarithm import log1p
from jax_softmax._partition import compensated_sum


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
        CE >= 0, within 5 ULP.

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
        KL >= 0, within 8 ULP if both are Logits, and 7 if both are Probs with the same
        sum. Otherwise the rounding of probabilities, or of their sums, adds up to
        1e-6 sqrt(KL).

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
        0 <= JS <= log 2, within 10 ULP if both are Logits, or both Probs with the same
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


def _cross_entropy(p: Distribution, q: Distribution) -> Array:
    a, b = law(p), law(q)
    slope = score_slope(a.probs, drops_from_top(a.probs, q, b.drops))
    slopes = slope, excess(a.probs, b.probs, log_ratio(p, q, a, b))
    return with_slopes(mean_surprise(a, b), slopes, a.scores, b.scores)


def _kl(p: Distribution, q: Distribution) -> Array:
    a, b = law(p), law(q)
    d = log_ratio(p, q, a, b)
    return divergence(a, b.probs, d, ratio_from_top(a.probs, d, p, q), b.scores)


def _js(p: Distribution, q: Distribution) -> Array:
    a, b = law(p), law(q)
    d = log_ratio(p, q, a, b)
    mean = (a.probs + b.probs) / 2
    value = lax.stop_gradient(compensated_sum(product(mean, _two_sided(d))))
    slopes = (
        _slope_to_halfway(a.probs, b.probs, d, ratio_from_top(a.probs, d, p, q)),
        _slope_to_halfway(b.probs, a.probs, -d, ratio_from_top(b.probs, -d, q, p)),
    )
    return with_slopes(value, slopes, a.scores, b.scores)


def divergence(p: Law, q: Array, d: Array, moved: Array, *q_scores: Array) -> Array:
    """sum p (exp(d) - 1 - d) with d = log(q / p); a shift of d counts by its square.

    The slope in p takes `moved`, which is d but for a constant.
    """
    far = (d > 2) | (p.probs == 0)
    near_terms = p.probs * exp_less_line(jnp.where(far, 0, d))
    far_d = jnp.where(far & (p.probs > 0), d, 0)
    terms = jnp.where(far, q - p.probs - p.probs * far_d, near_terms)
    slopes = score_slope(p.probs, -moved), excess(p.probs, q, d)
    value = lax.stop_gradient(compensated_sum(terms))
    return with_slopes(value, slopes[: 1 + len(q_scores)], p.scores, *q_scores)


def _two_sided(d: Array) -> Array:
    """((1 + h) log(1 + h) + (1 - h) log(1 - h)) / 2 of h = tanh(d / 2): JS per m_j.

    By its even series in h, but where |h| is near 1; there 1 - |h| is no difference.
    """
    less, e = expm1(-jnp.abs(d)), jnp.exp(-jnp.abs(d))
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
    p_top = lax.stop_gradient(p.max(-1, keepdims=True))
    share = q_top / (p_top + q_top)  # exp(d_k) / (1 + exp(d_k))
    d, moved = (jnp.where(p == 0, 0, x) for x in (d, moved))
    near = jnp.abs(moved) < 1
    grown = expm1(jnp.where(near, moved, 0)) * share
    below = grown < 0
    size = log1p(jnp.where(below, -grown / (1 + grown), grown))  # of a number >= 0
    far = _log_of_one_plus_ratio(q_top, p_top, origin) - _log_of_one_plus_ratio(q, p, d)
    s = jnp.where(near, jnp.where(below, size, -size), far)
    return score_slope(p, s) / 2


def _log_of_one_plus_ratio(q: Array, p: Array, d: Array) -> Array:
    """log(1 + q / p), d being log(q / p): where that is large, its rounding counts."""
    larger = jnp.maximum(p, q)
    ratio = jnp.minimum(p, q) / jnp.where(larger == 0, 1, larger)
    ratio = jnp.where(jnp.abs(d) < 4, jnp.exp(-jnp.abs(d)), ratio)
    return jnp.maximum(d, 0) + log1p(ratio)
