"""Decisions from probabilities, of which the most likely class is only one.

Costs are a table [classes, decisions]: what it costs to decide j when i is true. There
may be more or fewer decisions than classes.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer, Real

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._entries import row_entry
from jax_softmax._losses import known_label
from jax_softmax._reliability import ScoredRows, scored_rows
from jax_softmax._tracing import traced_once

NO_DECISION = -1


def expected_costs(
    probs: Float[ArrayLike, "*batch classes"],
    costs: Float[ArrayLike, "classes decisions"],
) -> Float[Array, "*batch decisions"]:
    """What each decision will cost on average: probs @ costs.

    Args:
        probs: probabilities, as softmax gives them: calibrated ones, or the costs that
            are expected are not the costs that come.
        costs: of deciding j when i is true; finite.

    Raises:
        TypeError: probs or costs are not floating point.
        ValueError: costs are not a table with one row for each class.

    >>> print(expected_costs(jnp.array([0.75, 0.25]), jnp.array([[0.0, 1], [50, 0]])))
    [12.5   0.75]
    """
    p, table = checks.scores("probs", probs), _table(costs)
    if table.shape[0] != p.shape[-1]:
        raise ValueError(
            f"costs must have {p.shape[-1]} rows, one for each class of probs, "
            f"got shape {table.shape}"
        )
    wide = checks.accumulation_dtype(p, table)
    return jnp.matmul(p.astype(wide), table.astype(wide), precision="highest")


def least_cost_decision(
    probs: Float[ArrayLike, "*batch classes"],
    costs: Float[ArrayLike, "classes decisions"],
    *,
    abstention_cost: Real[ArrayLike, ""] | float | None = None,
) -> Integer[Array, "*batch"]:
    """The decision of least expected cost, or none where that costs less.

    Where every error costs 1 this is the most likely class, and abstaining pays below a
    probability of 1 - abstention_cost. (Chow, "On optimum recognition error and reject
    tradeoff", 1970.)

    Args:
        probs: calibrated probabilities.
        costs: of deciding j when i is true; finite.
        abstention_cost: of making no decision and, say, asking a human. NaN abstains
            from all.

    Returns:
        Decisions, of equal ones the first. -1 is no decision: where abstaining costs
        less than any, and where an expected cost is NaN.

    Raises:
        TypeError: probs or costs are not floating point.
        ValueError: costs are not a table with one row for each class, or
            abstention_cost is not a scalar.

    Five patients are ill with these probabilities. To send an ill one home costs 50
    times as much as to treat a healthy one. The most likely class sends four home:

    >>> ill = jnp.array([0.01, 0.03, 0.1, 0.4, 0.8])
    >>> probs = jnp.stack((1 - ill, ill), axis=-1)
    >>> costs = jnp.array([[0.0, 1.0], [50.0, 0.0]])  # true: healthy, ill
    >>> likeliest, cheapest = probs.argmax(-1), least_cost_decision(probs, costs)
    >>> print(likeliest, cheapest)
    [0 0 0 0 1] [0 1 1 1 1]

    Treating pays from a probability of 1/51 on. What the five are expected to cost
    falls from 27.20 to 3.17, by 88 %:

    >>> expected = expected_costs(probs, costs)
    >>> rows = jnp.arange(5)
    >>> before, after = expected[rows, likeliest].sum(), expected[rows, cheapest].sum()
    >>> print(f"{before:.2f} - {before - after:.2f} = {after:.2f}")
    27.20 - 24.03 = 3.17

    A test that settles the matter for 0.75 is worth it for the two in between:

    >>> print(least_cost_decision(probs, costs, abstention_cost=0.75))
    [ 0 -1 -1  1  1]
    """
    expected = expected_costs(probs, costs)
    least = expected.min(-1)
    decided = ~jnp.isnan(least)
    if abstention_cost is not None:
        price = checks.scalar("abstention_cost", abstention_cost)
        decided = decided & (least <= price.astype(least.dtype))
    return jnp.where(decided, expected.argmin(-1), NO_DECISION)


def decision_costs(
    decisions: Integer[ArrayLike, "*batch"],
    labels: Integer[ArrayLike, "*batch"],
    costs: Float[ArrayLike, "classes decisions"],
    *,
    abstention_cost: Real[ArrayLike, ""] | float | None = None,
) -> Float[Array, "*batch"]:
    """What the decisions cost, now that the labels are known.

    Args:
        decisions: as least_cost_decision makes them. Any that has no column is NaN.
        labels: in [0, classes). Any other id gives NaN.
        costs: of deciding j when i is true.
        abstention_cost: of -1, no decision, which without it is NaN.

    Returns:
        One cost per row, in at least float32. Average with mean_loss.

    Raises:
        TypeError: decisions or labels are not integers, or costs not floating point.
        ValueError: decisions are not shaped like labels, costs are no table, or
            abstention_cost is not a scalar.

    >>> costs = jnp.array([[0.0, 1.0], [50.0, 0.0]])
    >>> print(decision_costs(jnp.array([0, 0, 1]), jnp.array([0, 1, 0]), costs))
    [ 0. 50.  1.]
    """
    labels = checks.class_ids("labels", labels)
    decisions = checks.class_ids("decisions", decisions, labels.shape)
    table = checks.wide(_table(costs))
    known, i = known_label(labels, table.shape[0])
    decided, j = known_label(decisions, table.shape[1])
    cost = jnp.where(decided, table[i, j], jnp.nan)
    if abstention_cost is not None:
        price = checks.scalar("abstention_cost", abstention_cost)
        cost = jnp.where(decisions == NO_DECISION, price.astype(cost.dtype), cost)
    return jnp.where(known, cost, jnp.nan)


def top_k_accuracy(
    scores: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    k: int = 1,
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, ""]:
    """How often the label is among the k classes of highest score.

    Of equal scores the lower class id comes first, as in argmax.

    Args:
        scores: logits or probabilities: only their order counts.
        labels: in [0, classes). Any other id in a kept row gives NaN, as does a NaN
            among its scores.
        k: how many guesses each row has.
        where: rows to keep. No row kept gives NaN.

    Raises:
        TypeError: scores are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of scores, or k is not
            in [1, classes].

    >>> scores = jnp.array([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]])
    >>> print(top_k_accuracy(scores, jnp.array([1, 0]), k=2))
    1.0
    """
    rows = scored_rows("scores", scores, labels, where)
    k, classes = options.integer("k", k), rows.scores.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be in [1, {classes}], got {k}")
    return _top_k_accuracy(rows, k)


@traced_once(static_argnums=1)
def _top_k_accuracy(rows: ScoredRows, k: int) -> Array:
    x = rows.scores
    own, label = row_entry(x, rows.labels)[:, None], rows.labels[:, None]
    ids = jnp.arange(x.shape[-1], dtype=label.dtype)[None]
    ahead = (x > own) | (x == own) & (ids < label)
    hits = ((ahead.sum(-1) < k) & rows.keep).sum()
    rate = hits.astype(x.dtype) / rows.keep.sum().astype(x.dtype)
    return jnp.where(rows.sound, rate, jnp.nan)


def confusion_matrix(
    decisions: Integer[ArrayLike, "*batch"],
    labels: Integer[ArrayLike, "*batch"],
    classes: int,
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "classes classes"]:
    """How many rows of label i were decided to be j, at [i, j].

    Args:
        decisions: in [0, classes).
        labels: in [0, classes). Any other id in a kept row, here or in decisions, makes
            the whole matrix NaN.
        classes: how many classes there are.
        where: rows to keep.

    Returns:
        Counts in float32, exact below 2^24.

    Raises:
        TypeError: decisions or labels are not integers.
        ValueError: decisions or where are not shaped like labels, or classes < 1.

    >>> print(confusion_matrix(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), 2))
    [[1. 1.]
     [0. 1.]]
    """
    classes = options.at_least(1, "classes", classes)
    labels = checks.class_ids("labels", labels)
    decisions = checks.class_ids("decisions", decisions, labels.shape)
    keep = checks.row_mask("where", where, labels.shape)
    (i_known, i), (j_known, j) = (known_label(x, classes) for x in (labels, decisions))
    empty = jnp.zeros((classes, classes), jnp.int32)
    counts = empty.at[i, j].add(keep.astype(jnp.int32))
    sound = (i_known & j_known | ~keep).all()
    return jnp.where(sound, counts.astype(jnp.float32), jnp.nan)


def _table(costs: ArrayLike) -> Array:
    table = checks.floating("costs", costs)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"costs must be a table [classes, decisions], got shape {table.shape}"
        )
    return table
