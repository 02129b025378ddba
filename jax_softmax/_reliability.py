"""How good predicted probabilities were, now that the labels are known.

Means are over all kept rows of all batch axes. No row kept makes them NaN, as does a
kept row with a NaN or with a label outside [0, classes).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Integer

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._losses import kept_rows, known_label
from jax_softmax._tracing import traced_once

BLOCK_ROWS = 64
MOST_BINS = 2**20


class Reliability(NamedTuple):
    """What a reliability diagram shows, bin by bin. An empty bin is all 0."""

    rows: Float[Array, " bins"]  # how many
    confidence: Float[Array, " bins"]  # their mean probability of the likeliest class
    accuracy: Float[Array, " bins"]  # how often that was the label


def reliability(
    probs: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    bins: int = 15,
    equal_mass: bool = False,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Reliability:
    """Rows sorted into bins by the probability of their most likely class.

    Args:
        probs: probabilities, as softmax gives them.
        labels: in [0, classes).
        bins: how many. They are open below and closed above.
        equal_mass: bins of equally many rows, but for equal probabilities, which stay
            together; otherwise bins of equal width on [0, 1].
        where: rows to keep.

    Raises:
        TypeError: probs are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of probs, or bins is
            not in [1, 2^20].

    >>> probs = jnp.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4]])
    >>> found = reliability(probs, jnp.array([0, 0, 1, 0]), bins=4)
    >>> print(found.rows, found.accuracy)
    [0. 0. 2. 2.] [0.  0.  0.5 1. ]
    """
    rows = scored_rows("probs", probs, labels, where)
    bins = _bins(bins)
    return _reliability(rows, bins, options.flag("equal_mass", equal_mass))


@traced_once(static_argnums=(1, 2))
def _reliability(rows: "ScoredRows", bins: int, equal_mass: bool) -> Reliability:
    confidence = rows.scores.max(-1)
    likeliest = rows.scores.argmax(-1).astype(rows.labels.dtype)
    hit = (likeliest == rows.labels).astype(confidence.dtype)
    if equal_mass:
        index = _equal_mass(confidence, rows.keep, bins)
    else:
        index = _equal_width(confidence, bins)
    found = _means(index, rows.keep, bins, confidence, hit)
    return Reliability(*(x * _sound_or_nan(rows.sound, x) for x in found))


def expected_calibration_error(
    probs: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    bins: int = 15,
    equal_mass: bool = False,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, ""]:
    """The mean distance of confidence from accuracy, over the bins of `reliability`.

        ECE = sum_b n_b / n |accuracy_b - confidence_b|

    It is biased. Upwards, because the noise of a bin's accuracy a counts as error: a
    perfectly calibrated model scores about sum_b sqrt(2 n_b a (1 - a) / pi) / n, which
    falls like sqrt(bins / n) and is not 0. Downwards, because over- and underconfidence
    cancel within a bin. So compare models on the same rows with the same bins only, and
    with what calibrated probabilities would score there. (Naeini, Cooper & Hauskrecht,
    2015; Kumar, Liang & Ma, "Verified uncertainty calibration", 2019.)

    Args:
        probs: probabilities, as softmax gives them.
        labels: in [0, classes).
        bins: how many.
        equal_mass: bins of equally many rows, whose noise is even, instead of bins of
            equal width on [0, 1]. It has both biases too.
        where: rows to keep.

    Raises:
        TypeError: probs are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of probs, or bins is
            not in [1, 2^20].

    >>> probs, labels = jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 1])
    >>> print(expected_calibration_error(probs, labels))
    0.25
    """
    found = reliability(probs, labels, bins=bins, equal_mass=equal_mass, where=where)
    gaps = found.rows * jnp.abs(found.accuracy - found.confidence)
    return gaps.sum() / found.rows.sum()


def brier_score(
    probs: Float[ArrayLike, "*batch classes"], labels: Integer[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """The squared distance of the probabilities from the label's one-hot, per row.

        sum_j (p_j - [j = y])^2,   between 0 and 2

    Args:
        probs: probabilities, as softmax gives them.
        labels: in [0, classes). Any other id makes the row's score and gradient NaN.

    Returns:
        One score per row, in at least float32. Average with mean_loss. (Brier, 1950.)

    Raises:
        TypeError: probs are not floating point, or labels not integers.
        ValueError: labels are not shaped like the rows of probs.

    >>> print(brier_score(jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([0, 0])))
    [0.5 0. ]
    """
    probs = checks.scores("probs", probs)
    labels = checks.class_ids("labels", labels, probs.shape[:-1])
    p = checks.wide(probs)
    known, column = known_label(labels, p.shape[-1])
    p = p * _sound_or_nan(known, p)[..., None]
    return jnp.square(p - jax.nn.one_hot(column, p.shape[-1], dtype=p.dtype)).sum(-1)


class BrierParts(NamedTuple):
    """Mean Brier score = reliability - resolution + uncertainty + within."""

    reliability: Float[Array, ""]  # the bins' mean probabilities from their frequencies
    resolution: Float[Array, ""]  # the bins' frequencies from the class's overall one
    uncertainty: Float[Array, ""]  # the score of always predicting the overall ones
    within: Float[Array, ""]  # what the probabilities say beyond their bin's mean


def brier_decomposition(
    probs: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    bins: int = 15,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> BrierParts:
    """The mean Brier score in parts that say where it comes from.

    For each class, rows are sorted into bins of equal width by its probability p, with
    y = 1 where it is the label. With means p_b and y_b in bin b, and y_all overall:

        reliability = sum_b n_b / n (p_b - y_b)^2       0 when calibrated
        resolution  = sum_b n_b / n (y_b - y_all)^2     high when decisive
        uncertainty = y_all (1 - y_all)                 of the labels alone
        within      = mean of (p - p_b)^2 - 2 (p - p_b) (y - y_b)

    and the parts are summed over the classes. (Murphy, 1973; within is what Stephenson,
    Coelho & Jolliffe, 2008, add so that the sum is exact for any bins.)

    Args:
        probs: probabilities, as softmax gives them.
        labels: in [0, classes).
        bins: how many for each class.
        where: rows to keep. No row kept gives NaN.

    Raises:
        TypeError: probs are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of probs, or bins is
            not in [1, 2^20].

    >>> probs, labels = jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 1])
    >>> print(*brier_decomposition(probs, labels), brier_score(probs, labels).mean())
    0.125 0.0 0.5 0.0 0.625
    """
    rows = scored_rows("probs", probs, labels, where)
    return _brier_parts(rows, _bins(bins))


@traced_once(static_argnums=1)
def _brier_parts(rows: "ScoredRows", bins: int) -> BrierParts:
    count = rows.keep.sum().astype(rows.scores.dtype)

    def parts_of_class(p: Array, y: Array) -> BrierParts:
        index = _equal_width(p, bins)
        sizes, forecast, frequency = _means(index, rows.keep, bins, p, y)
        share, overall = sizes / count, jnp.where(rows.keep, y, 0).sum() / count
        beyond = p - forecast[index]
        within = jnp.square(beyond) - 2 * beyond * (y - frequency[index])
        return BrierParts(
            (share * jnp.square(forecast - frequency)).sum(),
            (share * jnp.square(frequency - overall)).sum(),
            overall * (1 - overall),
            jnp.where(rows.keep, within, 0).sum() / count,
        )

    p = rows.scores
    y = jax.nn.one_hot(rows.labels, p.shape[-1], dtype=p.dtype)
    parts = jax.vmap(parts_of_class, in_axes=1)(p, y)
    sums = [part.sum() for part in parts]
    return BrierParts(*(total * _sound_or_nan(rows.sound, total) for total in sums))


def _bins(bins: int) -> int:
    bins = options.at_least(1, "bins", bins)
    if bins > MOST_BINS:
        raise ValueError(f"bins must be at most {MOST_BINS}, got {bins}")
    return bins


def _sound_or_nan(sound: Array, like: Array) -> Array:
    """1 or NaN, to multiply by: a NaN that is only chosen would not reach gradients."""
    return jnp.where(sound, 1, jnp.nan).astype(like.dtype)


class ScoredRows(NamedTuple):
    """All batch axes as one, in at least float32, dropped rows made harmless."""

    scores: Float[Array, "rows classes"]
    labels: Int[Array, " rows"]
    keep: Bool[Array, " rows"]
    sound: Bool[Array, ""]  # no kept row has a NaN, or a label that is no class


def scored_rows(
    name: str, scores: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> ScoredRows:
    """The rows that a mean is taken over."""
    return _scored_rows(*checks.labelled(name, scores, labels, where))


@traced_once()
def _scored_rows(scores: Array, labels: Array, keep: Array) -> ScoredRows:
    classes = scores.shape[-1]
    x = checks.wide(kept_rows(scores, keep)).reshape(-1, classes)
    labels, keep = labels.reshape(-1), keep.reshape(-1)
    known, column = known_label(labels, classes)
    sound = (known & ~jnp.isnan(x).any(-1) | ~keep).all()
    return ScoredRows(x, column, keep, sound)


def _means(index: Array, keep: Array, bins: int, *values: Array) -> list[Array]:
    """How many values each bin keeps, and the means of theirs; 0 of an empty bin.

    Counted in integers, and added up in blocks of few rows: a float32 that single rows
    are added to ends at 2^24, and is off long before.
    """
    count = jax.ops.segment_sum(keep.astype(jnp.int32), index, bins)
    rows, of_block = index.shape[0], max(BLOCK_ROWS, bins)
    block = jnp.arange(rows, dtype=index.dtype) // of_block
    blocks = -(-rows // of_block)
    means = []
    for value in values:
        kept = jnp.where(keep, value, 0)
        parts = jax.ops.segment_sum(kept, block * bins + index, blocks * bins)
        total = parts.reshape(blocks, bins).sum(0)
        means.append(total / jnp.maximum(count, 1).astype(total.dtype))
    return [count.astype(values[0].dtype), *means]


def _equal_width(values: Array, bins: int) -> Array:
    """Bins of equal width on [0, 1], open below and closed above."""
    index = jnp.ceil(values * bins).astype(jnp.int32) - 1
    return jnp.clip(index, 0, bins - 1)


def _equal_mass(values: Array, keep: Array, bins: int) -> Array:
    """Bins of equally many values that are kept; equal ones stay together."""
    less = jnp.searchsorted(jnp.sort(jnp.where(keep, values, jnp.inf)), values)
    whole, rest = jnp.divmod(keep.sum(dtype=less.dtype), bins)
    b = jnp.arange(1, bins, dtype=less.dtype)
    first = b * whole + (b * rest + bins - 1) // bins  # ceil(b n / bins), no overflow
    return jnp.searchsorted(first, less, side="right")
