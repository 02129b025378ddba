"""Pictures of gradient errors: against the margin, and against the step."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import gradient_roads as roads
from experiments.files import save_figure
from experiments.gradient_curves import MarginCurves, StepCurves

STYLES: dict[str, dict[str, Any]] = {
    roads.DIFFERENCES: {"color": "#bbbbbb", "linewidth": 1},
    roads.TEXTBOOK: {"color": "#9467bd"},
    roads.STABLE: {"color": "#ff7f0e", "linewidth": 5, "alpha": 0.45},
    roads.OPTAX: {"color": "#8c564b", "linestyle": "--"},
    roads.TORCH: {"color": "#d62728", "linestyle": ":", "linewidth": 2},
    roads.CLOSED: {"color": "#1f77b4", "linestyle": "-."},
    roads.OURS: {"color": "#2ca02c", "linewidth": 2.5},
}


def draw_margins(panels: Sequence[MarginCurves], path: Path) -> None:
    """Error against margin, a panel for each function and type."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(11, 3.3 * lines + 1.2), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axes, curves in zip(grid.flat, panels, strict=True):
        wrong = 2.0 ** (jnp.finfo(curves.dtype).nmant + 1)
        top = 60 * wrong
        for road in STYLES:
            if road in curves.ulps:
                _margin_line(axes, curves, road, top)
        axes.axhline(wrong, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        axes.annotate(
            "100 % wrong",
            (0.99, wrong),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.set_yscale("log")
        axes.set_ylim(0.2, 3 * top)
        axes.set_title(f"{curves.title}: {curves.dtype}", fontsize=11)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("margin of the winning logit, which is the label's")
    for axes in grid[:, 0]:
        axes.set_ylabel("largest error of the gradient in ULP")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), fontsize=9
    )
    figure.suptitle("On the upper edge: far more, or (a cross) NaN or infinite")
    save_figure(path, figure)


def _margin_line(axes: Axes, curves: MarginCurves, road: str, top: float) -> None:
    margins, ulps = np.asarray(curves.margins), np.asarray(curves.ulps[road])
    finite = np.isfinite(ulps)
    seen = np.where(finite, np.clip(ulps, 0.25, top), np.nan)
    axes.plot(margins, seen, label=road, **STYLES[road])
    crosses = np.full((~finite).sum(), top)
    axes.plot(margins[~finite], crosses, "x", color=STYLES[road]["color"], markersize=5)


def draw_steps(curves: Sequence[StepCurves], path: Path) -> None:
    """The V of differences: rounding to the left, truncation to the right."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    for color, found in zip(("#1f77b4", "#d62728", "#2ca02c"), curves, strict=False):
        axes.loglog(
            found.steps,
            _drawn(found.central),
            "o-",
            color=color,
            markersize=3,
            label=f"{found.dtype}: central",
        )
        axes.loglog(
            found.steps,
            _drawn(found.richardson),
            "--",
            color=color,
            label=f"{found.dtype}: Richardson",
        )
        if found.autodiff > 0:
            label = f"{found.dtype}: autodiff"
            axes.axhline(found.autodiff, color=color, linestyle=":", label=label)
        for power, errors, marker in (
            (1 / 3, found.central, "v"),
            (1 / 5, found.richardson, "^"),
        ):
            step = float(jnp.finfo(found.dtype).eps) ** power
            known = np.isfinite(errors)
            logs = np.log(found.steps)[known], np.log(_drawn(errors))[known]
            height = np.exp(np.interp(np.log(step), *logs))
            axes.plot(step, height, marker, color=color, markersize=9, mec="black")
    axes.set(
        xlabel="step h, as a share of max(|w|, 1)",
        ylabel="median relative error of the largest entries",
        title="Triangles: the default steps,\n"
        "eps^(1/3) of central differences (down), eps^(1/5) of Richardson's (up)",
        ylim=(1e-17, 30),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    save_figure(path, figure)


def _drawn(errors: Sequence[float]) -> np.ndarray:
    # A step that rounds to nothing gives no number, and a gap in the line.
    return np.clip(np.asarray(errors), 1e-17, 10)
