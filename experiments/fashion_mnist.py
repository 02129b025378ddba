"""The main job: softmax regression on Fashion-MNIST, trained, evaluated, drawn.

python -m experiments.fashion_mnist            train with the book's setting
python -m experiments.fashion_mnist predict    classify images with a saved run
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array

from experiments import data, pictures, report, run_folder
from experiments.command import BadInput, Failed, Interrupted, main
from jax_softmax import (
    NonFiniteLoss,
    SoftmaxRegression,
    compare_gradients,
    fit,
    regression_gradient,
    softmax,
)

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "radam": optax.radam,
    "adabelief": optax.adabelief,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
    "lamb": optax.lamb,
}
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "warmup-cosine": lambda rate, steps: optax.warmup_cosine_decay_schedule(
        0.0, rate, steps // 10, steps
    ),
}


@dataclass(frozen=True)
class Train:
    """Train softmax regression on images, evaluate it, draw what it learned.

    (To classify images with a saved run: python -m experiments.fashion_mnist predict.)
    """

    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist, kmnist, cifar10 or digits (needs no files at all)."""
    data_dir: Path | None = None
    """A folder with the data set, as raw files or prepared by tensorflow-datasets."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "sgd"  # type: ignore[valid-type]
    """The optax optimizer."""
    learning_rate: float = 0.1
    """The learning rate, or the highest one of a schedule."""
    schedule: Literal[tuple(SCHEDULES)] = "constant"  # type: ignore[valid-type]
    """How the learning rate changes over the run."""
    batch_size: int = 256
    """Images per update."""
    epochs: int = 10
    """Passes over the training images."""
    seed: int = 0
    """Of the first weights and of the order of the images."""
    out: Path | None = None
    """The folder for this run's files; by default a new one under runs/."""
    quick: bool = False
    """Two epochs on the first 6,000 images: a check that everything works."""


@dataclass(frozen=True)
class Predict:
    """Classify PNG files, or the first test images, with a saved run."""

    run: Path
    """The folder of the run."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """PNG files; without any, the first ten test images of the run's data set."""
    data_dir: Path | None = None
    """Where the run's data set is, if the test images are wanted."""


