"""Learning rates and batch sizes x seeds, each batch size one compiled program.

python -m experiments.sweep            the chapter's fifth exercise, whole

Full-batch gradient descent on a bowl of curvature lambda is stable where the learning
rate is below 2 / lambda. The objective's largest curvature is found with closed-form
Hessian products, where training starts and where it ends.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

from experiments import data, report
from experiments.command import (
    BadInput,
    Failed,
    above_zero,
    at_least,
    main,
    make_folder,
    quickened,
    results_folder,
)
from experiments.files import save_figure, save_json
from experiments.images import pixels
from jax_softmax import NonFiniteLoss, SoftmaxRegression, fit, sweep
from jax_softmax.closed_form import regression_hvp

GOAL = 5.0  # times the throughput of one model after another
TALLEST = 10  # times the lowest loss is where pictures end


@dataclass(frozen=True)
class Settings:
    """Sweep, draw validation loss against learning rate and batch size, and time it."""

    dataset: str = "fashion_mnist"
    """As for experiments.fashion_mnist."""
    data_dir: Path | None = None
    """As for experiments.fashion_mnist."""
    rates: int = 16
    """Learning rates, evenly spaced in logarithm."""
    lowest: float = 0.001
    """The lowest learning rate."""
    highest: float = 3.0
    """The highest learning rate."""
    batch_sizes: tuple[int, ...] = (32, 256, 2048)
    """Each is a group of its own."""
    seeds: int = 4
    """Of the first weights and of the order of the images."""
    epochs: int = 10
    """Passes over the training images."""
    rounds: int = 3
    """Of the timing, interleaved: the median counts."""
    out: Path | None = None
    """Where sweep.json and the pictures go; by default experiments/results/sweep, with
    --quick runs/sweep-quick."""
    quick: bool = False
    """Digits, few settings, two epochs."""


class Group(NamedTuple):
    """One batch size: losses and accuracies [seeds, rates] after the last epoch."""

    batch_size: int
    train_loss: np.ndarray
    validation_loss: np.ndarray
    validation_accuracy: np.ndarray
    seconds: float


def starts(keys: Array, dataset: data.Dataset) -> SoftmaxRegression:
    """A first model for each seed."""
    features = dataset.train_images[0].size
    classes = len(dataset.class_names)
    return jax.vmap(lambda key: SoftmaxRegression.init(key, features, classes))(keys)


def group(
    dataset: data.Dataset, rates: np.ndarray, keys: Array, batch_size: int, epochs: int
) -> tuple[Group, SoftmaxRegression]:
    """Train every rate and seed at this batch size; the models, too."""
    started = time.perf_counter()
    *_, last = sweep(
        starts(keys, dataset),
        dataset.train_images,
        dataset.train_labels,
        optimizer=optax.sgd,
        settings=jnp.asarray(rates, jnp.float32),
        keys=keys,
        epochs=epochs,
        batch_size=batch_size,
        transform=pixels,
        validation=(dataset.test_images, dataset.test_labels),
    )
    assert last.validation_loss is not None
    assert last.validation_accuracy is not None
    seconds = time.perf_counter() - started
    losses = last.train_loss, last.validation_loss, last.validation_accuracy
    return Group(batch_size, *losses, seconds), last.model


@partial(jax.jit, static_argnames="steps")
def largest_curvature(
    model: SoftmaxRegression, x: Array, *, steps: int = 100
) -> tuple[Array, Array]:
    """The Hessian's largest eigenvalue, and the residual of its eigenvector.

    The power method on closed-form products: no Hessian, 61 million entries, is made.
    """

    def product(v: SoftmaxRegression) -> SoftmaxRegression:
        return SoftmaxRegression(*regression_hvp(model.w, model.b, x, (v.w, v.b)))

    def step(_: Array, v: SoftmaxRegression) -> SoftmaxRegression:
        bent = product(v)
        return jax.tree.map(lambda leaf: leaf / optax.tree.norm(bent), bent)

    key = jax.random.key(0)
    v = SoftmaxRegression.init(key, *model.w.shape, scale=1.0)
    v = lax.fori_loop(0, steps, step, step(jnp.int32(0), v))
    bent = product(v)
    value = jnp.asarray(optax.tree.vdot(v, bent))
    rest = jax.tree.map(lambda a, b: a - value * b, bent, v)
    return value, jnp.asarray(optax.tree.norm(rest))


def throughput(
    dataset: data.Dataset, rates: np.ndarray, keys: Array, rounds: int
) -> dict[str, float]:
    """An epoch of the sweep against an epoch of fit times the number of models.

    Both train at batch 256 without validation. In each round fit's time is the mean of
    three epochs at the lowest rate; of all times the medians over the rounds count. fit
    is compiled beforehand: that each rate costs it a compile is not included.
    """
    images, labels = dataset.train_images, dataset.train_labels
    models = starts(keys, dataset)
    first = jax.tree.map(lambda leaf: leaf[0], models)
    optimizer = optax.sgd(float(rates[0]))  # at a higher one fit might diverge

    def together() -> None:
        settings = jnp.asarray(rates, jnp.float32)
        options = {"keys": keys, "epochs": 1, "transform": pixels}
        for _ in sweep(
            models, images, labels, optimizer=optax.sgd, settings=settings, **options
        ):
            pass

    def alone() -> None:
        options = {"key": keys[0], "epochs": 1, "transform": pixels}
        for _ in fit(first, images, labels, optimizer=optimizer, **options):
            pass

    seconds: dict[str, list[float]] = {"sweep": [], "fit": []}
    for round_ in range(rounds + 1):
        started = time.perf_counter()
        together()
        middle = time.perf_counter()
        for _ in range(3):
            alone()
        ended = time.perf_counter()
        if round_:
            seconds["sweep"].append(middle - started)
            seconds["fit"].append((ended - middle) / 3)
    sweep_seconds, fit_seconds = (
        float(np.median(seconds[name])) for name in ("sweep", "fit")
    )
    count = len(rates) * len(keys)
    ratios = count * np.asarray(seconds["fit"]) / np.asarray(seconds["sweep"])
    return {
        "models": count,
        "sweep_seconds_per_epoch": sweep_seconds,
        "fit_seconds_per_epoch": fit_seconds,
        "speedup": float(np.median(ratios)),
        "goal": GOAL,
    }


def run(settings: Settings) -> None:
    """Sweep, measure, print, save, draw."""
    at_least(1, settings, "rates", "seeds", "epochs", "rounds")
    above_zero(settings, "lowest", "highest")
    if settings.lowest > settings.highest:
        raise BadInput(
            f"--lowest must be no higher than --highest, {settings.highest:g}, "
            f"got {settings.lowest:g}."
        )
    if not settings.batch_sizes or min(settings.batch_sizes) < 1:
        raise BadInput(
            "--batch-sizes must be one or more numbers of at least 1, got "
            f"{', '.join(map(str, settings.batch_sizes)) or 'none'}."
        )
    small = {"dataset": "digits", "rates": 6, "batch_sizes": (64, 256), "seeds": 2}
    settings = quickened(settings, epochs=2, rounds=1, **small)
    out = results_folder("sweep", settings.out, quick=settings.quick)
    dataset = data.load(settings.dataset, settings.data_dir)
    make_folder(out)
    rates = np.geomspace(settings.lowest, settings.highest, settings.rates)
    keys = jax.random.split(jax.random.key(0), settings.seeds)
    groups, table, models = [], [], None
    for size in settings.batch_sizes:
        done, models = group(dataset, rates, keys, size, settings.epochs)
        groups.append(done)
        table.append(best(done, rates))
        report.say(
            "batch {batch_size:4d}: best rate {rate:.4f}, validation loss "
            "{validation_loss:.4f} ({lowest:.4f} to {highest:.4f}), accuracy "
            "{validation_accuracy:.4f}, {diverged} diverged".format(**table[-1])
        )
        report.say(f"    {done.validation_loss.size} models in {done.seconds:.1f} s")
    x = pixels(dataset.train_images)
    curvatures = {}
    for when, model in (
        ("at the start", jax.tree.map(lambda leaf: leaf[0], starts(keys, dataset))),
        ("at the best", jax.tree.map(lambda leaf: leaf[0, table[-1]["index"]], models)),
    ):
        value, rest = map(float, largest_curvature(model, x))
        curvatures[when] = {"lambda": value, "residual": rest, "edge": 2 / value}
        report.say(
            f"Largest curvature {when}: {value:.3f} (residual {rest:.1e}), so gradient "
            f"descent is stable below {2 / value:.3f}"
        )
    try:
        timing = throughput(dataset, rates, keys, settings.rounds)
    except NonFiniteLoss as error:
        raise Failed(
            f"Stopped: {error}. --lowest was {settings.lowest:g}; nothing is written."
        ) from None
    report.say(
        f"{timing['models']} models at once: {timing['sweep_seconds_per_epoch']:.2f} s "
        f"an epoch; fit needs {timing['fit_seconds_per_epoch']:.2f} s for each: "
        f"{timing['speedup']:.1f} x the throughput (goal {GOAL:g})"
    )
    results = {
        "environment": report.environment(),
        "rates": rates,
        "best": table,
        "groups": [done._asdict() for done in groups],
        "curvature": curvatures,
        "throughput": timing,
    }
    save_json(out / "sweep.json", results)
    draw_rates(groups, rates, curvatures, out / "learning_rate.png")
    draw_sizes(groups, rates, out / "batch_size.png")
    report.say(f"Files: sweep.json and two pictures in {out}")


def best(done: Group, rates: np.ndarray) -> dict[str, Any]:
    """The rate whose mean validation loss over seeds is lowest, a row of the table."""
    mean = done.validation_loss.mean(0)
    index = int(np.where(np.isfinite(mean), mean, np.inf).argmin())
    losses = done.validation_loss[:, index]
    return {
        "batch_size": done.batch_size,
        "index": index,
        "rate": rates[index],
        "validation_loss": losses.mean(),
        "lowest": losses.min(),
        "highest": losses.max(),
        "validation_accuracy": done.validation_accuracy[:, index].mean(),
        "diverged": int((~np.isfinite(done.validation_loss)).sum()),
    }


def draw_rates(
    groups: list[Group],
    rates: np.ndarray,
    curvatures: dict[str, dict[str, float]],
    path: Path,
) -> None:
    """Validation loss against learning rate, with bands of seeds, and the edge."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, done in enumerate(groups):
        _band(axes, rates, done.validation_loss, f"batch {done.batch_size}", f"C{i}")
    edge = curvatures["at the best"]["edge"]
    text = f"stable: rate < 2 / $\\lambda$ = {edge:.2f}"
    axes.axvspan(rates[0], min(edge, rates[-1]), color="C2", alpha=0.08, label=text)
    first = curvatures["at the start"]["edge"]
    text = f"2 / $\\lambda$ at the first weights = {first:.2f}"
    axes.axvline(first, color="black", linestyle=":", linewidth=1, label=text)
    axes.set(xscale="log", xlabel="learning rate")
    _finish(axes, groups, figure, path)


