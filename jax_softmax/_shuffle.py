"""The order of the rows in each epoch, drawn by the host, and its cut into blocks."""

from collections.abc import Iterator
from typing import NamedTuple

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


def blocks(
    key: Key[Array, ""],
    rows: int,
    batch_size: int,
    *,
    epochs: int,
    epoch: int = 1,
    step: int = 0,
    cut_every: int | None = None,
) -> Iterator[Block]:
    """The blocks from that epoch and step on; multiples of cut_every end one."""
    full, rest = divmod(rows, batch_size)
    stretch = max(1, min(full, cut_every or full))
    parts = -(-stretch * batch_size // BLOCK_ROWS)
    longest = -(-stretch // parts)
    for number in range(epoch, epochs + 1):
        order = epoch_order(key, number, rows)
        while step < full:
            into = step % stretch
            steps = min(longest - into % longest, stretch - into, full - step)
            wanted = order[step * batch_size : (step + steps) * batch_size]
            unused = (longest - steps) * batch_size
            yield Block(
                number, steps, batch_size, np.pad(wanted, (0, unused), mode="edge")
            )
            step += steps
        if rest and step == full:
            yield Block(number, 1, rest, order[-rest:])
        step = 0
