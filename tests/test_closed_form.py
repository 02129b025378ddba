"""Closed forms against autodiff of plain float64 functions without any custom rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jax_softmax import _closed_form as basic
from jax_softmax import _closed_form_losses as losses
from jax_softmax import _closed_form_regression as regression
from jax_softmax import closed_form
from jax_softmax._gradient_report import errors_in_ulp

pytestmark = pytest.mark.usefixtures("strict_types")

ROWS, CLASSES, FEATURES = 4, 5, 3


def plain_lse(z):
    return jnp.log(jnp.sum(jnp.exp(z)))


def plain_softmax(z):
    return jnp.exp(z) / jnp.sum(jnp.exp(z))


def plain_cap(z, softcap):
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def plain_cross_entropy(z, q, softcap=None):
    s = plain_cap(z, softcap)
    return jnp.sum(q) * plain_lse(s) - jnp.sum(q * s)


def plain_target(label, smoothing):
    onehot = (jnp.arange(CLASSES) == label).astype(float)
    return (1 - smoothing) * onehot + smoothing / CLASSES


def plain_objective(w, b, x, labels, l2=0.0, where=None):
    rows = jax.vmap(lambda xi, y: plain_cross_entropy(xi @ w + b, plain_target(y, 0.0)))
    nll = rows(x, labels)
    keep = jnp.ones(len(x)) if where is None else where.astype(x.dtype)
    return jnp.sum(keep * nll) / jnp.sum(keep) + l2 / 2 * jnp.sum(w**2)


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape))


def agree(got, want, tolerance=1e-12):
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@pytest.fixture
def case(x64):
    z = draw(0, ROWS, CLASSES, scale=2.0)
    labels = jnp.array([0, 4, 2, 2])
    return z, labels, draw(1, ROWS, CLASSES)


def test_softmax(case):
    z, _, t = case
    jacobian = jax.jit(jax.vmap(jax.jacrev(plain_softmax)))(z)
    agree(basic.softmax_jacobian(z), jacobian)
    agree(basic.softmax_jvp(z, t), jnp.einsum("nij,nj->ni", jacobian, t))
    agree(basic.softmax_vjp(z, t), jnp.einsum("ni,nij->nj", t, jacobian))


def test_log_softmax(case):
    z, _, t = case
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda z: z - plain_lse(z))))(z)
    agree(basic.log_softmax_jvp(z, t), jnp.einsum("nij,nj->ni", jacobian, t))
    agree(basic.log_softmax_vjp(z, t), jnp.einsum("ni,nij->nj", t, jacobian))


@pytest.mark.parametrize(
    ("plain", "names"),
    [
        (plain_lse, "logsumexp"),
        (lambda z: plain_lse(z) ** 2, "z_loss"),
    ],
)
def test_functions_of_lse(case, plain, names):
    z, _, t = case
    gradient = jax.jit(jax.vmap(jax.grad(plain)))
    hessian = jax.jit(jax.vmap(jax.hessian(plain)))(z)
    agree(getattr(basic, f"{names}_gradient")(z), gradient(z))
    agree(getattr(basic, f"{names}_hessian")(z), hessian)
    agree(getattr(basic, f"{names}_hvp")(z, t), jnp.einsum("nij,nj->ni", hessian, t))


@pytest.mark.parametrize(
    ("smoothing", "softcap"), [(0.0, None), (0.1, None), (0.1, 1.5)]
)
def test_cross_entropy(case, smoothing, softcap):
    z, labels, t = case
    options = {"label_smoothing": smoothing, "softcap": softcap}

    def plain(z, y):
        return plain_cross_entropy(z, plain_target(y, smoothing), softcap)

    hessian = jax.jit(jax.vmap(jax.hessian(plain)))(z, labels)
    gradient = losses.cross_entropy_gradient(z, labels, **options)
    agree(gradient, jax.jit(jax.vmap(jax.grad(plain)))(z, labels))
    agree(losses.cross_entropy_hessian(z, labels, **options), hessian)
    product = losses.cross_entropy_hvp(z, labels, t, **options)
    agree(product, jnp.einsum("nij,nj->ni", hessian, t))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_cross_entropy_with_probs(case, softcap):
    z, _, t = case
    q = jnp.abs(draw(2, ROWS, CLASSES))  # does not sum to 1, on purpose

    def plain(z, q):
        return plain_cross_entropy(z, q, softcap)

    hessian = jax.jit(jax.vmap(jax.hessian(plain)))(z, q)
    gradient = losses.cross_entropy_with_probs_gradient(z, q, softcap=softcap)
    agree(gradient, jax.vmap(jax.grad(plain))(z, q))
    matrix = losses.cross_entropy_with_probs_hessian(z, q, softcap=softcap)
    agree(matrix, hessian)
    product = losses.cross_entropy_with_probs_hvp(z, q, t, softcap=softcap)
    agree(product, jnp.einsum("nij,nj->ni", hessian, t))


def test_temperature(case):
    z, labels, _ = case
    t = jnp.array(1.7)

    def plain(z, y, t):
        return plain_cross_entropy(z / t, plain_target(y, 0.0))

    by_row = jax.jit(jax.vmap(jax.grad(plain, argnums=(0, 2)), (0, 0, None)))
    agree(losses.temperature_gradient(z, labels, t), by_row(z, labels, t))
    curvature = jax.jit(jax.vmap(jax.hessian(plain, argnums=2), (0, 0, None)))
    agree(losses.temperature_curvature(z, labels, t), curvature(z, labels, t))


@pytest.fixture
def problem(x64):
    w, b = draw(3, FEATURES, CLASSES), draw(4, CLASSES)
    return w, b, draw(5, ROWS, FEATURES), jnp.array([0, 4, 2, 2])


@pytest.mark.parametrize("where", [None, [True, False, True, True]])
def test_regression(problem, where):
    w, b, x, labels = problem
    where = None if where is None else jnp.array(where)
    options = {"l2": 0.3, "where": where}
    tangent = draw(6, FEATURES, CLASSES), draw(7, CLASSES)

    def plain(w, b):
        return plain_objective(w, b, x, labels, **options)

    gradient = jax.jit(jax.grad(plain, argnums=(0, 1)))
    agree(regression.regression_gradient(w, b, x, labels, **options), gradient(w, b))
    product = jax.jvp(gradient, (w, b), tangent)[1]
    agree(regression.regression_hvp(w, b, x, tangent, **options), product)
    agree(regression.regression_gauss_newton_vp(w, b, x, tangent, **options), product)
    hessian = regression.regression_hessian(w, b, x, **options)
    agree(hessian @ ravel_pytree(tangent)[0], ravel_pytree(product)[0])
    flat, unravel = ravel_pytree((w, b))
    agree(hessian, jax.jit(jax.hessian(lambda flat: plain(*unravel(flat))))(flat))


def test_fisher_is_the_expected_outer_product_of_gradients(problem):
    w, b, x, _ = problem
    tangent = draw(6, FEATURES, CLASSES), draw(7, CLASSES)
    vector, total = ravel_pytree(tangent)[0], 0.0
    gradient = jax.jit(jax.grad(plain_objective, argnums=(0, 1)))
    for xi in x:
        for y, p in enumerate(plain_softmax(xi @ w + b)):
            flat = ravel_pytree(gradient(w, b, xi[None], jnp.array([y])))[0]
            total += p * flat * (flat @ vector) / len(x)
    got = regression.regression_fisher_vp(w, b, x, tangent)
    agree(ravel_pytree(got)[0], total)


def test_per_example(problem):
    w, b, x, labels = problem
    tangent = draw(6, FEATURES, CLASSES), draw(7, CLASSES)
    gradient = jax.jit(jax.grad(plain_objective, argnums=(0, 1)))
    each = [gradient(w, b, xi[None], y[None]) for xi, y in zip(x, labels, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    agree(regression.regression_per_example_gradients(w, b, x, labels), stacked)
    flat = jnp.stack([ravel_pytree(g)[0] for g in each])
    norms = regression.regression_per_example_gradient_norms(w, b, x, labels)
    agree(norms, jnp.linalg.norm(flat, axis=1))
    product = regression.regression_empirical_fisher_vp(w, b, x, labels, tangent)
    want = flat.T @ (flat @ ravel_pytree(tangent)[0]) / len(x)
    agree(ravel_pytree(product)[0], want)


def test_dropped_rows_may_hold_anything(problem):
    w, b, x, labels = problem
    where = jnp.array([True, False, True, True])
    tangent = draw(6, FEATURES, CLASSES), draw(7, CLASSES)
    dirty, ids = x.at[1].set(jnp.nan), labels.at[1].set(-100)
    agree(
        regression.regression_gradient(w, b, dirty, ids, where=where),
        regression.regression_gradient(w, b, x, labels, where=where),
    )
    agree(
        regression.regression_empirical_fisher_vp(
            w, b, dirty, ids, tangent, where=where
        ),
        regression.regression_empirical_fisher_vp(
            w, b, x, labels, tangent, where=where
        ),
    )
    for product in (regression.regression_hvp, regression.regression_gauss_newton_vp):
        agree(
            product(w, b, dirty, tangent, where=where),
            product(w, b, x, tangent, where=where),
        )
    nothing = jnp.zeros(ROWS, bool)
    for leaf in regression.regression_gradient(w, b, dirty, ids, where=nothing):
        assert not leaf.any()


@pytest.mark.parametrize("margin", [0.0, 12.0, 20.0, 60.0])
def test_the_label_keeps_its_digits_when_the_model_is_certain(margin):
    z = np.zeros((1, CLASSES), np.float32)
    z[0, 1] = margin
    others = (CLASSES - 1) * np.exp(-np.float64(margin))
    exact = np.full((1, CLASSES), np.exp(-np.float64(margin)) / (1 + others))
    exact[0, 1] = -others / (1 + others)
    got = losses.cross_entropy_gradient(jnp.asarray(z), jnp.array([1]))
    assert errors_in_ulp(np.asarray(got), exact, np.float32).max() <= 4
    # The diagonal of the Jacobian, p (1 - p), by the same care.
    jacobian = np.asarray(basic.softmax_jacobian(jnp.asarray(z)))[0]
    assert errors_in_ulp(jacobian[1, 1], others / (1 + others) ** 2, "f4") <= 6


@pytest.mark.parametrize("margin", [0.0, 12.0, 25.0, 60.0])
def test_products_keep_their_digits_when_the_model_is_certain(margin):
    z = np.zeros((2, 4), np.float32)
    z[0, 0] = z[1, 2] = margin
    z[:, 3] = -np.inf
    p = np.exp(np.float64(z) - margin)
    p /= p.sum(axis=1, keepdims=True)
    t = np.array([0.3, -1.0, 2.0, 5.0])
    # A sum over pairs of classes, from which nothing is taken away.
    faster = (p[:, None, :] * (t[:, None] - t)).sum(axis=2)
    rows, tangent, labels = jnp.asarray(z), jnp.full((2, 4), t, "f4"), jnp.array([1, 0])
    nothing, x = jnp.zeros((1, 4)), jnp.zeros((1, 1))
    ones = jnp.ones((2, 4)) / 4
    linear = (nothing, rows[0], x, (nothing, tangent[0]))
    for got, want in (
        (basic.softmax_jvp(rows, tangent), p * faster),
        (basic.softmax_vjp(rows, tangent), p * faster),
        (basic.logsumexp_hvp(rows, tangent), p * faster),
        (basic.log_softmax_jvp(rows, tangent), faster),
        (losses.cross_entropy_hvp(rows, labels, tangent), p * faster),
        (losses.cross_entropy_with_probs_hvp(rows, ones, tangent), p * faster),
        (regression.regression_hvp(*linear)[1], (p * faster)[0]),
        (regression.regression_gauss_newton_vp(*linear)[1], (p * faster)[0]),
    ):
        assert errors_in_ulp(np.asarray(got), want, np.float32).max() <= 16


def test_a_product_is_as_exact_beside_an_entry_that_is_far_from_the_rest():
    t = np.full(1000, 1.25, np.float32)
    t[0] = 1e6
    got = basic.log_softmax_jvp(jnp.zeros(1000), jnp.asarray(t))
    np.testing.assert_allclose(got, t - t.mean(dtype=np.float64), rtol=5e-6)


@pytest.mark.parametrize("margin", [0.0, 12.0, 25.0, 60.0])
@pytest.mark.parametrize("rest", [0.0, 1e-9])
def test_targets_that_are_nearly_one_hot_keep_their_digits(margin, rest):
    q = np.array([[1.0, rest, 0.0]], np.float32)
    p = np.exp(np.array([[0.0, -margin, -margin]]))
    p /= p.sum()
    # p_i q_j - p_j q_i, summed over j; at the label the two are not nearly equal.
    want = (p[..., :, None] * q[..., None, :] - p[..., None, :] * q[..., :, None]).sum(
        2
    )
    logits = jnp.array([[margin, 0.0, 0.0]], jnp.float32)
    got = losses.cross_entropy_with_probs_gradient(logits, jnp.asarray(q))
    assert errors_in_ulp(np.asarray(got), want, np.float32).max() <= 8


def test_softcap_slope_keeps_its_digits_where_the_cap_bites():
    z, softcap = np.float32(40.0), 2.0
    got = losses.cross_entropy_gradient(
        jnp.array([[z, 0.0]]), jnp.array([1]), softcap=softcap
    )
    slope = 1 / np.cosh(np.float64(z) / softcap) ** 2
    want = slope / (1 + np.exp(-softcap * np.tanh(z / softcap)))
    assert errors_in_ulp(np.asarray(got)[0, 0], want, "f4") <= 12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_have_the_type_of_the_logits(dtype):
    z, labels = jnp.ones((2, 3), dtype), jnp.array([0, 2])
    assert basic.softmax_jacobian(z).dtype == dtype
    assert basic.z_loss_hvp(z, z).dtype == dtype
    assert losses.cross_entropy_gradient(z, labels).dtype == dtype
    assert losses.cross_entropy_hvp(z, labels, z, softcap=3.0).dtype == dtype


def test_ruled_out_classes_have_no_gradient():
    z = jnp.array([[1.0, -jnp.inf, 0.0]])
    gradient = losses.cross_entropy_gradient(z, jnp.array([0]))
    assert gradient[0, 1] == 0
    assert jnp.isfinite(gradient).all()
    assert jnp.isfinite(basic.softmax_jacobian(z)).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_a_label_that_is_no_class_is_nan_in_its_row_only(dtype):
    labels = jnp.array([3, 1]).astype(dtype)
    gradient = losses.cross_entropy_gradient(jnp.zeros((2, 3)), labels)
    assert jnp.isnan(gradient).all(axis=1).tolist() == [True, False]


def test_any_batch_axes_under_jit_and_vmap():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [3, 0, 1]])
    want = losses.cross_entropy_hessian(z, labels, softcap=2.0)
    hessian = jax.jit(lambda z, y: losses.cross_entropy_hessian(z, y, softcap=2.0))
    agree(jax.vmap(hessian)(z, labels), want, 1e-6)
    assert want.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "bfloat16"])
def test_features_of_any_type(dtype):
    """What is as narrow as they are does not count rows, nor hold a share of them."""
    w, b, y = jnp.zeros((2, 3)), jnp.zeros(3), jnp.zeros(70_000, int)
    x = jnp.tile(jnp.array([[1, 2]], dtype), (len(y), 1))
    tangent = jnp.ones((2, 3)).at[0].set(0.0), jnp.zeros(3)
    for where in (None, jnp.ones(len(y), bool)):
        dw, db = closed_form.regression_gradient(w, b, x, y, where=where)
        np.testing.assert_allclose(db, [-2 / 3, 1 / 3, 1 / 3], rtol=1e-4)
        np.testing.assert_allclose(dw, [db, 2 * db], rtol=1e-4)
        bent, _ = closed_form.regression_hvp(w, b, x, tangent, where=where)
        np.testing.assert_allclose(bent, 0, atol=1e-6)
    norms = closed_form.regression_per_example_gradient_norms(w, b, 100 * x[:1], y[:1])
    length = np.sqrt(1 + np.square(np.float64(100 * x[0])).sum())
    np.testing.assert_allclose(norms, length * np.sqrt(2 / 3), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pairs_have_the_types_of_the_parameters(dtype):
    w, b, x = (jnp.ones(shape, dtype) for shape in ((2, 3), (3,), (4, 2)))
    pairs = (
        closed_form.regression_gradient(w, b, x, jnp.zeros(4, int)),
        closed_form.regression_hvp(w, b, x, (w, b)),
        closed_form.regression_empirical_fisher_vp(
            w, b, x, jnp.zeros(4, int), (w, b), where=jnp.ones(4, bool)
        ),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype(dtype)}


@pytest.mark.usefixtures("our_errors")
def test_whole_numbers_are_no_logits():
    with pytest.raises(TypeError, match="logits must be floating point"):
        closed_form.softmax_jacobian(jnp.zeros(2, jnp.int32))


LOGITS, TWO = jnp.ones((2, 3)), jnp.array([0, 2])
W, B, X, PAIR = jnp.ones((4, 3)), jnp.zeros(3), jnp.ones((2, 4)), (LOGITS[0], LOGITS)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    ("name", "args", "options", "said"),
    [
        ("cross_entropy_gradient", (LOGITS, TWO[:, None]), {}, r"labels .*\(2,\)"),
        ("cross_entropy_gradient", (LOGITS, 1), {}, r"labels .* \(2,\), got \(\)"),
        ("cross_entropy_hessian", (LOGITS, TWO[:1]), {}, r"labels .*got \(1,\)"),
        ("cross_entropy_hvp", (LOGITS, LOGITS[0], LOGITS), {}, "labels .* integer"),
        ("cross_entropy_hvp", (LOGITS, TWO, LOGITS[:1]), {}, r"tangent .*\(2, 3\)"),
        ("cross_entropy_gradient", (LOGITS, TWO), {"label_smoothing": 1.5}, r"\[0, 1"),
        ("cross_entropy_gradient", (LOGITS, TWO), {"softcap": 0.0}, "softcap .*1e-30"),
        ("cross_entropy_with_probs_gradient", (LOGITS, LOGITS[0]), {}, r"probs .*\(3,"),
        ("log_softmax_vjp", (LOGITS, LOGITS[:, :1]), {}, r"cotangent .*\(2, 1\)"),
        ("temperature_gradient", (LOGITS, TWO[:1], 2.0), {}, r"labels .*\(1,\)"),
        ("temperature_curvature", (LOGITS, TWO, LOGITS[0]), {}, "must be one number"),
        ("regression_gradient", (W, B, X, TWO[:, None]), {}, r"labels .*\(2, 1\)"),
        ("regression_gradient", (W, B, X.T, TWO), {}, r"x .*\(batch, 4\), got \(4, 2"),
        ("regression_gradient", (W, B[:1], X, TWO), {}, r"b .*\(3,\), got \(1,\)"),
        ("regression_gradient", (W, B, X, TWO), {"where": TWO}, "where .*boolean"),
        ("regression_gradient", (W, B, X, TWO), {"l2": B}, "l2 must be one number"),
        ("regression_hvp", (W, B, X, PAIR), {}, r"tangent of w .*\(4, 3\), got \(3,"),
        ("regression_hessian", (W[0], B, X), {}, r"\(features, classes\), got \(3,"),
    ],
)
def test_what_would_be_broadcast_is_refused(name, args, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        getattr(closed_form, name)(*args, **options)


@pytest.mark.usefixtures("our_errors")
def test_lists_and_numbers_are_arrays():
    for name, args in (
        ("cross_entropy_gradient", ([0.0, 1.0, 2.0], 1)),
        ("cross_entropy_hvp", ([[0.0, 1.0]], [1], [[1.0, 0.5]])),
        ("cross_entropy_with_probs_gradient", ([0.0, 1.0], [0.5, 0.5])),
        ("temperature_gradient", ([[0.0, 1.0]], [1], 2)),
        ("softmax_jvp", ([0.0, 1.0], [1.0, 0.0])),
        ("z_loss_hessian", ([0.0, 1.0],)),
        ("regression_gradient", ([[0.5, 1.0]], [0.0, 1.0], [[2], [3]], [1, 0])),
    ):
        f = getattr(closed_form, name)
        as_arrays = f(*(jnp.asarray(arg) for arg in args))
        jax.tree.map(np.testing.assert_array_equal, f(*args), as_arrays)


def test_no_rows_are_as_dropped_rows():
    none = jnp.zeros((0, 4)), jnp.zeros(0, int)
    dropped = {"where": jnp.zeros(2, bool), "l2": 0.5}
    agree(
        closed_form.regression_gradient(W, B, *none, l2=0.5),
        closed_form.regression_gradient(W, B, X, TWO, **dropped),
    )
    agree(
        closed_form.regression_hvp(W, B, none[0], (W, B), l2=0.5),
        closed_form.regression_hvp(W, B, X, (W, B), **dropped),
    )
    dw, db = closed_form.regression_per_example_gradients(W, B, *none)
    assert (dw.shape, db.shape) == ((0, 4, 3), (0, 3))


def test_a_temperature_that_is_a_number():
    rows, labels = jnp.array([[1.0, 3.0]]), jnp.array([0])
    for f in (closed_form.temperature_gradient, closed_form.temperature_curvature):
        jax.tree.map(
            np.testing.assert_array_equal,
            f(rows, labels, 2.0),
            f(rows, labels, jnp.array(2.0)),
        )


@pytest.mark.parametrize(
    "temperature", [2, np.int64(2), jnp.array(2), np.float64(2), jnp.array(2, "f2")]
)
def test_a_temperature_of_any_type(temperature):
    rows, labels = jnp.array([[1.0, 3.0]]), jnp.array([0])
    _, slope = closed_form.temperature_gradient(rows, labels, temperature)
    curvature = closed_form.temperature_curvature(rows, labels, temperature)
    kind = "f2" if getattr(temperature, "dtype", None) == "f2" else "f4"
    assert slope.dtype == curvature.dtype == kind
    np.testing.assert_allclose(slope, -0.3655293, rtol=1e-3)
    np.testing.assert_allclose(curvature, 0.4147406, rtol=1e-3)


def test_temperature_of_a_label_that_is_no_class_is_nan_in_its_row_only():
    rows, labels = jnp.array([[3.0, 2.0, 1.0]] * 3), jnp.array([7, -1, 1])
    (dz, dt) = closed_form.temperature_gradient(rows, labels, 2.0)
    curvature = closed_form.temperature_curvature(rows, labels, 2.0)
    for values in (dz[:, 0], dt, curvature):
        assert jnp.isnan(values).tolist() == [True, True, False]


def test_temperature_beside_a_class_ruled_out_is_as_without_it():
    rows, labels = jnp.array([[1.0, 3.0, -jnp.inf]]), jnp.array([0])
    with_it = closed_form.temperature_gradient(rows, labels, 2.0)
    without = closed_form.temperature_gradient(rows[:, :2], labels, 2.0)
    agree((with_it[0][:, :2], with_it[1]), without, 1e-7)
    assert with_it[0][0, 2] == 0
    agree(
        closed_form.temperature_curvature(rows, labels, 2.0),
        closed_form.temperature_curvature(rows[:, :2], labels, 2.0),
        1e-7,
    )


def test_labels_narrower_than_the_number_of_classes():
    labels = jnp.array([5, 127], jnp.int8)
    gradient = losses.cross_entropy_gradient(jnp.zeros((2, 300)), labels)
    np.testing.assert_array_equal(jnp.argwhere(gradient < 0)[:, 1], labels)


def test_where_no_row_is_kept_the_penalty_stays():
    w, b, x = jnp.ones((2, 3)), jnp.zeros(3), jnp.ones((4, 2))
    options = {"where": jnp.zeros(4, bool), "l2": 0.5}
    dw, db = regression.regression_hvp(w, b, x, (w, b), **options)
    np.testing.assert_array_equal(dw, 0.5 * w)
    np.testing.assert_array_equal(db, 0)
    hessian = regression.regression_hessian(w, b, x, **options)
    np.testing.assert_array_equal(hessian, np.diag(6 * [0.5] + 3 * [0.0]))
