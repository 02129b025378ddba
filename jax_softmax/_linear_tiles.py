"""A linear layer cut into tiles: some tokens times some classes at a time.

Only tiles, and at most one number for each logit of one chunk of tokens, are ever in
memory. Nothing is padded: what a size leaves over is a smaller tile of its own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax import _checks as checks
from jax_softmax._platform import by_platform
from jax_softmax._shards import Shards

Index = Array | int


class Layer(NamedTuple):
    """The arrays of softmax(x w + b), a row for each token."""

    x: Array
    w: Array
    b: Array | None
    labels: Array  # counted from the first class of w; -1 if it is not in w
    known: Array  # whether the label names a class at all, here or elsewhere
    keep: Array | None


class Head(NamedTuple):
    """What is static: how logits follow from the arrays, and how they are cut."""

    tied: bool
    softcap: float | None
    label_smoothing: float
    precision: Any
    skip_below: float
    shards: Shards
    devices: int  # that JAX sees; under plain jit tokens may lie on all of them
    chunk_tokens: int = 0
    tile_classes: int = 0
    keeps: bool = False  # of one chunk of tokens, from pass one for pass two
    first: int = 0  # tokens of a first chunk, for which they are kept in place:
    in_place: bool = False  # where the gradient of w will be


def classes_of(head: Head, w: Array) -> int:
    """How many classes w has."""
    return w.shape[0 if head.tied else 1]


def piece_of(head: Head, layer: Layer, start: Index, size: int) -> Layer:
    """Some rows; dropped ones become zeros before anything is computed from them."""
    x, labels, known, keep = cut(
        head, (layer.x, layer.labels, layer.known, layer.keep), start, size
    )
    if keep is not None:
        x = jnp.where(keep[:, None], x, 0)
        labels, known = jnp.where(keep, labels, 0), known | ~keep
    return Layer(x, layer.w, layer.b, labels, known, keep)


def logits(head: Head, layer: Layer, start: Index, width: int) -> Array:
    z = product(head, layer, layer.w, start, width)
    if layer.b is not None:
        z += slice_axis(layer.b, start, width, 0)[None].astype(z.dtype)
    if head.softcap is not None:
        capped = head.softcap * jnp.tanh(z / head.softcap)
        z = jnp.where(z == -jnp.inf, -jnp.inf, capped)
    return head.shards.ruled(z, start)


def product(head: Head, layer: Layer, w: Array, start: Index, width: int) -> Array:
    kind = operand_type(layer)
    w = tile_of(head, w, start, width).astype(kind)
    return dot(head, layer.x.astype(kind), w, 1, 1 if head.tied else 0)


def tile_of(head: Head, w: Array, start: Index, width: int) -> Array:
    return slice_axis(w, start, width, 0 if head.tied else 1)


def operand_type(layer: Layer) -> jnp.dtype:
    """The type that both operands of every matmul have: the one that holds both."""
    with jax.numpy_dtype_promotion("standard"):  # also where the user made JAX strict
        return jnp.result_type(layer.x.dtype, layer.w.dtype)


def wide_type(layer: Layer) -> jnp.dtype:
    """The type that logits, and sums of products, have."""
    return checks.accumulation_dtype(layer.x, layer.w)


def dot(head: Head, left: Array, right: Array, i: int, j: int) -> Array:
    """Contract axis i of left with axis j of right; sums are in at least float32."""
    return lax.dot_general(
        left,
        right,
        (((i,), (j,)), ((), ())),
        precision=head.precision,
        preferred_element_type=checks.accumulation_dtype(left),
    )


def keeps_exp(head: Head) -> bool:
    """Whether exp(z - max) is kept, in the operands' type; otherwise z itself is."""
    return head.softcap is None and not head.label_smoothing


def kept_type(head: Head, layer: Layer) -> jnp.dtype:
    return operand_type(layer) if keeps_exp(head) else wide_type(layer)


def put(head: Head, kept: Array, tile: Array, start: Index) -> Array:
    """The tile of the classes from start on, stored in its place.

    `kept` is [at least tokens, classes]; in place of the gradient of a tied w it is
    [classes, at least tokens], and a tile fills the first rows of its classes.
    """
    tile = tile.astype(kept.dtype)
    if not (head.tied and head.in_place):
        return lax.dynamic_update_slice(kept, tile, (0, start))
    flat = tile.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % kept.shape[1]))
    return set_at(kept, flat.reshape(-1, kept.shape[1]), start, 0)


