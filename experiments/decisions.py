"""Is the most likely label the right answer? Calibration, costs, abstention, sets.

python -m experiments.decisions [--run DIR] [--quick] [--out DIR]

The chapter's third exercise on a trained classifier and, for contrast, on one that
knows 1,000 images by heart. The test images are split in two at random, many times: one
half calibrates, the other reports. Leaves decisions.md, decisions.json and figures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import data, decisions_page, report, run_folder
from experiments.calibration import Calibration, as_json, calibration
from experiments.command import (
    BadInput,
    above_zero,
    at_least,
    main,
    make_folder,
    quickened,
    results_folder,
    takes_seed,
)
from experiments.files import save_json, save_text
from experiments.images import pixels
from jax_softmax import (
    SoftmaxRegression,
    adaptive_scores,
    conformal_threshold,
    cross_entropy,
    decision_costs,
    fit,
    least_cost_decision,
    softmax,
    temperature_scaling,
    top_k_accuracy,
    vector_scaling,
)

FEW, BY_HEART_EPOCHS = 1000, 300
MISS_RATES = (0.2, 0.1, 0.05, 0.01)
MOST_SPLITS = 1000  # all are in memory at once
PRICES = np.linspace(0, 0.9, 37)


@dataclass(frozen=True)
class Settings:
    """Calibrate a trained classifier, decide with it, and count what that costs."""

    run: Path = Path("experiments/results/fashion_mnist-seed0")
    """The folder of a run of experiments.fashion_mnist."""
    data_dir: Path | None = None
    """Where the run's data set is."""
    costly: str | None = None
    """The class that is costly to miss; by default the one that is missed most."""
    times: float = 10.0
    """How much more it costs to miss that class than to make any other error."""
    splits: int = 50
    """How often the test images are split in two."""
    seed: int = 0
    """Of the splits, and of the second classifier."""
    out: Path | None = None
    """Where the page, its numbers and its figures go; by default
    experiments/results/decisions, with --quick runs/decisions-quick."""
    quick: bool = False
    """Three splits, and a second classifier that learns for 30 epochs only."""


class Findings(NamedTuple):
    """Of one random split: calibrated on one half, counted on the other."""

    calibrated: Calibration  # by scaling
    loss: Array  # by scaling
    accuracy: Array  # by scaling
    top_3_accuracy: Array  # by scaling
    temperature: Array
    argmax_cost: Array
    least_cost: Array  # by scaling
    decided: Array  # by scaling and price of abstention
    error_when_decided: Array
    abstaining_cost: Array
    coverage: Array  # by score and miss rate
    set_size: Array


def run(settings: Settings) -> None:
    """Measure, print, save."""
    at_least(1, settings, "splits")
    if settings.splits > MOST_SPLITS:
        raise BadInput(
            f"--splits must be at most {MOST_SPLITS}, got {settings.splits}."
        )
    above_zero(settings, "times")
    takes_seed(settings)
    settings = quickened(settings, splits=3)
    out = results_folder("decisions", settings.out, quick=settings.quick)
    model, config = run_folder.load(settings.run)
    dataset = data.load(config["dataset"], settings.data_dir)
    run_folder.check_data(settings.run, dataset)
    names, labels = dataset.class_names, dataset.test_labels
    if settings.costly is not None and settings.costly not in names:
        raise BadInput(
            f"There is no class {settings.costly!r}: --costly takes one of "
            f"{', '.join(names)}."
        )
    make_folder(out)
    logits = {
        "trained": model.logits(pixels(dataset.test_images)),
        "by heart": by_heart(dataset, settings).logits(pixels(dataset.test_images)),
    }
    costly = most_missed(logits["trained"], labels)
    if settings.costly is not None:
        costly = names.index(settings.costly)
    costs = cost_table(len(names), costly, settings.times)
    keys = jax.random.split(jax.random.key(settings.seed), settings.splits)
    of_splits = jax.jit(jax.vmap(of_split, in_axes=(0, None, None, None)))
    found = {name: of_splits(keys, z, labels, costs) for name, z in logits.items()}
    summary = {
        "environment": report.environment(),
        "dataset": dataset.name,
        "costly_class": names[costly],
        "times": settings.times,
        "run": settings.run,
        "by_heart": {"images": FEW, "epochs": _epochs(settings)},
        "splits": settings.splits,
        "held_out": len(labels) // 2,
        "reported": len(labels) - len(labels) // 2,
        "miss_rates": MISS_RATES,
        "prices": PRICES,
        "classifiers": {name: _summary(of) for name, of in found.items()},
    }
    page = decisions_page.page(summary)
    save_text(out / "decisions.md", page)
    save_json(out / "decisions.json", summary)
    decisions_page.draw(summary, found, out)
    report.say(page)
    names = ("decisions.md", "decisions.json", *decisions_page.PICTURES)
    report.say(f"Files: {', '.join(str(out / name) for name in names)}")


