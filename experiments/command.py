"""The edge of every experiment: flags in, one clear sentence and an exit code out."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from experiments.catalog import DataError

Settings = TypeVar("Settings")

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130


class BadInput(Exception):
    """What the user gave cannot be used; the message names it and the remedy."""


class Failed(Exception):
    """The run could not be finished; the message says where and what was kept."""


class Interrupted(Exception):
    """The user stopped the run; the message says what was kept."""


def main(
    run: Callable[[Settings], None],
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    program: str,
) -> None:
    """Parse arguments into settings, run, and exit as a well-behaved program does."""
    parsed = tyro.cli(settings, args=arguments, prog=f"python -m experiments.{program}")
    try:
        run(parsed)
    except (BadInput, DataError) as error:
        _exit(BAD_INPUT, str(error))
    except Failed as error:
        _exit(FAILED, str(error))
    except Interrupted as error:
        _exit(INTERRUPTED, str(error))
    except KeyboardInterrupt:
        _exit(INTERRUPTED, "Interrupted.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


def _exit(code: int, sentence: str) -> None:
    print(sentence, file=sys.stderr)
    sys.exit(code)
