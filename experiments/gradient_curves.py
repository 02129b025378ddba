"""Errors of gradients as curves: against the margin, and against the step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import gradient_cases
from experiments.gradient_roads import OURS, by_leaf, compared, contenders, rows_by_road
from jax_softmax import SoftmaxRegression
from jax_softmax import _gradient_methods as methods

MARGIN_PANELS = (
    ("cross_entropy, labels", "float32"),
    ("softmax at the label", "float32"),
    ("cross_entropy, labels", "bfloat16"),
    ("cross_entropy, labels", "float64"),
)
STEP_TYPES = ("float64", "float32", "bfloat16")


class MarginCurves(NamedTuple):
    """The worst errors of each road, a number for each margin."""

    title: str
    dtype: str
    margins: list[float]
    ulps: dict[str, list[float]]
    relative: dict[str, list[float]]


def by_margin(title: str, dtype: str, margins: Sequence[float]) -> MarginCurves:
    """Rows whose label is ahead of every other class by just that margin."""
    random = np.random.default_rng(0)
    rows, classes = 16, 10
    z = random.normal(size=(rows, classes)).astype(jnp.dtype(dtype)).astype(np.float32)
    labels = random.integers(0, classes, rows)
    hit = np.arange(classes) == labels[:, None]
    others = np.where(hit, -np.inf, z).max(-1, keepdims=True)
    stack = np.stack([np.where(hit, others + margin, z) for margin in margins])
    every = jnp.asarray(np.tile(labels, (len(margins), 1)), jnp.int32)
    with jax.enable_x64(dtype == "float64"):
        cases = gradient_cases.on_logits(jnp.asarray(stack, dtype), every)
        case = next(case for case in cases if case.title == title)
        case = by_leaf(case)
        found = rows_by_road(compared(case, contenders(case), probes=2))
    return MarginCurves(
        title,
        dtype,
        list(margins),
        {road: [row.max_ulp for row in rows] for road, rows in found.items()},
        {road: [row.max_rel for row in rows] for road, rows in found.items()},
    )


def lost_at(curves: MarginCurves, road: str) -> float | None:
    """The first margin at which an entry has lost all its digits."""
    pairs = zip(curves.margins, curves.relative[road], strict=True)
    return next((margin for margin, error in pairs if not error < 0.99), None)


class StepCurves(NamedTuple):
    """Median relative errors of differences, a number for each step."""

    dtype: str
    steps: list[float]
    central: list[float]
    richardson: list[float]
    autodiff: float


def by_step(
    model: SoftmaxRegression,
    x: np.ndarray,
    labels: np.ndarray,
    dtype: str,
    steps: Sequence[float],
    *,
    entries: int = 32,
) -> StepCurves:
    """Differences of the objective along the weights with the largest gradient."""
    w, b = (np.asarray(array) for array in model)
    with jax.enable_x64(dtype == "float64"):
        ours = SoftmaxRegression(jnp.asarray(w, dtype), jnp.asarray(b, dtype))
        batch = jnp.asarray(x, dtype), jnp.asarray(labels)
        case = next(iter(gradient_cases.on_weights(ours, *batch)))
        autodiff = np.asarray(jax.jit(case.roads()[OURS])(*case.args).w, np.float64)

        @jax.jit
        def mapping(moving: Any, fixed: Any) -> list[Any]:
            return [case.ours(SoftmaxRegression(*moving), *fixed)]

        with jax.enable_x64(True):
            wide = jax.tree.map(_widened, case.args)
            exact = np.asarray(jax.grad(case.judge)(*wide).w).ravel()
        places = np.argsort(-np.abs(exact))[:entries]
        problem = methods.Problem(mapping, list(ours), batch, None)
        lines = methods.coordinates(problem, 0, places)

        def error(slopes: Any) -> float:
            right = exact[places]
            return float(np.median(np.abs(np.ravel(slopes) - right) / np.abs(right)))

        with np.errstate(all="ignore"):
            central = [
                error([methods.central(line, step) for line in lines]) for step in steps
            ]
            richardson = [
                error([methods.richardson(line, step)[0][0] for line in lines])
                for step in steps
            ]
        return StepCurves(
            dtype, list(steps), central, richardson, error(autodiff.ravel()[places])
        )


def _widened(leaf: Any) -> Any:
    array = np.asarray(leaf)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.asarray(array.astype(np.float64)) if floating else leaf


def best(steps: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """The smallest error, and the step that has it."""
    found = [(e, h) for e, h in zip(errors, steps, strict=True) if np.isfinite(e)]
    return min(found)
