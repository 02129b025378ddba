"""To the optimum: L-BFGS and truncated Newton on all rows, with a certificate."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Integer, Real

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._descent import (
    CONVERGED,
    EXHAUSTED,
    NOT_FINITE,
    STALLED,
    Search,
    Solver,
    descend,
)
from jax_softmax._full_batch import FullBatch, Parameters, RowLogits, outcome
from jax_softmax._regression import SoftmaxRegression, parameters

REASONS = {
    CONVERGED: "the gradient is within the tolerance",
    EXHAUSTED: "max_iterations were not enough",
    STALLED: "rounding: no step lowers the objective in this type; "
    "use float64, scale the features or raise the tolerance",
    NOT_FINITE: "the objective is not finite: look for non-finite features or weights, "
    "and for labels that are no class",
}
SEPARABLE = (
    "the classes are separable and l2 is 0: the objective has no minimum, "
    "larger weights are always better"
)

EMPTY = (
    "a class has no rows that count and l2 is 0: the objective has no minimum, "
    "a smaller bias of that class is always better"
)


class Certificate(NamedTuple):
    """What is known about a solution, computed afresh at the returned model.

    With F(w) = min over b of the objective: F is l2-strongly convex, and after the
    biases are brought to their optimum its gradient is the objective's in w. Hence

        objective - minimum <= ||dF||^2 / (2 l2),   ||w - w_best|| <= ||dF|| / l2,

    and the first is the gap to the dual problem at softmax(x w + b), exactly.

    Attributes:
        objective: the weighted mean loss plus l2 / 2 * sum(w^2).
        gradient_norm: the 2-norm of the gradient, over what may move.
        iterations: steps made.
        passes: how often x was read for a product and its transpose.
        gap: the objective is at most this far above the minimum; inf when l2 is 0.
        distance: the weights are at most this far from the best ones (2-norm over all
            of w); inf when l2 is 0. Of the biases, which are not penalised, no bound
            is known. Both count what rounding can hide in ||dF||; about what rounding
            leaves of the gradient in b they assume that it is nothing.
        converged: whether gradient_norm is within the tolerance at a minimum.
        reason: why the iteration ended, as a sentence.
    """

    objective: float
    gradient_norm: float
    iterations: int
    passes: float
    gap: float
    distance: float
    converged: bool
    reason: str


class Solution(NamedTuple):
    """The best model, its weights and biases adding up to 0 over the classes."""

    model: SoftmaxRegression
    certificate: Certificate


def solve(
    model: SoftmaxRegression,
    x: ArrayLike,
    labels: Integer[ArrayLike, " rows"],
    *,
    solver: Solver = "lbfgs",
    l2: float = 0.0,
    class_weights: Real[ArrayLike, " classes"] | None = None,
    sample_weights: Real[ArrayLike, " rows"] | None = None,
    intercept: bool = True,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    transform: Callable[[Array], Array] = jnp.asarray,
) -> Solution:
    """Minimise the weighted mean loss plus l2 / 2 * sum(w^2), all rows at a time.

        sum_i s_i nll_i / sum_i s_i + l2 / 2 * ||w||^2,   s_i = sample * class weight

    scikit-learn's C is 1 / (l2 * sum_i s_i), so 1 / (l2 * rows) without weights. For
    two classes its model has one column, w_1 - w_0, and its C is 2 / (l2 * sum_i s_i).

    Both solvers start from each class's own block of the Hessian, factored again from
    time to time: L-BFGS as its first guess of the inverse, and the truncated Newton
    method as the preconditioner of conjugate gradients on closed-form Hessian products.
    Step lengths are found on the logits, which are affine in the step: no pass over x.
    Everything is computed in the model's type, in at least float32; x is kept as it is.
    The host judges the outcome, so this is no function to jit or vmap.

    Args:
        model: where to start.
        x: one row per example, of any type, for example uint8.
        labels: class ids.
        solver: "lbfgs" or "newton-cg".
        l2: the penalty on w; the biases are free.
        class_weights: one for each class, not negative.
        sample_weights: one for each row, not negative.
        intercept: False leaves the biases as they are.
        tolerance: of the gradient's 2-norm.
        max_iterations: at most so many steps.
        transform: rows of x to features [rows, features], inside the compiled pass.

    Returns:
        The model and its certificate. No convergence is not an error: read
        certificate.reason.

    Raises:
        ValueError: no rows, shapes that do not fit, an unknown solver, or a weight, l2
            or tolerance that is negative or not finite.
        TypeError: what should be numbers, integers or a flag is not.

    Sources: Nocedal & Wright, Numerical Optimization (2006), algorithms 7.1 and 7.4.

    >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0]])
    >>> labels = jnp.array([0, 1, 0, 1])
    >>> start = SoftmaxRegression(jnp.zeros((1, 2)), jnp.zeros(2))
    >>> model, certificate = solve(start, x, labels, l2=0.1)
    >>> print(model.w.round(3), certificate.converged, certificate.distance < 1e-4)
    [[-0.372  0.372]] True True
    """
    if solver not in get_args(Solver):
        raise ValueError(f'solver must be "lbfgs" or "newton-cg", got {solver!r}')
    l2 = options.not_negative("l2", l2)
    tolerance = options.not_negative("tolerance", tolerance)
    max_iterations = options.at_least(0, "max_iterations", max_iterations)
    intercept = options.flag("intercept", intercept)
    options.functions(transform=transform)
    if not hasattr(model, "w"):
        raise TypeError(
            f"model must be a SoftmaxRegression, got {type(model).__name__}"
        )
    w, b = parameters(model)
    kind = checks.accumulation_dtype(w)
    x, labels, share = _examples(x, labels, class_weights, sample_weights, w.shape[1])
    features = jax.eval_shape(transform, x).shape
    if features[1:] != w.shape[:1] or 0 in w.shape:
        raise ValueError(
            "x must become [rows, features], as many as w has and at least one; got "
            f"{features} from transform, and w of shape {w.shape}"
        )
    end = _minimise(
        FullBatch(
            x,
            labels,
            jnp.asarray(share, kind),
            jnp.asarray(l2, kind),
            jnp.bool_(intercept),
            transform,
        ),
        jnp.concatenate([w, b[None]]).astype(kind),
        jnp.asarray(tolerance, kind),
        jnp.int32(max_iterations),
        solver,
    )
    w, b = end.v[:-1], end.v[-1]
    endless = None
    if l2 == 0 and end.separates:
        endless = SEPARABLE
    elif l2 == 0 and intercept and _a_class_is_empty(labels, share, len(b)):
        endless = EMPTY
    return Solution(SoftmaxRegression(w, b), _certificate(end, l2, tolerance, endless))


class _End(NamedTuple):
    v: Parameters
    value: Array
    gradient_norm: Array
    w_norm: Array
    rounding: Array
    passes: Array
    iterations: Array
    status: Array
    separates: Array


@partial(jax.jit, static_argnames="solver")
def _minimise(
    batch: FullBatch, v: Parameters, tolerance: Array, most: Array, solver: Solver
) -> _End:
    # Half the tolerance leaves room for what rounding adds when all is computed afresh.
    search = descend(batch, batch.centred(v), tolerance / 2, most, solver)
    return _settled(batch, search)


def _settled(batch: FullBatch, s: Search) -> _End:
    """The same predictions from centred parameters and the best biases, judged."""
    v = batch.centred(s.v)
    z = batch.logits(v)
    shift = jnp.where(batch.intercept, _best_biases(batch, z), 0)
    v, z = v.at[-1].add(shift), z + shift[None]
    value, gradient = batch.value_and_gradient(v, z)
    classes = jnp.arange(z.shape[1], dtype=jnp.int32)[None]
    is_label = classes == batch.labels[:, None]
    best_other = jnp.where(is_label, -jnp.inf, z).max(1)
    is_ahead = jnp.where(is_label, z, -jnp.inf).max(1) > best_other
    return _End(
        v=v,
        value=value,
        gradient_norm=jnp.linalg.norm(gradient),
        w_norm=jnp.linalg.norm(gradient[:-1]),
        rounding=batch.gradient_rounding(v, z),
        passes=s.passes + 2,
        iterations=s.iterations,
        status=s.status,
        separates=jnp.all(is_ahead | (batch.share == 0)),
    )


def _best_biases(batch: FullBatch, z: RowLogits) -> Float[Array, " classes"]:
    """What to add to the biases, by Newton's method on [rows, classes] alone."""

    def step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, least, tried = state
        _, residual, probs = outcome(z + tried[None], batch.labels)
        slope = batch.share @ residual
        norm = jnp.linalg.norm(slope)
        weighted = batch.share[:, None] * probs
        bend = jnp.diag(jnp.sum(weighted, 0)) - weighted.T @ probs
        # Adding 1 / classes everywhere fixes the sum, along which nothing changes.
        newton = jnp.linalg.solve(bend + 1 / len(slope), slope)
        better = norm < least
        best, least = jnp.where(better, tried, best), jnp.where(better, norm, least)
        return best, least, tried - (newton - newton.mean())

    zeros = jnp.zeros(z.shape[1], z.dtype)
    start = zeros, jnp.asarray(jnp.inf, z.dtype), zeros
    return lax.fori_loop(0, 5, step, start)[0]


