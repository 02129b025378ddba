"""Cotangents of logits, from those of their rows' losses.

Pass one (`_linear_rows`) has reduced each row of logits to a few numbers:

    d / d z_j = (a + c) p_j - a (1 - s) [j = y] - a s / possible

with a the cotangent of the row's loss, c that of its lse, s the label smoothing. At the
label a (p_y - 1) is a expm1(-nll), so nothing cancels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jax_softmax._entries import is_column
from jax_softmax._linear_rows import Reduced
from jax_softmax._linear_tiles import Head, Index, Layer


class Cotangents(NamedTuple):
    """Per row, what the cotangents of its logits are made of."""

    scale: Array  # of exp(z - top): a + c over 1 + tail
    top: Array
    at_label: Array
    uniform: Array | None  # of every class that is not ruled out


def row_cotangents(
    layer: Layer, rows: Reduced, nll: Array, a: Array, c: Array, smoothing: float
) -> Cotangents:
    """From those of the rows' losses, a, and of their lse, c."""
    empty = rows.part.max == -jnp.inf
    defined = (layer.known & ~empty) | (a == 0)
    top = jnp.where(empty, 0, jnp.minimum(rows.part.max, jnp.finfo(nll.dtype).max))
    scale = jnp.where(defined, a + c, jnp.nan) / (1 + rows.part.tail)
    scale = jnp.where(empty & defined, 0, scale)
    smoothed, uniform = jnp.expm1(-nll), None
    if rows.possible is not None:
        smoothed += smoothing
        uniform = a * smoothing / rows.possible
    # Only of an unknown label: elsewhere a may be what is differentiated, also at 0.
    nothing = (a == 0) & ~layer.known
    at_label = jnp.where(nothing, 0, a * smoothed) + c * jnp.exp(-nll)
    if uniform is not None:
        at_label -= jnp.where(rows.label > -jnp.inf, uniform, 0)
    return Cotangents(scale, top, jnp.where(empty, scale, at_label), uniform)


def tile_cotangents(
    head: Head, layer: Layer, of: Cotangents, z: Array, start: Index
) -> Array:
    """The cotangents of a tile of logits."""
    z_finite = jnp.minimum(z, jnp.finfo(z.dtype).max)
    p = jnp.exp(z_finite - of.top[:, None]) * of.scale[:, None]
    if of.uniform is not None:
        p = jnp.where(z > -jnp.inf, p - of.uniform[:, None], p)
    dz = with_labels(layer, of, p, start)
    if head.softcap is None:
        return dz
    z = jnp.maximum(z, -head.softcap)  # padding is below it
    return dz * (1 - jnp.square(z / head.softcap))


def with_labels(layer: Layer, of: Cotangents, dz: Array, start: Index) -> Array:
    """The cotangents of a tile, those of labels put right and of dropped rows 0."""
    is_label = is_column(dz, layer.labels - start)
    dz = jnp.where(is_label, of.at_label[:, None], dz)
    return dz if layer.keep is None else jnp.where(layer.keep[:, None], dz, 0)
