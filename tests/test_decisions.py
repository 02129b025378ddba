"""Calibration, reliability, decisions, conformal sets: against peers and promises."""

import json
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from PIL import Image
from scipy.special import softmax
from sklearn import metrics
from sklearn.calibration import calibration_curve

import jax_softmax as js
from experiments import data, decisions, run_folder
from experiments.command import main
from experiments.images import pixels

pytestmark = pytest.mark.usefixtures("strict_types")

INF, NAN = np.inf, np.nan
ROWS, CLASSES = 600, 5


@pytest.fixture(scope="module")
def sample():
    """Logits twice as sure as they should be, and labels drawn as they should be."""
    random = np.random.default_rng(0)
    fair = random.normal(0, 2, (ROWS, CLASSES))
    return (2 * fair).astype(np.float32), drawn(random, fair)


def drawn(random, logits):
    """Labels from softmax(logits)."""
    gumbel = random.gumbel(size=np.shape(logits))
    return (logits + gumbel).argmax(-1).astype(np.int32)


def probabilities(logits):
    return softmax(logits, axis=-1).astype(np.float32)


# Calibration


def test_temperature_is_the_optimum_at_every_scale(sample):
    z, y = sample
    fit = js.temperature_scaling
    want = reference.temperature(z, y)
    for scale in (1e-30, 1e-3, 1, 1e3, 1e9, 1e30):
        got = fit(z * np.float32(scale), y).temperature
        np.testing.assert_allclose(got / scale, want, rtol=2e-6)
    assert abs(want - 2) < 0.2


def test_temperature_scaling_lowers_the_loss_and_moves_no_decision(sample):
    z, y = sample
    scaling = js.temperature_scaling(z, y)
    assert js.cross_entropy(scaling.logits(z), y).mean() < (
        js.cross_entropy(z, y).mean() - 0.05
    )
    np.testing.assert_array_equal(scaling.logits(z).argmax(-1), z.argmax(-1))


NEARLY = np.stack((np.r_[np.ones(99), -1e-6], np.zeros(100)), -1)
LIMITS = {
    # logits (of 3 classes; those that are missing are ruled out), labels, T
    "separable": ([[1, 0], [0, 2]], [0, 1], 0),
    "separable, with a tie": ([[1, 0], [2, 2]], [0, 1], 0),
    "always wrong": ([[1, 0], [0, 2]], [1, 0], INF),
    "all equal": ([[1, 1], [2, 2]], [1, 0], INF),
    "one class": ([[1], [2]], [0, 0], INF),
    "nearly separable": (NEARLY, [0] * 100, reference.temperature(NEARLY, [0] * 100)),
    "label ruled out": ([[1, -INF], [1, 0]], [1, 0], NAN),
    "all ruled out": ([[-INF, -INF], [1, 0]], [1, 0], NAN),
    "another +inf": ([[1, INF], [1, 0]], [0, 0], NAN),
    "label 3 of 3": ([[1, 0, 0], [0, 1, 0]], [3, 0], NAN),
    "label -1": ([[1, 0], [0, 1]], [-1, 0], NAN),
    "NaN": ([[1, NAN], [0, 1]], [0, 0], NAN),
    "no row": (np.zeros((0, 2)), [], NAN),
}


@pytest.mark.parametrize("f", [js.temperature_scaling, js.vector_scaling])
def test_arrays_that_jit_would_misread(f, sample):
    """NumPy's masks and byte orders, also where a program is there already."""
    z, labels = sample
    native = f(z, labels)
    for _ in range(2):
        swapped = f(z.astype(">f4"), labels.astype(">i4"))
        jax.tree.map(np.testing.assert_array_equal, swapped, native)
        with pytest.raises((TypeError, ValueError)):
            f(np.ma.masked_array(z), labels)


def test_temperature_says_where_there_is_no_optimum():
    fit = jax.jit(jax.vmap(js.temperature_scaling))
    size = max(len(y) for _, y, _ in LIMITS.values())
    z, y, keep = np.zeros((len(LIMITS), size, 3)), np.zeros((len(LIMITS), size)), []
    z[..., 2] = -INF
    for i, (rows, labels, _) in enumerate(LIMITS.values()):
        rows = np.reshape(rows, (len(labels), np.shape(rows)[-1]))
        z[i, : len(labels), : rows.shape[1]] = rows
        z[i, : len(labels), rows.shape[1] :] = -INF
        y[i, : len(labels)] = labels
        keep.append(np.arange(size) < len(labels))
    z = z.astype(np.float32)
    scalings = fit(z, y.astype(np.int32), where=np.array(keep))
    for i, (name, (_, labels, want)) in enumerate(LIMITS.items()):
        scaling = jax.tree.map(lambda leaf, i=i: leaf[i], scalings)
        got = scaling.temperature
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
        rows = z[i, : len(labels)]
        likely = {0: rows == rows.max(-1, keepdims=True), INF: rows > -INF}.get(want)
        if likely is not None:
            shares = likely / likely.sum(-1, keepdims=True)
            probs = js.softmax(scaling.logits(rows))
            np.testing.assert_allclose(probs, shares, rtol=1e-6, err_msg=name)


