"""Distributions that say what they are, and what the formulas need to know of one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jax_softmax import _checks as checks
from jax_softmax._entries import row_entry
from jax_softmax._logarithm import log1p
from jax_softmax._partition import compensated_sum, gap
from jax_softmax._reductions import normalized
from jax_softmax._shards import Shards
from jax_softmax._tracing import traced_once


class Logits(NamedTuple):
    """A distribution by its logits. Log-probabilities are logits too.

    >>> print(entropy(Logits(jnp.zeros(8)), base=2))
    3.0
    """

    logits: Float[ArrayLike, "*batch classes"]


class Probs(NamedTuple):
    """A distribution by its probabilities, or any weights >= 0 in proportion to them.

    They are divided by their sum, so one that has rounded to 1 is told apart from 1 by
    the others. A class of probability 0 is ruled out, and derivatives in it are taken
    as 0. A negative one makes the row NaN.

    >>> print(entropy(Probs(jnp.array([5.0, 5.0])), base=2))
    1.0
    """

    probs: Float[ArrayLike, "*batch classes"]


Distribution = Logits | Probs


class Law(NamedTuple):
    """log p_j = -(drops_j + log_total); classes last, log_total one class wide."""

    scores: Array  # log-weights: what derivatives are first taken in
    probs: Array
    log_probs: Array
    drops: Array  # how far a log-probability is below the largest: right also near 0
    log_total: Array  # log(1 / the largest probability)


def of_kept(
    value: Callable[..., Array],
    where: Bool[ArrayLike, "..."] | None,
    *,
    unit: float = 1.0,
    event_rank: int = 1,
    **given: Distribution,
) -> Array:
    """value(distributions of one shape and type) / unit, and 0 for dropped ones."""
    arrays = []
    for name, p in given.items():
        if not isinstance(p, Logits | Probs):
            raise TypeError(
                f"{name} must say what it is, Logits(x) or Probs(x), "
                f"got {type(p).__name__}"
            )
        name = f"{name}.{p._fields[0]}"
        x = checks.scores(name, p[0])
        if x.ndim < event_rank:
            raise ValueError(f"{name} must be a table of two axes, got shape {x.shape}")
        if 0 in x.shape[-event_rank:]:
            raise ValueError(f"{name} must hold at least one class, got {x.shape}")
        if arrays:
            checks.same_shape(name, x, arrays[0].shape)
        arrays.append(x)
    keep = checks.row_mask("where", where, arrays[0].shape[:-event_rank])
    checked = [type(p)(x) for p, x in zip(given.values(), arrays, strict=True)]
    return _of_kept(value, unit, event_rank, keep, *checked)


@traced_once(static_argnums=(0, 1, 2))
def _of_kept(
    value: Callable[..., Array],
    unit: float,
    event_rank: int,
    keep: Array,
    *given: Distribution,
) -> Array:
    axes = tuple(range(-event_rank, 0))
    over = jnp.expand_dims(keep, axes)
    arrays = [jnp.asarray(p[0]) for p in given]
    wide = checks.accumulation_dtype(*arrays)
    ready = [
        type(p)(jnp.where(over, x.astype(wide), 1))
        for p, x in zip(given, arrays, strict=True)
    ]
    ready = [p if isinstance(p, Logits) else _summable(p, axes) for p in ready]
    return jnp.where(keep, value(*ready), 0) / unit


def _summable(p: Probs, axes: tuple[int, ...]) -> Probs:
    """The same in proportion, halved so often, where it has to be, that sums fit.

    Their inverses too: XLA takes those below the smallest normal number for 0. Beside a
    negative weight all are NaN, so that none goes unnoticed where the other's is 0.
    """
    weights = jnp.asarray(p.probs)
    count = math.prod(weights.shape[axis] for axis in axes)
    halved = 0.5 ** math.ceil(math.log2(8 * count))
    huge = weights.max(axes, keepdims=True) > jnp.finfo(weights.dtype).max * halved
    factor = jnp.where(huge, halved, 1).astype(weights.dtype)
    negative = (weights < 0).any(axes, keepdims=True)
    return Probs(weights * jnp.where(negative, jnp.nan, factor))


def law(p: Distribution) -> Law:
    """Normalise, with nothing lost near certainty."""
    x = jnp.asarray(p[0])
    return _law_of_logits(x) if isinstance(p, Logits) else _law_of_weights(x)


def _law_of_logits(z: Array) -> Law:
    out = normalized(z, Shards.whole(z.shape[-1]))
    drops = moving_as(-out.log_probs, gap(z, z.max(-1, keepdims=True)))
    log_total = -out.log_probs.max(-1, keepdims=True)
    return Law(z, out.probs, out.log_probs, drops, log_total)


def _law_of_weights(weights: Array) -> Law:
    ruled_out = weights == 0
    one = jnp.where(ruled_out, 1, weights)
    top = weights.max(-1, keepdims=True)
    is_top = weights == top
    ties = (is_top.sum(-1, keepdims=True) - 1).astype(weights.dtype)
    rest = compensated_sum(jnp.where(is_top, 0, weights))[..., None] + ties * top
    scores = jnp.where(ruled_out, -jnp.inf, jnp.log(one))

    drops = jnp.where(ruled_out, jnp.inf, weight_ratio(top, one))
    log_total = log1p(rest / top)
    log_probs = moving_as(scores - jnp.log(top + rest), -(drops + log_total))
    return Law(
        scores, weights / (top + rest), log_probs, moving_as(-scores, drops), log_total
    )


def weight_ratio(a: Array, b: Array) -> Array:
    """log(a / b) of weights > 0, right also where they nearly agree."""
    least, most = jnp.minimum(a, b), jnp.maximum(a, b)
    near = 2 * least > most
    close = log1p(jnp.where(near, most - least, 0) / least)
    ratio = jnp.where(near, 1, most / least)
    far = jnp.where(jnp.isinf(ratio), jnp.log(most) - jnp.log(least), jnp.log(ratio))
    return jnp.sign(a - b) * jnp.where(near, close, far)


@jax.custom_jvp
def with_slopes(value: Array, slopes: tuple[Array, ...], *scores: Array) -> Array:
    """The value, whose derivative in each of the scores is declared to be its slopes.

    All values here are means under p of something whose own change is 0 on average:
    the slopes are short and exact where autodiff would cancel large terms. Of higher
    order, it is the slopes that are differentiated.
    """
    return value


def _with_slopes_jvp(primals, tangents):
    value = with_slopes(*primals)  # not primals[0]: its own slopes go on from here
    slopes = primals[1]
    moved = jnp.zeros_like(value)
    for slope, change in zip(slopes, tangents[2:], strict=True):
        if not isinstance(change, jax.custom_derivatives.SymbolicZero):
            moved = moved + (slope * change).sum(-1)
    return value, moved


with_slopes.defjvp(_with_slopes_jvp, symbolic_zeros=True)


def moving_as(like: Array, value: Array) -> Array:
    """The value, with the derivatives of `like`, which rounds or cancels."""
    value = lax.stop_gradient(value)
    move = jnp.where(jnp.isfinite(value), like, 0)
    return value + (move - lax.stop_gradient(move))


def score_slope(p: Array, s: Array) -> Array:
    """The derivative of sum p s in the scores of p: p (s - sum p s).

    s is counted from its value at the largest p, whose entry would cancel otherwise.
    """
    s = s - at_largest(p, s)
    return product(p, s - product(p, s).sum(-1, keepdims=True))


def at_largest(p: Array, s: Array) -> Array:
    """s where p is largest, one class wide; 0 where that is infinite."""
    origin = lax.stop_gradient(row_entry(s, p.argmax(-1))[..., None])
    return jnp.where(jnp.isfinite(origin), origin, 0)


def product(p: Array, value: Array) -> Array:
    """p times value, 0 where p is 0: also of infinite values, also in derivatives."""
    return p * jnp.where(p == 0, 0, value)
