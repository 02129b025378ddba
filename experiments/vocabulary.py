"""What breaks when softmax regression predicts the next word? Memory, first.

A bag of the previous words' embeddings gives the features, a softmax over the whole
vocabulary the next word. Trained twice, in turns and from the same start: by
mean_linear_cross_entropy, and by the loss on logits.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

from experiments import english, report
from experiments.command import (
    BadInput,
    Failed,
    above_zero,
    at_least,
    main,
    make_folder,
    quickened,
    results_folder,
    takes_seed,
)
from experiments.files import save_figure, save_json, save_text
from experiments.measure import compiled, interleave
from jax_softmax import linear_softmax_summary, mean_linear_cross_entropy

OURS, NAIVE = "mean_linear_cross_entropy", "loss on logits"
LIMITS = (1e-6, 1e-5, 1e-4, 1e-3)
BLOCK = 10  # steps of one contender before it is the other's turn
MOST = 500.0  # nats, of which exp is still finite


@dataclass(frozen=True)
class Settings:
    """Train on English, compare with the naive loss, predict; write JSON, pictures."""

    text: Path | None = None
    """A text of your own; by default Debian's dictionary gcide, fetched if need be."""
    out: Path | None = None
    """Where vocabulary.json, curves.png and predictions.md go; by default
    experiments/results/vocabulary, with --quick runs/vocabulary-quick."""
    classes: int = 32768
    """Words of the vocabulary, the most frequent ones."""
    features: int = 128
    context: int = 8
    """Previous words in the bag."""
    batch: int = 1024
    steps: int = 300
    rate: float = 0.003
    """Of Adam."""
    seed: int = 0
    naive: bool = True
    """Train by the loss on logits too."""
    quick: bool = False
    """2,000 words, a small model, 20 steps: a check that everything works."""


class Model(NamedTuple):
    """x = sum of place[k] * embedding[word k before], logits x w + b."""

    embedding: Array
    place: Array
    w: Array
    b: Array


class Batch(NamedTuple):
    before: Array  # [batch, context]
    labels: Array


class Run(NamedTuple):
    """One contender's training."""

    step: Callable[[Any, Batch], Any]
    temp_bytes: int
    losses: list[float]
    seconds: list[float]  # of a step, the mean of each block


def features(model: Model, before: Array) -> Array:
    return jnp.einsum("bkf,kf->bf", model.embedding[before], model.place)


def our_loss(model: Model, batch: Batch, skip_below: float = 0.0) -> Array:
    x = features(model, batch.before)
    return mean_linear_cross_entropy(
        x, model.w, batch.labels, b=model.b, skip_below=skip_below
    )


