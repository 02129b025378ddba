"""Cross-entropy from logits; what an unknown label and a dropped row give."""

from functools import partial
from operator import add

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Integer, Real

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._entries import is_column, row_entry
from jax_softmax._exponential import quotient
from jax_softmax._partition import (
    compensated_sum,
    complement,
    gap,
    log_total,
    partition_and_probability,
)
from jax_softmax._reductions import normalized
from jax_softmax._shards import AxisName, Shards
from jax_softmax._tracing import traced_once


def cross_entropy(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
    label_smoothing: float = 0.0,
    axis_name: AxisName | None = None,
    classes: int | None = None,
) -> Float[Array, "*batch"]:
    """How surprised softmax(logits) is by each label, in nats, one loss per row.

        loss = lse(z) - z[y],   d loss / d z = softmax(z) - onehot(y)

    Picking z[y] is the sum over onehot(y) * z: both forms of the textbook's definition
    give the same number, and the index saves the multiplications by zero. The result
    is neither a mean nor a sum: average with mean_loss.

    Args:
        logits: z, any real scores; -inf rules a class out.
        labels: y in [0, classes). Any other id makes the row's loss and gradient NaN.
        where: rows to keep. A dropped row has loss 0 and gradient exactly 0, whatever
            it holds.
        label_smoothing: the share of the target spread evenly over all classes that
            are not ruled out.
        axis_name: mesh axes, inside jax.shard_map, over which the classes lie: logits
            are this device's, in the order of the axes, labels those of all of them.
            Three numbers a row travel: maximum, tail and the label's logit; with
            smoothing a few more. (With check_vma=False JAX counts a loss once for each
            device, so jax.grad inside is as many times larger.)
        classes: how many there are, if the last columns are no classes but padding.

    Returns:
        Losses >= 0 in at least float32, within 2 ULP (2.5 of up to 16 classes);
        gradient entries within 3 (3.6).
        With smoothing, within 4 ULP of the sum of absolute terms.

    Raises:
        TypeError: logits are not floating point, or labels not integers.
        ValueError: labels or where are not shaped like the rows of logits,
            label_smoothing is outside [0, 1], or axis_name names no mesh axis here.

    >>> logits = jnp.array([[20.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> labels = jnp.array([0, 2])
    >>> print(cross_entropy(logits, labels))
    [4.1223074e-09 1.0986123e+00]
    >>> from jax_softmax import log_softmax
    >>> print(-(jax.nn.one_hot(labels, 3) * log_softmax(logits)).sum(-1))
    [4.1223074e-09 1.0986123e+00]
    """
    logits, labels, keep = checks.labelled("logits", logits, labels, where)
    label_smoothing = options.fraction("label_smoothing", label_smoothing)
    shards = Shards.over(axis_name, logits.shape[-1], classes)
    return _cross_entropy(logits, labels, keep, label_smoothing, shards)


