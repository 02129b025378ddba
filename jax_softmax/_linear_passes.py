"""Two passes over the tiles of a linear layer: rows are measured, then pulled back.

Pass one, `measure`, reduces each row of logits to a few numbers; pass two, `pull`,
turns cotangents of those rows into gradients of the arrays:

    d / d z_j = (a + c) p_j - a (1 - s) [j = y] - a s / possible

with a the cotangent of the row's loss, c that of its lse, s the label smoothing. At the
label a (p_y - 1) is a expm1(-nll), so nothing cancels.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax import _linear_tiles as tiles
from jax_softmax._linear_tiles import Head, Index, Layer
from jax_softmax._partition import (
    RAISED,
    Partition,
    gap,
    log1p,
    log_partition,
    partition,
    shifted_exp,
)

T = TypeVar("T")


class Rows(NamedTuple):
    """What pass one learns of each row."""

    part: Partition
    label: Array  # the label's logit; -inf where no tile held it
    spread: Array | None  # sum of max - z over the classes that are not ruled out,
    possible: Array | None  # and their number: for label smoothing only


class Losses(NamedTuple):
    """Per row: -log p of the label, the loss (smoothed) and lse."""

    nll: Array
    loss: Array
    lse: Array


class Gradients(NamedTuple):
    """None for what is not wanted."""

    x: Array | None
    w: Array | None
    b: Array | None


def measure(head: Head, layer: Layer) -> Rows:
    """Pass one over all tokens: one matmul."""

    def chunk(carry: None, start: Index, size: int) -> tuple[None, Rows]:
        return carry, _measure(head, tiles.piece_of(layer, start, size), None)[0]

    return tiles.over(layer.x.shape[0], head.tokens, chunk, None, tiles.end_to_end)[1]


def losses(head: Head, layer: Layer, rows: Rows) -> Losses:
    """Sums of non-negative terms. An unknown label is NaN, a dropped row 0."""
    total = log1p(rows.part.tail)
    nll = gap(rows.label, rows.part.max) + total
    nll = jnp.where(layer.known, nll, jnp.nan)
    loss = nll
    if rows.spread is not None and rows.possible is not None:
        s = head.label_smoothing
        loss = (1 - s) * nll + s * (rows.spread / rows.possible + total)
    found = Losses(nll, loss, log_partition(rows.part))
    if layer.keep is None:
        return found
    return Losses(*(jnp.where(layer.keep, leaf, 0) for leaf in found))


def pull(
    head: Head, layer: Layer, rows: Rows, a: Array, c: Array, wanted: Gradients
) -> Gradients:
    """Pass two over all tokens, logits made again: three matmuls."""

    def chunk(grads: Gradients, start: Index, size: int) -> tuple[Gradients, None]:
        piece = tiles.piece_of(layer, start, size)
        rows_, a_, c_ = tiles.cut((rows, a, c), start, size)
        dz = _dz(head, piece, rows_, losses(head, piece, rows_).nll, a_, c_)
        return _pull(head, piece, None, dz, grads, start), None

    grads = _zeros(layer, wanted)
    return tiles.over(layer.x.shape[0], head.tokens, chunk, grads, None)[0]


def measure_and_pull(
    head: Head, layer: Layer, weights: Array, z_loss: float, wanted: Gradients
) -> tuple[Losses, Gradients]:
    """Both passes, chunk of tokens by chunk: three matmuls if logits are kept.

    The cotangents are known: those of sum(weights * (loss + z_loss * lse^2)).
    """
    tokens, classes = layer.x.shape[0], tiles.classes_of(head, layer.w)
    kept = None
    if head.keep_logits:
        kept = jnp.zeros((min(head.tokens, tokens), classes), tiles.wide_type(layer))

    def chunk(carry, start: Index, size: int):
        grads, kept = carry
        piece = tiles.piece_of(layer, start, size)
        a = tiles.cut(weights, start, size)
        rows, kept = _measure(head, piece, kept)
        found = losses(head, piece, rows)
        dz = _dz(head, piece, rows, found.nll, a, 2 * z_loss * found.lse * a)
        return (_pull(head, piece, kept, dz, grads, start), kept), found

    carry = (_zeros(layer, wanted), kept)
    (grads, _), found = tiles.over(tokens, head.tokens, chunk, carry, tiles.end_to_end)
    return found, grads


def push(
    head: Head, layer: Layer, rows: Rows, tangents: Gradients
) -> tuple[Array, Array]:
    """Tangents of (loss, lse): what `pull` is the transpose of."""

    def chunk(carry: None, start: Index, size: int):
        piece, rows_ = tiles.piece_of(layer, start, size), tiles.cut(rows, start, size)
        dx = None if tangents.x is None else tiles.cut(tangents.x, start, size)
        moved = piece._replace(x=dx) if dx is not None else None
        nll = losses(head, piece, rows_).nll
        ones, zeros = jnp.ones_like(nll), jnp.zeros_like(nll)
        d_loss = _dz(head, piece, rows_, nll, ones, zeros)
        d_lse = _dz(head, piece, rows_, nll, zeros, ones)

        def tile(sums, start: Index, width: int):
            z = tiles.logits(head, piece, start, width)
            dz = jnp.zeros_like(z)
            if moved is not None:
                dz += tiles.product(head, moved, layer.w, start, width)
            if tangents.w is not None:
                dz += tiles.product(head, piece, tangents.w, start, width)
            if tangents.b is not None:
                dz += tiles.slice_axis(tangents.b, start, width, 0).astype(dz.dtype)
            terms = (d_loss(z, start) * dz, d_lse(z, start) * dz)
            return tuple(s + t.sum(-1) for s, t in zip(sums, terms, strict=True)), None

        classes = tiles.classes_of(head, layer.w)
        return carry, tiles.over(classes, head.classes, tile, (zeros, zeros), None)[0]

    return tiles.over(layer.x.shape[0], head.tokens, chunk, None, tiles.end_to_end)[1]


def _measure(head: Head, layer: Layer, kept: Array | None) -> tuple[Rows, Array | None]:
    """Pass one over one chunk of tokens; the logits stay in `kept`."""

    def tile(kept: Array | None, start: Index, width: int):
        z = tiles.logits(head, layer, start, width)
        if kept is not None:
            kept = lax.dynamic_update_slice(kept, z, (0, start))
        return kept, rows_of_tile(head, layer, z, start)

    def combined(whole: Rows, rest: Rows | None) -> Rows:
        return merged_rows(stacked(whole, rest))

    classes = tiles.classes_of(head, layer.w)
    kept, rows = tiles.over(classes, head.classes, tile, kept, combined)
    return rows, kept


def rows_of_tile(head: Head, layer: Layer, z: Array, start: Index) -> Rows:
    """What the logits of the classes from start on tell of each row."""
    column = layer.labels - start
    held = (column >= 0) & (column < z.shape[1])
    label = jnp.take_along_axis(z, jnp.where(held, column, 0)[:, None], axis=1)
    label = jnp.where(held, label[:, 0], -jnp.inf)
    part = partition(z)
    if not head.label_smoothing:
        return Rows(part, label, None, None)
    possible = z > -jnp.inf
    distance = jnp.where(possible, gap(z, part.max[:, None]), 0)
    return Rows(part, label, distance.sum(-1), possible.sum(-1).astype(z.dtype))


def stacked(whole: T, rest: T | None) -> T:
    """The tile that was left over, behind those of one size."""
    if rest is None:
        return whole
    return jax.tree.map(
        lambda a, b: jnp.concatenate((a, b[None])),
        whole,
        rest,
    )


def merged_rows(tiled: Rows) -> Rows:
    """What all tiles, along the leading axis, tell of each row."""
    part = _merged(tiled.part)
    spread = possible = None
    if tiled.spread is not None and tiled.possible is not None:
        lower = jnp.where(tiled.possible > 0, gap(tiled.part.max, part.max), 0)
        spread = (tiled.spread + tiled.possible * lower).sum(0)
        possible = tiled.possible.sum(0)
    return Rows(part, tiled.label.max(0), spread, possible)


def _merged(parts: Partition) -> Partition:
    """`merge` over the leading axis, with one exponential for each partition."""
    top = parts.max.max(0)
    scaled = shifted_exp(parts.max, top, raised=RAISED)
    scaled = jnp.where(parts.max == -jnp.inf, 0, scaled)
    place = lax.broadcasted_iota(jnp.int32, parts.max.shape, 0)
    leads = jnp.where(place == parts.max.argmax(0), 2.0**RAISED, 0).astype(top.dtype)
    terms = (parts.tail * scaled + (scaled - leads)) * 2.0**-RAISED
    while (count := terms.shape[0]) > 1:  # by pairs: log2(n) roundings, not n
        pairs = terms[: count // 2] + terms[count // 2 : count // 2 * 2]
        terms = jnp.concatenate((pairs, terms[count // 2 * 2 :]))
    return Partition(top, terms[0])


def _dz(
    head: Head, layer: Layer, rows: Rows, nll: Array, a: Array, c: Array
) -> Callable[[Array, Index], Array]:
    """The cotangent of a tile of logits, from those of the rows' losses and lse."""
    largest = jnp.finfo(nll.dtype).max
    empty = rows.part.max == -jnp.inf
    defined = (layer.known & ~empty) | (a == 0)
    top = jnp.where(empty, 0, jnp.minimum(rows.part.max, largest))
    scale = jnp.where(defined, a + c, jnp.nan) / (1 + rows.part.tail)
    scale = jnp.where(empty & defined, 0, scale)
    smoothed, uniform = jnp.expm1(-nll), None
    if rows.possible is not None:
        smoothed += head.label_smoothing
        uniform = a * head.label_smoothing / rows.possible
    at_label = jnp.where(a == 0, 0, a * smoothed) + c * jnp.exp(-nll)
    at_label = jnp.where(
        empty, scale, at_label if uniform is None else at_label - uniform
    )

    def tile(z: Array, start: Index) -> Array:
        p = jnp.exp(jnp.minimum(z, largest) - top[:, None]) * scale[:, None]
        if uniform is not None:
            p = jnp.where(z > -jnp.inf, p - uniform[:, None], p)
        column = lax.broadcasted_iota(layer.labels.dtype, z.shape, 1)
        is_label = column == (layer.labels - start)[:, None]
        dz = jnp.where(is_label, at_label[:, None], p)
        if head.softcap is not None:
            dz = dz * (1 - jnp.square(z / head.softcap))
        return dz if layer.keep is None else jnp.where(layer.keep[:, None], dz, 0)

    return tile


