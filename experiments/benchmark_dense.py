"""Dense softmax, logsumexp and cross-entropy against the peers that are installed."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

import jax_softmax
from experiments import report, torch_peer
from experiments.command import above_zero, make_folder, quickened, results_folder
from experiments.files import save_figure, save_json, save_text
from experiments.measure import (
    Contender,
    Timing,
    compiled,
    interleave,
    with_bytecode,
)

OURS = "jax_softmax"
READ, COPY = "read", "copy"
SHAPES: dict[str, tuple[int, ...]] = {
    "256 x 10": (256, 10),
    "4096 x 10": (4096, 10),
    "65536 x 10": (65536, 10),
    "8192 x 1000": (8192, 1000),
    "16 x 128 x 4096": (16, 128, 4096),
    "1024 x 50257": (1024, 50257),
    "64 x 262144": (64, 262144),
    "1 x 10000000": (1, 10_000_000),
}
SHAPES_ON_A_GPU: dict[str, tuple[int, ...]] = {
    "16777216 x 10": (16777216, 10),
    "262144 x 1000": (262144, 1000),
    "8192 x 50257": (8192, 50257),
}
"""Large enough that the time until a call reaches the card does not count."""
REPEATS = {"256 x 10": 200, "4096 x 10": 50}
"""Small shapes run inside a compiled loop, so that dispatch does not count."""

COMPARED = 10_000_000  # numbers of each result


@dataclass(frozen=True)
class Settings:
    """Time every function, shape and type; write tables, JSON and a picture."""

    out: Path | None = None
    """Where dense.json, .md and .png go; by default experiments/results/dense, with
    --quick runs/dense-quick."""
    seconds: float = 3.0
    """For each function at each shape."""
    quick: bool = False
    """Small shapes only, a tenth of a second each."""


Function = Callable[[Any, Any], Any]


def jax_functions(source: str) -> dict[str, Function]:
    """Each function of (logits, labels), as ours or as jax.nn and optax have it."""
    if source == OURS:
        losses = jax_softmax.cross_entropy
        reductions = (
            jax_softmax.logsumexp,
            jax_softmax.softmax,
            jax_softmax.log_softmax,
        )
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels
        reductions = (
            lambda z: jax.nn.logsumexp(z, axis=-1),
            jax.nn.softmax,
            jax.nn.log_softmax,
        )
    logsumexp, softmax, log_softmax = reductions
    return {
        "logsumexp": lambda z, y: logsumexp(z),
        "softmax": lambda z, y: softmax(z),
        "log_softmax": lambda z, y: log_softmax(z),
        "cross_entropy": lambda z, y: losses(z, y),
        "value and grad": lambda z, y: jax.value_and_grad(
            lambda z: losses(z, y).astype(jnp.float32).mean()
        )(z),
    }


LIMIT = {
    "logsumexp": READ,
    "softmax": COPY,
    "log_softmax": COPY,
    "cross_entropy": READ,
    "value and grad": COPY,
}
LIMITS: dict[str, Function] = {
    READ: lambda z, y: z.max(-1),
    COPY: lambda z, y: z + jnp.ones((), z.dtype),
}


def torch_functions(z: np.ndarray, y: np.ndarray, dtype: str) -> dict[str, Contender]:
    """The same in torch, eager, on tensors of their own."""
    torch: Any = import_module("torch")  # a peer, only where it is installed

    logits = torch_peer.tensor(z, dtype)
    labels = torch_peer.tensor(y, "int64")
    leaf = torch_peer.tensor(z, dtype, differentiated=True)
    nn = torch.nn.functional
    flat = (-1, logits.shape[-1])

    def value_and_grad() -> Any:
        loss = nn.cross_entropy(leaf.view(flat), labels.view(-1))
        return loss, torch.autograd.grad(loss, leaf)[0]

    def losses() -> Any:
        rows = nn.cross_entropy(logits.view(flat), labels.view(-1), reduction="none")
        return rows.view(labels.shape)

    return {
        "logsumexp": torch_peer.contender(lambda: torch.logsumexp(logits, -1)),
        "softmax": torch_peer.contender(lambda: torch.softmax(logits, -1)),
        "log_softmax": torch_peer.contender(lambda: torch.log_softmax(logits, -1)),
        "cross_entropy": torch_peer.contender(losses),
        "value and grad": torch_peer.contender(value_and_grad),
    }


def scipy_functions(z: np.ndarray) -> dict[str, Contender]:
    from scipy import special

    return {
        "logsumexp": Contender(lambda: special.logsumexp(z, axis=-1)),
        "softmax": Contender(lambda: special.softmax(z, axis=-1)),
        "log_softmax": Contender(lambda: special.log_softmax(z, axis=-1)),
    }


def looped(function: Function, repeats: int) -> Function:
    """The function, `repeats` times one after another.

    Each round's whole result is the loop's state, and its first number, times zero,
    is added to the next round's logits: no round can be skipped, cut or hoisted.
    """

    def loop(z: Any, y: Any) -> Any:
        def once(out: Any, _: None) -> tuple[Any, None]:
            first = jax.tree.leaves(out)[-1].ravel()[0]
            return function(z + (first * 0).astype(z.dtype), y), None

        shapes = jax.eval_shape(function, z, y)
        zeros = jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), shapes)
        return lax.scan(once, zeros, length=repeats)[0]

    return loop


def run(settings: Settings) -> None:
    """Measure, print, save."""
    above_zero(settings, "seconds")
    settings = quickened(settings, seconds=0.1)
    out = results_folder("dense", settings.out, quick=settings.quick)
    make_folder(out)
    rows = []
    shapes = SHAPES_ON_A_GPU if jax.default_backend() == "gpu" else SHAPES
    if settings.quick:
        shapes = dict(list(SHAPES.items())[:3])
    for dtype in ("float32", "bfloat16"):
        for shape_name, shape in shapes.items():
            for row in measured(shape_name, shape, dtype, settings.seconds):
                rows.append(row)
                report.say(_line(row))
    summary = {
        dtype: math.exp(
            np.mean([math.log(r["to_peer"]) for r in rows if r["dtype"] == dtype])
        )
        for dtype in ("float32", "bfloat16")
    }
    for dtype, ratio in summary.items():
        report.say(
            f"{dtype}: geometric mean of the ratios to the best peer {ratio:.2f}"
        )
    milliseconds = import_milliseconds(1 if settings.quick else 9)
    report.say(f"import jax_softmax adds {milliseconds:.0f} ms to import jax, optax")
    facts = {
        "environment": report.environment(),
        "import_milliseconds": milliseconds,
        "geometric_mean_to_best_peer": summary,
    }
    save_json(out / "dense.json", facts | {"rows": rows})
    save_text(out / "dense.md", table(rows))
    draw(rows, out / "dense.png")
    report.say(f"Files: dense.json, dense.md and dense.png in {out}")


def import_milliseconds(runs: int) -> float:
    """What import jax_softmax adds to import jax, optax: the median, from bytecode."""
    code = (
        "import gc, time, jax, optax; gc.collect(); began = time.perf_counter(); "
        "import jax_softmax; print(1e3 * (time.perf_counter() - began))"
    )
    with TemporaryDirectory() as kept:
        command, environment = [sys.executable, "-c", code], with_bytecode(Path(kept))
        _, *times = (
            float(subprocess.check_output(command, env=environment))
            for _ in range(runs + 1)
        )
    return median(times)


def measured(
    shape_name: str, shape: tuple[int, ...], dtype: str, seconds: float
) -> list[dict[str, Any]]:
    """A row for each function at this shape and type."""
    random = np.random.default_rng(0)
    numbers = random.standard_normal(shape, np.float32)
    ids = random.integers(0, shape[-1], shape[:-1]).astype(np.int32)
    z, y = jnp.asarray(numbers, dtype), jnp.asarray(ids)
    sources = {name: jax_functions(name) for name in (OURS, "jax")}
    repeats = REPEATS.get(shape_name, 1)
    eager: dict[str, dict[str, Contender]] = {}
    if repeats == 1 and torch_peer.INSTALLED:
        eager["torch"] = torch_functions(np.asarray(z, np.float32), ids, dtype)
    if repeats == 1 and dtype == "float32" and jax.default_backend() == "cpu":
        eager["scipy"] = scipy_functions(numbers)

    rows = []
    for function, limit in LIMIT.items():
        contenders = {
            name: compiled(_maybe_looped(of[function], repeats), z, y)
            for name, of in sources.items()
        }
        contenders[limit] = compiled(_maybe_looped(LIMITS[limit], repeats), z, y)
        contenders |= {
            name: of[function] for name, of in eager.items() if function in of
        }
        if repeats == 1:
            check_agreement(function, contenders, limit, dtype)
        timings = interleave(contenders, seconds=seconds)
        rows.append(_row(function, shape_name, dtype, limit, contenders, timings))
    return rows


def check_agreement(
    function: str, contenders: dict[str, Contender], limit: str, dtype: str
) -> None:
    """All contenders compute the same thing, to the precision of their type.

    A difference may be a share of the number itself or of the middle one in size. In
    bfloat16 torch's gradients are exponentials of rounded log-probabilities, and so up
    to 6 % off with 262144 classes.
    """
    tolerance = 1e-1 if dtype == "bfloat16" else 2e-4
    mine = _numbers(contenders[OURS].run())
    least = tolerance * float(np.median(np.abs(mine)))
    for name, contender in contenders.items():
        if name not in (OURS, limit):
            theirs = _numbers(contender.run())
            np.testing.assert_allclose(
                theirs, mine, rtol=tolerance, atol=least, err_msg=f"{function}: {name}"
            )


def _numbers(result: Any) -> np.ndarray:
    last = result[-1] if isinstance(result, tuple) else result
    return torch_peer.numbers(last.reshape(-1)[:COMPARED])


def _maybe_looped(function: Function, repeats: int) -> Function:
    return function if repeats == 1 else looped(function, repeats)


def _row(
    function: str,
    shape: str,
    dtype: str,
    limit: str,
    contenders: dict[str, Contender],
    timings: dict[str, Timing],
) -> dict[str, Any]:
    medians = {name: timing.median for name, timing in timings.items()}
    peers = {n: t for n, t in medians.items() if n not in (OURS, limit)}
    best = min(peers, key=lambda name: peers[name])
    return {
        "function": function,
        "shape": shape,
        "dtype": dtype,
        "milliseconds": {name: 1e3 * seconds for name, seconds in medians.items()},
        "best_peer": best,
        "to_peer": medians[OURS] / peers[best],
        "limit": limit,
        "to_limit": medians[OURS] / medians[limit],
        "rounds": len(timings[OURS].seconds),
        "temp_bytes": {n: c.temp_bytes for n, c in contenders.items()},
        "compile_seconds": {n: c.compile_seconds for n, c in contenders.items()},
    }


def _line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{n} {ms:.3g}" for n, ms in row["milliseconds"].items())
    return (
        f"{row['dtype']:<9}{row['shape']:<16}{row['function']:<15}"
        f"x{row['to_peer']:<6.2f}of {row['best_peer']:<7}"
        f"x{row['to_limit']:<6.2f}of {row['limit']:<5} ms: {times}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: time over the best peer's, and over the limit's, by shape."""
    titles = [f"{name}, of {limit}" for name, limit in LIMIT.items()]
    tables = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines = []
        for shape in dict.fromkeys(row["shape"] for row in rows):
            cells = [
                f"{row['to_peer']:.2f} of {row['best_peer']}, {row['to_limit']:.1f}"
                for row in rows
                if (row["dtype"], row["shape"]) == (dtype, shape)
            ]
            lines.append((shape, *cells))
        tables.append(report.table((dtype, *titles), lines))
    return "\n\n".join(tables) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: time as a share of the best peer's; below the line is ahead."""
    rows = [row for row in rows if row["dtype"] == "float32"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(LIMIT)
    for i, function in enumerate(LIMIT):
        ratios = [row["to_peer"] for row in rows if row["function"] == function]
        places = np.arange(len(shapes)) + (i - (len(LIMIT) - 1) / 2) * width
        axes.bar(places, ratios, width, label=function)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
    axes.set(ylabel="time / time of the best peer", title="float32: lower is faster")
    axes.legend(ncols=len(LIMIT), fontsize=8, loc="upper center")
    axes.set_ylim(0, 1.25 * max(1, *(row["to_peer"] for row in rows)))
    save_figure(path, figure)
