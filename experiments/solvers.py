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
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model._linear_loss import LinearModelLoss

from experiments import data, report
from experiments.command import BadInput, above_zero, main, make_folder, results_folder
from experiments.images import pixels
from jax_softmax import SoftmaxRegression, Solution, solve

TOLERANCES = {"default tolerance, 1e-4": 1e-4, "tolerance 1e-8": 1e-8}
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
RIVAL = "scikit-learn lbfgs, float64"
GROWTH = 2  # of the runs of a curve
LIMIT = 0.25  # of scikit-learn's time
NEAR = 1e-4  # in the 2-norm of all weights
RESOLUTION = 1e-13  # what rounding leaves of an objective in float64


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


class Problem(NamedTuple):
    """Features in float32, exactly the same for every contender."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    classes: int

    @property
    def l2(self) -> float:
        return 1 / len(self.labels)

    def objective(self, w: np.ndarray, b: np.ndarray) -> float:
        """In float64, block by block."""
        total = 0.0
        for start in range(0, len(self.labels), 4096):
            rows = slice(start, start + 4096)
            z = self.features[rows].astype(np.float64) @ w + b
            labels = self.labels[rows]
            z -= z.max(1, keepdims=True)
            total += (np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).sum()
        return float(total / len(self.labels) + self.l2 / 2 * (w**2).sum())


class Point(NamedTuple):
    """After so long, the objective was this."""

    seconds: float
    objective: float
    steepest: float = np.inf  # largest entry of the gradient, where it is known


class TimeIsUp(Exception):
    """The limit has been reached."""


def problem(name: str, data_dir: Path | None) -> Problem:
    """A data set's training images."""
    dataset = data.load(name, data_dir)
    images, labels = dataset.train_images, dataset.train_labels
    features = np.asarray(pixels(images))
    return Problem(name, images, labels, features, len(dataset.class_names))


def ours(
    p: Problem,
    solver: str,
    dtype: str,
    start: SoftmaxRegression | None = None,
    **options: Any,
) -> Solution:
    """Our solver, by default from zero, on the images as they are."""
    with jax.enable_x64(dtype == "float64"):
        if start is None:
            zeros = jnp.zeros((p.features.shape[1], p.classes), dtype)
            start = SoftmaxRegression(zeros, zeros[0])
        options = {"solver": solver, "l2": p.l2, "transform": pixels} | options
        return solve(start, p.images, p.labels, **options)


def sklearns(p: Problem, solver: str, dtype: str, **options: Any) -> LogisticRegression:
    """scikit-learn's solver from zero."""
    features = p.features.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs do not converge, and say so
        model = LogisticRegression(C=1.0, solver=solver, random_state=0, **options)
        return model.fit(features, p.labels)


