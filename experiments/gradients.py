"""Autodiff, paper, differences and peers: how far each gradient is from the exact one.

python -m experiments.gradients                             the tables and figures
python -m experiments.gradients --function module:name ...  your own pair, see --help
"""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import data, gradient_figures, gradient_pair, report
from experiments.command import BadInput, flag, main, make_folder, results_folder
from experiments.files import save_json, save_text
from experiments.gradient_cases import on_logits, on_weights
from experiments.gradient_curves import (
    MARGIN_PANELS,
    STEP_TYPES,
    MarginCurves,
    StepCurves,
    best,
    by_margin,
    by_step,
    lost_at,
)
from experiments.gradient_pair import Pair
from experiments.gradient_roads import (
    CLOSED,
    DIFFERENCES,
    OPTAX,
    OURS,
    ROADS,
    STABLE,
    TEXTBOOK,
    TORCH,
    Case,
    compared,
    contenders,
    rows_by_road,
)
from experiments.images import pixels
from experiments.measure import Contender, compiled, interleave
from jax_softmax import SoftmaxRegression, fit

DTYPES = ("float32", "bfloat16", "float16", "float64")
INITIAL, TRAINED = "initial", "trained"
SHOWN_MARGINS = (0.0, 8.0, 16.0, 20.0, 40.0, 80.0, 100.0)

FOOTNOTE = (
    "(* a sum that cancels: in ULP of its largest entry. The soft cap is taken in the "
    "type of the logits, and by the closed form in float32 or wider.)"
)
JUDGED_BY_ITSELF = " (A few ULP of float64 may be the judge's own.)"

Row = dict[str, Any]
Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Compare every road to a gradient with a float64 judge: errors in ULP, and times.

    The roads: autodiff of the textbook's definition, of the stable form (max-shifted
    logsumexp in plain jnp) and of jax_softmax, the closed form, finite differences,
    optax, and torch if it is installed. The places: a batch of real images at the first
    and at the trained weights, and made-up logits of every margin.
    """

    dataset: str = "fashion_mnist"
    """fashion_mnist, mnist, kmnist, cifar10 or digits (needs no files at all)."""
    data_dir: Path | None = None
    """A folder with the data set, as raw files or prepared by tensorflow-datasets."""
    out: Path | None = None
    """Where the files go; by default experiments/results/gradients, with --quick
    runs/gradients-quick."""
    quick: bool = False
    """One type, few cases, margins and steps: a check that everything works."""
    pair: tyro.conf.OmitArgPrefixes[Pair] = field(default_factory=Pair)


def run(settings: Settings) -> None:
    """Measure, print, save; or compare the reader's own pair."""
    if settings.pair.given:
        if settings.pair.function is not None:
            refuse_ignored(settings)
        gradient_pair.run(settings.pair, settings.out)
        return
    quick = settings.quick
    out = results_folder("gradients", settings.out, quick=quick)
    dataset = data.load(settings.dataset, settings.data_dir)
    make_folder(out)
    models = trained_models(dataset, quick)
    size = 64 if quick else 256
    images = np.asarray(pixels(dataset.train_images[:size]))
    batch = images, dataset.train_labels[:size]
    report.say(
        f"Data: {size} training images of {dataset.name}; logits at the trained "
        f"weights reach {np.abs(models[TRAINED].logits(images)).max():.1f}"
    )

    told: list[str] = []

    def tell(section: str) -> None:
        told.append(section)
        report.say(section, "", sep="\n")

    rows: list[Row] = []
    for dtype in DTYPES[:1] if quick else DTYPES:
        rows += errors_and_times(models, batch, dtype, quick)
        tell(error_section(rows, dtype))
        tell(time_section(rows, dtype))
    margins = [0.0, 20, 80] if quick else [float(m) for m in range(0, 101, 2)]
    panels = MARGIN_PANELS[:1] if quick else MARGIN_PANELS
    by_margins = [by_margin(title, dtype, margins) for title, dtype in panels]
    tell(margin_section(by_margins))
    exponents = range(-12, 1, 3) if quick else np.arange(-13, 0.3, 0.5)
    steps = [10.0**exponent for exponent in exponents]
    by_steps = [
        by_step(models[TRAINED], *batch, dtype, steps, entries=4 if quick else 32)
        for dtype in (STEP_TYPES[:1] if quick else STEP_TYPES)
    ]
    tell(step_section(by_steps))
    gradient_figures.draw_margins(by_margins, out / "error_by_margin.png")
    gradient_figures.draw_steps(by_steps, out / "error_by_step.png")
    save_text(out / "tables.md", "\n\n".join(told) + "\n")
    content = {
        "environment": report.environment(),
        "dataset": dataset.name,
        "rows": rows,
        "by_margin": [curves._asdict() for curves in by_margins],
        "by_step": [curves._asdict() for curves in by_steps],
    }
    save_json(out / "gradients.json", content)
    names = ("tables.md", "gradients.json", "error_by_margin.png", "error_by_step.png")
    report.say(f"Files: {', '.join(str(out / name) for name in names)}")


