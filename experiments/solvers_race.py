"""Who is first at the objectives at which scikit-learn's lbfgs ends, and the curves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import report
from experiments.files import save_figure
from experiments.solvers_runs import Point

TOLERANCES = {"default tolerance, 1e-4": 1e-4, "tolerance 1e-8": 1e-8}
RIVAL = "scikit-learn lbfgs, float64"
LIMIT = 0.25  # of scikit-learn's time
RESOLUTION = 1e-13  # what rounding leaves of an objective in float64


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
    save_figure(out / f"{name}.png", figure)


def thinned(points: list[Point]) -> Iterator[Point]:
    """At most a hundred points, evenly spaced in the logarithm of their number."""
    wanted = np.unique(np.geomspace(1, len(points), 100).astype(int)) - 1
    return (points[i] for i in wanted)
