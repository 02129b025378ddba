"""The fused linear loss: value and both gradients of the mean, against its peers.

Every contender has the same x [tokens, features], weights and labels in memory and
hands out the loss, dx and dw. Memory is what the compiler says it needs beyond those;
torch has no such figure. On a GPU:

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m experiments.benchmark linear \
        --shapes 16384x4096x128256 --dtype bfloat16 --gigabytes 75 --out FOLDER
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from matplotlib.figure import Figure

from experiments import report, torch_peer
from experiments.command import (
    BadInput,
    above_zero,
    make_folder,
    quickened,
    results_folder,
)
from experiments.files import save_figure, save_json
from experiments.measure import Contender, Timing, compiled, interleave, ratio
from jax_softmax import mean_linear_cross_entropy

OURS, MATMULS, OPTAX = "jax_softmax", "three matmuls", "optax on logits"
TORCH, TORCH_CHUNKED = "torch", "torch, chunked"
TOKAMAX = "tokamax, chunked"
SHAPES = {
    "2048x512x32768": (2048, 512, 32768),
    "1024x768x50257": (1024, 768, 50257),
    "4096x256x131072": (4096, 256, 131072),
    "256x1024x262144": (256, 1024, 262144),
    "growth": (2048, 64, 0),
}
ON_A_GPU = {"16384x4096x128256": (16384, 4096, 128256)}
QUICK = {"64x16x512": (64, 16, 512)}
GROWTH = tuple(2**n for n in range(10, 21, 2))
NEAR = {"float32": 1e-4, "bfloat16": 3e-2}  # of the norm
SLOW = 30.0  # seconds: whoever takes longer is timed by the first call alone
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Settings:
    """Time the loss at each shape (tokens x features x classes); write JSON, picture.

    A run adds to the results that are there: peers live in environments of their own.
    """

    out: Path | None = None
    """Where linear.json and growth.png go; by default experiments/results/linear, with
    --quick runs/linear-quick."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Some of them; "growth" is 2^10 to 2^20 classes with 2048 tokens, 64 features, and
    16384x4096x128256 is for GPUs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of x and the weights."""
    seconds: float = 10.0
    """For all contenders of a shape together, after three rounds. One that takes over
    half a minute is timed by its first call alone."""
    gigabytes: float = 24.0
    """Contenders that need more memory than this are not run."""
    quick: bool = False
    """One small shape."""


def run(settings: Settings) -> None:
    """Measure, print, save."""
    known = SHAPES | ON_A_GPU
    if not settings.shapes:
        raise BadInput(f"--shapes must be some of {', '.join(known)}, got none.")
    unknown = set(settings.shapes) - set(known)
    if unknown:
        raise BadInput(f"--shapes {sorted(unknown)[0]} is none of {', '.join(known)}.")
    above_zero(settings, "seconds", "gigabytes")
    settings = quickened(settings, seconds=0.1, shapes=tuple(QUICK))
    out = results_folder("linear", settings.out, quick=settings.quick)
    make_folder(out)
    path = out / "linear.json"
    rows = _earlier(path)
    for shape_name, shape in _wanted(settings):
        row = measured(shape, settings)
        row |= {"shape": shape_name, "peers": peers(), "dtype": settings.dtype}
        row |= dict(zip(("tokens", "features", "classes"), shape, strict=True))
        row["environment"] = report.environment()
        report.say(_line(row))
        rows = [r for r in rows if _identity(r) != _identity(row)] + [row]
        save_json(path, {"rows": rows})
    report.say(f"File: {path}")
    shown = "growth", settings.dtype
    if growth := [r for r in rows if (r["shape"], r["dtype"]) == shown]:
        draw(growth, out / "growth.png")
        report.say(f"Picture: {out / 'growth.png'}")


def _earlier(path: Path) -> list[dict[str, Any]]:
    """What has been measured before, there or elsewhere.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        list(map(_identity, rows))
        list(map(_line, rows))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadInput(
            f"{path} is damaged ({error}): restore it, or move it away."
        ) from None
    return rows


def _identity(row: dict[str, Any]) -> list[Any]:
    return [row[key] for key in ("shape", "classes", "peers", "dtype")]


