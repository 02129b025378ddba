"""What is worth knowing about each row of softmax(x w + b), in one pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Integer

from jax_softmax import _linear_tiles as tiles
from jax_softmax import _options as options
from jax_softmax._exponential import shifted_exp
from jax_softmax._linear_plan import Chunk, Keep, head_of, layer_of, on_tiles
from jax_softmax._linear_rows import (
    Reduced,
    losses,
    merged_rows,
    over_devices,
    rows_of_tile,
    stacked,
)
from jax_softmax._linear_tiles import Head, Index, Layer
from jax_softmax._logarithm import log1p
from jax_softmax._partition import gap, partition
from jax_softmax._platform import by_platform
from jax_softmax._shards import AxisName, alike
from jax_softmax._tracing import traced_once


class LinearSoftmaxSummary(NamedTuple):
    """In nats. Dropped rows hold 0 everywhere."""

    nll: Float[Array, "*batch"] | None  # None without labels
    lse: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    argmax: Int[Array, "*batch"]  # the first of equals
    top_log_probs: Float[Array, "*batch k"]  # the largest first
    top_ids: Int[Array, "*batch k"]


def linear_softmax_summary(
    x: Float[ArrayLike, "*batch features"],
    w: Float[ArrayLike, "_ _"],
    labels: Integer[ArrayLike, "*batch"] | None = None,
    *,
    top_k: int = 1,
    b: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, "*batch"] | None = None,
    softcap: float | None = None,
    tied: bool = False,
    chunk: Chunk | None = None,
    precision: Any = None,
    axis_name: AxisName | None = None,
    classes: int | None = None,
) -> LinearSoftmaxSummary:
    """Loss, lse, entropy and most likely classes of each row: one matmul, no logits.

        entropy = log1p(tail) + sum_j p_j (max - z_j)          (all terms >= 0)

    Made for evaluation and for policies. nll, lse, entropy and top_log_probs can be
    differentiated, at the price of keeping the logits: to train on the loss, use
    linear_cross_entropy.

    Args:
        x, w, labels, b, where, softcap, tied, chunk, precision, axis_name, classes: as
            in linear_cross_entropy. argmax and top_ids are ids among all classes.
        top_k: how many of the most likely classes, at least 1.

    Returns:
        A named tuple. nll and lse are as accurate as linear_cross_entropy's.

    Raises:
        TypeError: x, w or b are not floating point, or labels not integers.
        ValueError: shapes do not match, top_k is not in [1, classes of a device], or
            axis_name names no mesh axis here.

    >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> summary = linear_softmax_summary(x, w, jnp.array([2]), top_k=2)
    >>> print(summary.nll, summary.argmax, summary.top_ids, summary.entropy)
    [1.3490123] [1] [[1 2]] [0.71386576]
    """
    shape = jnp.shape(x)[:-1]
    ids = jnp.zeros(shape, jnp.int32) if labels is None else labels
    layer, batch, shards = layer_of(x, w, ids, b, where, tied, axis_name, classes)
    head = head_of(tied, softcap, 0.0, precision, chunk, shards)
    top_k, most = options.integer("top_k", top_k), min(shards.here, shards.classes)
    if not 1 <= top_k <= most:
        raise ValueError(
            f"top_k must be in [1, {most}], as many as a device has classes, "
            f"got {top_k}"
        )
    found = _of_rows(head, chunk, layer, top_k)
    if layer.keep is not None:
        keep = layer.keep
        found = jax.tree.map(
            lambda leaf: jnp.where(keep.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0),
            found,
        )
    found = jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), found)
    return found._replace(nll=None) if labels is None else found


@traced_once(static_argnums=(0, 1, 3))
def _of_rows(
    head: Head, chunk: Chunk | None, layer: Layer, top_k: int
) -> LinearSoftmaxSummary:
    return on_tiles(_summary, head, chunk, Keep.NOTHING, layer, top_k)


class _Tile(NamedTuple):
    rows: Reduced
    distance: Array  # sum of exp(z - max) (max - z)
    top: Array
    ids: Array


def _summary(head: Head, layer: Layer, top_k: int) -> LinearSoftmaxSummary:
    def chunk(carry: None, start: Index, size: int):
        return carry, _chunk(head, tiles.piece_of(head, layer, start, size), top_k)

    return tiles.over_tokens(head, layer.x.shape[0], chunk, None)[1]


def _chunk(head: Head, layer: Layer, top_k: int) -> LinearSoftmaxSummary:
    def tile(carry: None, start: Index, width: int) -> tuple[None, _Tile]:
        z = tiles.logits(head, layer, start, width)
        rows = rows_of_tile(head, layer, z, partition(z), start)
        below = _finite(z, gap(z, rows.part.max[:, None]))
        distance = shifted_exp(z, rows.part.max[:, None]) * below
        top, ids = _largest(head, z, min(top_k, width))
        return carry, _Tile(rows, distance.sum(-1), top, ids + start)

    shards = head.shards

    def combined(whole: _Tile, rest: _Tile | None) -> LinearSoftmaxSummary:
        def side_by_side(stacked: Array, last: Array | None) -> Array:
            count, rows, k = stacked.shape
            row = jnp.moveaxis(stacked, 0, 1).reshape(rows, count * k)
            return row if last is None else jnp.concatenate((row, last), axis=1)

        top = side_by_side(whole.top, rest.top if rest else None)
        ids = side_by_side(whole.ids, rest.ids if rest else None)
        top, ids = _likeliest(head, top, ids, top_k)
        if not shards.alone:
            top, ids = _likeliest(
                head,
                shards.side_by_side(top),
                shards.side_by_side(ids + shards.first),
                top_k,
            )

        tiled = stacked(whole.rows, rest.rows if rest else None)
        below = stacked(whole.distance, rest.distance if rest else None)
        rows = merged_rows(tiled)
        rows = over_devices(head, rows)
        total = log1p(rows.part.tail)
        heads, tails = tiled.part.max, tiled.part.tail
        top_of_all = rows.part.max[None]
        weight = shifted_exp(heads, top_of_all)
        lower = _finite(heads, gap(heads, top_of_all))
        distance = shards.sum((weight * (below + (1 + tails) * lower)).sum(0))
        found = losses(head, layer, rows)
        return LinearSoftmaxSummary(
            nll=found.nll,
            lse=found.lse,
            entropy=total + distance / (1 + rows.part.tail),
            argmax=ids[:, 0],
            top_log_probs=-(gap(top, rows.part.max[:, None]) + total[:, None]),
            top_ids=ids,
        )

    return tiles.over_classes(head, layer, tile, None, combined)[1]


def _finite(z: Array, below: Array) -> Array:
    """How far z is below a maximum, 0 where it is so far that its probability is 0."""
    return jnp.where((z == -jnp.inf) | (below == jnp.inf), 0, below)


def _likeliest(head: Head, z: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row and their ids; of equals, those to the left."""
    top, place = _largest(head, z, k)
    return top, jnp.take_along_axis(ids, place, axis=1)


