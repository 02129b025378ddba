"""What training by several processes can be told, and whether it fits a mesh."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import run_folder
from experiments.command import BadInput, at_least, parse_again, takes_seed
from experiments.mesh import sizes

DECISIVE = ("rows", "features", "classes", "batch_size", "epochs", "seed")


@dataclass(frozen=True)
class Scaling:
    """Train softmax regression with several processes on one mesh.

    (Two measurements have flags of their own: python -m experiments.scaling overhead,
    and python -m experiments.scaling pod.)
    """

    processes: int = 4
    """How many processes, each with its own devices."""
    devices: int = 1
    """Devices of each process."""
    mesh: str | None = None
    """Such as data=2,model=2; by default two model shards where that divides."""
    rows: int = 1000
    """Examples, made from the seed."""
    features: int = 64
    """Numbers that describe an example."""
    classes: int = 32
    """Classes, divided among the model shards."""
    batch_size: int = 64
    """Rows per update, divided among the data shards."""
    epochs: int = 3
    """Passes over the rows."""
    seed: int = 0
    """Of the examples, the first weights and the order of the rows."""
    checkpoint_every: int = 8
    """Steps between checkpoints."""
    out: Path = Path("runs/scaling")
    """The folder for this run's files."""
    resume: Path | None = None
    """The folder of a run to go on with, on any number of processes."""

    @property
    def steps(self) -> int:
        """In an epoch."""
        return -(-self.rows // self.batch_size)


def check(settings: Scaling) -> None:
    """What one process can be asked to do, and all of them.

    Raises:
        BadInput: a number is out of its range, or they do not fit each other.
    """
    at_least(1, settings, "processes", "devices", "rows", "features", "classes")
    at_least(1, settings, "batch_size", "checkpoint_every")
    at_least(0, settings, "epochs")
    takes_seed(settings)
    mesh_shape(settings)


def mesh_shape(settings: Scaling) -> tuple[int, int]:
    """(data, model).

    Raises:
        BadInput: the mesh is not written as it should be, or does not fit.
    """
    devices = settings.processes * settings.devices
    model = 2 if devices % 2 == 0 and settings.classes % 2 == 0 else 1
    data = devices // model
    if settings.mesh is not None:
        data, model = sizes(settings.mesh)
        if data * model != devices:
            raise BadInput(
                f"--mesh {settings.mesh} has {data * model} devices, but --processes "
                f"times --devices are {devices}."
            )
    if settings.batch_size % data or settings.classes % model:
        raise BadInput(
            f"--batch-size {settings.batch_size} must divide among {data} data shards, "
            f"--classes {settings.classes} among {model} model shards."
        )
    return data, model


def gone_on_with(settings: Scaling) -> Scaling:
    """The settings of the run, on the processes that there are now.

    Raises:
        BadInput: there is no such run, or a flag contradicts it.
    """
    folder = settings.resume or settings.out
    try:
        begun = json.loads((folder / run_folder.CONFIG).read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"There is no run to go on with in {folder} ({reason}): name one that "
            "--out made."
        ) from None
    if not isinstance(begun, dict) or not begun.keys() >= set(DECISIVE):
        raise BadInput(
            f"The run in {folder} is of another experiment: name one that "
            "experiments.scaling made."
        )
    settings = Scaling(**{name: begun[name] for name in DECISIVE})
    asked = parse_again(folder, settings, DECISIVE, sys.argv[1:], program="scaling")
    return replace(asked, out=folder, resume=folder)
