"""The loss on 1 to 256 TPU chips, by the real compiler: no chip is needed.

    uv run --with 'jax[tpu]' python -m experiments.scaling pod

The mean cross-entropy of x w with both gradients, in bfloat16, of N = 1024 rows with
D = 4096 features for each data shard and V = 262144 classes, on d x m chips (data x
model). Ours is mean_linear_cross_entropy with axis_name inside shard_map; the naive
loss is optax's of the logits, which the compiler partitions on its own.

What must be added up over chips, in bytes of one chip's operands:

    dx    N D 2          a chip has the part of its classes             if m > 1
    rows  N 3 4          maximum, tail and the label's logit            if m > 1
    dw    D (V / m) 2    a chip has the part of its rows                if d > 1

Meshes are square, d = m. Each data shard brings rows of its own, and a chip has
N D V / m of the work; so efficiency from 4 chips on is (2 seconds on 4) / (m seconds on
m^2). Seconds and flops are from the compiler's cost model. It counts the body of a loop
once: for ours they are those of the program with a chip's classes in one tile.
In the bytes of collectives, what is gathered counts as often as it arrives, m times;
and the rows in ours' loop over two chunks of 512 tokens count once: 6 m KB are missing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from experiments import report
from experiments.benchmark_linear import on_logits
from experiments.chips import V5E, figures, v5e
from experiments.command import BadInput, make_folder, results_folder
from experiments.files import save_figure, save_json, save_text
from jax_softmax import mean_linear_cross_entropy

BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "u8": 1, "s8": 1}
COLLECTIVE = re.compile(
    r"= (?P<result>\S.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)


class Shape(NamedTuple):
    """Rows of each data shard, features, classes."""

    rows: int = 1024
    features: int = 4096
    classes: int = 262144


def mesh_of(chips: int) -> Mesh:
    """Described TPU v5e chips as data x model."""
    side = math.isqrt(chips)
    return Mesh(v5e(chips).reshape(side, side), ("data", "model"))


def ours(mesh: Mesh, shape: Shape, chunk: tuple[int, int] = (512, 8192)) -> Any:
    """Value and gradients of the mean over all rows, classes over "model"."""
    count = float(shape.rows * mesh.shape["data"])

    def mean(x: Array, w: Array, labels: Array) -> Array:
        here = mean_linear_cross_entropy(
            x, w, labels, normalizer=count, axis_name="model", chunk=chunk
        )
        return lax.psum(here, "data")

    spread = jax.shard_map(
        mean,
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("data")),
        out_specs=P(),
    )
    return jax.value_and_grad(spread, (0, 1))


def naive(mesh: Mesh, shape: Shape) -> Any:
    """The same by optax, partitioned by the compiler."""
    return jax.value_and_grad(on_logits, (0, 1))


def compiled(function: Any, mesh: Mesh, shape: Shape) -> Any:
    rows, features, classes = shape
    rows *= mesh.shape["data"]

    def struct(dims: tuple[int, ...], dtype: Any, *spec: str | None) -> Any:
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    return (
        jax.jit(function(mesh, shape))
        .lower(
            struct((rows, features), jnp.bfloat16, "data"),
            struct((features, classes), jnp.bfloat16, None, "model"),
            struct((rows,), jnp.int32, "data"),
        )
        .compile()
    )


def traffic(program: str) -> dict[str, int]:
    """Bytes of the results of a chip's collectives, by kind, in a compiled program."""
    found: dict[str, int] = {}
    for match in COLLECTIVE.finditer(program):
        sizes = [
            BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
        ]
        found[match["kind"]] = found.get(match["kind"], 0) + sum(sizes)
    return found


def least_traffic(chips: int, shape: Shape) -> int:
    """What the docstring of this file derives, in bytes."""
    if chips == 1:
        return 0
    rows, features, classes = shape
    return (
        rows * features * 2 + rows * 3 * 4 + features * classes // math.isqrt(chips) * 2
    )