def draw_sizes(groups: list[Group], rates: np.ndarray, path: Path) -> None:
    """Validation loss against batch size: at some rates, and at each size's best."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = np.asarray([done.batch_size for done in groups])
    losses = np.stack([done.validation_loss for done in groups])
    shown = np.unique(np.linspace(0, len(rates) - 1, 6).astype(int))
    lowest = losses[np.isfinite(losses)].min()
    for i, rate in enumerate(shown):
        if not (losses[:, :, rate].mean(1) <= TALLEST * lowest).any():
            continue  # its line would be above the picture, or is nowhere
        label = f"learning rate {rates[rate]:.3g}"
        _band(axes, sizes, losses[:, :, rate].T, label, f"C{i}")
    chosen = [done.validation_loss[:, best(done, rates)["index"]] for done in groups]
    label = "the rate that is best for all seeds"
    _band(axes, sizes, np.stack(chosen, axis=1), label, "black")
    axes.set(xscale="log", xlabel="batch size")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    _finish(axes, groups, figure, path)


def _band(axes: Any, x: np.ndarray, y: np.ndarray, label: str, color: str) -> None:
    """The mean over seeds and their range, where all are finite."""
    y = np.where(np.isfinite(y).all(0), y, np.nan)
    axes.plot(x, y.mean(0), "-o", markersize=3, color=color, label=label)
    axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.2)


def _finish(axes: Any, groups: list[Group], figure: Figure, path: Path) -> None:
    losses = np.concatenate([done.validation_loss.ravel() for done in groups])
    lowest = losses[np.isfinite(losses)].min()
    axes.set(ylabel="validation loss in nats", yscale="log")
    axes.set_ylim(0.95 * lowest, TALLEST * lowest)
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(path, figure)


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="sweep")
