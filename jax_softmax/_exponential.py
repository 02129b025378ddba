"""exp(z - top) for a row of logits, without the rounding of z - top.

XLA's exp is within 1 ULP of exp(rounded difference), and that rounding alone costs 60
ULP at |z| = 50. Both exponentials here avoid it, and round only sums and products, so
that every platform has the same accuracy: 2^k exp(r), split by Cody & Waite, with
|r| <= log(2) / 2 and exp(r) by a polynomial.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jax_softmax._tracing import traced_once

RAISED = 64  # exponentials are summed 2^64 times too large, so that few underflow

# log(2) as a short number, which times k is exact, and the rest.
LOG2_SHORT = {32: 355 / 512, 64: round(math.log(2) * 2**32) / 2**32}
LOG2_REST = {
    32: math.log(2) - LOG2_SHORT[32],
    64: (math.log(2) - LOG2_SHORT[64]) + 2.3190468138462996e-17,
}
# exp(r) = 1 + r + r^2 (c_0 + c_1 r + ...): of least relative error up to log(2) / 2 in
# float32 (3e-9, an iterated least-squares fit), Taylor's in float64.
_SERIES = {
    32: (0.49999994, 0.16666520, 0.041668400, 0.0083688516, 0.0013814321),
    64: tuple(1 / math.factorial(n) for n in range(2, 14)),
}


@traced_once()
def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b exactly, as the rounded sum and its rounding (Knuth).

    A constant is b: XLA simplifies (1 + b) - 1 to b.
    """
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def shifted_exp(z: Array, shift: Array, *, raised: int = 0) -> Array:
    """exp(z - shift) * 2^raised for z <= shift, within 1 ULP.

    The difference is high + low exactly. Two +inf are taken as equal: the limit of
    logits that grow together. Of -inf it is 0, whatever the shift.
    """
    reduced, low, power = _reduced(z, shift, raised)
    r = reduced + low
    return (1 + _expm1(r, (reduced - r) + low)) * power


def shifted_exp_and_rest(
    z: Array, shift: Array, *, raised: int = 0
) -> tuple[Array, Array]:
    """The same as a number and what its rounding left, within a third of an ULP."""
    reduced, low, power = _reduced(z, shift, raised)
    r = reduced + low
    less_one = _expm1(r, (reduced - r) + low)
    exp, rest = two_sum(less_one, jnp.ones_like(less_one))
    return exp * power, rest * power


def _reduced(z: Array, shift: Array, raised: int) -> tuple[Array, Array, Array]:
    """Of exp(z - shift) 2^raised = exp(reduced + low) power, what is on the right."""
    kind = jnp.finfo(z.dtype)
    z, shift = jnp.minimum(z, kind.max), jnp.clip(shift, kind.min, kind.max)
    high, low = two_sum(z, -shift)
    least = (kind.minexp - 1 - raised) * math.log(2)
    low = jnp.where(high > least, low, 0)
    high = jnp.maximum(high, least)
    k = jnp.round(high / math.log(2))
    reduced = high - k * LOG2_SHORT[kind.bits]
    low = low - k * LOG2_REST[kind.bits]
    return reduced, low, _power_of_two(k, jnp.asarray(raised, z.dtype))


class RowScale(NamedTuple):
    """How a row with this maximum is split: top = pivot + offset, 2^exponent near it.

    The pivot is 0, or the maximum itself where it is large. Either way z - pivot is
    exact for every z whose exponential counts: each logit is reduced on its own, and
    what the maximum leaves is one factor for the whole row.
    """

    pivot: Float[Array, "*batch 1"]
    offset: Float[Array, "*batch 1"]
    exponent: Float[Array, "*batch 1"]
    top: Float[Array, "*batch 1"]


def row_scale(top: Float[Array, "*batch 1"]) -> RowScale:
    """The scale of rows with these maxima."""
    kind = jnp.finfo(top.dtype)
    reach = (kind.nmant - kind.minexp) * math.log(2)  # exp of -reach is 0
    far = jnp.abs(top) > 2 * reach
    offset = jnp.where(far, 0, top)
    pivot = jnp.where(far, jnp.clip(top, -kind.max, kind.max), 0)
    exponent = jnp.round(offset / math.log(2))
    return RowScale(pivot, offset, exponent, top)


def raised_exp(
    z: Array, scale: RowScale, low: Array | float = 0.0
) -> tuple[Array, Array, Array]:
    """exp(z - pivot) exp(low) 2^(RAISED - exponent) for z <= top, and where z = top.

    The first two numbers make it up, within 0.25 ULP.
    """
    kind = jnp.finfo(z.dtype)
    is_top = z >= scale.top
    high = z - scale.pivot
    least = (scale.exponent + (kind.minexp - 1 - RAISED)) * math.log(2)
    high = jnp.where(high < least, least, high)  # so that a NaN stays
    k = jnp.round(high * (1 / math.log(2)))
    reduced, rest = high - k * LOG2_SHORT[kind.bits], -k * LOG2_REST[kind.bits]
    power = _power_of_two(k, RAISED - scale.exponent)
    return *_scaled_exp(reduced, rest + low, power), is_top


