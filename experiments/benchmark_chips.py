"""Every function on one TPU v5e and one H100, as their compilers see it.

    uv run --with 'jax[tpu]' python -m experiments.benchmark chips
    uv run --with 'jax[cuda12]' python -m experiments.benchmark chips --chip h100

Nothing runs. The cost models count the body of a loop once: seconds and flops of the
fused linear loss are those of the program with all classes in one tile, its memory that
of the default chunks. For an H100 there is no cost model, only memory and bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import SingleDeviceSharding

from experiments import benchmark_dense as dense
from experiments import chips, report
from experiments.benchmark_linear import on_logits
from experiments.command import make_folder, results_folder
from experiments.files import save_json, save_text
from jax_softmax import mean_linear_cross_entropy

SHAPES = ("65536 x 10", "8192 x 1000", "1024 x 50257", "64 x 262144")
LINEAR = (16384, 4096, 128256)
COLUMNS = ("temp_bytes", "bytes_accessed", "seconds")


@dataclass(frozen=True)
class Settings:
    """Compile every function for a chip, ours and its peer's; write a table."""

    chip: Literal["v5e", "h100"] = "v5e"
    """A TPU v5e, or an H100."""
    quick: bool = False
    """One shape of logits, and a small linear layer."""
    out: Path | None = None
    """Where CHIP.json and CHIP.md go; by default experiments/results/chips, with
    --quick runs/chips-quick."""


def run(settings: Settings) -> None:
    """Compile, print, save."""
    out = results_folder("chips", settings.out, quick=settings.quick)
    device = (chips.v5e() if settings.chip == "v5e" else chips.h100()).item(0)
    make_folder(out)
    rows = []
    for name in SHAPES[:1] if settings.quick else SHAPES:
        for dtype in ("float32", "bfloat16"):
            rows += dense_rows(device, name, dtype)
    rows.append(linear_row(device, (256, 64, 2048) if settings.quick else LINEAR))
    found = {"chip": settings.chip, "rows": rows, "environment": report.environment()}
    save_json(out / f"{settings.chip}.json", found)
    save_text(out / f"{settings.chip}.md", table(rows))
    report.say(table(rows))


def dense_rows(device: Any, shape_name: str, dtype: str) -> list[dict[str, Any]]:
    """A row for each function of logits."""
    shape = dense.SHAPES[shape_name]
    arguments = (
        _struct(device, shape, jnp.dtype(dtype)),
        _struct(device, shape[:-1], jnp.int32),
    )
    mine, theirs = dense.jax_functions(dense.OURS), dense.jax_functions("jax")
    return [
        {
            "function": name,
            "shape": f"{shape_name}, {dtype}",
            "ours": chips.figures(_compiled(mine[name], arguments)),
            "peer": chips.figures(_compiled(theirs[name], arguments)),
        }
        for name in dense.LIMIT
    ]


def linear_row(device: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The mean of the linear loss with both gradients, in bfloat16."""
    tokens, features, classes = shape
    arguments = (
        _struct(device, (tokens, features), jnp.dtype("bfloat16")),
        _struct(device, (features, classes), jnp.dtype("bfloat16")),
        _struct(device, (tokens,), jnp.int32),
    )

    def fused(chunk: tuple[int, int] | None) -> Any:
        def mean(x: Array, w: Array, labels: Array) -> Array:
            return mean_linear_cross_entropy(x, w, labels, chunk=chunk)

        return jax.value_and_grad(mean, (0, 1))

    peer = chips.figures(_compiled(jax.value_and_grad(on_logits, (0, 1)), arguments))
    chunked = chips.figures(_compiled(fused(None), arguments))
    whole = chips.figures(_compiled(fused((tokens, classes)), arguments))
    matmul = 2 * tokens * features * classes
    flops = {name: who.get("flops") for name, who in (("ours", whole), ("peer", peer))}
    return {
        "function": "mean_linear_cross_entropy, value and both gradients",
        "shape": f"{tokens} x {features} x {classes}, bfloat16",
        "ours": whole | {"temp_bytes": chunked["temp_bytes"]},
        "peer": peer,
        "matmuls": {name: n and n / matmul for name, n in flops.items()},
    }


def _struct(device: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def _compiled(function: Any, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
    return jax.jit(function).lower(*arguments).compile()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, ours / the peer's in each column."""
    header = "function", "shape", "temp, MB", "bytes accessed, MB", "cost model, us"
    lines = []
    for row in rows:
        cells = [
            " / ".join(_number(row[who].get(key), scale) for who in ("ours", "peer"))
            for key, scale in zip(COLUMNS, (1e-6, 1e-6, 1e6), strict=True)
        ]
        lines.append((row["function"], row["shape"], *cells))
    return report.table(header, lines, numbers_from=2) + "\n"


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{scale * value:.4g}"