def test_ruled_out_classes_and_certain_labels_take_part_by_their_limit(sample):
    z, y = sample
    certain = np.where(np.arange(CLASSES) == 3, INF, 0).astype(np.float32)[None]
    z, y = np.concatenate((z, certain)), np.append(y, np.int32(3))
    z = np.pad(z, ((0, 0), (0, 1)), constant_values=-INF)
    scaling = js.temperature_scaling(z, y)
    np.testing.assert_allclose(
        scaling.temperature, reference.temperature(*sample), 2e-6
    )
    assert (scaling.logits(z)[:, -1] == -INF).all()
    np.testing.assert_array_equal(scaling.logits(z)[-1, :-1], certain[0])


def test_scaled_losses_differentiate_beside_ruled_out_classes_and_dropped_rows():
    z = jnp.array([[-INF, 1, 2], [0, -INF, NAN], [INF, -INF, 0]])
    y, keep = jnp.array([1, 0, 2]), jnp.array([True, False, False])

    def loss(scaling, z=z, y=y, keep=keep):
        return js.cross_entropy(scaling.logits(z), y, where=keep).sum()

    for scaling in (
        js.TemperatureScaling(2.0),
        js.VectorScaling(jnp.array([1.0, 2, 3]), jnp.zeros(3)),
    ):
        of_all = jax.tree.leaves(jax.grad(loss)(scaling))
        possible = jax.grad(loss)(scaling, jnp.array([[-99.0, 1, 2]]), y[:1], keep[:1])
        for got, want in zip(of_all, jax.tree.leaves(possible), strict=True):
            assert np.isfinite(got).all()
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-30)


def test_no_temperature_decides_a_row_without_a_possible_class_or_with_a_nan():
    z = jnp.array([[-INF, -INF], [NAN, 1]])
    for temperature in (0.0, 1.0, INF):
        scaled = js.TemperatureScaling(temperature).logits(z)
        np.testing.assert_array_equal(scaled[0], [-INF, -INF])
        assert np.isnan(js.softmax(scaled)).all()


def test_vector_scaling_is_the_optimum_at_every_scale(sample):
    fit = js.vector_scaling
    for scale in (1e-3, 1, 1e3, 1e9):
        z, y = sample[0] * np.float32(scale), sample[1]
        scaling = fit(z, y)
        dw, db = reference.vector_scaling_gradient(z, y, *scaling, l2=1e-4)
        assert np.abs(dw).max() < 1e-6 * scale
        assert np.abs(db).max() < 1e-6


def test_vector_scaling_at_the_edges():
    z = np.float32([[1, -INF], [0, 1], [1, 0]])

    def scale(z, y, kept=3):
        return js.vector_scaling(z, np.array(y), where=np.arange(3) < kept)

    ruled_out = scale(z, [0, 1, 1])
    assert np.isfinite(ruled_out.w).all()
    assert ruled_out.logits(z)[0, 1] == -INF
    assert np.isnan(ruled_out.logits(np.float32([NAN, 0]))[0])
    assert np.isnan(scale(z, [1, 1, 1]).w).all()
    assert np.isnan(scale(z, [0, 2, 1]).w).all()
    assert np.isfinite(scale(z, z.argmax(-1)).w).all()  # separable
    nothing = scale(z, [0, 1, 1], kept=0)
    np.testing.assert_array_equal(nothing, js.VectorScaling(np.ones(2), np.zeros(2)))


@pytest.mark.parametrize("fit", [js.temperature_scaling, js.vector_scaling])
def test_scalings_jit_vmap_drop_rows_and_differentiate(sample, fit):
    z, y = sample[0].reshape(2, -1, CLASSES), sample[1].reshape(2, -1)
    with jax.enable_x64(True):
        z = z.astype(np.float64)
        alone = [fit(z[i], y[i]) for i in range(2)]
        more = (0, 0), (0, 20)
        spoilt = np.pad(z, (*more, (0, 0)), constant_values=NAN)
        keep = np.pad(np.ones(y.shape, bool), more)
        together = jax.jit(jax.vmap(lambda z, y, keep: fit(z, y, where=keep)))(
            spoilt, np.pad(y, more, constant_values=-100), keep
        )
        for i in range(2):
            for got, want in zip(together, alone[i], strict=True):
                np.testing.assert_allclose(got[i], want, rtol=1e-9, atol=1e-9)

        def first(z):
            return jax.tree.leaves(fit(z, y[0]))[0].sum()

        along = np.random.default_rng(0).normal(size=z[0].shape)
        rise = (first(z[0] + 1e-5 * along) - first(z[0] - 1e-5 * along)) / 2e-5
        slope = jnp.vdot(jax.grad(first)(z[0]), along)
        np.testing.assert_allclose(slope, rise, rtol=1e-6)


