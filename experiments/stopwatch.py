"""Where the seconds of a run go, from the start of its process on."""

import os
import resource
import sys
import time
from pathlib import Path

import jax

from jax_softmax._rows import WAITED

_COMPILATION = "/jax/core/compile/"  # JAX's events: tracing, lowering, XLA or its cache


class Stopwatch:
    """Names what has been done since the last name; what is compiled counts apart."""

    def __init__(self):
        self._laps = [("", process_began())]

    def lap(self, name: str) -> None:
        """All since the last lap was for this."""
        self._laps.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Of each name without its share of compilation; of that; and of all."""
        spans = _united(_compiled)
        result: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._laps, self._laps[1:], strict=False):
            compiling = sum(
                max(0.0, min(end, until) - max(begin, since)) for since, until in spans
            )
            result[name] = result.get(name, 0) + end - begin - compiling
            result["compilation"] = result.get("compilation", 0) + compiling
        return result | {"all": self._laps[-1][1] - self._laps[0][1]}


def process_began() -> float:
    """When, by time.perf_counter; where the system does not tell, this module began."""
    if not os.path.exists("/proc/self/stat"):
        return _IMPORTED
    after_the_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(after_the_name[19]) / os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    return time.perf_counter() - age


def waited_for_rows() -> float:
    """The seconds that training has had to wait for its rows, in this process."""
    return sum(_waited)


def peak_megabytes() -> float:
    """The most memory that this process has had at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _united(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without overlaps: JAX traces one function within another, and in threads."""
    united: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if united and begin <= united[-1][1]:
            united[-1] = united[-1][0], max(end, united[-1][1])
        else:
            united.append((begin, end))
    return united


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(_COMPILATION):
        now = time.perf_counter()
        _compiled.append((now - duration_secs, now))
    elif event == WAITED:
        _waited.append(duration_secs)


_IMPORTED = time.perf_counter()
_compiled: list[tuple[float, float]] = []
_waited: list[float] = []
jax.monitoring.register_event_duration_secs_listener(_note)
