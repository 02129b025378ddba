"""The log-partition function of a row of logits, kept as two numbers.

lse(z) = max + log1p(tail), where tail is the sum of exp(z_j - max) over all j but one
that attains the maximum. Nothing is lost when the model is certain (tail = 1e-30), and
two partitions merge into one, so a row in memory, a chunk of a vocabulary and a shard
on another device are all reduced and merged by the same few lines.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jax_softmax import _checks as checks
from jax_softmax._entries import FEW_CLASSES
from jax_softmax._exponential import (
    RAISED,
    coarse_exp,
    distance_below,
    quotient,
    raised_exp,
    raised_shifted_exp,
    row_factor,
    row_scale,
    shifted_exp,
    shifted_exp_and_rest,
    two_product,
    two_sum,
)
from jax_softmax._folds import others_sum, row_sum, stored_sum
from jax_softmax._logarithm import log1p_parts
from jax_softmax._platform import both_once, by_platform, once
from jax_softmax._shards import Shards


class Partition(NamedTuple):
    """A log-partition function; that of no class at all is (-inf, -1).

    The tail is kept 2^RAISED times too large: less of it underflows before a merge.
    What its rounding left stays with it until then, where it is known.
    """

    max: Float[Array, "*batch"]
    raised_tail: Float[Array, "*batch"]
    raised_rest: Float[Array, "*batch"] | None = None

    @property
    def tail(self) -> Float[Array, "*batch"]:
        return self.raised_tail * 2.0**-RAISED

    @property
    def column(self) -> "Partition":
        """Beside the logits of its rows: [*batch, 1]."""
        return jax.tree.map(lambda leaf: leaf[..., None], self)

    @property
    def rest(self) -> Float[Array, "*batch"] | float:
        return 0.0 if self.raised_rest is None else self.raised_rest * 2.0**-RAISED


def gap(z: Array, top: Array) -> Array:
    """top - z for z <= top. Two +inf are 0 apart; two -inf have no distance (NaN)."""
    return jnp.where((z == top) & (top > 0), 0, top - z)


def partition(z: Float[Array, "*batch classes"]) -> Partition:
    """Reduce the last axis to its partition, as two numbers.

    Logits of 16 bits are widened slice by slice: no row is written out in float32.
    """
    return _two_numbers(partition_and_rest(z))


def _two_numbers(p: Partition) -> Partition:
    return p._replace(raised_rest=None)


def partition_and_rest(z: Array) -> Partition:
    if z.shape[-1] <= FEW_CLASSES:
        return partition_and_exp(z)[0]
    top = checks.wide(z.max(-1, keepdims=True))
    scale = row_scale(top)
    factor, factor_low = row_factor(scale)

    def exp_and_top(part: Array) -> tuple[Array, Array, Array]:
        return raised_exp(checks.wide(part), scale)

    sums = others_sum(exp_and_top, z, 2.0**RAISED / factor)
    high, low, tops = (leaf[..., None] for leaf in sums)
    product, rounding = two_product(high, factor)
    rounding = rounding + (high * factor_low + low * factor)
    total, lost = two_sum(product, _at_top(tops))
    tail, rest = two_sum(total, lost + rounding)
    rest = jnp.where(top == -jnp.inf, 0, rest)
    return Partition(top[..., 0], *both_once(_tail_of(top, tail)[..., 0], rest[..., 0]))


def partition_and_exp(z: Float[Array, "*batch classes"]) -> tuple[Partition, Array]:
    """The partition of logits that fit the cache, and exp(z - max).

    The partition is two numbers: for a third, XLA for CPU would write out all terms.
    """
    z = checks.wide(z)
    top = z.max(-1, keepdims=True)
    is_top = z == top
    terms = jnp.where(is_top, 0, raised_shifted_exp(z, top))
    terms, *sums = stored_sum(terms, is_top)
    total, tops = (leaf[..., None] for leaf in sums)
    moved = (z - lax.stop_gradient(z)) - (top - lax.stop_gradient(top))
    at_top = 1 + jnp.where(jnp.isfinite(top), moved, 0)  # 1, and its derivative
    exp = jnp.where(is_top, at_top, terms * 2.0**-RAISED)
    tail = _tail_of(top, total + _at_top(tops))
    return Partition(top[..., 0], once(tail[..., 0])), exp


def partition_and_probability(
    z: Float[Array, "*batch classes"], shards: Shards, *, rounds: bool
) -> tuple[Partition, Array]:
    """The partition, and exp(z - max) / (1 + tail), which may be rounded to the type of
    z later on; over devices, two numbers travel for each row."""
    if shards.alone and z.shape[-1] <= FEW_CLASSES:
        part, exp = partition_and_exp(z)
        return part, _share(exp, part.column)
    part = partition_and_rest(z)
    if not shards.alone:
        part = merge(shards.each(_two_numbers(part)))
    return part, _probability(z, part.column, rounds)


def _probability(z: Array, p: Partition, rounds: bool) -> Array:
    """exp(z - max) / (1 + tail)."""
    few_digits = rounds and z.dtype.itemsize == 2  # beside which nothing else counts

    def on_cpu(z: Array, *leaves: Array) -> Array:
        p, z = Partition(*leaves), checks.wide(z)
        if few_digits:
            return coarse_exp(distance_below(z, p.max)) * (1 / (1 + p.tail))
        scale, total = row_scale(p.max), _one_plus_tail(p)
        ratio, low = quotient(row_factor(scale), total)
        exp, rest, is_top = raised_exp(z, scale, low / ratio)
        at_top = _share(jnp.ones_like(p.tail), p)
        share = (exp * ratio + rest * ratio) * 2.0**-RAISED
        return jnp.where(is_top, at_top, share)

    def fused(z: Array, *leaves: Array) -> Array:
        p, wide = Partition(*leaves), checks.wide(z)
        if few_digits:
            return _share(jnp.exp(-gap(wide, p.max)), p)
        return _share(shifted_exp(wide, p.max), p)

    return by_platform(z, *jax.tree.leaves(p), cpu=on_cpu, default=fused)


def complement(z: Array, p: Partition) -> Array:
    """1 - probability, with nothing cancelled: the other terms' sum over 1 + tail."""
    total, low = _one_plus_tail(p)
    high, rest = two_sum(total, -shifted_exp(z, p.max))
    is_top = z == p.max
    others = jnp.where(is_top, p.tail, high)
    return _share(others, p, jnp.where(is_top, p.rest, rest + low))


