"""The folder of one run: config.json, metrics.jsonl, params.npz and pictures.

One process at a time writes in it; checkpoint.py has the folder's checkpoints.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.command import BadInput, cannot_write, check_folder, make_folder
from experiments.data import Dataset
from experiments.files import replacing, save_json, save_text
from experiments.prepared import read_npz
from jax_softmax import SoftmaxRegression

CONFIG, METRICS, PARAMS = "config.json", "metrics.jsonl", "params.npz"
TIMES = "times.json"  # of a run that has ended
SUMMARY = "summary.json"  # of a run by several processes
OWN = CONFIG, METRICS, PARAMS, TIMES, "calibration.json", "checkpoints", "tensorboard"
KIND = "softmax regression"
RECORDED = {
    "settings": dict,
    "dataset": str,
    "fingerprint": str,
    "class_names": list,
    "image_shape": list,
}
LISTED = {"class_names": str, "image_shape": int}
FIGURES = "train_loss", "validation_loss", "validation_accuracy"


class SavedRun(NamedTuple):
    """A model and what it was trained on."""

    model: SoftmaxRegression
    config: dict[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone; the lock dies with it.

    Raises:
        BadInput: another process has it, or it cannot be made.
    """
    make_folder(folder)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_write(folder, error.strerror) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"Another run is writing in {folder}: wait for its end, or choose "
                "another --out."
            ) from None
        yield
    finally:
        os.close(handle)


def create(folder: Path, config: dict[str, Any]) -> None:
    """Start a run in a folder that holds none; config may name another kind.

    Raises:
        BadInput: the folder cannot be written, or holds what a run would write over.
    """
    check_free(folder)
    try:
        save_json(folder / CONFIG, {"kind": KIND} | config)
    except OSError as error:
        raise cannot_write(folder, error.strerror) from None


def check_free(folder: Path) -> None:
    """A run can start there, as far as can be told without making the folder.

    Raises:
        BadInput: it cannot be written, or holds what a run would write over.
    """
    check_folder(folder)
    if os.path.exists(folder / CONFIG):
        raise BadInput(
            f"{folder} already holds a run: go on with --resume {folder} if it is one "
            "of these, or choose another --out."
        )
    if there := files_of_run(folder):
        raise BadInput(
            f"{there[0]} is there already, and a run would write over it: choose "
            "another --out."
        )


def files_of_run(folder: Path) -> list[Path]:
    """What a run leaves in its folder, as far as it is there."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if path.name in OWN or path.suffix == ".png")


def started_with(folder: Path) -> dict[str, Any]:
    """The config.json of a run, finished or not.

    Raises:
        BadInput: there is none, it is damaged, or it is of another kind.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no run folder {folder}: name one that --out made.")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise BadInput(
            f"{folder} holds no run ({CONFIG} is missing): start one with --out."
        ) from None
    except (ValueError, OSError) as error:
        raise damaged(folder, f"{CONFIG}: {error}") from None
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise _of_another_model(folder)
    for name, kind in RECORDED.items():
        if not isinstance(config.get(name), kind):
            raise damaged(folder, f"{CONFIG}: {name} is missing or no {kind.__name__}")
    for name, kind in LISTED.items():
        if not all(type(item) is kind for item in config[name]):
            raise damaged(folder, f"{CONFIG}: {name} holds what is no {kind.__name__}")
    return config


def check_data(folder: Path, dataset: Dataset) -> None:
    """The data set is the one that the run was started with.

    Raises:
        BadInput: it is another one.
    """
    if started_with(folder)["fingerprint"] != dataset.fingerprint:
        raise BadInput(
            f"The run in {folder} was started with another data set than "
            f"{dataset.source} Name its own with --data-dir."
        )


def damaged(folder: Path, reason: str) -> BadInput:
    """The sentence for a run that cannot be gone on with."""
    return BadInput(
        f"The run in {folder} is damaged ({reason}): restore it, or train it again "
        "with another --out."
    )


