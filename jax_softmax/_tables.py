"""Two variables of one table: what knowing one leaves of the other, and what it tells.

Types, edges and sources are as in `_information`.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jax_softmax._distributions import (
    Distribution,
    Logits,
    law,
    moving_as,
    of_kept,
    product,
    score_slope,
    with_slopes,
)
from jax_softmax._divergences import divergence
from jax_softmax._information import nats_in
from jax_softmax._log_ratio import difference, excess, sum_rounded_once
from jax_softmax._partition import compensated_sum


def conditional_entropy(
    joint: Distribution,
    *,
    given: int,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """How surprising one variable of a table remains when the other is known.

        H(Y | X) = -sum_xy p_xy log(p_xy / p_x) = H(X, Y) - H(X)
        d H(Y | X) / d z_xy = -p_xy (log(p_xy / p_x) + H(Y | X))

    Args:
        joint: a table over its last two axes, rows x and columns y. Its marginals are
            its own: the textbook passes one that its table does not have.
        given: the axis of the known variable, -2 for the rows, -1 for the columns.
        base: of the logarithm; e for nats, 2 for bits.
        where: tables to keep. A dropped one is 0 and has gradient exactly 0.

    Returns:
        H >= 0, within 6 ULP.

    Raises:
        TypeError: joint does not say what it is, or is not floating point, or base no
            number.
        ValueError: joint has no two axes, given is neither -2 nor -1, where is not
            shaped like the tables, or base is no base.

    >>> table = Probs(jnp.array([[0.1, 0.5], [0.1, 0.3]]))
    >>> print(f"{conditional_entropy(table, given=-2, base=2):.5g}")
    0.71452
    >>> print(f"{entropy(Probs(table.probs.ravel()), base=2):.5g}")  # joint
    1.6855
    >>> print(f"{entropy(Probs(table.probs.sum(-1)), base=2):.5g}")  # less
    0.97095
    """
    if given not in (-2, -1):
        raise ValueError(f"given must be -2 (rows) or -1 (columns), got {given}")
    value = _given_rows if given == -2 else _given_columns
    return of_kept(value, where, unit=nats_in(base), event_rank=2, joint=joint)


def mutual_information(
    joint: Distribution,
    *,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """What knowing one variable of a table tells about the other. 0 if independent.

        I = sum_xy p_xy log(p_xy / (p_x p_y)) = KL(p_xy, p_x p_y)
        d I / d z_xy = p_xy (log(p_xy / (p_x p_y)) - I)

    Args:
        joint: a table over its last two axes. The marginals are its own: the textbook
            passes others for this table, and gets 0.72 bits.
        base: of the logarithm; e for nats, 2 for bits.
        where: tables to keep. A dropped one is 0 and has gradient exactly 0.

    Returns:
        I >= 0, within 20 ULP of Logits, and gradient entries within 30 of the largest
        p_xy |log(p_xy / (p_x p_y))|; of Probs, their own rounding adds up to
        1e-6 sqrt(I).

    Raises:
        TypeError: joint does not say what it is, or is not floating point, or base no
            number.
        ValueError: joint has no two axes, where is not shaped like the tables, or
            base is no base.

    >>> table = Probs(jnp.array([[0.1, 0.5], [0.1, 0.3]]))
    >>> print(f"{mutual_information(table, base=2):.6f}")
    0.007403
    """
    return of_kept(_mutual, where, unit=nats_in(base), event_rank=2, joint=joint)


def _given_rows(joint: Distribution) -> Array:
    kind, table = type(joint), jnp.asarray(joint[0])
    cells = law(kind(_flat(table)))
    possible = (cells.probs.reshape(table.shape) > 0).any(-1, keepdims=True)
    surprise = -_flat(law(kind(jnp.where(possible, table, 1))).log_probs)
    mean = lax.stop_gradient(compensated_sum(product(cells.probs, surprise)))
    return with_slopes(mean, (score_slope(cells.probs, surprise),), cells.scores)


def _given_columns(joint: Distribution) -> Array:
    return _given_rows(type(joint)(jnp.swapaxes(joint[0], -2, -1)))


def _mutual(joint: Distribution) -> Array:
    table = jnp.asarray(joint[0])
    a = law(type(joint)(_flat(table)))
    p = a.probs.reshape(table.shape)
    p_x, p_y = p.sum(-1, keepdims=True), p.sum(-2, keepdims=True)
    independent = p_x * p_y
    one_x, one_y = (jnp.where(margin == 0, 1, margin) for margin in (p_x, p_y))
    log_x, log_y = jnp.log(one_x), jnp.log(one_y)
    like = log_x + log_y - a.log_probs.reshape(table.shape)
    d = like
    if isinstance(joint, Logits):
        top = table.max((-2, -1), keepdims=True)
        high, low = difference(table, top)
        log_y = log_y + a.log_total[..., None]
        precise = sum_rounded_once(log_x, -high, log_y, -low)
        d = jnp.where(jnp.isfinite(high), precise, like)
    # What the logarithms of the marginals lack moves whole rows or whole columns. The
    # second time it is no larger than d, and so is what rounding leaves of it.
    for axis, one in 2 * ((-1, one_x), (-2, one_y)):
        mean = excess(p, independent, d).sum(axis, keepdims=True) / one
        mean = jnp.maximum(mean, -0.5)  # less only where what a row lacks underflows
        d = jnp.where(jnp.isfinite(d), d - jnp.log1p(mean), d)
    d = _flat(moving_as(like, d))
    return divergence(a, _flat(independent), d, d)


def _flat(table: Array) -> Array:
    """The last two axes as one."""
    return table.reshape(*table.shape[:-2], math.prod(table.shape[-2:]))
