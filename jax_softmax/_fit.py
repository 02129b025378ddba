"""Minibatch training: an epoch is one compiled scan on the device."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Key

from jax_softmax import _checks as checks
from jax_softmax._losses import cross_entropy
from jax_softmax._regression import SoftmaxRegression

Model = Any  # a pytree; logits(x) is all that evaluation asks of it
Objective = Callable[[Any, Array, Array], Float[Array, ""]]
Transform = Callable[[Array], Array]


class Epoch(NamedTuple):
    """What one pass over the data left behind.

    train_loss is the mean over the pass, each batch scored before its own update.
    The validation figures are exact means over all rows, None without validation data.
    """

    number: int
    model: Model
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None


class NonFiniteLoss(ArithmeticError):
    """A loss was not finite; model is the last one whose loss was."""

    def __init__(self, epoch: int, step: int, loss: float, model: Model):
        super().__init__(
            f"the loss became {loss} at step {step} of epoch {epoch}: "
            "lower the learning rate or look for non-finite features"
        )
        self.epoch, self.step, self.loss, self.model = epoch, step, loss, model


def fit(
    model: Model,
    x: ArrayLike,
    labels: Int[ArrayLike, " rows"],
    *,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    epochs: int = 10,
    batch_size: int = 256,
    objective: Objective = SoftmaxRegression.objective,
    transform: Transform = jnp.asarray,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
) -> Iterator[Epoch]:
    """Minimise the mean loss by minibatches, one Epoch at a time.

    Every epoch visits all rows once in a fresh uniformly drawn order, the short last
    batch included. The same key gives the same numbers, bit for bit, on one machine.

    Args:
        model: a SoftmaxRegression, or any pytree with a method logits(x).
        x: one row per example, of any type: kept as it is, for example as uint8.
        labels: class ids.
        optimizer: any of optax's.
        key: decides the order of the rows.
        epochs: how many passes to make.
        batch_size: rows per update.
        objective: (model, transformed rows, labels) -> scalar mean loss.
        transform: rows of x to features, inside the compiled step; for example
            lambda images: images.reshape(len(images), -1) / 255.
        validation: x and labels to evaluate on after every epoch.

    Yields:
        One Epoch per pass. Stop iterating to stop training.

    Raises:
        ValueError: no rows, not as many labels as rows, batch_size < 1 or epochs < 0.
        NonFiniteLoss: names the step; it carries the last model with a finite loss.

    >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0]])
    >>> labels = jnp.array([0, 0, 1, 1])
    >>> model = SoftmaxRegression.init(jax.random.key(0), features=1, classes=2)
    >>> for epoch in fit(model, x, labels, optimizer=optax.sgd(1.0), batch_size=3,
    ...                  key=jax.random.key(1), epochs=50, validation=(x, labels)):
    ...     pass
    >>> epoch.number, epoch.validation_accuracy
    (50, 1.0)
    """
    x, labels = _examples("x", "labels", x, labels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    if validation is not None:
        validation = _examples("validation x", "validation labels", *validation)

    def run() -> Iterator[Epoch]:
        state = _State(
            *jax.tree.map(jnp.copy, (model, optimizer.init(model), model)),
            failed_step=jnp.int32(-1),
        )
        for number in range(1, epochs + 1):
            state, losses, train_loss = _epoch(
                state,
                x,
                labels,
                jax.random.fold_in(key, number),
                optimizer=optimizer,
                objective=objective,
                transform=transform,
                batch_size=batch_size,
            )
            if (failed := int(state.failed_step)) >= 0:
                raise NonFiniteLoss(
                    number, failed + 1, float(losses[failed]), state.last_good
                )
            loss = accuracy = None
            if validation is not None:
                loss, accuracy = map(
                    float, evaluate(state.model, *validation, transform=transform)
                )
            kept = jax.tree.map(jnp.copy, state.model)
            yield Epoch(number, kept, float(train_loss), loss, accuracy)

    return run()


@partial(jax.jit, static_argnames="transform")
def evaluate(
    model: Model,
    x: ArrayLike,
    labels: Int[ArrayLike, " rows"],
    *,
    transform: Transform = jnp.asarray,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy and accuracy over all rows at once."""
    logits = model.logits(transform(jnp.asarray(x)))
    accuracy = (logits.argmax(-1) == labels).mean()
    return cross_entropy(logits, labels).mean(), accuracy


class _State(NamedTuple):
    model: Model
    opt_state: optax.OptState
    last_good: Model
    failed_step: Int[Array, ""]


@partial(
    jax.jit,
    static_argnames=("optimizer", "objective", "transform", "batch_size"),
    donate_argnames="state",
)
def _epoch(
    state: _State,
    x: Array,
    labels: Array,
    key: Array,
    *,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    transform: Transform,
    batch_size: int,
) -> tuple[_State, Float[Array, " steps"], Float[Array, ""]]:
    def step(state: _State, batch: tuple[Array, Array]) -> tuple[_State, Array]:
        index, rows = batch
        loss, gradient = jax.value_and_grad(objective)(
            state.model, transform(x[rows]), labels[rows]
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.model)
        stepped = _State(
            optax.apply_updates(state.model, updates),
            opt_state,
            state.model,
            state.failed_step,
        )
        good = jnp.isfinite(loss) & (state.failed_step < 0)
        first_failure = ~good & (state.failed_step < 0)
        stopped = state._replace(
            failed_step=jnp.where(first_failure, index, state.failed_step)
        )
        return jax.tree.map(partial(jnp.where, good), stepped, stopped), loss

    order = jax.random.permutation(key, len(labels))
    steps, rest = divmod(len(labels), batch_size)
    batches = order[: len(order) - rest].reshape(steps, batch_size)
    state, losses = lax.scan(step, state, (jnp.arange(steps), batches))
    total = losses.sum() * batch_size
    if rest:
        state, last = step(state, (jnp.int32(steps), order[-rest:]))
        losses, total = jnp.append(losses, last), total + last * rest
    return state, losses, total / len(labels)


def _examples(
    x_name: str, labels_name: str, x: ArrayLike, labels: ArrayLike
) -> tuple[Array, Array]:
    x = jnp.asarray(x)
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"{x_name} must have at least one row, got shape {x.shape}")
    return x, checks.class_ids(labels_name, labels, x.shape[:1])