def weights(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of our solution or scikit-learn's estimator, in float64."""
    if isinstance(result, Solution):
        w, b = result.model
    else:
        w, b = result.coef_.T, result.intercept_
    return np.asarray(w, np.float64), np.asarray(b, np.float64)


def growing(
    p: Problem, go: Callable[[int], Any], limit: float, lowest: float = -np.inf
) -> tuple[list[Point], Any]:
    """Longer and longer runs from the start, until they end by themselves, late or low.

    Low is at the objective `lowest`.
    """
    points: list[Point] = []
    iterations, result = 1, go(1)  # compiles
    while not points or points[-1].seconds * GROWTH < limit:
        started = time.perf_counter()
        result = go(iterations)
        took = time.perf_counter() - started
        points.append(Point(took, p.objective(*weights(result))))
        if isinstance(result, Solution) and result.certificate.iterations < iterations:
            break
        if points[-1].objective <= lowest:
            break
        iterations = max(iterations + 1, round(iterations * GROWTH))
    return points, result


def watched(p: Problem, solver: str, dtype: str, limit: float) -> list[Point]:
    """One run of scikit-learn's with tolerance 1e-8, and what it saw on its way."""
    points: list[Point] = []
    inside = {"lbfgs": "loss_gradient", "newton-cg": "gradient_hessian_product"}[solver]
    plain = getattr(LinearModelLoss, inside)
    started = time.perf_counter()

    def noted(self: Any, coef: np.ndarray, *args: Any, **options: Any) -> Any:
        first, second = result = plain(self, coef, *args, **options)
        now = time.perf_counter() - started
        gradient = second if solver == "lbfgs" else first
        steepest = float(np.abs(gradient).max())
        value = float(first) if solver == "lbfgs" else p.objective(*_unravelled(coef))
        points.append(Point(now, value, steepest))
        if now > limit:
            raise TimeIsUp
        return result

    def _unravelled(coef: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = coef.reshape((p.classes, -1), order="F").T.astype(np.float64)
        return both[:-1], both[-1]

    with mock.patch.object(LinearModelLoss, inside, noted):
        try:
            sklearns(p, solver, dtype, tol=1e-8, max_iter=10**6)
        except TimeIsUp:
            report.say(f"scikit-learn {solver}, {dtype}: stopped at {limit:g} s")
    return points


def finished(p: Problem, solver: str, result: Solution) -> Solution:
    """On from there until the certified distance of the weights is small enough."""
    tolerance = NEAR * p.l2 / 2
    options = {"tolerance": tolerance, "max_iterations": 2000}
    return ours(p, solver, "float64", start=result.model, **options)


def goals(points: list[Point]) -> dict[str, tuple[Point, bool]]:
    """Where each tolerance ends the run, and whether the run got there.

    lbfgs stops at the first iterate whose gradient has no entry above the tolerance; a
    run with a lower tolerance takes the same steps and more.
    """
    ends = {}
    for name, tolerance in TOLERANCES.items():
        there = [point for point in points if point.steepest <= tolerance]
        ends[name] = (there[0], True) if there else (points[-1], False)
    return ends


def lowest_by(points: list[Point], end: Point) -> float:
    """The lowest objective that had been seen then."""
    return min(point.objective for point in points if point.seconds <= end.seconds)


def race(
    curves: dict[str, list[list[Point]]], minimum: float, limit: float
) -> list[dict[str, Any]]:
    """Our time to each objective at which scikit-learn's lbfgs ends, and the ratio.

    If lbfgs was stopped by the limit or by rounding before the tolerance, the goal is
    the lowest objective that it saw; how far above the minimum that is, is told.
    """
    rows = []
    for name, (end, reached) in goals(curves[RIVAL][0]).items():
        goal = lowest_by(curves[RIVAL][0], end)
        stopped = not reached and end.seconds >= limit
        for contender, runs in curves.items():
            if not contender.startswith("ours"):
                continue
            firsts = [
                next((q.seconds for q in run if q.objective <= goal + RESOLUTION), None)
                for run in runs
            ]
            seconds = None if None in firsts else max(q for q in firsts if q)
            ratio = seconds / end.seconds if seconds else None
            rows.append(
                {
                    "target": name,
                    "objective": goal,
                    "gap": goal - minimum,
                    "peer_seconds": end.seconds,
                    "peer_was_stopped": stopped,
                    "peer_reached_tolerance": reached,
                    "contender": contender,
                    "seconds": seconds,
                    "ratio": ratio,
                }
            )
            verdict = "does not get there"
            if ratio is not None:
                bound = "" if ratio <= LIMIT else f", above {LIMIT}"
                verdict = f"{seconds:.3g} s, ratio {ratio:.3f}{bound}"
            ended = "ends" if not stopped else "was stopped"
            report.say(
                f"{name}: scikit-learn {ended} at {end.seconds:.3g} s, "
                f"{goal - minimum:.1e} above the minimum; {contender}: {verdict}"
            )
    return rows


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
    if settings.quick:
        settings = replace(settings, dataset="digits", limit=1.0, rival_limit=None)
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
    (out / f"{settings.dataset}.json").write_text(
        report.to_json(
            {
                "environment": report.environment(),
                "rows": len(p.labels),
                "minimum": minimum,
                "race": rows,
                "ends": accuracy,
                "curves": {
                    name: [[list(q) for q in _thinned(points)] for points in runs]
                    for name, runs in curves.items()
                },
            }
        )
    )
    draw(settings.dataset, curves, minimum, rows, out)
    report.say(f"Files: {settings.dataset}.json and .png in {out}")


def draw(
    name: str,
    curves: dict[str, list[list[Point]]],
    minimum: float,
    rows: list[dict[str, Any]],
    out: Path,
) -> None:
    """The gap to the minimum against time, both on logarithmic axes."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, (contender, (points, *_)) in enumerate(curves.items()):
        # Each point is a run of its own: the lowest of those that took no longer.
        points = sorted(points, key=lambda point: point.seconds)
        lowest = np.minimum.accumulate([q.objective for q in points])
        gaps = np.maximum(lowest - minimum, RESOLUTION)
        seconds = [q.seconds for q in points]
        style = "-" if contender.startswith("ours") else "--"
        style += "o" if len(points) < 40 else ""
        axes.plot(seconds, gaps, style, color=f"C{i}", markersize=3, label=contender)
    ends: dict[tuple[float, str], list[str]] = {}
    for row in {row["target"]: row for row in rows}.values():
        seconds = row["peer_seconds"]
        how = f"stopped after {seconds:.0f} s" if row["peer_was_stopped"] else "ends"
        place = max(row["gap"], RESOLUTION), how
        ends.setdefault(place, []).append(row["target"])
    for (gap, how), targets in ends.items():
        axes.axhline(gap, color="black", linewidth=0.8, linestyle=":")
        which = f": {' and '.join(targets)}" if how == "ends" else ""
        text = f"scikit-learn lbfgs {how}{which}"
        line = axes.get_yaxis_transform()
        axes.text(0.01, gap, text, va="bottom", fontsize=8, transform=line)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="seconds (compiling not counted)",
        ylabel="objective - lowest objective found",
        title=f"{name}: softmax regression, C = 1, all rows",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out / f"{name}.png", dpi=120)


def _ours_for(p: Problem, solver: str, dtype: str, iterations: int) -> Solution:
    return ours(p, solver, dtype, tolerance=0.0, max_iterations=iterations)


def _saga_for(p: Problem, dtype: str, iterations: int) -> LogisticRegression:
    return sklearns(p, "saga", dtype, tol=0, max_iter=iterations)


def _thinned(points: list[Point]) -> Iterator[Point]:
    """At most a hundred points, evenly spaced in the logarithm of their number."""
    wanted = np.unique(np.geomspace(1, len(points), 100).astype(int)) - 1
    return (points[i] for i in wanted)


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="solvers")
