"""Loss and accuracy of a model, exact over all rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Integer

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._losses import cross_entropy

Model = Any  # a pytree; logits(x) is all that evaluation asks of it
Transform = Callable[[Array], Array]

TILE_ROWS = 1024  # whose features stay in a cache


def evaluate(
    model: Model,
    x: ArrayLike,
    labels: Integer[ArrayLike, " rows"],
    *,
    transform: Transform = jnp.asarray,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy and accuracy over all rows; both NaN if a loss is NaN.

    Args:
        model: any pytree with a method logits(x).
        x: one row per example, of any type.
        labels: class ids.
        transform: rows of x to features, as in fit. It may be given a part of the rows.

    Returns:
        (loss, accuracy), two scalars in at least float32.

    Raises:
        ValueError: no rows, or not as many labels as rows.
        TypeError: x or labels are no numbers, or model has no method logits(x).
    """
    options.has_logits(model)
    options.functions(transform=transform)
    options.static(transform=transform)
    x, labels = checks.examples("x", x, "labels", labels)
    return _evaluate(model, x, labels, transform)


@partial(jax.jit, static_argnames="transform")
def _evaluate(
    model: Model, x: Array, labels: Array, transform: Transform
) -> tuple[Array, Array]:
    logits = _logits(model, x, transform)
    loss = cross_entropy(logits, labels).mean()
    hits = (logits.argmax(-1).astype(labels.dtype) == labels).sum()
    # Behind a barrier, or XLA multiplies by the rounded 1 / rows.
    rows = lax.optimization_barrier(jnp.asarray(len(labels), loss.dtype))
    accuracy = hits.astype(loss.dtype) / rows
    return loss, jnp.where(jnp.isnan(loss), jnp.nan, accuracy)


def check_validation(
    model: Model, x: Array, labels: Array, transform: Transform
) -> None:
    """That model, or its shapes and types, can be evaluated: nothing is computed."""
    try:
        jax.eval_shape(lambda *of: _evaluate(*of, transform), model, x, labels)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"validation must fit the model and transform: {error}"
        ) from error


def _logits(model: Model, x: Array, transform: Transform) -> Array:
    """Tile by tile, so that the features stay in a cache."""
    if _placed((model, x)):  # in the type, which a loop over tiles would have to keep
        return model.logits(transform(x))
    rows = min(len(x), TILE_ROWS)

    def of_tile(begin: Array | int) -> Array:
        return model.logits(transform(lax.dynamic_slice_in_dim(x, begin, rows)))

    def with_tile(i: Array, logits: Array) -> Array:
        begin = i * rows  # JAX moves a slice that would not fit: the last may overlap
        return lax.dynamic_update_slice_in_dim(logits, of_tile(begin), begin, axis=0)

    tile = jax.eval_shape(of_tile, 0)
    nothing = jnp.zeros((len(x), *tile.shape[1:]), tile.dtype)
    return lax.fori_loop(0, -(-len(x) // rows), with_tile, nothing)


def _placed(arrays: Any) -> bool:
    """Whether any lies on a mesh whose axes are explicit."""
    types = map(jax.typeof, jax.tree.leaves(arrays))
    return any(kind.sharding.mesh.explicit_axes for kind in types)
