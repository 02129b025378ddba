"""Training in a run's folder: by fit, every moment of it kept, and how it can end."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from experiments import report, run_folder
from experiments.checkpoint import Checkpoints
from experiments.command import Failed, Interrupted, Stop
from experiments.data import Dataset
from experiments.images import pixels
from experiments.journal import Journal
from experiments.mesh import Spread
from experiments.stream import Streamed
from experiments.train_settings import OPTIMIZERS, SCHEDULES, Train
from jax_softmax import NonFiniteLoss, Progress, SoftmaxRegression, fit


def trained(
    settings: Train,
    out: Path,
    dataset: Dataset,
    images: np.ndarray | Streamed,
    epochs: int,
    mesh: Mesh | None,
    stop: Callable[[], None],
) -> tuple[SoftmaxRegression, list[dict[str, Any]]]:
    """The trained model and its metrics, every moment of it kept in the folder."""
    features, classes = math.prod(images.shape[1:]), len(dataset.class_names)
    labels = dataset.train_labels[: len(images)]
    model, order_key = _first(jax.random.key(settings.seed), features, classes)
    steps = math.ceil(len(labels) / settings.batch_size)
    schedule = SCHEDULES[settings.schedule](
        settings.learning_rate, max(1, epochs * steps)
    )
    optimizer = OPTIMIZERS[settings.optimizer](schedule)
    checkpoints = Checkpoints(
        out,
        {
            "settings": settings.decisive,
            "fingerprint": dataset.fingerprint,
            "shuffle": jax.random.key_data(order_key).tolist(),
        },
        steps,
    )
    journal = Journal(
        out,
        checkpoints,
        every=settings.checkpoint_every,
        tensorboard=settings.tensorboard,
        stop=stop,
    )
    with closing(journal):
        progress = Progress.start(model, optimizer)
        if settings.resume is None:
            run_folder.save(out, model)
        else:
            progress = journal.resume(progress)
            model = progress.model
        transform, objective = pixels, SoftmaxRegression.objective
        if mesh is not None:
            spread = Spread(mesh, classes)
            transform, objective = spread.rows(pixels), spread.objective
            progress = spread.put(progress)
        training = fit(
            model,
            images,
            None if settings.stream else labels,
            optimizer=optimizer,
            key=order_key,
            epochs=epochs,
            batch_size=settings.batch_size,
            objective=objective,
            transform=transform,
            validation=(dataset.test_images, dataset.test_labels),
            progress=progress,
            watch=journal.within_epoch,
            watch_every=settings.checkpoint_every or None,
        )
        started = time.perf_counter()
        try:
            for epoch in report.progress(training, total=epochs):
                if epoch.number == progress.epoch:  # and so all is compiled
                    import_meanwhile("experiments.pictures")
                model = epoch.model
                line = journal.end_of_epoch(epoch, time.perf_counter() - started)
                report.say(line_of(line))
                started = time.perf_counter()
        except NonFiniteLoss as error:
            run_folder.save(out, error.model)
            rate = np.asarray(schedule((error.epoch - 1) * steps + error.step - 1))
            raise Failed(
                f"Stopped: {error}. The learning rate was {rate:g}. "
                f"The last good state is in {out / 'params.npz'}."
            ) from None
        except Stop as told:
            raise Interrupted(
                f"Interrupted after {journal.epochs} of {epochs} epochs: all "
                f"that was done is kept in {out}. Go on with --resume {out}.",
                *told.args,
            ) from None
    return jax.device_get(model), journal.metrics


@partial(jax.jit, static_argnums=(1, 2))
def _first(key: Array, features: int, classes: int) -> tuple[SoftmaxRegression, Array]:
    """The model before any step, and the key of the order of the images."""
    init_key, order_key = jax.random.split(key)
    return SoftmaxRegression.init(init_key, features, classes), order_key


def import_meanwhile(module: str) -> None:
    """What is needed later, imported while XLA is at work on another core.

    Not beside the imports of tensorflow-datasets and Grain: while those last, what any
    other thread imports is a module of theirs that is not there yet.
    """
    Thread(target=import_module, args=(module,), daemon=True).start()


def line_of(metrics: dict[str, Any]) -> str:
    """What is printed of an epoch."""
    return (
        f"epoch {metrics['epoch']:2d}  train loss {metrics['train_loss']:.4f}  "
        f"validation loss {metrics['validation_loss']:.4f}  "
        f"validation accuracy {metrics['validation_accuracy']:.4f}  "
        f"{metrics['seconds']:.2f} s"
    )