def _share(terms: Array, p: Partition, rests: Array | None = None) -> Array:
    """(terms + rests) / (1 + tail). A CPU divides exactly; others multiply by the
    inverse."""

    def divided(total: Array, low: Array, terms: Array, *rests: Array) -> Array:
        ratio = terms / total
        if not rests:
            return ratio - ratio * (low / total)
        return ratio + (rests[0] - ratio * low) / total

    def multiplied(total: Array, low: Array, terms: Array, *rests: Array) -> Array:
        inverse, rest = quotient((jnp.ones_like(total), 0), (total, low))
        small = terms * rest
        if rests:
            small = small + rests[0] * inverse
        return terms * inverse + small

    parts = (terms,) if rests is None else (terms, rests)
    return by_platform(*_one_plus_tail(p), *parts, cpu=divided, default=multiplied)


def _one_plus_tail(p: Partition) -> tuple[Array, Array]:
    """1 + tail, as high + low."""
    total, low = two_sum(p.tail, jnp.ones_like(p.tail))
    return total, low + p.rest


@jax.custom_jvp
def compensated_sum(terms: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """The sum of terms, of either sign."""
    high, low = row_sum(terms)
    return high + low


@compensated_sum.defjvp
def _compensated_sum_jvp(primals, tangents):
    return compensated_sum(*primals), tangents[0].sum(-1)


def merge(parts: Partition) -> Partition:
    """The partitions along the leading axis as one.

        (m, t) + (n, u) = (m, t + (1 + u) * exp(n - m)),   m >= n

    However many there are, sums and products are rounded once, at the end.
    """
    place = lax.broadcasted_iota(jnp.int32, parts.max.shape, 0)
    leads = place == parts.max.argmax(0, keepdims=True).astype(place.dtype)
    top = jnp.where(leads, parts.max, 0).sum(0, keepdims=True)
    exp, exp_low = shifted_exp_and_rest(parts.max, top, raised=RAISED)
    exp, exp_low = (jnp.where(leads, 0, part) for part in (exp, exp_low))
    weight, weight_low = _one_plus_tail(parts)
    high, low = two_product(weight, exp)
    low = low + (weight_low * exp + weight * exp_low)
    high = jnp.where(leads, parts.raised_tail, high)
    while (count := high.shape[0]) > 1:
        pairs, rest = slice(count // 2), slice(count // 2 * 2, None)
        other = slice(count // 2, count // 2 * 2)
        total, rounding = two_sum(high[pairs], high[other])
        high = jnp.concatenate((total, high[rest]))
        low = jnp.concatenate((low[pairs] + (low[other] + rounding), low[rest]))
    return Partition(top[0], high[0] + low[0])


def log_total(p: Partition) -> Float[Array, "*batch"]:
    """log(1 + tail)."""
    large, small = _log_total_parts(p)
    return large + small


def _log_total_parts(p: Partition) -> tuple[Array, Array]:
    large, small = log1p_parts(p.tail)
    return large, small + p.rest / (1 + p.tail)


def log_partition(p: Partition) -> Float[Array, "*batch"]:
    """lse = max + log1p(tail), rounded last; -inf when every class is ruled out."""
    large, small = _log_total_parts(p)
    high, low = two_sum(p.max, large)
    lse = high + (jnp.where(jnp.isinf(high), 0, low) + small)
    return jnp.where(p.max == -jnp.inf, -jnp.inf, lse)


def _at_top(tops: Array) -> Array:
    """What all maxima but one add to a raised tail."""
    return (tops - 1) * 2.0**RAISED


def _tail_of(top: Array, raised_sum: Array) -> Array:
    """The raised tail; that of no class at all is told by its maximum."""
    return jnp.where(top == -jnp.inf, -(2.0**RAISED), raised_sum)
