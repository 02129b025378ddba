"""The log-partition function of a row of logits, kept as two numbers.

lse(z) = max + log1p(tail), where tail is the sum of exp(z_j - max) over all j but one
that attains the maximum. Nothing is lost when the model is certain (tail = 1e-30), and
two partitions merge into one, so a row in memory, a chunk of a vocabulary and a shard
on another device are all reduced and merged by the same few lines.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

TILE_ELEMENTS = 2**20  # a tile of logits and its exponentials stay in a CPU's cache
TILE_CLASSES = (128, 2**16)  # the least and the most of one row


class Partition(NamedTuple):
    """A log-partition function; that of no class at all is (-inf, -1)."""

    max: Float[Array, "*batch"]
    tail: Float[Array, "*batch"]


def shifted_exp(z: Array, shift: Array) -> Array:
    """exp(z - shift) for z <= shift, with the rounding of the difference undone.

    The difference is d + e exactly (Knuth's two-sum), so exp(z - shift) is
    exp(d) * (1 + e): rounding d alone costs 60 ULP at |z| = 50. Two +inf are taken as
    equal: the limit of logits that grow together.
    """
    largest = jnp.finfo(z.dtype).max
    z, shift = jnp.minimum(z, largest), jnp.minimum(shift, largest)
    d = z - shift
    z_part = d - z
    e = (z - (d - z_part)) - (shift + z_part)
    exp_d = jnp.exp(d)
    return exp_d + exp_d * jnp.where(exp_d > 0, e, 0)


def gap(z: Array, top: Array) -> Array:
    """top - z for z <= top. Two +inf are 0 apart; two -inf have no distance (NaN)."""
    return jnp.where((z == top) & (top > 0), 0, top - z)


def partition(z: Float[Array, "*batch classes"]) -> Partition:
    """Reduce the last axis to its partition.

    Accelerators fuse the exponentials into their sum. XLA for CPU writes them to
    memory, so there a row is reduced tile by tile, each small enough for the cache.
    """
    return lax.platform_dependent(z, cpu=_in_tiles, default=_at_once)


def merge(a: Partition, b: Partition) -> Partition:
    """(m, t) + (n, u) = (m, t + (1 + u) * exp(n - m)), where m >= n."""
    a_leads = a.max >= b.max
    m, n = jnp.maximum(a.max, b.max), jnp.minimum(a.max, b.max)
    t, u = jnp.where(a_leads, a.tail, b.tail), jnp.where(a_leads, b.tail, a.tail)
    return Partition(m, t + (1 + u) * jnp.where(n == -jnp.inf, 0, shifted_exp(n, m)))


def log_partition(p: Partition) -> Float[Array, "*batch"]:
    """lse = max + log1p(tail); -inf when every class is ruled out."""
    return jnp.where(p.max == -jnp.inf, -jnp.inf, p.max + jnp.log1p(p.tail))


def _at_once(z: Array) -> Partition:
    top, tail_terms, is_top = _terms(z)
    return _summed(top, tail_terms, is_top)


def _in_tiles(z: Array) -> Partition:
    classes, rows = z.shape[-1], max(1, z.size // z.shape[-1])
    least, most = TILE_CLASSES
    width = min(classes, most, max(least, TILE_ELEMENTS // rows))
    tiles = classes // width
    if tiles == 1:
        return _tile(z)

    def tile(index: Array) -> Partition:
        return _tile(lax.dynamic_slice_in_dim(z, index * width, width, axis=-1))

    whole = _merge_all(lax.map(tile, jnp.arange(tiles)))
    rest = z[..., tiles * width :]
    return merge(whole, _tile(rest)) if rest.shape[-1] else whole


def _tile(z: Array) -> Partition:
    # XLA's vectorised sum needs its terms in memory: the barrier keeps them apart.
    return _summed(*lax.optimization_barrier(_terms(z)))


def _terms(z: Array) -> tuple[Array, Array, Array]:
    top = z.max(-1, keepdims=True)
    is_top = z == top
    tail_terms = jnp.where(is_top, 0, shifted_exp(z, top))
    return top[..., 0], tail_terms, jnp.where(is_top, 1, 0).astype(z.dtype)


def _summed(top: Array, tail_terms: Array, is_top: Array) -> Partition:
    other_tops = jnp.where(top == -jnp.inf, 0, is_top.sum(-1)) - 1
    return Partition(top, tail_terms.sum(-1) + other_tops)


def _merge_all(parts: Partition) -> Partition:
    """Merge over the leading axis by pairs, which rounds log2(n) times, not n."""
    count = parts.max.shape[0]
    while count > 1:
        half, odd = divmod(count, 2)
        left, right, last = (
            Partition(*(leaf[piece] for leaf in parts))
            for piece in (slice(half), slice(half, 2 * half), slice(2 * half, count))
        )
        merged = merge(left, right)
        parts = Partition(*map(jnp.concatenate, zip(merged, last, strict=True)))
        count = half + odd
    return Partition(*(leaf[0] for leaf in parts))