def cross_entropy_with_probs(
    logits: Float[ArrayLike, "*batch classes"],
    probs: Float[ArrayLike, "*batch classes"],
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of softmax(logits) against target distributions, in nats.

        loss = -sum_j t_j log p_j,   d loss / d z = sum(t) softmax(z) - t

    Args:
        logits: z, any real scores; -inf rules a class out.
        probs: t >= 0, one target distribution per row. t = 0 on a ruled-out class
            contributes 0 to value and derivatives; t > 0 there is an infinite loss.
        where: rows to keep. A dropped row has loss 0 and gradient exactly 0.
        axis_name: mesh axes over which the classes of both lie, as in cross_entropy.

    Returns:
        One loss per row, in at least float32, within 4 ULP; gradient entries within
        5 ULP of p_j + t_j.

    Raises:
        TypeError: logits or probs are not floating point.
        ValueError: probs are not shaped like logits, or where not like their rows, or
            axis_name names no mesh axis here.

    >>> targets = jnp.array([[0.5, 0.5, 0.0]])
    >>> print(cross_entropy_with_probs(jnp.array([[1.0, 2.0, -jnp.inf]]), targets))
    [0.81326175]
    """
    logits = checks.scores("logits", logits)
    probs = checks.scores("probs", probs)
    checks.same_shape("probs", probs, logits.shape)
    keep = checks.row_mask("where", where, logits.shape[:-1])
    shards = Shards.over(axis_name, logits.shape[-1], None)
    return _cross_entropy_with_probs(logits, probs, keep, shards)


def nll_from_probs(
    probs: Float[ArrayLike, "*batch classes"], labels: Integer[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """The textbook's cross-entropy, on probabilities: -log(probs[range(n), labels]).

    Indexing by the label is the whole of sum_j y_j log(y_hat_j): y is 0 elsewhere. The
    book's function takes the mean of these losses; here mean_loss does. From logits,
    prefer cross_entropy: a probability that has rounded to 0 or 1 has already lost
    its loss (inf or 0) and its gradient, and the logarithm's derivative 1/p overflows.

    Args:
        probs: probabilities, as softmax gives them. 0 at the label gives inf.
        labels: in [0, classes). Any other id makes the row's loss and gradient NaN.

    Returns:
        One loss per row, in at least float32, in nats; NaN where the row has one.

    Raises:
        TypeError: probs are not floating point, or labels not integers.
        ValueError: labels are not shaped like the rows of probs.

    >>> probs, labels = jnp.array([[0.1, 0.3, 0.6], [0.3, 0.2, 0.5]]), jnp.array([0, 2])
    >>> print(nll_from_probs(probs, labels), nll_from_probs(probs, labels).mean())
    [2.3025851 0.6931472] 1.4978662
    >>> print(-(jax.nn.one_hot(labels, 3) * jnp.log(probs)).sum(-1))
    [2.3025851 0.6931472]
    """
    probs = checks.scores("probs", probs)
    labels = checks.class_ids("labels", labels, probs.shape[:-1])
    wide = checks.wide(probs)
    known, column = known_label(labels, probs.shape[-1])
    sound = known & ~jnp.isnan(wide).any(-1)
    # A product, through which NaN reaches the row's gradient too.
    wide = wide * jnp.where(sound, 1, jnp.nan).astype(wide.dtype)[..., None]
    return -jnp.log(row_entry(wide, column))


def mean_loss(
    losses: Float[ArrayLike, "*batch"],
    where: Bool[ArrayLike, "*batch"] | None = None,
    *,
    normalizer: Real[ArrayLike, ""] | float | None = None,
) -> Float[Array, ""]:
    """The mean of the kept losses; 0 with zero gradient when none is kept.

    0 also when the normalizer is 0.

    Args:
        losses: one loss per row.
        where: losses to keep; the rest may be anything, NaN included.
        normalizer: what the sum is divided by, instead of the number of kept losses.
            With the whole batch's count, the sum over micro-batches is its mean.

    Returns:
        A scalar in at least float32.

    Raises:
        TypeError: losses are not floating point, or where not boolean.
        ValueError: where is not shaped like losses.

    >>> print(mean_loss(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    losses = checks.floating("losses", losses)
    keep = checks.row_mask("where", where, losses.shape)
    wide = checks.wide(losses)
    total = jnp.where(keep, wide, 0).sum()
    count = keep.sum()
    if normalizer is not None:
        count = checks.scalar("normalizer", normalizer)
    count = count.astype(wide.dtype)
    return jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))


@traced_once(static_argnames=("smoothing", "shards"))
def _cross_entropy(
    logits: Array, labels: Array, keep: Array, smoothing: float, shards: Shards
) -> Array:
    z = shards.ruled(kept_rows(logits, keep))
    loss = nll_and_grad(z, jnp.where(keep, labels, 0), shards)[0]
    if smoothing:
        possible = z > -jnp.inf
        count = shards.sum(possible.sum(-1)).astype(loss.dtype)
        share = add(*quotient((jnp.full_like(count, smoothing), 0), (count, 0)))
        nll = jnp.where(possible, -normalized(z, shards).log_probs, 0)
        scale = 2.0**-24  # exact, and the sum of the largest numbers stays finite
        spread = shards.sum(compensated_sum(nll * scale))
        loss = part_of(loss, 1 - smoothing) + share / scale * spread
    return jnp.where(keep, loss, 0)


@traced_once(static_argnames="shards")
def _cross_entropy_with_probs(
    logits: Array, probs: Array, keep: Array, shards: Shards
) -> Array:
    z = kept_rows(logits, keep)
    targets = probs.astype(checks.accumulation_dtype(z))
    targets = jnp.where(keep[..., None], targets, 0)
    return jnp.where(keep, _soft_nll(z, targets, shards), 0)


def _soft_nll(
    z: Float[Array, "*batch classes"],
    targets: Float[Array, "*batch classes"],
    shards: Shards,
) -> Float[Array, "*batch"]:
    def nll(z, targets):
        log_probs = normalized(z, shards).log_probs
        return jnp.where((targets == 0) & (log_probs == -jnp.inf), 0, -log_probs)

    @jax.custom_jvp
    def loss_of(z, targets):
        return shards.sum(compensated_sum(targets * nll(z, targets)))

    def rule(primals, tangents):
        (z, targets), (dz, d_targets) = primals, tangents
        loss = loss_of(z, targets)
        change = jnp.zeros_like(loss)
        if not isinstance(dz, SymbolicZero):
            mass = shards.sum(compensated_sum(targets))[..., None]
            grad = mass * normalized(z, shards).probs - targets
            change += shards.sum((grad * checks.wide(dz)).sum(-1))
        if not isinstance(d_targets, SymbolicZero):  # or inf * 0 is NaN
            change += shards.sum((nll(z, targets) * d_targets).sum(-1))
        return loss, change

    loss_of.defjvp(rule, symbolic_zeros=True)
    return loss_of(z, targets)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
@traced_once(static_argnums=2)
def nll_and_grad(
    z: Float[Array, "*batch classes"], labels: Integer[Array, "*batch"], shards: Shards
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch classes"]]:
    """The loss of each row and its gradient in z, from one partition.

    loss = (max - z[y]) + log1p(tail)          two terms >= 0: nothing cancels
    d loss / d z_j = exp(z_j - max) / (1 + tail),   minus the others' at the label
    """
    part, probs = partition_and_probability(z, shards, rounds=True)
    known, column = shards.has(labels), shards.column(labels)
    z_label = shards.sum(checks.wide(_at_label(z, column)))
    loss = jnp.where(known, gap(z_label, part.max) + log_total(part), jnp.nan)
    sound = known & (part.max > -jnp.inf)
    # NaN by a product, since XLA for CPU makes no vector loop of a choice by rows.
    grad = probs * jnp.where(sound, 1, jnp.nan).astype(probs.dtype)[..., None]
    grad_at_label = jnp.where(sound, -complement(z_label, part), jnp.nan)
    return loss, jnp.where(is_column(z, column), grad_at_label[..., None], grad)


@nll_and_grad.defjvp
def _nll_and_grad_jvp(shards, primals, tangents):
    """d loss = sum grad dz;  d grad = p ((dz - dz[y]) - d loss)."""
    (z, labels), (dz, _) = primals, tangents
    (loss, grad), dz = nll_and_grad(z, labels, shards), checks.wide(dz)
    here = is_column(z, shards.column(labels))
    d_loss = shards.sum((grad * dz).sum(-1))
    probs = jnp.where(here, jnp.exp(-loss)[..., None], grad)
    d_from_label = dz - shards.sum(jnp.where(here, dz, 0).sum(-1))[..., None]
    return (loss, grad), (d_loss, probs * (d_from_label - d_loss[..., None]))


def part_of(loss: Array, share: float) -> Array:
    """share * loss, which is 0 of an infinite loss too where the share is 0."""
    return share * loss if share else jnp.where(loss == jnp.inf, 0, 0 * loss)


def _at_label(
    rows: Float[Array, "*batch classes"], column: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """rows[i, column[i]], 0 where there is no such column."""
    found = row_entry(rows, jnp.maximum(column, 0))
    return jnp.where(column < 0, 0, found)


def known_label(
    labels: Integer[Array, "*batch"], classes: int
) -> tuple[Bool[Array, "*batch"], Int[Array, "*batch"]]:
    """Which labels name a class, and a column that is safe to read for every row."""
    all_here = Shards.whole(classes)
    return all_here.has(labels), jnp.maximum(all_here.column(labels), 0)


def kept_rows(logits: Array, keep: Array) -> Array:
    """Dropped rows become zeros before anything is computed from them."""
    return jnp.where(keep[..., None], logits, 0)
