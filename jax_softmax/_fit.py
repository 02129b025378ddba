"""Minibatch training: blocks of steps, each one compiled loop on the device."""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Integer, Key

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._evaluation import Model, Transform, check_validation, evaluate
from jax_softmax._regression import SoftmaxRegression
from jax_softmax._rows import InMemory, Reading, Rows, validated
from jax_softmax._shuffle import Blocks

Objective = Callable[[Any, Array, Array], Float[Array, ""]]


class Progress(NamedTuple):
    """All that training needs to go on, to the same bits as if it had never stopped.

    epoch counts from 1; losses are those of the steps that it has done so far. Once it
    is finished, the next one has done none.
    """

    model: Model
    opt_state: optax.OptState
    last_good: Model
    epoch: int
    losses: Float[np.ndarray, " steps"]

    @classmethod
    def start(cls, model: Model, optimizer: optax.GradientTransformation) -> "Progress":
        """Before the first step."""
        no_losses = np.zeros(0, np.float32)
        return cls(model, optimizer.init(model), model, 1, no_losses)


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
    progress: Progress


class NonFiniteLoss(ArithmeticError):
    """A loss was not finite; model is the last one whose loss was."""

    def __init__(self, epoch: int, step: int, loss: float, model: Model):
        super().__init__(
            f"the loss became {loss} at step {step} of epoch {epoch}: "
            "lower the learning rate, or look for non-finite features and for labels "
            "that are no class"
        )
        self.epoch, self.step, self.loss, self.model = epoch, step, loss, model

    def __reduce__(self):
        return NonFiniteLoss, (self.epoch, self.step, self.loss, self.model)


