"""Logits divided by one temperature, so that probabilities mean what they say.

The problem is convex and solved to the optimum by Newton's method in the compiled
program, so that a scaling can be fitted under jit, and under vmap for many models.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer

from jax_softmax import _checks as checks
from jax_softmax._entries import row_entry
from jax_softmax._losses import kept_rows, known_label, mean_loss
from jax_softmax._reductions import softmax
from jax_softmax._tracing import traced_once

LOG_RANGE = 80.0  # of the inverse temperature, whose exp then fits in a float32
SEARCH_STEPS = 100


class TemperatureScaling(NamedTuple):
    """Logits divided by one temperature: z / T.

    >>> scaling = TemperatureScaling(jnp.array(2.0))
    >>> print(scaling.logits(jnp.array([3.0, 1.0])))
    [1.5 0.5]
    """

    temperature: Float[Array, ""]

    def logits(
        self, logits: Float[ArrayLike, "*batch classes"]
    ) -> Float[Array, "*batch classes"]:
        """The rescaled logits; at T = 0 their limit: 0 for the largest, -inf elsewhere.

        A class that is ruled out (-inf) remains so, also at T = inf.

        Raises:
            TypeError: logits are not floating point.
            ValueError: the temperature is not one number.
        """
        z = wide_scores(logits)
        temperature = checks.scalar("temperature", self.temperature)
        certain = temperature == 0
        finite = jnp.isfinite(z)
        beyond = jnp.where(finite, 0, z)  # beside which the division stays finite
        scaled = jnp.where(finite, z, 0) / jnp.where(certain, 1, temperature) + beyond
        at_top = (z == z.max(-1, keepdims=True)) & (z > -jnp.inf)
        limit = jnp.where(at_top, 0, jnp.where(jnp.isnan(z), z, -jnp.inf))
        return jnp.where(certain, limit, scaled)


def temperature_scaling(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> TemperatureScaling:
    """The temperature T at which softmax(logits / T) fits held-out labels best.

    The mean cross-entropy is convex in s = 1 / T. At its minimum the label's logit is
    on average what the model expects it to be:

        d loss / d s = mean(<softmax(s z), z> - z[y]) = 0

    Newton's method in log(s), kept in a bracket that is halved where a step would leave
    it or be slow. No row's most likely class changes, and so no accuracy, unless T is
    inf. (Guo et al., "On calibration of modern neural networks", 2017.)

    Args:
        logits: of rows that the model was not trained on; -inf rules a class out.
        labels: in [0, classes). Any other id in a kept row makes T NaN, as does a label
            that is ruled out, or a NaN.
        where: rows to keep. No row kept makes T NaN.

    Returns:
        T, in at least float32, to the rounding of that mean. Without an optimum T is
        its limit: 0 where every label has its row's largest logit, so that more
        certainty always fits better; inf where the logits are no help, so that equal
        probabilities fit best. Its first two derivatives in the logits are the
        optimum's.

    Raises:
        TypeError: logits are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of logits.

    >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    >>> scaling = temperature_scaling(logits, jnp.array([0, 0, 1, 1]))
    >>> print(f"{scaling.temperature:.4f}", softmax(scaling.logits(logits[0])).round(4))
    3.6410 [0.75 0.25]
    >>> print(temperature_scaling(logits, jnp.array([0, 0, 0, 1])).temperature)
    0.0
    """
    return _temperature(*checks.labelled("logits", logits, labels, where))


@traced_once()
def _temperature(logits: Array, labels: Array, keep: Array) -> TemperatureScaling:
    z, labels = held_out(logits, labels, keep)
    known, column = known_label(labels, z.shape[-1])
    own = row_entry(z, column)[..., None]
    above = jnp.where(z == own, 0, z - own)
    possible = (own > -jnp.inf)[..., 0] & (above < jnp.inf).all(-1)
    sound = keep.any() & (known & possible | ~keep).all()
    scale = jnp.max(jnp.abs(jnp.where(above > -jnp.inf, above, 0)), initial=0)
    scale = lax.stop_gradient(jnp.where(scale > 0, scale, 1))
    above = above / scale
    fixed = lax.stop_gradient(above)

    def unfinished(search: _Search) -> Array:
        # Near the root steps square: after this one, one more is below rounding.
        rounding = jnp.sqrt(jnp.finfo(z.dtype).eps)
        return (jnp.abs(search.move) > rounding) & (search.steps < SEARCH_STEPS)

    def step(search: _Search) -> _Search:
        s = jnp.exp(search.at)
        slope, curvature = _slope_and_curvature(fixed, s, keep)
        low = jnp.where(slope <= 0, search.at, search.low)
        high = jnp.where(slope >= 0, search.at, search.high)
        at = search.at - slope / (s * curvature)
        quick = jnp.abs(at - search.at) < jnp.abs(search.move) / 2
        at = jnp.where((at > low) & (at < high) & quick, at, (low + high) / 2)
        return _Search(at, low, high, at - search.at, search.steps + 1)

    end = jnp.asarray(LOG_RANGE, z.dtype)
    at = jnp.clip(jnp.log(scale), -end, end)  # T = 1
    start = _Search(at, -end, end, 2 * end, jnp.int32(0))
    s = jnp.exp(lax.while_loop(unfinished, step, start).at)

    ruled_in = fixed > -jnp.inf
    average = jnp.mean(fixed, axis=-1, where=ruled_in)  # as equal probabilities have it
    useless = mean_loss(average, keep) >= 0
    separable = (fixed.max(-1) <= 0).all()
    slope, curvature = _slope_and_curvature(above, s, keep)
    curvature = lax.stop_gradient(curvature)
    usual = ~useless & ~separable & (curvature > 0)
    curvature = jnp.where(usual, curvature, 1)
    s = s - jnp.where(usual, slope / curvature, 0)
    # Once more, for the second derivative.
    slope, _ = _slope_and_curvature(above, s, keep)
    s = s - jnp.where(usual, slope / curvature, 0)
    temperature = jnp.where(useless, jnp.inf, jnp.where(separable, 0, scale / s))
    return TemperatureScaling(jnp.where(sound, temperature, jnp.nan))


class _Search(NamedTuple):
    at: Array  # log(s)
    low: Array
    high: Array
    move: Array
    steps: Array


def _slope_and_curvature(above: Array, s: Array, keep: Array) -> tuple[Array, Array]:
    """Derivatives in s of the mean loss at logits s z, from z less the label's."""
    possible = above > -jnp.inf
    above = jnp.where(possible, above, 0)
    p = softmax(jnp.where(possible, s * above, -jnp.inf))
    mean = (p * above).sum(-1)
    spread = (p * jnp.square(above - mean[..., None])).sum(-1)
    return mean_loss(mean, keep), mean_loss(spread, keep)


def wide_scores(logits: ArrayLike) -> Array:
    return checks.wide(checks.scores("logits", logits))


def held_out(logits: Array, labels: Array, keep: Array) -> tuple[Array, Array]:
    """Dropped rows are made harmless, and their labels known."""
    return kept_rows(checks.wide(logits), keep), jnp.where(keep, labels, 0)
