"""How undecided one distribution is: entropy and perplexity.

A distribution says what it is, Logits(x) or Probs(x), so nothing is guessed from types
or values. Classes are the last axis; one result per row, in at least float32, in nats
or, with base=2, in bits. 0 log 0 = 0, in values and in derivatives. A row of logits
that are all -inf, or of weights that are all 0, is no distribution: NaN.

The formulas are those of d2l.ai, "Information Theory", and Cover & Thomas, "Elements of
Information Theory" (2006), chapter 2. Gradient entries in logits are within 12 ULP of
half the sum of the row's absolute entries.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jax_softmax import _options as options
from jax_softmax._distributions import (
    Distribution,
    Law,
    law,
    of_kept,
    product,
    score_slope,
    with_slopes,
)
from jax_softmax._exponential import two_sum
from jax_softmax._folds import row_sum
from jax_softmax._partition import compensated_sum


def entropy(
    p: Distribution,
    *,
    base: float = math.e,
    where: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """The mean surprise: 0 when certain, log(classes) when uniform.

        H = -sum_j p_j log p_j,   d H / d z_j = -p_j (log p_j + H)

    Args:
        p: Logits(z) or Probs(p). The derivative in p_j is the one above over p_j. The
            joint entropy of a table is that of its entries in one row.
        base: of the logarithm; e for nats, 2 for bits.
        where: rows to keep. A dropped row has entropy 0 and gradient exactly 0.

    Returns:
        H >= 0, within 4 ULP (5 in another base), also when p is certain up to 1e-30.

    Raises:
        TypeError: p does not say what it is, or is not floating point, or base no
            number.
        ValueError: where is not shaped like the rows of p, or base is no base.

    >>> print(f"{entropy(Probs(jnp.array([0.1, 0.5, 0.1, 0.3])), base=2):.5g}")
    1.6855
    >>> print(f"{entropy(Logits(jnp.array([20.0, 0.0, 0.0]))):.5g}")
    8.6568e-08

    One of 64 equally likely codes carries 6 bits of self-information:

    >>> print(f"{entropy(Probs(jnp.full(64, 1 / 64)), base=2):.5g}")
    6
    """
    return of_kept(_entropy, where, unit=nats_in(base), p=p)


def perplexity(
    p: Distribution, *, where: Bool[ArrayLike, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """exp(entropy): among how many equally likely classes p is as undecided.

        PP = exp(H) = exp(sum_j p_j log(p_max / p_j)) / p_max,   d PP = PP d H

    Of a language model on a text, it is jnp.exp(mean_loss(losses)).

    Args:
        p: Logits(z) or Probs(p).
        where: rows to keep. A dropped row has perplexity 0 and gradient exactly 0.

    Returns:
        Between 1 and the number of classes, within 12 ULP, or 3 ULP for each nat of
        entropy where that is more: exp magnifies what an entropy's rounding leaves.

    Raises:
        TypeError: p does not say what it is, or is not floating point.
        ValueError: where is not shaped like the rows of p.

    >>> print(f"{perplexity(Probs(jnp.array([0.5, 0.25, 0.25]))):.5g}")
    2.8284
    """
    return of_kept(_perplexity, where, p=p)


def nats_in(base: float) -> float:
    """log(base): how many nats one unit of this base is."""
    base = options.number("base", base)
    if base <= 1:
        raise ValueError(f"base must be above 1, got {base}")
    return math.log(base)


def mean_surprise(p: Law, q: Law) -> Array:
    """-sum p log q = -log(max q) + sum p log(max q / q): two terms >= 0."""
    high, low = row_sum(product(p.probs, q.drops))
    mean, rest = two_sum(high, q.log_total[..., 0])
    mean = mean + jnp.where(jnp.isfinite(mean), rest + low, 0)
    return lax.stop_gradient(mean)


def _entropy(p: Distribution) -> Array:
    return _own_surprise(law(p))


def _own_surprise(p: Law) -> Array:
    slope = score_slope(p.probs, p.drops)
    return with_slopes(mean_surprise(p, p), (slope,), p.scores)


def _perplexity(p: Distribution) -> Array:
    a = law(p)
    value = jnp.exp(compensated_sum(product(a.probs, a.drops))) / a.probs.max(-1)
    nats = _own_surprise(a)
    return lax.stop_gradient(value) * jnp.exp(nats - lax.stop_gradient(nats))
