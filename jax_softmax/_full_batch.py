"""Softmax regression on all rows at once: passes over x, and where the bowl is steep.

Parameters are one matrix v, [features + 1, classes]: the weights w and, last, the
biases b. Whatever reads x is one of two passes, tile by tile so that rows of any type
become features in the cache and are never all there in floating point:

    logits    z = x w + b          gives back one row per example
    pullback  (x^T r, sum r)       gives back a gradient for v

The rest, line searches too, works on [rows, classes]: logits are affine in v.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Bool, Float, Int

TILE_ELEMENTS = 2**19  # features of a tile, which stay in a CPU's cache
BLOCK_ELEMENTS = 2**25  # a preconditioner of blocks is at most this large
SAMPLE_ROWS = 4096  # show the curvature, at least
SAMPLE_ROWS_PER_PARAMETER = 16

Parameters = Float[Array, "parameters classes"]
RowLogits = Float[Array, "rows classes"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "labels", "share", "l2", "intercept"],
    meta_fields=["transform"],
)
@dataclass(frozen=True)
class FullBatch:
    """sum_i share_i nll_i + l2 / 2 * sum(w^2), the shares adding up to 1."""

    x: Array
    labels: Int[Array, " rows"]
    share: Float[Array, " rows"]
    l2: Float[Array, ""]
    intercept: Bool[Array, ""]
    transform: Callable[[Array], Array]

    def logits(self, v: Parameters) -> RowLogits:
        """x w + b: half a pass."""

        def tile(index: Array, z: Array) -> Array:
            start, features = self._tile(index, v.dtype)
            return lax.dynamic_update_slice_in_dim(z, _affine(features, v), start, 0)

        empty = jnp.zeros((len(self.labels), v.shape[1]), v.dtype)
        return lax.fori_loop(0, self._tiles, tile, empty)

    def pullback(self, r: RowLogits) -> Parameters:
        """(x^T r, sum r), and 0 for biases that are not to move: half a pass."""

        def tile(index: Array, total: Array) -> Array:
            start, features = self._tile(index, r.dtype)
            return total + _transposed(features, self._fresh(r, index, start))

        total = lax.fori_loop(0, self._tiles, tile, self._zeros(r))
        return self._movable(total)

    def hessian_product(self, probs: RowLogits, q: Parameters) -> Parameters:
        """regression_hvp with weights, at known probabilities: one pass.

        u = x q,  h_i = share_i p_i (u_i - <p_i, u_i>),  H q = x^T h + l2 q on w.
        """

        def tile(index: Array, total: Array) -> Array:
            start, features = self._tile(index, q.dtype)
            p = lax.dynamic_slice_in_dim(probs, start, self._rows)
            u = _affine(features, q)
            bent = p * (u - jnp.sum(p * u, -1, keepdims=True))
            return total + _transposed(
                features, self._fresh(self.share[:, None], index, start) * bent
            )

        total = lax.fori_loop(0, self._tiles, tile, self._zeros(q))
        return self._movable(total) + self.ridge(q)

    def ridge(self, v: Parameters) -> Parameters:
        """The gradient of the penalty: l2 w, and 0 for the biases."""
        return (self.l2 * v).at[-1].set(0)

    def centred(self, v: Parameters) -> Parameters:
        """The same predictions; biases that are not to move stay."""
        return jnp.where(self.intercept, centred(v), centred(v).at[-1].set(v[-1]))

    def _movable(self, gradient: Parameters) -> Parameters:
        return gradient.at[-1].multiply(self.intercept.astype(gradient.dtype))

    def value_and_gradient(
        self, v: Parameters, z: RowLogits
    ) -> tuple[Float[Array, ""], Parameters]:
        """The objective and its gradient at v with its logits z: half a pass."""
        loss, residual, _ = outcome(z, self.labels)
        ridge = self.ridge(v)
        gradient = self.pullback(self.share[:, None] * residual) + ridge
        return self.share @ loss + jnp.vdot(v, ridge) / 2, gradient

    def slopes(
        self, v: Parameters, z: RowLogits, dv: Parameters, dz: RowLogits, t: Array
    ) -> tuple[Array, Array, Array]:
        """The objective at v + t dv with its first and second derivative in t."""
        loss, residual, probs = outcome(z + t * dz, self.labels)
        w, dw = v[:-1] + t * dv[:-1], dv[:-1]
        mean = jnp.sum(probs * dz, -1)
        spread = jnp.sum(probs * (dz - mean[:, None]) ** 2, -1)
        return (
            self.share @ loss + self.l2 / 2 * jnp.vdot(w, w),
            self.share @ jnp.sum(residual * dz, -1) + self.l2 * jnp.vdot(w, dw),
            self.share @ spread + self.l2 * jnp.vdot(dw, dw),
        )

    def gradient_rounding(self, v: Parameters, z: RowLogits) -> Float[Array, ""]:
        """About how far rounding can move the gradient in w: one pass.

        One rounding for each product's terms and for the logits behind the residuals:
        eps * || |x|^T share (|r| + p (1 - p) size) ||, size_i = |x_i| |w| + |b|.
        """

        def absolute(rows: Array) -> Array:
            return jnp.abs(self._features(rows, v.dtype))

        _, residual, probs = outcome(z, self.labels)
        size = replace(self, transform=absolute)
        largest = size.logits(jnp.abs(v)).max(-1, keepdims=True)
        blur = jnp.abs(residual) + probs * (1 - probs) * largest
        reach = size.pullback(self.share[:, None] * blur) + self.ridge(jnp.abs(v))
        return jnp.finfo(v.dtype).eps * jnp.linalg.norm(reach[:-1])

    def sample(self, parameters: int, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Evenly spaced rows with a last 1 for the bias, and their shares."""
        rows = max(SAMPLE_ROWS, SAMPLE_ROWS_PER_PARAMETER * parameters)
        step = max(1, len(self.labels) // rows)
        features = self._features(self.x[::step], dtype)
        ones = jnp.broadcast_to(self.intercept.astype(dtype), (len(features), 1))
        share = self.share[::step]
        total = jnp.sum(share)
        share = share / jnp.where(total > 0, total, 1)
        return jnp.concatenate([features, ones], axis=1), share

    def preconditioner(
        self, rows: tuple[Array, Array], v: Parameters, shared: Array
    ) -> Array:
        """The inverse Cholesky factor of each class's own block of the Hessian at v.

        Block k is x^T diag(share p_k (1 - p_k)) x + l2, over a sample of the rows. Too
        many features for blocks: only the Hessian's diagonal. shared: their mean as
        the block of all, which at the start says as much.
        """
        features, share = rows
        probs = jax.nn.softmax(_matmul(features, v))
        bend = share[:, None] * probs * (1 - probs)
        fixed = (~self.intercept).astype(v.dtype)
        penalty = jnp.full(len(v), self.l2).at[-1].set(fixed)
        tiny, eps = jnp.finfo(v.dtype).tiny, jnp.finfo(v.dtype).eps
        if not blockwise(v):
            diagonal = _matmul((features**2).T, bend) + penalty[:, None]
            return jnp.maximum(diagonal, eps * diagonal.max() + tiny)
        eye = jnp.eye(len(v), dtype=v.dtype)

        def inverse_factor(index: Array, factors: Array) -> Array:
            weights = jnp.where(shared, bend.mean(1), bend[:, index])
            block = _matmul((weights[:, None] * features).T, features)
            diagonal = jnp.diag(block) + penalty
            floor = eps * len(v) * diagonal.max() + tiny
            factor = jnp.linalg.cholesky(block + jnp.diag(penalty + floor))
            inverse = solve_triangular(factor, eye, lower=True)
            plain = jnp.diag(1 / jnp.sqrt(diagonal + floor))
            inverse = jnp.where(jnp.isfinite(inverse).all(), inverse, plain)
            return factors.at[index].set(inverse)

        classes = v.shape[1]
        factors = jnp.zeros((classes, *eye.shape), v.dtype)
        count = jnp.where(shared, 1, classes)
        factors = lax.fori_loop(0, count, inverse_factor, factors)
        return jnp.where(shared, factors[:1], factors)

    @property
    def _rows(self) -> int:
        """Rows of a tile: all of them where no cache has to be kept warm."""
        rows = len(self.labels)
        if jax.default_backend() != "cpu":
            return rows
        return min(rows, max(64, TILE_ELEMENTS * rows // self.x.size))

    @property
    def _tiles(self) -> int:
        return -(-len(self.labels) // self._rows)

    def _tile(self, index: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """A tile's first row and its features; the last may overlap the one before."""
        start = jnp.minimum(index * self._rows, len(self.labels) - self._rows)
        rows = lax.dynamic_slice_in_dim(self.x, start, self._rows)
        return start, self._features(rows, dtype)

    def _fresh(self, values: Array, index: Array, start: Array) -> Array:
        """A tile of values, 0 where the tile before has been."""
        rows = lax.dynamic_slice_in_dim(values, start, self._rows)
        is_new = start + jnp.arange(self._rows) >= index * self._rows
        return jnp.where(is_new[:, None], rows, 0)

    def _zeros(self, like: Array) -> Array:
        rows = jax.ShapeDtypeStruct((1, *self.x.shape[1:]), self.x.dtype)
        features = jax.eval_shape(self.transform, rows).shape[1]
        return jnp.zeros((features + 1, like.shape[1]), like.dtype)

    def _features(self, rows: Array, dtype: jnp.dtype) -> Array:
        return self.transform(rows).astype(dtype)


def precondition(preconditioner: Array, r: Parameters) -> Parameters:
    """What a Newton step would be if no class knew of another, centred.

    A step that is the same for all classes changes no prediction: only l2 would bring
    the parameters back from it, and slowly.
    """
    if preconditioner.ndim == 2:
        return centred(r / preconditioner)
    half = jnp.einsum("kij,jk->ki", preconditioner, r, precision="highest")
    step = jnp.einsum("kij,ki->jk", preconditioner, half, precision="highest")
    return centred(step)


def centred(v: Parameters) -> Parameters:
    """The parameters of the same predictions that add up to 0 over the classes."""
    return v - v.mean(1, keepdims=True)


def blockwise(v: Parameters) -> bool:
    """Whether each class affords its block of the Hessian."""
    return len(v) * v.size <= BLOCK_ELEMENTS


def no_preconditioner(v: Parameters) -> Array:
    """Room for one."""
    shape = (v.shape[1], len(v), len(v)) if blockwise(v) else v.shape
    return jnp.zeros(shape, v.dtype)


class Outcome(NamedTuple):
    """What each row says of its logits: nll_and_grad and softmax at once.

    Without the last ULP, and so light enough to be compiled in every loop of a solver;
    but residuals of rows that are certain keep their relative accuracy.
    """

    loss: Float[Array, " rows"]
    residual: RowLogits  # probs - onehot(labels)
    probs: RowLogits


def outcome(z: RowLogits, labels: Int[Array, " rows"]) -> Outcome:
    """The outcome of logits; labels that are no class make NaN."""
    at_the_label = jnp.arange(z.shape[1], dtype=labels.dtype)[None] == labels[:, None]
    top = z.max(1, keepdims=True)
    e = jnp.exp(z - top)
    others = jnp.sum(jnp.where(at_the_label, 0, e), 1, keepdims=True)
    label = jnp.sum(jnp.where(at_the_label, e, 0), 1, keepdims=True)
    gap = jnp.sum(jnp.where(at_the_label, top - z, 0), 1, keepdims=True)
    known = at_the_label.any(1, keepdims=True)
    total = jnp.where(known, others + label, jnp.nan)
    loss = gap + jnp.where(label == 1, jnp.log1p(others), jnp.log(total))
    probs = e / total
    residual = jnp.where(at_the_label, -others / total, probs)
    return Outcome(jnp.where(known, loss, jnp.nan)[:, 0], residual, probs)


def _affine(features: Array, v: Parameters) -> Array:
    return _matmul(features, v[:-1]) + v[-1:]


def _transposed(features: Array, r: Array) -> Parameters:
    # XLA for CPU is twice as fast with the few classes as rows of the result.
    return jnp.concatenate([_matmul(r.T, features).T, jnp.sum(r, 0, keepdims=True)])


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
