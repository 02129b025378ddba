"""Files written whole or not at all: until then, what was there stays."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import report


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside path, which it replaces at the end, whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        error.filename = os.fspath(path)  # which the system has not said, or otherwise
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write_text(text)


def save_json(path: Path, value: Any) -> None:
    save_text(path, report.to_json(value))


def save_figure(path: Path, figure: Any) -> None:
    """Of matplotlib's, as PNG."""
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