def fit(
    model: Model,
    x: ArrayLike | Rows,
    labels: Integer[ArrayLike, " rows"] | None = None,
    *,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    epochs: int = 10,
    batch_size: int = 256,
    objective: Objective = SoftmaxRegression.objective,
    transform: Transform = jnp.asarray,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    progress: Progress | None = None,
    watch: Callable[[Progress], None] | None = None,
    watch_every: int | None = None,
) -> Iterator[Epoch]:
    """Minimise the mean loss by minibatches, one Epoch at a time.

    Every epoch visits all rows once in a fresh uniformly drawn order, the short last
    batch included. The same key gives the same numbers, bit for bit, on one machine.

    It runs on the host and is no function to jit. Make optimizer, objective and
    transform once: each new one is compiled anew, and what it closes over stays in
    memory. optax.lookahead, whose parameters are pairs, is not for this.

    The seconds that the device waited for each block of rows go to the listeners of
    jax.monitoring, as the event /jax_softmax/fit/waited_for_rows.

    Args:
        model: a SoftmaxRegression, or any pytree of floating-point arrays with a method
            logits(x).
        x: one row per example, of any type: kept as it is, for example as uint8, and
            copied unless it is read-only. Or Rows, which bring their own labels from
            wherever they are.
        labels: class ids; objective gets them as int32.
        optimizer: any of optax's that goes by gradients, also one that searches along
            a line of the batch's objective or minds its loss.
        key: decides the order of the rows.
        epochs: how many passes to make.
        batch_size: rows per update.
        objective: (model, transformed rows, labels) -> scalar mean loss.
        transform: rows of x to features, inside the compiled step; for example
            lambda images: images.reshape(len(images), -1) / 255. Where the model lies
            on a mesh, a sharding constraint in here spreads the rows of a batch.
        validation: x and labels to evaluate on after every epoch.
        progress: where to go on from: an earlier Epoch's, or one that watch was given.
            The rest of the arguments must be as they were, but for epochs.
        watch: called with the Progress now and then within an epoch, to save it or, by
            raising, to stop.
        watch_every: watch is also called after every so many steps of an epoch.

    Yields:
        One Epoch per pass. Stop iterating to stop training.

    Raises:
        ValueError: no rows, not as many labels as rows, batch_size < 1, epochs < 0 or
            watch_every < 1, several keys, progress with more steps than an epoch, or
            validation does not fit the model.
        TypeError: model has no logits(x) or other than floating-point arrays, optimizer
            is none of optax's, key no key, progress no Progress, a count no integer, or
            labels are there twice or not at all.
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
    options.on_the_host("fit", x, labels, key, *jax.tree.leaves(model))
    source = x if isinstance(x, Rows) else InMemory(x, labels)
    if labels is not None and source is x:
        raise TypeError("labels must not be given where x is Rows, which bring theirs")
    if len(source) == 0:
        raise ValueError("x must have at least one row, got none")
    options.one_key("key", key)
    check_model(model, objective, validation)
    options.functions(objective=objective, transform=transform)
    options.optimizer("optimizer", optimizer)
    options.static(objective=objective, transform=transform, optimizer=optimizer)
    if watch is not None:
        options.functions(watch=watch)
    batch_size = options.at_least(1, "batch_size", batch_size)
    epochs = options.at_least(0, "epochs", epochs)
    if watch_every is not None:
        watch_every = options.at_least(1, "watch_every", watch_every)
    if validation is not None:
        validation = validated(validation)
        check_validation(model, *validation, transform)
    steps = -(-len(source) // batch_size)
    begin = _begin(model, optimizer, progress, steps)

    def run(state: _State) -> Iterator[Epoch]:
        now = begin
        plan = Blocks(
            key,
            len(source),
            batch_size,
            epochs=epochs,
            epoch=now.epoch,
            step=len(now.losses),
            cut_every=watch_every,
        )
        reading = Reading(source, plan)
        ahead = reading.next_during(())
        while ahead is not None:
            block, rows, ids = ahead
            state, block_losses = _train(
                state,
                rows.reshape(-1, block.batch_size, *rows.shape[1:]),
                ids.reshape(-1, block.batch_size),
                block.steps,
                optimizer=optimizer,
                objective=objective,
                transform=transform,
            )
            ahead = reading.next_during(block_losses)
            losses = np.append(now.losses, np.asarray(block_losses)[: block.steps])
            if not np.isfinite(losses).all():
                step = int(np.argmin(np.isfinite(losses)))
                raise NonFiniteLoss(
                    block.epoch, step + 1, float(losses[step]), state.last_good
                )
            trained, opt_state, last_good = _copied(state)
            now = Progress(trained, opt_state, last_good, block.epoch, losses)
            if len(losses) < steps:
                if watch is not None:
                    watch(now)
                continue
            loss = accuracy = None
            if validation is not None:
                loss, accuracy = map(
                    float, evaluate(trained, *validation, transform=transform)
                )
            train_loss = _mean(losses, batch_size, len(source))
            now = now._replace(epoch=block.epoch + 1, losses=losses[:0])
            yield Epoch(block.epoch, trained, train_loss, loss, accuracy, now)

    # Copied now: until the first epoch is asked for, the caller may reuse the memory.
    return run(_copied(_State(begin.model, begin.opt_state, begin.last_good)))


def check_model(model: Model, objective: Objective, validation: Any) -> None:
    """Its arrays can be trained, and there are logits for whoever asks for them."""
    options.trainable(model)
    if objective is SoftmaxRegression.objective or validation is not None:
        options.has_logits(model)


def _begin(
    model: Model,
    optimizer: optax.GradientTransformation,
    progress: Progress | None,
    steps: int,
) -> Progress:
    if progress is None:
        return Progress.start(jax.tree.map(jnp.asarray, model), optimizer)
    if not isinstance(progress, Progress):
        raise TypeError(
            "progress must be a Progress, such as that of an Epoch, "
            f"got {type(progress).__name__}"
        )
    if len(progress.losses) > steps:
        raise ValueError(
            f"progress has done {len(progress.losses)} steps of an epoch that has "
            f"{steps}: it belongs to another batch_size or to other rows"
        )
    if len(progress.losses) == steps:  # as an epoch's own once was
        return progress._replace(epoch=progress.epoch + 1, losses=progress.losses[:0])
    return progress


class _State(NamedTuple):
    model: Model
    opt_state: optax.OptState
    last_good: Model


@partial(
    jax.jit,
    static_argnames=("optimizer", "objective", "transform"),
    donate_argnames="state",
)
def _train(
    state: _State,
    x: Array,
    labels: Array,
    steps: Int[ArrayLike, ""],
    *,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    transform: Transform,
) -> tuple[_State, Float[Array, " steps"]]:
    """The first steps of a block, up to the first loss that is not finite."""

    def step(carry: tuple[Array, Array, _State]) -> tuple[Array, Array, _State]:
        i, losses, (model, opt_state, last_good) = carry
        batch = transform(x[i]), labels[i]
        loss, updated, opt_state = one_step(
            model, opt_state, optimizer, objective, batch
        )
        keep = partial(jnp.where, jnp.isfinite(loss))
        last_good = jax.tree.map(keep, model, last_good)
        stepped = _State(updated, opt_state, last_good)
        return i + 1, losses.at[i].set(loss.astype(losses.dtype)), stepped

    def unfinished(carry: tuple[Array, Array, _State]) -> Array:
        i, losses, _ = carry
        return (i < steps) & jnp.isfinite(losses[i - 1])

    nothing = jnp.zeros(len(labels))
    _, losses, state = lax.while_loop(unfinished, step, (jnp.int32(0), nothing, state))
    return state, losses


def one_step(
    model: Model,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    batch: tuple[Array, Array],
) -> tuple[Float[Array, ""], Model, optax.OptState]:
    """The batch's loss, and the model and the optimizer's state after its update.

    An optimizer has all that optax's ask for: those that search along a line evaluate
    the batch's objective, others wait for its loss to stop falling.
    """

    def objective_of(model: Model) -> Array:
        return checks.scalar("what objective returns", objective(model, *batch))

    loss, gradient = jax.value_and_grad(objective_of)(model)
    update = optax.with_extra_args_support(optimizer).update
    offered = {"value": loss, "grad": gradient, "value_fn": objective_of}
    known = signature(update).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        offered = {name: offered[name] for name in known if name in offered}
    updates, opt_state = update(gradient, opt_state, model, **offered)
    return loss, optax.apply_updates(model, updates), opt_state


@jax.jit
def _copied(state: _State) -> _State:
    """What stays when the device reuses the memory of the state."""
    return jax.tree.map(jnp.copy, state)


def _mean(losses: np.ndarray, batch_size: int, rows: int) -> float:
    """The mean over rows of losses that are means over batches."""
    sizes = np.full(len(losses), float(batch_size))
    sizes[-1] = rows - batch_size * (len(losses) - 1)
    return float(losses.astype(np.float64) @ sizes / rows)