def _pull(
    head: Head,
    layer: Layer,
    kept: Array | None,
    dz_of: Callable[[Array, Index], Array],
    grads: Gradients,
    at: Index,
) -> Gradients:
    """Pass two over one chunk of tokens, which starts `at`."""
    rows, kind = layer.x.shape[0], tiles.operand_type(layer)
    x = layer.x.astype(kind)

    def tile(carry: Gradients, start: Index, width: int) -> tuple[Gradients, None]:
        dx, dw, db = carry
        if kept is None:
            z = tiles.logits(head, layer, start, width)
        else:
            z = lax.dynamic_slice(kept, (0, start), (rows, width))
        dz = dz_of(z, start)
        if db is not None:
            db = tiles.add_at(db, dz.sum(0), start, 0)
        dz = dz.astype(kind)
        if dx is not None:
            dx += tiles.dot(
                head,
                dz,
                tiles.tile_of(head, layer.w, start, width).astype(kind),
                1,
                0 if head.tied else 1,
            )
        if dw is not None:
            pair = (dz, x) if head.tied else (x, dz)
            dw = tiles.add_at(
                dw, tiles.dot(head, *pair, 0, 0), start, 0 if head.tied else 1
            )
        return Gradients(dx, dw, db), None

    dx = None if grads.x is None else jnp.zeros(x.shape, tiles.wide_type(layer))
    carry = grads._replace(x=dx)
    carry, _ = tiles.over(
        tiles.classes_of(head, layer.w), head.classes, tile, carry, None
    )
    if grads.x is None or carry.x is None:
        return carry
    dx = carry.x.astype(grads.x.dtype)
    return carry._replace(x=lax.dynamic_update_slice_in_dim(grads.x, dx, at, 0))


def _zeros(layer: Layer, wanted: Gradients) -> Gradients:
    return Gradients(
        *(
            jnp.zeros_like(array) if want and array is not None else None
            for want, array in zip(wanted, (layer.x, layer.w, layer.b), strict=True)
        )
    )
