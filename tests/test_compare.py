"""compare_gradients finds what is wrong, passes what is right, and leaves no trace."""

import json
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_softmax._closed_form import log_softmax_vjp, softmax_jacobian, softmax_vjp
from jax_softmax._closed_form_losses import (
    cross_entropy_gradient,
    cross_entropy_hessian,
    cross_entropy_hvp,
)
from jax_softmax._closed_form_regression import regression_gradient, regression_hvp
from jax_softmax._compare import compare_gradients
from jax_softmax._gradient_digits import in_decimals
from jax_softmax._gradient_judge import float64
from jax_softmax._gradient_report import errors_in_ulp

pytestmark = pytest.mark.usefixtures("strict_types")

# The sums of these tests cancel, so their entries are measured beside the largest one.
compare_sums = partial(compare_gradients, floor=1.0, probes=4)
FORM = ("closed form",)


def nll(logits, labels):
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def objective(w, b, x, labels):
    return jnp.mean(nll(x @ w + b, labels)) + 0.1 / 2 * jnp.sum(w**2)


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


W, B, X = draw(4, 4), draw(4, seed=1), draw(6, 4, seed=2)
LABELS = jnp.array([0, 1, 2, 3, 1, 0])
Z = draw(3, 4, seed=3)
IDS = jnp.array([0, 3, 1])


def right(w, b, x, labels):
    return regression_gradient(w, b, x, labels, l2=0.1)


def test_a_right_closed_form_passes_with_every_method_in_the_table():
    report = compare_sums(objective, right, W, B, X, LABELS, argnums=(0, 1))
    report.raise_if(ulp=8)
    assert report.doubts == ()
    methods = ["reverse", "forward", "closed form", "central", "richardson"]
    methods.append("complex step")
    expected = [(leaf, m) for leaf in ("w", "b") for m in methods]
    assert [(row.leaf, row.method) for row in report.rows] == expected
    reverse, forward = report.row("w", "reverse"), report.row("w", "forward")
    assert (reverse.checked, forward.checked, forward.size) == (16, 4, 16)
    assert report.row("b", "central").max_rel < 1e-2
    assert report.row("w", "complex step").max_ulp < 8


def sign(w, b, x, labels):
    dw, db = right(w, b, x, labels)
    return -dw, db


def no_mean(w, b, x, labels):
    dw, db = regression_gradient(w, b, x, labels)
    return len(x) * dw + 0.1 * w, len(x) * db


def transposed(w, b, x, labels):
    dw, db = right(w, b, x, labels)
    return dw.T, db


