"""The order of the rows in each epoch, drawn by the host, and its cut into blocks."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Int, Key

BLOCK_ROWS = 2**14  # a block of uint8 images fits a cache and hides the cost of a call


class Block(NamedTuple):
    """Consecutive steps of an epoch that run in one call.

    All blocks of full batches have as many rows, so that they share a compiled program:
    the short ones are filled up with rows that no step looks at.
    """

    epoch: int
    steps: int
    batch_size: int
    rows: Int[np.ndarray, " rows"]


def epoch_order(key: Key[Array, ""], epoch: int, rows: int) -> Int[np.ndarray, " rows"]:
    """A uniformly drawn permutation of the rows; the key and the epoch decide it.

    Fisher and Yates' shuffle by NumPy takes a thirtieth of the time of the sort that
    jax.random.permutation is, and whoever reads the rows can know it without a device.

    >>> print(epoch_order(jax.random.key(0), epoch=1, rows=5))
    [1 3 4 2 0]
    """
    seed = [*np.asarray(jax.random.key_data(key)).ravel().tolist(), epoch]
    return np.random.default_rng(seed).permutation(rows)


class Blocks(Sequence[Block]):
    """The blocks from that epoch and step on; multiples of cut_every end one.

    Any of them can be had at once, so that several can be read ahead.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        rows: int,
        batch_size: int,
        *,
        epochs: int,
        epoch: int = 1,
        step: int = 0,
        cut_every: int | None = None,
    ):
        self._batch_size, self._epoch = batch_size, epoch
        self._order = lru_cache(2)(lambda number: epoch_order(key, number, rows))
        full, self._rest = divmod(rows, batch_size)
        stretch = max(1, min(full, cut_every or full))
        parts = -(-stretch * batch_size // BLOCK_ROWS)
        self._longest = -(-stretch // parts)
        self._later = [*self._cuts(0, full, stretch)]
        self._first = [*self._cuts(step, full, stretch)]
        whole = max(0, epochs - epoch)
        self._count = (epoch <= epochs) * len(self._first) + whole * len(self._later)

    def _cuts(self, step: int, full: int, stretch: int) -> Iterator[tuple[int, int]]:
        """The first step of each block of an epoch, and how many; 0 is the rest."""
        while step < full:
            into = step % stretch
            longest = self._longest
            steps = min(longest - into % longest, stretch - into, full - step)
            yield step, steps
            step += steps
        if self._rest and step == full:
            yield step, 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        index = range(self._count)[index]
        epochs, cuts = 0, self._first
        if index >= len(cuts):
            epochs, index = divmod(index - len(cuts), len(self._later))
            epochs, cuts = epochs + 1, self._later
        step, steps = cuts[index]
        number, size = self._epoch + epochs, self._batch_size
        order = self._order(number)
        if not steps:
            return Block(number, 1, self._rest, order[-self._rest :])
        wanted = order[step * size : (step + steps) * size]
        unused = (self._longest - steps) * size
        return Block(number, steps, size, np.pad(wanted, (0, unused), mode="edge"))


class RowsOf(Sequence[Int[np.ndarray, " rows"]]):
    """Only the row numbers of the blocks."""

    def __init__(self, blocks: Blocks):
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._blocks[index].rows
