"""Minibatch training: blocks of steps, each one compiled loop on the device."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Integer, Key

from jax_softmax import _checks as checks
from jax_softmax._losses import cross_entropy
from jax_softmax._regression import SoftmaxRegression
from jax_softmax._shuffle import Block, Blocks, RowsOf

Model = Any  # a pytree; logits(x) is all that evaluation asks of it
Objective = Callable[[Any, Array, Array], Float[Array, ""]]
Transform = Callable[[Array], Array]

EVALUATION_ROWS = 1024  # whose features stay in a cache


@runtime_checkable
class Rows(Protocol):
    """Examples that need not be in memory: fit says which rows it wants, in order.

    >>> class Squares:
    ...     def __len__(self):
    ...         return 100
    ...     def read(self, wanted):
    ...         for rows in wanted:
    ...             yield rows[:, None] ** 2.0, rows % 2
    >>> isinstance(Squares(), Rows)
    True
    """

    def __len__(self) -> int: ...

    def read(
        self, wanted: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each array of row numbers, those rows of x and their labels.

        They are copied before the next ones are asked for, unless they are read-only:
        those are the device's as they are, without a copy if from a multiple of 64.
        """
        ...


class Progress(NamedTuple):
    """All that training needs to go on, to the same bits as if it had never stopped.

    epoch counts from 1; losses are those of the steps that it has done so far.
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

    Args:
        model: a SoftmaxRegression, or any pytree with a method logits(x).
        x: one row per example, of any type: kept as it is, for example as uint8, and
            copied unless it is read-only. Or Rows, which bring their own labels from
            wherever they are.
        labels: class ids.
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
        watch_every: multiples of so many steps are among those moments.

    Yields:
        One Epoch per pass. Stop iterating to stop training.

    Raises:
        ValueError: no rows, not as many labels as rows, batch_size < 1, epochs < 0 or
            watch_every < 1, several keys, or progress with more steps than an epoch.
        TypeError: optimizer is none of optax's, key no key, progress no Progress, a
            count no integer, or labels are there twice or not at all.
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
    source = x if isinstance(x, Rows) else _InMemory(x, labels)
    if labels is not None and source is x:
        raise TypeError("labels must not be given where x is Rows, which bring theirs")
    if len(source) == 0:
        raise ValueError("x must have at least one row, got none")
    checks.one_key("key", key)
    if not hasattr(optimizer, "update"):
        raise TypeError(
            "optimizer must be one of optax's, such as optax.sgd(0.1), "
            f"got {optimizer!r}"
        )
    batch_size = checks.at_least(1, "batch_size", batch_size)
    epochs = checks.at_least(0, "epochs", epochs)
    if watch_every is not None:
        watch_every = checks.at_least(1, "watch_every", watch_every)
    if validation is not None:
        validation = validated(validation)
    steps = -(-len(source) // batch_size)
    begin = _begin(model, optimizer, progress, steps)

    def run() -> Iterator[Epoch]:
        now, losses = begin, begin.losses
        plan = Blocks(
            key,
            len(source),
            batch_size,
            epochs=epochs,
            epoch=now.epoch,
            step=len(losses),
            cut_every=watch_every,
        )
        reading = _read(source, plan)
        state = _copied(_State(now.model, now.opt_state, now.last_good))
        ahead = next(reading, None)
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
            ahead = next(reading, None)  # the host reads on while the device works
            if block.epoch > now.epoch:
                losses = losses[:0]
            losses = np.append(losses, np.asarray(block_losses)[: block.steps])
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
            yield Epoch(block.epoch, trained, train_loss, loss, accuracy, now)

    return run()


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
    return progress


def evaluate(
    model: Model,
    x: ArrayLike,
    labels: Integer[ArrayLike, " rows"],
    *,
    transform: Transform = jnp.asarray,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy and accuracy over all rows; both NaN if a loss is NaN.

    Raises:
        ValueError: no rows, or not as many labels as rows.
        TypeError: x or labels are no numbers.
    """
    x, labels = _examples("x", "labels", x, labels)
    return _evaluate(model, x, labels, transform)


@partial(jax.jit, static_argnames="transform")
def _evaluate(
    model: Model, x: Array, labels: Array, transform: Transform
) -> tuple[Array, Array]:
    logits = _logits(model, x, transform)
    loss = cross_entropy(logits, labels).mean()
    accuracy = (logits.argmax(-1) == labels).mean()
    return loss, jnp.where(jnp.isnan(loss), jnp.nan, accuracy)


