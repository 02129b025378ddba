"""Times as medians of interleaved runs, and memory from the compiler."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of one contender: to compile, and of each interleaved run."""

    compile_seconds: float
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Contender(NamedTuple):
    """Something ready to be timed: calling it does the work and waits for it."""

    run: Callable[[], Any]
    compile_seconds: float = 0.0
    temp_bytes: int | None = None


def with_bytecode(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps its bytecode there and finds it."""
    kept = {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
    return os.environ | kept


def compiled(function: Callable[..., Any], *args: Any) -> Contender:
    """A JAX function, compiled for these arguments."""
    lowered = jax.jit(function).lower(*args)
    started = time.perf_counter()
    executable = lowered.compile()
    took = time.perf_counter() - started
    memory = executable.memory_analysis()
    return Contender(
        lambda: jax.block_until_ready(executable(*args)),
        took,
        None if memory is None else memory.temp_size_in_bytes,
    )


def interleave(
    contenders: Mapping[str, Contender],
    *,
    seconds: float = 3.0,
    least_rounds: int = 5,
    most_rounds: int = 200,
    warm_ups: int = 2,
) -> dict[str, Timing]:
    """Run the contenders in turn, so that a noisy moment hits all of them alike.

    Some rounds warm up; then rounds go on until `seconds` have passed.
    """
    for contender in warm_ups * list(contenders.values()):
        contender.run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    ends = time.perf_counter() + seconds
    while (done := len(next(iter(times.values())))) < most_rounds:
        if done >= least_rounds and time.perf_counter() > ends:
            break
        order: Sequence[str] = list(contenders)
        for name in order if done % 2 else reversed(order):
            started = time.perf_counter()
            contenders[name].run()
            times[name].append(time.perf_counter() - started)
    return {
        name: Timing(contenders[name].compile_seconds, times[name]) for name in times
    }


def ratio(ours: Timing, theirs: Timing) -> float:
    """The median of the ratios within each round: what is noise for both cancels."""
    pairs = zip(ours.seconds, theirs.seconds, strict=True)
    return statistics.median(mine / other for mine, other in pairs)