def peers() -> list[str]:
    """Those that are installed here; optax always is."""
    return [name for name in ("torch", "tokamax") if find_spec(name)]


def _wanted(settings: Settings) -> Iterator[tuple[str, Shape]]:
    for name in settings.shapes:
        tokens, features, classes = (SHAPES | ON_A_GPU | QUICK)[name]
        for count in GROWTH if name == "growth" else (classes,):
            yield name, (tokens, features, count)


def measured(shape: Shape, settings: Settings) -> dict[str, Any]:
    """Milliseconds and memory of every contender, results compared first."""
    tokens, features, classes = shape
    random = np.random.default_rng(0)
    x = random.standard_normal((tokens, features), np.float32)
    w = random.standard_normal((features, classes), np.float32)
    w /= np.float32(features**0.5)
    labels = random.integers(0, classes, tokens).astype(np.int32)
    dtype = settings.dtype
    contenders = jax_contenders(x, w, labels, dtype)
    if torch_peer.INSTALLED:
        contenders |= torch_contenders(x, w, labels, dtype)
    values = 2 * (tokens * features + features * classes)  # both arrays, both gradients
    room = settings.gigabytes * 1e9 - jnp.dtype(dtype).itemsize * values
    logits = 4 * tokens * classes
    need = {TORCH: 3 * logits}  # as measured; torch does not say
    memory = {n: c.temp_bytes for n, c in contenders.items()}
    fitting = {
        name: contender
        for name, contender in contenders.items()
        if (contender.temp_bytes or need.get(name, 0)) <= room
    }
    if OURS not in fitting:
        raise BadInput(
            f"--gigabytes {settings.gigabytes:g} is too little for {OURS} on "
            f"{tokens} x {features} x {classes}: give more."
        )
    wrong, firsts = first_calls(fitting, NEAR[dtype])
    slow = {n: Timing(0.0, [s]) for n, s in firsts.items() if s > SLOW}
    rounds = {name: fitting[name] for name in fitting if name not in slow}
    timings = interleave(rounds, seconds=settings.seconds, least_rounds=3, warm_ups=1)
    medians = {n: 1e3 * timing.median for n, timing in (timings | slow).items()}
    out = (OURS, MATMULS, *wrong, *slow)
    theirs = {name: ms for name, ms in medians.items() if name not in out}
    best = min(theirs, key=lambda name: theirs[name]) if theirs else None
    return {
        "milliseconds": medians,
        "fastest": {n: 1e3 * min(t.seconds) for n, t in timings.items()},
        "rounds": len(timings[OURS].seconds),
        "timed_once": list(slow),
        "best_peer": best,
        "to_best_peer": ratio(timings[OURS], timings[best]) if best else None,
        "to_three_matmuls": ratio(timings[OURS], timings[MATMULS])
        if MATMULS in timings
        else None,
        "temp_bytes": memory,
        "wrong_by": wrong,
    }


def jax_contenders(
    x: np.ndarray, w: np.ndarray, labels: np.ndarray, dtype: str
) -> dict[str, Contender]:
    losses: dict[str, Callable[..., Array]] = {
        OURS: mean_linear_cross_entropy,
        OPTAX: on_logits,
    }
    if find_spec("tokamax"):
        tokamax: Any = import_module("tokamax")  # a peer, only where it is installed
        losses[TOKAMAX] = lambda x, w, labels: (
            tokamax.linear_softmax_cross_entropy_loss(
                x, labels, w, reduction="mean", implementation="chunked_xla"
            )
        )
    args = jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(labels)
    found = {
        name: compiled(jax.value_and_grad(loss, (0, 1)), *args)
        for name, loss in losses.items()
    }
    return found | {MATMULS: compiled(_three_matmuls, *args)}


def on_logits(x: Array, w: Array, labels: Array) -> Array:
    """The same mean by optax, with all logits in memory, in float32."""
    logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _three_matmuls(x: Array, w: Array, labels: Array) -> tuple[Array, Array, Array]:
    """What a loss on logits cannot do without."""
    z = lax.optimization_barrier(x @ w)
    return z[0, labels[0]], z @ w.T, x.T @ z


