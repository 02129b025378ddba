"""Derivatives of cross-entropy in the logits and the temperature, as on paper.

    loss = sum(q) lse(z) - <q, z>,   d loss / d z = sum(q) p - q,   p = softmax(z)

with q the target distribution: the one-hot of a label, smoothed or not, or any weights.
At the label p_y - 1 is written as the sum it is, -(p_1 + ... without p_y): the sum
keeps its digits when the model is certain. Soft-capped logits s(z) = c tanh(z / c)
enter by the chain rule, with the slope s' on both sides of the Hessian and the bend s''
times the gradient on its diagonal. One result per row: for a mean over n rows, divide
by n. A row whose label is outside [0, classes) is NaN.

>>> logits, labels = jnp.array([[20.0, 0.0, 0.0]]), jnp.array([0])
>>> gradient = cross_entropy_gradient(logits, labels)
>>> [f"{entry:.4e}" for entry in gradient[0]]
['-4.1223e-09', '2.0612e-09', '2.0612e-09']
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer, Real

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._closed_form import (
    _alike,
    _from_mean,
    _mean,
    _softmax,
    log_softmax_vjp,
    softmax_jacobian,
)


def cross_entropy_gradient(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Float[Array, "*batch classes"]:
    """The gradient of cross-entropy with integer labels: (p - q) s'(z).

    loss = lse(s) - sum_i q_i s_i with s = s(z), and d lse / d s_i = p_i. The target is
    q = (1 - a) onehot(y) + a / classes for smoothing a; at the label of an unsmoothed
    row p_y - 1 = -sum_{j != y} p_j.
    Sources: Bishop, PRML (2006), eq. 4.109; d2l.ai, "Softmax and Cross-Entropy Loss";
    smoothing, Szegedy et al. (arXiv:1512.00567); soft cap, Gemma 2 (arXiv:2408.00118).

    Args:
        logits: z, before the soft cap.
        labels: y in [0, classes).
        label_smoothing: a in [0, 1].
        softcap: c of s(z) = c tanh(z / c); None leaves the logits as they are.

    >>> print(cross_entropy_gradient(jnp.zeros((1, 4)), jnp.array([2])))
    [[ 0.25  0.25 -0.75  0.25]]
    """
    logits = checks.scores("logits", logits)
    s, slope, _ = _softcap(logits, softcap)
    return (slope * _label_residual(s, labels, label_smoothing)).astype(logits.dtype)


def cross_entropy_hessian(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Float[Array, "*batch classes classes"]:
    """The Hessian of cross-entropy: diag(s') (diag(p) - p p^T) diag(s') + diag(g s'').

    g = p - q is the gradient in s. Without a soft cap s' = 1 and s'' = 0: the matrix is
    the softmax Jacobian, and neither the labels nor the smoothing matter.
    Sources: Bishop, PRML (2006), section 4.3.4; Boehning (1992), Multinomial logistic
    regression algorithm.

    >>> print(cross_entropy_hessian(jnp.zeros((1, 2)), jnp.array([0])))
    [[[ 0.25 -0.25]
      [-0.25  0.25]]]
    """
    logits = checks.scores("logits", logits)
    s, slope, bend = _softcap(logits, softcap)
    residual = _label_residual(s, labels, label_smoothing)
    return _capped_hessian(s, slope, bend * residual, 1.0).astype(logits.dtype)


def cross_entropy_hvp(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    tangent: Float[ArrayLike, "*batch classes"],
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Float[Array, "*batch classes"]:
    """The Hessian of cross-entropy times a tangent, without the matrix.

    H t = s' p * (u - <p, u>) + g s'' t with u = s' t; without a soft cap
    p * (t - <p, t>). Source: Bishop, PRML (2006), section 4.3.4, and the chain rule.

    >>> tangent = jnp.array([[1.0, 0.0]])
    >>> print(cross_entropy_hvp(jnp.zeros((1, 2)), jnp.array([0]), tangent))
    [[ 0.25 -0.25]]
    """
    logits = checks.scores("logits", logits)
    s, slope, bend = _softcap(logits, softcap)
    t = _alike(logits, "tangent", tangent)
    diagonal = bend * _label_residual(s, labels, label_smoothing)
    return _capped_hvp(s, slope, diagonal, 1.0, t).astype(logits.dtype)


def cross_entropy_with_probs_gradient(
    logits: Float[ArrayLike, "*batch classes"],
    probs: Float[ArrayLike, "*batch classes"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*batch classes"]:
    """The gradient of -sum_i q_i log softmax(s)_i: (sum(q) p - q) s'(z).

    The loss is sum(q) lse(s) - <q, s>; q need not sum to 1.
    Sources: d2l.ai, "Softmax and Cross-Entropy Loss", with y a distribution; Bishop,
    PRML (2006), section 4.3.4.

    >>> probs = jnp.array([[0.25, 0.75]])
    >>> print(cross_entropy_with_probs_gradient(jnp.zeros((1, 2)), probs))
    [[ 0.25 -0.25]]
    """
    logits = checks.scores("logits", logits)
    q = _alike(logits, "probs", probs)
    s, slope, _ = _softcap(logits, softcap)
    return (slope * _probs_residual(s, q)).astype(logits.dtype)


def cross_entropy_with_probs_hessian(
    logits: Float[ArrayLike, "*batch classes"],
    probs: Float[ArrayLike, "*batch classes"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*batch classes classes"]:
    """The Hessian: sum(q) diag(s') (diag(p) - p p^T) diag(s') + diag(g s'').

    Differentiate (sum(q) p - q) s'(z) once more; g = sum(q) p - q.
    Source: Bishop, PRML (2006), section 4.3.4, and the chain rule.

    >>> probs = jnp.array([[0.25, 0.75]])
    >>> print(cross_entropy_with_probs_hessian(jnp.zeros((1, 2)), probs))
    [[[ 0.25 -0.25]
      [-0.25  0.25]]]
    """
    logits = checks.scores("logits", logits)
    s, slope, bend = _softcap(logits, softcap)
    q = _alike(logits, "probs", probs)
    diagonal = bend * _probs_residual(s, q)
    mass = jnp.sum(q, axis=-1, keepdims=True)
    return _capped_hessian(s, slope, diagonal, mass[..., None]).astype(logits.dtype)


def cross_entropy_with_probs_hvp(
    logits: Float[ArrayLike, "*batch classes"],
    probs: Float[ArrayLike, "*batch classes"],
    tangent: Float[ArrayLike, "*batch classes"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*batch classes"]:
    """The Hessian times a tangent: sum(q) s' p * (u - <p, u>) + g s'' t, u = s' t.

    Source: as for cross_entropy_with_probs_hessian, without the matrix.

    >>> probs, tangent = jnp.array([[0.25, 0.75]]), jnp.array([[1.0, 0.0]])
    >>> print(cross_entropy_with_probs_hvp(jnp.zeros((1, 2)), probs, tangent))
    [[ 0.25 -0.25]]
    """
    logits = checks.scores("logits", logits)
    s, slope, bend = _softcap(logits, softcap)
    q, t = _alike(logits, "probs", probs), _alike(logits, "tangent", tangent)
    diagonal = bend * _probs_residual(s, q)
    mass = jnp.sum(q, axis=-1, keepdims=True)
    return _capped_hvp(s, slope, diagonal, mass, t).astype(logits.dtype)


def temperature_gradient(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    temperature: Real[ArrayLike, ""] | float,
) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch"]]:
    """The gradients of cross-entropy(z / T, y) in the logits and in the temperature.

    With g = softmax(z / T) - onehot(y), the chain rule through z / T gives
    d loss / d z = g / T and d loss / d T = -<g, z> / T^2. As g sums to 0, z may be
    replaced by z - z_y, which leaves no digits to lose at the label.
    Source: the loss is Guo et al. (arXiv:1706.04599), "temperature scaling".

    Returns:
        The gradient of each row in its logits, and in the one temperature.

    >>> rows, labels = jnp.array([[1.0, 3.0]]), jnp.array([0])
    >>> dz, dt = temperature_gradient(rows, labels, jnp.array(2.0))
    >>> print(jnp.round(dz, 4), jnp.round(dt, 4))
    [[-0.3655  0.3655]] [-0.3655]
    """
    logits = checks.scores("logits", logits)
    z, (t, kind) = checks.wide(logits), _temperature(temperature, logits)
    residual = _label_residual(z / t, labels, 0.0)
    slope = -jnp.sum(residual * _over_label(z, labels), axis=-1) / t**2
    return (residual / t).astype(logits.dtype), slope.astype(kind)


def temperature_curvature(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    temperature: Real[ArrayLike, ""] | float,
) -> Float[Array, "*batch"]:
    """The second derivative of cross-entropy(z / T, y) in the temperature T.

    In the inverse temperature b = 1 / T the loss L(b) = lse(b z) - b z_y has
    L' = <p, z> - z_y and L'' = <p, z^2> - <p, z>^2, the variance of the logits under
    the model: convex. With db / dT = -b^2 that becomes 2 b^3 L' + b^4 L''.
    Source: the exponential-family identity, Bishop, PRML (2006), section 2.4.

    >>> rows, labels = jnp.array([[1.0, 3.0]]), jnp.array([0])
    >>> print(jnp.round(temperature_curvature(rows, labels, jnp.array(2.0)), 4))
    [0.4147]
    """
    logits = checks.scores("logits", logits)
    z, (t, kind) = checks.wide(logits), _temperature(temperature, logits)
    p, ahead = _softmax(z / t), _over_label(z, labels)
    mean = _mean(p, ahead)
    variance = jnp.sum(p * (ahead - mean) ** 2, axis=-1)
    return (2 * mean[..., 0] / t**3 + variance / t**4).astype(kind)


def _hits(z: Array, labels: ArrayLike) -> Array:
    ids = checks.class_ids("labels", labels, z.shape[:-1])
    return ids[..., None] == jnp.arange(z.shape[-1], dtype=ids.dtype)


def _label_residual(s: Array, labels: ArrayLike, smoothing: float) -> Array:
    """p - q, with p_y - 1 as minus the sum of the others; NaN where there is no y."""
    smoothing = options.fraction("label_smoothing", smoothing)
    p, hit = _softmax(s), _hits(s, labels)
    others = jnp.sum(jnp.where(hit, 0, p), axis=-1, keepdims=True)
    spread = smoothing / s.shape[-1]
    residual = jnp.where(hit, smoothing - others, p) - spread
    return jnp.where(jnp.any(hit, axis=-1, keepdims=True), residual, jnp.nan)


def _probs_residual(s: Array, q: Array) -> Array:
    """sum(q) p - q: the loss is -<q, log p>."""
    return -log_softmax_vjp(s, q)


def _over_label(z: Array, labels: ArrayLike) -> Array:
    """z - z_y, exactly 0 at the label and at classes ruled out; NaN where is no y."""
    hit = _hits(z, labels)
    at_label = jnp.sum(jnp.where(hit, z, 0), axis=-1, keepdims=True)
    # p = 0 times infinity would be NaN.
    ahead = jnp.where(z == -jnp.inf, 0, z - at_label)
    return jnp.where(jnp.any(hit, axis=-1, keepdims=True), ahead, jnp.nan)


def _temperature(temperature: ArrayLike, logits: Array) -> tuple[Array, jnp.dtype]:
    """T in the type of sums, and the type of a derivative in it.

    That is T's own, if it has one and that is floating, or else the logits'.
    """
    t = checks.scalar("temperature", temperature)
    own = hasattr(temperature, "dtype") and jnp.issubdtype(t.dtype, jnp.floating)
    kind = t.dtype if own else logits.dtype
    return t.astype(checks.accumulation_dtype(logits)), kind


def _softcap(logits: Array, softcap: float | None) -> tuple[Array, Array, Array]:
    """s = c tanh(z / c), s' = 1 / cosh(z / c)^2 and s'' = -2 s s' / c^2."""
    z, cap = checks.wide(logits), options.cap("softcap", softcap)
    if cap is None:
        return z, jnp.ones_like(z), jnp.zeros_like(z)
    # 1 - tanh^2 would cancel where the cap bites.
    s, slope = cap * jnp.tanh(z / cap), jnp.cosh(z / cap) ** -2
    return s, slope, -2 * s * slope / cap**2


def _capped_hessian(s: Array, slope: Array, diagonal: Array, mass: Array | float):
    around = slope[..., :, None] * softmax_jacobian(s) * slope[..., None, :]
    return mass * around + diagonal[..., :, None] * jnp.eye(s.shape[-1], dtype=s.dtype)


def _capped_hvp(
    s: Array, slope: Array, diagonal: Array, mass: Array | float, tangent: Array
) -> Array:
    p, u = _softmax(s), slope * tangent
    return mass * slope * p * _from_mean(p, u) + diagonal * tangent