@pytest.mark.parametrize("fit", [js.temperature_scaling, js.vector_scaling])
def test_second_derivatives_of_scalings_are_the_optimums(fit, sample):
    with jax.enable_x64(True):
        z, y = sample[0][:60].astype(np.float64), sample[1][:60]
        along = np.random.default_rng(1).normal(size=z.shape)

        def first(t):
            return jax.tree.leaves(fit(z + t * along, y))[0].sum()

        slope, h = jax.jit(jax.grad(first)), 1e-4
        rise = (slope(h) - slope(-h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(slope)(0.0), rise, rtol=1e-5)


# Reliability


@pytest.mark.parametrize("equal_mass", [False, True])
def test_reliability_is_scikit_learns_curve(sample, equal_mass):
    z, y = sample
    p = probabilities(z)
    found = js.reliability(p, y, bins=12, equal_mass=equal_mass)
    strategy = "quantile" if equal_mass else "uniform"
    hit = p.argmax(-1) == y
    accuracy, confidence = calibration_curve(
        hit, p.max(-1), n_bins=12, strategy=strategy
    )
    filled = np.asarray(found.rows) > 0
    np.testing.assert_allclose(found.accuracy[filled], accuracy, rtol=1e-6)
    np.testing.assert_allclose(found.confidence[filled], confidence, rtol=1e-6)
    assert found.rows.sum() == ROWS
    if equal_mass:
        np.testing.assert_array_equal(found.rows, ROWS / 12)
    error = js.expected_calibration_error(p, y, bins=12, equal_mass=equal_mass)
    share = found.rows[filled] / ROWS
    np.testing.assert_allclose(error, share @ np.abs(accuracy - confidence), rtol=1e-5)


def test_equal_probabilities_share_a_bin():
    p = np.float32([[0.9, 0.1]] * 5 + [[0.6, 0.4]])
    found = js.reliability(p, np.zeros(6, int), bins=3, equal_mass=True)
    np.testing.assert_array_equal(found.rows, [6, 0, 0])


def test_calibration_errors_bias_is_as_its_docstring_says():
    """Perfectly calibrated rows do not score 0, but about what the noise amounts to."""
    random = np.random.default_rng(2)
    error = jax.jit(jax.vmap(partial(js.expected_calibration_error, equal_mass=True)))
    bins = jax.jit(jax.vmap(partial(js.reliability, equal_mass=True)))
    mean_of = {}
    for n in (300, 4800):
        z = random.normal(0, 2, (64, n, 4))
        p, y = probabilities(z), drawn(random, z)
        mean_of[n] = error(p, y).mean()
        found = bins(p, y)
        a = found.confidence
        foretold = (jnp.sqrt(2 * found.rows * a * (1 - a) / np.pi).sum(-1) / n).mean()
        np.testing.assert_allclose(mean_of[n], foretold, rtol=0.1)
    np.testing.assert_allclose(mean_of[300] / mean_of[4800], 4, rtol=0.15)
    # And within a bin, too sure by 0.2 and too unsure by 0.2 cancel.
    p = np.float32([[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 10)
    y = np.array([0] * 6 + [1] * 4 + [0] * 8 + [1] * 2)
    assert js.expected_calibration_error(p, y, bins=5) > 0.19
    assert js.expected_calibration_error(p, y, bins=1) < 1e-6


def test_brier_score_is_scikit_learns(sample):
    z, y = sample
    p = probabilities(z)
    got = js.brier_score(p, y).mean()
    want = metrics.brier_score_loss(y, p, labels=range(CLASSES), scale_by_half=False)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 15]))
def test_brier_decomposition_is_an_identity(seed, bins):
    random = np.random.default_rng(seed)
    z = random.normal(0, random.uniform(0, 8), (40, 3))
    p, y = probabilities(z), random.integers(0, 3, 40)
    keep = random.random(40) < 0.9
    parts = js.brier_decomposition(p, y, bins=bins, where=keep)
    want = js.mean_loss(js.brier_score(p, y), keep)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    np.testing.assert_allclose(total, want, atol=2e-6)
    np.testing.assert_allclose(
        parts, reference.brier_parts(p[keep], y[keep], bins), atol=2e-6
    )


