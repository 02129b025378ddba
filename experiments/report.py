"""What experiments print: lines, progress, tables; and the stamp on what they save."""

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

T = TypeVar("T")

PACKAGES = ("jax", "jaxlib", "optax", "numpy")
PEERS = ("scipy", "scikit-learn", "torch", "tokamax")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """To command.main, which has a word for it: rich ends the process without."""
        raise


CONSOLE = _Console(highlight=False, soft_wrap=True, markup=False)


def say(*lines: str, sep: str = " ") -> None:
    """Print, above the progress bar if there is one."""
    CONSOLE.print(*lines, sep=sep)


def progress(items: Iterable[T], *, total: int) -> Iterator[T]:
    """The items, with a progress bar when the output is a terminal."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=CONSOLE,
        transient=True,
        disable=not CONSOLE.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)
        for item in items:
            yield item
            bar.advance(task)


def environment() -> dict[str, Any]:
    """The command, the versions and the machine that a figure depends on."""
    device = jax.devices()[0]
    program = Path(sys.argv[0]).stem
    return {
        "command": shlex.join(
            ["python", "-m", f"experiments.{program}", *sys.argv[1:]]
        ),
        "date": f"{date.today()}",
        "python": platform.python_version(),
        **versions(),
        "device": f"{device.platform}: {device.device_kind}",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


@cache
def versions() -> dict[str, str]:
    """Of packages that a figure or the bits of a run depend on, and of peers here."""
    found = {name: metadata.version(name) for name in PACKAGES}
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 99
) -> str:
    """A table in Markdown that lines up in a terminal too, numbers to the right."""
    columns = zip(header, *rows, strict=True)
    widths = [max(2, *map(len, column)) for column in columns]
    words, numbers = widths[:numbers_from], widths[numbers_from:]
    rule = ["-" * width for width in words] + [f"{'-' * (w - 1)}:" for w in numbers]

    def line(cells: Sequence[str]) -> str:
        padded = [
            *map(str.ljust, cells[:numbers_from], words),
            *map(str.rjust, cells[numbers_from:], numbers),
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, (header, rule, *rows)))


def to_json(value: Any) -> str:
    """Indented JSON; paths, infinities and NaN become text, arrays become lists."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
        case float() if not math.isfinite(value):
            return str(value)
        case None | str() | int() | float():
            return value
    return _plain(np.asarray(value).tolist())
