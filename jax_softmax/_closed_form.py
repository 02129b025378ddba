"""Derivatives of softmax, log_softmax, logsumexp and the z-loss, as on paper.

They share no code with the functions they describe but the checks of arguments, so that
agreement means something.
All of them follow, by the chain rule, from two facts about a row of logits z:

    d lse / d z_i = p_i                     with p = softmax(z)
    d p_i / d z_j = p_i (1[i = j] - p_j)

What the labels add is in `_closed_form_losses`, what the weights of a linear model add
in `_closed_form_regression`. Classes are the last axis, a row holds at least one finite
logit, types narrower than float32 are widened inside, and every result has the type of
the logits, which is floating point. Nothing is broadcast: an argument of another shape
is a ValueError, one of another type a TypeError.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jax_softmax import _checks as checks


def softmax_jacobian(
    logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes classes"]:
    """The matrix diag(p) - p p^T, one for each row of logits.

    p_i = e^{z_i} / s with s = sum_k e^{z_k}, so by the quotient rule
    d p_i / d z_j = 1[i = j] e^{z_i} / s - e^{z_i} e^{z_j} / s^2 = p_i (1[i = j] - p_j).
    Every row sums to 0 (probability moves, it is not made), which gives the diagonal
    p_i (1 - p_i) without a subtraction. Source: Bishop, PRML (2006), eq. 4.106.

    >>> print(softmax_jacobian(jnp.zeros(2)))
    [[ 0.25 -0.25]
     [-0.25  0.25]]
    """
    logits = checks.scores("logits", logits)
    p = _softmax(checks.wide(logits))
    diagonal = jnp.eye(p.shape[-1], dtype=bool)
    moved = jnp.where(diagonal, 0, p[..., :, None] * p[..., None, :])
    kept = jnp.sum(moved, axis=-1, keepdims=True)
    return jnp.where(diagonal, kept, -moved).astype(logits.dtype)


def softmax_jvp(
    logits: Float[ArrayLike, "*batch classes"],
    tangent: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """The softmax Jacobian times a tangent, without the matrix: p * (t - <p, t>).

    (diag(p) - p p^T) t = p * t - p <p, t>: each class gains by how much its own logit
    moves faster than the average under p. Where p_i > 1/2, t is counted from t_i, which
    changes nothing on paper: there t_i - <p, t> would cancel when p is certain.
    Source: Bishop, PRML (2006), eq. 4.106.

    >>> print(softmax_jvp(jnp.zeros(2), jnp.array([1.0, 0.0])))
    [ 0.25 -0.25]
    """
    logits = checks.scores("logits", logits)
    p, t = _softmax(checks.wide(logits)), _alike(logits, "tangent", tangent)
    return (p * _from_mean(p, t)).astype(logits.dtype)


def softmax_vjp(
    logits: Float[ArrayLike, "*batch classes"],
    cotangent: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """A cotangent times the softmax Jacobian: p * (c - <p, c>).

    diag(p) - p p^T is symmetric, so the vjp and the jvp are the same map.
    Source: Bishop, PRML (2006), eq. 4.106.

    >>> print(softmax_vjp(jnp.zeros(2), jnp.array([1.0, 0.0])))
    [ 0.25 -0.25]
    """
    return softmax_jvp(logits, cotangent)


def log_softmax_jvp(
    logits: Float[ArrayLike, "*batch classes"],
    tangent: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """The Jacobian of log_softmax times a tangent: t - <p, t>.

    log p_i = z_i - lse(z), so d log p_i / d z_j = 1[i = j] - p_j.
    Source: Bishop, PRML (2006), eq. 4.106 divided by p_i.

    >>> print(log_softmax_jvp(jnp.zeros(2), jnp.array([1.0, 0.0])))
    [ 0.5 -0.5]
    """
    logits = checks.scores("logits", logits)
    p, t = _softmax(checks.wide(logits)), _alike(logits, "tangent", tangent)
    return _from_mean(p, t).astype(logits.dtype)


def log_softmax_vjp(
    logits: Float[ArrayLike, "*batch classes"],
    cotangent: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """A cotangent times the Jacobian of log_softmax: c - p * sum(c).

    d log p_i / d z_j = 1[i = j] - p_j, summed over i against c_i, is c_j - p_j sum(c).
    With sum(c) = c_j + the other c that is c_j (1 - p_j) - p_j sum_{k != j} c_k, and
    1 - p_j is the sum of the other probabilities: nothing cancels when the model is
    certain. With c the one-hot of the label and a minus sign this is the gradient of
    cross-entropy. Source: Bishop, PRML (2006), eq. 4.106 divided by p_i.

    >>> print(log_softmax_vjp(jnp.zeros(2), jnp.array([1.0, 0.0])))
    [ 0.5 -0.5]
    """
    logits = checks.scores("logits", logits)
    p, c = _softmax(checks.wide(logits)), _alike(logits, "cotangent", cotangent)
    other_c = _others(c, jnp.sum(c, axis=-1, keepdims=True))
    return (c * _others(p, 1.0) - p * other_c).astype(logits.dtype)


def logsumexp_gradient(
    logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """The gradient of log(sum_k e^{z_k}): e^{z_i} / sum_k e^{z_k} = softmax(z)_i.

    Sources: d2l.ai, "Softmax Regression"; Boyd & Vandenberghe, Convex Optimization
    (2004), 3.1.5.

    >>> print(logsumexp_gradient(jnp.zeros(2)))
    [0.5 0.5]
    """
    logits = checks.scores("logits", logits)
    return _softmax(checks.wide(logits)).astype(logits.dtype)


def logsumexp_hessian(
    logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes classes"]:
    """The Hessian of logsumexp: the Jacobian of its gradient, diag(p) - p p^T.

    v^T H v = <p, v^2> - <p, v>^2 is a variance, so logsumexp is convex.
    Source: Boyd & Vandenberghe, Convex Optimization (2004), 3.1.5.

    >>> print(logsumexp_hessian(jnp.zeros(2)))
    [[ 0.25 -0.25]
     [-0.25  0.25]]
    """
    return softmax_jacobian(logits)


def logsumexp_hvp(
    logits: Float[ArrayLike, "*batch classes"],
    tangent: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """The Hessian of logsumexp times a tangent, without the matrix: p * (t - <p, t>).

    Source: Boyd & Vandenberghe, Convex Optimization (2004), 3.1.5.

    >>> print(logsumexp_hvp(jnp.zeros(2), jnp.array([1.0, 0.0])))
    [ 0.25 -0.25]
    """
    return softmax_jvp(logits, tangent)


def z_loss_gradient(
    logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """The gradient of lse(z)^2, the term that keeps logits from drifting: 2 lse p.

    Source: chain rule; the loss is de Brebisson & Vincent (arXiv:1604.08859, 2016), as
    used in PaLM (arXiv:2204.02311, section 5).

    >>> print(jnp.round(z_loss_gradient(jnp.zeros(2)), 4))
    [0.6931 0.6931]
    """
    logits = checks.scores("logits", logits)
    z = checks.wide(logits)
    return (2 * _lse(z) * _softmax(z)).astype(logits.dtype)


def z_loss_hessian(
    logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes classes"]:
    """The Hessian of lse(z)^2: 2 p p^T + 2 lse (diag(p) - p p^T).

    Differentiate 2 lse p by the product rule. Unlike lse itself, its square is convex
    only where lse >= 0. Source: as for z_loss_gradient.

    >>> print(z_loss_hessian(jnp.log(jnp.array([0.5, 0.5]))))
    [[0.5 0.5]
     [0.5 0.5]]
    """
    logits = checks.scores("logits", logits)
    z = checks.wide(logits)
    p = _softmax(z)
    outer = p[..., :, None] * p[..., None, :]
    hessian = 2 * outer + 2 * _lse(z)[..., None] * softmax_jacobian(z)
    return hessian.astype(logits.dtype)


def z_loss_hvp(
    logits: Float[ArrayLike, "*batch classes"],
    tangent: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """The Hessian of lse(z)^2 times a tangent: 2 p <p, t> + 2 lse p * (t - <p, t>).

    Source: as for z_loss_hessian, without the matrix.

    >>> print(z_loss_hvp(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 0.0])))
    [0.5 0.5]
    """
    logits = checks.scores("logits", logits)
    z, t = checks.wide(logits), _alike(logits, "tangent", tangent)
    p = _softmax(z)
    product = 2 * p * (_mean(p, t) + _lse(z) * _from_mean(p, t))
    return product.astype(logits.dtype)


def _alike(
    logits: Float[Array, "*batch classes"],
    name: str,
    value: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """A number for each logit, in the type that sums run in."""
    array = checks.floating(name, value)
    checks.same_shape(name, array, logits.shape)
    return checks.wide(array)


def _softmax(z: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    powers = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


def _lse(z: Float[Array, "*batch classes"]) -> Float[Array, "*batch 1"]:
    most = jnp.max(z, axis=-1, keepdims=True)
    return most + jnp.log(jnp.sum(jnp.exp(z - most), axis=-1, keepdims=True))


def _mean(
    p: Float[Array, "*batch classes"], v: Float[Array, "*batch classes"]
) -> Float[Array, "*batch 1"]:
    return jnp.sum(p * v, axis=-1, keepdims=True)


def _from_mean(
    p: Float[Array, "*batch classes"], v: Float[Array, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """v - <p, v>, with v counted from its value at a class of more than a half.

    On paper that changes nothing; but where p is nearly 1, v and <p, v> are nearly the
    same number. (Counted from a class of small p, the others could lose digits.)
    """
    ahead = v - jnp.sum(jnp.where(p > 0.5, v, 0), axis=-1, keepdims=True)
    return ahead - _mean(p, ahead)


def _others(
    v: Float[Array, "*batch classes"], total: Float[Array, "*batch 1"] | float
) -> Float[Array, "*batch classes"]:
    """total - v_j; at the largest entry, where that cancels, the sum of the rest."""
    most = jnp.argmax(jnp.abs(v), axis=-1, keepdims=True)
    largest = jnp.arange(v.shape[-1]) == most
    rest = jnp.sum(jnp.where(largest, 0, v), axis=-1, keepdims=True)
    return jnp.where(largest, rest, total - v)
