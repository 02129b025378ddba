"""Pass one over the tiles of a linear layer: what is learnt of each row of logits."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jax_softmax import _linear_tiles as tiles
from jax_softmax._linear_tiles import Head, Index, Layer
from jax_softmax._logarithm import log1p
from jax_softmax._losses import part_of
from jax_softmax._partition import (
    Partition,
    gap,
    log_partition,
    merge,
    partition,
    partition_and_exp,
)

T = TypeVar("T")


class Reduced(NamedTuple):
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


class Measured(NamedTuple):
    """Pass one over one chunk of tokens."""

    rows: Reduced
    tops: Array  # [tiles, tokens]: the maximum of each tile
    kept: Array | None


def measure(head: Head, layer: Layer) -> Reduced:
    """Pass one over all tokens: one matmul."""

    def chunk(carry: None, start: Index, size: int) -> tuple[None, Reduced]:
        piece = tiles.piece_of(head, layer, start, size)
        return carry, measured(head, piece, None).rows

    return tiles.over_tokens(head, layer.x.shape[0], chunk, None)[1]


def over_devices(head: Head, rows: Reduced) -> Reduced:
    """What the classes on all devices tell of each row: a partition and the label's
    logit travel, three numbers."""
    shards = head.shards
    return rows if shards.alone else merged_rows(shards.each(rows))


def losses(head: Head, layer: Layer, rows: Reduced) -> Losses:
    """Sums of non-negative terms. An unknown label is NaN, a dropped row 0."""
    total = log1p(rows.part.tail)
    nll = gap(rows.label, rows.part.max) + total
    nll = jnp.where(layer.known, nll, jnp.nan)
    loss = nll
    if rows.spread is not None and rows.possible is not None:
        s = head.label_smoothing
        loss = part_of(nll, 1 - s) + s * (rows.spread / rows.possible + total)
    found = Losses(nll, loss, log_partition(rows.part))
    if layer.keep is None:
        return found
    return Losses(*(jnp.where(layer.keep, leaf, 0) for leaf in found))


def measured(head: Head, layer: Layer, kept: Array | None) -> Measured:
    """Pass one over one chunk of tokens; what pass two needs again goes to `kept`."""

    def tile(kept: Array | None, start: Index, width: int):
        z = tiles.logits(head, layer, start, width)
        if kept is None:
            return kept, rows_of_tile(head, layer, z, partition(z), start)
        part, e = partition_and_exp(z)
        kept = tiles.put(head, kept, e if tiles.keeps_exp(head) else z, start)
        return kept, rows_of_tile(head, layer, z, part, start)

    def combined(whole: Reduced, rest: Reduced | None) -> tuple[Reduced, Array]:
        tiled = stacked(whole, rest)
        return merged_rows(tiled), tiled.part.max

    kept, (rows, tops) = tiles.over_classes(head, layer, tile, kept, combined)
    return Measured(rows, tops, kept)


def rows_of_tile(
    head: Head, layer: Layer, z: Array, part: Partition, start: Index
) -> Reduced:
    """What the logits of the classes from start on tell of each row."""
    column = layer.labels - start
    held = (column >= 0) & (column < z.shape[1])
    label = jnp.take_along_axis(z, jnp.where(held, column, 0)[:, None], axis=1)
    label = jnp.where(held, label[:, 0], -jnp.inf)
    if not head.label_smoothing:
        return Reduced(part, label, None, None)
    possible = z > -jnp.inf
    distance = jnp.where(possible, gap(z, part.max[:, None]), 0)
    return Reduced(part, label, distance.sum(-1), possible.sum(-1).astype(z.dtype))


def stacked(whole: T, rest: T | None) -> T:
    """The tile that was left over, behind those of one size."""
    if rest is None:
        return whole
    return jax.tree.map(lambda a, b: jnp.concatenate((a, b[None])), whole, rest)


def merged_rows(several: Reduced) -> Reduced:
    """What all tiles, or devices, along the leading axis tell of each row."""
    part = merge(several.part)
    spread = possible = None
    if several.spread is not None and several.possible is not None:
        lower = jnp.where(
            several.possible > 0, gap(several.part.max, part.max[None]), 0
        )
        spread = (several.spread + several.possible * lower).sum(0)
        possible = several.possible.sum(0)
    return Reduced(part, several.label.max(0), spread, possible)