def _examples(
    x: ArrayLike,
    labels: ArrayLike,
    class_weights: ArrayLike | None,
    sample_weights: ArrayLike | None,
    classes: int,
) -> tuple[Array, Array, np.ndarray]:
    """x and labels, checked, and each row's share of the mean."""
    x, labels = checks.examples("x", x, "labels", labels)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x must be real numbers, got {x.dtype}")
    share = _weights("sample_weights", sample_weights, len(x))
    if class_weights is not None:
        known = np.clip(np.asarray(labels), 0, classes - 1)
        share = share * _weights("class_weights", class_weights, classes)[known]
    if not share.sum() > 0:
        raise ValueError(
            "sample_weights times class_weights are zero in all rows: none is left to "
            "learn from"
        )
    return x, labels, share / share.sum()


def _weights(name: str, value: ArrayLike | None, count: int) -> np.ndarray:
    value = np.ones(count) if value is None else checks.plain(name, value)
    try:
        weights = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be an array of {count} numbers, got {type(value).__name__}"
        ) from None
    if weights.shape != (count,):
        raise ValueError(f"{name} must have shape {(count,)}, got {weights.shape}")
    if not ((weights >= 0) & (weights < np.inf)).all():
        raise ValueError(f"{name} must be finite and not negative")
    return weights


def _a_class_is_empty(labels: Array, share: np.ndarray, classes: int) -> bool:
    counting = np.asarray(labels)[share > 0]
    return len(np.setdiff1d(np.arange(classes), counting)) > 0


def _certificate(
    end: _End, l2: float, tolerance: float, endless: str | None
) -> Certificate:
    norm, status = float(end.gradient_norm), int(end.status)
    slope = float(end.w_norm) + float(end.rounding)
    if not np.isfinite(norm + float(end.value)):
        status = NOT_FINITE
    elif norm <= tolerance:
        status = CONVERGED
    elif status == CONVERGED:
        status = STALLED  # computed afresh it is not
    if status == NOT_FINITE:
        endless = None
    return Certificate(
        objective=float(end.value),
        gradient_norm=norm,
        iterations=int(end.iterations),
        passes=float(end.passes),
        gap=slope**2 / (2 * l2) if l2 else float("inf"),
        distance=slope / l2 if l2 else float("inf"),
        converged=status == CONVERGED and endless is None,
        reason=endless or REASONS[status],
    )
