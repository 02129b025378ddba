"""Pass two over the tiles of a linear layer: cotangents of logits become gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax import _linear_tiles as tiles
from jax_softmax._exponential import shifted_exp
from jax_softmax._linear_cotangents import row_cotangents, tile_cotangents, with_labels
from jax_softmax._linear_rows import Reduced, losses, measured, over_devices
from jax_softmax._linear_tiles import Head, Index, Layer


class Gradients(NamedTuple):
    """None for what is not wanted."""

    x: Array | None
    w: Array | None
    b: Array | None


def pull(
    head: Head, layer: Layer, rows: Reduced, a: Array, c: Array, wanted: Gradients
) -> Gradients:
    """Pass two over all tokens, logits made again: three matmuls."""

    def chunk(grads: Gradients, start: Index, size: int) -> tuple[Gradients, None]:
        piece = tiles.piece_of(head, layer, start, size)
        rows_, a_, c_ = tiles.cut(head, (rows, a, c), start, size)
        nll = losses(head, piece, rows_).nll
        cotangents = row_cotangents(piece, rows_, nll, a_, c_, head.label_smoothing)

        def dz(grads: Gradients, start: Index, width: int) -> Array:
            z = tiles.logits(head, piece, start, width)
            return tile_cotangents(head, piece, cotangents, z, start)

        return _pull(head, piece, dz, None, grads, start), None

    grads = _zeros(layer, wanted)
    return tiles.over_tokens(head, layer.x.shape[0], chunk, grads)[0]


def measure_and_pull(
    head: Head, layer: Layer, weights: Array, z_loss: float, wanted: Gradients
) -> tuple[Reduced, Gradients]:
    """Both passes, chunk of tokens by chunk: three matmuls if one number is kept of
    each logit.

    The cotangents are known: those of sum(weights * (loss + z_loss * lse^2)).
    """
    tokens, classes = layer.x.shape[0], tiles.classes_of(head, layer.w)

    def chunk(head: Head, carry, start: Index, size: int):
        grads, kept = carry
        piece = tiles.piece_of(head, layer, start, size)
        a = tiles.cut(head, weights, start, size)
        seen = measured(head, piece, grads.w if head.in_place else kept)
        seen = seen._replace(rows=over_devices(head, seen.rows))
        if head.in_place:
            grads = grads._replace(w=seen.kept)
        else:
            kept = seen.kept
        found = losses(head, piece, seen.rows)
        c = 2 * z_loss * found.lse * a if z_loss else jnp.zeros_like(a)
        smoothing = head.label_smoothing
        cotangents = row_cotangents(piece, seen.rows, found.nll, a, c, smoothing)
        # [tiles, tokens]: what a tile's exp(z - its own maximum) is multiplied by.
        top = seen.rows.part.max[None]
        shares = shifted_exp(seen.tops, top) * cotangents.scale[None]

        def dz(grads: Gradients, start: Index, width: int) -> Array:
            held = grads.w if head.in_place else kept
            if held is None:
                z = tiles.logits(head, piece, start, width)
                return tile_cotangents(head, piece, cotangents, z, start)
            held = tiles.take(head, held, size, start, width).astype(found.nll.dtype)
            if not tiles.keeps_exp(head):
                return tile_cotangents(head, piece, cotangents, held, start)
            p = held * shares[start // head.tile_classes][:, None]
            return with_labels(piece, cotangents, p, start)

        needed = _needed(head, piece, shares, a) if head.skip_below else None
        return (_pull(head, piece, dz, needed, grads, start), kept), seen.rows

    grads, kept, parts = _zeros(layer, wanted), None, []
    if head.first:
        here = head._replace(in_place=True)
        (grads, _), rows = chunk(here, (grads, None), 0, head.first)
        parts.append(rows)
    rest = tokens - head.first
    if rest or not head.first:
        if head.keeps:
            shape = (min(head.chunk_tokens, rest), classes)
            kept = jnp.zeros_like(layer.x, tiles.kept_type(head, layer), shape)
            if head.first:  # kept waits for its gradients, and takes no memory before
                kept += jax.tree.leaves(grads)[0].reshape(-1)[0].astype(kept.dtype)

        def after(carry, start: Index, size: int):
            return chunk(head, carry, head.first + start, size)

        (grads, _), rows = tiles.over_tokens(head, rest, after, (grads, kept))
        parts.append(rows)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), grads


def push(
    head: Head, layer: Layer, rows: Reduced, tangents: Gradients
) -> tuple[Array, Array]:
    """Tangents of (loss, lse): what `pull` is the transpose of."""

    def chunk(carry: None, start: Index, size: int):
        piece = tiles.piece_of(head, layer, start, size)
        rows_ = tiles.cut(head, rows, start, size)
        dx = None if tangents.x is None else tiles.cut(head, tangents.x, start, size)
        moved = piece._replace(x=dx) if dx is not None else None
        nll = losses(head, piece, rows_).nll
        zeros = jnp.zeros_like(piece.x, shape=nll.shape, dtype=nll.dtype)
        ones = zeros + 1
        smoothing = head.label_smoothing
        d_loss = row_cotangents(piece, rows_, nll, ones, zeros, smoothing)
        d_lse = row_cotangents(piece, rows_, nll, zeros, ones, smoothing)

        def tile(sums, start: Index, width: int):
            z = tiles.logits(head, piece, start, width)
            dz = jnp.zeros_like(z)
            if moved is not None:
                dz += tiles.product(head, moved, layer.w, start, width)
            if tangents.w is not None:
                dz += tiles.product(head, piece, tangents.w, start, width)
            if tangents.b is not None:
                dz += tiles.slice_axis(tangents.b, start, width, 0).astype(dz.dtype)
            terms = (
                tile_cotangents(head, piece, of, z, start) * dz
                for of in (d_loss, d_lse)
            )
            return tuple(s + t.sum(-1) for s, t in zip(sums, terms, strict=True)), None

        return carry, tiles.over_classes(head, layer, tile, (zeros, zeros))[0]

    return tiles.over_tokens(head, layer.x.shape[0], chunk, None)[1]


def _needed(
    head: Head, layer: Layer, shares: Array, a: Array
) -> Callable[[Index, int], Array]:
    """Whether a tile holds a label, or a gradient of a logit that is not negligible."""
    limit = head.skip_below * abs(a)[None]
    negligible = ((abs(shares) < limit) | (a[None] == 0)).all(1)
    labels = jnp.where(a == 0, -1, layer.labels)

    def tile(start: Index, width: int) -> Array:
        labelled = ((labels >= start) & (labels < start + width)).any()
        return labelled | ~negligible[start // head.tile_classes]

    return tile


def _pull(
    head: Head,
    layer: Layer,
    dz_of: Callable[[Gradients, Index, int], Array],
    needed: Callable[[Index, int], Array] | None,
    grads: Gradients,
    at: Index,
) -> Gradients:
    """Pass two over one chunk of tokens, which starts `at`."""
    kind = tiles.operand_type(layer)
    x = layer.x.astype(kind)
    # Turned once, not for every tile: a CPU's matmul wants rows on the left.
    x_turned = x.T

    def products(dz: Array, w: Array) -> tuple[Array | None, Array | None]:
        dx = dw = None
        if grads.x is not None:
            dx = tiles.dot(head, dz, w, 1, 0 if head.tied else 1)
        if grads.w is not None:
            if head.tied:
                dw = tiles.dot(head, dz, x, 0, 0)
            else:
                dw = tiles.dot(head, x_turned, dz, 1, 0)
        return dx, dw

    def nothing(dz: Array, w: Array) -> tuple[Array | None, Array | None]:
        shapes = jax.eval_shape(products, dz, w)
        return jax.tree.map(lambda s: jnp.zeros_like(dz, s.dtype, s.shape), shapes)

    def tile(carry: Gradients, start: Index, width: int) -> tuple[Gradients, None]:
        # Read ahead of the branches: what one of them reads, XLA copies for it.
        dz = dz_of(carry, start, width)
        w = tiles.tile_of(head, layer.w, start, width).astype(kind)
        if needed is not None:
            dz = jnp.where(needed(start, width), dz, 0)
        operand, unit = _in_units(dz, kind)
        if needed is None:
            more = products(operand, w)
        else:
            more = lax.cond(needed(start, width), products, nothing, operand, w)
        more_dx, more_dw = more if unit is None else jax.tree.map(unit.__mul__, more)
        dx, dw, db = carry
        if dx is not None and more_dx is not None:
            dx += more_dx
        if dw is not None and more_dw is not None:
            axis = 0 if head.tied else 1
            place = tiles.set_at if head.in_place else tiles.add_at
            dw = place(dw, more_dw, start, axis)
        if db is not None:
            db = tiles.add_at(db, dz.sum(0), start, 0)
        return Gradients(dx, dw, db), None

    dx = None if grads.x is None else jnp.zeros_like(x, tiles.wide_type(layer))
    carry, _ = tiles.over_classes(head, layer, tile, grads._replace(x=dx))
    if grads.x is None or carry.x is None:
        return carry
    return carry._replace(x=tiles.set_chunk(head, grads.x, carry.x, at))


def _in_units(dz: Array, kind: jnp.dtype) -> tuple[Array, Array | None]:
    """dz in the operands' type, and what its products are to be multiplied by, if by
    anything: float16 holds nothing below 6e-8, and a mean over many rows little else.
    """
    if kind != jnp.float16:
        return dz.astype(kind), None
    sizes = abs(lax.stop_gradient(dz))
    largest = jnp.where(jnp.isfinite(sizes), sizes, 0).max(initial=0)
    power_of_two = lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=0)
    unit = jnp.clip(power_of_two, 2.0**-100, 2.0**100)
    return (dz / unit).astype(kind), unit


def _zeros(layer: Layer, wanted: Gradients) -> Gradients:
    return Gradients(
        *(
            jnp.zeros_like(array) if want and array is not None else None
            for want, array in zip(wanted, (layer.x, layer.w, layer.b), strict=True)
        )
    )
