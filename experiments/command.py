"""The edge of every experiment: flags in, one clear sentence and an exit code out."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro

from experiments.catalog import DataError

Settings = TypeVar("Settings")

BAD_INPUT = 2
FAILED = 1
SIGNALS = signal.SIGINT, signal.SIGTERM


class BadInput(Exception):
    """What the user gave cannot be used; the message names it and the remedy."""


class Failed(Exception):
    """The run could not be finished; the message says where and what was kept."""


class Interrupted(Exception):
    """The run was told to stop; the message says what was kept."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.code = 128 + signal_number


class Stop(Exception):
    """A signal to stop has come; the first argument is its number."""


@contextmanager
def stopping_at_leisure() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait until the yielded function is called, which raises Stop.

    A second signal does not wait.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            _interrupt(number, frame)
        came.append(number)

    def check() -> None:
        if came:
            raise Stop(came[0])

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(
    run: Callable[[Settings], None],
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    program: str,
) -> None:
    """Parse arguments into settings, run, and exit as a well-behaved program does."""
    parsed = parse(settings, arguments, program=program)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(parsed)
    except (BadInput, DataError) as error:
        _exit(BAD_INPUT, str(error))
    except Failed as error:
        _exit(FAILED, str(error))
    except Interrupted as error:
        _exit(error.code, str(error))
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        _exit(128 + number, "Interrupted.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(
            FAILED,
            "Stopped: nobody reads the output any more. What was written is kept; "
            "send the output to a file instead.",
        )


def parse(
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    program: str,
    default: Any = None,
) -> Settings:
    """Arguments as settings; those that are not given are as in the default."""
    name = f"python -m experiments.{program}"
    if default is None:
        return tyro.cli(settings, args=arguments, prog=name)
    return tyro.cli(settings, args=arguments, prog=name, default=default)


def make_folder(out: Path) -> None:
    """The folder for an experiment's files, made if need be.

    Raises:
        BadInput: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"The output folder {out} cannot be written ({error.strerror}): "
            "choose another --out."
        ) from None


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise KeyboardInterrupt(number)


def _exit(code: int, sentence: str) -> None:
    print(sentence, file=sys.stderr)
    sys.exit(code)