@pytest.mark.parametrize(
    ("wrong", "leaf", "hint"),
    [
        (sign, "w", "closed form of w is minus the judge's everywhere"),
        (no_mean, "b", "closed form of b is 6 times the judge's everywhere"),
        (transposed, "w", "closed form of w is the transpose of the judge's"),
    ],
)
def test_a_planted_error_is_found_and_named(wrong, leaf, hint):
    report = compare_sums(objective, wrong, W, B, X, LABELS, argnums=(0, 1))
    assert report.row(leaf, "closed form").max_ulp > 1e5
    assert hint in report.notes
    assert report.doubts == ()
    report.raise_if(ulp=8, methods=["reverse", "forward"])
    row = report.row(leaf, "closed form")
    where = str(list(row.at)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(
        AssertionError, match=rf"closed form of {leaf}{where} is .* ULP"
    ):
        report.raise_if(ulp=8)


def test_a_dropped_mask_is_found():
    where = jnp.array([True, False, True, True, False, True])

    def masked(w, b, x, labels, where):
        losses = jnp.where(where, nll(x @ w + b, labels), 0)
        return jnp.sum(losses) / jnp.sum(where.astype(losses.dtype))

    def good(w, b, x, labels, where):
        return regression_gradient(w, b, x, labels, where=where)[0]

    def wrong(w, b, x, labels, where):
        return regression_gradient(w, b, x, labels)[0]

    forms = {"masked": good, "dropped": wrong}
    report = compare_sums(masked, forms, W, B, X, LABELS, where)
    report.raise_if(ulp=8, methods=["masked", "reverse"])
    with pytest.raises(AssertionError, match="dropped of w"):
        report.raise_if(ulp=8)


def test_a_stale_softcap_derivative_is_found():
    def capped(logits, labels):
        return jnp.sum(nll(2 * jnp.tanh(logits / 2), labels))

    def stale(logits, labels):
        return cross_entropy_gradient(2 * jnp.tanh(logits / 2), labels)

    forms = {"right": partial(cross_entropy_gradient, softcap=2.0), "stale": stale}
    report = compare_sums(capped, forms, Z, IDS)
    report.raise_if(ulp=8, methods=["right"])
    with pytest.raises(AssertionError, match="stale of logits"):
        report.raise_if(ulp=8)


def test_a_wrong_hessian_product_is_found():
    def form(w, b, x, labels, tangent, l2=0.1):
        return regression_hvp(w, b, x, tangent, l2=l2)

    forms = {"right": form, "no penalty": partial(form, l2=0.0)}
    compare = partial(compare_sums, argnums=(0, 1), order=2)
    report = compare(objective, forms, W, B, X, LABELS)
    report.raise_if(ulp=16, methods=["reverse", "forward", "right"])
    assert report.row("w", "richardson").max_rel < 0.1
    assert report.row("w", "forward").checked == W.size
    with pytest.raises(AssertionError, match="no penalty of w"):
        report.raise_if(ulp=16)


def test_the_whole_hessian_when_asked():
    report = compare_sums(
        lambda logits, labels: nll(logits[None], labels)[0],
        lambda logits, labels: cross_entropy_hessian(logits[None], labels)[0],
        *(Z[0], IDS[:1]),
        order=2,
        full_jacobian=True,
    )
    report.raise_if(ulp=8)
    assert report.row("d logits / d logits", "forward").size == 16


def test_a_vector_valued_function_is_met_through_a_cotangent():
    softmax = jax.nn.softmax
    report = compare_sums(softmax, softmax_vjp, Z)
    report.raise_if(ulp=8)
    assert report.row("x", "closed form").size == Z.size
    given = compare_sums(softmax, softmax_vjp, Z, cotangent=jnp.ones_like(Z))
    assert abs(given.row("x", "reverse").exact) < 1e-12
    assert compare_sums(softmax, lambda z, c: -softmax_vjp(z, c), Z).notes[1:] == (
        "closed form of x is minus the judge's everywhere",
    )


def test_a_vector_valued_function_at_order_two():
    def form(logits, labels, cotangent, tangent):
        return cotangent[:, None] * cross_entropy_hvp(logits, labels, tangent)

    report = compare_sums(nll, form, Z, IDS, order=2)
    report.raise_if(ulp=8, methods=FORM)
    report.raise_if(ulp=64)


def test_the_whole_jacobian_when_asked():
    z = Z[0]
    report = compare_sums(jax.nn.softmax, softmax_jacobian, z, full_jacobian=True)
    report.raise_if(ulp=8)
    row = report.row("d out / d x", "closed form")
    assert (row.size, len(row.at)) == (16, 2)


class Model(NamedTuple):
    w: jax.Array
    b: jax.Array


def test_pytrees_with_integer_leaves_to_pytrees():
    def function(batch, model):
        losses = nll(batch["x"] @ model.w + model.b, batch["labels"])
        return {"loss": jnp.mean(losses), "count": jnp.array(6)}

    def form(batch, model, cotangent):
        g = cotangent["loss"]
        assert cotangent["count"] is None
        dw, db = regression_gradient(*model, batch["x"], batch["labels"])
        residual = jax.grad(lambda z: jnp.mean(nll(z, batch["labels"])))(
            batch["x"] @ model.w + model.b
        )
        return Model(g * dw, g * db), {"x": g * residual @ model.w.T, "labels": None}

    batch = {"x": X, "labels": LABELS}
    report = compare_sums(function, form, batch, Model(W, B), argnums=(1, 0))
    report.raise_if(ulp=16)
    assert [r.leaf for r in report.rows if r.method == "reverse"] == [
        "model.w",
        "model.b",
        "batch['x']",
    ]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda w, b, x, y: right(w, b, x, y)[0].T[:3],
            r"closed form of w: got float32",
        ),
        (lambda w, b, x, y: right(w, b, x, y), r"closed form of w: got tuple"),
        (
            lambda w, b, x, y: None,
            r"closed form of w: got NoneType, wanted float32",
        ),
        (lambda w, b, x, y: np.asarray(w, np.float64), r"got float64\[4, 4\], wanted"),
    ],
)
def test_a_closed_form_of_another_shape_is_refused(form, message):
    with pytest.raises(ValueError, match=message):
        compare_sums(objective, form, W, B, X, LABELS)