def train(settings: Train) -> None:
    """The main job."""
    _check(settings)
    dataset = data.load(settings.dataset, settings.data_dir)
    epochs, rows = settings.epochs, len(dataset.train_labels)
    if settings.quick:
        epochs, rows = min(epochs, 2), min(rows, 6000)
    images, labels = dataset.train_images[:rows], dataset.train_labels[:rows]
    out = settings.out or _new_folder(settings.dataset)
    config = {
        "settings": asdict(settings),
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "class_names": dataset.class_names,
        "image_shape": dataset.train_images.shape[1:],
        "environment": report.environment(),
    }
    run_folder.create(out, config)
    report.say(
        f"Data: {dataset.name}, {rows:,} training and {len(dataset.test_labels):,} "
        f"test images, {dataset.source}"
    )
    report.say(
        f"Settings: {settings.optimizer}, learning rate {settings.learning_rate:g} "
        f"({settings.schedule}), batch {settings.batch_size}, {epochs} epochs, "
        f"seed {settings.seed}, on {jax.devices()[0].device_kind}"
    )

    init_key, order_key = jax.random.split(jax.random.key(settings.seed))
    features, classes = math.prod(images.shape[1:]), len(dataset.class_names)
    model = SoftmaxRegression.init(init_key, features, classes)
    run_folder.save(out, model)
    steps = max(1, epochs * math.ceil(rows / settings.batch_size))
    schedule = SCHEDULES[settings.schedule](settings.learning_rate, steps)
    training = fit(
        model,
        images,
        labels,
        optimizer=OPTIMIZERS[settings.optimizer](schedule),
        key=order_key,
        epochs=epochs,
        batch_size=settings.batch_size,
        transform=pixels,
        validation=(dataset.test_images, dataset.test_labels),
    )
    metrics: list[dict[str, Any]] = []
    started = time.perf_counter()
    try:
        for epoch in report.progress(training, total=epochs):
            model = epoch.model
            now = time.perf_counter()
            metrics.append(
                {
                    "epoch": epoch.number,
                    "train_loss": epoch.train_loss,
                    "validation_loss": epoch.validation_loss,
                    "validation_accuracy": epoch.validation_accuracy,
                    "seconds": round(now - started, 4),
                }
            )
            run_folder.save(out, model)
            run_folder.add_metrics(out, metrics[-1])
            report.say(_line(metrics[-1]))
            started = time.perf_counter()
    except NonFiniteLoss as error:
        run_folder.save(out, error.model)
        raise Failed(
            f"Stopped: {error}. The last good state is in {out / 'params.npz'}."
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(
            f"Interrupted: {len(metrics)} finished epochs are kept in {out}."
        ) from None

    if metrics:
        report.say(f"Final: {_line(metrics[-1])}")
    report.say(gradient_gap(model, images[: settings.batch_size], labels))
    _draw(out, metrics, model, dataset)
    report.say("Files:", *(f"  {path}" for path in sorted(out.iterdir())), sep="\n")


def predict(settings: Predict) -> None:
    """Print label, probability and runner-up of each image."""
    model, config = run_folder.load(settings.run)
    names, shape = config["class_names"], tuple(config["image_shape"])
    if settings.images:
        images = np.stack([_read_image(path, shape) for path in settings.images])
        titles = [str(path) for path in settings.images]
    else:
        dataset = data.load(config["dataset"], settings.data_dir)
        images = dataset.test_images[:10]
        titles = [
            f"test image {i} ({names[label]})"
            for i, label in enumerate(dataset.test_labels[:10])
        ]
    probs = np.asarray(softmax(model.logits(pixels(images))))
    best, second = np.argsort(-probs, axis=-1, kind="stable")[:, :2].T
    width = max(map(len, titles))
    for title, row, i, j in zip(titles, probs, best, second, strict=True):
        report.say(
            f"{title:<{width}}  {names[i]} {row[i]:.1%}, then {names[j]} {row[j]:.1%}"
        )


def pixels(images: Array | np.ndarray) -> Array:
    """uint8 images as rows of features in [0, 1]."""
    return jnp.asarray(images).reshape(len(images), -1).astype(jnp.float32) / 255


def gradient_gap(
    model: SoftmaxRegression, images: np.ndarray, labels: np.ndarray
) -> str:
    """Autodiff, closed form and float64 gradient of the objective, in a sentence."""
    x, y = pixels(images), jnp.asarray(labels[: len(images)])
    autodiff = jax.grad(SoftmaxRegression.objective)(model, x, y)
    on_paper = SoftmaxRegression(*regression_gradient(*model, x, y))
    difference = max(
        float(jnp.abs(a - b).max()) for a, b in zip(autodiff, on_paper, strict=True)
    )
    compared = compare_gradients(
        SoftmaxRegression.objective, lambda *_: on_paper, model, x, y, probes=1
    )
    error = {
        method: max(row.max_abs for row in compared.rows if row.method == method)
        for method in ("reverse", "closed form")
    }
    largest = max(row.largest for row in compared.rows)
    return (
        f"Gradient of one batch: autodiff and closed form differ by {difference:.1e} "
        f"at most (largest entry {largest:.1e}); from a float64 run they are "
        f"{error['reverse']:.1e} and {error['closed form']:.1e} away"
    )


def _check(settings: Train) -> None:
    if settings.batch_size < 1:
        raise BadInput(f"--batch-size must be at least 1, got {settings.batch_size}.")
    if settings.epochs < 0:
        raise BadInput(f"--epochs must not be negative, got {settings.epochs}.")
    if not 0 < settings.learning_rate < math.inf:
        raise BadInput(
            "--learning-rate must be a finite number above 0, "
            f"got {settings.learning_rate:g}."
        )
    if not 0 <= settings.seed < 2**32:
        raise BadInput(f"--seed must be in [0, 2**32), got {settings.seed}.")


def _new_folder(dataset: str) -> Path:
    return Path("runs") / f"{dataset}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"epoch {metrics['epoch']:2d}  train loss {metrics['train_loss']:.4f}  "
        f"validation loss {metrics['validation_loss']:.4f}  "
        f"validation accuracy {metrics['validation_accuracy']:.4f}  "
        f"{metrics['seconds']:.2f} s"
    )


def _draw(
    out: Path,
    metrics: Sequence[dict[str, Any]],
    model: SoftmaxRegression,
    dataset: data.Dataset,
) -> None:
    images, labels = dataset.test_images, dataset.test_labels
    names = dataset.class_names
    predictions = np.asarray(model.predict(pixels(images)))
    if metrics:
        pictures.curves(metrics, out / "curves.png")
    pictures.misclassified(
        images, labels, predictions, names, out / "misclassified.png"
    )
    pictures.weights(np.asarray(model.w), images.shape[1:], names, out / "weights.png")
    pictures.confusion(labels, predictions, names, out / "confusion.png")


def _read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = np.asarray(file.convert("RGB" if len(shape) == 3 else "L"))
    except UnidentifiedImageError:
        raise BadInput(f"{path} is not an image: give PNG files.") from None
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{path} cannot be read ({reason}): give PNG files.") from None
    if image.shape != shape:
        (height, width), (wanted_height, wanted_width) = image.shape[:2], shape[:2]
        raise BadInput(
            f"{path} is {width} x {height} pixels, but the run was trained on "
            f"{wanted_width} x {wanted_height}: resize it first."
        )
    return image


def command_line(arguments: Sequence[str]) -> None:
    """Train, or predict when that is the first word."""
    if arguments[:1] == ["predict"]:
        main(predict, Predict, arguments[1:], program="fashion_mnist predict")
    else:
        main(train, Train, arguments, program="fashion_mnist")


if __name__ == "__main__":
    command_line(sys.argv[1:])
