"""To the optimum: our full-batch solvers against scikit-learn's.

python -m experiments.solvers --dataset fashion_mnist

Every contender minimises scikit-learn's objective with C = 1 on the same pixels, taken
as float32 for all. scikit-learn's lbfgs and newton-cg make one run each, watched from
within: whenever the objective has been evaluated, its value, its gradient and the time
are kept. So one run shows when the default tolerance is reached, when a tolerance of
1e-8 is, and the curve between; it ends at --limit seconds if not before. saga and ours
have no such window: their curves are made of longer and longer runs from the start.
Ours are compiled before the clock starts, and run before scikit-learn and, as far as
the goals that it has set, again after it: the slower one counts. At last, those of ours
in float64 go on from where they are until the certificate says that the weights are
within 1e-4 of the best ones.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from experiments import report
from experiments.command import (
    BadInput,
    above_zero,
    main,
    make_folder,
    quickened,
    results_folder,
)
from experiments.files import save_json
from experiments.solvers_race import LIMIT, RESOLUTION, RIVAL, draw, race, thinned
from experiments.solvers_runs import (
    NEAR,
    Point,
    Problem,
    finished,
    growing,
    ours,
    problem,
    sklearns,
    watched,
    weights,
)
from jax_softmax import Solution

OURS = {
    "ours lbfgs, float32": ("lbfgs", "float32"),
    "ours newton-cg, float32": ("newton-cg", "float32"),
    "ours lbfgs, float64": ("lbfgs", "float64"),
    "ours newton-cg, float64": ("newton-cg", "float64"),
}
PEERS = {
    "scikit-learn lbfgs, float64": ("lbfgs", "float64"),
    "scikit-learn lbfgs, float32": ("lbfgs", "float32"),
    "scikit-learn newton-cg, float64": ("newton-cg", "float64"),
    "scikit-learn saga, float64": ("saga", "float64"),
}


@dataclass(frozen=True)
class Settings:
    """Race to scikit-learn's own objectives; draw the gap against time."""

    dataset: str = "digits"
    """As for experiments.fashion_mnist."""
    data_dir: Path | None = None
    """As for experiments.fashion_mnist."""
    out: Path | None = None
    """Where DATASET.json and DATASET.png go; by default experiments/results/solvers,
    with --quick runs/solvers-quick."""
    limit: float = 60.0
    """Seconds after which a run of scikit-learn's is stopped."""
    rival_limit: float | None = None
    """The same for its lbfgs in float64, which sets the goals; by default --limit. Ours
    have a quarter of it."""
    ours: tuple[str, ...] = tuple(OURS)
    """Which of ours take part."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Which of scikit-learn's take part."""
    quick: bool = False
    """Digits, one second each."""


def run(settings: Settings) -> None:
    """Measure, print, save, draw."""
    above_zero(settings, "limit")
    if settings.rival_limit is not None:
        above_zero(settings, "rival_limit")
    for flag, names, known in (
        ("--ours", settings.ours, OURS),
        ("--peers", settings.peers, PEERS),
    ):
        for name in names:
            if name not in known:
                options = ", ".join(f'"{known}"' for known in known)
                raise BadInput(f'{flag} "{name}" is none of {options}.')
    if not settings.ours:
        raise BadInput("--ours must be one name or more, got none.")
    if RIVAL not in settings.peers:
        raise BadInput(f'--peers must have "{RIVAL}" among them: it sets the goals.')
    out = results_folder("solvers", settings.out, quick=settings.quick)
    settings = quickened(settings, dataset="digits", limit=1.0, rival_limit=None)
    p = problem(settings.dataset, settings.data_dir)
    make_folder(out)
    curves: dict[str, list[list[Point]]] = {}
    solutions: dict[str, Solution] = {}
    rival_limit = settings.rival_limit or settings.limit

    def run_ours(lowest: float = -np.inf) -> None:
        for name in settings.ours:
            solver, dtype = OURS[name]
            go = partial(_ours_for, p, solver, dtype)
            points, result = growing(p, go, LIMIT * rival_limit, lowest)
            curves.setdefault(name, []).append(points)
            solutions.setdefault(name, result)
            report.say(f"{name}: {points[-1]}, {result.certificate.reason}")

    run_ours()
    for name in settings.peers:
        solver, dtype = PEERS[name]
        if solver == "saga":
            go = partial(_saga_for, p, dtype)
            points, _ = growing(p, go, settings.limit)
        else:
            limit = rival_limit if name == RIVAL else settings.limit
            points = watched(p, solver, dtype, limit)
        curves[name] = [points]
        report.say(f"{name}: {points[-1]}")
    run_ours(min(q.objective for q in curves[RIVAL][0]) + RESOLUTION)
    for name, result in list(solutions.items()):
        solver, dtype = OURS[name]
        if dtype == "float64" and result.certificate.distance > NEAR:
            solutions[f"{name}, gone on with"] = finished(p, solver, result)
    w, b = min(map(weights, solutions.values()), key=lambda found: p.objective(*found))
    minimum = min(p.objective(w, b), *(q[-1].objective for q, *_ in curves.values()))
    accuracy = {
        name: {
            "largest_difference": max(
                float(np.abs(weights(result)[0] - w).max()),
                float(np.abs(weights(result)[1] - b).max()),
            ),
            **result.certificate._asdict(),
        }
        for name, result in solutions.items()
    }
    for name, end in accuracy.items():
        report.say(
            f"{name}: ends within {end['largest_difference']:.1e} of the best "
            f"coefficients, by its certificate {end['distance']:.1e} from the optimum"
        )
    rows = race(curves, minimum, rival_limit)
    save_json(
        out / f"{settings.dataset}.json",
        {
            "environment": report.environment(),
            "rows": len(p.labels),
            "minimum": minimum,
            "race": rows,
            "ends": accuracy,
            "curves": {
                name: [[list(q) for q in thinned(points)] for points in runs]
                for name, runs in curves.items()
            },
        },
    )
    draw(settings.dataset, curves, minimum, rows, out)
    report.say(f"Files: {settings.dataset}.json and .png in {out}")


def _ours_for(p: Problem, solver: str, dtype: str, iterations: int) -> Solution:
    return ours(p, solver, dtype, tolerance=0.0, max_iterations=iterations)


def _saga_for(p: Problem, dtype: str, iterations: int) -> LogisticRegression:
    return sklearns(p, "saga", dtype, tol=0, max_iter=iterations)


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="solvers")
