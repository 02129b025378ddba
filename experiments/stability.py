"""What exp, softmax and cross-entropy lose, where, and what it costs to lose nothing.

python -m experiments.stability [--quick] [--out DIR]

Answers the discussion of "Softmax Regression Implementation from Scratch" (d2l.ai) and
the chapter's first two exercises on one page: stability.md, with its numbers in
stability.json and its figures beside it.
"""

import bisect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import report, stability_page
from experiments.command import main, make_folder, results_folder
from experiments.files import save_json, save_text
from experiments.measure import interleave
from experiments.stability_rivals import (
    SOFTMAXES,
    exact_losses,
    exact_softmax,
    relative_error,
    rivals,
    ulp_error,
)

DTYPES = ("float32", "bfloat16", "float16")
SPREAD = "1000 of N(0, 10)"
LOGITS: dict[str, np.ndarray] = {
    "[1, 1]": np.array([1, 1]),
    "[1, 10]": np.array([1, 10]),
    "[1, 100]": np.array([1, 100]),
    "[100, 104]": np.array([100, 104]),
    "[1000, 1004]": np.array([1000, 1004]),
    "[-104, -100]": np.array([-104, -100]),
    "[-1004, -1000]": np.array([-1004, -1000]),
    SPREAD: np.random.default_rng(0).normal(0, 10, (256, 1000)),
}
"""The thread's rows; one pair of logits at four places; and a wide vocabulary."""

PARTS = ("loss", "gradient")
SHAPES, QUICK_SHAPES = ((65536, 10), (8192, 1000)), ((256, 10),)
MARGINS, DRAWS = np.arange(101), 64
OFFSETS = np.arange(-150, 151)


@dataclass(frozen=True)
class Settings:
    """Measure errors and times; write one page, its numbers and its figures."""

    out: Path | None = None
    """Where stability.md, stability.json and the figures go; by default
    experiments/results/stability, with --quick runs/stability-quick."""
    quick: bool = False
    """Time small batches for a moment only."""


def run(settings: Settings) -> None:
    """Measure, print, save."""
    out = results_folder("stability", settings.out, quick=settings.quick)
    make_folder(out)
    busy = round(os.getloadavg()[0], 1)
    shapes, seconds = (QUICK_SHAPES, 0.1) if settings.quick else (SHAPES, 5.0)
    found = {
        "environment": report.environment() | {"load_average": busy},
        "exp": exp_limits(),
        "softmax": softmax_errors(),
        "offsets": offset_errors(),
        "losses": loss_errors(),
        "margins": margin_errors(),
        "costs": costs(shapes, seconds),
    }
    page = stability_page.page(found)
    save_text(out / "stability.md", page)
    save_json(out / "stability.json", found)
    stability_page.draw_offsets(found, out / stability_page.OFFSET)
    stability_page.draw_margins(found, out / stability_page.MARGIN)
    report.say(page)
    names = ("stability.md", "stability.json", *stability_page.PICTURES)
    report.say(f"Files: {', '.join(str(out / name) for name in names)}")


def exp_limits() -> dict[str, dict[str, float]]:
    """Up to where exp is finite, down to where it has all its digits, and any."""
    return {
        dtype: {
            "finite_up_to": _last(dtype, 1, lambda e, _: math.isfinite(e)),
            "all_digits_down_to": _last(dtype, -1, lambda e, tiny: e >= tiny),
            "positive_down_to": _last(dtype, -1, lambda e, _: e > 0),
        }
        for dtype in DTYPES
    }


def _last(dtype: str, sign: int, holds: Callable[[float, float], bool]) -> float:
    """The number furthest from 0 for whose exp something holds.

    By bisection: the bit patterns of a type's positive numbers are in order.
    """
    kind = jnp.finfo(dtype)
    word, tiny = f"uint{kind.bits}", float(kind.tiny)

    def number(bits: int) -> np.ndarray:
        return np.array(bits, word).view(jnp.dtype(dtype)) * np.array(sign, dtype)

    most = int(np.array(kind.max, dtype).view(word))
    fails = bisect.bisect_left(
        range(most),
        True,
        key=lambda bits: not holds(float(jnp.exp(number(bits))), tiny),
    )
    return float(number(fails - 1))


def softmax_errors() -> list[dict[str, Any]]:
    """Each softmax on each row of logits, operation by operation as in a notebook."""
    rows = []
    for dtype in DTYPES:
        for name, numbers in LOGITS.items():
            z = jnp.asarray(numbers, dtype)
            exact = exact_softmax(np.asarray(z))
            row: dict[str, Any] = {"dtype": dtype, "logits": name}
            for method, softmax in SOFTMAXES.items():
                got = softmax(z)
                row[method] = {"worst_ulp": ulp_error(got, exact).max()}
                if name != SPREAD:
                    row[method]["probs"] = np.asarray(got, np.float64)
            rows.append(row)
    return rows


def batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """float32 logits and labels, from ordinary to certain to hopeless."""
    random = np.random.default_rng(0)

    def normal(scale: float, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
        z = random.normal(0, scale, (rows, classes)).astype(np.float32)
        return z, random.integers(0, classes, rows)

    z, y = normal(1, 4096, 10)
    return {
        "ordinary, N(0, 1)": (z, y),
        "1000 classes, N(0, 10)": normal(10, 512, 1000),
        "offset of 1e6": (z + np.float32(1e6), y),
        "certain, by 12": (with_margin(z, y, 12), y),
        "certain, by 20": (with_margin(z, y, 20), y),
        "certain, by 60": (with_margin(z, y, 60), y),
        "certain, by 120": (with_margin(z, y, 120), y),
        "mistaken, by 120": (with_margin(z, y, -120), y),
    }


def with_margin(z: np.ndarray, y: np.ndarray, margin: float) -> np.ndarray:
    """The logits, with the label's set to the largest of the others plus a margin."""
    z, rows = z.copy(), np.arange(len(y))
    z[rows, y] = -np.inf
    z[rows, y] = z.max(-1) + np.float32(margin)
    return z


def loss_errors() -> list[dict[str, Any]]:
    """Worst and median error of each rival's losses and gradients on each batch."""
    rows = []
    for batch, (z, y) in batches().items():
        row: dict[str, Any] = {"batch": batch, "loss": {}, "gradient": {}}
        exact = exact_losses(z, y)
        for name, rival in rivals().items():
            for what, got, want in zip(PARTS, rival.results(z, y), exact, strict=True):
                errors = ulp_error(got, want)
                row[what][name] = {
                    "worst_ulp": errors.max(),
                    "median_ulp": np.median(errors),
                }
        rows.append(row)
    return rows


def costs(shapes: Sequence[tuple[int, int]], seconds: float) -> list[dict[str, Any]]:
    """Median milliseconds and temporary memory of each rival, without and with grad."""
    rows = []
    for shape in shapes:
        random = np.random.default_rng(0)
        z = random.normal(size=shape).astype(np.float32)
        y = random.integers(0, shape[-1], shape[0])
        all_rivals = rivals().items()
        for work, contenders in (
            ("loss", {name: r.losses(z, y) for name, r in all_rivals}),
            ("with gradient", {name: r.with_gradient(z, y) for name, r in all_rivals}),
        ):
            timings = interleave(contenders, seconds=seconds)
            rows.append(
                {
                    "shape": " x ".join(map(str, shape)),
                    "work": work,
                    "milliseconds": {n: 1e3 * t.median for n, t in timings.items()},
                    "temp_bytes": {n: c.temp_bytes for n, c in contenders.items()},
                    "rounds": len(next(iter(timings.values())).seconds),
                }
            )
    return rows


def margin_errors() -> dict[str, Any]:
    """The worst relative error of loss and gradient at each margin of the label."""
    random = np.random.default_rng(0)
    z = random.normal(size=(DRAWS, 10)).astype(np.float32)
    y = random.integers(0, 10, DRAWS)
    logits = np.concatenate([with_margin(z, y, float(margin)) for margin in MARGINS])
    labels = np.tile(y, len(MARGINS))
    exact = exact_losses(logits, labels)
    found: dict[str, Any] = {"margin": MARGINS, "flushed_from": {}} | {
        part: {} for part in PARTS
    }
    for part, want in zip(PARTS, exact, strict=True):
        smallest = np.abs(want).reshape(len(MARGINS), -1).min(-1)
        found["flushed_from"][part] = MARGINS[smallest < np.finfo(np.float32).tiny][0]
    for name, rival in rivals().items():
        results = rival.results(logits, labels)
        for what, got, want in zip(PARTS, results, exact, strict=True):
            worst = relative_error(got, want).reshape(len(MARGINS), -1).max(-1)
            found[what][name] = _rounded(worst)
    return found


def offset_errors() -> dict[str, Any]:
    """The worst relative error of each softmax of [c, c + 4], by type and c."""
    errors: dict[str, Any] = {}
    for dtype in DTYPES:
        z = jnp.asarray(OFFSETS[:, None] + np.array([0, 4]), dtype)
        exact = exact_softmax(np.asarray(z))
        errors[dtype] = {
            name: _rounded(relative_error(np.asarray(softmax(z)), exact).max(-1))
            for name, softmax in SOFTMAXES.items()
        }
    return {"offset": OFFSETS, "relative_error": errors}


def _rounded(errors: np.ndarray) -> list[float]:
    return [float(f"{error:.3g}") for error in errors]


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="stability")
