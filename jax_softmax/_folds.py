"""Sums over a row that lose next to nothing, on every platform.

Accelerators add up pairs, a sum and what it has lost, in any order they like. How a CPU
adds is in `_lanes`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_softmax import _checks as checks
from jax_softmax._entries import FEW_CLASSES
from jax_softmax._exponential import two_sum
from jax_softmax._lanes import (
    ExpAndTop,
    Sums,
    exact_sum,
    others_in_lanes,
    row_in_lanes,
)
from jax_softmax._platform import by_platform
from jax_softmax._tracing import traced_once


def row_sum(terms: Array) -> tuple[Array, Array]:
    """The sum of terms over the last axis, as high + low.

    Equal terms add up without rounding, others by pairs.
    """

    def fused(terms: Array) -> tuple[Array, Array]:
        return _sum_of_pairs(terms, False)[:2]

    return by_platform(terms, cpu=row_in_lanes, default=fused)


def others_sum(exp_and_top: ExpAndTop, z: Array, top_exp: Array) -> Sums:
    """The sum of exponentials over the last axis but for tops, as high + low, and how
    many tops there are.

    A CPU may have a top as top_exp, [*batch, 1], in the sum instead of counting it.
    """
    exp_and_top = traced_once()(exp_and_top)

    def rounded_exp(z: Array) -> tuple[Array, Array]:
        exp, rest, is_top = exp_and_top(z)
        return exp if rest is None else exp + rest, is_top

    def fused(z: Array) -> Sums:
        exp, is_top = rounded_exp(z)
        return _sum_of_pairs(jnp.where(is_top, -1, exp), True)

    def on_gpu(z: Array) -> Sums:
        exp, is_top = rounded_exp(z)
        high, low, _ = _sum_of_pairs(jnp.where(is_top, 0, exp), False)
        return high, low, _count_of_tops(z)

    def on_cpu(z: Array) -> Sums:
        return others_in_lanes(exp_and_top, z, top_exp)

    return by_platform(z, cpu=on_cpu, gpu=on_gpu, default=fused)


def stored_sum(terms: Array, is_top: Array) -> tuple[Array, Array, Array]:
    """The terms >= 0, which a CPU keeps in memory, their sum over the last axis, and
    how many tops there are."""

    def on_cpu(terms: Array, is_top: Array) -> tuple[Array, Array, Array]:
        tops = is_top.sum(-1).astype(terms.dtype)
        if terms.shape[-1] > FEW_CLASSES:
            # Or a product in the terms is fused into one part of their sum only.
            terms = lax.optimization_barrier(terms)
        return terms, exact_sum(terms), tops

    def fused(terms: Array, is_top: Array) -> tuple[Array, Array, Array]:
        high, low, tops = _sum_of_pairs(jnp.where(is_top, -1, terms), True)
        return terms, high + low, tops

    return by_platform(terms, is_top, cpu=on_cpu, default=fused)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_of_pairs(terms: Array, marked: bool) -> Sums:
    """The sum over the last axis and what it has lost, in any order an accelerator
    likes. Where some are marked, by being negative, they are not added but counted.

    One array goes in, or XLA for a GPU writes out what two have in common.
    """

    def add(left: Sequence[Array], right: Sequence[Array]) -> Sequence[Array]:
        (one, lost, *count), (other, more_lost, *more) = left, right
        if marked:
            marks = jnp.where(one < 0, 1, 0) + jnp.where(other < 0, 1, 0)
            count = [count[0] + (more[0] + marks.astype(one.dtype))]
            one, other = jnp.maximum(one, 0), jnp.maximum(other, 0)
        total, rounding = two_sum(one, other)
        return total, rounding + (lost + more_lost), *count

    # A choice of terms that is never made, so that these depend on terms: where a scan
    # is differentiated twice, JAX goes past the rule below to that of lax.reduce, which
    # wants a tangent of every operand.
    never = jnp.zeros(terms.shape, bool)
    least = [0.0, -0.0, 0.0] if marked else [0.0, -0.0]  # compilers add no -0
    starts = tuple(np.array(number, terms.dtype) for number in least)
    rest = [jnp.where(never, terms, start) for start in starts[1:]]
    if terms.shape[-1] == 1:  # which a reduction leaves as it is
        only = [of_row[..., 0] for of_row in (terms, *rest)]
        high, low, *count = add(only, [jnp.zeros_like(number) for number in only])
    else:
        high, low, *count = lax.reduce((terms, *rest), starts, add, (terms.ndim - 1,))
    low = jnp.where(jnp.isfinite(high), low, 0)
    return high, low, count[0] if marked else jnp.zeros_like(high)


@_sum_of_pairs.defjvp
def _sum_of_pairs_jvp(marked, primals, tangents):
    (terms,), (change,) = primals, tangents
    change = (jnp.where(terms < 0, 0, change) if marked else change).sum(-1)
    zeros = jnp.zeros_like(change)
    return _sum_of_pairs(terms, marked), (change, zeros, zeros)


def _count_of_tops(z: Array) -> Array:
    """How often the maximum stands in a row, counted by a GPU on its way to find it:
    where reading takes as long as arithmetic, that is free."""

    def larger(left: Sequence[Array], right: Sequence[Array]) -> Sequence[Array]:
        (one, count), (other, more) = left, right
        top = jnp.maximum(one, other)
        return top, jnp.where(one == top, count, 0) + jnp.where(other == top, more, 0)

    z = lax.stop_gradient(checks.wide(z))
    none = np.array(-np.inf, z.dtype), np.zeros((), z.dtype)
    return lax.reduce((z, jnp.ones_like(z)), none, larger, (z.ndim - 1,))[1]