def test_a_closed_form_of_another_structure_is_refused():
    with pytest.raises(ValueError, match=r"closed form: got .*, wanted PyTreeDef"):
        compare_sums(
            objective, lambda *args: right(*args)[0], W, B, X, LABELS, argnums=(0, 1)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_gradients(jnp.sum, None, Z, order=3), "order: got 3"),
        (lambda: compare_gradients(jnp.sum, None, Z, probes=0), "probes: got 0"),
        (lambda: compare_gradients(jnp.sum, None, Z, step=0.0), "step: got 0.0"),
        (lambda: compare_gradients(jnp.sum, None, Z, step=np.nan), "step: got nan"),
        (lambda: compare_gradients(jnp.sum, None, Z, floor=-1), "floor: got -1"),
        (lambda: compare_gradients(jnp.sum, None, Z, floor=np.nan), "floor: got nan"),
        (lambda: compare_gradients(jnp.sum, None, Z, argnums=1), "argnums: got 1"),
        (
            lambda: compare_gradients(jnp.exp, None, Z, cotangent=jnp.ones(3)),
            r"cotangent: got \(3,\), wanted \(3, 4\)",
        ),
        (
            lambda: compare_gradients(jnp.exp, None, Z, order=2, full_jacobian=True),
            "wanted a scalar result",
        ),
    ],
)
def test_bad_options_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("function", "arg", "message"),
    [
        (jnp.sum, jnp.array([1, 2]), "argnums=0: got no floating-point array"),
        (jnp.sum, jnp.array([1j]), "complex64, wanted a real type"),
        (jnp.argmax, Z, "function: got no floating-point result"),
        (jnp.sum, "text", "args: got 'text', wanted arrays and numbers"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(function, arg, message):
    with pytest.raises(TypeError, match=message):
        compare_gradients(function, None, arg)


def test_ties_are_said_plainly():
    report = compare_gradients(jnp.max, None, jnp.array([1.0, 3.0, 3.0]))
    assert report.doubts == (
        "not differentiable at a[1]: the slope is 0 from below and 1 from above "
        "(and at 1 more of the probed entries)",
    )
    with pytest.raises(AssertionError, match="in doubt: not differentiable"):
        report.raise_if(ulp=8)
    report.raise_if(ulp=8, ignore_doubts=True)
    # No tie, no doubt: not even one step of float32 away.
    near = jnp.array([1.0, 3.0, np.nextafter(np.float32(3), np.float32(4))])
    report = compare_gradients(jnp.max, None, near)
    report.raise_if(ulp=0)
    assert any(
        note.startswith("a kink or a sharp bend is near a[1]") for note in report.notes
    )


def test_a_kink_that_no_probe_meets_is_met_by_a_random_line():
    x = jnp.ones(1000).at[777].set(0.0)
    report = compare_gradients(lambda x: jnp.sum(jnp.abs(x)), None, x, probes=2)
    assert "not differentiable in x: along a random line" in report.doubts[0]


def test_a_root_and_a_jump_are_kinks():
    zero = jnp.zeros(())
    root = compare_gradients(lambda x: jnp.sqrt(jnp.abs(x)), None, zero)
    jump = compare_gradients(lambda x: jnp.where(x < 0, 0.0, 1.0), None, zero)
    bend = compare_gradients(lambda x: jax.nn.relu(x) ** 1.0, None, zero + 1, order=2)
    relu = compare_gradients(jax.nn.relu, None, zero, order=2)
    for report in (root, jump, relu):
        assert "not differentiable at" in report.doubts[0]
    assert bend.doubts == ()


@jax.custom_vjp
def wrong_rule(x):
    return jnp.sum(x**2)


wrong_rule.defvjp(lambda x: (wrong_rule(x), x), lambda x, g: (g * x,))


def test_a_wrong_custom_rule_does_not_judge_itself_right():
    report = compare_gradients(wrong_rule, lambda x: x, Z)
    assert report.row("x", "closed form").max_ulp == 0
    assert "float64 differences contradict the judge at x[" in report.doubts[0]
    assert any(note.startswith("forward does not apply") for note in report.notes)
    with pytest.raises(AssertionError, match="a derivative rule is wrong"):
        report.raise_if(ulp=8)
    plain = compare_gradients(
        wrong_rule, lambda x: 2 * x, Z, judge=lambda x: jnp.sum(x**2)
    )
    assert plain.doubts == ()
    plain.raise_if(ulp=0, methods=FORM)
    assert plain.row("x", "reverse").max_rel == pytest.approx(0.5)


def test_a_rule_that_is_nearly_right_is_no_kink():
    @jax.custom_jvp
    def cube(x):
        return x**3

    cube.defjvp(lambda p, t: (p[0] ** 3, t[0] * 3.00001 * p[0] ** 2))
    report = compare_gradients(lambda x: jnp.sum(cube(x)), None, Z)
    assert "float64 differences contradict the judge at x[" in report.doubts[0]
    assert not any("kink" in note for note in report.notes)


def test_a_hidden_gradient_is_a_doubt():
    report = compare_gradients(
        lambda x: jnp.sum(x * jax.lax.stop_gradient(x)), None, Z, probes=4
    )
    assert "stop_gradient hides a term" in report.doubts[0]


def test_a_nan_gradient_of_a_finite_function_is_a_doubt():
    def unsafe(x):
        return jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0))

    report = compare_gradients(unsafe, None, jnp.array([1.0, 0.0, 2.0]))
    assert report.doubts