def raised_shifted_exp(z: Array, shift: Array) -> Array:
    """exp(z - shift) 2^RAISED for z <= shift, within 0.7 ULP."""
    high, low = _scaled_exp(*_reduced(z, shift, RAISED))
    return high + low


def distance_below(z: Array, top: Array) -> Array:
    """z - top for z <= top, rounded. Two +inf are as far apart as equal numbers."""
    most = jnp.finfo(z.dtype).max
    return jnp.minimum(z, most) - jnp.minimum(top, most)


def coarse_exp(d: Array) -> Array:
    """exp(d) in float32 for d <= 0, within 3e-6 of it: where 16 bits are wanted.

    2^k 2^f, with |f| <= 1/2 and 2^f by a polynomial of least relative error.
    """
    t = jnp.maximum(d * (1 / math.log(2)), -127.0)  # of which the power is 0
    k = jnp.round(t)
    f = t - k
    power = 1 + f * (0.6931242 + f * (0.240241 + f * (0.05590643 + f * 0.00958285)))
    return power * _power_of_two(k, jnp.zeros_like(k))


def row_factor(scale: RowScale) -> tuple[Array, Array]:
    """exp(pivot - top) 2^exponent, the factor raised_exp leaves, as high + low."""
    bits = jnp.finfo(scale.offset.dtype).bits
    reduced = scale.offset - scale.exponent * LOG2_SHORT[bits]
    rest, rest_low = two_product(scale.exponent, LOG2_REST[bits])
    high, low = two_sum(reduced, -rest)
    low = low - rest_low
    one_less, rounding = two_sum(-high, jnp.ones_like(high))
    curve = _curve(-high) * (high * high)
    factor, curve_low = two_sum(one_less, curve)
    return factor, curve_low + (rounding - low * factor)


@traced_once()
def two_product(a: Array, b: Array | float) -> tuple[Array, Array]:
    """a b exactly, as the rounded product and its rounding (Dekker)."""
    b = jnp.asarray(b, a.dtype)
    kind = jnp.finfo(a.dtype)

    def halves(x: Array) -> tuple[Array, Array]:
        upper = lax.reduce_precision(x, kind.nexp, (kind.nmant - 1) // 2)
        return upper, x - upper

    (a1, a2), (b1, b2) = halves(a), halves(b)
    high = a * b
    return high, ((a1 * b1 - high) + a1 * b2 + a2 * b1) + a2 * b2


def quotient(
    a: tuple[Array, Array | float], b: tuple[Array, Array | float]
) -> tuple[Array, Array]:
    """(a + a_low) / (b + b_low), as high + low: an H100 divides within 2 ULP only."""
    high = a[0] / b[0]
    product, product_low = two_product(high, b[0])
    rest = ((a[0] - product) - product_low) + (a[1] - high * b[1])
    return high, rest / b[0]


def _scaled_exp(reduced: Array, low: Array, power: Array) -> tuple[Array, Array]:
    """exp(reduced + low) power as high + low, within 0.25 ULP, if power is so large
    that its product with what is small does not underflow."""
    r = reduced + low
    small = _curve(r) * (r * r) + low
    part = power * reduced
    total = power + part
    return total, ((power - total) + part) + power * small


def _expm1(r: Array, low: Array | float) -> Array:
    return r + (_curve(r) * (r * r) + low)


@traced_once()
def _curve(r: Array) -> Array:
    """(exp(r) - 1 - r) / r^2."""
    *lower, highest = _SERIES[jnp.finfo(r.dtype).bits]
    curve = jnp.full_like(r, highest)
    for coefficient in reversed(lower):
        curve = curve * r + coefficient
    return curve


def _power_of_two(k: Array, raised: Array) -> Array:
    """2^(k + raised) for whole numbers; 0 from the smallest normal number down.

    Added to 1.5 * 2^nmant, a whole number stands in the low bits of the sum. A product
    moves them up, since with a shift XLA for a GPU does not fuse a row's softmax whole.
    """
    kind = jnp.finfo(k.dtype)
    whole = jnp.int32 if kind.bits == 32 else jnp.int64
    biased = k + (raised + (1.5 * 2.0**kind.nmant + 1 - kind.minexp))
    exponent = lax.bitcast_convert_type(biased, whole) * 2**kind.nmant
    return lax.bitcast_convert_type(exponent, k.dtype)
