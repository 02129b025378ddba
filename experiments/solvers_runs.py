"""One run to the optimum: ours, or scikit-learn's watched from within."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model._linear_loss import LinearModelLoss

from experiments import data, report
from experiments.images import pixels
from jax_softmax import SoftmaxRegression, Solution, solve

GROWTH = 2  # of the runs of a curve
NEAR = 1e-4  # in the 2-norm of all weights


class Problem(NamedTuple):
    """Features in float32, exactly the same for every contender."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    classes: int

    @property
    def l2(self) -> float:
        return 1 / len(self.labels)

    def objective(self, w: np.ndarray, b: np.ndarray) -> float:
        """In float64, block by block."""
        total = 0.0
        for start in range(0, len(self.labels), 4096):
            rows = slice(start, start + 4096)
            z = self.features[rows].astype(np.float64) @ w + b
            labels = self.labels[rows]
            z -= z.max(1, keepdims=True)
            total += (np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).sum()
        return float(total / len(self.labels) + self.l2 / 2 * (w**2).sum())


class Point(NamedTuple):
    """After so long, the objective was this."""

    seconds: float
    objective: float
    steepest: float = np.inf  # largest entry of the gradient, where it is known


class TimeIsUp(Exception):
    """The limit has been reached."""


def problem(name: str, data_dir: Path | None) -> Problem:
    """A data set's training images."""
    dataset = data.load(name, data_dir)
    images, labels = dataset.train_images, dataset.train_labels
    features = np.asarray(pixels(images))
    return Problem(name, images, labels, features, len(dataset.class_names))


def ours(
    p: Problem,
    solver: str,
    dtype: str,
    start: SoftmaxRegression | None = None,
    **options: Any,
) -> Solution:
    """Our solver, by default from zero, on the images as they are."""
    with jax.enable_x64(dtype == "float64"):
        if start is None:
            zeros = jnp.zeros((p.features.shape[1], p.classes), dtype)
            start = SoftmaxRegression(zeros, zeros[0])
        options = {"solver": solver, "l2": p.l2, "transform": pixels} | options
        return solve(start, p.images, p.labels, **options)


def sklearns(p: Problem, solver: str, dtype: str, **options: Any) -> LogisticRegression:
    """scikit-learn's solver from zero."""
    features = p.features.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs do not converge, and say so
        model = LogisticRegression(C=1.0, solver=solver, random_state=0, **options)
        return model.fit(features, p.labels)


def weights(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of our solution or scikit-learn's estimator, in float64."""
    if isinstance(result, Solution):
        w, b = result.model
    else:
        w, b = result.coef_.T, result.intercept_
    return np.asarray(w, np.float64), np.asarray(b, np.float64)


def growing(
    p: Problem, go: Callable[[int], Any], limit: float, lowest: float = -np.inf
) -> tuple[list[Point], Any]:
    """Longer and longer runs from the start, until they end by themselves, late or low.

    Low is at the objective `lowest`.
    """
    points: list[Point] = []
    iterations, result = 1, go(1)  # compiles
    while not points or points[-1].seconds * GROWTH < limit:
        started = time.perf_counter()
        result = go(iterations)
        took = time.perf_counter() - started
        points.append(Point(took, p.objective(*weights(result))))
        if isinstance(result, Solution) and result.certificate.iterations < iterations:
            break
        if points[-1].objective <= lowest:
            break
        iterations = max(iterations + 1, round(iterations * GROWTH))
    return points, result


def watched(p: Problem, solver: str, dtype: str, limit: float) -> list[Point]:
    """One run of scikit-learn's with tolerance 1e-8, and what it saw on its way."""
    points: list[Point] = []
    inside = {"lbfgs": "loss_gradient", "newton-cg": "gradient_hessian_product"}[solver]
    plain = getattr(LinearModelLoss, inside)
    started = time.perf_counter()

    def noted(self: Any, coef: np.ndarray, *args: Any, **options: Any) -> Any:
        first, second = result = plain(self, coef, *args, **options)
        now = time.perf_counter() - started
        gradient = second if solver == "lbfgs" else first
        steepest = float(np.abs(gradient).max())
        value = float(first) if solver == "lbfgs" else p.objective(*_unravelled(coef))
        points.append(Point(now, value, steepest))
        if now > limit:
            raise TimeIsUp
        return result

    def _unravelled(coef: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = coef.reshape((p.classes, -1), order="F").T.astype(np.float64)
        return both[:-1], both[-1]

    with mock.patch.object(LinearModelLoss, inside, noted):
        try:
            sklearns(p, solver, dtype, tol=1e-8, max_iter=10**6)
        except TimeIsUp:
            report.say(f"scikit-learn {solver}, {dtype}: stopped at {limit:g} s")
    return points


def finished(p: Problem, solver: str, result: Solution) -> Solution:
    """On from there until the certified distance of the weights is small enough."""
    tolerance = NEAR * p.l2 / 2
    options = {"tolerance": tolerance, "max_iterations": 2000}
    return ours(p, solver, "float64", start=result.model, **options)
