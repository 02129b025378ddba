"""Two devices: what does it cost that each is a process of its own?

    python -m experiments.scaling overhead

The same training on the same mesh of two devices, by 1 process x 2 devices, which share
memory, and by 2 processes x 1 device, which talk by gloo. In one step of N rows, D
features and V classes there travel

    data=2,model=1    the gradient of w and b             (D + 1) V numbers
    data=1,model=2    a few numbers for each of N rows; nothing of D or V

Overhead is the time of a step by two processes / by one of two devices. Both take
turns, and a busy machine only ever adds: so the fastest step of all rounds counts, and
beside it stands the ratio of medians, with its range over rounds. Below 1, two
processes are faster, each with threads of its own.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments import report, run_folder
from experiments.command import (
    Failed,
    at_least,
    make_folder,
    quickened,
    results_folder,
)
from experiments.files import save_json

MESHES = "data=2,model=1", "data=1,model=2"
WAYS = {"1 process x 2 devices": (1, 2), "2 processes x 1 device": (2, 1)}


@dataclass(frozen=True)
class Overhead:
    """Compare 2 processes x 1 device with 1 process x 2 devices."""

    rounds: int = 5
    """Runs of each."""
    batch_size: int = 256
    """Rows per update."""
    features: int = 512
    """Numbers that describe an example."""
    classes: int = 2048
    """Columns of w."""
    steps: int = 20
    """Updates in a run."""
    out: Path | None = None
    """The folder for overhead.json; by default experiments/results/scaling, with
    --quick runs/scaling-quick."""
    quick: bool = False
    """Two rounds of three small steps: a check that everything works."""


def run(settings: Overhead) -> None:
    at_least(2, settings, "rounds", "batch_size", "features", "classes", "steps")
    out = results_folder("scaling", settings.out, quick=settings.quick)
    settings = quickened(settings, rounds=2, batch_size=16, steps=3)
    make_folder(out)
    seconds: dict[str, dict[str, list[list[float]]]] = {
        mesh: {way: [] for way in WAYS} for mesh in MESHES
    }
    for number in range(settings.rounds):
        for mesh in MESHES:
            for way in list(WAYS) if number % 2 else reversed(WAYS):
                seconds[mesh][way].append(_step_seconds(settings, mesh, *WAYS[way]))
        report.say(f"round {number + 1} of {settings.rounds}")
    rows = {mesh: _compared(found) for mesh, found in seconds.items()}
    report.say(
        report.table(
            ["mesh", *(f"{way}, ms" for way in WAYS), "overhead", "of medians"],
            [
                [
                    mesh,
                    *(f"{1e3 * row['fastest'][way]:.2f}" for way in WAYS),
                    f"{row['overhead']:.2f}",
                    "{:.2f} ({:.2f} to {:.2f})".format(*row["of_medians"]),
                ]
                for mesh, row in rows.items()
            ],
        )
    )
    found = {"settings": settings.__dict__, "meshes": rows}
    path = out / "overhead.json"
    save_json(path, found | {"environment": report.environment()})
    report.say(f"Written: {path}")


def _compared(runs: dict[str, list[list[float]]]) -> dict[str, Any]:
    """From the seconds of the steps of each run."""
    fastest = {way: min(map(min, steps)) for way, steps in runs.items()}
    medians = {way: [*map(median, steps)] for way, steps in runs.items()}
    one, two = WAYS
    ratios = [b / a for a, b in zip(medians[one], medians[two], strict=True)]
    return {
        "medians": medians,
        "fastest": fastest,
        "overhead": fastest[two] / fastest[one],
        "of_medians": [median(ratios), min(ratios), max(ratios)],
    }


def _step_seconds(
    settings: Overhead, mesh: str, processes: int, devices: int
) -> list[float]:
    """Of one run, without the first step, which compiles."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "processes": processes,
            "devices": devices,
            "mesh": mesh,
            "rows": settings.batch_size * settings.steps,
            "features": settings.features,
            "classes": settings.classes,
            "batch-size": settings.batch_size,
            "epochs": 1,
            "checkpoint-every": settings.steps + 1,
            "out": folder,
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        done = subprocess.run(
            [sys.executable, "-m", "experiments.scaling", *words],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Failed(
                f"{processes} processes with --mesh {mesh} ended with exit code "
                f"{done.returncode}: {done.stderr.strip()[-300:]}"
            )
        summary = json.loads((Path(folder) / run_folder.SUMMARY).read_text())
        return summary["step_seconds"]