def refuse_ignored(settings: Settings) -> None:
    """A pair of one's own brings its data.

    Raises:
        BadInput: something was given that only the tables depend on.
    """
    for name in ("dataset", "data_dir", "quick"):
        if getattr(settings, name) != getattr(Settings, name):
            raise BadInput(
                f"{flag(name)} is not for a pair of your own: leave {flag(name)} out, "
                "or --function and what goes with it."
            )


def trained_models(dataset: data.Dataset, quick: bool) -> dict[str, SoftmaxRegression]:
    """The book's model, before and after its training."""
    rows = 6000 if quick else len(dataset.train_labels)
    images, labels = dataset.train_images[:rows], dataset.train_labels[:rows]
    features = math.prod(images.shape[1:])
    model = SoftmaxRegression.init(
        jax.random.key(0), features, len(dataset.class_names)
    )
    *_, last = fit(
        model,
        images,
        labels,
        optimizer=optax.sgd(0.1),
        key=jax.random.key(1),
        epochs=10,
        transform=pixels,
    )
    return {INITIAL: model, TRAINED: last.model}


def errors_and_times(
    models: dict[str, SoftmaxRegression], batch: Batch, dtype: str, quick: bool
) -> Iterator[Row]:
    """A row for each case, place and road; times are of the trained weights."""
    for place, model in list(models.items())[-1:] if quick else models.items():
        logits = np.asarray(model.logits(batch[0]))
        weights = [np.asarray(leaf) for leaf in model]
        with jax.enable_x64(dtype == "float64"):
            labels = jnp.asarray(batch[1])
            narrow = SoftmaxRegression(*(jnp.asarray(leaf, dtype) for leaf in weights))
            x = jnp.asarray(batch[0], dtype)
            cases = [*on_logits(jnp.asarray(logits, dtype), labels)]
            cases += on_weights(narrow, x, labels)
            for case in cases[2::3] if quick else cases:
                ready = contenders(case)
                found = compared(case, ready, probes=4 if quick else 16)
                times = {}
                if place == TRAINED:
                    times = milliseconds(case, ready, 0.01 if quick else 0.3)
                for road, leaves in rows_by_road(found).items():
                    worst = max(leaves, key=lambda leaf: leaf.max_ulp)
                    yield {
                        "case": case.title,
                        "place": place,
                        "road": road,
                        **worst._asdict(),
                        "milliseconds": times.get(road),
                        "doubts": found.doubts,
                    }


def milliseconds(
    case: Case, ready: dict[str, Contender], seconds: float
) -> dict[str, float]:
    """One gradient of the batch by each road, call included.

    Central differences take two values for every entry; the value is what is timed.
    """
    values = {DIFFERENCES: compiled(case.ours, *case.args)}
    timings = interleave(ready | values, seconds=seconds, most_rounds=500)
    found = {road: 1e3 * timing.median for road, timing in timings.items()}
    entries = sum(leaf.size for leaf in jax.tree.leaves(case.args[0]))
    found[DIFFERENCES] *= 2 * entries
    return found


def error_section(rows: Sequence[Row], dtype: str) -> str:
    """The table of one type, under its sentence."""
    mine = [row for row in rows if row["dtype"] == dtype]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in mine:
        key = row["case"], row["place"]
        lines.setdefault(key, {})[row["road"]] = _ulp(row["max_ulp"], row["got"])
    roads = [road for road in ROADS if any(road in cells for cells in lines.values())]
    content = [
        (f"{case}, {place}", *(cells[road] for road in roads))
        for (case, place), cells in lines.items()
    ]
    return "\n".join(
        [
            f"**{dtype}: {error_sentence(mine)}**",
            "",
            report.table(
                (f"{dtype}, worst entry in ULP", *roads), content, numbers_from=1
            ),
            "",
            FOOTNOTE + (JUDGED_BY_ITSELF if dtype == "float64" else ""),
        ]
    )


