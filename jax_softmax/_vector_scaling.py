"""Logits rescaled class by class, so that probabilities mean what they say.

Convex, and solved as temperature scaling is, from whose optimum it starts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._losses import mean_loss, nll_and_grad
from jax_softmax._shards import Shards
from jax_softmax._temperature_scaling import (
    held_out,
    temperature_scaling,
    wide_scores,
)
from jax_softmax._tracing import traced_once

TRIALS = 100


class VectorScaling(NamedTuple):
    """Logits rescaled class by class: w z + b.

    >>> scaling = VectorScaling(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
    >>> print(scaling.logits(jnp.array([[1.0, 1.0], [1.0, -jnp.inf]])))
    [[ 1.   3.]
     [ 1. -inf]]
    """

    w: Float[Array, " classes"]
    b: Float[Array, " classes"]

    def logits(
        self, logits: Float[ArrayLike, "*batch classes"]
    ) -> Float[Array, "*batch classes"]:
        """The rescaled logits. A class that is ruled out (-inf) remains so.

        Raises:
            TypeError: logits, w or b are not floating point.
            ValueError: w or b is not one number for each class.
        """
        z = wide_scores(logits)
        w, b = checks.floating("w", self.w), checks.floating("b", self.b)
        checks.same_shape("w", w, z.shape[-1:])
        checks.same_shape("b", b, z.shape[-1:])
        w, b = (jnp.broadcast_to(leaf, z.shape) for leaf in (w, b))
        finite = jnp.isfinite(z)
        beyond = jnp.where(z == -jnp.inf, z, lax.stop_gradient(w) * z)
        return jnp.where(finite, w * jnp.where(finite, z, 0) + b, beyond)


def vector_scaling(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
    l2: float = 1e-4,
) -> VectorScaling:
    """A factor and an offset for each class that fit held-out labels best.

        mean of cross_entropy(w z + b, labels) + l2 / 2 (|w - 1|^2 + |b|^2)

    Newton's method from temperature scaling's optimum, each step halved until the
    objective falls. (Guo et al., 2017, without the penalty.)

    Args:
        logits: of rows that the model was not trained on; -inf rules a class out.
        labels: in [0, classes). Any other id in a kept row makes the result NaN, as
            does a label that is ruled out, or a NaN.
        where: rows to keep. With none the result is w = 1, b = 0.
        l2: the pull towards leaving the logits alone. It makes the optimum unique
            (adding one number to all of b changes nothing), and finite where the rows
            are separable.

    Returns:
        The optimum, to the rounding of its gradient; NaN where rounding kept it out of
        reach. Its first two derivatives in the logits are the optimum's.

    Raises:
        TypeError: logits are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of logits, or l2 is not
            above 0 and finite in the type of the sums.

    >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> scaling = vector_scaling(logits, jnp.array([0, 0, 1, 1]))
    >>> print(f"{softmax(scaling.logits(logits[0]))[0]:.3f}")
    0.667
    """
    l2 = options.number("l2", l2)
    logits, labels, keep = checks.labelled("logits", logits, labels, where)
    held = jnp.finfo(checks.accumulation_dtype(logits))
    if not float(held.tiny) <= l2 <= float(held.max):
        raise ValueError(f"l2 must be a {held.dtype} number above 0, got {l2}")
    return _vectors(logits, labels, keep, l2)


@traced_once(static_argnames="l2")
def _vectors(logits: Array, labels: Array, keep: Array, l2: float) -> VectorScaling:
    z, labels = held_out(logits, labels, keep)
    classes = z.shape[-1]
    rows, labels, keep = z.reshape(-1, classes), labels.reshape(-1), keep.reshape(-1)
    shards = Shards.whole(classes)
    share = keep.astype(z.dtype) / jnp.maximum(keep.sum(), 1).astype(z.dtype)
    is_factor = jnp.arange(2 * classes) < classes
    origin = jnp.where(is_factor, 1, 0).astype(z.dtype)

    def newton_step(theta: Array, rows: Array) -> tuple[Array, Array, Array]:
        """The objective, H^-1 g and g H^-1 g."""
        scaled = VectorScaling(*jnp.split(theta, 2)).logits(rows)
        nll, residual = nll_and_grad(scaled, labels, shards)
        residual = jnp.where(keep[:, None], residual, 0)
        x = jnp.where(rows == -jnp.inf, 0, rows)
        away = theta - origin
        value = mean_loss(nll, keep) + l2 / 2 * jnp.square(away).sum()
        slopes = _product(share, residual * x), _product(share, residual)
        gradient = jnp.concatenate(slopes) + l2 * away
        hessian = lax.stop_gradient(_hessian(residual, x, share, labels))
        hessian += l2 * jnp.eye(2 * classes, dtype=z.dtype)
        unit = 1 / jnp.sqrt(jnp.diag(hessian))  # in which H has a diagonal of ones
        even = unit[:, None] * hessian * unit[None]
        step = unit * jnp.linalg.solve(even, unit * gradient)
        return value, step, jnp.vdot(gradient, step)

    def far(descent: _Descent) -> Array:
        """Whether the fall to come, about half the decrement, shows in the value."""
        return descent.decrement > jnp.finfo(z.dtype).eps * descent.value

    def unfinished(descent: _Descent) -> Array:
        return far(descent) & (descent.trials < TRIALS)

    def attempt(descent: _Descent) -> _Descent:
        theta = descent.theta - descent.size * descent.step
        value, step, decrement = newton_step(theta, fixed)
        hidden = 16 * jnp.finfo(z.dtype).eps * descent.value
        nearer = (value <= descent.value + hidden) & (decrement < descent.decrement)
        trials = descent.trials + 1
        there = _Descent(theta, value, step, decrement, jnp.ones_like(value), trials)
        here = descent._replace(size=descent.size / 2, trials=trials)
        accepted = (value < descent.value) | nearer
        return jax.tree.map(partial(jnp.where, accepted), there, here)

    fixed = lax.stop_gradient(rows)
    temperature = temperature_scaling(fixed, labels, where=keep).temperature
    # Where the logits are that small, the penalty holds w near 1 anyway.
    factor = jnp.where(temperature > l2, 1 / temperature, 1)
    start = jnp.where(is_factor, factor, 0)
    most = jnp.asarray(jnp.finfo(z.dtype).max / 2)
    begin = _Descent(start, most, 0 * start, jnp.inf * most, 0 * most + 1, jnp.int32(0))
    found = lax.while_loop(unfinished, attempt, begin)
    # Two more, whole steps: beyond the objective's rounding, and for two derivatives.
    theta = found.theta - newton_step(found.theta, rows)[1]
    theta = theta - newton_step(theta, rows)[1]
    return VectorScaling(*jnp.split(jnp.where(far(found), jnp.nan, theta), 2))


_product = partial(jnp.matmul, precision="highest")


class _Descent(NamedTuple):
    theta: Array  # the best so far
    value: Array
    step: Array
    decrement: Array
    size: Array  # of the step, for the next trial
    trials: Array


def _hessian(residual: Array, x: Array, share: Array, labels: Array) -> Array:
    """X^T (diag(p) - p p^T) X over the rows; p (1 - p) in one piece on the diagonal."""
    classes = x.shape[-1]
    p = residual + jax.nn.one_hot(labels, classes, dtype=x.dtype)
    spread = jnp.abs(residual) * (1 - jnp.abs(residual))

    def block(u: Array, v: Array) -> Array:
        own = jnp.diag(_product(share, spread * u * v))
        across = _product((share[:, None] * p * u).T, p * v)
        return jnp.where(jnp.eye(classes, dtype=bool), own, -across)

    one = jnp.ones_like(x)
    mixed = block(x, one)
    return jnp.block([[block(x, x), mixed], [mixed.T, block(one, one)]])