def add_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl, on disk before this returns."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def check_metrics(folder: Path, epochs: int) -> None:
    """metrics.jsonl has a line for each epoch done, or for the last ones of them, or
    there is no such file. What it has of later epochs is of no account.

    Raises:
        BadInput: one is missing or damaged.
    """
    if not (folder / METRICS).exists():
        return
    numbers = [row["epoch"] for row in _sound_metrics(folder)]
    wanted = [*range(numbers[0] if numbers else 1, epochs + 1)]
    if numbers[: len(wanted)] != wanted:
        raise BadInput(
            f"{folder / METRICS} does not hold a line for each of the {epochs} epochs "
            "done: restore it, or move it away to go on without them."
        )


def keep_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Drop what metrics.jsonl has of later epochs, a torn last line included."""
    if not (folder / METRICS).exists():
        return []
    kept = [row for row in _sound_metrics(folder) if row["epoch"] <= epochs]
    save_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _sound_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines up to one that is damaged, as the last is of a run that was killed."""
    rows = []
    for line in (folder / METRICS).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            sound = isinstance(row["epoch"], int) and all(
                isinstance(row[name], float) for name in (*FIGURES, "seconds")
            )
        except (ValueError, TypeError, KeyError):
            break
        if not sound:
            break
        rows.append(row)
    return rows


def check_not_begun(folder: Path) -> None:
    """A run without any checkpoint has nothing to lose by starting at the beginning.

    The first one is whole before the third line of metrics.jsonl is written.

    Raises:
        BadInput: it was further than that.
    """
    path = folder / METRICS
    lines = path.read_bytes().count(b"\n") if path.is_file() else 0
    if lines > 2 or (lines and (folder / TIMES).exists()):
        raise BadInput(
            f"The run in {folder} has done {lines} epochs, but has no checkpoint to go "
            "on from. Nothing was changed; train again with another --out."
        )


def save(folder: Path, model: SoftmaxRegression) -> None:
    """Write params.npz whole or not at all."""
    with replacing(folder / PARAMS) as file, file.open("wb") as stream:
        np.savez(stream, **model._asdict())


def load(folder: Path) -> SavedRun:
    """The model that a run saved.

    Raises:
        BadInput: no such run, a damaged one, or one of another model.
    """
    if not folder.is_dir():
        raise BadInput(f"There is no run folder {folder}: name one that --out made.")
    if not os.path.exists(folder / PARAMS):
        raise BadInput(
            f"{folder} holds no finished run ({PARAMS} is missing): train one with "
            "python -m experiments.fashion_mnist --out FOLDER."
        )
    config = started_with(folder)
    try:
        w, b = read_npz(folder / PARAMS, "w", "b")
    except ValueError as error:
        raise _damaged_params(folder, f"{PARAMS}: {error}") from None
    if not _fits(config, w, b):
        raise _of_another_model(folder)
    if not (np.isfinite(w).all() and np.isfinite(b).all()):
        raise _damaged_params(folder, f"{PARAMS} holds numbers that are not finite")
    return SavedRun(SoftmaxRegression(jnp.asarray(w), jnp.asarray(b)), config)


def _damaged_params(folder: Path, reason: str) -> BadInput:
    return BadInput(
        f"The run in {folder} is damaged ({reason}): --resume {folder} restores "
        "what its newest checkpoint has; without any, train it again."
    )


def _of_another_model(folder: Path) -> BadInput:
    return BadInput(
        f"The run in {folder} is of another model, not a {KIND}: "
        "name a folder that experiments.fashion_mnist made."
    )


def _fits(config: dict[str, Any], w: np.ndarray, b: np.ndarray) -> bool:
    classes, sizes = len(config["class_names"]), config["image_shape"]
    return (
        len(sizes) in (2, 3)
        and (w.shape, b.shape) == ((math.prod(sizes), classes), (classes,))
        and w.dtype.kind == b.dtype.kind == "f"
    )