# Decisions


def test_top_k_accuracy_and_confusion_matrix_are_scikit_learns(sample):
    z, y = sample
    assert js.top_k_accuracy(z, y, CLASSES) == 1
    for k in range(1, CLASSES):
        want = metrics.top_k_accuracy_score(y, z, k=k, labels=range(CLASSES))
        np.testing.assert_allclose(js.top_k_accuracy(z, y, k), want, rtol=1e-6)
    chosen = z.argmax(-1)
    want = metrics.confusion_matrix(y, chosen, labels=range(CLASSES))
    np.testing.assert_array_equal(js.confusion_matrix(chosen, y, CLASSES), want)
    keep = np.arange(ROWS) % 3 > 0
    got = js.confusion_matrix(chosen, np.where(keep, y, 99), CLASSES, where=keep)
    want = metrics.confusion_matrix(y[keep], chosen[keep], labels=range(CLASSES))
    np.testing.assert_array_equal(got, want)


def test_of_equal_scores_the_first_classes_count():
    scores, y = jnp.zeros((3, 3)), jnp.arange(3)
    got = [float(js.top_k_accuracy(scores, y, k)) for k in (1, 2, 3)]
    np.testing.assert_allclose(got, [1 / 3, 2 / 3, 1], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), *2 * [st.sampled_from([1, 4])])
def test_least_cost_is_the_least(seed, classes, decisions):
    random = np.random.default_rng(seed)
    p = probabilities(random.normal(0, 3, (4, 2, classes)))
    costs = random.normal(0, 10, (classes, decisions)).astype(np.float32)
    price = random.normal(0, 10)
    expected = p.astype(np.float64) @ costs.astype(np.float64)
    chosen = js.least_cost_decision(p, costs)
    paid = np.take_along_axis(expected, np.asarray(chosen)[..., None], -1)[..., 0]
    np.testing.assert_allclose(paid, expected.min(-1), rtol=1e-4, atol=1e-4)
    # No cost is lost, or gained, by a constant for each class.
    moved = costs + random.normal(0, 10, (classes, 1)).astype(np.float32)
    again = np.asarray(js.least_cost_decision(p, moved))[..., None]
    paid = np.take_along_axis(expected, again, -1)[..., 0]
    np.testing.assert_allclose(paid, expected.min(-1), rtol=1e-4, atol=1e-4)
    clear = np.abs(expected.min(-1) - price) > 1e-3
    abstained = (
        np.asarray(js.least_cost_decision(p, costs, abstention_cost=price)) == -1
    )
    np.testing.assert_array_equal(abstained[clear], (expected.min(-1) > price)[clear])


def test_where_every_error_costs_one_argmax_is_cheapest_and_chow_abstains(sample):
    z, _ = sample
    p = probabilities(z)
    every_error = 1 - np.eye(CLASSES, dtype=np.float32)
    np.testing.assert_array_equal(js.least_cost_decision(p, every_error), p.argmax(-1))
    chosen = js.least_cost_decision(p, every_error, abstention_cost=0.3)
    np.testing.assert_array_equal(chosen == -1, p.max(-1) < 0.7)


def test_the_illness_that_costs_fifty_false_alarms():
    """As in least_cost_decision's docstring, on patients whose truth comes out."""
    random = np.random.default_rng(3)
    z = random.normal([0, -2], 1.5, (50_000, 2))
    p, ill = probabilities(z), drawn(random, z)
    costs = np.float32([[0, 1], [50, 0]])
    cheapest = js.least_cost_decision(p, costs)
    np.testing.assert_array_equal(cheapest, p[:, 1] > 1 / 51)
    before = js.decision_costs(p.argmax(-1), ill, costs).sum()
    after = js.decision_costs(cheapest, ill, costs).sum()
    assert after < 0.2 * before
    foretold = js.expected_costs(p, costs).min(-1).sum()
    np.testing.assert_allclose(after, foretold, rtol=0.05)


def test_abstention_price_may_be_traced_and_vmapped(sample):
    p = probabilities(sample[0])
    every_error = 1 - np.eye(CLASSES, dtype=np.float32)
    prices = jnp.array([0.0, 0.2, 0.8])

    def rate(price):
        chosen = js.least_cost_decision(p, every_error, abstention_cost=price)
        return (chosen == -1).mean()

    rates = jax.jit(jax.vmap(rate))(prices)
    np.testing.assert_allclose(rates, [rate(float(x)) for x in prices], rtol=1e-6)
    assert rates[0] > rates[1] > rates[2] == 0


# Conformal sets

