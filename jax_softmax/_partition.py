"""The log-partition function of a row of logits, kept as two numbers.

lse(z) = max + log1p(tail), where tail is the sum of exp(z_j - max) over all j but one
that attains the maximum. Nothing is lost when the model is certain (tail = 1e-30), and
two partitions merge into one, so a row in memory, a chunk of a vocabulary and a shard
on another device are all reduced and merged by the same few lines.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jax_softmax._shards import Shards

TILE_ELEMENTS = 2**20  # a tile of logits and its exponentials stay in a CPU's cache
TILE_CLASSES = 128  # the least of one row
FEW_CLASSES = 16
RAISED = 64  # terms of a tail are summed 2^64 times too large, so that few underflow

# log(2) as a short number, which times k is exact, and the rest; the degree of exp's
# series, whose remainder at log(2) / 2 is an eighth of a rounding.
_SHORT = 355 / 512, round(math.log(2) * 2**32) / 2**32
_EXP = {
    32: (_SHORT[0], math.log(2) - _SHORT[0], 7),
    64: (_SHORT[1], (math.log(2) - _SHORT[1]) + 2.3190468138462996e-17, 13),
}


class Partition(NamedTuple):
    """A log-partition function; that of no class at all is (-inf, -1)."""

    max: Float[Array, "*batch"]
    tail: Float[Array, "*batch"]


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b exactly, as the rounded sum and its rounding (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def shifted_exp(
    z: Array, shift: Array, *, shift_low: Array | float = 0.0, raised: int = 0
) -> Array:
    """exp(z - shift - shift_low) * 2^raised for z <= shift, within 1 ULP.

    XLA's exp is within 1 ULP of exp(rounded difference), and that rounding costs 60 ULP
    at |z| = 50. Here the difference is high + low exactly (Knuth's two-sum), split as
    k log(2) + r (Cody & Waite), and exp(z - shift) = 2^k exp(r) by Taylor's series.
    Only sums and products are rounded, so every platform has the same accuracy.
    Two +inf are taken as equal: the limit of logits that grow together.
    """
    kind = jnp.finfo(z.dtype)
    z, shift = jnp.minimum(z, kind.max), jnp.minimum(shift, kind.max)
    high, low = two_sum(z, -shift)
    low = low - shift_low
    least = (kind.minexp - RAISED) * math.log(2)
    low = jnp.where(high > least, low, 0)
    high = jnp.maximum(high, least)

    k = jnp.round(high * (1 / math.log(2)))
    short, rest, degree = _EXP[kind.bits]
    reduced = high - k * short
    low = low - k * rest
    r = reduced + low
    r_low = (reduced - r) + low
    q = jnp.full_like(r, 1 / math.factorial(degree))
    for n in range(degree - 1, 1, -1):
        q = q * r + 1 / math.factorial(n)
    exp_r = 1 + (r + (q * (r * r) + r_low))

    whole = jnp.int32 if kind.bits == 32 else jnp.int64
    exponent = jnp.maximum(k.astype(whole) + (raised + 1 - kind.minexp), 0)
    return exp_r * lax.bitcast_convert_type(exponent << kind.nmant, z.dtype)


def log1p(tail: Array) -> Array:
    """log(1 + tail), within 1.5 ULP."""
    large, small = _log1p(tail)
    return large + small


def _log1p(tail: Array) -> tuple[Array, Array]:
    """log(1 + tail) as log(2) + log1p((tail - 1) / 2) where XLA's own strays.

    From sqrt(2) - 1 on XLA rounds 1 + tail first, which costs 2.5 ULP.
    """
    halve = tail > 0.414
    large = jnp.where(halve, jnp.asarray(math.log(2), tail.dtype), 0)
    return large, jnp.log1p(jnp.where(halve, (tail - 1) / 2, tail))


def gap(z: Array, top: Array) -> Array:
    """top - z for z <= top. Two +inf are 0 apart; two -inf have no distance (NaN)."""
    return jnp.where((z == top) & (top > 0), 0, top - z)


def partition(
    z: Float[Array, "*batch classes"], shards: Shards | None = None
) -> Partition:
    """Reduce the last axis to its partition.

    Accelerators fuse the exponentials into their sum. XLA for CPU writes them to
    memory, so there a row is reduced tile by tile, each small enough for the cache.
    Devices agree on the maximum first: one number a row travels then, two more after.
    """
    if shards is None or shards.axis_name is None:
        return lax.platform_dependent(z, cpu=_in_tiles, default=_at_once)
    top = shards.max(z.max(-1, keepdims=True))
    here = lax.platform_dependent(z, top, cpu=_tiled_sums, default=_sums_at_once)
    return _partition(top, *shards.sum(here))


def partition_and_exp(z: Float[Array, "rows classes"]) -> tuple[Partition, Array]:
    """The partition of a tile small enough for the cache, and its exp(z - max)."""
    top = z.max(-1, keepdims=True)

    def on_cpu(z: Array, top: Array) -> tuple[Array, Array, Array]:
        tail_terms, is_top = lax.optimization_barrier(_terms(z, top))
        return _exact_sum(tail_terms), _dot_sum(is_top), tail_terms

    def elsewhere(z: Array, top: Array) -> tuple[Array, Array, Array]:
        tail_terms, is_top = _terms(z, top)
        return tail_terms.sum(-1), is_top.sum(-1), tail_terms

    *sums, tail_terms = lax.platform_dependent(z, top, cpu=on_cpu, default=elsewhere)
    at_top = 1 + jnp.where(jnp.isfinite(top), z - top, 0)  # 1, and its derivative
    e = jnp.where(z == top, at_top, tail_terms * 2.0**-RAISED)
    return _partition(top, *sums), e


def probability(z: Array, p: Partition) -> Array:
    """exp(z - max) / (1 + tail), the rounding of 1 + tail undone in the exponent."""
    total, rounding = two_sum(p.tail, jnp.ones_like(p.tail))
    return shifted_exp(z, p.max, shift_low=rounding / total) / total


def complement(z: Array, p: Partition) -> Array:
    """1 - probability, with nothing cancelled: the other terms' sum over 1 + tail."""
    total, rounding = two_sum(p.tail, jnp.ones_like(p.tail))
    others = jnp.where(z == p.max, p.tail, 1 + (p.tail - shifted_exp(z, p.max)))
    ratio = others / total
    return ratio - ratio * (rounding / total)


@jax.custom_jvp
def total(terms: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """The sum of terms >= 0. XLA for CPU would add a lone row one term at a time."""
    return lax.platform_dependent(terms, cpu=_sum_in_two, default=lambda t: t.sum(-1))


@total.defjvp
def _total_jvp(primals, tangents):
    return total(*primals), tangents[0].sum(-1)


def merge(a: Partition, b: Partition) -> Partition:
    """(m, t) + (n, u) = (m, t + (1 + u) * exp(n - m)), where m >= n."""
    a_leads = a.max >= b.max
    m, n = jnp.maximum(a.max, b.max), jnp.minimum(a.max, b.max)
    t, u = jnp.where(a_leads, a.tail, b.tail), jnp.where(a_leads, b.tail, a.tail)
    raised = jnp.where(n == -jnp.inf, 0, shifted_exp(n, m, raised=RAISED))
    return Partition(m, t + (1 + u) * raised * 2.0**-RAISED)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def merge_over(part: Partition, shards: Shards) -> Partition:
    """`merge` over devices, with one exponential for each of them.

    A device at the maximum adds its tail; how many there are, less one that leads, is
    added, not subtracted. Tails travel raised, since few may underflow where many do.
    """
    top = shards.max(part.max)
    leads = (part.max == top) & (top > -jnp.inf)
    scale = shifted_exp(part.max, top, raised=RAISED)
    below = part.tail * scale + scale
    raised_tail = jnp.where(leads, part.tail * 2.0**RAISED, below)
    raised_tail = jnp.where(part.max == -jnp.inf, 0, raised_tail)
    tops = jnp.where(leads, 1, 0).astype(raised_tail.dtype)
    return _partition(top[..., None], *shards.sum((raised_tail, tops)))


@merge_over.defjvp
def _merge_over_jvp(shards, primals, tangents):
    """The maximum moves as its leader does, or as the mean of those who share it."""
    (part,), (d_part,) = primals, tangents
    whole = merge_over(part, shards)
    empty = part.max == -jnp.inf
    leads = jnp.where((part.max == whole.max) & ~empty, 1, 0).astype(part.max.dtype)
    moves, leaders = shards.sum((jnp.where(leads > 0, d_part.max, 0), leads))
    d_top = moves / jnp.maximum(leaders, 1)
    d_tail = d_part.tail + (1 + part.tail) * (d_part.max - d_top)
    d_tail = jnp.where(empty, 0, shifted_exp(part.max, whole.max) * d_tail)
    return whole, Partition(d_top, shards.sum(d_tail))


def log_partition(p: Partition) -> Float[Array, "*batch"]:
    """lse = max + log1p(tail), rounded last; -inf when every class is ruled out."""
    large, small = _log1p(p.tail)
    high, low = two_sum(p.max, large)
    lse = high + (jnp.where(jnp.isinf(high), 0, low) + small)
    return jnp.where(p.max == -jnp.inf, -jnp.inf, lse)


def _at_once(z: Array) -> Partition:
    top = z.max(-1, keepdims=True)
    return _partition(top, *_sums_at_once(z, top))


def _sums_at_once(z: Array, top: Array) -> tuple[Array, Array]:
    tail_terms, is_top = _terms(z, top)
    return tail_terms.sum(-1), is_top.sum(-1)


def _in_tiles(z: Array) -> Partition:
    if z.shape[-1] <= FEW_CLASSES:
        return _by_class(z)
    top = z.max(-1, keepdims=True)
    return _partition(top, *_tiled_sums(z, top))


def _tiled_sums(z: Array, top: Array) -> tuple[Array, Array]:
    classes, rows = z.shape[-1], max(1, z.size // z.shape[-1])
    width = min(classes, max(TILE_CLASSES, TILE_ELEMENTS // rows))
    tiles = classes // width

    def tile(index: Array) -> tuple[Array, Array]:
        return _sums(lax.dynamic_slice_in_dim(z, index * width, width, axis=-1), top)

    if tiles == 1:
        parts = _sums(z[..., :width], top)
    else:
        parts = lax.map(tile, jnp.arange(tiles))
        parts = _exact_sum(jnp.moveaxis(parts[0], 0, -1)), parts[1].sum(0)
    if classes > tiles * width:
        rest = _sums(z[..., tiles * width :], top)
        parts = parts[0] + rest[0], parts[1] + rest[1]
    return parts


def _by_class(z: Array) -> Partition:
    """Few classes: for each, an elementwise loop over the rows."""
    columns = [z[..., j] for j in range(z.shape[-1])]
    top = functools.reduce(jnp.maximum, columns)
    tail = tail_error = tops = jnp.zeros_like(top)
    for column in columns:
        term, is_top = _terms(column, top)
        tail, error = two_sum(tail, term)
        tail_error, tops = tail_error + error, tops + is_top
    return _partition(top[..., None], tail + tail_error, tops)


def _sums(z: Array, top: Array) -> tuple[Array, Array]:
    """The sum of the tail's terms, and how many tops there are."""
    tail_terms, is_top = lax.optimization_barrier(_terms(z, top))  # for vector loops
    return _exact_sum(tail_terms), _dot_sum(is_top)


def _terms(z: Array, top: Array) -> tuple[Array, Array]:
    is_top = z == top
    tail_terms = jnp.where(is_top, 0, shifted_exp(z, top, raised=RAISED))
    return tail_terms, jnp.where(is_top, 1, 0).astype(z.dtype)


def _partition(top: Array, raised_tail: Array, tops: Array) -> Partition:
    top = top[..., 0]
    other_tops = jnp.where(top == -jnp.inf, 0, tops) - 1
    return Partition(top, raised_tail * 2.0**-RAISED + other_tops)


def _exact_sum(terms: Array) -> Array:
    """The sum of terms >= 0 over the last axis, rounded about once.

    Each term is split into a multiple of the last place of twice the sum, which add up
    without rounding in any order, and a rest too small for its rounding to count.
    """
    # Terms in memory, or a product in them is fused into one of the two parts only.
    terms = lax.optimization_barrier(terms)
    rough = _dot_sum(terms)
    grid = 2 * rough[..., None]
    coarse = (terms + grid) - grid
    coarse, fine = lax.optimization_barrier((coarse, terms - coarse))
    exact = _dot_sum(coarse) + _dot_sum(fine)
    return jnp.where(jnp.isfinite(2 * rough), exact, rough)


def _sum_in_two(terms: Array) -> Array:
    """Block by block, since the rests of very many equal terms would count."""
    classes, width = terms.shape[-1], TILE_CLASSES
    if classes <= width**2:
        return _exact_sum(terms)
    blocks = classes // width
    cut = blocks * width
    parts = _exact_sum(terms[..., :cut].reshape(*terms.shape[:-1], blocks, width))
    rest = _exact_sum(terms[..., cut:])
    return _exact_sum(jnp.concatenate([parts, rest[..., None]], -1))


def _dot_sum(terms: Array) -> Array:
    """A sum in any order: XLA for CPU is fastest as a product with ones."""
    ones = jnp.ones(terms.shape[-1], terms.dtype)
    return jnp.matmul(terms, ones, precision="highest")
