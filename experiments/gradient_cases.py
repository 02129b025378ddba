"""The functions whose gradients are compared, each written down by every road.

The judge is the road that float64 can be trusted on: it only knows the odds against a
class, sum_{j != i} exp(z_j - z_i), whose derivatives are sums of terms of one sign. The
p_y - 1 of other roads has lost its last digit at a margin of 17 in float32 and of 37
in float64.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jax_softmax
from experiments.gradient_roads import Case, Function
from jax_softmax import SoftmaxRegression
from jax_softmax.closed_form import (
    cross_entropy_gradient,
    cross_entropy_with_probs_gradient,
    log_softmax_vjp,
    regression_gradient,
    softmax_jacobian,
)

SMOOTHING, CAP = 0.1, 30.0


def on_logits(z: Array, labels: Array) -> Iterator[Case]:
    """Softmax, log_softmax and cross-entropy in all its kinds, on logits z."""
    classes = z.shape[-1]
    onehot = jax.nn.one_hot(labels, classes, dtype=z.dtype)
    ones = jnp.ones(labels.shape, z.dtype)
    yield Case(
        "softmax at the label",
        (z,),
        (onehot,),
        textbook=textbook_softmax,
        stable=stable_softmax,
        ours=jax_softmax.softmax,
        optax=partial(jax.nn.softmax, axis=-1),
        torch=lambda torch, z: torch.softmax(z, -1),
        closed_form=lambda z, c: jnp.einsum("...i,...ij", c, softmax_jacobian(z)),
        judge=lambda z: 1 / (1 + odds_against(z)),
    )
    yield Case(
        "log_softmax at the label",
        (z,),
        (onehot,),
        textbook=lambda z: jnp.log(textbook_softmax(z)),
        stable=lambda z: z - stable_logsumexp(z)[..., None],
        ours=jax_softmax.log_softmax,
        optax=partial(jax.nn.log_softmax, axis=-1),
        torch=lambda torch, z: torch.log_softmax(z, -1),
        closed_form=log_softmax_vjp,
        judge=exact_log_softmax,
    )
    plain = cross_entropy_case(z, labels)
    yield plain
    targets = np.random.default_rng(0).dirichlet(np.ones(classes), labels.shape)
    yield Case(
        "cross_entropy, distributions *",
        (z, jnp.asarray(targets, z.dtype)),
        (ones,),
        textbook=lambda z, q: -(q * jnp.log(textbook_softmax(z))).sum(-1),
        stable=lambda z, q: (q * (stable_logsumexp(z)[..., None] - z)).sum(-1),
        ours=jax_softmax.cross_entropy_with_probs,
        optax=optax.softmax_cross_entropy,
        torch=torch_cross_entropy,
        closed_form=lambda z, q, c: weighted(
            c, cross_entropy_with_probs_gradient(z, q)
        ),
        judge=lambda z, q: -(q * exact_log_softmax(z)).sum(-1),
        floor=1.0,
    )

    def spread(labels: Array, dtype: Any) -> Array:
        hot = jax.nn.one_hot(labels, classes, dtype=dtype)
        return (1 - SMOOTHING) * hot + SMOOTHING / classes

    yield Case(
        f"cross_entropy, smoothing {SMOOTHING:g} *",
        (z, labels),
        (ones,),
        textbook=lambda z, y: (
            -(spread(y, z.dtype) * jnp.log(textbook_softmax(z))).sum(-1)
        ),
        stable=lambda z, y: (
            spread(y, z.dtype) * (stable_logsumexp(z)[..., None] - z)
        ).sum(-1),
        ours=partial(jax_softmax.cross_entropy, label_smoothing=SMOOTHING),
        optax=lambda z, y: optax.softmax_cross_entropy(
            z, optax.smooth_labels(jax.nn.one_hot(y, classes, dtype=z.dtype), SMOOTHING)
        ),
        torch=partial(torch_cross_entropy, label_smoothing=SMOOTHING),
        closed_form=lambda z, y, c: weighted(
            c, cross_entropy_gradient(z, y, label_smoothing=SMOOTHING)
        ),
        judge=lambda z, y: -(spread(y, z.dtype) * exact_log_softmax(z)).sum(-1),
        floor=1.0,
    )
    # Padding as it happens: every fourth row dropped, its label -100, its logits NaN.
    keep = (jnp.arange(labels.size) % 4 > 0).reshape(labels.shape)
    yield Case(
        "cross_entropy, masked NaN rows",
        (
            jnp.where(keep[..., None], z, jnp.nan),
            jnp.where(keep, labels, -100),
            keep,
        ),
        (ones,),
        textbook=lambda z, y, keep: plain.textbook(z, y) * keep,
        stable=lambda z, y, keep: jnp.where(keep, plain.stable(z, y), 0),
        ours=lambda z, y, keep: jax_softmax.cross_entropy(z, y, where=keep),
        optax=lambda z, y, keep: jnp.where(keep, plain.optax(z, y), 0),
        torch=lambda torch, z, y, keep: torch_cross_entropy(torch, z, y),
        closed_form=lambda z, y, keep, c: jnp.where(
            keep[..., None], plain.closed_form(z, y, c), 0
        ),
        judge=lambda z, y, keep: jnp.where(
            keep,
            plain.judge(jnp.where(keep[..., None], z, 0), jnp.where(keep, y, 0)),
            0,
        ),
    )
    yield Case(
        f"cross_entropy, soft cap {CAP:g}",
        plain.args,
        plain.told,
        textbook=under_cap(plain.textbook),
        stable=under_cap(plain.stable),
        ours=under_cap(plain.ours),
        optax=under_cap(plain.optax),
        torch=lambda torch, z, y: torch_cross_entropy(
            torch, CAP * torch.tanh(z / CAP), y
        ),
        closed_form=lambda z, y, c: weighted(
            c, cross_entropy_gradient(z, y, softcap=CAP)
        ),
        judge=under_cap(plain.judge),
    )


def cross_entropy_case(z: Array, labels: Array) -> Case:
    """Cross-entropy with integer labels, one loss per row."""
    return Case(
        "cross_entropy, labels",
        (z, labels),
        (jnp.ones(labels.shape, z.dtype),),
        textbook=lambda z, y: -jnp.log(at_label(textbook_softmax(z), y)),
        stable=lambda z, y: stable_logsumexp(z) - at_label(z, y),
        ours=jax_softmax.cross_entropy,
        optax=optax.softmax_cross_entropy_with_integer_labels,
        torch=torch_cross_entropy,
        closed_form=lambda z, y, c: weighted(c, cross_entropy_gradient(z, y)),
        judge=lambda z, y: jnp.log1p(at_label(odds_against(z), y)),
    )


class Head(NamedTuple):
    """What the fused linear loss is differentiated in."""

    x: Array
    w: Array
    b: Array


def on_weights(model: SoftmaxRegression, x: Array, labels: Array) -> Iterator[Case]:
    """The mean loss of a batch: of the model, and fused, in the features as well."""
    rows = cross_entropy_case(jnp.zeros((1, model.w.shape[1])), labels[:1])

    def mean(road: Function) -> Function:
        return lambda model, x, y: road(x @ model.w + model.b, y).mean()

    regression = Case(
        "regression objective *",
        (model, x, labels),
        (),
        textbook=mean(rows.textbook),
        stable=mean(rows.stable),
        ours=SoftmaxRegression.objective,
        optax=mean(rows.optax),
        torch=lambda torch, model, x, y: rows.torch(
            torch, x @ model.w + model.b, y
        ).mean(),
        closed_form=lambda model, x, y: SoftmaxRegression(
            *regression_gradient(model.w, model.b, x, y)
        ),
        judge=mean(rows.judge),
        floor=1.0,
    )
    yield regression

    def fused_gradient(head: Head, y: Array) -> Head:
        logits = jnp.matmul(head.x, head.w, precision="highest") + head.b
        residual = cross_entropy_gradient(logits, y) / len(y)
        dx = jnp.matmul(residual, head.w.T, precision="highest")
        return Head(dx, *regression_gradient(head.w, head.b, head.x, y))

    def of_head(road: Function) -> Function:
        return lambda head, y: road(SoftmaxRegression(head.w, head.b), head.x, y)

    yield Case(
        "mean_linear_cross_entropy *",
        (Head(x, model.w, model.b), labels),
        (),
        textbook=of_head(regression.textbook),
        stable=of_head(regression.stable),
        ours=lambda head, y: jax_softmax.mean_linear_cross_entropy(
            head.x, head.w, y, b=head.b
        ),
        optax=of_head(regression.optax),
        torch=lambda torch, head, y: rows.torch(
            torch, head.x @ head.w + head.b, y
        ).mean(),
        closed_form=fused_gradient,
        judge=of_head(regression.judge),
        floor=1.0,
    )


def weighted(cotangent: Array, gradient: Array) -> Array:
    """Each row of a gradient times its cotangent, in the gradient's type."""
    return (cotangent[..., None] * gradient).astype(gradient.dtype)


