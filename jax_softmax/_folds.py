"""Sums and one entry of a row, in loops that XLA for CPU runs as vectors.

A reduction fused with more than a little arithmetic runs one number at a time there,
and exponentials written out for it spill to memory. Slices of a row added up element
by element are one vector loop, and what they leave is an eighth of the row.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax._exponential import two_sum
from jax_softmax._shards import alike

SLICES = 8  # of a row to one: more no longer fit the registers
FEW_CLASSES = 16  # are added up one after the other
TILE = 2**20  # logits: a loop's step stays in the cache

Terms = Callable[[Array], Array]


def row_entry(rows: Array, column: Array) -> Array:
    """rows[i, column[i]].

    Accelerators compare on their way over the row, where a gather would have a row of
    another type written out. So do CPUs where classes are few: a gather is no vector
    loop.
    """

    def gathered(rows: Array, column: Array) -> Array:
        return jnp.take_along_axis(rows, column[..., None], axis=-1)[..., 0]

    on_cpu = _compared_as_bits if rows.shape[-1] <= FEW_CLASSES else gathered
    return lax.platform_dependent(rows, column, cpu=on_cpu, default=_compared)


def _compared(rows: Array, column: Array) -> Array:
    columns = jnp.arange(rows.shape[-1], dtype=column.dtype)
    entries = jnp.where(columns == column[..., None], rows, 0)
    return entries.sum(-1, dtype=rows.dtype)


@jax.custom_jvp
def _compared_as_bits(rows: Array, column: Array) -> Array:
    """XLA for CPU adds whole numbers up in the loop that compares them.

    Others it writes out first, for a loop of their own.
    """
    bits = lax.bitcast_convert_type(rows, f"int{8 * rows.dtype.itemsize}")
    return lax.bitcast_convert_type(_compared(bits, column), rows.dtype)


@_compared_as_bits.defjvp
def _compared_as_bits_jvp(primals, tangents):
    (rows, column), (d_rows, _) = primals, tangents
    return _compared_as_bits(rows, column), _compared(d_rows, column)


def row_sum(terms: Terms, z: Array) -> tuple[Array, Array]:
    """The sum of terms(z) over the last axis, as high + low."""

    def fused(z: Array) -> tuple[Array, Array]:
        parts = terms(z)
        if jnp.iscomplexobj(parts):
            high = lax.complex(lax.real(parts).sum(-1), lax.imag(parts).sum(-1))
        else:
            high = parts.sum(-1)
        return high, jnp.zeros_like(high)

    on_cpu = functools.partial(_tile_by_tile, terms)
    return lax.platform_dependent(z, cpu=on_cpu, default=fused)


def stored_sum(terms: Array) -> tuple[Array, Array]:
    """The terms >= 0, which a CPU keeps in memory, and their sum over the last axis."""

    def on_cpu(terms: Array) -> tuple[Array, Array]:
        if terms.shape[-1] <= FEW_CLASSES:
            return terms, operator.add(*_added(_columns(terms)))
        # In memory, or a product in them is fused into one part of _exact_sum only.
        terms = lax.optimization_barrier(terms)
        return terms, _exact_sum(terms)

    return lax.platform_dependent(
        terms, cpu=on_cpu, default=lambda terms: (terms, terms.sum(-1))
    )


def once(number: Array) -> Array:
    """A number for each row, which XLA for CPU is not to do again for every class.

    It takes loops apart at a reduction only.
    """

    def on_cpu(number: Array) -> Array:
        column = number[..., None]
        least = jnp.full_like(column, -jnp.inf)
        return jnp.concatenate((column, least), -1).max(-1)

    return lax.platform_dependent(number, cpu=on_cpu, default=lambda number: number)


def _tile_by_tile(terms: Terms, z: Array) -> tuple[Array, Array]:
    """Equal terms add up without rounding, others by pairs, tiles by two-sums.

    What is rounded in one place is averaged out over many.
    """
    terms = jax.jit(terms, inline=True)  # traced once for all slices of one width
    classes, rows = z.shape[-1], max(1, z.size // z.shape[-1])
    if classes <= FEW_CLASSES:
        return _added(_columns(terms(z)))
    width = max(FEW_CLASSES * 8, _multiple(TILE // rows // SLICES, FEW_CLASSES * 8))
    tiles = classes // (SLICES * width)
    if tiles <= 1:
        return _narrowed(_folded(terms, z, SLICES))

    kind = jax.eval_shape(terms, z[..., :1]).dtype

    def add_tile(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        starts = [(index * SLICES + s) * width for s in range(SLICES)]
        parts = [_slice(z, start, width) for start in starts]
        total, rounding = _add(sums[0], _narrow(_by_pairs(map(terms, parts))))
        return total, sums[1] + rounding

    lanes = alike(jnp.zeros((*z.shape[:-1], width // FEW_CLASSES), kind), z)
    total, rounding = lax.fori_loop(0, tiles, add_tile, (lanes, lanes))
    high, low = _narrowed(total + rounding)
    rest = z[..., tiles * SLICES * width :]
    if rest.shape[-1]:
        rest_high, rest_low = _narrowed(terms(rest))
        high, rounding = _add(high, rest_high)
        low = (low + rest_low) + rounding
    return high, low


def _slice(z: Array, start: Array, width: int) -> Array:
    """Numbers of 16 bits as bits: XLA for CPU would widen all of them before."""
    if z.dtype.itemsize > 2:
        return lax.dynamic_slice_in_dim(z, start, width, -1)
    bits = lax.bitcast_convert_type(z, jnp.uint16)
    part = lax.dynamic_slice_in_dim(bits, start, width, -1)
    return lax.bitcast_convert_type(part, z.dtype)


def _folded(terms: Terms, z: Array, slices: int) -> Array:
    """z cut into slices of one width, the terms of which are added up.

    The last slice overlaps the one before, with nothing added where it does.
    """
    classes = z.shape[-1]
    width = _multiple(-(-classes // slices) + 7, 8)  # rounded up
    starts = range(0, classes, width)
    parts = []
    for start in starts:
        first = min(start, classes - width)
        part = terms(z[..., first : first + width])
        if first < start:
            part = jnp.where(jnp.arange(width) < start - first, 0, part)
        parts.append(part)
    return _by_pairs(parts)


def _narrow(lanes: Array) -> Array:
    """A sixteenth of the lanes, whose number is a multiple of 16."""
    width = lanes.shape[-1] // FEW_CLASSES
    return _by_pairs(lanes[..., s * width :][..., :width] for s in range(FEW_CLASSES))


def _narrowed(lanes: Array) -> tuple[Array, Array]:
    """All lanes to one sum."""
    while lanes.shape[-1] > FEW_CLASSES:
        lanes = _folded(lambda part: part, lanes, FEW_CLASSES)
    return _added(_columns(lanes))


def _added(terms: Sequence[Array]) -> tuple[Array, Array]:
    """A few terms, almost exactly."""
    total, *rest = terms
    lost = jnp.zeros_like(total)
    for term in rest:
        total, rounding = _add(total, term)
        lost = lost + rounding
    return total, lost


def _columns(rows: Array) -> list[Array]:
    return [rows[..., j] for j in range(rows.shape[-1])]


def _add(a: Array, b: Array) -> tuple[Array, Array]:
    """two_sum, in which infinite sums lose nothing."""
    total, rounding = two_sum(a, b)
    return total, jnp.where(jnp.isfinite(total), rounding, 0)


def _by_pairs(terms: Iterable[Array]) -> Array:
    terms = list(terms)
    while len(terms) > 1:
        pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
        terms = [functools.reduce(operator.add, pair) for pair in pairs]
    return terms[0]


def _multiple(n: int, of: int) -> int:
    return n // of * of


def _exact_sum(terms: Array) -> Array:
    """The sum of terms >= 0 that are in memory, rounded about once.

    Each term is split into a multiple of the last place of twice the sum, which add up
    without rounding in any order, and a rest too small for its rounding to count.
    """
    rough = _quick_sum(terms)
    grid = 2 * rough[..., None]
    coarse = (terms + grid) - grid
    coarse, fine = lax.optimization_barrier((coarse, terms - coarse))
    exact = _quick_sum(coarse) + _quick_sum(fine)
    return jnp.where(jnp.isfinite(2 * rough), exact, rough)


def _quick_sum(terms: Array) -> Array:
    """A sum in any order: XLA for CPU is fastest as a product with ones."""
    ones = jnp.ones(terms.shape[-1], terms.dtype)
    return jnp.matmul(terms, ones, precision="highest")
