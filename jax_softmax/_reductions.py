"""logsumexp, log_softmax and softmax: one reduction, three ways to return it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._partition import (
    complement,
    gap,
    log_partition,
    log_total,
    partition_and_probability,
    partition_and_rest,
)
from jax_softmax._platform import rounded
from jax_softmax._probabilities import Shares, quicker
from jax_softmax._shards import Shards
from jax_softmax._tracing import traced_once

Axis = int | tuple[int, ...]


def logsumexp(
    x: Float[ArrayLike, "..."],
    axis: Axis = -1,
    *,
    where: Bool[ArrayLike, "..."] | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """log(sum(exp(x))) over an axis, by default the last, in at least float32.

        lse(x) = max + log1p(tail),   d lse / d x = softmax(x)

    Args:
        x: any scores; -inf contributes nothing, +inf makes the result +inf.
        axis: the axis, or axes, to sum over.
        where: entries to keep, broadcast to x. No entry kept: -inf, gradient 0.
        keepdims: keep the summed axes with length 1.

    Returns:
        lse in nats, within 2 ULP (2.1 of up to 16 classes), or of max|x| where the two
        terms cancel (lse near 0 is ill-conditioned in x).

    Raises:
        TypeError: x is not floating point.
        ValueError: an axis is out of range, repeated or empty.

    >>> print(logsumexp(jnp.array([1000.0, 1000.0])))
    1000.6932
    """
    x, axes, where = _checked(x, axis, where)
    keepdims = options.flag("keepdims", keepdims)
    lse = _logsumexp(x, where, axes)
    return jnp.expand_dims(lse, axes) if keepdims else lse


def log_softmax(
    x: Float[ArrayLike, "..."],
    axis: Axis = -1,
    *,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Log-probabilities, in the type of x.

        log p_j = -((max - x_j) + log1p(tail)),   d log p_j / d x_k = [j = k] - p_k

    Args:
        x: any scores; -inf rules an entry out.
        axis: the axis, or axes, that the probabilities sum to one over.
        where: entries to keep, broadcast to x; a dropped one has log-probability -inf.

    Returns:
        Log-probabilities, within 3 ULP, also when one of them is -1e-30. The gradient
        of any one of them is within 3 ULP too.

    Raises:
        TypeError: x is not floating point.
        ValueError: an axis is out of range, repeated or empty.

    >>> print(log_softmax(jnp.array([20.0, 0.0, 0.0])))
    [-4.1223074e-09 -2.0000000e+01 -2.0000000e+01]
    """
    x, axes, where = _checked(x, axis, where)
    return _log_softmax(x, where, axes)


def softmax(
    x: Float[ArrayLike, "..."],
    axis: Axis = -1,
    *,
    where: Bool[ArrayLike, "..."] | None = None,
) -> Float[Array, "..."]:
    """Probabilities proportional to exp(x), in the type of x.

        p_j = exp(x_j - max) / (1 + tail),   d p_j / d x_k = p_j ([j = k] - p_k)

    The maximum is subtracted before exp, so nothing overflows; dividing last keeps
    the relative accuracy that exp(x - lse) loses. (Blanchard, Higham & Higham,
    "Accurately computing the log-sum-exp and softmax functions", 2021.)

    Args:
        x: any scores; -inf rules an entry out. Several +inf share the probability.
        axis: the axis, or axes, that the probabilities sum to one over.
        where: entries to keep, broadcast to x; a dropped one has probability 0.

    Returns:
        Probabilities, within 3 ULP (3.6 of up to 16 classes); of 16 bits, within 0.51.

    Raises:
        TypeError: x is not floating point.
        ValueError: an axis is out of range, repeated or empty.

    >>> print(softmax(jnp.array([[1.0, 1.0], [1.0, 10.0], [1.0, 100.0]])))
    [[5.0000000e-01 5.0000000e-01]
     [1.2339458e-04 9.9987662e-01]
     [0.0000000e+00 1.0000000e+00]]
    """
    x, axes, where = _checked(x, axis, where)
    return _softmax(x, where, axes)