def test_a_judge_that_is_not_in_float64_is_a_doubt():
    def narrow(x):
        return jnp.sum(jnp.sin(x.astype(jnp.float32)))

    def narrow_complex(x):
        return jnp.sum(jnp.abs(x.astype(jnp.complex64)))

    for function in (narrow, narrow_complex):
        report = compare_gradients(function, None, Z, probes=4)
        said = "the judge leaves float64 on the way (convert_element_type"
        assert said in report.doubts[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_are_no_part_of_what_decimals_judge(dtype):
    def plain(z, y):
        return jnp.sum(nll(z.astype(jnp.float32), y))

    def form(z, y):
        return cross_entropy_gradient(z.astype(jnp.float32), y).astype(z.dtype)

    report = compare_gradients(plain, form, Z.astype(dtype), IDS)
    report.raise_if(ulp=4, methods=FORM)
    assert any("leaves out a cast on the way" in note for note in report.notes)

    @jax.custom_vjp
    def wrong(x):
        return jnp.sum(x.astype(jnp.float32) ** 2)

    wrong.defvjp(lambda x: (wrong(x), x), lambda x, g: (g.astype(x.dtype) * x,))
    report = compare_gradients(wrong, None, Z.astype(dtype))
    assert "contradicted by the function in decimals" in report.doubts[0]


@pytest.mark.parametrize("margin", [20.0, 60.0])
def test_the_judge_keeps_the_digits_that_float64_loses(margin):
    """p_y - 1 is 0 in float64 at a margin of 60, by autodiff of the plain function."""
    z, label = jnp.array([[margin, 0.0, 0.0]]), jnp.array([0])
    report = compare_gradients(
        lambda z, y: jnp.sum(nll(z, y)), cross_entropy_gradient, z, label, probes=1
    )
    report.raise_if(ulp=4, methods=FORM)
    assert report.row("z", "reverse").max_ulp > 1e6
    assert "60 decimal digits" in report.notes[0]


def test_what_decimals_cannot_do_is_judged_in_float64_and_it_says_so():
    report = compare_gradients(lambda x: jax.lax.erf(x), None, draw(2), probes=1)
    report.raise_if(ulp=8)
    assert "in float64 (not in decimals: erf)" in report.notes[0]


def test_decimals_and_float64_run_the_same_programs():
    def mixture(w, x):
        def step(carry, row):
            return jnp.tanh(carry @ w) + jnp.clip(row, -1, 1), jnp.max(carry * row)

        last, tops = jax.lax.scan(step, x[0], x)
        picked = jnp.take_along_axis(x, jnp.array([[0], [2], [1]]), axis=1)
        plain = jnp.where(x > 0, jnp.sqrt(jnp.abs(x)), jnp.log1p(jnp.exp(x)))
        return jnp.sum(jax.nn.softmax(last)[::-1] ** 3) + jnp.mean(
            jnp.concatenate([tops, picked[:, 0]]) * jax.nn.sigmoid(plain).sum(0)[0]
        )

    with float64():
        w, x = draw(3, 3, dtype="float64"), draw(3, 3, seed=1, dtype="float64")
        exact = in_decimals(jax.grad(mixture, (0, 1)))(w, x)
        found = jax.jit(jax.grad(mixture, (0, 1)))(w, x)
    for got, wanted in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_callers_config_is_unchanged_and_the_scope_is_reported(enabled):
    scope = float64() if enabled else jax.default_matmul_precision("highest")
    with scope:
        before = jnp.zeros(()).dtype
        report = compare_sums(jax.nn.softmax, softmax_vjp, Z)
        assert jnp.zeros(()).dtype == before == ("float64" if enabled else "float32")
        with pytest.raises(ZeroDivisionError):
            compare_sums(lambda z: 1 / 0, softmax_vjp, Z)
        assert jnp.zeros(()).dtype == before
    was = "was on already" if enabled else "is off outside, as before"
    assert report.notes[0].endswith(f"x64 was needed: inside this call, by "
                                    f"jax.enable_x64; it {was}")  # fmt: skip


def test_captured_arrays_may_be_narrow_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        report = compare_sums(lambda w: jnp.sum(jnp.tanh(X @ w)), None, W)
    report.raise_if(ulp=8)


def test_float64_arguments_are_judged_by_more_digits():
    with float64():
        z = draw(3, 4, dtype="float64")
        report = compare_sums(jax.nn.log_softmax, log_softmax_vjp, z)
        report.raise_if(ulp=16)
        by_equals = compare_sums(lambda x: jax.lax.erf(x), None, z)
    assert report.row("x", "closed form").dtype == "float64"
    assert report.notes[0].endswith("60 decimal digits")
    assert "float64 themselves" in by_equals.notes[0]
    assert report.row("x", "richardson").max_rel < 1e-8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_are_measured_in_their_own_ulp(dtype):
    report = compare_sums(jax.nn.log_softmax, log_softmax_vjp, Z.astype(dtype))
    row = report.row("x", "closed form")
    assert row.dtype == dtype
    assert row.max_ulp <= 2


def test_large_arguments_cost_a_bounded_number_of_evaluations():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(jnp.sin(x))

    report = compare_gradients(counted, jnp.cos, jnp.ones(100_000), probes=3)
    jax.effects_barrier()
    assert len(calls) < 100
    assert (report.row("x", "central").checked, report.row("x", "reverse").checked) == (
        3,
        100_000,
    )


def test_the_worst_entry_is_among_the_probes():
    def wrong(x):
        return jnp.cos(x).at[4321].mul(1.5)

    compare = partial(compare_gradients, lambda x: jnp.sum(jnp.sin(x)), wrong, probes=2)
    report = compare(jnp.linspace(0.1, 1.0, 10_000))
    assert report.row("x", "closed form").at == (4321,)
    reports = [compare(jnp.linspace(0.1, 1.0, 10_000), seed=s).rows for s in (0, 0)]
    assert reports[0] == reports[1]


def test_infinite_logits_are_left_alone():
    z, labels = jnp.array([[1.0, -jnp.inf, 0.5]]), jnp.array([0])
    report = compare_gradients(
        lambda z, y: jnp.sum(nll(z, y)), cross_entropy_gradient, z, labels
    )
    report.raise_if(ulp=8)
    assert report.row("z", "forward").checked == 2


def test_a_function_that_no_complex_number_passes_says_so():
    report = compare_gradients(lambda x: jnp.sum(jnp.abs(x) * x), None, Z, probes=4)
    assert report.doubts == ()
    assert any("complex step does not apply" in note for note in report.notes)


def test_complex_results_are_left_alone():
    report = compare_gradients(
        lambda x: (x**2, x.astype(complex)), lambda x, g: 2 * x * g[0], Z, probes=4
    )
    report.raise_if(ulp=1, methods=FORM)
    assert report.row("x", "complex step").max_ulp < 4


def test_what_overflows_in_float64_is_judged_right():
    def naive(z):
        return jnp.log(jnp.sum(jnp.exp(z)))

    report = compare_gradients(naive, jax.nn.softmax, jnp.array([1000.0, 0.0]))
    report.raise_if(ulp=0, methods=FORM)
    assert report.row("z", "reverse").max_ulp == math.inf


def test_random_numbers_that_depend_on_the_type_are_noticed():
    def noisy(x, key):
        return jnp.sum(x * jax.random.normal(key, x.shape, x.dtype))

    report = compare_gradients(noisy, None, Z, jax.random.key(0), probes=4)
    assert any("the value itself is" in note for note in report.notes)
    assert "draws random numbers" in report.doubts[0]

    def of_one_type(x, key):
        return jnp.sum(x * jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype))

    def shuffled(x, key):  # and 1 - cos loses its digits
        order = jax.random.permutation(key, jnp.arange(x.size, dtype=jnp.int32))
        return jnp.sum((1 - jnp.cos(1e-4 * x.ravel()))[order])

    def dropout(x, key):
        kept = jax.random.uniform(key, x.shape, jnp.float32) < 0.5
        return jnp.sum(jnp.where(kept, x, 0) ** 2)

    for same in (of_one_type, shuffled, dropout):
        found = compare_gradients(same, None, Z, jax.random.key(0), probes=4)
        assert found.doubts == ()


