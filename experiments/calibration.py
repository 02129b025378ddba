"""How far a classifier's probabilities can be trusted: in numbers and in a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from experiments.files import save_figure
from jax_softmax import (
    Reliability,
    brier_score,
    expected_calibration_error,
    reliability,
    softmax,
    temperature_scaling,
)

BINS = 15


class Calibration(NamedTuple):
    """Of one model on one set of images."""

    ece: Array
    ece_equal_mass: Array
    ece_if_calibrated: Array
    brier: Array
    temperature: Array
    bins: Reliability


@jax.jit
def calibration(logits: ArrayLike, labels: ArrayLike) -> Calibration:
    """Errors over 15 bins, the Brier score, and the temperature that would fit best."""
    probs = softmax(logits)
    bins = reliability(probs, labels, bins=BINS)
    a, rows = bins.confidence, bins.rows
    noise = (2 * rows * a * (1 - a) / np.pi) ** 0.5  # of a calibrated model's bins
    return Calibration(
        expected_calibration_error(probs, labels, bins=BINS),
        expected_calibration_error(probs, labels, bins=BINS, equal_mass=True),
        noise.sum() / rows.sum(),
        brier_score(probs, labels).mean(),
        temperature_scaling(logits, labels).temperature,
        bins,
    )


def sentence(found: Calibration) -> str:
    """What the numbers say."""
    return (
        f"Calibration: ECE {found.ece:.4f} (a calibrated model's is about "
        f"{found.ece_if_calibrated:.4f}), Brier score {found.brier:.4f}, best "
        f"temperature {found.temperature:.3f} (above 1: too sure)"
    )


def as_json(found: Calibration) -> dict[str, Any]:
    """By name."""
    return found._asdict() | {"bins": found.bins._asdict()}


def draw_reliability(found: Mapping[str, Calibration], path: Path) -> None:
    """For each of them, accuracy against confidence, and how many images are where."""
    wide, high = 4.2 * len(found) + 0.6, 4.9
    figure = Figure(figsize=(wide, high))
    # Inches, since matplotlib takes twice the time where it arranges axes itself.
    inches = {"left": 0.65, "right": wide - 0.15, "bottom": 0.5, "top": high - 0.55}
    shares = {
        k: v / (high if k in ("bottom", "top") else wide) for k, v in inches.items()
    }
    grid = figure.subplots(
        2,
        len(found),
        squeeze=False,
        sharex=True,
        height_ratios=(3, 1),
        sharey="row",
        gridspec_kw=shares | {"hspace": 0.06, "wspace": 0.08},
    )
    centres, width = (np.arange(BINS) + 0.5) / BINS, 1 / BINS
    for (upper, lower), (title, one) in zip(grid.T, found.items(), strict=True):
        rows, confidence, accuracy = map(np.asarray, one.bins)
        filled = rows > 0
        noise = 2 * np.sqrt(confidence * (1 - confidence) / np.maximum(rows, 1))
        upper.plot((0, 1), (0, 1), color="#7f7f7f", linewidth=1, label="calibrated")
        upper.errorbar(
            confidence[filled],
            accuracy[filled],
            noise[filled],
            fmt="o-",
            markersize=4,
            capsize=2,
            color="#1f77b4",
            label="a bin, and twice its noise",
        )
        upper.set(title=f"{title}\nECE {one.ece:.4f}, Brier {one.brier:.4f}")
        upper.set(xlim=(0, 1), ylim=(0, 1))
        upper.grid(alpha=0.3)
        lower.bar(centres, rows, width, color="#9ecae1", edgecolor="white")
        lower.set(xlabel="confidence (largest probability)", yscale="log")
        lower.grid(alpha=0.3, axis="y")
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("images")
    grid[0, 0].legend(loc="upper left", fontsize=9)
    save_figure(path, figure)
