"""Softmax regression: logits that are affine in the features."""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, Integer, Key, Real

from jax_softmax import _checks as checks
from jax_softmax import _options as options
from jax_softmax._losses import cross_entropy, mean_loss

MANY_CLASSES = 32  # from which on a matmul as it stands is the faster one


class SoftmaxRegression(NamedTuple):
    """A pytree of weights and biases; p(y | x) = softmax(x w + b).

    >>> model = SoftmaxRegression.init(jax.random.key(0), features=784, classes=10)
    >>> images, labels = jnp.zeros((2, 784)), jnp.array([3, 8])
    >>> model.logits(images).shape, model.predict(images).shape
    ((2, 10), (2,))
    >>> gradient = jax.grad(SoftmaxRegression.objective)(model, images, labels)
    >>> gradient.w.shape, round(float(gradient.b[3]), 2)
    ((784, 10), -0.4)
    """

    w: Float[Array, "features classes"]
    b: Float[Array, " classes"]

    @classmethod
    def init(
        cls,
        key: Key[Array, ""],
        features: int,
        classes: int,
        *,
        scale: Real[ArrayLike, ""] | float = 0.01,
        dtype: DTypeLike = jnp.float32,
    ) -> "SoftmaxRegression":
        """w ~ N(0, scale^2) and b = 0, as in the book.

        Raises:
            TypeError: key is no key, features or classes are no integers, scale is no
                number, or dtype is not floating point.
            ValueError: there are several keys, or no features or classes.
        """
        options.one_key("key", key)
        features = options.at_least(1, "features", features)
        classes = options.at_least(1, "classes", classes)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"dtype must be floating point, such as jnp.float32, got {dtype}"
            )
        w = jax.random.normal(key, (features, classes), dtype)
        w = checks.scalar("scale", scale).astype(w.dtype) * w
        return cls(w, jnp.zeros(classes, dtype))

    def logits(
        self, x: Float[ArrayLike, "*batch features"]
    ) -> Float[Array, "*batch classes"]:
        """x w + b.

        Raises:
            ValueError: the last axis of x is not as long as w has features, b not as w
                has classes, or w is no matrix.
        """
        x = checks.array_of("x", x)
        w, b = parameters(self)
        features, classes = w.shape
        if x.ndim == 0 or x.shape[-1] != features:
            raise ValueError(f"x must have {features} features, got shape {x.shape}")
        b = jnp.expand_dims(b, range(x.ndim - 1))
        if classes >= MANY_CLASSES:
            return jnp.matmul(x, w) + b
        # XLA for CPU is three times as fast at g^T x as at x^T g, w's gradient: the
        # barrier keeps it from turning the one into the other.
        sideways = lax.optimization_barrier(w.T)
        return lax.dot_general(x, sideways, (((x.ndim - 1,), (1,)), ((), ()))) + b

    def predict(self, x: Float[ArrayLike, "*batch features"]) -> Int[Array, "*batch"]:
        """The most likely class of each row; the first of equals."""
        return self.logits(x).argmax(-1)

    def objective(
        self,
        x: Float[ArrayLike, "*batch features"],
        labels: Integer[ArrayLike, "*batch"],
        *,
        where: Bool[ArrayLike, "*batch"] | None = None,
        l2: Real[ArrayLike, ""] | float = 0.0,
        label_smoothing: float = 0.0,
    ) -> Float[Array, ""]:
        """What training minimises.

            mean of cross_entropy(x w + b, labels) + l2 / 2 * sum(w^2)

        Args:
            x: features.
            labels: in [0, classes). Any other id makes the objective NaN.
            where: rows to keep; the mean is over them. A dropped row counts for
                nothing, whatever it holds.
            l2: the penalty on w, one number. The biases are free.
            label_smoothing: as in cross_entropy.
        """
        if where is not None:
            x = checks.array_of("x", x)
            where = checks.row_mask("where", where, x.shape[:-1])
            x = jnp.where(where[..., None], x, 0)
        losses = cross_entropy(
            self.logits(x), labels, where=where, label_smoothing=label_smoothing
        )
        loss = mean_loss(losses, where)
        if isinstance(l2, numbers.Real) and l2 == 0:
            return loss
        return loss + checks.scalar("l2", l2) / 2 * jnp.sum(checks.wide(self.w) ** 2)


def parameters(model: SoftmaxRegression) -> tuple[Array, Array]:
    """w and b of one model."""
    w, b = checks.floating("w", model.w), checks.floating("b", model.b)
    if w.ndim != 2:
        raise ValueError(
            f"w must be [features, classes], got shape {w.shape}: of several models "
            "take one, as jax.tree.map(lambda leaf: leaf[0, 0], models) of a sweep's"
        )
    checks.same_shape("b", b, w.shape[1:])
    return w, b
