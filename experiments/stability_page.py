"""The page of the stability experiment: tables, what to take from each, figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import report
from experiments.files import save_figure
from experiments.stability_rivals import OURS, SOFTMAXES

OFFSET, MARGIN = "offset.png", "margin.png"
PICTURES = {
    OFFSET: "relative error of softmax([c, c + 4]) against c",
    MARGIN: "relative error of loss and gradient against the margin of the label",
}
STYLES: dict[str, dict[str, Any]] = {
    "definition": {"color": "#c7c7c7", "linewidth": 8},
    "indexing": {"color": "#7f7f7f", "linewidth": 5.5},
    "log_softmax": {"color": "#9ecae1", "linewidth": 3.5},
    "optax": {"color": "#1f77b4", "linestyle": "--"},
    "torch": {"color": "#ff7f0e", "linestyle": ":", "linewidth": 2},
    "naive": {"color": "#d62728", "linewidth": 4, "alpha": 0.5},
    "slightly smart": {"color": "#1f77b4", "linestyle": "--", "zorder": 3},
    OURS: {"color": "#2ca02c", "linewidth": 2},
}
"""Lines that coincide stay visible: the wide ones lie below."""


def page(found: dict[str, Any]) -> str:
    """Everything found, as Markdown."""
    sections = (exp_limits, softmaxes, losses, gradients, costs)
    title = "# What softmax and cross-entropy lose, and where\n"
    return "\n".join((title, *(section(found) for section in sections)))


def exp_limits(found: dict[str, Any]) -> str:
    limits = found["exp"]
    return _section(
        "Where exp leaves each type",
        ["type", "finite up to", "all digits down to", "above 0 down to"],
        [[dtype, *(f"{x:.4g}" for x in of.values())] for dtype, of in limits.items()],
        f"Raw logits may not pass {limits['float32']['finite_up_to']:.1f} in float32 "
        f"and bfloat16, nor {limits['float16']['finite_up_to']:.1f} in float16: "
        "beyond, a softmax is inf / inf or 0 / 0, and both are nan.",
    )


def softmaxes(found: dict[str, Any]) -> str:
    rows = found["softmax"]
    many_classes = [row for row in rows if "probs" not in row[OURS]]
    costs = (
        f"{_ulp(row['slightly smart']['worst_ulp'])} ULP in {row['dtype']} "
        f"(ours {_ulp(row[OURS]['worst_ulp'])})"
        for row in many_classes
    )

    def cell(result: dict[str, Any]) -> str:
        probs = [f"{p:.3g}" for p in result.get("probs", ())]
        return " ".join([*probs, f"({_ulp(result['worst_ulp'])})"])

    return _section(
        "Softmax: probabilities, and the worst error in ULP of the type",
        ["type", "logits", *SOFTMAXES],
        [
            [row["dtype"], row["logits"], *(cell(row[method]) for method in SOFTMAXES)]
            for row in rows
        ],
        "Logits that are 4 apart have the same probabilities wherever they lie: "
        "subtracting the maximum cures every nan. But the difference is rounded before "
        f"exp magnifies it: with 1000 classes up to {', '.join(costs)}.",
        picture=OFFSET,
    )


def losses(found: dict[str, Any]) -> str:
    return _section(
        "Cross-entropy in float32: worst (median) error of the loss in ULP",
        *_errors(found, "loss"),
        "Indexing is multiplying by a one-hot: compiled, the same to the last digit "
        "(typed line by line, 0 * log(0) is nan). A probability that has rounded to 0 "
        "makes the loss inf, one that has rounded to 1 makes it 0, and log_softmax, "
        "optax and torch lose that too; ours is within "
        f"{_worst(found, 'loss'):.1f} ULP on every batch.",
        picture=MARGIN,
    )


def gradients(found: dict[str, Any]) -> str:
    return _section(
        "Its gradient: worst (median) error of an entry in ULP",
        *_errors(found, "gradient"),
        "Certain, the library losses round the gradient of the label's logit to 0; the "
        "textbook's keep it, since they differentiate the subtracted maximum too, but "
        "are nan where learning has most to correct; ours is within "
        f"{_worst(found, 'gradient'):.1f} ULP on every batch.",
    )


def costs(found: dict[str, Any]) -> str:
    rows, machine = found["costs"], found["environment"]
    last = rows[-1]
    times, memory = last["milliseconds"], last["temp_bytes"]
    ours = ", ".join(f"{times[OURS] / times[n]:.2f} x {n}" for n in times if n != OURS)

    def megabytes(name: str) -> str:
        return f"{memory[name] / 1e6:.0f} MB"

    return _section(
        "Milliseconds: medians of interleaved runs "
        f"({machine['cores']} cores, load average {machine['load_average']})",
        ["batch", *times],
        [
            [
                f"{row['shape']}, {row['work']}",
                *(f"{ms:.3g}" for ms in row["milliseconds"].values()),
            ]
            for row in rows
        ],
        f"At {last['shape']}, {last['work']}, the one-hot of the definition takes "
        f"{times['definition'] / times['indexing']:.2f} times as long as the index, "
        f"and {megabytes('definition')} of temporaries for {megabytes('indexing')}; "
        f"ours takes {megabytes(OURS)}, and in time {ours}.",
    )


def _errors(
    found: dict[str, Any], what: str
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Header and rows: batches down, rivals across."""
    rows = found["losses"]

    def cell(result: dict[str, float]) -> str:
        worst, median = _ulp(result["worst_ulp"]), _ulp(result["median_ulp"])
        return worst if worst == median else f"{worst} ({median})"

    return ["batch", *rows[0][what]], [
        [row["batch"], *(cell(result) for result in row[what].values())] for row in rows
    ]


