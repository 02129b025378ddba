"""Partitions are a commutative monoid: any cut of a row gives the same two numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jax_softmax import softmax
from jax_softmax._exponential import RAISED, raised_exp, row_scale
from jax_softmax._logarithm import log1p
from jax_softmax._partition import (
    Partition,
    compensated_sum,
    log_partition,
    merge,
    partition,
)

pytestmark = pytest.mark.usefixtures("strict_types")

LOGITS = st.one_of(
    st.floats(-100, 100, width=32), st.sampled_from([0.0, -np.inf, 1e9, -1e6])
)
ROWS = arrays(np.float32, 24, elements=LOGITS)
EMPTY = Partition(jnp.float32(-jnp.inf), jnp.float32(-(2.0**RAISED)))

whole = jax.jit(partition)


@jax.jit
def merged(*parts):
    return merge(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))


probs_of = jax.jit(softmax)


def close(a, b):
    for got, wanted in zip(a[:2], b[:2], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("place", [None, "as_on_accelerators"])
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_sums_of_either_sign(n, place, request):
    if place:
        request.getfixturevalue(place)
    terms = np.random.default_rng(n).normal(size=(50, n)).astype(np.float32)
    got = jax.jit(lambda terms: compensated_sum(terms))(terms)
    exact = np.array([math.fsum(row) for row in terms.tolist()])
    assert (abs(np.asarray(got) - exact) <= np.spacing(abs(terms).sum(-1))).all()


@pytest.mark.usefixtures("elsewhere")
def test_infinite_sums_on_accelerators():
    for row in ([np.inf], [np.inf, 1.0], [-np.inf] + 20 * [1.0]):
        assert compensated_sum(jnp.array([row])) == sum(row)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_two_halves_merge_into_the_row(row):
    left, right = whole(row[:12]), whole(row[12:])
    close(merged(left, right), whole(row))
    close(merged(left, right), merged(right, left))


@pytest.mark.parametrize("parts", [4, 64, 1000])
def test_merging_many_is_as_accurate_as_none(parts):
    """However many they are: -log p of the likeliest class is log1p(tail)."""
    rng = np.random.default_rng(parts)
    scales = np.array([0.1, 1, 3, 10, 30])[:, None]
    z = (scales * rng.normal(size=(5, parts * 6))).astype(np.float32)
    z[:, 0] += 9 * scales[:, 0]  # often alone with its part at the maximum
    cut = jnp.moveaxis(z.reshape(5, parts, 6), 1, 0)
    found = jax.jit(lambda cut: log1p(merge(partition(cut)).tail))(cut)
    exact = -ref.at(ref.softmax(z).log_probs, z.argmax(-1))
    assert ref.ulp_error(found, exact).max() <= 2


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_merging_is_associative(row):
    a, b, c = (whole(row[i : i + 8]) for i in (0, 8, 16))
    close(merged(merged(a, b), c), merged(a, merged(b, c)))


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_the_empty_row_changes_nothing(row):
    part = whole(row)
    close(merged(part, EMPTY), part)
    close(merged(EMPTY, part), part)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_order_does_not_matter(row, random):
    order = list(range(len(row)))
    random.shuffle(order)
    close(whole(row[order]), whole(row))
    if np.isfinite(row).any():
        np.testing.assert_allclose(
            probs_of(row[order]), probs_of(row)[np.array(order)], rtol=1e-6
        )


@settings(max_examples=60, deadline=None)
@given(ROWS.filter(lambda row: np.isfinite(row).any()))
def test_lse_lies_between_the_maximum_and_log_n_above(row):
    lse = float(log_partition(whole(row)))
    top = float(row.max())
    assert top <= lse <= np.nextafter(np.float32(top + np.log(24)), np.float32(np.inf))


@pytest.mark.parametrize("top", [0.0, 0.7, -80.0, 1e6, 3.4e38, np.inf])
@pytest.mark.parametrize("classes", [16, 17, 1000, 1031, 5000])
def test_tops_are_counted_wherever_they_stand(classes, top):
    """Next to each other, a slice apart or everywhere, above -inf or finite logits."""
    for tops in (slice(None, 3), slice(None, None, 128), slice(None)):
        for rest in (-np.inf, -3e38):
            row = np.full(classes, rest, np.float32)
            row[tops] = top
            ties = len(row[tops]) - 1
            found = whole(row)
            assert found.max == np.float32(top)
            assert ref.ulp_error(found.tail, ref.exact(np.float64(ties))) <= 2


@pytest.mark.parametrize("classes", [10, 33, 901, 5000])
def test_logits_that_the_compiler_knows_give_the_same(classes):
    """By hand, operation by operation, and as constants of a program."""
    row = np.linspace(-9, 9, classes).astype(np.float32)
    logits = jnp.asarray(-(row**2) / 2)
    for found in (partition(logits), jax.jit(lambda: partition(logits))()):
        close(found, whole(logits))


@pytest.mark.parametrize("top", [0.0, -1.7, 50.0, -80.0, 150.0, 1e6])
def test_exponentials_of_a_row_before_they_are_scaled(top):
    rng = np.random.default_rng(0)
    below = np.concatenate([rng.exponential(size, 50_000) for size in (0.01, 1, 20)])
    z = (top - below).astype(np.float32)
    scale = row_scale(jnp.full(1, top, jnp.float32))
    found, rest, is_top = jax.jit(lambda z: raised_exp(z, scale))(z)
    np.testing.assert_array_equal(is_top, z == np.float32(top))
    pivot, exponent = (np.longdouble(part[0]) for part in (scale.pivot, scale.exponent))
    high = np.exp(z - pivot) * np.exp2(RAISED - exponent)
    exact = ref.Exact(np.float64(high), np.float64(high - np.float64(high)))
    counts = high > np.exp2(RAISED - 126)  # the others' probability is below float32
    assert ref.ulp_error(found + rest, exact)[counts].max() <= 0.75