def error_sentence(rows: Sequence[Row]) -> str:
    """What a reader should take away from a table of errors."""

    def worst(road: str, keep: str = "labels") -> str:
        ulps = [r for r in rows if r["road"] == road and keep in r["case"]]
        row = max(ulps, key=lambda row: row["max_ulp"])
        return _ulp(row["max_ulp"], row["got"])

    spread = [
        row["road"]
        for row in rows
        if "NaN rows" in row["case"] and math.isinf(row["max_ulp"])
    ]
    spread = list(dict.fromkeys(spread))
    return (
        f"the worst entry of cross-entropy's gradient is {worst(OURS)} ULP off by our "
        f"rule, {worst(CLOSED)} by the closed form, {worst(STABLE)} by autodiff of "
        f"the stable form and {worst(TEXTBOOK)} by that of the textbook; a NaN in a "
        f"masked row reaches the gradient by {_listed(spread)}."
    )


def time_section(rows: Sequence[Row], dtype: str) -> str:
    """Milliseconds of each road, under their sentence."""
    timed = [row for row in rows if row["dtype"] == dtype and row["milliseconds"]]
    lines: dict[str, dict[str, float]] = {}
    for row in timed:
        lines.setdefault(row["case"], {})[row["road"]] = row["milliseconds"]
    roads = [road for road in ROADS if any(road in cells for cells in lines.values())]
    ratios = {
        road: statistics.geometric_mean(
            [cells[road] / cells[OURS] for cells in lines.values()]
        )
        for road in roads
    }
    others = [road for road in (STABLE, OPTAX, TORCH) if road in ratios]
    text = _listed(
        [f"{_times(ratios[road])} by {road}" for road in (*others, DIFFERENCES)]
    )
    content = [
        (case, *(f"{cells[road]:.3g}" for road in roads))
        for case, cells in lines.items()
    ]
    return "\n".join(
        [
            f"**{dtype}: one gradient takes, as a multiple of our rule's time, {text} "
            "(geometric means).**",
            "",
            report.table(
                (f"{dtype}, ms for one gradient", *roads), content, numbers_from=1
            ),
        ]
    )


def margin_section(panels: Sequence[MarginCurves]) -> str:
    """Errors of the first panel at some margins, and where each type gives in."""
    first = panels[0]
    shown = [i for i, m in enumerate(first.margins) if m in SHOWN_MARGINS]
    head = (
        f"{first.title}, {first.dtype}",
        *(f"margin {first.margins[i]:g}" for i in shown),
    )
    content = [
        (road, *(_ulp(ulps[i], math.nan) for i in shown))
        for road, ulps in first.ulps.items()
    ]
    lost = [
        f"from a margin of {at:g} on in {curves.dtype}"
        for curves in panels
        if curves.title == first.title and (at := lost_at(curves, STABLE)) is not None
    ]
    ours = max(first.ulps[OURS])
    return "\n".join(
        [
            "**The surer the model, the worse p_y - 1: autodiff of the stable form has "
            f"an entry that is 100 % wrong {_listed(lost)}; our rule stays within "
            f"{ours:.1f} ULP up to a margin of {first.margins[-1]:g}.**",
            "",
            report.table(head, content, numbers_from=1),
        ]
    )


def step_section(found: Sequence[StepCurves]) -> str:
    """The best that differences can do, by type."""
    content, digits = [], []
    for curves in found:
        central, step = best(curves.steps, curves.central)
        richardson, wide = best(curves.steps, curves.richardson)
        content.append(
            (
                curves.dtype,
                *(f"{central:.1e}", f"{step:.0e}"),
                *(f"{richardson:.1e}", f"{wide:.0e}"),
                f"{curves.autodiff:.1e}",
            )
        )
        half_ulp = float(jnp.finfo(curves.dtype).eps) / 2  # an error of 0 is no better
        few, many = (-math.log10(max(e, half_ulp)) for e in (central, curves.autodiff))
        digits.append(f"{few:.0f} digits in {curves.dtype} (autodiff: {many:.0f})")
    head = ("type", "central", "its step", "Richardson", "its step", "autodiff")
    return "\n".join(
        [
            "**Differences lose to rounding on one side, to curvature on the other: "
            f"with the best step of all, central ones have {_listed(digits)}.**",
            "",
            report.table(head, content, numbers_from=1),
        ]
    )


def _ulp(error: float, got: float) -> str:
    if math.isinf(error):
        return "inf" if math.isinf(got) else "NaN"
    return (
        f"{error:.1f}"
        if error < 1000
        else f"{error:.0e}".replace("e+0", "e").replace("e+", "e")
    )


def _times(ratio: float) -> str:
    return f"x{ratio:,.0f}" if ratio > 99 else f"x{ratio:.2g}"


def _listed(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words) or "no road"
    return f"{', '.join(words[:-1])} and {words[-1]}"


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="gradients")
