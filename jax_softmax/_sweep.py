"""Many models at once: settings of an optimizer x seeds, as one compiled program."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Integer, Key

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._evaluation import Model, Transform, check_validation, evaluate
from jax_softmax._fit import Objective, check_model, one_step
from jax_softmax._regression import SoftmaxRegression
from jax_softmax._rows import gathered, owned, validated
from jax_softmax._shuffle import BLOCK_ROWS, epoch_order


class SweepEpoch(NamedTuple):
    """What one pass left behind, for each seed (axis 0) and setting (axis 1).

    Attributes:
        number: of the epoch, from 1.
        model: every leaf with the two axes in front.
        train_loss: the mean over the pass, each batch scored before its own update.
        validation_loss: over all rows; None without validation data.
        validation_accuracy: likewise.

    What has diverged is not finite, and nobody else's number depends on it.
    """

    number: int
    model: Model
    train_loss: Float[np.ndarray, "seeds settings"]
    validation_loss: Float[np.ndarray, "seeds settings"] | None
    validation_accuracy: Float[np.ndarray, "seeds settings"] | None


def sweep(
    models: Model,
    x: ArrayLike,
    labels: Integer[ArrayLike, " rows"],
    *,
    optimizer: Callable[[Any], optax.GradientTransformation],
    settings: Any,
    keys: Key[Array, " seeds"],
    epochs: int = 10,
    batch_size: int = 256,
    objective: Objective = SoftmaxRegression.objective,
    transform: Transform = jnp.asarray,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
) -> Iterator[SweepEpoch]:
    """Train a model for every seed and every setting, each as fit alone would.

    Rows are gathered and turned into features once for all settings of a seed, and
    their products with the weights of all settings are one matrix product.

    Args:
        models: a pytree with a leading axis of seeds: where each seed starts.
        x: one row per example, of any type: kept as it is.
        labels: class ids; objective gets them as int32.
        optimizer: from one setting to one of optax's optimizers, for example optax.sgd
            or lambda s: optax.adam(s["rate"], b1=s["b1"]). It is called while tracing,
            with scalars that are arrays: what is not an array inside optax, such as
            nesterov=True, has to be the same for all.
        settings: a pytree of hyperparameters with a leading axis of settings.
        keys: one for each seed, which decides the order of the rows as in fit.
        epochs: how many passes to make.
        batch_size: rows per update; one number, as shapes cannot vary in a program.
        objective: (model, transformed rows, labels) -> scalar mean loss.
        transform: rows of x to features, inside the compiled step.
        validation: x and labels to evaluate on after every epoch.

    Yields:
        One SweepEpoch per pass.

    Raises:
        ValueError: no rows, not as many labels as rows, leaves of models and keys that
            disagree about the seeds, or of settings about their number.
        TypeError: optimizer is not a function of a setting, models have no logits(x) or
            other than floating-point arrays, or x or labels are no numbers.

    >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 0, 1, 1])
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> models = jax.vmap(lambda key: SoftmaxRegression.init(key, 1, 2))(keys)
    >>> rates = jnp.array([0.1, 1.0, jnp.inf])
    >>> for epoch in sweep(models, x, labels, optimizer=optax.sgd, settings=rates,
    ...                    keys=keys, batch_size=3, epochs=50, validation=(x, labels)):
    ...     pass
    >>> print(epoch.validation_accuracy.shape, np.isfinite(epoch.train_loss[0]))
    (2, 3) [ True  True False]
    >>> one = jax.tree.map(lambda leaf: leaf[0, 1], epoch.model)  # seed 0, setting 1
    >>> one.predict(x)
    Array([0, 0, 1, 1], dtype=int32)
    """
    if not callable(optimizer):
        raise TypeError(
            "optimizer must make one of optax's from a setting, as optax.sgd does, "
            "not be one already"
        )
    check_model(models, objective, validation)
    options.functions(objective=objective, transform=transform)
    options.static(objective=objective, transform=transform, optimizer=optimizer)
    x = np.asarray(owned("x", x))
    checks.held("x", x)
    checks.some_rows("x", x)
    labels = np.asarray(checks.class_ids("labels", labels, x.shape[:1]))
    batch_size = options.at_least(1, "batch_size", batch_size)
    epochs = options.at_least(0, "epochs", epochs)
    if validation is not None:
        validation = validated(validation)
    _share_leading_axis("keys and models", (keys, models))
    options.one_key("each of keys", keys[0])
    if validation is not None:
        one = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], models))
        check_validation(one, *validation, transform)
    settings = jax.tree.map(jnp.asarray, settings)
    _share_leading_axis("settings", settings)
    train = partial(
        _train, optimizer=optimizer, objective=objective, transform=transform
    )

    def run() -> Iterator[SweepEpoch]:
        state = _start(models, settings, optimizer=optimizer)
        for number in range(1, epochs + 1):
            orders = np.stack([epoch_order(key, number, len(x)) for key in keys])
            losses, sizes = [], []
            for rows in _blocks(orders, batch_size):
                # Not waited for: the host gathers on while the device works.
                batches = gathered(x, rows), labels[rows]
                state, block_losses = train(state, settings, *batches)
                losses.append(block_losses)
                sizes += [rows.shape[2]] * len(rows)
            train_loss = np.average(np.concatenate(losses, -1), axis=-1, weights=sizes)
            loss = accuracy = None
            if validation is not None:
                loss, accuracy = map(
                    np.asarray, _evaluate_all(state[0], *validation, transform)
                )
            kept = jax.tree.map(jnp.copy, state[0])
            yield SweepEpoch(number, kept, train_loss, loss, accuracy)

    return run()


def _blocks(orders: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers [steps, seeds, batch]: equal blocks, the short last batch alone."""
    seeds, rows = orders.shape
    full = rows // batch_size
    steps = max(1, min(full, BLOCK_ROWS // batch_size))
    for start in range(0, full, steps):
        stop = min(start + steps, full)
        block = orders[:, start * batch_size : stop * batch_size]
        yield block.reshape(seeds, -1, batch_size).swapaxes(0, 1)
    if rows % batch_size:
        yield orders[None, :, full * batch_size :]


def _share_leading_axis(name: str, tree: Any) -> None:
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    found = ", ".join(sorted(str(np.shape(leaf)) for leaf in jax.tree.leaves(tree)))
    if not counts or () in counts:
        raise ValueError(
            f"{name} must be arrays with a leading axis, as jnp.array, jnp.stack and "
            f"jax.vmap make one, got {f'shapes {found}' if found else tree}"
        )
    if len(counts) != 1 or counts == {(0,)}:
        raise ValueError(f"{name} must share one leading axis, got shapes {found}")


@partial(jax.jit, static_argnames="optimizer")
def _start(
    models: Model,
    settings: Any,
    *,
    optimizer: Callable[[Any], optax.GradientTransformation],
) -> tuple[Model, optax.OptState]:
    """Each seed's model and a fresh optimizer state, for every setting."""

    def one(model: Model, setting: Any) -> tuple[Model, optax.OptState]:
        made = optimizer(setting)
        options.optimizer("what optimizer makes of a setting", made)
        return model, made.init(model)

    return _over_both(one, (0, None), (None, 0))(models, settings)


@partial(
    jax.jit,
    static_argnames=("optimizer", "objective", "transform"),
    donate_argnames="state",
)
def _train(
    state: tuple[Model, optax.OptState],
    settings: Any,
    x: Array,
    labels: Array,
    *,
    optimizer: Callable[[Any], optax.GradientTransformation],
    objective: Objective,
    transform: Transform,
) -> tuple[tuple[Model, optax.OptState], Float[Array, "seeds settings steps"]]:
    def one(
        state: tuple[Model, optax.OptState], setting: Any, x: Array, labels: Array
    ) -> tuple[tuple[Model, optax.OptState], Array]:
        model, opt_state = state
        loss, model, opt_state = one_step(
            model, opt_state, optimizer(setting), objective, (x, labels)
        )
        return (model, opt_state), loss

    every = _over_both(one, (0, None, 0, 0), (0, 0, None, None))

    def step(
        state: tuple[Model, optax.OptState], batch: tuple[Array, Array]
    ) -> tuple[tuple[Model, optax.OptState], Array]:
        x, labels = batch
        return every(state, settings, jax.vmap(transform)(x), labels)

    state, losses = lax.scan(step, state, (x, labels))
    return state, jnp.moveaxis(losses, 0, -1)


@partial(jax.jit, static_argnames="transform")
def _evaluate_all(
    models: Model, x: ArrayLike, labels: ArrayLike, transform: Transform
) -> tuple[Array, Array]:
    one = partial(evaluate, transform=transform)
    return _over_both(one, (0, None, None), (0, None, None))(models, x, labels)


def _over_both(one: Callable[..., Any], seeds: Any, rest: Any) -> Callable[..., Any]:
    """vmap over seeds outside, so that what its settings share is computed once."""
    return jax.vmap(jax.vmap(one, in_axes=rest), in_axes=seeds)