def naive_loss(model: Model, batch: Batch) -> Array:
    logits = features(model, batch.before) @ model.w + model.b
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def run(settings: Settings) -> None:
    """Train, compare, predict, save."""
    at_least(2, settings, "classes")
    at_least(1, settings, "features", "context", "batch", "steps")
    above_zero(settings, "rate")
    takes_seed(settings)
    out = results_folder("vocabulary", settings.out, quick=settings.quick)
    settings = quickened(settings, classes=2000, features=16, batch=256, steps=20)
    text = english.load(settings.text, settings.classes)
    validation_words = min(16384, len(text.ids) // 10)
    train, validation = np.split(text.ids, [len(text.ids) - validation_words])
    if len(validation) <= 2 * settings.context or len(train) < settings.batch:
        raise BadInput(
            f"{text.source} has {len(text.ids)} words, too few to train on: give a "
            "longer --text, or a smaller --batch or --context."
        )
    make_folder(out)
    classes = len(text.vocabulary)
    report.say(f"{text.source}: {len(text.ids):,} words, vocabulary {classes:,}")
    unigram = _unigram(train, classes)
    model = _start(settings, classes, unigram)
    optimizer = optax.adam(settings.rate)
    contenders = {OURS: our_loss} | ({NAIVE: naive_loss} if settings.naive else {})
    random = np.random.default_rng(settings.seed)
    runs = {
        name: _compiled_step(loss, optimizer, model, _batch(train, settings, random))
        for name, loss in contenders.items()
    }
    states = {name: (model, optimizer.init(model)) for name in runs}
    blocks = range(0, settings.steps, BLOCK)
    for start in report.progress(blocks, total=len(blocks)):
        count = min(BLOCK, settings.steps - start)
        batches = [_batch(train, settings, random) for _ in range(count)]
        for name, contender in runs.items():
            states[name] = _block(contender, states[name], batches)
        report.say(
            f"step {start + count:5}   "
            + "   ".join(f"{n} {r.losses[-1]:.5f}" for n, r in runs.items())
        )
    model = states[OURS][0]
    held_out = _held_out(validation, settings.context)
    summary = jax.jit(_summary)(model, held_out)
    loss = float(summary.nll.mean())
    if not loss < MOST:
        raise Failed(
            f"Stopped: with --rate {settings.rate:g} the loss has become {loss:.3g} "
            "nats: give a lower one."
        )
    tokens = {
        name: settings.batch / statistics.median(r.seconds) for name, r in runs.items()
    }
    results = {
        "environment": report.environment(),
        "source": text.source,
        "words": len(text.ids),
        "settings": vars(settings),
        "perplexity": {
            "unigram": math.exp(-float(unigram[np.asarray(held_out.labels)].mean())),
            "trained": math.exp(loss),
        },
        "top_5_accuracy": float(
            (summary.top_ids == held_out.labels[:, None]).any(1).mean()
        ),
        "tokens_per_second": tokens,
        "temp_bytes_of_a_step": {name: r.temp_bytes for name, r in runs.items()},
        "losses": {name: r.losses for name, r in runs.items()},
        "largest_difference_of_the_losses": _apart(runs),
        "skip_below": filtering(model, _batch(train, settings, random)),
    }
    save_json(out / "vocabulary.json", results)
    page = predictions(text, held_out, summary)
    save_text(out / "predictions.md", page)
    draw(runs, results, out / "curves.png")
    report.say(page, *_findings(results), sep="\n")
    report.say(f"Files: {out}")


def _unigram(train: np.ndarray, classes: int) -> np.ndarray:
    """log of how often each word is seen, one sight added to each."""
    counts = np.bincount(train, minlength=classes) + 1.0
    return np.log(counts / counts.sum()).astype(np.float32)


def _start(settings: Settings, classes: int, unigram: np.ndarray) -> Model:
    """Which predicts as the unigram does."""
    shape = (classes, settings.features)
    return Model(
        0.1 * jax.random.normal(jax.random.key(settings.seed), shape),
        jnp.ones((settings.context, settings.features)),
        jnp.zeros(shape[::-1]),
        jnp.asarray(unigram),
    )


def _batch(train: np.ndarray, settings: Settings, random: np.random.Generator) -> Batch:
    ends = random.integers(settings.context, len(train), settings.batch)
    before = ends[:, None] - 1 - np.arange(settings.context)
    return Batch(jnp.asarray(train[before]), jnp.asarray(train[ends]))


def _held_out(validation: np.ndarray, context: int) -> Batch:
    ends = np.arange(context, len(validation))
    before = ends[:, None] - 1 - np.arange(context)
    return Batch(jnp.asarray(validation[before]), jnp.asarray(validation[ends]))


def _compiled_step(
    loss: Callable[[Model, Batch], Array],
    optimizer: optax.GradientTransformation,
    model: Model,
    batch: Batch,
) -> Run:
    def step(state: Any, batch: Batch) -> Any:
        model, memory = state
        value, gradient = jax.value_and_grad(loss)(model, batch)
        updates, memory = optimizer.update(gradient, memory, model)
        return (optax.apply_updates(model, updates), memory), value

    started = (model, optimizer.init(model))
    ready = jax.jit(step).lower(started, batch).compile()
    temp_bytes = getattr(ready.memory_analysis(), "temp_size_in_bytes", 0)
    return Run(ready, temp_bytes, [], [])


def _block(contender: Run, state: Any, batches: list[Batch]) -> Any:
    started = time.perf_counter()
    values = []
    for batch in batches:
        state, value = contender.step(state, batch)
        values.append(value)
    contender.losses.extend(map(float, jax.block_until_ready(values)))
    contender.seconds.append((time.perf_counter() - started) / len(batches))
    return state


def _summary(model: Model, batch: Batch) -> Any:
    x = features(model, batch.before)
    return linear_softmax_summary(
        x, model.w, batch.labels, b=model.b, top_k=min(5, len(model.b))
    )


def _apart(runs: dict[str, Run]) -> float | None:
    if NAIVE not in runs:
        return None
    pairs = zip(runs[OURS].losses, runs[NAIVE].losses, strict=True)
    return max(abs(a - b) for a, b in pairs)


def filtering(model: Model, batch: Batch) -> list[dict[str, float]]:
    """What skip_below saves, and changes, on the trained model."""

    def gradient(limit: float) -> Callable[[Model, Batch], Model]:
        return lambda model, batch: jax.grad(our_loss)(model, batch, limit)

    contenders = {
        limit: compiled(gradient(limit), model, batch) for limit in (0.0, *LIMITS)
    }
    named = {str(limit): contender for limit, contender in contenders.items()}
    timings = interleave(named, seconds=10, least_rounds=5)
    whole = contenders[0.0].run()
    rows = []
    for limit, contender in contenders.items():
        other = contender.run()
        pairs = zip(other, whole, strict=True)
        apart = {
            name: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for name, (a, b) in zip(Model._fields, pairs, strict=True)
        }
        seconds = timings[str(limit)].median
        ratio = seconds / timings["0.0"].median
        rows.append(
            {"skip_below": limit, "seconds": seconds, "ratio": ratio, "error": apart}
        )
    return rows


def predictions(text: english.English, batch: Batch, summary: Any) -> str:
    """A page of contexts, the next word, and the five that the model expects."""
    lines = []
    for row in np.linspace(0, len(batch.labels) - 1, 10).astype(int):
        before = " ".join(text.vocabulary[i] for i in batch.before[row][::-1])
        chances = zip(summary.top_ids[row], summary.top_log_probs[row], strict=True)
        likely = ", ".join(
            f"{text.vocabulary[i]} {math.exp(log_p):.2f}" for i, log_p in chances
        )
        lines.append((before, text.vocabulary[batch.labels[row]], likely))
    header = "... the words before", "next", "the five likeliest"
    return report.table(header, lines).replace("<", "(").replace(">", ")") + "\n"


def _findings(results: dict[str, Any]) -> list[str]:
    perplexity = results["perplexity"]
    lines = [
        f"Perplexity {perplexity['trained']:.1f}, of the unigram "
        f"{perplexity['unigram']:.1f}; next word among the first five: "
        f"{results['top_5_accuracy']:.1%}"
    ]
    for name, tokens in results["tokens_per_second"].items():
        megabytes = results["temp_bytes_of_a_step"][name] / 1e6
        lines.append(f"{name}: {tokens:,.0f} tokens/s, {megabytes:.0f} MB in a step")
    if (apart := results["largest_difference_of_the_losses"]) is not None:
        lines.append(f"Largest difference of the two loss curves: {apart:.1e}")
    for row in results["skip_below"]:
        lines.append(
            f"skip_below {row['skip_below']:g}: {row['ratio']:.2f} x the time, "
            f"gradient of w off by {row['error']['w']:.1e} of its norm"
        )
    return lines


def draw(runs: dict[str, Run], results: dict[str, Any], path: Path) -> None:
    """Both curves, one on the other; memory and speed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, memory, speed = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    styles = {OURS: ("#1f77b4", "-", 3.0), NAIVE: ("black", ":", 1.5)}
    steps = len(runs[OURS].losses)
    mean_of = min(20, -(-steps // 6))
    ends = np.arange(mean_of, steps + 1)
    for name, contender in runs.items():
        color, style, width = styles[name]
        smooth = np.convolve(contender.losses, np.ones(mean_of) / mean_of, "valid")
        style += "o" if steps == 1 else ""
        curve.plot(ends, smooth, style, color=color, linewidth=width, label=name)
    level = math.log(results["perplexity"]["unigram"])
    curve.axhline(level, color="#d62728", linewidth=1, label="unigram, held-out words")
    label = f"training loss in nats (steps averaged: {mean_of})"
    curve.set(xlabel="step", ylabel=label)
    curve.grid(alpha=0.3)
    curve.legend()
    names = {OURS: "fused", NAIVE: "on logits"}
    bars = [
        (memory, "temp_bytes_of_a_step", 1e-6, "MB of temporary memory in a step"),
        (speed, "tokens_per_second", 1, "tokens per second"),
    ]
    for axes, key, scale, label in bars:
        heights = [results[key][name] * scale for name in runs]
        colors = [styles[name][0] for name in runs]
        drawn = axes.bar([names[name] for name in runs], heights, color=colors)
        axes.bar_label(drawn, fmt="%.0f")
        axes.set_ylabel(label)
    save_figure(path, figure)


if __name__ == "__main__":
    main(run, Settings, sys.argv[1:], program="vocabulary")
