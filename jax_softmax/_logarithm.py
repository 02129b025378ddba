"""log(1 + tail) of a tail >= 0, where XLA's own is up to 2.5 ULP off.

1 + tail = 2^e (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and

    log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + R)),   s = f / (2 + f),
    R = s^2 (2/3 + 2/5 s^2 + 2/7 s^4 + ...)

so that all but e log(2) and f, which both are exact, is small. (The reduction is that
of FreeBSD's msun, e_log.c.)
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax._exponential import LOG2_REST, LOG2_SHORT, two_product, two_sum
from jax_softmax._tracing import traced_once

_TERMS = {32: 5, 64: 13}  # of R's series: the next is below 1e-10 or 1e-20 of f


def log1p(tail: Array) -> Array:
    """log(1 + tail) for 0 <= tail <= 1e30, within 0.9 ULP."""
    large, small = log1p_parts(tail)
    return large + small


@jax.custom_jvp
@traced_once()
def log1p_parts(tail: Array) -> tuple[Array, Array]:
    """log(1 + tail) as a number and what its rounding left, within 0.45 ULP.

    The empty partition's tail, -1, gives anything.
    """
    kind = jnp.finfo(tail.dtype)
    total, low = two_sum(tail, jnp.ones_like(tail))
    e, mantissa, scale = _split(total)
    as_it_is = e == 0
    f, lost = two_sum(
        jnp.where(as_it_is, 0, low * scale), jnp.where(as_it_is, tail, mantissa - 1)
    )
    square, square_lost = two_product(f, f)
    half_square = 0.5 * square
    s = f / (2 + f)
    small = s * s
    series = jnp.full_like(f, 2 / (2 * _TERMS[kind.bits] + 1))
    for n in range(_TERMS[kind.bits] - 1, 0, -1):
        series = series * small + 2 / (2 * n + 1)
    rest = (s * (half_square + small * series) - 0.5 * square_lost) - half_square
    large, more = two_sum(e * LOG2_SHORT[kind.bits], f)
    return large, rest + (more + (lost + e * LOG2_REST[kind.bits]))


@log1p_parts.defjvp
def _log1p_parts_jvp(primals, tangents):
    (tail,), (change,) = primals, tangents
    parts = log1p_parts(tail)
    return parts, (change / (1 + tail), jnp.zeros_like(parts[1]))


def _split(total: Array) -> tuple[Array, Array, Array]:
    """e, total 2^-e between sqrt(1/2) and sqrt(2), and 2^-e."""
    kind = jnp.finfo(total.dtype)
    whole = jnp.int32 if kind.bits == 32 else jnp.int64

    def bits(number: Array) -> Array:
        return lax.bitcast_convert_type(number, whole)

    def number(bits: Array) -> Array:
        return lax.bitcast_convert_type(bits, total.dtype)

    least = bits(jnp.asarray(0.5**0.5, total.dtype))
    e = (bits(total) - least) >> kind.nmant
    scale = number((1 - kind.minexp - e) << kind.nmant)
    return e.astype(total.dtype), number(bits(total) - (e << kind.nmant)), scale
