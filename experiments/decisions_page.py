"""The page of the decisions experiment: tables, what to take from each, figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import report
from experiments.calibration import draw_reliability
from experiments.files import save_figure

SCALINGS = ("as trained", "temperature", "vector scaling")
SCORES = ("probabilities", "adaptive", "adaptive, randomised")
RELIABILITY, BY_HEART = "reliability.png", "reliability_by_heart.png"
ABSTENTION, CONFORMAL = "abstention.png", "conformal.png"
PICTURES = (RELIABILITY, BY_HEART, ABSTENTION, CONFORMAL)
COLORS = ("#7f7f7f", "#1f77b4", "#d62728")


def page(found: dict[str, Any]) -> str:
    """Everything found, as Markdown."""
    title = (
        "# Is the most likely label the right answer?\n\n"
        f"{found['dataset']}: the test images are split at random {found['splits']} "
        f"times, {found['held_out']:,} to calibrate on and {found['reported']:,} to "
        f"report on. Means over the splits. `trained` is the model of {found['run']}; "
        f"`by heart` saw {found['by_heart']['images']:,} images "
        f"{found['by_heart']['epochs']} times. `{found['environment']['command']}`\n"
    )
    sections = (calibration_section, costs_section, abstention_section, sets_section)
    return "\n".join((title, *(section(found) for section in sections)))


def calibration_section(found: dict[str, Any]) -> str:
    rows = []
    for name, of in found["classifiers"].items():
        for i, scaling in enumerate(SCALINGS):
            rows.append(
                [
                    f"{name}, {scaling}",
                    *(
                        f"{_mean(of, what)[i]:.4f}"
                        for what in ("ece", "ece_equal_mass", "ece_if_calibrated")
                    ),
                    *(f"{_mean(of, what)[i]:.4f}" for what in ("brier", "loss")),
                    *(f"{_mean(of, w)[i]:.4f}" for w in ("accuracy", "top_3_accuracy")),
                ]
            )
    header = ["classifier", "ECE", "of equal mass", "if calibrated"]
    header += ["Brier score", "loss", "accuracy", "top 3"]
    told = (
        f"{name}: T = {_mean(of, 'temperature'):.3f} "
        f"± {of['temperature']['deviation']:.3f}"
        for name, of in found["classifiers"].items()
    )
    sentence = (
        f"Best temperatures: {'; '.join(told)}. ECE has 15 bins; even a calibrated "
        "model's is not 0 (expected_calibration_error names the biases)."
    )
    pictures = (RELIABILITY, BY_HEART)
    return _section("Calibration", header, rows, sentence, pictures)


def costs_section(found: dict[str, Any]) -> str:
    rows, saved = [], []
    for name, of in found["classifiers"].items():
        most_likely, least = _mean(of, "argmax_cost"), _mean(of, "least_cost")
        rows.append([name, f"{most_likely:.4f}", *(f"{cost:.4f}" for cost in least)])
        saved.append(f"{1 - least[1] / most_likely:.1%} ({name})")
    return _section(
        f"Cost: to miss {found['costly_class']} costs {found['times']:g}, any other "
        "error 1",
        ["classifier", "argmax", *(f"least cost, {scaling}" for scaling in SCALINGS)],
        rows,
        "Mean cost of an image. After temperature scaling the decisions of least "
        f"expected cost save {' and '.join(saved)} of what the likeliest label costs.",
    )


def abstention_section(found: dict[str, Any]) -> str:
    prices = np.asarray(found["prices"])
    shown = [int(np.abs(prices - price).argmin()) for price in (0.05, 0.1, 0.2, 0.4)]
    rows = [
        [
            f"{name}, {scaling}",
            *(
                f"{_mean(of, 'decided')[i, j]:.1%}, "
                f"{_mean(of, 'error_when_decided')[i, j]:.1%}, "
                f"{_mean(of, 'abstaining_cost')[i, j]:.3f}"
                for j in shown
            ),
        ]
        for name, of in found["classifiers"].items()
        for i, scaling in enumerate(SCALINGS)
    ]
    return _section(
        "Abstention: share decided, error rate of these, mean cost (an error costs 1)",
        ["classifier", *(f"no decision costs {prices[j]:g}" for j in shown)],
        rows,
        "A classifier that is too sure decides too often, and one that is not sure "
        "enough too seldom: calibrated, it abstains where that is cheaper.",
        (ABSTENTION,),
    )


def sets_section(found: dict[str, Any]) -> str:
    n = found["held_out"]
    rows = []
    for name, of in found["classifiers"].items():
        for i, score in enumerate(SCORES):
            coverage, spread = _mean(of, "coverage")[i], of["coverage"]["deviation"][i]
            size = _mean(of, "set_size")[i]
            rows.append(
                [
                    f"{name}, {score}",
                    *(
                        f"{c:.4f} ± {d:.4f}, {s:.2f}"
                        for c, d, s in zip(coverage, spread, size, strict=True)
                    ),
                ]
            )
    return _section(
        "Conformal prediction sets: coverage ± its deviation over splits, mean size",
        ["classifier, score", *(f"promised {1 - m:g}" for m in found["miss_rates"])],
        rows,
        f"The promise is 1 - miss rate at least, and {1 / (n + 1):.4f} more at most "
        "where scores are not tied, on average over splits. Adaptive scores that are "
        "not randomised are tied at the likeliest class, which alone may cover more.",
        (CONFORMAL,),
    )


def draw(found: dict[str, Any], findings: Mapping[str, Any], folder: Path) -> None:
    """All figures; reliability is the first split's."""
    for name, picture in zip(findings, (RELIABILITY, BY_HEART), strict=True):
        of = findings[name]
        temperature = float(of.temperature[0])
        titles = (SCALINGS[0], f"temperature {temperature:.3f}", SCALINGS[2])
        parts = {
            f"{name}, {title}": jax.tree.map(
                lambda leaf, i=i: leaf[0, i], of.calibrated
            )
            for i, title in enumerate(titles)
        }
        draw_reliability(parts, folder / picture)
    _draw_abstention(found, folder / ABSTENTION)
    _draw_conformal(found, folder / CONFORMAL)


