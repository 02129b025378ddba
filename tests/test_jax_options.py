"""What users ask of JAX itself: strict ranks, and exports for any number of rows."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_softmax import (
    Logits,
    SoftmaxRegression,
    cross_entropy,
    cross_entropy_with_probs,
    decision_costs,
    entropy,
    evaluate,
    fit,
    least_cost_decision,
    linear_cross_entropy,
    linear_softmax_summary,
    logsumexp,
    mean_linear_cross_entropy,
    reliability,
    softmax,
    solve,
    top_k_accuracy,
    vector_scaling,
)

NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(9, 3)).astype(np.float32)
W = NUMBERS.normal(size=(3, 7)).astype(np.float32)
Z, LABELS = X @ W, np.arange(9) % 7
MODEL = SoftmaxRegression(jnp.asarray(W), jnp.zeros(7))
RANKS = {
    "logsumexp": lambda: jax.grad(lambda z: logsumexp(z).sum())(Z),
    "softmax": lambda: jax.grad(lambda z: (softmax(z) ** 2).sum())(Z),
    "cross_entropy": lambda: jax.grad(lambda z: cross_entropy(z, LABELS).sum())(Z),
    "smoothed": lambda: cross_entropy(Z, LABELS, label_smoothing=0.1),
    "with_probs": lambda: jax.grad(
        lambda z: cross_entropy_with_probs(z, jax.nn.softmax(Z)).sum()
    )(Z),
    "entropy": lambda: entropy(Logits(Z)),
    "linear": lambda: jax.jvp(
        lambda w: linear_cross_entropy(X, w, LABELS, b=np.ones(7), chunk=(2, 3)),
        (W,),
        (W,),
    ),
    "mean": lambda: jax.grad(
        lambda w: mean_linear_cross_entropy(
            *(X, w, LABELS),
            chunk=(2, 3),
            where=LABELS > 1,
            label_smoothing=0.1,
            softcap=3.0,
            z_loss=0.1,
        )
    )(W),
    "skipping": lambda: jax.grad(
        lambda w: mean_linear_cross_entropy(X, w, LABELS, skip_below=0.1, chunk=(2, 3))
    )(W),
    "summary": lambda: jax.grad(
        lambda w: linear_softmax_summary(X, w, LABELS, chunk=(2, 3)).entropy.sum()
    )(W),
    "evaluate": lambda: evaluate(MODEL, X, LABELS),
    "vector_scaling": lambda: vector_scaling(Z, LABELS).logits(Z),
    "top_k_accuracy": lambda: top_k_accuracy(Z, LABELS, 2),
}


@pytest.mark.parametrize("name", RANKS)
def test_no_rank_is_promoted(name):
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(RANKS[name])


def test_no_tracer_is_left_behind():
    """A closure over one, where JAX keeps the closure, keeps the whole trace."""
    with jax.checking_leaks():
        jax.eval_shape(RANKS["softmax"])


def test_no_rank_is_promoted_in_training():
    run = fit(
        MODEL, X, LABELS, optimizer=optax.sgd(0.1), key=jax.random.key(0), epochs=1
    )
    with jax.numpy_rank_promotion("raise"):
        assert len(list(run)) == 1
        for solver in ("lbfgs", "newton-cg"):
            assert solve(MODEL, X, LABELS, l2=0.1, solver=solver).certificate.converged


def test_no_type_is_promoted_where_labels_are_narrower_than_indices(x64):
    labels, probs, one = LABELS.astype(np.int32), softmax(Z), jnp.float64(0.5)
    costs = 1 - np.eye(7, dtype=np.float32)
    with jax.numpy_dtype_promotion("strict"):
        evaluate(MODEL, X, labels)
        top_k_accuracy(Z, labels, 2)
        for equal_mass in (False, True):
            reliability(probs, labels, equal_mass=equal_mass)
        least_cost_decision(probs, costs, abstention_cost=one)
        decision_costs(labels, labels, costs, abstention_cost=one)


EXPORT = """
import jax, numpy as np
from jax import export
from jax_softmax import cross_entropy
def gradient(z, labels):
    return jax.grad(lambda z: cross_entropy(z, labels).sum())(z)
(rows,) = export.symbolic_shape("rows")
for classes in (7, 50):
    shapes = (
        jax.ShapeDtypeStruct((rows, classes), np.float32),
        jax.ShapeDtypeStruct((rows,), np.int32),
    )
    exported = export.export(jax.jit(gradient))(*shapes)
    for count in (1, 20):
        z = np.random.default_rng(0).normal(size=(count, classes)).astype(np.float32)
        labels = np.arange(count, dtype=np.int32) % classes
        got, want = exported.call(z, labels), jax.jit(gradient)(z, labels)
        np.testing.assert_allclose(got, want, atol=1e-6)
"""


METRICS = """
from jax_softmax import brier_decomposition, reliability
for metric in (reliability, brier_decomposition):
    shapes = (
        jax.ShapeDtypeStruct((rows, 4), np.float32),
        jax.ShapeDtypeStruct((rows,), np.int32),
    )
    exported = export.export(jax.jit(metric))(*shapes)
    p, labels = np.full((7, 4), 0.25, np.float32), np.arange(7, dtype=np.int32) % 4
    for got, want in zip(exported.call(p, labels), metric(p, labels), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
"""


def test_reliability_of_any_number_of_rows():
    """The same for metrics."""
    code = EXPORT[: EXPORT.index("for classes")] + METRICS
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_export_for_any_number_of_rows():
    """Alone, as the annotations that tests check say that a size is an int."""
    subprocess.run([sys.executable, "-W", "error", "-c", EXPORT], check=True)
