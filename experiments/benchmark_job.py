"""The whole main job, from the start of its process to its exit.

First with nothing compiled yet, then with what that run has left in the user's cache;
data set and packages, as bytecode, are in their caches all along.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments import data, report
from experiments.command import (
    Failed,
    at_least,
    make_folder,
    quickened,
    results_folder,
)
from experiments.files import save_json, save_text
from experiments.measure import with_bytecode

IMPORTS = "import experiments.fashion_mnist, experiments.pictures, orbax.checkpoint"


@dataclass(frozen=True)
class Settings:
    """Time the main job, process and all; write table and JSON."""

    out: Path | None = None
    """Where job.json and job.md go; by default experiments/results/job, with --quick
    runs/job-quick."""
    dataset: str = "fashion_mnist"
    """As for experiments.fashion_mnist."""
    rounds: int = 5
    """Runs of each kind after the first."""
    quick: bool = False
    """One round of the quick job."""


def run(settings: Settings) -> None:
    """Measure, print, save."""
    at_least(1, settings, "rounds")
    settings = quickened(settings, rounds=1)
    folder = results_folder("job", settings.out, quick=settings.quick)
    data.load(settings.dataset, None)  # fetched, or refused, before the clock starts
    make_folder(folder)
    job = ["-m", "experiments.fashion_mnist", "--dataset", settings.dataset]
    job += ["--quick"] if settings.quick else []
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch)
        imports = [_process(["-c", IMPORTS], kept) for _ in range(2)][-1]
        rounds = settings.rounds
        runs = [_timed(job, kept, kept / f"{n}") for n in range(rounds + 1)]
        streamed = [
            _timed([*job, "--stream"], kept, kept / f"s{n}") for n in range(rounds)
        ]
    rows = [
        {"what": "first run: all is compiled"} | runs[0],
        {"what": "later runs, median"} | _medians(runs[1:]),
        {"what": "later runs with --stream, median"} | _medians(streamed),
    ]
    table = _table(rows)
    report.say(table)
    save_text(folder / "job.md", table + "\n")
    facts = {"environment": report.environment(), "imports alone": imports}
    facts |= {"rows": rows, "runs": runs, "streamed": streamed}
    save_json(folder / "job.json", facts)
    report.say(
        f"Imports alone: {imports['seconds']:.2f} s, {imports['peak_megabytes']:.0f} "
        f"MB. Files: {folder}"
    )


def _timed(job: list[str], kept: Path, out: Path) -> dict[str, Any]:
    """Wall and CPU seconds of the process, and what it says of itself."""
    process = _process([*job, "--out", str(out)], kept)
    times = json.loads((out / "times.json").read_text())
    waited = times["waited_for_rows"]
    return process | {"parts": times["seconds"], "waited_for_rows": waited}


def _process(arguments: list[str], kept: Path) -> dict[str, float]:
    programs = {"JAX_COMPILATION_CACHE_DIR": str(kept / "programs")}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        env=with_bytecode(kept / "bytecode") | programs,
    )
    try:
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:  # or it would go on, in a folder that is about to go
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed("The main job failed: see above.")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_megabytes": used.ru_maxrss
        / (2**20 if sys.platform == "darwin" else 2**10),
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {
        name: median(run["parts"][name] for run in runs) for name in runs[0]["parts"]
    }
    numbers = ("seconds", "cpu_seconds", "peak_megabytes", "waited_for_rows")
    return {n: median(run[n] for run in runs) for n in numbers} | {"parts": parts}


def _table(rows: list[dict[str, Any]]) -> str:
    parts = [name for name in rows[0]["parts"] if name != "all"]
    head = ["", "process", "CPU", *parts, "exit", "waited for rows", "MB"]
    lines = []
    for row in rows:
        seconds = [row["parts"][name] for name in parts]
        left = row["seconds"] - row["parts"]["all"]
        shown = [row["seconds"], row["cpu_seconds"], *seconds, left]
        shown.append(row["waited_for_rows"])
        megabytes = f"{row['peak_megabytes']:.0f}"
        lines.append([row["what"], *(f"{s:.2f}" for s in shown), megabytes])
    return report.table(head, lines, numbers_from=1)