def _draw_abstention(found: dict[str, Any], path: Path) -> None:
    """Cost against the price of no decision, and error against share decided."""
    classifiers = found["classifiers"]
    figure = Figure(figsize=(10, 4 * len(classifiers)), layout="constrained")
    grid = figure.subplots(len(classifiers), 2, squeeze=False)
    prices = np.asarray(found["prices"])
    for (left, right), (name, of) in zip(grid, classifiers.items(), strict=True):
        for i, (scaling, color) in enumerate(zip(SCALINGS, COLORS, strict=True)):
            style = {"color": color, "label": scaling}
            style["linestyle"] = "--" if i == 2 else "-"
            left.plot(prices, _mean(of, "abstaining_cost")[i], **style)
            decided = _mean(of, "decided")[i]
            right.plot(decided, _mean(of, "error_when_decided")[i], **style)
        least = min(prices[-1], 1 - float(_mean(of, "accuracy")[0]))
        left.axhline(least, color="black", linewidth=0.8, linestyle=":")
        left.text(0, least * 1.02, "never abstaining", va="bottom")
        left.set_ylim(0, 1.2 * least)
        _finish(left, f"{name}: mean cost (an error costs 1)", "price of no decision")
        _finish(right, f"{name}: error rate of decided images", "share decided")
    grid[0, 0].legend(loc="lower right")
    save_figure(path, figure)


def _draw_conformal(found: dict[str, Any], path: Path) -> None:
    """Coverage beyond the promise, and set sizes."""
    classifiers, promised = found["classifiers"], 1 - np.asarray(found["miss_rates"])
    figure = Figure(figsize=(10, 4 * len(classifiers)), layout="constrained")
    grid = figure.subplots(len(classifiers), 2, squeeze=False)
    places = np.arange(len(promised))
    for (left, right), (name, of) in zip(grid, classifiers.items(), strict=True):
        for i, (score, color) in enumerate(zip(SCORES, COLORS, strict=True)):
            shifted = places + 0.22 * (i - 1)
            beyond = _mean(of, "coverage")[i] - promised
            spread = of["coverage"]["deviation"][i]
            left.errorbar(shifted, beyond, spread, fmt="o", color=color, capsize=3)
            right.bar(shifted, _mean(of, "set_size")[i], 0.2, color=color, label=score)
        left.axhline(0, color="black", linewidth=0.8)
        _finish(left, f"{name}: coverage minus the promised one", "promised coverage")
        _finish(right, f"{name}: mean number of classes in a set", "promised coverage")
        for axes in (left, right):
            axes.set_xticks(places, [f"{share:g}" for share in promised])
    grid[0, 1].legend(loc="upper left")
    save_figure(path, figure)


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set(title=title, xlabel=label)
    axes.grid(alpha=0.3)


def _mean(of: Mapping[str, Any], what: str) -> np.ndarray:
    return np.asarray(of[what]["mean"])


def _section(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    sentence: str,
    pictures: Sequence[str] = (),
) -> str:
    shown = [f"\n![{title}]({picture})" for picture in pictures]
    table = report.table(header, rows)
    return "\n".join([f"## {title}\n", table, f"\n{sentence}", *shown, ""])