def test_the_report_prints_aligned_and_becomes_json():
    report = compare_gradients(jnp.max, None, jnp.array([1.0, 3.0, 3.0]))
    lines = str(report).splitlines()
    head = " ".join(lines[0].split())
    assert head == "leaf method entries max ULP median max abs max rel at got exact"
    assert set(lines[1]) == {"-"}
    assert any(line.startswith("DOUBT: not differentiable") for line in lines)
    ends = {line.find("[") for line in lines[2:6]}
    assert len(ends) == 1
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["rows"][0]["leaf"] == "a"
    assert plain["doubts"] == list(report.doubts)


def test_infinities_survive_json():
    report = compare_gradients(lambda x: jnp.sum(x), lambda x: x * jnp.inf, Z)
    assert report.row("x", "closed form").max_ulp == math.inf
    rows = json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"]
    assert "inf" in [row["max_ulp"] for row in rows]


def test_raise_if_names_unknown_methods_and_rows():
    report = compare_gradients(jnp.sum, None, Z)
    with pytest.raises(
        ValueError, match=r"methods: got \['closed form'\], wanted some"
    ):
        report.raise_if(ulp=8, methods=FORM)
    with pytest.raises(ValueError, match=r"methods: got \[\], wanted some"):
        report.raise_if(ulp=8, methods=[])
    for ulp in (-1, math.nan):
        with pytest.raises(ValueError, match=f"ulp: got {ulp}, wanted at least 0"):
            report.raise_if(ulp=ulp)
    report.raise_if(ulp=8, methods="reverse")
    with pytest.raises(KeyError, match="no row"):
        report.row("w", "reverse")


