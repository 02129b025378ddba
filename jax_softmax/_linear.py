"""Cross-entropy from features and weights, without the logits in memory.

    z = x w + b,   loss = lse(z) - z[y],   d loss / d z = softmax(z) - onehot(y)

The logits are made, used and dropped tile by tile. Here are the rules of
differentiation; `_linear_passes` makes the passes, `_linear_plan` chooses the tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer, Real

from jax_softmax import _checks as checks
from jax_softmax import _linear_passes as passes
from jax_softmax import _linear_tiles as tiles
from jax_softmax import _options as options
from jax_softmax._linear_map import linear_map
from jax_softmax._linear_passes import Gradients
from jax_softmax._linear_plan import Chunk, Keep, head_of, layer_of, on_tiles
from jax_softmax._linear_rows import Losses, Reduced, losses, measure, over_devices
from jax_softmax._linear_tiles import Head, Layer
from jax_softmax._shards import AxisName, alike
from jax_softmax._tracing import traced_once

Rowwise = Float[Array, "*batch"]


def linear_cross_entropy(
    x: Float[ArrayLike, "*batch features"],
    w: Float[ArrayLike, "_ _"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    b: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, "*batch"] | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    tied: bool = False,
    chunk: Chunk | None = None,
    precision: Any = None,
    axis_name: AxisName | None = None,
    classes: int | None = None,
    return_lse: bool = False,
) -> Rowwise | tuple[Rowwise, Rowwise]:
    """Cross-entropy of softmax(x w + b), one loss per row, without the logits.

        z = x w + b,   loss = lse(z) - z[y],   d loss / d z = softmax(z) - onehot(y)

    Under grad the logits are made again: four matmuls, for any cotangent. Where the
    mean is wanted, mean_linear_cross_entropy needs three.

    Args:
        x: features; types narrower than float32 are multiplied as they are, in the
            common type of x and w, and added up in float32.
        w: weights, [features, classes], or [classes, features] if tied.
        labels: in [0, classes). Any other id makes the row's loss and gradient NaN.
        b: biases of the classes; -inf rules a class out.
        where: rows to keep. A dropped row has loss 0 and gradient exactly 0, whatever
            it holds.
        label_smoothing: the share of the target spread evenly over all classes that
            are not ruled out.
        softcap: logits become softcap * tanh(z / softcap), but for those of -inf.
        tied: w is an embedding table [classes, features], used without a copy.
        chunk: (tokens, classes) of a tile. By default from the shapes alone: on a CPU,
            up to 1024 tokens by as many classes; elsewhere all tokens by 2560 classes.
            Any value gives the same answer, up to rounding.
        precision: of all matmuls, as in jax.lax.dot_general.
        axis_name: mesh axes, inside jax.shard_map, over which the classes lie in order:
            w and b are this device's, labels are ids among all classes. Three numbers
            a row travel (maximum, tail, the label's logit; with smoothing five), and
            the gradient of x, which is summed; w's is not. (With check_vma=False
            differentiate outside jax.shard_map: inside, JAX does not sum x's, and
            counts a loss once for each device.)
        classes: how many there are, if the last columns of the last devices are not
            classes but padding (of finite numbers).
        return_lse: return (loss, lse), both differentiable.

    Returns:
        Losses >= 0 in at least float32, within 3 ULP of the exact loss of the float32
        logits. Dropped rows have loss and lse 0.

    Raises:
        TypeError: x, w or b are not floating point, or labels not integers.
        ValueError: shapes do not match, or an option is out of range.

    >>> x, w, labels = jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, 3])
    >>> print(linear_cross_entropy(x, w, labels))
    [1.3862944 1.3862944]
    >>> loss, lse = linear_cross_entropy(x, w, labels, return_lse=True)
    >>> print(loss + 1e-4 * lse**2)  # z-loss
    [1.3864865 1.3864865]
    """
    layer, batch, shards = layer_of(x, w, labels, b, where, tied, axis_name, classes)
    head = head_of(tied, softcap, label_smoothing, precision, chunk, shards)
    return_lse = options.flag("return_lse", return_lse)
    found = _per_row(head, chunk, layer)
    loss, lse = (leaf.reshape(batch) for leaf in found)
    return (loss, lse) if return_lse else loss


def mean_linear_cross_entropy(
    x: Float[ArrayLike, "*batch features"],
    w: Float[ArrayLike, "_ _"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    b: Float[ArrayLike, " classes"] | None = None,
    where: Bool[ArrayLike, "*batch"] | None = None,
    weights: Float[ArrayLike, "*batch"] | None = None,
    normalizer: Real[ArrayLike, ""] | float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    tied: bool = False,
    chunk: Chunk | None = None,
    precision: Any = None,
    axis_name: AxisName | None = None,
    classes: int | None = None,
    skip_below: float = 0.0,
) -> Float[Array, ""]:
    """The mean of linear_cross_entropy, its gradients made on the way forward.

        sum of weights * (loss + z_loss * lse^2) / normalizer

    The cotangents of the rows are known before the first logit is, so a value with both
    gradients costs three matmuls; a value alone costs one. Of types narrower than
    float32, probabilities are rounded to the operands' type for the two backward
    matmuls, and the gradient of w to the type of w once for each chunk of tokens.

    Args:
        x, w, labels, b, where, label_smoothing, softcap, tied, precision, axis_name,
            classes: as in linear_cross_entropy.
        weights: of the rows, 1 by default. They can be differentiated too. A row of
            weight 0 counts for nothing, whatever its label; where drops one that may
            hold anything.
        normalizer: what the sum is divided by, instead of the sum of the weights of
            the kept rows. With the whole batch's count, the sum over ragged
            micro-batches, or over devices with a part of the tokens each, is the mean
            of the batch.
        z_loss: the weight of lse^2.
        chunk: (tokens, classes) of a tile. One number for each logit of a chunk of
            tokens is kept for the gradients, so that there are three matmuls. By
            default a chunk has as many tokens as that takes 52 MB for on a CPU, 537 MB
            elsewhere. Logits are made again instead, by a fourth matmul, where a chunk
            that is given takes more, where fewer than 64 tokens would fit, and where on
            several devices no chunk that fits divides the tokens; on a CPU also where
            that is faster, with few features, or few tokens that fit. (Where a CPU is
            the only device, a first chunk of up to 512 tokens is kept where the
            gradient of w will be.)
        skip_below: leave out of both gradients each tile without a label where all
            gradients of logits are below this times their row's weight: without z_loss,
            those are the probabilities. None is wrong by more, nor are all of a row's
            together by more than what is left out; the loss itself is exact. It saves
            the two matmuls of such a tile, and costs a branch for every tile: measure
            first. Not with label_smoothing, which gives every class a gradient.

    Returns:
        A scalar in at least float32; 0 with zero gradient when no row is kept, and when
        what the sum is divided by is 0.

    Raises:
        TypeError: x, w, b or weights are not floating point, or labels not integers.
        ValueError: shapes do not match, or an option is out of range.

    >>> x, w, labels = jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, -100])
    >>> print(mean_linear_cross_entropy(x, w, labels, where=labels >= 0))
    1.3862944
    >>> halves = [mean_linear_cross_entropy(x[i:i+1], w, jnp.array([i]), normalizer=2.0)
    ...           for i in range(2)]
    >>> print(sum(halves))
    1.3862944
    """
    layer, batch, shards = layer_of(x, w, labels, b, where, tied, axis_name, classes)
    head = head_of(tied, softcap, label_smoothing, precision, chunk, shards, skip_below)
    wide = tiles.wide_type(layer)
    if weights is None:
        shares = jnp.ones(layer.labels.shape, wide)
    else:
        weights = checks.floating("weights", weights)
        checks.same_shape("weights", weights, batch)
        shares = weights.reshape(-1).astype(wide)
    if layer.keep is not None:
        shares = jnp.where(layer.keep, shares, 0)
    count = shares.sum()
    if normalizer is not None:
        count = checks.scalar("normalizer", normalizer).astype(wide)
    shares = jnp.where(count == 0, 0, shares / jnp.where(count == 0, 1, count))
    z_loss = options.number("z_loss", z_loss)
    x, w, b = alike((layer.x, layer.w, layer.b), shares)
    layer = layer._replace(x=x, w=w, b=b)
    return _weighted_sum(head, chunk, z_loss, layer, shares)


@traced_once(static_argnums=(0, 1))
def _per_row(head: Head, chunk: Chunk | None, layer: Layer) -> tuple[Array, Array]:
    """(loss, lse) of each row. Recomputes logits under grad: four matmuls."""

    def tiled(function, *args):
        return on_tiles(function, head, chunk, Keep.NOTHING, *args)

    def value(layer: Layer) -> tuple[Reduced, tuple[Array, Array]]:
        rows = over_devices(head, tiled(measure, layer))
        found = losses(head, layer, rows)
        return rows, (found.loss, found.lse)

    @jax.custom_jvp
    def rows_of(layer: Layer) -> tuple[Array, Array]:
        return value(layer)[1]

    def rule(primals, tangents):
        (layer,) = primals
        rows, out = value(layer)
        moved = _moved(layer, tangents[0])
        wanted = jax.tree.map(lambda _: True, moved)

        def push(residuals, moved):
            return tiled(passes.push, *residuals, moved)

        def pull(residuals, cotangents):
            return tiled(passes.pull, *residuals, *cotangents, wanted)

        here = linear_map(push, pull, (layer, rows), moved)
        return out, head.shards.sum(here)

    rows_of.defjvp(rule, symbolic_zeros=True)
    return rows_of(layer)


@traced_once(static_argnums=(0, 1, 2))
def _weighted_sum(
    head: Head, chunk: Chunk | None, z_loss: float, layer: Layer, shares: Array
) -> Array:
    """sum(shares * (loss + z_loss * lse^2)), its gradients made on the way."""

    def counted(found: Losses, shares: Array) -> Array:
        total = found.loss + z_loss * found.lse * found.lse if z_loss else found.loss
        return jnp.where((shares == 0) & ~jnp.isfinite(total), 0, total)

    @jax.custom_jvp
    def summed(layer: Layer, shares: Array) -> Array:
        rows = on_tiles(measure, head, chunk, Keep.NOTHING, layer)
        rows = over_devices(head, rows)
        return _dot(shares, counted(losses(head, layer, rows), shares))

    def rule(primals, tangents):
        layer, shares = primals
        moved = _moved(layer, tangents[0])
        wanted = jax.tree.map(lambda _: True, moved)
        in_place = wanted.w and layer.w.dtype == tiles.kept_type(head, layer)
        keep = Keep.IN_PLACE if in_place else Keep.SOME
        rows, grads = on_tiles(
            passes.measure_and_pull, head, chunk, keep, layer, shares, z_loss, wanted
        )
        value = counted(losses(head, layer, rows), shares)
        out = _dot(shares, value)
        terms = map(_dot, jax.tree.leaves(grads), jax.tree.leaves(moved))
        d_out = head.shards.sum(sum(terms, jnp.zeros_like(out)))
        if not isinstance(tangents[1], SymbolicZero):
            d_out += _dot(value, tangents[1])
        return out, d_out.astype(out.dtype)

    summed.defjvp(rule, symbolic_zeros=True)
    return summed(layer, shares)


def _dot(a: Array, b: Array) -> Array:
    wide = checks.accumulation_dtype(a, b)
    return jnp.sum(a.astype(wide) * b.astype(wide))


def _moved(layer: Layer, tangent: Any) -> Gradients:
    """The tangents that are not known to be zero; dropped rows have none."""
    arrays = (tangent.x, tangent.w, tangent.b)
    x, w, b = (None if isinstance(t, SymbolicZero) else t for t in arrays)
    if x is not None and layer.keep is not None:
        x = jnp.where(layer.keep[:, None], x, 0)
    return Gradients(x, w, b)
