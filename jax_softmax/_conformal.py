"""Sets of classes that hold the label at least as often as was promised."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer, Key

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._entries import row_entry
from jax_softmax._reliability import ScoredRows, scored_rows
from jax_softmax._tracing import traced_once

COARSE_PARTS = 2**15  # of a rate that has too many digits for 32-bit arithmetic


def conformal_threshold(
    scores: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    miss_rate: float,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, ""]:
    """The least score in a prediction set that misses the label at the given rate.

        prediction set of a new row: all classes with score >= threshold

    The threshold is the floor((n + 1) miss_rate)-th smallest of the scores that the n
    held-out labels have (split conformal prediction). If these rows and the new one are
    exchangeable, then, whatever the model,

        1 - miss_rate <= P(the set holds the label) < 1 - miss_rate + 1 / (n + 1)

    the upper bound only where scores are not tied. It is a probability over rows and
    over draws of the held-out data, not one for each class or row; a smaller held-out
    set makes it vary more. (Vovk, Gammerman & Shafer, "Algorithmic learning in a random
    world", 2005; Lei et al., 2018, theorem 2; Sadinle, Lei & Wasserman, 2019, for
    probabilities as scores.)

    Args:
        scores: of classes, higher for the more plausible: probabilities, or
            adaptive_scores of them; of rows that the model was not trained on.
        labels: in [0, classes).
        miss_rate: in (0, 1), taken as the decimal number that it prints as. One of more
            than four digits may be rounded down to a multiple of 2^-15.
        where: rows to keep.

    Returns:
        The threshold, in at least float32. -inf, all classes, where n is too small for
        the rate. NaN, no class in any set, where a kept row has a NaN or a label
        outside [0, classes).

    Raises:
        TypeError: scores are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of scores, or miss_rate
            is outside (0, 1).

    >>> probs = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> threshold = conformal_threshold(probs, jnp.array([0, 0, 1, 1]), miss_rate=0.4)
    >>> print(threshold, jnp.array([[0.25, 0.75], [0.45, 0.55]]) >= threshold)
    0.7 [[False  True]
     [False False]]
    """
    if not 0 < options.number("miss_rate", miss_rate) < 1:
        raise ValueError(f"miss_rate must be in (0, 1), got {miss_rate}")
    rate = Fraction(str(miss_rate))
    if rate.numerator * rate.denominator >= 2**31:
        rate = Fraction(math.floor(rate * COARSE_PARTS), COARSE_PARTS)
    rows = scored_rows("scores", scores, labels, where)
    return _threshold(rows, rate.numerator, rate.denominator)


@traced_once(static_argnums=(1, 2))
def _threshold(rows: ScoredRows, numerator: int, denominator: int) -> Array:
    own = jnp.where(rows.keep, row_entry(rows.scores, rows.labels), jnp.inf)
    whole, rest = jnp.divmod(rows.keep.sum() + 1, denominator)
    rank = whole * numerator + rest * numerator // denominator
    ranked = jnp.concatenate((jnp.full(1, -jnp.inf, own.dtype), jnp.sort(own)))
    return jnp.where(rows.sound, ranked[rank], jnp.nan)


def adaptive_scores(
    probs: Float[ArrayLike, "*batch classes"], *, key: Key[Array, ""] | None = None
) -> Float[Array, "*batch classes"]:
    """Scores whose prediction sets grow where the model is unsure.

        score_j = -(sum of the probabilities that come before p_j, largest first)

    So a set takes the likeliest classes until they hold enough probability, and at
    least one. Coverage is more even over easy and hard rows than with probabilities as
    scores, for larger sets. (Romano, Sesia & Candes, "Classification with valid and
    adaptive coverage", 2020.)

    Args:
        probs: probabilities, as softmax gives them. A row with a NaN is all NaN.
        key: randomises: p_j itself counts too, times a number drawn from [0, 1) for its
            row. That unties the scores, so that coverage is no higher than it must be,
            and smaller sets, of which some are empty.

    Raises:
        TypeError: probs are not floating point.

    >>> print(adaptive_scores(jnp.array([0.25, 0.625, 0.125])))
    [-0.625  0.    -0.875]
    """
    probs = checks.scores("probs", probs)
    p = checks.wide(probs)
    order = jnp.argsort(-p, axis=-1)
    mass = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1)
    before = jnp.concatenate((jnp.zeros_like(mass[..., :1]), mass[..., :-1]), axis=-1)
    before = jnp.take_along_axis(before, jnp.argsort(order, axis=-1), axis=-1)
    if key is not None:
        options.one_key("key", key)
        before += p * jax.random.uniform(key, (*p.shape[:-1], 1), p.dtype)
    return jnp.where(jnp.isnan(p).any(-1, keepdims=True), jnp.nan, 0 - before)
