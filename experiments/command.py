"""The edge of every experiment: flags in, one clear sentence and an exit code out."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import tyro
from jax.errors import JaxRuntimeError

from experiments.catalog import DataError

Settings = TypeVar("Settings")

BAD_INPUT = 2
FAILED = 1
LARGEST = float(np.finfo(np.float32).max)
SIGNALS = signal.SIGINT, signal.SIGTERM

atexit.register(gc.freeze)  # to look for garbage in all of JAX once more takes a second


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
    try:
        parsed = parse(settings, arguments, program=program)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        run(parsed)
        _leave_when_told()
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
    except OSError as error:
        file = error.filename or "a file"
        _exit(
            FAILED,
            f"Stopped: {file} cannot be used ({error.strerror or error}). Look at the "
            "room on its disk and at its permissions, then start again.",
        )
    except (MemoryError, JaxRuntimeError) as error:
        if (
            isinstance(error, JaxRuntimeError)
            and "RESOURCE_EXHAUSTED" not in f"{error}"
        ):
            raise
        reason = str(error).splitlines()[0] if str(error) else "none is left"
        _exit(FAILED, f"Stopped for want of memory ({reason}): give smaller sizes.")


def parse(
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    program: str,
    default: Any = None,
) -> Settings:
    """Arguments as settings; those that are not given are as in the default.

    Raises:
        BadInput: one of them is empty, which would stand for the current folder.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if argument and not (argument.startswith("--") and argument.endswith("=")):
            continue
        named = argument[:-1] or (before if before.startswith("--") else "An argument")
        raise BadInput(f"{named} is empty: give it a value, or leave it out.")
    name = f"python -m experiments.{program}"
    if default is None:
        return tyro.cli(settings, args=arguments, prog=name)
    return tyro.cli(settings, args=arguments, prog=name, default=default)


def parse_again(
    folder: Path,
    begun: Settings,
    decisive: Iterable[str],
    arguments: Sequence[str],
    *,
    program: str,
) -> Settings:
    """Arguments as settings; those that are not given are as the run has begun with.

    Raises:
        BadInput: one of them contradicts a setting that the numbers depend on.
    """
    asked = parse(type(begun), arguments, program=program, default=begun)
    for name in decisive:
        before, now = getattr(begun, name), getattr(asked, name)
        if now != before:
            raise BadInput(
                f"The run in {folder} has {flag(name)} {before}, not {now}: leave the "
                "flag out, or start another run with --out."
            )
    return asked


def quickened(settings: Settings, **values: Any) -> Settings:
    """The settings; with --quick, those of a quick check in the place of defaults.

    Raises:
        BadInput: one of them was given, and otherwise.
    """
    if not cast(Any, settings).quick:
        return settings
    for name, value in values.items():
        given = getattr(settings, name)
        if given not in (value, getattr(type(settings), name)):
            raise BadInput(
                f"--quick has {flag(name)} of its own: leave {flag(name)} out, or "
                "--quick."
            )
    return replace(cast(Any, settings), **values)


def at_least(least: int, settings: Any, *names: str) -> None:
    """Each of these settings is such a number.

    Raises:
        BadInput: one is lower.
    """
    for name in names:
        if (value := getattr(settings, name)) < least:
            raise BadInput(f"{flag(name)} must be at least {least}, got {value}.")


def above_zero(settings: Any, *names: str) -> None:
    """Each of these settings is a finite float32 number above 0.

    Raises:
        BadInput: one is not.
    """
    for name in names:
        value = getattr(settings, name)
        if not (0 < value <= LARGEST and np.float32(value) > 0):
            raise BadInput(
                f"{flag(name)} must be a finite float32 number above 0, got {value:g}."
            )


def takes_seed(settings: Any) -> None:
    """The seed is one that every generator of random numbers takes.

    Raises:
        BadInput: it is not.
    """
    if not 0 <= settings.seed < 2**32:
        raise BadInput(f"--seed must be in [0, 2**32), got {settings.seed}.")


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return "--" + name.replace("_", "-")


def results_folder(experiment: str, out: Path | None, *, quick: bool) -> Path:
    """The folder for an experiment's files, which is not made yet: --out, if given.

    Without it, the folder that the README quotes; a quick check leaves that alone.

    Raises:
        BadInput: something is in the way.
    """
    default = (
        f"runs/{experiment}-quick" if quick else f"experiments/results/{experiment}"
    )
    folder = out or Path(default)
    check_folder(folder)
    if (folder / "config.json").exists():
        raise BadInput(
            f"{folder} holds a run, some of whose files would be written over: choose "
            "another --out."
        )
    return folder


def make_folder(out: Path) -> None:
    """The folder for an experiment's files, made if need be.

    Raises:
        BadInput: it cannot be made.
    """
    check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error.strerror) from None


def check_folder(out: Path) -> None:
    """Nothing is in the way of a folder there, which is not made yet.

    Raises:
        BadInput: something is.
    """
    there = next(path for path in (out, *out.parents) if os.path.exists(path))
    if not there.is_dir():
        raise cannot_write(out, f"{there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise cannot_write(out, f"{there} may not be written")


def cannot_write(out: Path, reason: str | None) -> BadInput:
    """The sentence for a folder in which there is no writing."""
    return BadInput(
        f"The output folder {out} cannot be written ({reason}): choose another --out."
    )


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise KeyboardInterrupt(number)


def _leave_when_told() -> None:
    """What is done is done: from here on a signal only ends the process, at once."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(128 + number)

    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, leave)


def _exit(code: int, sentence: str) -> None:
    _leave_when_told()
    print(sentence, file=sys.stderr)
    sys.exit(code)
