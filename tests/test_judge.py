"""The judge of compare_gradients: no false verdict, and none that a rule bends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax as js
from jax_softmax import closed_form, compare_gradients
from jax_softmax._gradient_digits import in_decimals
from jax_softmax._gradient_judge import float64

FORM = ("closed form",)


def stable_form(z, y):
    return jax.nn.logsumexp(z) - z[y]


@pytest.mark.parametrize("margin", [10.0, 16.0, 25.0, 30.0, 40.0, 60.0, 85.0])
def test_a_certain_model_is_no_reason_for_doubt(margin):
    """There float64 differences are 0 where the derivative is 1e-20."""
    z = jnp.array([margin, 0.0, 0.0])
    report = compare_gradients(
        stable_form, closed_form.cross_entropy_gradient, z, jnp.array(0)
    )
    assert report.doubts == ()


@pytest.mark.parametrize(
    ("function", "form", "x"),
    [
        (lambda x: jnp.sum(1 / x), lambda x: -1 / x**2, jnp.array([1e-9])),
        (jax.nn.logsumexp, js.softmax, jnp.array([1e7, 1e7, 1e7])),
        # By float64 differences, since decimals have no sine, nor our exponentials.
        (lambda x: jnp.sin(1e6 * x), None, jnp.array(0.3)),
        (lambda x: jnp.sum(jnp.sin(1 / x)), None, jnp.array([1e-5, 1e-6])),
        (js.logsumexp, js.softmax, jnp.array([1e5, 1e5, 1e5])),
        (js.logsumexp, js.softmax, jnp.array([1e9, 1e9, 1e9])),
    ],
)
def test_functions_that_bend_on_another_scale_are_smooth_all_the_same(
    function, form, x
):
    report = compare_gradients(function, form, x)
    assert report.doubts == ()
    if form is not None:
        report.raise_if(ulp=2, methods=FORM)


@pytest.mark.parametrize("kinked", [jnp.abs, jax.nn.relu, lambda x: jnp.abs(x) ** 0.5])
def test_a_kink_stays_one_in_decimals_and_without(kinked):
    x = jnp.array([1.0, 0.0, -2.0])
    for function in (kinked, lambda x: kinked(x) + jnp.sin(x)):
        report = compare_gradients(lambda x, f=function: jnp.sum(f(x)), None, x)
        assert "not differentiable at x[1]" in report.doubts[0]


def test_a_wrong_rule_shows_in_one_small_entry_that_no_probe_meets():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    scales = jnp.ones(1000).at[777].set(1e-7)
    factors = jnp.full(1000, 2.0).at[777].set(3.0)

    @jax.custom_vjp
    def squares(x):
        return jnp.sum(scales * x**2)

    squares.defvjp(lambda x: (squares(x), x), lambda x, g: (g * factors * scales * x,))
    report = compare_gradients(squares, None, x, probes=1)
    assert "contradicted by the function in decimals" in report.doubts[0]


@pytest.mark.parametrize("order", [1, 2])
def test_a_derivative_of_zero_is_no_kink(order):
    report = compare_gradients(lambda x: jnp.sum(x**4), None, jnp.zeros(3), order=order)
    assert report.doubts == ()
    assert any("are 0: nothing is compared" in note for note in report.notes)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: jnp.take(x, jnp.array([0, 7]), mode="fill", fill_value=3.0), 3),
        (lambda x: jnp.where(x.astype(bool), x**2, 0), 3),
        (lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 2]), num_segments=2), 3),
        (lambda x: x.at[jnp.array([0, 9])].get(mode="fill", fill_value=-2.0), 3),
        (lambda x: (x - 0.5)[:, None] ** jnp.arange(4), 3),
        (lambda x: jax.lax.round(5 * x) * x, 3),
        (lambda x: jnp.round(5 * x) * x, 3),
        (lambda x: x @ x, 3),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.square, jnp.exp, x), 3),
        (jnp.prod, 3),
    ],
)
def test_decimals_read_programs_as_float64_does(function, x):
    def summed(x):
        return jnp.sum(function(x) ** 2)

    with float64():
        x = 0.5 + jnp.arange(float(x))
        for f in (summed, jax.grad(summed)):
            np.testing.assert_allclose(in_decimals(f)(x), f(x), rtol=1e-13)


def test_long_loops_are_not_run_in_decimals():
    with float64(), pytest.raises(NotImplementedError, match="take too long"):
        in_decimals(lambda x: x * jax.lax.fori_loop(0, 10**6, lambda i, n: n + i, 0))(
            jnp.ones(())
        )


def test_random_numbers_of_each_trace_are_noticed():
    random = np.random.default_rng(0)
    report = compare_gradients(lambda x: x * float(random.normal()), None, jnp.ones(()))
    assert "another one each time that it is traced" in report.doubts[0]
    key = jax.random.key(0)
    report = compare_gradients(
        lambda x: 1e5 + x * jax.random.normal(key, (), x.dtype), None, jnp.ones(())
    )
    assert "draws random numbers" in report.doubts[0]


def test_infinity_is_right_where_the_exact_number_does_not_fit():
    report = compare_gradients(
        lambda x: jnp.sum(jnp.exp(x)), jnp.exp, jnp.array([99.0])
    )
    assert np.isinf(report.row("x", "closed form").got)
    report.raise_if(ulp=1, methods=FORM)


def test_the_tool_itself_makes_no_nan_for_jax_debug_nans():
    with jax.debug_nans(True):
        report = compare_gradients(
            lambda x: jnp.sum(x * jnp.log(x)), None, jnp.array([1e-7, 1.0])
        )
    assert report.doubts == ()


def test_a_factor_of_the_large_entries_is_not_said_of_all():
    scales = jnp.array([1.0, 1e-3])
    report = compare_gradients(
        lambda x: jnp.sum(scales * x), lambda x: jnp.array([-1.0, 1e-3]), jnp.ones(2)
    )
    assert "closed form of x is minus the judge's in its large entries" in report.notes