@traced_once(static_argnames="axes")
def _logsumexp(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    return _lse(_moved(x, where, axes).z)


@traced_once(static_argnames="axes")
def _log_softmax(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    rows = _moved(x, where, axes)
    return rows.restore(rows.normalized.log_probs, -jnp.inf)


@traced_once(static_argnames="axes")
def _softmax(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    rows = _moved(x, where, axes)
    return rows.restore(rows.normalized.probs, 0.0)


@jax.custom_jvp
def _lse(z: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """lse alone: the probabilities of its gradient take as long to trace."""
    return log_partition(partition_and_rest(z))


@_lse.defjvp
def _lse_jvp(primals, tangents):
    def lse(z: Array) -> Array:
        return normalized(z, Shards.whole(z.shape[-1]), True).lse

    return jax.jvp(lse, primals, tangents)


class Normalized(NamedTuple):
    """A row of logits after the reduction."""

    lse: Float[Array, "*batch"]
    log_probs: Float[Array, "*batch classes"]
    probs: Float[Array, "*batch classes"]
    complements: Float[Array, "*batch classes"]  # 1 - probs, right where probs are 1


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@traced_once(static_argnums=(1, 2))
def normalized(
    z: Float[Array, "*batch classes"], shards: Shards, rounds: bool = False
) -> Normalized:
    """lse, log-probabilities and probabilities from one partition of the last axis.

    All are as wide as sums are, also where z is narrower. With `rounds`, log_probs and
    probs are going to be rounded to the type of z, and are no more accurate than that
    asks for; lse always is.
    """
    part, probs = partition_and_probability(z, shards, rounds=rounds)
    wide, column = checks.wide(z), part.column
    log_probs = -(gap(wide, column.max) + log_total(part)[..., None])
    shares = Shares(log_probs, probs)
    if rounds and shards.alone:
        shares = quicker(z, shares)
    return Normalized(log_partition(part), *shares, complement(wide, column))


@normalized.defjvp
def _normalized_jvp(shards, rounds, primals, tangents):
    """d lse = sum p dz;  d log p = (1 - p) dz - sum of p dz over the others."""
    (z,), (dz,) = primals, tangents
    out, dz = normalized(z, shards, rounds), checks.wide(dz)
    p_dz = jnp.where(out.lse[..., None] == -jnp.inf, 0, out.probs) * dz
    total = shards.sum(p_dz.sum(-1))
    d_log_probs = out.complements * dz - (total[..., None] - p_dz)
    d_probs = out.probs * d_log_probs
    return out, Normalized(total, d_log_probs, d_probs, -d_probs)


def _checked(
    x: ArrayLike, axis: Axis, where: ArrayLike | None
) -> tuple[Array, tuple[int, ...], Array | None]:
    x = checks.floating("x", x)
    axes = options.axes(axis, x.shape)
    if where is not None:
        where = checks.entry_mask("where", where, x.shape)
    return x, axes, where


class _Moved(NamedTuple):
    """x with the reduced axes last and as one, and the way back."""

    z: Float[Array, "*batch classes"]
    restore: Callable[[Array, float], Array]

    @property
    def normalized(self) -> Normalized:
        return normalized(self.z, Shards.whole(self.z.shape[-1]), True)


def _moved(x: Array, where: Array | None, axes: tuple[int, ...]) -> _Moved:
    last = tuple(range(-len(axes), 0))
    kept = x if where is None else jnp.where(where, x, -jnp.inf)
    moved = jnp.moveaxis(kept, axes, last)
    batch, reduced = moved.shape[: -len(axes)], moved.shape[-len(axes) :]

    def restore(rows: Array, dropped: float) -> Array:
        rows = rounded(rows, x.dtype).reshape(moved.shape)
        out = jnp.moveaxis(rows, last, axes)
        return out if where is None else jnp.where(where, out, dropped)

    return _Moved(moved.reshape(*batch, math.prod(reduced)), restore)