def test_a_closed_form_that_takes_no_cotangent_is_told_of_it():
    with pytest.raises(
        TypeError, match=r"called with a cotangent shaped like the result, \(3,\)"
    ):
        compare_gradients(jnp.exp, lambda z: jnp.exp(z), jnp.arange(3.0))


def test_a_closed_form_of_a_scalar_is_called_with_the_arguments_alone():
    with pytest.raises(
        TypeError, match=r"closed form: .*'g'\. It is called with the arguments alone"
    ):
        compare_gradients(jnp.sum, lambda z, g: g, jnp.arange(3.0))


@pytest.mark.parametrize("what", ["cotangent", "tangent"])
def test_what_nothing_asks_for_is_refused(what):
    with pytest.raises(ValueError, match=f"{what}: got one, wanted none"):
        compare_gradients(jnp.sum, None, Z, **{what: jnp.ones(99)})


@pytest.mark.usefixtures("our_errors")
def test_places_that_are_no_integers():
    with pytest.raises(TypeError, match="argnums: got 'b', wanted integers"):
        compare_gradients(jnp.sum, None, Z, argnums="b")


def test_a_small_entry_is_not_hidden_but_explained():
    x = jnp.array([1.0, 1.0])
    report = compare_gradients(
        lambda x: x[0] + 1e-6 * x[1], lambda x: jnp.array([1.0, 1.1e-6]), x
    )
    with pytest.raises(AssertionError, match="small beside the leaf's largest"):
        report.raise_if(ulp=8)