def textbook_softmax(z: Array) -> Array:
    """exp(z) / sum, as in the book."""
    powers = jnp.exp(z)
    return powers / powers.sum(-1, keepdims=True)


def stable_softmax(z: Array) -> Array:
    return textbook_softmax(z - lax.stop_gradient(z.max(-1, keepdims=True)))


def stable_logsumexp(z: Array) -> Array:
    top = lax.stop_gradient(z.max(-1, keepdims=True))
    return top[..., 0] + jnp.log(jnp.exp(z - top).sum(-1))


def odds_against(z: Array) -> Array:
    """sum_{j != i} exp(z_j - z_i) for each i."""
    ahead = z[..., None, :] - z[..., :, None]
    itself = jnp.eye(z.shape[-1], dtype=bool)
    return jnp.where(itself, 0, jnp.exp(jnp.where(itself, 0, ahead))).sum(-1)


def exact_log_softmax(z: Array) -> Array:
    return -jnp.log1p(odds_against(z))


def at_label(rows: Array, labels: Array) -> Array:
    return jnp.take_along_axis(rows, labels[..., None], axis=-1)[..., 0]


def under_cap(road: Function) -> Function:
    """The road, on logits capped in their own type."""
    return lambda z, *rest: road(CAP * jnp.tanh(z / CAP), *rest)


def torch_cross_entropy(torch: Any, z: Any, target: Any, **options: float) -> Any:
    flat = target.flatten(0, z.ndim - 2)
    losses = torch.nn.functional.cross_entropy(
        z.flatten(0, -2), flat, reduction="none", **options
    )
    return losses.reshape(z.shape[:-1])
