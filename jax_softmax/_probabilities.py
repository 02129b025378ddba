"""Probabilities made quicker where few digits, or one kernel, are enough.

Results of 16 bits need no exponential of 24, and no sum that keeps what it loses. XLA
for a GPU fuses a softmax whole, so that a row is read once, where rows are short and
all that reduces them are plain sums: what those lose is put right afterwards.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jax_softmax import _checks as checks
from jax_softmax._entries import FEW_CLASSES
from jax_softmax._exponential import RAISED, coarse_exp, distance_below, shifted_exp
from jax_softmax._folds import others_sum
from jax_softmax._partition import gap
from jax_softmax._platform import by_platform, once

GPU_BLOCK = 1000  # classes: from 1024 on, XLA often splits the kernel


class Shares(NamedTuple):
    """How a row's probability is shared, in at least float32."""

    log_probs: Float[Array, "*batch classes"]
    probs: Float[Array, "*batch classes"]


def quicker(z: Float[Array, "*batch classes"], shares: Shares) -> Shares:
    """The shares of z, to be rounded to its type, made again where that pays."""

    def kept(z: Array, *shares: Array) -> Shares:
        return Shares(*shares)

    def narrow(z: Array, *_: Array) -> Shares:
        return _of_16_bits(z)

    def narrow_on_cpu(z: Array, *_: Array) -> Shares:
        return _of_16_bits_in_slices(z)

    def on_gpu(z: Array, log_probs: Array, _: Array) -> Shares:
        return Shares(log_probs, _adding_up_to_1(z))

    if z.dtype.itemsize == 2:
        few = z.shape[-1] <= FEW_CLASSES
        on_cpu = kept if few else narrow_on_cpu
        return by_platform(z, *shares, cpu=on_cpu, default=narrow)
    one_row = all(size == 1 for size in z.shape[:-1])  # which XLA never fuses whole
    if z.shape[-1] <= GPU_BLOCK and not one_row:
        return by_platform(z, *shares, cpu=kept, gpu=on_gpu, default=kept)
    return shares


def _adding_up_to_1(z: Array) -> Array:
    """exp(z - max) over the sum of them all, corrected by what then is missing of 1.

        p = w + w (1 - sum of w),   w = exp(z - max) / sum

    What the first sum and the quotient have lost, the second sum finds: of multiples of
    the last place of 2, which add up without rounding, and of what they leave. All is
    2^RAISED times too large meanwhile, so that no correction underflows.
    """
    one = 2.0**RAISED
    top = z.max(-1, keepdims=True)
    exp = shifted_exp(z, top, raised=RAISED)
    w = exp * (one / exp.sum(-1, keepdims=True))
    # No constant, nor one number for a row, or XLA takes w for (w + two) - two.
    two = jnp.maximum(2 * one, w)
    coarse = (w + two) - two
    missing = one - coarse.sum(-1, keepdims=True)
    missing = missing - (w - coarse).sum(-1, keepdims=True)
    return (w + w * (missing / one)) / one


def _of_16_bits(z: Array) -> Shares:
    """Both will be rounded to 16 bits, beside which no other rounding counts."""
    z = checks.wide(z)
    top = z.max(-1, keepdims=True)
    is_top, distance = z == top, gap(z, top)
    exp = jnp.exp(-distance)
    tops = is_top.sum(-1, keepdims=True, dtype=z.dtype)
    tail = jnp.where(is_top, 0, exp).sum(-1, keepdims=True) + (tops - 1)
    log_probs = -(distance + jnp.log1p(tail))
    return Shares(log_probs, exp / exp.sum(-1, keepdims=True))


def _of_16_bits_in_slices(z: Array) -> Shares:
    """The same in vector loops of a CPU."""
    top = checks.wide(z.max(-1, keepdims=True))

    def exp_and_top(part: Array) -> tuple[Array, None, Array]:
        part = checks.wide(part)
        return coarse_exp(distance_below(part, top)), None, part >= top

    high, _, tops = others_sum(exp_and_top, z, jnp.ones_like(top))
    tail = once(high + (tops - 1))[..., None]
    below = distance_below(checks.wide(z), top)
    return Shares(below - jnp.log1p(tail), coarse_exp(below) * (1 / (1 + tail)))