TRIALS, HELD_OUT, NEW = 400, 99, 50
SCORES = {
    "probabilities": lambda p, key: p,
    "adaptive": lambda p, key: js.adaptive_scores(p),
    "randomised": lambda p, key: js.adaptive_scores(p, key=key),
}


@pytest.mark.parametrize("name", SCORES)
def test_sets_hold_the_label_as_often_as_promised(name):
    """Over many draws of held-out and new rows, for a model that is wrongly sure."""
    random = np.random.default_rng(4)
    fair = random.normal(0, 1, (TRIALS, HELD_OUT + NEW, CLASSES))
    y, p = drawn(random, fair), probabilities(3 * fair)
    score = jax.vmap(SCORES[name])(p, jax.random.split(jax.random.key(0), TRIALS))
    own = jnp.take_along_axis(score[:, HELD_OUT:], y[:, HELD_OUT:, None], -1)[..., 0]
    for rate in (0.5, 0.2, 0.1, 0.025):
        threshold = jax.jit(jax.vmap(partial(js.conformal_threshold, miss_rate=rate)))(
            score[:, :HELD_OUT], y[:, :HELD_OUT]
        )
        coverage = (own >= threshold[:, None]).mean()
        deviation = np.sqrt(rate * (1 - rate) * (1 / HELD_OUT + 1 / NEW) / TRIALS)
        assert coverage >= 1 - rate - 4 * deviation
        if name != "adaptive":  # the likeliest class always scores 0: ties
            assert coverage <= 1 - rate + 1 / (HELD_OUT + 1) + 4 * deviation


def test_threshold_is_the_ranked_score():
    most = 120
    scores = np.random.default_rng(0).permutation(most).astype(np.float32)[:, None]
    keep = np.sort(scores[:, 0])[:, None] > scores[:, 0]  # n of them: 0, 1, ... n - 1
    for percent in (1, 7, 10, 29, 50, 57, 99):

        def threshold(where, rate=percent / 100):
            y = np.zeros(most, int)
            return js.conformal_threshold(scores, y, miss_rate=rate, where=where)

        rank = (np.arange(most) + 1) * percent // 100
        got = jax.jit(jax.vmap(threshold))(keep)
        np.testing.assert_array_equal(got, np.where(rank, rank - 1.0, -INF))


def test_thresholds_of_rates_with_many_digits_err_on_the_safe_side():
    n = 20_000
    scores = np.arange(n, dtype=np.float32)[:, None]
    for rate in (1 / 3, 0.123456789, 0.00005, 1e-7, 1 - 1e-9):
        got = js.conformal_threshold(scores, np.zeros(n, int), miss_rate=rate)
        exact = np.floor((n + 1) * rate) - 1
        assert exact - 2 <= max(got, -1) <= exact


def test_adaptive_scores_sum_what_comes_before(sample):
    p = probabilities(sample[0])
    got = js.adaptive_scores(p)
    for row, scores in zip(p[:50], np.asarray(got), strict=False):
        want = [-row[row > q].astype(np.float64).sum() for q in row]
        np.testing.assert_allclose(scores, want, atol=1e-6)
    drop = np.asarray(got - js.adaptive_scores(p, key=jax.random.key(0)))
    top = p == p.max(-1, keepdims=True)
    u = drop[top] / p[top]  # one draw for each row
    np.testing.assert_allclose(drop, u[:, None] * p, atol=2e-7)
    assert 0 <= u.min() < 0.05 < 0.95 < u.max() < 1


# The contract


def means(scores, labels, where):
    """All that is a mean over rows."""
    probs = js.softmax(scores)
    return jnp.stack(
        (
            js.top_k_accuracy(scores, labels, 2, where=where),
            js.expected_calibration_error(probs, labels, where=where),
            js.expected_calibration_error(probs, labels, equal_mass=True, where=where),
            *js.brier_decomposition(probs, labels, where=where),
            js.conformal_threshold(probs, labels, miss_rate=0.25, where=where),
            js.confusion_matrix(scores.argmax(-1), labels, 3, where=where).mean(),
        )
    )


MEANS = jax.jit(means)


def test_kept_rows_alone_decide():
    random = np.random.default_rng(5)
    z, y = random.normal(size=(2, 7, 3)).astype(np.float32), np.arange(14) % 3
    y = y.reshape(2, 7).astype(np.int8)
    keep = random.permuted(np.tile(np.arange(7) < 4, (2, 1)), axis=1)
    want = MEANS(z[keep], y[keep], np.ones(8, bool))
    assert np.isfinite(want).all()
    spoilt = np.where(keep[..., None], z, NAN), np.where(keep, y, -100)
    np.testing.assert_allclose(MEANS(*spoilt, keep), want, rtol=1e-5)
    each = jax.jit(jax.vmap(means))(*spoilt, keep)
    for got, row, label, kept in zip(each, z, y, keep, strict=True):
        alone = MEANS(row[kept], label[kept], np.ones(4, bool))
        np.testing.assert_allclose(got, alone, rtol=1e-5)


