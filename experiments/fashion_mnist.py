"""The main job: softmax regression on Fashion-MNIST, trained, evaluated, drawn.

python -m experiments.fashion_mnist                 train with the book's setting
python -m experiments.fashion_mnist --resume DIR    go on with a run that was stopped
python -m experiments.fashion_mnist predict         classify images with a saved run
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from jax.sharding import Mesh

from experiments import data, report, run_folder
from experiments.checkpoint import Checkpoints, no_room
from experiments.command import (
    BadInput,
    Failed,
    Interrupted,
    Stop,
    above_zero,
    at_least,
    main,
    parse_again,
    stopping_at_leisure,
    takes_seed,
)
from experiments.compiled import keep_programs
from experiments.images import pixels
from experiments.journal import Journal
from experiments.mesh import Spread, mesh_of, sizes
from experiments.stopwatch import Stopwatch, peak_megabytes, waited_for_rows
from experiments.stream import Streamed, first
from jax_softmax import (
    NonFiniteLoss,
    Progress,
    SoftmaxRegression,
    closed_form,
    fit,
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
    resume: Path | None = None
    """The folder of a run to go on with, to the same bits as if it had not stopped."""
    checkpoint_every: int = 0
    """Steps between checkpoints within an epoch; every epoch ends with one anyway."""
    tensorboard: bool = False
    """Also write TensorBoard's event files."""
    mesh: str | None = None
    """Such as data=2,model=2: rows of a batch and classes spread over devices."""
    stream: bool = False
    """Leave the training images on disk and read them by Grain: the same numbers."""
    quick: bool = False
    """Two epochs on the first 6,000 images: a check that everything works."""

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that the numbers depend on."""
        free = {
            "data_dir",
            "out",
            "resume",
            "checkpoint_every",
            "tensorboard",
            "stream",
            "mesh",
        }
        return {name: v for name, v in asdict(self).items() if name not in free}


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
    clock = Stopwatch()
    clock.lap("imports")
    keep_programs()
    mesh = None if settings.mesh is None else mesh_of(sizes(settings.mesh))
    load = data.load_streamed if settings.stream else data.load
    dataset = load(settings.dataset, settings.data_dir)
    _import_meanwhile("orbax.checkpoint")
    epochs, images = settings.epochs, dataset.train_images
    if settings.quick:
        epochs = min(epochs, 2)
        images = first(images, 6000)
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
        elif run_folder.started_with(out)["fingerprint"] != dataset.fingerprint:
            raise BadInput(
                f"The run in {out} was started with another data set than "
                f"{dataset.source} Name its own with --data-dir."
            )
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
        model, metrics = _fitted(settings, out, dataset, images, epochs, mesh, stop)
        clock.lap("training and checkpoints")
        if isinstance(images, Streamed):
            spent = clock.seconds()["training and checkpoints"]
            waited = waited_for_rows()
            report.say(
                f"Input: training waited {waited:.3f} s of {spent:.2f} s for images, "
                f"{waited / spent:.1%}"
            )
        if metrics:
            report.say(f"Final: {_line(metrics[-1])}")
        report.say(
            gradient_gap(model, images[: settings.batch_size], dataset.train_labels)
        )
        clock.lap("gradient beside the closed form")
        try:
            report.say(_draw(out, metrics, model, dataset, stop))
        except Stop as told:
            raise Interrupted(
                f"Interrupted while drawing: the model is trained, and kept in {out}. "
                f"--resume {out} draws the rest.",
                *told.args,
            ) from None
        clock.lap("pictures")
        with run_folder.replacing(out / run_folder.TIMES) as file:
            file.write_text(report.to_json(_times(clock)))
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


def _fitted(
    settings: Train,
    out: Path,
    dataset: data.Dataset,
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
    )
    journal = Journal(
        out,
        checkpoints,
        steps=steps,
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
                    _import_meanwhile("experiments.pictures")
                model = epoch.model
                line = journal.end_of_epoch(epoch, time.perf_counter() - started)
                report.say(_line(line))
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


def resumed(settings: Train, arguments: Sequence[str]) -> Train:
    """With --resume, the settings that the run was started with.

    Raises:
        BadInput: there is no such run, or a flag contradicts it.
    """
    if settings.resume is None:
        return settings
    saved = run_folder.started_with(settings.resume)["settings"]
    unknown = saved.keys() - {field.name for field in fields(Train)}
    if unknown:
        raise BadInput(
            f"The run in {settings.resume} has settings that this version does not "
            f"know ({', '.join(sorted(unknown))}): update this program."
        )
    for field in fields(Train):
        found = type(saved.get(field.name, field.default))
        if field.default is not None and found is not type(field.default):
            reason = f"{field.name} is of type {found.__name__}"
            raise run_folder.damaged(settings.resume, f"config.json: {reason}")
    data_dir = saved.get("data_dir")
    places = {"data_dir": data_dir and Path(data_dir), "out": None, "resume": None}
    begun = Train(**saved | places)
    return parse_again(
        settings.resume, begun, begun.decisive, arguments, program="fashion_mnist"
    )


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


def gradient_gap(
    model: SoftmaxRegression, images: np.ndarray, labels: np.ndarray
) -> str:
    """How far autodiff is from the gradient on paper, in a sentence."""

    @jax.jit
    def compared(
        model: SoftmaxRegression, images: Array, y: Array
    ) -> tuple[Array, Array]:
        x = pixels(images)
        autodiff = jax.grad(SoftmaxRegression.objective)(model, x, y)
        on_paper = SoftmaxRegression(*closed_form.regression_gradient(*model, x, y))
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), autodiff, on_paper)
        sizes = jax.tree.map(lambda a: jnp.abs(a).max(), on_paper)
        return jnp.stack(gaps).max(), jnp.stack(sizes).max()

    gap, size = compared(model, images, labels[: len(images)])
    return (
        f"Gradient of one batch: autodiff and closed form differ by {gap:.1e} at most "
        f"(largest entry {size:.1e})"
    )


def _check(settings: Train) -> None:
    at_least(1, settings, "batch_size")
    at_least(0, settings, "epochs", "checkpoint_every")
    above_zero(settings, "learning_rate")
    takes_seed(settings)
    if settings.resume and settings.out:
        raise BadInput("--resume goes on in its own folder: leave --out out.")
    if settings.out:
        run_folder.check_free(settings.out)


def _import_meanwhile(module: str) -> None:
    """What is needed later, imported while XLA is at work on another core.

    Not beside the imports of tensorflow-datasets and Grain: while those last, what any
    other thread imports is a module of theirs that is not there yet.
    """
    Thread(target=import_module, args=(module,), daemon=True).start()


def _new_folder(dataset: str) -> Path:
    return Path("runs") / f"{dataset}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"epoch {metrics['epoch']:2d}  train loss {metrics['train_loss']:.4f}  "
        f"validation loss {metrics['validation_loss']:.4f}  "
        f"validation accuracy {metrics['validation_accuracy']:.4f}  "
        f"{metrics['seconds']:.2f} s"
    )


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


def _draw(
    out: Path,
    metrics: Sequence[dict[str, Any]],
    model: SoftmaxRegression,
    dataset: data.Dataset,
    stop: Callable[[], None],
) -> str:
    """The pictures, until told to stop; and in a sentence, how calibrated it is."""
    from experiments import calibration, pictures

    images, labels = dataset.test_images, dataset.test_labels
    names = dataset.class_names
    logits, predictions = jax.device_get(_predicted(model, images))
    stop()
    if metrics:
        pictures.curves(metrics, out / "curves.png")
    stop()
    pictures.misclassified(
        images, labels, predictions, names, out / "misclassified.png"
    )
    stop()
    pictures.weights(np.asarray(model.w), images.shape[1:], names, out / "weights.png")
    stop()
    pictures.confusion(labels, predictions, names, out / "confusion.png")
    stop()
    found = calibration.calibration(logits, labels)
    calibration.draw_reliability({"validation images": found}, out / "reliability.png")
    (out / "calibration.json").write_text(report.to_json(calibration.as_json(found)))
    return calibration.sentence(found)


@jax.jit
def _predicted(model: SoftmaxRegression, images: Array) -> tuple[Array, Array]:
    """Logits and most likely classes."""
    logits = model.logits(pixels(images))
    return logits, logits.argmax(-1)


def _read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if file.mode.startswith("I"):  # 16 bits of grey
                file = Image.fromarray(np.rint(np.asarray(file) / 257).astype(np.uint8))
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
        main(
            lambda settings: train(resumed(settings, arguments)),
            Train,
            arguments,
            program="fashion_mnist",
        )


if __name__ == "__main__":
    command_line(sys.argv[1:])
