"""What the main job can be told, checked; of a run to go on with, as it was begun."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import optax

from experiments import run_folder
from experiments.command import BadInput, above_zero, at_least, parse_again, takes_seed

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

    def check(self) -> None:
        """Each by itself, before anything is loaded.

        Raises:
            BadInput: one of them cannot be, or is in another's way.
        """
        at_least(1, self, "batch_size")
        at_least(0, self, "epochs", "checkpoint_every")
        above_zero(self, "learning_rate")
        takes_seed(self)
        if self.resume and self.out:
            raise BadInput("--resume goes on in its own folder: leave --out out.")
        if self.out:
            run_folder.check_free(self.out)


def resumed(settings: Train, arguments: Sequence[str]) -> Train:
    """With --resume, the settings that the run was started with.

    Raises:
        BadInput: there is no such run, or a flag contradicts it.
    """
    if settings.resume is None:
        return settings
    saved = asdict(Train()) | run_folder.started_with(settings.resume)["settings"]
    for field in fields(Train):
        found, kind = type(saved[field.name]), type(field.default)
        if found is not kind and not (field.default is None and found is str):
            reason = f"{field.name} is of type {found.__name__}"
            raise run_folder.damaged(settings.resume, f"config.json: {reason}")
    unknown = saved.keys() - {field.name for field in fields(Train)}
    unknown |= {saved["optimizer"]} - OPTIMIZERS.keys()
    unknown |= {saved["schedule"]} - SCHEDULES.keys()
    if unknown:
        raise BadInput(
            f"The run in {settings.resume} has settings that this version does not "
            f"know ({', '.join(sorted(unknown))}): update this program."
        )
    data_dir = saved["data_dir"]
    places = {"data_dir": data_dir and Path(data_dir), "out": None, "resume": None}
    begun = Train(**saved | places)
    return parse_again(
        settings.resume, begun, begun.decisive, arguments, program="fashion_mnist"
    )
