"""Derivatives of softmax regression in its weights, as on paper.

    logits z_i = x_i w + b,   objective = (1 / n) sum_i nll_i + (l2 / 2) ||w||^2

over the n rows that `where` keeps; the bias is not penalised. With the residual
r_i = (softmax(z_i) - onehot(y_i)) / n and d z_i = x_i dw + db,

    d objective = sum_i <r_i, d z_i> + l2 <w, dw>
    so   d / dw = x^T r + l2 w,   d / db = sum_i r_i

The logits are linear in (w, b): the only curvature is that of the loss, the Hessian is
the Gauss-Newton matrix and the Fisher matrix, and the labels are not in it.
Pairs are (w, b), shaped like the parameters and of their types. Everything is computed
in the type of w, float32 or wider, and products at the highest precision that the
device has.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Num, Real

from jax_softmax import _checks as checks
from jax_softmax._closed_form import (
    _from_mean,
    _mean,
    _softmax,
    softmax_jacobian,
)
from jax_softmax._closed_form_losses import _label_residual

Pair = tuple[Float[Array, "features classes"], Float[Array, " classes"]]


def regression_gradient(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    labels: Integer[ArrayLike, " batch"],
    *,
    l2: float | Real[ArrayLike, ""] = 0.0,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> Pair:
    """The gradient of the objective in w and b: (x^T r + l2 w, sum_i r_i).

    Source: Bishop, PRML (2006), eq. 4.109, with the mean and the penalty added.

    >>> x, labels = jnp.array([[1.0, 2.0]]), jnp.array([0])
    >>> dw, db = regression_gradient(jnp.zeros((2, 2)), jnp.zeros(2), x, labels)
    >>> print(dw, db)
    [[-0.5  0.5]
     [-1.   1. ]] [-0.5  0.5]
    """
    w, b, x, share = _problem(w, b, x, where)
    residual = share * _residual(w, b, x, labels, share)
    return _pair((w, b), x, residual, _l2(l2, x) * w.astype(x.dtype))


def regression_hvp(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    tangent: Pair,
    *,
    l2: float | Real[ArrayLike, ""] = 0.0,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> Pair:
    """The Hessian of the objective times (tw, tb), without the Hessian.

    Move the parameters by the tangent: logits move by u_i = x_i tw + tb, residuals by
    h_i = p_i * (u_i - <p_i, u_i>) / n, the gradient by (x^T h + l2 tw, sum_i h_i).
    Sources: Bishop, PRML (2006), section 4.3.4; the trick, Pearlmutter (1994).

    >>> x, tangent = jnp.array([[1.0, 2.0]]), (jnp.zeros((2, 2)), jnp.array([1.0, 0.0]))
    >>> print(*regression_hvp(jnp.zeros((2, 2)), jnp.zeros(2), x, tangent))
    [[ 0.25 -0.25]
     [ 0.5  -0.5 ]] [ 0.25 -0.25]
    """
    w, b, x, share = _problem(w, b, x, where)
    tw, tb = _tangent(w, b, tangent)
    p, moved = _softmax(_logits(w, b, x)), _logits(tw, tb, x)
    bent = share * p * _from_mean(p, moved)
    return _pair((w, b), x, bent, _l2(l2, x) * tw.astype(x.dtype))


def regression_gauss_newton_vp(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    tangent: Pair,
    *,
    l2: float | Real[ArrayLike, ""] = 0.0,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> Pair:
    """The Gauss-Newton matrix J^T H_z J + l2 I (on w) times (tw, tb).

    J is the Jacobian of the logits. H_z = diag(p) - p p^T is applied as S S^T with
    S = diag(sqrt p) - p sqrt(p)^T, so that <t, G t> = ||S^T J t||^2 + ... is never
    negative. Here G equals the Hessian, as the logits are linear in the parameters.
    Source: Schraudolph (2002), Fast curvature matrix-vector products.

    >>> x, tangent = jnp.array([[1.0, 2.0]]), (jnp.zeros((2, 2)), jnp.array([1.0, 0.0]))
    >>> product = regression_gauss_newton_vp(
    ...     jnp.zeros((2, 2)), jnp.zeros(2), x, tangent
    ... )
    >>> print(jnp.round(product[1], 3))
    [ 0.25 -0.25]
    """
    w, b, x, share = _problem(w, b, x, where)
    tw, tb = _tangent(w, b, tangent)
    p, moved = _softmax(_logits(w, b, x)), _logits(tw, tb, x)
    root = jnp.sqrt(p)
    half = root * _from_mean(p, moved)
    bent = share * (root * half - p * _mean(root, half))
    return _pair((w, b), x, bent, _l2(l2, x) * tw.astype(x.dtype))


def regression_fisher_vp(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    tangent: Pair,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> Pair:
    """The Fisher matrix (1 / n) sum_i E_y[g_iy g_iy^T] times (tw, tb).

    g_iy is the gradient of -log p_iy and y ~ softmax(z_i). In the logits that is
    E_y[(p - e_y)(p - e_y)^T] = E_y[e_y e_y^T] - p p^T = diag(p) - p p^T, the Hessian of
    the loss: this is the Hessian of the objective without its penalty.
    Source: Martens (arXiv:1412.1193).

    >>> x, tangent = jnp.array([[1.0, 2.0]]), (jnp.zeros((2, 2)), jnp.array([1.0, 0.0]))
    >>> print(regression_fisher_vp(jnp.zeros((2, 2)), jnp.zeros(2), x, tangent)[1])
    [ 0.25 -0.25]
    """
    return regression_hvp(w, b, x, tangent, where=where)


def regression_empirical_fisher_vp(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    labels: Integer[ArrayLike, " batch"],
    tangent: Pair,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> Pair:
    """The matrix (1 / n) sum_i g_i g_i^T times (tw, tb), g_i the gradient of nll_i.

    g_i = (x_i r_i^T, r_i), so <g_i, t> = <r_i, u_i> with u_i = x_i tw + tb, and no g_i
    is ever formed. It is not the Fisher matrix: the labels are the observed ones.
    Source: Kunstner, Balles & Hennig (arXiv:1905.12558).

    >>> x, tangent = jnp.array([[1.0, 2.0]]), (jnp.zeros((2, 2)), jnp.array([1.0, 0.0]))
    >>> print(regression_empirical_fisher_vp(
    ...     jnp.zeros((2, 2)), jnp.zeros(2), x, jnp.array([0]), tangent)[1])
    [ 0.25 -0.25]
    """
    w, b, x, share = _problem(w, b, x, where)
    residual = _residual(w, b, x, labels, share)
    weighted = share * residual * _mean(residual, _logits(*_tangent(w, b, tangent), x))
    return _pair((w, b), x, weighted, 0.0)


def regression_per_example_gradients(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    labels: Integer[ArrayLike, " batch"],
) -> tuple[Float[Array, "batch features classes"], Float[Array, "batch classes"]]:
    """The gradient of each nll_i in w and b: (x_i r_i^T, r_i), r_i = p_i - onehot(y_i).

    No mean and no penalty: these are the terms that the objective averages.
    Source: Bishop, PRML (2006), the summand of eq. 4.109.

    >>> x, labels = jnp.array([[1.0, 2.0]]), jnp.array([0])
    >>> dw, db = regression_per_example_gradients(
    ...     jnp.zeros((2, 2)), jnp.zeros(2), x, labels)
    >>> print(dw.shape, db)
    (1, 2, 2) [[-0.5  0.5]]
    """
    w, b, x, share = _problem(w, b, x, None)
    residual = _residual(w, b, x, labels, share)
    dw = x[:, :, None] * residual[:, None, :]
    return dw.astype(w.dtype), residual.astype(b.dtype)


def regression_per_example_gradient_norms(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    labels: Integer[ArrayLike, " batch"],
) -> Float[Array, " batch"]:
    """The length of each example's gradient in (w, b) together, without forming it.

    ||x_i r_i^T||^2 + ||r_i||^2 = (||x_i||^2 + 1) ||r_i||^2, as the norm of an outer
    product is the product of the norms. Source: Goodfellow (arXiv:1510.01799).

    >>> x, labels = jnp.array([[1.0, 1.0]]), jnp.array([0])
    >>> norms = regression_per_example_gradient_norms(
    ...     jnp.zeros((2, 2)), jnp.zeros(2), x, labels)
    >>> print(jnp.round(norms, 4))
    [1.2247]
    """
    w, b, x, share = _problem(w, b, x, None)
    residual = _residual(w, b, x, labels, share)
    inputs = jnp.sum(x**2, axis=-1) + 1
    return jnp.sqrt(inputs) * jnp.linalg.norm(residual, axis=-1)


def regression_hessian(
    w: Float[ArrayLike, "features classes"],
    b: Float[ArrayLike, " classes"],
    x: Num[ArrayLike, "batch features"],
    *,
    l2: float | Real[ArrayLike, ""] = 0.0,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> Float[Array, "parameters parameters"]:
    """The exact Hessian, for small problems: the mean of (x_i x_i^T) kron H_i.

    x_i carries a last 1 for the bias, H_i = diag(p_i) - p_i p_i^T, and l2 is added on
    the diagonal of w. Parameters are in the order of `ravel_pytree((w, b))`: the rows
    of w, then b. Memory is ((features + 1) classes)^2.
    Source: Boehning (1992), Multinomial logistic regression algorithm.

    >>> x = jnp.array([[2.0]])
    >>> print(regression_hessian(jnp.zeros((1, 2)), jnp.zeros(2), x))
    [[ 1.   -1.    0.5  -0.5 ]
     [-1.    1.   -0.5   0.5 ]
     [ 0.5  -0.5   0.25 -0.25]
     [-0.5   0.5  -0.25  0.25]]
    """
    w, b, x, share = _problem(w, b, x, where)
    features, classes = w.shape
    each = share[..., None] * softmax_jacobian(_logits(w, b, x))
    extended = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
    hessian = jnp.einsum(
        "ni,nj,nkl->ikjl", extended, extended, each, precision="highest"
    ).reshape((features + 1) * classes, (features + 1) * classes)
    penalised = jnp.arange(hessian.shape[0]) < features * classes
    return hessian + _l2(l2, x) * jnp.diag(penalised.astype(x.dtype))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _logits(w: Array, b: Array, x: Array) -> Array:
    return _matmul(x, w.astype(x.dtype)) + b.astype(x.dtype)


def _pair(like: Pair, x: Array, rows: Array, penalty: Array | float) -> Pair:
    """What cotangents of the logits, a row each, amount to in w and b."""
    dw = _matmul(x.T, rows) + jnp.asarray(penalty, x.dtype)
    return dw.astype(like[0].dtype), jnp.sum(rows, axis=0).astype(like[1].dtype)


def _residual(w: Array, b: Array, x: Array, labels: ArrayLike, share: Array) -> Array:
    """p_i - onehot(y_i), and 0 in a dropped row, whatever its label."""
    residual = _label_residual(_logits(w, b, x), labels, 0.0)
    return jnp.where(share > 0, residual, 0)


def _problem(
    w: ArrayLike, b: ArrayLike, x: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """w, b, x without the content of dropped rows, and each row's share of the mean."""
    w, b, x = checks.floating("w", w), checks.floating("b", b), checks.array_of("x", x)
    if w.ndim != 2 or w.shape[1] == 0:
        raise ValueError(f"w must have shape (features, classes), got {w.shape}")
    checks.same_shape("b", b, w.shape[1:])
    if x.ndim != 2 or x.shape[1] != len(w):
        raise ValueError(f"x must have shape (batch, {len(w)}), got {x.shape}")
    x = x.astype(checks.accumulation_dtype(w))
    if where is None:
        return w, b, x, jnp.full((len(x), 1), 1 / max(len(x), 1), x.dtype)
    keep = checks.row_mask("where", where, x.shape[:1])[:, None]
    kept = keep.astype(x.dtype)
    return w, b, jnp.where(keep, x, 0), kept / jnp.maximum(jnp.sum(kept), 1)


def _tangent(w: Array, b: Array, tangent: Pair) -> Pair:
    tw, tb = (checks.floating("tangent", array) for array in tangent)
    checks.same_shape("tangent of w", tw, w.shape)
    checks.same_shape("tangent of b", tb, b.shape)
    return tw, tb


def _l2(l2: ArrayLike, x: Array) -> Array:
    return checks.scalar("l2", l2).astype(x.dtype)
