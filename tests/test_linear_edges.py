"""The linear losses where a type is narrow, a logit infinite or a rule used twice."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_softmax import (
    _linear_tiles,
    cross_entropy,
    linear_cross_entropy,
    linear_softmax_summary,
    mean_linear_cross_entropy,
    mean_loss,
)

pytestmark = pytest.mark.usefixtures("as_on_one_device")

NUMBERS = np.random.default_rng(0)
X = jnp.asarray(NUMBERS.normal(size=(6, 2)), jnp.float32)
W = jnp.asarray(NUMBERS.normal(size=(2, 5)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 3, 4, 0])


def mean_of_rows(x, w, labels, **options):
    return linear_cross_entropy(x, w, labels, **options).mean()


@pytest.mark.parametrize("loss", [mean_linear_cross_entropy, mean_of_rows])
def test_float16_gradients_of_many_rows_do_not_underflow(loss):
    rows, classes = 32768, 2000
    x, w = jnp.ones((rows, 2), jnp.float16), jnp.zeros((2, classes), jnp.float16)
    gradient = jax.jit(jax.grad(lambda w: loss(x, w, jnp.zeros(rows, int))))(w)
    np.testing.assert_allclose(gradient[:, 1:], 1 / classes, rtol=0.005)
    np.testing.assert_allclose(gradient[:, 0], 1 / classes - 1, rtol=0.005)


def test_an_infinite_logit_in_the_mean():
    x, w = jnp.array([[jnp.inf], [1.0]]), jnp.array([[1.0, -1.0, -2.0]])
    b, labels = jnp.zeros(3), jnp.array([0, 1])

    def dense(b):
        return cross_entropy(x @ w + b, labels).mean()

    for options in ({}, {"chunk": (1, 2)}):

        def fused(b, options=options):
            return mean_linear_cross_entropy(x, w, labels, b=b, **options)

        np.testing.assert_allclose(fused(b), dense(b), rtol=1e-6)
        for way in (jax.grad, jax.jacfwd):
            np.testing.assert_allclose(way(fused)(b), way(dense)(b), atol=1e-7)


def test_a_dropped_row_has_no_part_in_forward_mode():
    x = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]])
    keep, labels = jnp.array([True, False]), jnp.array([0, 1])

    def dense(scale):
        losses = cross_entropy((x * scale) @ W, labels, where=keep)
        return mean_loss(losses, keep)

    def fused(scale):
        return mean_linear_cross_entropy(x * scale, W, labels, where=keep)

    def rows(scale):
        return linear_cross_entropy(x * scale, W, labels, where=keep)

    want = jax.jvp(dense, (1.0,), (1.0,))
    np.testing.assert_allclose(jax.jvp(fused, (1.0,), (1.0,)), want, rtol=1e-5)
    losses, moved = jax.jvp(rows, (1.0,), (1.0,))
    np.testing.assert_allclose((losses[0], moved[0]), want, rtol=1e-5)
    assert losses[1] == moved[1] == 0


def test_biases_of_64_bits_beside_weights_of_32():
    with jax.enable_x64(True):
        x, w = np.ones((6, 3), np.float32), np.ones((3, 5), np.float32)
        gradient = jax.grad(
            lambda b: mean_linear_cross_entropy(x, w, np.zeros(6, int), b=b)
        )(jnp.zeros(5))
        assert gradient.dtype == np.float64
        np.testing.assert_allclose(gradient, [-0.8, 0.2, 0.2, 0.2, 0.2], rtol=1e-6)


def test_second_derivatives_of_a_summary_in_tiles():
    def summed(w):
        return linear_softmax_summary(X, w, LABELS, chunk=(3, 2)).nll.mean()

    def dense(w):
        return cross_entropy(X @ w, LABELS).mean()

    def twice(f):
        def by_reverse(w):
            return jax.grad(lambda w: (jax.grad(f)(w) ** 2).sum())(w)

        def by_forward(w):
            return jax.jvp(jax.grad(f), (w,), (w,))[1]

        return jax.jit(lambda w: (by_reverse(w), by_forward(w)))(W)

    for got, want in zip(twice(summed), twice(dense), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1.0])
def test_skipped_tiles_change_no_gradient_of_a_logit_by_more_than_is_said(z_loss):
    random, skip = np.random.default_rng(0), 1e-2
    x = jnp.asarray(1.5 * random.normal(size=(1, 8)), jnp.float32)
    w = jnp.asarray(random.normal(size=(8, 999)), jnp.float32)

    def gradient(skip_below):
        def mean(b):
            options = {"b": b, "z_loss": z_loss, "chunk": (1, 32)}
            return mean_linear_cross_entropy(
                x, w, jnp.array([3]), skip_below=skip_below, **options
            )

        return np.asarray(jax.grad(mean)(jnp.zeros(999)))

    error = np.abs(gradient(skip) - gradient(0.0))
    assert 0 < error.max() <= skip


def test_a_row_of_weight_0_counts_for_nothing():
    labels, weights = LABELS.at[1].set(-100), jnp.ones(6).at[1].set(0.0)

    def mean(w, labels, **options):
        return mean_linear_cross_entropy(X, w, labels, **options)

    def both(labels, **options):
        return jax.value_and_grad(lambda w: mean(w, labels, **options))(W)

    jax.tree.map(
        np.testing.assert_array_equal,
        both(labels, weights=weights),
        both(LABELS, weights=weights),
    )
    value, gradient = both(labels, normalizer=0.0)
    assert value == 0
    assert not gradient.any()
    slopes = jax.grad(lambda s: mean(W, LABELS, weights=s, normalizer=1.0))(weights)
    np.testing.assert_allclose(slopes, linear_cross_entropy(X, W, LABELS), rtol=1e-6)
    slopes, known = (
        jax.grad(lambda s, y=y: mean(W, y, weights=s))(weights)
        for y in (labels, LABELS)
    )
    np.testing.assert_array_equal(slopes[weights > 0], known[weights > 0])


RULED_OUT = jnp.array([0.0, -jnp.inf, 0.5, 0.0, 1.0])  # one of them the label of row 1


def dense_loss(x, w, labels, *, b=0.0, **options):
    return cross_entropy(x @ w + b, labels, **options)


@pytest.mark.parametrize("loss", [linear_cross_entropy, mean_linear_cross_entropy])
@pytest.mark.parametrize("chunk", [None, (4, 2)])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("others", [[], [0]])  # with class 1, a tile of its own
def test_smoothing_where_a_label_is_ruled_out(loss, chunk, smoothing, others):
    """Its class has no part of what is spread over those that are possible."""
    biases = RULED_OUT.at[jnp.array(others, int)].set(-jnp.inf)

    def summed(loss, **options):
        def of(x, w, b):
            found = loss(x, w, LABELS, b=b, label_smoothing=smoothing, **options)
            return found.sum() if found.ndim else 6 * found

        return jax.value_and_grad(of, (0, 1, 2))(X, W, biases)

    got, want = summed(loss, chunk=chunk), summed(dense_loss)
    assert (want[0] == jnp.inf) == (smoothing < 1)
    assert all(np.isfinite(leaf).all() for leaf in want[1])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_row_of_weight_0_whose_label_is_ruled_out():
    weights = jnp.ones(6).at[1].set(0.0)

    def mean(weights):
        return mean_linear_cross_entropy(X, W, LABELS, b=RULED_OUT, weights=weights)

    value, slopes = jax.value_and_grad(mean)(weights)
    others = jnp.array([0, 2, 3, 4, 5])
    want = dense_loss(X[others], W, LABELS[others], b=RULED_OUT).mean()
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("loss", [mean_linear_cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_rows_at_all(loss, dtype):
    x, w = jnp.ones((0, 3), dtype), jnp.ones((3, 4), dtype)
    total = jax.value_and_grad(lambda x, w: loss(x, w, jnp.zeros(0, int)).sum(), (0, 1))
    value, (dx, dw) = total(x, w)
    assert value == 0
    assert dx.shape == (0, 3)
    assert (dw == 0).all()


@pytest.mark.parametrize("chunk", [None, (1, 2)])
@pytest.mark.parametrize("infinite", [[1], [1, 4], [0, 1, 4]])
def test_entropy_where_logits_are_infinite(chunk, infinite):
    b = jnp.zeros(5).at[jnp.array(infinite)].set(jnp.inf)

    def summed(b):
        return linear_softmax_summary(X, W, b=b, chunk=chunk).entropy.sum()

    value, slopes = jax.value_and_grad(summed)(b)
    np.testing.assert_allclose(value, 6 * np.log(len(infinite)), rtol=1e-6)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("loss", [mean_linear_cross_entropy, mean_of_rows])
def test_a_class_that_is_ruled_out_is_so_under_a_softcap(loss):
    labels, cap = jnp.where(LABELS == 1, 0, LABELS), 2.0

    def ours(w, b):
        return loss(X, w, labels, b=b, softcap=cap)

    def plain(w, b):
        capped = cap * jnp.tanh((X @ w + b) / cap)
        return cross_entropy(jnp.where(b == -jnp.inf, b, capped), labels).mean()

    for got, want in zip(
        jax.tree.leaves(jax.value_and_grad(ours, (0, 1))(W, RULED_OUT)),
        jax.tree.leaves(jax.value_and_grad(plain, (0, 1))(W, RULED_OUT)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_z_loss_of_a_large_lse():
    """Whose square alone no float32 holds."""
    got = mean_linear_cross_entropy(
        jnp.full((1, 1), 1e25), jnp.array([[1.0, 0.0]]), jnp.array([0]), z_loss=1e-20
    )
    np.testing.assert_allclose(got, 1e30, rtol=1e-5)


@pytest.mark.parametrize("loss", ["rows", "mean", "dense"])
def test_how_gradients_change_with_a_weight_that_is_0(loss):
    """As it decides which rows to learn from."""
    weights, along = jnp.array([0.0, 1, 0, 2, 3, 4]), W[::-1]

    def mean(w, s):
        if loss == "mean":
            return mean_linear_cross_entropy(X, w, LABELS, weights=s, normalizer=10.0)
        if loss == "rows":
            return (s * linear_cross_entropy(X, w, LABELS)).sum() / 10
        return (s * cross_entropy(X @ w, LABELS)).sum() / 10

    def rise(s):
        return jnp.vdot(jax.grad(mean)(W, s), along)

    def per_row(w):
        return cross_entropy(X @ w, LABELS) / 10

    want = jax.jvp(per_row, (W,), (along,))[1]
    np.testing.assert_allclose(jax.grad(rise)(weights), want, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize("top_k", [0, 4, 6])
def test_padding_is_none_of_the_likeliest(top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, 3\].*got {top_k}"):
        linear_softmax_summary(X, W, top_k=top_k, classes=3)


def test_precision_reaches_every_matmul():
    def nll(*args, **options):
        return linear_softmax_summary(*args, **options).nll

    for loss in (linear_cross_entropy, mean_linear_cross_entropy, nll):

        def summed(x, w, loss=loss):
            return loss(x, w, LABELS, precision="highest").sum()

        program = jax.jit(jax.grad(summed, (0, 1))).lower(X, W).as_text()
        products = re.findall(r"stablehlo.dot_general.*", program)
        assert products
        assert all("[HIGHEST, HIGHEST]" in product for product in products)


def test_a_gradient_is_rounded_once_for_each_chunk():
    held, piece = jnp.ones(4, jnp.bfloat16), jnp.full(4, 2**-8 + 2**-17, jnp.float32)
    found = _linear_tiles.add_at(held, piece, 0, 0)
    np.testing.assert_array_equal(found.astype(jnp.float32), 1 + 2**-7)


def test_a_row_of_weight_0_keeps_no_tile():
    x, w = jnp.array([[1.0], [0.0]]), jnp.array([[9.0, 0, -9, -9]])
    options = {"weights": jnp.array([1.0, 0.0]), "chunk": (2, 2), "skip_below": 1e-3}

    def mean(b):
        return mean_linear_cross_entropy(x, w, jnp.array([0, 0]), b=b, **options)

    assert (jax.grad(mean)(jnp.zeros(4))[2:] == 0).all()


def test_padding_under_a_softcap():
    def gradient(w, **options):
        def mean(w):
            return mean_linear_cross_entropy(X, w, LABELS % 3, softcap=2.0, **options)

        return jax.grad(mean)(w)

    padded = gradient(W, classes=3)
    np.testing.assert_allclose(padded[:, :3], gradient(W[:, :3]), rtol=1e-5)
    assert not padded[:, 3:].any()