def _worst(found: dict[str, Any], what: str) -> float:
    return max(row[what][OURS]["worst_ulp"] for row in found["losses"])


def _ulp(error: float) -> str:
    """2^23 float32 ULP and more: wrong from the first digit on."""
    if not math.isfinite(error):
        return "not finite"
    if error >= 2**23:
        return "all lost"
    return f"{error:.1f}" if error < 9.95 else f"{error:.0f}"


def _section(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    sentence: str,
    picture: str | None = None,
) -> str:
    """A heading, a table that lines up in a terminal too, what to remember of it."""
    table = report.table(header, rows)
    shown = [f"\n![{PICTURES[picture]}]({picture})"] if picture else []
    return "\n".join([f"## {title}\n", table, f"\n{sentence}", *shown, ""])


def draw_margins(found: dict[str, Any], path: Path) -> None:
    """Relative error of the loss and of its gradient against the margin."""
    margins = found["margins"]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what in zip(panels, ("loss", "gradient"), strict=True):
        _lines(axes, margins["margin"], margins[what])
        axes.axvspan(margins["flushed_from"][what], 100, color="#eeeeee", zorder=0)
        axes.text(99, 3e-4, "below 1.2e-38", rotation=90, ha="right", fontsize=9)
        axes.set(title=f"cross-entropy in float32: {what}", yscale="log")
        axes.set(xlim=(0, 100), ylim=(1e-8, 10))
        axes.set_xlabel("margin of the label's logit over the other nine")
    panels[0].set_ylabel("worst relative error (1: all digits lost)")
    _finish(figure, path)


def draw_offsets(found: dict[str, Any], path: Path) -> None:
    """Relative error of each softmax of [c, c + 4] against c, by type."""
    offset, worst = found["offsets"]["offset"], found["offsets"]["relative_error"]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, len(worst), sharey=True)
    for axes, (dtype, errors) in zip(panels, worst.items(), strict=True):
        _lines(axes, offset, errors)
        for c in offset[~np.isfinite(errors["naive"])]:
            axes.axvspan(c - 0.5, c + 0.5, color="#fde0dd", linewidth=0, zorder=0)
        axes.set(title=dtype, xlabel="c", yscale="log", ylim=(1e-9, 10))
        axes.set(xlim=(offset[0], offset[-1]), xticks=(-100, 0, 100))
    panels[0].set_ylabel("worst relative error")
    figure.suptitle("softmax([c, c + 4]): where it is shaded, the naive one is nan")
    _finish(figure, path)


def _lines(axes: Axes, x: np.ndarray, lines: Mapping[str, Sequence[float]]) -> None:
    for name, y in lines.items():
        shown = np.where(np.isfinite(y), y, np.nan)
        axes.plot(x, shown, label=name, **STYLES[name])
    axes.grid(alpha=0.3)


def _finish(figure: Figure, path: Path) -> None:
    """One legend for all panels, below them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    save_figure(path, figure)
