"""The main job: softmax regression on Fashion-MNIST, trained, evaluated, drawn.

python -m experiments.fashion_mnist                 train with the book's setting
python -m experiments.fashion_mnist --resume DIR    go on with a run that was stopped
python -m experiments.fashion_mnist predict         classify images with a saved run
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from experiments import data, learned, report, run_folder
from experiments.checkpoint import MOST_STEPS, no_room
from experiments.command import (
    BadInput,
    Failed,
    Interrupted,
    Stop,
    main,
    quickened,
    stopping_at_leisure,
)
from experiments.compiled import keep_programs
from experiments.files import save_json
from experiments.mesh import mesh_of, sizes
from experiments.predict import Predict, predict
from experiments.stopwatch import Stopwatch, peak_megabytes, waited_for_rows
from experiments.stream import Streamed, first
from experiments.train_settings import Train, resumed
from experiments.training import import_meanwhile, line_of, trained


def train(settings: Train) -> None:
    """The main job."""
    settings.check()
    epochs = quickened(settings, epochs=min(settings.epochs, 2)).epochs
    clock = Stopwatch()
    clock.lap("imports")
    keep_programs()
    mesh = None if settings.mesh is None else mesh_of(sizes(settings.mesh))
    load = data.load_streamed if settings.stream else data.load
    dataset = load(settings.dataset, settings.data_dir)
    import_meanwhile("orbax.checkpoint")
    images = dataset.train_images
    if settings.quick:
        images = first(images, 6000)
    if epochs * -(-len(images) // settings.batch_size) > MOST_STEPS:
        raise BadInput(
            f"--epochs {epochs} are more than {MOST_STEPS:,} steps: lower it, or raise "
            "--batch-size."
        )
    clock.lap("data")
    out = settings.resume or settings.out or _new_folder(settings.dataset)
    with (
        run_folder.locked(out),
        _saying_what_is_full(out),
        stopping_at_leisure() as stop,
    ):
        if settings.resume is None:
            config = {
                "settings": asdict(settings),
                "dataset": dataset.name,
                "fingerprint": dataset.fingerprint,
                "class_names": dataset.class_names,
                "image_shape": dataset.train_images.shape[1:],
                "environment": report.environment(),
            }
            run_folder.create(out, config)
        else:
            run_folder.check_data(out, dataset)
        report.say(
            f"Data: {dataset.name}, {len(images):,} training and "
            f"{len(dataset.test_labels):,} test images, {dataset.source}"
        )
        report.say(
            f"Settings: {settings.optimizer}, learning rate "
            f"{settings.learning_rate:g} ({settings.schedule}), batch "
            f"{settings.batch_size}, {epochs} epochs, seed {settings.seed}, on "
            f"{jax.devices()[0].device_kind}"
            + (f", {settings.mesh}" if settings.mesh else "")
        )
        model, metrics = trained(settings, out, dataset, images, epochs, mesh, stop)
        clock.lap("training and checkpoints")
        if isinstance(images, Streamed):
            spent = clock.seconds()["training and checkpoints"]
            waited = waited_for_rows()
            report.say(
                f"Input: training waited {waited:.3f} s of {spent:.2f} s for images, "
                f"{waited / spent:.1%}"
            )
        if metrics:
            report.say(f"Final: {line_of(metrics[-1])}")
        report.say(
            learned.gradient_gap(
                model, images[: settings.batch_size], dataset.train_labels
            )
        )
        clock.lap("gradient beside the closed form")
        try:
            report.say(learned.draw(out, metrics, model, dataset, stop))
        except Stop as told:
            raise Interrupted(
                f"Interrupted while drawing: the model is trained, and kept in {out}. "
                f"--resume {out} draws the rest.",
                *told.args,
            ) from None
        clock.lap("pictures")
        save_json(out / run_folder.TIMES, _times(clock))
        files = [path for path in run_folder.files_of_run(out) if path.is_file()]
        report.say(_spent(clock))
        report.say("Files:", *(f"  {path}" for path in files), sep="\n")


@contextmanager
def _saying_what_is_full(out: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        file, reason = error.filename or out, error.strerror or str(error)
        remedy = "make room there" if no_room(reason) else "see that it can be"
        raise Failed(
            f"The run cannot go on: {file} cannot be used ({reason}): {remedy}, "
            f"then go on with --resume {out}."
        ) from None


def _new_folder(dataset: str) -> Path:
    return Path("runs") / f"{dataset}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _times(clock: Stopwatch) -> dict[str, Any]:
    return {
        "seconds": clock.seconds(),
        "waited_for_rows": waited_for_rows(),
        "peak_megabytes": peak_megabytes(),
    }


def _spent(clock: Stopwatch) -> str:
    parts = clock.seconds()
    total = parts.pop("all")
    longest = sorted(parts.items(), key=lambda part: -part[1])
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in longest)
    return f"Time: {total:.2f} s ({spent}), {peak_megabytes():.0f} MB at most"


def command_line(arguments: Sequence[str]) -> None:
    """Train, or predict when that is the first word."""
    if arguments[:1] == ["predict"]:
        main(predict, Predict, arguments[1:], program="fashion_mnist predict")
    else:
        main(
            lambda settings: train(resumed(settings, arguments)),
            Train,
            arguments,
            program="fashion_mnist",
        )


if __name__ == "__main__":
    command_line(sys.argv[1:])
