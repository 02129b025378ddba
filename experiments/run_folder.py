"""The folder of one run: config.json, metrics.jsonl, params.npz and pictures."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.command import BadInput
from jax_softmax import SoftmaxRegression

CONFIG, METRICS, PARAMS = "config.json", "metrics.jsonl", "params.npz"
KIND = "softmax regression"


class SavedRun(NamedTuple):
    """A model and what it was trained on."""

    model: SoftmaxRegression
    config: dict[str, Any]


def create(folder: Path, config: dict[str, Any]) -> None:
    """Start a run in an empty or new folder.

    Raises:
        BadInput: the folder cannot be written, or holds a run already.
    """
    if (folder / CONFIG).exists():
        raise BadInput(
            f"{folder} already holds a run: choose another --out, or remove the folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG) as file:
            file.write_text(report.to_json({"kind": KIND} | config))
    except OSError as error:
        raise BadInput(
            f"The output folder {folder} cannot be written ({error.strerror}): "
            "choose another --out."
        ) from None


def add_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl, on disk before this returns."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


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
    try:
        config = json.loads((folder / CONFIG).read_text())
        with np.load(folder / PARAMS, allow_pickle=False) as arrays:
            params = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise BadInput(
            f"{folder} holds no finished run ({missing} is missing): train one with "
            "python -m experiments.fashion_mnist --out FOLDER."
        ) from None
    except (ValueError, BadZipFile, EOFError, OSError) as error:
        raise BadInput(
            f"The run in {folder} is damaged ({error}): train it again."
        ) from None
    if not _fits(config, params):
        raise BadInput(
            f"The run in {folder} is of another model, not a {KIND}: "
            "name a folder that experiments.fashion_mnist made."
        )
    return SavedRun(SoftmaxRegression(*map(jnp.asarray, map(params.get, "wb"))), config)


def _fits(config: Any, params: dict[str, np.ndarray]) -> bool:
    if not isinstance(config, dict) or config.get("kind") != KIND:
        return False
    classes = len(config.get("class_names", ()))
    features = int(np.prod(config.get("image_shape", ())))
    shapes = {name: array.shape for name, array in params.items()}
    return shapes == {"w": (features, classes), "b": (classes,)}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside path, which it replaces at the end, whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