@pytest.mark.parametrize("label", [-1, -100, 3, 127])
def test_a_label_of_no_class_is_never_clamped(label):
    z, y = np.zeros((4, 3), np.float32), np.array([0, 1, 2, label], np.int8)
    assert np.isnan(MEANS(z, y, np.ones(4, bool))).all()
    np.testing.assert_array_equal(np.isnan(js.brier_score(z, y)), [0, 0, 0, 1])
    costs = np.ones((3, 2), np.float32)
    zero = np.zeros(4, int)
    np.testing.assert_array_equal(
        np.isnan(js.decision_costs(zero, y, costs)), [0, 0, 0, 1]
    )
    decisions = np.array([0, 1, 1, label])
    spoilt = js.decision_costs(decisions, zero, costs)
    np.testing.assert_array_equal(np.isnan(spoilt), [0, 0, 0, 1])
    priced = js.decision_costs(decisions, zero, costs, abstention_cost=9.0)
    np.testing.assert_array_equal(priced[-1], 9 if label == -1 else NAN)


def test_nan_stays_in_its_row_or_spoils_the_mean():
    z = np.float32([[0, 1, 2], [0, NAN, 1], [0, 0, 0], [1, 0, 0]])
    y, costs = np.array([0, 1, 2, 2], np.int8), np.ones((3, 3), np.float32)
    probs, in_its_row = js.softmax(z), np.array([0, 1, 0, 0], bool)
    spoilt = np.asarray(MEANS(z, y, np.ones(4, bool)))
    assert np.isnan(spoilt[:-1]).all()
    np.testing.assert_array_equal(np.isnan(js.brier_score(probs, y)), in_its_row)
    np.testing.assert_array_equal(js.least_cost_decision(probs, costs) < 0, in_its_row)
    spoilt = np.isnan(js.adaptive_scores(probs))
    np.testing.assert_array_equal(spoilt, np.tile(in_its_row[:, None], 3))


def test_no_row_has_no_mean():
    z, y = np.zeros((4, 3), np.float32), np.zeros(4, np.int8)
    nothing = MEANS(z, y, np.zeros(4, bool))
    counts, threshold = nothing[-1], nothing[-2]
    assert np.isnan(nothing[:-2]).all()
    assert threshold == -INF
    assert counts == 0


def test_half_precision_is_computed_in_single(sample):
    z, y = sample
    p = jnp.asarray(probabilities(z), jnp.bfloat16)
    costs = jnp.ones((CLASSES, 2), jnp.bfloat16)
    for result in (
        lambda: js.temperature_scaling(z.astype(jnp.bfloat16), y),
        lambda: js.vector_scaling(z.astype(jnp.bfloat16), y),
        lambda: js.VectorScaling(jnp.ones(CLASSES), jnp.ones(CLASSES)).logits(p),
        lambda: js.TemperatureScaling(jnp.ones(())).logits(p),
        lambda: js.reliability(p, y),
        lambda: js.expected_calibration_error(p, y),
        lambda: js.brier_score(p, y),
        lambda: js.brier_decomposition(p, y),
        lambda: js.top_k_accuracy(p, y),
        lambda: js.expected_costs(p, costs),
        lambda: js.decision_costs(y * 0, y, costs),
        lambda: js.conformal_threshold(p, y, miss_rate=0.1),
        lambda: js.adaptive_scores(p),
    ):
        for leaf in jax.tree.leaves(jax.eval_shape(result)):
            assert leaf.dtype == jnp.float32


