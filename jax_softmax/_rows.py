"""Rows and their labels: in memory, or read as they are wanted; checked, and owned."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax import Array, monitoring
from jax.typing import ArrayLike
from jaxtyping import Integer

from jax_softmax import _checks as checks
from jax_softmax._shuffle import Block, Blocks, RowsOf

WAITED = "/jax_softmax/fit/waited_for_rows"


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
        those are handed to the device as they are, and if their address is a multiple
        of 64 a CPU does not copy them either.
        """
        ...


class InMemory:
    """Arrays as Rows.

    Where the device is the host, NumPy gathers rows in a fifth of the time of XLA.
    """

    def __init__(self, x: ArrayLike, labels: ArrayLike | None):
        if labels is None:
            raise TypeError("labels must be given where x is an array")
        self.x, self.labels = on_device("x", x, "labels", labels)
        if all(device.platform == "cpu" for device in self.x.devices()):
            self.x, self.labels = np.asarray(self.x), np.asarray(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, wanted: Iterable[np.ndarray]) -> Iterator[tuple[Any, Any]]:
        for rows in wanted:
            x = self.x[rows] if isinstance(self.x, Array) else gathered(self.x, rows)
            yield x, self.labels[rows]


class Filled(NamedTuple):
    """A block with its rows of x and their labels."""

    block: Block
    x: Any
    labels: Any


class Reading:
    """The blocks of a plan, each filled while the device works on the one before it."""

    def __init__(self, source: Rows, plan: Blocks):
        self._blocks = _filled(source, plan)
        self._beside = ThreadPoolExecutor(1)

    def next_during(self, work: Any) -> Filled | None:
        """The next block, None after the last; work is what the device is to finish.

        The seconds by which the block came later go to jax.monitoring, as WAITED.
        """
        finished = self._beside.submit(_time_of, work)
        block = next(self._blocks, None)
        came = time.perf_counter()
        waited = max(0.0, came - finished.result())
        monitoring.record_event_duration_secs(WAITED, waited)
        return block


def _time_of(work: Any) -> float:
    jax.block_until_ready(work)
    return time.perf_counter()


def _filled(source: Rows, plan: Blocks) -> Iterator[Filled]:
    """What a user's Rows yield is checked."""
    read: Any = source.read(RowsOf(plan))
    ended: Any = object()
    if not isinstance(read, Iterable):
        raise TypeError(
            "x.read must yield rows and their labels, as a generator does, got "
            f"{type(read).__name__}"
        )
    reading = iter(read)
    for number, block in enumerate(plan):
        found = next(reading, ended)
        if found is ended:
            raise ValueError(
                f"x.read must yield rows {len(plan)} times here, it ended after "
                f"{number}"
            )
        if not isinstance(source, InMemory):
            found = _as_asked_for(block, found)
        yield Filled(block, *found)
        del found  # or one block more is in memory while the next is read


def _as_asked_for(block: Block, found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(
            "x.read must yield pairs, rows and their labels, got "
            f"{type(found).__name__}"
        )
    rows = owned("the rows that x.read yields", found[0])
    checks.held("the rows that x.read yields", rows)
    if np.shape(rows)[:1] != block.rows.shape:
        raise ValueError(
            f"x.read must yield the {len(block.rows)} rows that it is asked for, got "
            f"shape {np.shape(rows)}"
        )
    name = "the labels that x.read yields"
    labels = _put(name, checks.not_wrapped(found[1]))
    labels = checks.class_ids(name, labels, block.rows.shape)
    return rows, np.asarray(labels)


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


def on_device(
    x_name: str, x: ArrayLike, labels_name: str, labels: ArrayLike
) -> tuple[Array, Array]:
    """Rows and their labels, checked, and copied to the device."""
    x, labels = _put(x_name, x), _put(labels_name, checks.not_wrapped(labels))
    return checks.examples(x_name, x, labels_name, labels)


def validated(
    validation: tuple[ArrayLike, Integer[ArrayLike, " rows"]],
) -> tuple[Array, Array]:
    """What to evaluate on, checked, and copied to the device."""
    if not isinstance(validation, tuple | list):
        raise TypeError(
            f"validation must be a pair, x and labels, got {type(validation).__name__}"
        )
    if len(validation) != 2:
        raise ValueError(
            f"validation must be a pair, x and labels, got {len(validation)} of them"
        )
    x, labels = validation
    return on_device("validation x", x, "validation labels", labels)


def _put(name: str, values: ArrayLike) -> ArrayLike:
    """NumPy's numbers, for which jnp.asarray compiles a program of each shape."""
    values = owned(name, values)
    if not isinstance(values, np.ndarray):
        return values
    checks.held(name, values)
    return jax.device_put(values)


def owned(name: str, values: ArrayLike) -> ArrayLike:
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