def _logits(model: Model, x: Array, transform: Transform) -> Array:
    """Tile by tile, so that the features stay in a cache; the last tile may overlap."""
    rows = min(len(x), EVALUATION_ROWS)

    def of_tile(begin: Array | int) -> Array:
        return model.logits(transform(lax.dynamic_slice_in_dim(x, begin, rows)))

    def with_tile(i: Array, logits: Array) -> Array:
        begin = jnp.minimum(i * rows, len(x) - rows)
        return lax.dynamic_update_slice_in_dim(logits, of_tile(begin), begin, axis=0)

    tile = jax.eval_shape(of_tile, 0)
    nothing = jnp.zeros((len(x), *tile.shape[1:]), tile.dtype)
    return lax.fori_loop(0, -(-len(x) // rows), with_tile, nothing)


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
        return objective(model, *batch)

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


def _read(source: Rows, plan: Blocks) -> Iterator[tuple[Block, Any, Any]]:
    """Each block with its rows and labels; those of a user's Rows are checked."""
    reading = iter(source.read(RowsOf(plan)))
    for number, block in enumerate(plan):
        found = next(reading, None)
        if found is None:
            raise ValueError(
                f"x.read must yield rows {len(plan)} times here, it ended after "
                f"{number}"
            )
        if not isinstance(source, _InMemory):
            found = _as_asked_for(block, *found)
        yield block, found[0], found[1]
        del found  # or one block more is in memory while the next is read


def _as_asked_for(block: Block, rows: Any, labels: Any) -> tuple[Any, Any]:
    rows = _owned("the rows that x.read yields", rows)
    if np.shape(rows)[:1] != block.rows.shape:
        raise ValueError(
            f"x.read must yield the {len(block.rows)} rows that it is asked for, got "
            f"shape {np.shape(rows)}"
        )
    name = "the labels that x.read yields"
    labels = checks.class_ids(name, _owned(name, labels), block.rows.shape)
    return rows, np.asarray(labels)


class _InMemory:
    """Arrays as Rows.

    Where the device is the host, NumPy gathers rows in a fifth of the time of XLA.
    """

    def __init__(self, x: ArrayLike, labels: ArrayLike | None):
        if labels is None:
            raise TypeError("labels must be given where x is an array")
        self.x, self.labels = _examples(
            "x", "labels", _on_device("x", x), _on_device("labels", labels)
        )
        if all(device.platform == "cpu" for device in self.x.devices()):
            self.x, self.labels = np.asarray(self.x), np.asarray(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, wanted: Iterable[np.ndarray]) -> Iterator[tuple[Any, Any]]:
        for rows in wanted:
            x = self.x[rows] if isinstance(self.x, Array) else gathered(self.x, rows)
            yield x, self.labels[rows]


def gathered(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """x[rows], which XLA takes for its own without a copy."""
    out = aligned((*rows.shape, *x.shape[1:]), x.dtype)
    flat = x.reshape(len(x), -1)
    flat.take(rows, axis=0, out=out.reshape(*rows.shape, -1), mode="clip")
    return out


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA takes for its own without a copy: from a multiple of 64.

    >>> aligned((3, 5), np.dtype(np.uint8)).ctypes.data % 64
    0
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _mean(losses: np.ndarray, batch_size: int, rows: int) -> float:
    """The mean over rows of losses that are means over batches."""
    sizes = np.full(len(losses), float(batch_size))
    sizes[-1] = rows - batch_size * (len(losses) - 1)
    return float(losses.astype(np.float64) @ sizes / rows)


def _on_device(name: str, values: ArrayLike) -> ArrayLike:
    """NumPy's numbers, for which jnp.asarray compiles a program of each shape."""
    values = _owned(name, values)
    if not isinstance(values, np.ndarray):
        return values
    return jax.device_put(checks.not_wrapped(values))


def _owned(name: str, values: ArrayLike) -> ArrayLike:
    """NumPy's numbers where nobody else changes them: read-only, or copied.

    For device_put and jax.jit may take what lies in the host's memory for their own.
    """
    values = checks.plain(name, values)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        return checks.array_of(name, values)
    if not values.flags.writeable:
        return values
    copy = aligned(values.shape, values.dtype)
    copy[...] = values
    return copy


def validated(validation: tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
    """What to evaluate on, checked, and copied to the device."""
    if len(validation) != 2:
        raise ValueError(
            f"validation must be a pair, x and labels, got {len(validation)} of them"
        )
    names = "validation x", "validation labels"
    return _examples(*names, *map(_on_device, names, validation))


def _examples(
    x_name: str, labels_name: str, x: ArrayLike, labels: ArrayLike
) -> tuple[Array, Array]:
    x = checks.array_of(x_name, x)
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"{x_name} must have at least one row, got shape {x.shape}")
    return x, checks.class_ids(labels_name, labels, x.shape[:1])