def test_errors_in_ulp():
    one = np.ones(1)
    assert errors_in_ulp(one + 2**-23, one, "float32") == 1
    assert errors_in_ulp(one - 2**-24, one, "float32") == 0.5
    assert errors_in_ulp(one + 2**-7, one, "bfloat16") == 1
    assert errors_in_ulp(-one, one, "float32") == 2**24
    assert errors_in_ulp(one * np.nan, one * np.nan, "float32") == 0
    assert errors_in_ulp(one * np.nan, one, "float32") == np.inf
    assert errors_in_ulp(one * np.inf, one * np.inf, "float32") == 0
    assert errors_in_ulp(one, one * np.inf, "float32") == np.inf
    assert errors_in_ulp(one * 0, one * 1e-39, "float32") < 1  # flushed
    assert errors_in_ulp(one * 0, one * 2**-24, "float16") == 1  # a subnormal
    two = np.array([1.0, 1e-6])
    assert errors_in_ulp(two + 2**-23, two, "float32", floor=1.0).tolist() == [1, 1]


def test_the_step_is_taken():
    x = jnp.array([0.5, -1.0])
    report = compare_gradients(lambda x: jnp.sum(x**3), None, x, step=0.5)
    largest = report.row("x", "central").max_abs
    assert largest == pytest.approx(0.25)  # step^2 f''' / 6


def test_the_seed_draws_the_cotangent():
    first, again, other = (
        compare_gradients(jnp.sin, None, jnp.ones(3), seed=seed).rows[0].largest
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_argnums_from_the_end():
    a, b = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    report = compare_gradients(
        lambda a, b: jnp.sum(a * b**2), lambda a, b: 2 * a * b, a, b, argnums=-1
    )
    report.raise_if(ulp=1)
    assert report.rows[0].leaf == "b"


def test_a_long_scan_is_not_run_in_decimals():
    def long(x):
        step = lambda c, _: (c * 0.5 + x, None)  # noqa: E731
        return jax.lax.scan(step, x, length=40_000)[0].sum()

    report = compare_gradients(long, None, jnp.ones(50), probes=1)
    assert any("it would take too long" in note for note in report.notes)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"closed_form": jnp.ones(3)}, TypeError, "wanted a function, several by"),
        ({"closed_form": {"central": jnp.exp}}, ValueError, "the name 'central'"),
        ({"closed_form": {1: jnp.exp}}, ValueError, "the name 1, wanted a string"),
        ({"judge": jnp.sum}, ValueError, r"judge: got a result of shapes \[\(\)\]"),
        ({"judge": 3}, TypeError, "judge: got int, wanted a function"),
        ({"argnums": (0, 0)}, ValueError, "wanted each place once"),
        ({"probes": 2.5}, ValueError, "probes: got 2.5, wanted an integer"),
        ({"seed": -1}, ValueError, "seed: got -1, wanted an integer from 0 on"),
        ({"step": "a"}, ValueError, "step: got 'a'"),
        ({"floor": None}, ValueError, "floor: got None"),
    ],
)
def test_options_of_another_kind_are_refused(options, error, message):
    form = options.pop("closed_form", None)
    with pytest.raises(error, match=message):
        compare_gradients(jnp.exp, form, jnp.ones(3), **options)