def _largest(head: Head, z: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row, of equals those to the left, and their columns."""

    def at_once(z: Array) -> tuple[Array, Array]:
        top, columns = lax.top_k(z, k)
        return top, columns

    def one_by_one(z: Array) -> tuple[Array, Array]:
        return _one_by_one(z, k)

    on_cpu = at_once if head.devices == 1 else one_by_one
    return by_platform(z, cpu=on_cpu, default=at_once)


def _one_by_one(z: Array, k: int) -> tuple[Array, Array]:
    """Each is the largest of those that are below the last, or equal and to its right.

    For lax.top_k, XLA for CPU would gather all rows from the devices that hold them.
    NaN counts as +inf.
    """
    columns = lax.broadcasted_iota(jnp.int32, z.shape, 1)
    ranks = lax.stop_gradient(jnp.where(jnp.isnan(z), jnp.inf, z))

    def following(last: tuple[Array, Array], _: None):
        rank, column = last
        after = (ranks < rank) | ((ranks == rank) & (columns > column))
        rank = jnp.where(after, ranks, -jnp.inf).max(1, keepdims=True)
        found = jnp.where(after & (ranks == rank), columns, z.shape[1])
        column = found.min(1, keepdims=True)
        return (rank, column), column[:, 0]

    before = jnp.full_like(ranks[:, :1], jnp.inf), jnp.full_like(columns[:, :1], -1)
    _, found = lax.scan(following, alike(before, z), length=k)
    return jnp.take_along_axis(z, found.T, axis=1), found.T
