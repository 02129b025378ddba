"""d_j = log(q_j / p_j), right also where two distributions nearly agree.

It is taken from exact differences of the logits and not from two rounded logarithms.
What is left is an error that all classes share, and it is taken out again, since the
mean of exp(d) under p is 1. What is made of d, such as q - p, keeps its digits near 0.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from jax_softmax._distributions import (
    Distribution,
    Law,
    Logits,
    Probs,
    at_largest,
    moving_as,
    weight_ratio,
)
from jax_softmax._entries import row_entry
from jax_softmax._exponential import two_sum
from jax_softmax._partition import compensated_sum
from jax_softmax._platform import once


def log_ratio(p: Distribution, q: Distribution, a: Law, b: Law) -> Array:
    """log(q_j / p_j): +inf where p alone is 0, -inf where q alone is, 0 where both."""
    ruled_out = (a.probs == 0) & (b.probs == 0)
    log_p, log_q = (jnp.where(ruled_out, 0, x.log_probs) for x in (a, b))
    like = log_q - log_p
    high, low, shift = like, jnp.zeros_like(like), jnp.zeros_like(a.log_total)
    match p, q:
        case Logits(), Logits():
            z_top, y_top = (x.scores.max(-1, keepdims=True) for x in (a, b))
            step, rest, exact = _step(a.scores, z_top, b.scores, y_top)
            high, low = jnp.where(exact, step, like), jnp.where(exact, rest, 0)
            shift = jnp.where(exact, a.log_total - b.log_total, 0)
        case Probs(), Probs():
            u, v = jnp.asarray(p[0]), jnp.asarray(q[0])
            ruled_in = (u > 0) & (v > 0)
            one_u, one_v = (jnp.where(ruled_in, x, 1) for x in (u, v))
            in_sum = jnp.log(u.sum(-1, keepdims=True) / v.sum(-1, keepdims=True))
            # Beside a larger term the two logarithms' own rounding is the smaller one.
            precise = ruled_in & (jnp.abs(in_sum) < 1)
            high = jnp.where(precise, weight_ratio(one_v, one_u), like)
            shift = jnp.where(precise, in_sum, 0)
    d = _shifted(high, low, shift)
    # The second time it is no larger than d, and so is what rounding leaves of it.
    for _ in range(2):
        more = _made_once(excess(a.probs, b.probs, d))
        shift = shift - jnp.log1p(compensated_sum(more)[..., None])
        d = _shifted(high, low, shift)
    return moving_as(like, _made_once(d))


def _made_once(x: Array) -> Array:
    """Or XLA for CPU would make it again in each of the many loops that use it."""
    return once(lax.stop_gradient(x))


def ratio_from_top(p: Array, d: Array, of: Distribution, other: Distribution) -> Array:
    """d less its value at the largest p. Of Logits it is a difference of differences:
    d itself has been rounded at its own size."""
    moved = d - at_largest(p, d)
    if not (isinstance(of, Logits) and isinstance(other, Logits)):
        return moved
    z, y = jnp.asarray(of.logits), jnp.asarray(other.logits)
    z_top, y_top = (row_entry(x, p.argmax(-1))[..., None] for x in (z, y))
    step, rest, exact = _step(z, z_top, y, y_top)
    return moving_as(moved, jnp.where(exact & jnp.isfinite(d), step + rest, moved))


def drops_from_top(p: Array, q: Distribution, drops: Array) -> Array:
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


def excess(p: Array, q: Array, d: Array) -> Array:
    """q - p, where q = p exp(d): nothing cancels while d is small."""
    far = (d > 1) | (p == 0)
    return jnp.where(far, q - p, p * expm1(jnp.where(far, 0, d)))


def expm1(d: Array) -> Array:
    """exp(d) - 1 for d <= 2 within 1.5 ULP, where XLA's takes 5."""
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    return jnp.where(near, small + exp_less_line(small), jnp.exp(d) - 1)


def exp_less_line(d: Array) -> Array:
    """exp(d) - 1 - d >= 0 for d <= 2, within 4 ULP, near 0 by Taylor's series."""
    near = d > -1
    x, far = jnp.where(near, d, 0), jnp.where(near, -1, d)
    last = 14 if jnp.finfo(d.dtype).bits == 32 else 23
    series = jnp.full_like(x, 1 / math.factorial(last))
    for n in range(last - 1, 1, -1):
        series = series * x + 1 / math.factorial(n)
    return jnp.where(near, x * x * series, (jnp.exp(far) - 1) - far)


def _step(z: Array, z_top: Array, y: Array, y_top: Array) -> tuple[Array, Array, Array]:
    """(y - y_top) - (z - z_top), as high + low, and where that is a number."""
    (z, z_low), (y, y_low) = difference(z, z_top), difference(y, y_top)
    finite = jnp.isfinite(z) & jnp.isfinite(y)
    step, lost = two_sum(y, -z)
    small, more_lost = two_sum(y_low, -z_low)
    high, low = two_sum(step, small)
    return high, low + (lost + more_lost), finite


def _shifted(high: Array, low: Array, shift: Array) -> Array:
    """high + low + shift, rounded about once whatever cancels; infinities stay."""
    total, rounding = two_sum(high, shift)
    return jnp.where(jnp.isfinite(high), total + (rounding + low), high)


def difference(z: Array, top: Array) -> tuple[Array, Array]:
    """z - top exactly, as high + low; high is not finite where either is not."""
    high, low = two_sum(z, -top)
    return high, jnp.where(jnp.isfinite(high), low, 0)


def sum_rounded_once(a: Array, b: Array, c: Array, small: Array) -> Array:
    """a + b + c + small, rounded about once whatever cancels."""
    ab, rest = two_sum(a, b)
    abc, more = two_sum(ab, c)
    return abc + (more + (rest + small))