def torch_contenders(
    x: np.ndarray, w: np.ndarray, labels: np.ndarray, dtype: str
) -> dict[str, Contender]:
    torch: Any = import_module("torch")  # a peer, only where it is installed
    functional = torch.nn.functional
    features = torch_peer.tensor(x, dtype, differentiated=True)
    weights = torch_peer.tensor(w.T.copy(), dtype, differentiated=True)  # its layout
    ids = torch_peer.tensor(labels, "int64")

    def contender(loss: Callable[[], Any]) -> Contender:
        def value_and_gradients() -> Any:
            value = loss()
            return value, torch.autograd.grad(value, (features, weights))

        return torch_peer.contender(value_and_gradients)

    if not hasattr(functional, "linear_cross_entropy"):  # torch before 2.13
        product = partial(functional.linear, features, weights)
        return {TORCH: contender(lambda: functional.cross_entropy(product(), ids))}
    fused = partial(functional.linear_cross_entropy, features, weights, ids)
    chunked = torch.nn.LinearCrossEntropyOptions()
    return {
        TORCH: contender(fused),
        TORCH_CHUNKED: contender(partial(fused, options=chunked)),
    }


def first_calls(
    contenders: dict[str, Contender], near: float
) -> tuple[dict[str, float], dict[str, float]]:
    """How far off those are that are not near, and the seconds of everyone but us.

    Off is a loss or gradient, relative to ours: tokamax counts the zero columns with
    which it fills up its last block of classes.
    """
    mine, found, seconds = _numbers(contenders[OURS].run()), {}, {}
    for name in contenders.keys() - {OURS, MATMULS}:
        started = time.perf_counter()
        result = contenders[name].run()
        seconds[name] = time.perf_counter() - started
        pairs = zip(mine, _numbers(result), strict=True)
        apart = max(
            float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
            for ours, theirs in pairs
        )
        if not apart < near:
            found[name] = apart
    return found, seconds


def _numbers(result: Any) -> tuple[np.ndarray, ...]:
    value, (dx, dw) = result
    if not isinstance(dw, jax.Array):
        dw = dw.T  # torch's layout
    return tuple(torch_peer.numbers(array) for array in (value, dx, dw))


def _line(row: dict[str, Any]) -> str:
    times = "  ".join(
        f"{n} {ms:.0f}{' (once)' if n in row['timed_once'] else ''}"
        for n, ms in row["milliseconds"].items()
    )
    megabytes = "  ".join(
        f"{n} {count / 1e6:.0f}" for n, count in row["temp_bytes"].items() if count
    )
    ratios = [
        f"{row[key]:.2f} x {of}"
        for key, of in (
            ("to_best_peer", row["best_peer"]),
            ("to_three_matmuls", MATMULS),
        )
        if row[key]
    ]
    size = "x".join(str(row[key]) for key in ("tokens", "features", "classes"))
    lines = [f"{size}: {', '.join(ratios)}", f"  ms: {times}"]
    lines.append(f"  temporary MB: {megabytes}")
    lines += [f"  {n} is wrong by {off:.1e}" for n, off in row["wrong_by"].items()]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and temporary memory by the number of classes, on logarithmic axes."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    styles = {
        OURS: "o-",
        OPTAX: "s--",
        TOKAMAX: "^-.",
        TORCH: "v:",
        TORCH_CHUNKED: "D:",
    }
    for name, style in styles.items():
        for axes, key in ((time, "milliseconds"), (memory, "temp_bytes")):
            found = sorted(
                {r["classes"]: r[key][name] for r in rows if r[key].get(name)}.items()
            )
            if found:
                classes, values = zip(*found, strict=True)
                scaled = np.array(values) / (1e6 if axes is memory else 1e3)
                axes.plot(classes, scaled, style, label=name)
    tokens, features = rows[0]["tokens"], rows[0]["features"]
    for axes, label in (
        (time, "seconds for loss and both gradients"),
        (memory, "temporary MB by the compiler"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="classes", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{tokens} tokens, {features} features, {rows[0]['dtype']}")
    save_figure(path, figure)
