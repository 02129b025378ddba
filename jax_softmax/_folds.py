"""Sums over a row that lose next to nothing, in loops that XLA runs as vectors.

Accelerators add up pairs, a sum and what it has lost. XLA for CPU runs a reduction that
is fused with more than a little arithmetic one number at a time, and exponentials
written out for it spill to memory. There, slices of a row added up element by element
are one vector loop, and what they leave is an eighth of the row.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_softmax import _checks as checks
from jax_softmax._entries import FEW_CLASSES
from jax_softmax._exponential import two_sum
from jax_softmax._platform import by_platform
from jax_softmax._shards import alike
from jax_softmax._tracing import traced_once

SLICES = 8  # of a row to one: more no longer fit the registers
TILE = 2**23  # logits: an eighth of them, in float32, is near a cache's size
NARROWEST = 512  # of a slice: a row's part of a tile is then read ahead

ExpAndTop = Callable[[Array], tuple[Array, Array]]
Slices = Sequence[tuple[Array, np.ndarray | None]]  # of a row, and what of them is new
Sums = tuple[Array, Array, Array]  # high, low, tops
Read = Callable[[Array], Array]


def row_sum(terms: Array) -> tuple[Array, Array]:
    """The sum of terms over the last axis, as high + low.

    Equal terms add up without rounding, others by pairs.
    """

    def on_cpu(terms: Array) -> tuple[Array, Array]:
        few = terms.shape[-1] <= FEW_CLASSES
        if not few:
            terms = _by_pairs(_terms(terms, _part(terms, SLICES), None))
        return _narrowed(terms)

    def fused(terms: Array) -> tuple[Array, Array]:
        return _sum_of_pairs(terms, False)[:2]

    return by_platform(terms, cpu=on_cpu, default=fused)


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
            count = [count[0] + (more[0] + marks.astype(terms.dtype))]
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


def others_sum(exp_and_top: ExpAndTop, z: Array, top_exp: Array) -> Sums:
    """The sum of exponentials over the last axis but for tops, as high + low, and how
    many tops there are.

    A CPU may have a top as top_exp, [*batch, 1], in the sum instead of counting it.
    """
    exp_and_top = traced_once()(exp_and_top)

    def fused(z: Array) -> Sums:
        exp, is_top = exp_and_top(z)
        return _sum_of_pairs(jnp.where(is_top, -1, exp), True)

    def on_gpu(z: Array) -> Sums:
        exp, is_top = exp_and_top(z)
        high, low, _ = _sum_of_pairs(jnp.where(is_top, 0, exp), False)
        return high, low, _count_of_tops(z)

    def on_cpu(z: Array) -> Sums:
        lanes_of = partial(_others_in_lanes, exp_and_top, top_exp)
        return _tile_by_tile(lanes_of, z)

    return by_platform(z, cpu=on_cpu, gpu=on_gpu, default=fused)


def _others_in_lanes(exp_and_top: ExpAndTop, top_exp: Array, slices: Slices) -> Array:
    """The others of all slices, added up element by element: a lane for each element.

    A lane tells two things by one number: it is negative where it has met a maximum,
    and its size is that of the others, plus top_exp for every further maximum. (Two
    numbers in one loop take the widest vectors, which slow down others on some CPUs.)
    """
    exps, tops = [], []
    for part, new in slices:
        exp, is_top = exp_and_top(part)
        exps.append(jnp.where(is_top if new is None else is_top | ~new, 0, exp))
        tops.append((is_top if new is None else is_top & new).astype(jnp.int32))
    count = _by_pairs(tops)
    more = jnp.maximum(count - 1, 0).astype(top_exp.dtype)
    others = _by_pairs(exps) + more * top_exp
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
        total, rounding = _add(sums[0], others)
        return total, sums[1] + rounding, sums[2] + _sixteenth(_tops(lanes))

    kind = jax.eval_shape(lanes_of, [(z[..., :1], None)]).dtype
    zeros = alike(jnp.zeros((*z.shape[:-1], width // FEW_CLASSES), kind), z)
    total, rounding, tops = lax.fori_loop(0, tiles, add_tile, (zeros, zeros, zeros))
    high, low = _narrowed(total + rounding)
    count = _narrowed(tops)[0]
    rest = z[..., tiles * SLICES * width :]
    if rest.shape[-1]:
        if rest.shape[-1] > 2 * NARROWEST:
            last = _tile_by_tile(lanes_of, rest)
        else:
            last = _counted(lanes_of([(rest, None)]))
        last_high, last_low, last_count = last
        high, rounding = _add(high, last_high)
        low = (low + last_low) + rounding
        count = count + last_count
    return high, low, count


def _counted(lanes: Array) -> Sums:
    """All lanes, in one pass over them."""

    def as_one_number(lanes: Array) -> Array:
        return lax.complex(abs(lanes), _tops(lanes))

    high, low = _narrowed(lanes, as_one_number)
    return lax.real(high), lax.real(low), lax.imag(high)


def _tops(lanes: Array) -> Array:
    return jnp.where(jnp.signbit(lanes), 1, 0).astype(lanes.dtype)


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


def stored_sum(terms: Array, is_top: Array) -> tuple[Array, Array, Array]:
    """The terms >= 0, which a CPU keeps in memory, their sum over the last axis, and
    how many tops there are."""

    def on_cpu(terms: Array, is_top: Array) -> tuple[Array, Array, Array]:
        tops = is_top.sum(-1).astype(terms.dtype)
        if terms.shape[-1] <= FEW_CLASSES:
            return terms, operator.add(*_added(_columns(terms))), tops
        # In memory, or a product in them is fused into one part of _exact_sum only.
        terms = lax.optimization_barrier(terms)
        return terms, _exact_sum(terms), tops

    def fused(terms: Array, is_top: Array) -> tuple[Array, Array, Array]:
        high, low, tops = _sum_of_pairs(jnp.where(is_top, -1, terms), True)
        return terms, high + low, tops

    return by_platform(terms, is_top, cpu=on_cpu, default=fused)


def _narrowed(lanes: Array, read: Read | None = None) -> tuple[Array, Array]:
    """The sum of what `read` finds in all lanes, its last terms added almost exactly.

    The first loop to read them cuts them into 16 slices or more. With fewer, XLA for
    CPU computes the lanes inside that loop, one number at a time: four times as long.
    """
    if read is not None and lanes.shape[-1] > FEW_CLASSES:
        width = lanes.shape[-1] // FEW_CLASSES
        width = width if width < 4 else width // 4 * 4
        lanes, read = _by_pairs(_terms(lanes, width, read)), None
    while lanes.shape[-1] > FEW_CLASSES:
        lanes = _by_pairs(_terms(lanes, _part(lanes, FEW_CLASSES), None))
    return _added(_columns(lanes if read is None else read(lanes)))


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