def take(head: Head, kept: Array, tokens: int, start: Index, width: int) -> Array:
    """What `put` has stored."""
    if not (head.tied and head.in_place):
        return lax.dynamic_slice(kept, (0, start), (tokens, width))
    rows = -(-tokens * width // kept.shape[1])
    flat = slice_axis(kept, start, rows, 0).reshape(-1)
    return flat[: tokens * width].reshape(tokens, width)


def over(
    length: int,
    size: int,
    step: Callable[[Any, Index, int], tuple[Any, Any]],
    carry: Any,
    combine: Callable[[Any, Any], Any] | None,
) -> tuple[Any, Any]:
    """Scan over whole pieces of a length, then the rest: nothing is padded.

    combine(stacked outputs of the whole pieces, output of the rest or None).
    """
    size = min(size, length)
    whole, rest = divmod(length, size) if size else (1, 0)
    if whole == 1:
        carry, out = step(carry, 0, size)
        stacked = jax.tree.map(lambda leaf: leaf[None], out)
    else:
        starts = size * jnp.arange(whole)
        carry, stacked = lax.scan(lambda c, start: step(c, start, size), carry, starts)
    last = None
    if rest:
        carry, last = step(carry, _not_known(whole * size), rest)
    return carry, combine(stacked, last) if combine else None


def over_classes(
    head: Head,
    layer: Layer,
    tile: Callable[[Any, Index, int], tuple[Any, Any]],
    carry: Any,
    combine: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """`over` tiles of classes."""
    classes = classes_of(head, layer.w)
    return over(classes, head.tile_classes, tile, carry, combine)


def _not_known(start: int) -> Array:
    """Where a piece starts, not known while compiling for accelerators: XLA for a GPU
    would write all of the array that the piece is added to."""
    barrier = lax.optimization_barrier
    return by_platform(start, cpu=jnp.asarray, default=barrier)


def deals(head: Head, tokens: int) -> int:
    """Into how many chunks tokens are dealt out like cards; 1: they are cut instead.

    Of tokens on several devices, each then has its part of every chunk: in an array of
    [tokens of a chunk, chunks] what is cut is an axis that no two devices share.
    """
    even = not head.first and head.chunk_tokens and tokens % head.chunk_tokens == 0
    return tokens // head.chunk_tokens if even else 1


def over_tokens(
    head: Head,
    tokens: int,
    chunk: Callable[[Any, Index, int], tuple[Any, Any]],
    carry: Any,
) -> tuple[Any, Any]:
    """`over` chunks of tokens; what they give is put in the order of the rows again."""

    def joined(a: Array, *rest: Array) -> Array:
        tokens = math.prod(a.shape[:2])
        if deals(head, tokens) > 1 and not rest:
            a = a.swapaxes(0, 1)
        return jnp.concatenate((a.reshape(tokens, *a.shape[2:]), *rest))

    def in_order(stacked: Any, last: Any) -> Any:
        return jax.tree.map(joined, stacked, *(() if last is None else (last,)))

    return over(tokens, head.chunk_tokens, chunk, carry, in_order)


def cut(head: Head, rows: Any, start: Index, size: int) -> Any:
    """The chunk of tokens that begins at `start`."""

    def chunk(leaf: Array) -> Array:
        chunks = deals(head, len(leaf))
        if chunks == 1:
            return slice_axis(leaf, start, size, 0)
        dealt = leaf.reshape(size, chunks, *leaf.shape[1:])
        return lax.dynamic_index_in_dim(dealt, start // size, 1, keepdims=False)

    return jax.tree.map(chunk, rows)


def set_chunk(head: Head, rows: Array, chunk: Array, start: Index) -> Array:
    """rows, with the chunk of tokens that begins at `start` in its place."""
    size, chunks = len(chunk), deals(head, len(rows))
    if chunks == 1:
        return set_at(rows, chunk, start, 0)
    dealt = rows.reshape(size, chunks, *rows.shape[1:])
    chunk = chunk.astype(rows.dtype)
    dealt = lax.dynamic_update_index_in_dim(dealt, chunk, start // size, 1)
    return dealt.reshape(rows.shape)


def slice_axis(array: Array, start: Index, size: int, axis: int) -> Array:
    if array.shape[axis] == size:
        return array
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def set_at(array: Array, piece: Array, start: Index, axis: int) -> Array:
    """array[start:] = piece."""
    return lax.dynamic_update_slice_in_dim(
        array, piece.astype(array.dtype), start, axis
    )


def add_at(array: Array, piece: Array, start: Index, axis: int) -> Array:
    """array[start:] += piece, rounded once to the type of array."""
    held = slice_axis(array, start, piece.shape[axis], axis)
    piece = (held.astype(piece.dtype) + piece).astype(array.dtype)
    return lax.dynamic_update_slice_in_dim(array, piece, start, axis)