def measured(chips: int, shape: Shape) -> dict[str, Any]:
    """One row of the table."""
    mesh = mesh_of(chips)
    one_tile = partial(ours, chunk=(shape.rows, shape.classes))
    row: dict[str, Any] = {"chips": chips, "mesh": dict(mesh.shape)}
    row["least_bytes"] = least_traffic(chips, shape)
    for name, function, costed in (("ours", ours, one_tile), ("naive", naive, None)):
        program = compiled(function, mesh, shape)
        timed = compiled(costed, mesh, shape) if costed else program
        sent = traffic(program.as_text())
        row[name] = figures(timed) | {
            "temp_bytes": figures(program)["temp_bytes"],
            "collectives": sent,
            "collective_bytes": sum(sent.values()),
        }
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, ours / naive in each column."""
    header = (
        *("chips", "temp, MB", "flops", "collectives, MB", "least, MB"),
        *("cost model, ms", "efficiency from 4"),
    )
    lines = []
    for row in rows:

        def both(key: str, scale: float, row: dict[str, Any] = row) -> str:
            return " / ".join(f"{row[n][key] / scale:.4g}" for n in ("ours", "naive"))

        lines.append(
            (
                *(f"{row['chips']}", both("temp_bytes", 1e6), both("flops", 1)),
                *(both("collective_bytes", 1e6), f"{row['least_bytes'] / 1e6:.4g}"),
                *(both("seconds", 1e-3), " / ".join(_efficiencies(row, rows))),
            )
        )
    return report.table(header, lines, numbers_from=0) + "\n"


def efficiency(row: dict[str, Any], of: dict[str, Any], name: str) -> float:
    """Work of a chip in a second, over that in the row `of`."""
    return (of[name]["seconds"] * of["mesh"]["model"]) / (
        row[name]["seconds"] * row["mesh"]["model"]
    )


def _efficiencies(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    four = next((r for r in rows if r["chips"] == 4), None)
    if four is None or row["chips"] < 4:
        return ["-"]
    return [f"{efficiency(row, four, name):.3f}" for name in ("ours", "naive")]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory and efficiency against the number of chips."""
    chips = [row["chips"] for row in rows]
    four = [row for row in rows if row["chips"] == 4]
    later = [row for row in rows if four and row["chips"] >= 4]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (
        ("ours", "jax_softmax"),
        ("naive", "naive, partitioned by XLA"),
    ):
        temp = [row[name]["temp_bytes"] / 1e6 for row in rows]
        left.semilogx(chips, temp, "o-", label=label)
        values = [efficiency(row, four[0], name) for row in later]
        right.semilogx([row["chips"] for row in later], values, "o-", label=label)
    if any(row[name]["temp_bytes"] for row in rows for name in ("ours", "naive")):
        left.set_yscale("log")  # a small shape needs none
    left.set(xlabel="TPU v5e chips", ylabel="temporary memory of a chip, MB")
    right.set(
        xlabel="TPU v5e chips", ylabel="efficiency from 4 chips on", ylim=(0, 1.1)
    )
    for axes in (left, right):
        axes.set_xticks(chips, [str(n) for n in chips])
        axes.minorticks_off()
        axes.legend()
    save_figure(path, figure)


@dataclass(frozen=True)
class Pod:
    """Compile the loss for TPU v5e chips and tabulate what the compiler says."""

    chips: tuple[int, ...] = (1, 4, 16, 64, 256)
    """How many chips: 1, 4, 16, 64, 256."""
    quick: bool = False
    """A small shape: a check that everything works."""
    out: Path | None = None
    """The folder for pod.json, pod.md and pod.png; by default
    experiments/results/scaling, with --quick runs/scaling-quick."""


def run(settings: Pod) -> None:
    unknown = set(settings.chips) - set(V5E)
    if unknown or not settings.chips:
        got = ", ".join(map(str, settings.chips)) or "none"
        raise BadInput(f"--chips must be of {', '.join(map(str, V5E))}, got {got}.")
    out = results_folder("scaling", settings.out, quick=settings.quick)
    make_folder(out)
    shape = Shape(256, 512, 16384) if settings.quick else Shape()
    rows = []
    for chips in sorted(set(settings.chips)):
        rows.append(measured(chips, shape))
        report.say(f"{chips} chips: done")
    found = {
        "shape": shape._asdict(),
        "rows": rows,
        "environment": report.environment(),
    }
    save_json(out / "pod.json", found)
    save_text(out / "pod.md", table(rows))
    draw(rows, out / "pod.png")
    report.say(table(rows))
