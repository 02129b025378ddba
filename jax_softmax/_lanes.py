"""Sums over a row in loops that XLA for CPU runs as vectors.

XLA for CPU runs a reduction that is fused with more than a little arithmetic one number
at a time, and exponentials written out for it spill to memory. But slices of a row,
added up element by element, are one vector loop, and what they leave, a lane for each
element of a slice, is an eighth of the row.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_softmax._entries import FEW_CLASSES
from jax_softmax._exponential import two_sum
from jax_softmax._shards import alike

SLICES = 8  # of a row to one: more no longer fit the registers
TILE = 2**23  # logits: an eighth of them, in float32, is near a cache's size
NARROWEST = 512  # of a slice: a row's part of a tile is then read ahead

# An exponential, what its rounding left if that is known, and where a row has its top.
ExpAndTop = Callable[[Array], tuple[Array, Array | None, Array]]
Slices = Sequence[tuple[Array, np.ndarray | None]]  # of a row, and what of them is new
Sums = tuple[Array, Array, Array]  # high, low, tops
Read = Callable[[Array], Array]


def row_in_lanes(terms: Array) -> tuple[Array, Array]:
    """The sum of terms over the last axis, as high + low."""
    lost = None
    if terms.shape[-1] > FEW_CLASSES:
        terms, lost = _exactly(_terms(terms, _part(terms, SLICES), None))
    return _narrowed(terms, lost)


def others_in_lanes(exp_and_top: ExpAndTop, z: Array, top_exp: Array) -> Sums:
    """The sum of exponentials but for tops, or but for one of them, counted as well."""
    return _tile_by_tile(partial(_others, exp_and_top, top_exp), z)


def exact_sum(terms: Array) -> Array:
    """The sum over the last axis of terms >= 0 that are in memory, nearly exact."""
    if terms.shape[-1] <= FEW_CLASSES:
        return operator.add(*_added(_columns(terms)))
    return _split_sum(terms)


def _others(exp_and_top: ExpAndTop, top_exp: Array, slices: Slices) -> Array:
    """The others of all slices, added up element by element: a lane for each element.

    A lane tells two things by one number: it is negative where it has met a maximum,
    and its size is that of the others, plus top_exp for every further maximum. (Two
    numbers in one loop take the widest vectors, which slow down others on some CPUs.)
    """
    exps, rests, tops = [], [], []
    for part, new in slices:
        exp, rest, is_top = exp_and_top(part)
        left_out = is_top if new is None else is_top | ~new
        exps.append(jnp.where(left_out, 0, exp))
        if rest is not None:
            rests.append(jnp.where(left_out, 0, rest))
        tops.append((is_top if new is None else is_top & new).astype(jnp.int32))
    count = _by_pairs(tops)
    more = jnp.maximum(count - 1, 0).astype(top_exp.dtype) * top_exp
    if rests:
        others, lost = _exactly(exps)
        more = more + (lost + _by_pairs(rests))
    else:
        others = _by_pairs(exps)
    others = others + more
    return jnp.where(count > 0, -others, others)


def _tile_by_tile(lanes_of: Callable[[Slices], Array], z: Array) -> Sums:
    """What is in all lanes, and how many of them have a top.

    Equal terms add up almost without rounding, others by pairs, tiles by two-sums.
    """
    known = isinstance(z.size, int)  # jax.export has sizes that are not
    classes = z.shape[-1]
    tiles = classes // (SLICES * NARROWEST)
    tiles = min(tiles, -(-z.size // TILE)) if known else tiles
    if tiles <= 1:
        return _counted(lanes_of(_sliced(z, _part(z, SLICES))))
    width = classes // (tiles * SLICES) // FEW_CLASSES * FEW_CLASSES

    def add_tile(index: Array, sums: Sums) -> Sums:
        # Or XLA for CPU widens all of z, where it has 16 bits, before the loop.
        row, start = lax.optimization_barrier((z, index * SLICES * width))
        starts = [start + s * width for s in range(SLICES)]
        slices = [lax.dynamic_slice_in_dim(row, s, width, -1) for s in starts]
        lanes = lanes_of([(part, None) for part in slices])
        # Reduced, since XLA for CPU runs a loop without a reduction on one core.
        others = abs(lanes).reshape(*z.shape[:-1], -1, FEW_CLASSES).sum(-1)
        total, rounding = two_sum(sums[0], others)
        return total, sums[1] + rounding, sums[2] + _sixteenth(_tops(lanes))

    kind = jax.eval_shape(lanes_of, [(z[..., :1], None)]).dtype
    zeros = alike(jnp.zeros((*z.shape[:-1], width // FEW_CLASSES), kind), z)
    total, rounding, tops = lax.fori_loop(0, tiles, add_tile, (zeros, zeros, zeros))
    high, low = _narrowed(total, rounding)
    count = _narrowed(tops)[0]
    rest = z[..., tiles * SLICES * width :]
    if rest.shape[-1]:
        if rest.shape[-1] > 2 * NARROWEST:
            last = _tile_by_tile(lanes_of, rest)
        else:
            last = _counted(lanes_of([(rest, None)]))
        last_high, last_low, last_count = last
        high, rounding = _added([high, last_high])
        low = (low + last_low) + rounding
        count = count + last_count
    return high, low, count


def _counted(lanes: Array) -> Sums:
    """All lanes, in one pass over them."""

    def as_one_number(lanes: Array) -> Array:
        return lax.complex(abs(lanes), _tops(lanes))

    high, low = _narrowed(lanes, read=as_one_number)
    return lax.real(high), lax.real(low), lax.imag(high)


def _tops(lanes: Array) -> Array:
    """The sign bit, as 1 or 0."""
    kind = jnp.finfo(lanes.dtype)
    bits = lax.bitcast_convert_type(lanes, f"int{kind.bits}")
    last = bits.dtype.type(kind.bits - 1)
    return lax.shift_right_logical(bits, last).astype(lanes.dtype)


def _sixteenth(lanes: Array) -> Array:
    """A sixteenth of the lanes, whose number is a multiple of 16."""
    width = lanes.shape[-1] // FEW_CLASSES
    starts = range(0, lanes.shape[-1], width)
    return _by_pairs([lanes[..., start : start + width] for start in starts])


def _part(rows: Array, slices: int) -> int:
    """The width of a slice where there are that many or fewer: a multiple of 8."""
    return (-(-rows.shape[-1] // slices) + 7) // 8 * 8


def _sliced(rows: Array, width: int) -> Slices:
    """The last axis in slices of that width.

    The last one overlaps the one before, and is new only beyond it.
    """
    classes, found = rows.shape[-1], []
    for start in range(0, classes, width):
        first = min(start, classes - width)
        # A constant in memory, as XLA for CPU would count in 64 bits: see is_column.
        new = np.arange(width) >= start - first if first < start else None
        found.append((rows[..., first : first + width], new))
    return found


def _by_pairs(terms: Sequence[Array]) -> Array:
    while len(terms) > 1:
        pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
        terms = [reduce(operator.add, pair) for pair in pairs]
    return terms[0]


def _exactly(terms: Sequence[Array]) -> tuple[Array, Array]:
    """Their sum by pairs, and what it has lost."""
    lost = []
    while len(terms) > 1:
        pairs = [two_sum(*pair) for pair in zip(terms[::2], terms[1::2], strict=False)]
        lost += [rounding for _, rounding in pairs]
        terms = [total for total, _ in pairs] + list(terms[len(pairs) * 2 :])
    return terms[0], _by_pairs(lost) if lost else jnp.zeros_like(terms[0])


def _narrowed(
    lanes: Array, lost: Array | None = None, read: Read | None = None
) -> tuple[Array, Array]:
    """The sum of what `read` finds in all lanes, and of what they have lost, almost
    exactly.

    The first loop to read them cuts them into 16 slices or more. With fewer, XLA for
    CPU computes the lanes inside that loop, one number at a time: four times as long.
    """
    width = _part(lanes, FEW_CLASSES)
    if read is not None:
        width = lanes.shape[-1] // FEW_CLASSES
        width = width if width < 4 else width // 4 * 4
    while lanes.shape[-1] > FEW_CLASSES:
        lanes, more = _exactly(_terms(lanes, width, read))
        lost = more if lost is None else more + _by_pairs(_terms(lost, width, None))
        read, width = None, _part(lanes, FEW_CLASSES)
    high, low = _added(_columns(lanes if read is None else read(lanes)))
    if lost is not None:
        low = jnp.where(jnp.isfinite(high), low + lost.sum(-1), 0)
    return high, low


def _terms(lanes: Array, width: int, read: Read | None) -> list[Array]:
    """What `read` finds in slices of that width of the lanes, to be added up.

    Lanes are cut first and read afterwards: were all of them read in two ways, as sizes
    and as signs, XLA for CPU would compute them twice.
    """
    parts = _sliced(lanes, width)
    if read is not None:
        parts = [(read(part), new) for part, new in parts]
    return [p if new is None else jnp.where(new, p, 0) for p, new in parts]


def _added(terms: Sequence[Array]) -> tuple[Array, Array]:
    """A few terms, almost exactly; infinite sums lose nothing."""
    total, *rest = terms
    lost = jnp.zeros_like(total)
    for term in rest:
        total, rounding = two_sum(total, term)
        lost = lost + rounding
    return total, jnp.where(jnp.isfinite(total), lost, 0)


def _columns(rows: Array) -> list[Array]:
    return [rows[..., j] for j in range(rows.shape[-1])]


def _split_sum(terms: Array) -> Array:
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