F, Y = np.zeros((2, 3), np.float32), np.zeros(2, int)
MISTAKES = {
    "labels [2, 1]": (lambda: js.temperature_scaling(F, Y[:, None]), "labels", r"2, 1"),
    "labels one-hot": (lambda: js.reliability(F, F.astype(int)), "labels", r"2, 3"),
    "labels float": (lambda: js.brier_score(F, F[:, 0]), "labels", "float32"),
    "integer logits": (lambda: js.vector_scaling(F.astype(int), Y), "logits", "int"),
    "where [3]": (
        lambda: js.temperature_scaling(F, Y, where=np.ones(3, bool)),
        "where",
        r"\(2,\), got \(3,\)",
    ),
    "l2 0": (lambda: js.vector_scaling(F, Y, l2=0), "l2", "0"),
    "l2 1e39": (lambda: js.vector_scaling(F, Y, l2=1e39), "l2", "1e\\+39"),
    "l2 1e-50": (lambda: js.vector_scaling(F, Y, l2=1e-50), "l2", "1e-50"),
    "bins 2^31": (lambda: js.reliability(F, Y, bins=2**31), "bins", "2147483648"),
    "ragged labels": (
        lambda: js.confusion_matrix(Y, [[1], [1, 2]], 2),
        "labels must be an array of numbers",
        "list",
    ),
    "ragged labels of costs": (
        lambda: js.decision_costs(Y, [[1], [1, 2]], np.eye(2, dtype=np.float32)),
        "labels must be an array of numbers",
        "list",
    ),
    "one b": (
        lambda: js.VectorScaling(jnp.ones(3), jnp.array(5.0)).logits(F),
        "b must",
        r"\(3,\), got \(\)",
    ),
    "a column of b": (
        lambda: js.VectorScaling(jnp.ones(3), jnp.ones((2, 1))).logits(F),
        "b must",
        r"\(3,\), got \(2, 1\)",
    ),
    "bins 0": (lambda: js.reliability(F, Y, bins=0), "bins", "0"),
    "k 4": (lambda: js.top_k_accuracy(F, Y, 4), "k", r"\[1, 3\], got 4"),
    "classes 0": (lambda: js.confusion_matrix(Y, Y, 0), "classes", "0"),
    "costs [2, 2]": (
        lambda: js.expected_costs(F, np.zeros((2, 2), np.float32)),
        "costs",
        r"3 rows.*\(2, 2\)",
    ),
    "costs [3]": (lambda: js.least_cost_decision(F, F[0]), "costs", r"\(3,\)"),
    "integer costs": (
        lambda: js.least_cost_decision(F, np.eye(3, dtype=int)),
        "costs",
        "int",
    ),
    "a price for each row": (
        lambda: js.least_cost_decision(
            F, np.eye(3, dtype=np.float32), abstention_cost=F
        ),
        "abstention_cost",
        r"\(2, 3\)",
    ),
    "miss rate 0": (
        lambda: js.conformal_threshold(F, Y, miss_rate=0.0),
        "miss_rate",
        "0",
    ),
    "miss rate 90": (
        lambda: js.conformal_threshold(F, Y, miss_rate=90),
        "miss_rate",
        "90",
    ),
    "no class": (lambda: js.adaptive_scores(F[:, :0]), "probs", "at least one class"),
    "a price in words": (
        lambda: js.least_cost_decision(F, np.eye(3), abstention_cost="high"),
        "abstention_cost must be an array of numbers",
        "got str",
    ),
    "a seed": (lambda: js.adaptive_scores(F, key=0), "key must be a key", "got int"),
    "logits of 2 classes": (
        lambda: js.VectorScaling(jnp.ones(3), jnp.zeros(3)).logits(F[:, :2]),
        "w",
        r"\(2,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_static_mistakes_name_argument_got_and_wanted(mistake, our_errors):
    call, argument, detail = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match=f"(?s){argument}.*{detail}"):
        jax.eval_shape(call)


# python -m experiments.decisions


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run folder with weights from least squares, which are far from calibrated."""
    digits = data.load("digits")
    x = np.asarray(pixels(digits.train_images), np.float64)
    w = np.linalg.lstsq(x, np.eye(10)[digits.train_labels], rcond=None)[0]
    folder = tmp_path_factory.mktemp("runs")
    config = {
        "settings": {},
        "dataset": "digits",
        "fingerprint": digits.fingerprint,
        "class_names": digits.class_names,
        "image_shape": [8, 8],
    }
    run_folder.create(folder, config)
    run_folder.save(folder, js.SoftmaxRegression(jnp.float32(w), jnp.zeros(10)))
    return folder


@pytest.fixture(scope="module")
def experiment(digits_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decisions")
    arguments = ["--quick", "--run", str(digits_run), "--out", str(folder)]
    with jax.numpy_dtype_promotion("standard"):
        main(decisions.run, decisions.Settings, arguments, program="decisions")
    return folder, json.loads((folder / "decisions.json").read_text())


def test_experiment_leaves_a_page_numbers_and_figures(experiment):
    folder, found = experiment
    page = (folder / "decisions.md").read_text()
    assert page.count("\n## ") == 4
    for name in ("reliability", "reliability_by_heart", "abstention", "conformal"):
        assert f"]({name}.png)" in page
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture).std() > 5
    assert found["held_out"] + found["reported"] == 359
    assert found["environment"]["jax"]


def test_experiment_finds_what_calibration_and_costs_are_worth(experiment):
    for of in experiment[1]["classifiers"].values():
        mean = {name: value["mean"] for name, value in of.items() if "mean" in value}
        before, scaled, _ = mean["loss"]
        assert scaled < before
        assert mean["ece"][1] < mean["ece"][0]
        assert mean["accuracy"][0] == mean["accuracy"][1] <= mean["top_3_accuracy"][0]
        assert mean["least_cost"][1] < mean["argmax_cost"]
        # One split's coverage on so few rows has a deviation of 0.04 at the most.
        missed = 1 - np.array(mean["coverage"])
        assert (missed < np.array([0.2, 0.1, 0.05, 0.01]) + 4 * 0.04).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--run", "no/such/run"], "There is no run folder"),
        (["--costly", "eleven"], "no class 'eleven': --costly takes one of"),
        (["--times", "0"], "finite float32 number above 0, got 0"),
        (
            ["--times", "nan"],
            "finite float32 number above 0, got nan",
        ),
        (["--splits", "0"], "--splits must be at least 1, got 0"),
        (["--splits", "1000000000"], "--splits must be at most 1000, got 1000000000"),
        (["--seed", "-1"], "--seed must be in"),
        (["--data-dir", "no/such/folder"], "does not exist"),
        (["--out", "FILE/decisions"], "cannot be written"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_experiment_refuses_bad_input(
    digits_run, tmp_path, capsys, arguments, sentence
):
    (tmp_path / "file").touch()
    if "--run" not in arguments and "--data-dir" not in arguments:
        arguments = ["--run", str(digits_run), *arguments]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    arguments = [text.replace("FILE", str(tmp_path / "file")) for text in arguments]
    with pytest.raises(SystemExit) as stop:
        main(decisions.run, decisions.Settings, arguments, program="decisions")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.parametrize("equal_mass", [False, True])
def test_bins_of_millions_of_rows(equal_mass):
    """A float32 to which one row after the other is added is off long before 2^24."""
    rows = 2**24 + 2**22
    confidence = np.float32(0.9) + np.arange(rows, dtype=np.float32) * np.float32(2e-9)
    p = jnp.stack((confidence, 1 - confidence), axis=1)
    y = jnp.zeros(rows, int).at[::8].set(1)
    found = js.reliability(p, y, bins=2, equal_mass=equal_mass)
    assert found.rows.sum() == rows
    mean = np.average(found.confidence, weights=found.rows)
    np.testing.assert_allclose(mean, confidence.mean(dtype=np.float64), rtol=1e-6)
    hit = np.average(found.accuracy, weights=found.rows)
    np.testing.assert_allclose(hit, 7 / 8, rtol=1e-6)


def test_a_brier_score_of_a_million_rows_is_its_parts():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.93, 0.9999, 10**6).astype(np.float32)
    p = np.stack((confidence, 1 - confidence), axis=1)
    y = (random.random(10**6) > confidence).astype(int)
    found = js.brier_decomposition(p, y)
    exact = ((np.float64(p) - np.eye(2)[y]) ** 2).sum(1).mean()
    parts = found.reliability - found.resolution + found.uncertainty + found.within
    np.testing.assert_allclose(parts, exact, atol=1e-6)
    assert found.reliability < 1e-6


@pytest.mark.usefixtures("our_errors")
def test_a_rate_that_is_no_python_number():
    scores, labels = jnp.arange(9.0)[:, None], jnp.zeros(9, int)
    plain = js.conformal_threshold(scores, labels, miss_rate=0.1)
    for kind in (np.float32, jnp.float32):
        assert js.conformal_threshold(scores, labels, miss_rate=kind(0.1)) == plain == 0


def test_abstaining_has_to_cost_less():
    probs = jnp.array([[0.25, 0.75], [0.5, 0.5]])
    decided = js.least_cost_decision(probs, 1 - jnp.eye(2), abstention_cost=0.25)
    assert decided.tolist() == [1, -1]


def test_a_temperature_far_below_the_largest_logit():
    z = np.float32([[1, 0]] + 4 * [[1e-15, 0]])
    got = js.temperature_scaling(z, np.array([0, 0, 0, 0, 1])).temperature
    np.testing.assert_allclose(got, 1e-15 / np.log(3), rtol=1e-5)


def test_expected_costs_are_products_of_highest_precision():
    program = jax.jit(js.expected_costs).lower(jnp.ones((4, 2)), jnp.ones((2, 3)))
    text = program.as_text()
    assert text.count("dot_general") == text.count("[HIGHEST, HIGHEST]") == 1


def test_bins_of_almost_equal_mass():
    p = np.float32([0.6, 0.7, 0.8, 0.9, 0.95])
    probs, labels = np.stack((p, 1 - p), 1), np.zeros(5, int)
    found = js.reliability(probs, labels, bins=2, equal_mass=True)
    np.testing.assert_array_equal(found.rows, [3, 2])