def of_split(key: Array, logits: Array, labels: Array, costs: Array) -> Findings:
    """All that is measured on one random split of the rows."""
    split_key, held_key, report_key = jax.random.split(key, 3)
    order = jax.random.permutation(split_key, len(labels))
    held, rest = order[: len(labels) // 2], order[len(labels) // 2 :]
    z, y, z_held, y_held = logits[rest], labels[rest], logits[held], labels[held]
    temperature = temperature_scaling(z_held, y_held)
    vector = vector_scaling(z_held, y_held)
    scaled = jnp.stack((z, temperature.logits(z), vector.logits(z)))
    probs = softmax(scaled)

    def paid(p: Array, price: Array | None = None) -> Array:
        chosen = least_cost_decision(p, costs, abstention_cost=price)
        return decision_costs(chosen, y, costs, abstention_cost=price).mean()

    every_error = 1 - jnp.eye(logits.shape[-1])

    def abstaining(p: Array, price: Array) -> tuple[Array, Array, Array]:
        chosen = least_cost_decision(p, every_error, abstention_cost=price)
        decided = chosen >= 0
        cost = decision_costs(chosen, y, every_error, abstention_cost=price)
        wrong = (decided & (chosen != y)).sum() / jnp.maximum(decided.sum(), 1)
        return decided.mean(), wrong, cost.mean()

    def sets(score_held: Array, score: Array, miss_rate: float) -> tuple[Array, Array]:
        threshold = conformal_threshold(score_held, y_held, miss_rate=miss_rate)
        own = jnp.take_along_axis(score, y[:, None], -1)
        return (own >= threshold).mean(), (score >= threshold).sum(-1).mean()

    p_held, p = softmax(temperature.logits(z_held)), probs[1]
    scores = (
        (p_held, p),
        (adaptive_scores(p_held), adaptive_scores(p)),
        (adaptive_scores(p_held, key=held_key), adaptive_scores(p, key=report_key)),
    )
    of_sets = [[sets(*score, rate) for rate in MISS_RATES] for score in scores]
    by_price = jax.vmap(jax.vmap(abstaining, (None, 0)), (0, None))
    return Findings(
        jax.vmap(calibration, (0, None))(scaled, y),
        jax.vmap(lambda z: cross_entropy(z, y).mean())(scaled),
        jax.vmap(lambda z: top_k_accuracy(z, y))(scaled),
        jax.vmap(lambda z: top_k_accuracy(z, y, min(3, z.shape[-1])))(scaled),
        temperature.temperature,
        decision_costs(z.argmax(-1), y, costs).mean(),
        jax.vmap(paid)(probs),
        *by_price(probs, jnp.asarray(PRICES, p.dtype)),
        *jnp.moveaxis(jnp.asarray(of_sets), -1, 0),
    )


def by_heart(dataset: data.Dataset, settings: Settings) -> SoftmaxRegression:
    """A classifier that was trained on few images for far too long."""
    images, labels = dataset.train_images[:FEW], dataset.train_labels[:FEW]
    features, classes = images[0].size, len(dataset.class_names)
    init_key, order_key = jax.random.split(jax.random.key(settings.seed))
    model = SoftmaxRegression.init(init_key, features, classes)
    for epoch in fit(
        model,
        images,
        labels,
        optimizer=optax.adam(0.01),
        key=order_key,
        epochs=_epochs(settings),
        batch_size=100,
        transform=pixels,
    ):
        model = epoch.model
    return model


def _epochs(settings: Settings) -> int:
    return 30 if settings.quick else BY_HEART_EPOCHS


def most_missed(logits: Array, labels: np.ndarray) -> int:
    """The class whose images are most often taken for another."""
    wrong = np.asarray(logits.argmax(-1)) != labels
    classes = logits.shape[-1]
    shares = np.bincount(labels, wrong, classes) / np.bincount(labels, None, classes)
    return int(shares.argmax())


def cost_table(classes: int, costly: int, times: float) -> Array:
    """[true, decided]: every error costs 1, missing the costly class times as much."""
    costs = 1 - jnp.eye(classes)
    return costs.at[costly].multiply(times)


def _summary(found: Findings) -> dict[str, Any]:
    """Mean and spread over the splits."""

    def both(values: Array) -> dict[str, Array]:
        return {"mean": values.mean(0), "deviation": values.std(0)}

    numbers = found._asdict() | as_json(found.calibrated)
    bins, _ = numbers.pop("bins"), numbers.pop("calibrated")
    numbers["best_temperature_of_reported"] = numbers.pop("temperature")
    numbers["temperature"] = found.temperature
    first = {name: value[0] for name, value in bins.items()}
    return {name: both(value) for name, value in numbers.items()} | {
        "bins_of_first_split": first
    }


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="decisions")
