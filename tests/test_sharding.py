"""Classes over devices, tokens over devices, and both: the same answers as on one.

On the four devices that conftest asks for, as 1 x 4, 2 x 2 and 4 x 1. Most rows have
classes that do not divide: the last devices hold padding, one of them nothing else.
"""

import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import test_accuracy as accuracy
import test_contract as contract
from jax.sharding import PartitionSpec as P

import jax_softmax as js
from jax_softmax import _lanes, _linear_plan

pytestmark = pytest.mark.usefixtures("strict_types")

SHAPES = [(1, 4), (2, 2), (4, 1)]  # data x model
PADDING = 7.0  # of logits: ruled out, whatever it is
ROWS, COLUMNS, BY_CLASS = P("data"), P(None, "model"), P("data", "model")


@lru_cache
def mesh_of(shape):
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto)


over_meshes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def sharded(f, shape, in_specs, out_specs, **options):
    mesh = mesh_of(shape)
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    )


def padded(columns, value):
    """Classes in four equal parts."""
    missing = -columns.shape[-1] % 4
    return np.pad(columns, ((0, 0), (0, missing)), constant_values=value)


def in_fours(rows):
    """Rows, some of them twice, that divide among four devices."""
    return rows[np.arange(-(-len(rows) // 4) * 4) % len(rows)]


def every_loss(shape, classes):
    """(loss, its gradient) of cross_entropy, plain and smoothed, and of soft labels."""
    of = {"axis_name": "model"}

    def losses(z, labels, targets):
        smoothed = {"label_smoothing": accuracy.SMOOTHING}
        labelled = partial(js.cross_entropy, labels=labels, classes=classes, **of)
        ids = jnp.arange(z.shape[1]) + jax.lax.axis_index("model") * z.shape[1]

        def soft(z):
            possible = jnp.where(ids < classes, z, -jnp.inf)
            return js.cross_entropy_with_probs(possible, targets, **of)

        functions = labelled, partial(labelled, **smoothed), soft
        return [(f(z), jax.grad(lambda z, f=f: f(z).sum())(z)) for f in functions]

    return sharded(losses, shape, (BY_CLASS, ROWS, BY_CLASS), [(ROWS, BY_CLASS)] * 3)


@pytest.mark.parametrize(
    ("shape", "n", "rows"),
    [*((s, 10, 2) for s in SHAPES), ((1, 4), 62, 32), ((2, 2), 1001, 2)],
)
def test_as_accurate_as_on_one_device(shape, n, rows):
    c = accuracy.case(n, rows=rows)
    found = every_loss(shape, n)(
        in_fours(padded(c.z, PADDING)),
        in_fours(c.labels),
        in_fours(padded(c.targets, 0)),
    )
    rows = len(c.z)
    (loss, grad), (smooth, smooth_grad), (soft, soft_grad) = jax.tree.map(
        lambda leaf: np.asarray(leaf)[:rows], found
    )
    for leaf in (grad, smooth_grad, soft_grad):
        np.testing.assert_array_equal(leaf[:, n:], 0)
    results = {
        accuracy.cross_entropy: loss,
        accuracy.cross_entropy_gradient: grad[:, :n],
        accuracy.smoothed: smooth,
        accuracy.smoothed_gradient: smooth_grad[:, :n],
        accuracy.soft_labels: soft,
        accuracy.soft_labels_gradient: soft_grad[:, :n],
    }
    for promise, result in results.items():
        errors = promise(c, lambda _, result=result: lambda *_: result)
        accuracy.within(errors, c.names, accuracy.BOUNDS[promise])


def spread(f):
    """A function whose arguments lie on an Explicit mesh, rows and classes, without
    shard_map: JAX's types say where every result lies."""
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=explicit)

    def over_the_mesh(*arrays):
        with jax.set_mesh(mesh):
            return f(
                *(
                    jax.device_put(a, P(*("data", "model")[: np.ndim(a)]))
                    for a in arrays
                )
            )

    return over_the_mesh


@pytest.mark.parametrize("n", [10, 1000])
@pytest.mark.parametrize("promise", accuracy.BOUNDS, ids=lambda f: f.__name__)
def test_classes_on_an_explicit_mesh(promise, n):
    c = accuracy.case(n, rows=32)
    accuracy.within(promise(c, spread), c.names, accuracy.BOUNDS[promise])


def test_divergences_on_an_explicit_mesh():
    rng = np.random.default_rng(0)
    z, dz = rng.normal(0, 3, (2, 4, 10)).astype(np.float32)

    def figures(z, y):
        p, q = js.Logits(z), js.Probs(js.softmax(y))
        return js.entropy(p), js.kl_divergence(p, q), js.js_divergence(p, q)

    found = spread(jax.jit(figures))(z, z + dz)
    for a, b in zip(found, figures(z, z + dz), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("w_lies", [P(None, None), P(None, "model"), P("model", None)])
def test_the_linear_loss_on_an_explicit_mesh(w_lies):
    """By auto_axes, as the README says."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 6), (6, 40)))
    labels = rng.integers(0, 40, 8, np.int32)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=explicit)
    mean = js.mean_linear_cross_entropy
    expected = jax.value_and_grad(lambda w: mean(x, w, labels))(w)
    with jax.set_mesh(mesh):
        on_mesh = jax.sharding.auto_axes(mean, out_sharding=P())
        spread_x, spread_labels = (jax.device_put(a, ROWS) for a in (x, labels))
        found = jax.jit(
            jax.value_and_grad(lambda w: on_mesh(spread_x, w, spread_labels))
        )(jax.device_put(w, w_lies))
        losses = jax.sharding.auto_axes(js.linear_cross_entropy, out_sharding=ROWS)
        per_row = losses(spread_x, jax.device_put(w, w_lies), spread_labels)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        per_row, js.linear_cross_entropy(x, w, labels), rtol=1e-6
    )


@over_meshes
def test_the_contract_at_the_edges(shape):
    """Three classes on four devices: some are alone on theirs, one device is empty."""
    table = list((contract.TABLE | contract.BAD_LABELS).items())
    rows = [row for _, row in table]
    logits = padded(np.asarray([row.logits for row in rows], np.float32), PADDING)
    labels = np.asarray([row.label for row in rows])
    where = np.asarray([row.keep for row in rows])

    def total(z, y, w):
        out = js.cross_entropy(z, y, where=w, axis_name="model", classes=3)
        return out.sum(), out

    run = sharded(
        jax.grad(total, has_aux=True), shape, (BY_CLASS, ROWS, ROWS), (BY_CLASS, ROWS)
    )
    found = run(*map(in_fours, (logits, labels, where)))
    for (key, row), grad, loss in zip(table, *found, strict=False):
        np.testing.assert_allclose(loss, row.loss, rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(grad[:3], row.gradient, rtol=1e-6, err_msg=key)
        np.testing.assert_array_equal(grad[3], grad[3] * 0, err_msg=key)


@pytest.mark.parametrize("check_vma", [True, False])
def test_derivatives_from_outside(check_vma):
    """Not multiplied by the devices; forward mode and Hessian products too."""
    rng = np.random.default_rng(0)
    z, dz = rng.normal(0, 3, (2, 8, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 8)
    weights = rng.normal(size=8).astype(np.float32)
    options = {"label_smoothing": 0.1}
    spread = sharded(
        partial(js.cross_entropy, axis_name=("data", "model"), **options),
        (2, 2),
        (P(None, ("data", "model")), P()),
        P(),
        check_vma=check_vma,
    )

    def derivatives(loss):
        grad = jax.grad(lambda z: (weights * loss(z, labels)).sum())
        return jax.jvp(lambda z: loss(z, labels), (z,), (dz,)), jax.jvp(
            grad, (z,), (dz,)
        )

    got = jax.jit(partial(derivatives, spread))()
    want = jax.jit(partial(derivatives, partial(js.cross_entropy, **options)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


def test_bfloat16_logits():
    z = jnp.asarray(np.random.default_rng(0).normal(0, 5, (16, 1000)), jnp.bfloat16)
    labels = np.arange(16)
    exact = ref.softmax(np.asarray(z))

    def losses(z, y):
        out = partial(js.cross_entropy, labels=y, axis_name="model")
        return out(z), jax.grad(lambda z: out(z).sum())(z)

    loss, grad = sharded(losses, (2, 2), (BY_CLASS, ROWS), (ROWS, BY_CLASS))(z, labels)
    assert loss.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    assert ref.ulp_error(loss, -ref.at(exact.log_probs, labels)).max() <= 2


@pytest.mark.usefixtures("our_errors")
def test_mistakes():
    z, labels = np.zeros((2, 3), np.float32), np.zeros(2, int)
    with pytest.raises(ValueError, match=r"axis_name must name mesh axes.*'model'"):
        js.cross_entropy(z, labels, axis_name="model")
    with pytest.raises(ValueError, match=r"classes must be in \[1, 3\].*got 4"):
        js.cross_entropy(z, labels, classes=4)
    for wrong in ((), [], 3, ("model", 0)):
        with pytest.raises(ValueError, match="axis_name must name mesh axes"):
            js.cross_entropy(z, labels, axis_name=wrong)
    one = partial(js.cross_entropy, labels=0, axis_name="i")
    with pytest.raises(ValueError, match=r"axis_name must name mesh axes.*'i'"):
        jax.vmap(one, axis_name="i")(z)
    twice = partial(js.cross_entropy, labels=labels[:1], axis_name=("model", "model"))
    with pytest.raises(ValueError, match="axis_name must name mesh axes"):
        sharded(twice, (2, 2), BY_CLASS, ROWS)(np.zeros((2, 4), np.float32))
    for wrong in (2.5, "3", True, np.array(3)):
        with pytest.raises(TypeError, match="classes must be a Python integer"):
            js.cross_entropy(z, labels, classes=wrong)


# --- From features and weights ----------------------------------------------------

V, LINEAR = 22, (ROWS, COLUMNS, P("model"), ROWS, ROWS)  # x, w, b, labels, weights


def linear_arrays(rows=16, features=5, classes=V):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(rows, features)), rng.normal(0, 3, (features, classes + 2))
    b, weights = rng.normal(size=classes + 2), rng.normal(size=rows)
    labels = rng.integers(0, classes, rows)
    f32 = (array.astype(np.float32) for array in (x, w, b))
    return (*f32, labels, weights.astype(np.float32))


def of_rows(x, w, b, labels, weights, **options):
    losses, lse = js.linear_cross_entropy(
        x, w, labels, b=b, return_lse=True, softcap=20.0, **options
    )
    return (weights * (losses - 0.1 * lse)).sum()


def of_mean(x, w, b, labels, weights, **options):
    more = {"weights": weights, "normalizer": 3.0, "z_loss": 0.01, "chunk": (4, 3)}
    return js.mean_linear_cross_entropy(x, w, labels, b=b, **more, **options)


def with_derivatives(loss):
    """The loss, its gradients, and their derivative along the squares."""

    def run(x, w, b, *rest):
        primals = (x, w, b)
        grads = jax.value_and_grad(lambda *arrays: loss(*arrays, *rest), (0, 1, 2))
        return jax.jvp(grads, primals, (x * x, w * w, b * b))

    return jax.jit(run)


def without_padding(tree):
    return jax.tree.map(lambda a: a[..., :V] if a.shape[-1:] == (V + 2,) else a, tree)


def assert_close(got, want, tolerance):
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        one, other = np.float64(one), np.float64(other)
        size = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("loss", [of_rows, of_mean])
@pytest.mark.parametrize(
    ("shape", "check_vma"), [((1, 4), True), ((2, 2), False), ((4, 1), True)]
)
def test_linear_values_gradients_and_hessian_products(loss, shape, check_vma):
    """Two columns at the end are padding, whatever they hold."""

    def parts(*arrays):
        found = loss(*arrays, axis_name="model", classes=V, label_smoothing=0.1)
        return jax.lax.psum(found, "data")

    spread = sharded(parts, shape, LINEAR, P(), check_vma=check_vma)
    arrays = linear_arrays()
    got = with_derivatives(spread)(*arrays)
    for leaf in jax.tree.leaves(got):
        if leaf.shape[-1:] == (V + 2,):
            np.testing.assert_array_equal(leaf[..., V:], 0)
    one = with_derivatives(partial(loss, label_smoothing=0.1))
    assert_close(without_padding(got), one(*without_padding(arrays)), 5e-6)


def test_weights_alone_differ_between_devices():
    """Those of the same rows, in chunks."""
    x, w, b, labels, weights = linear_arrays()
    several = np.stack((weights, 1 + weights))

    def summed(x, w, b, weights):
        return jax.lax.psum(of_mean(x, w, b, labels, weights[0]), "data")

    def with_gradients(f):
        return jax.value_and_grad(f, (0, 1, 2, 3))(x, w, b, several)

    def on_one(x, w, b, several):
        return sum(of_mean(x, w, b, labels, weights) for weights in several)

    spread = sharded(summed, (2, 2), (P(), P(), P(), ROWS), P())
    assert_close(with_gradients(spread), with_gradients(on_one), 5e-6)


def test_linear_in_bfloat16():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in linear_arrays()[:3]]
    rest = linear_arrays()[3:]

    def parts(*arrays):
        return jax.lax.psum(of_mean(*arrays, axis_name="model", classes=V), "data")

    spread = jax.jit(jax.value_and_grad(sharded(parts, (2, 2), LINEAR, P()), (0, 1)))
    one = jax.jit(jax.value_and_grad(of_mean, (0, 1)))
    got, want = spread(*arrays, *rest), one(*without_padding(arrays), *rest)
    assert got[1][1].dtype == jnp.bfloat16
    assert_close(got[0], want[0], 1e-6)
    assert_close(without_padding(got[1]), want[1], 2e-2)  # ULP of bfloat16: 0.8e-2


def test_linear_summary():
    """Equal logits on different devices: the lower id is first."""
    x, w, b, labels, _ = linear_arrays()
    w[:, 20] = w[:, 3]
    b[[3, 20]] = 9.0

    def summary(x, w, b, labels, **options):
        return js.linear_softmax_summary(x, w, labels, b=b, top_k=3, **options)

    spread = sharded(
        partial(summary, axis_name="model", classes=V), (2, 2), LINEAR[:4], ROWS
    )
    got = spread(x, w, b, labels)
    want = jax.jit(summary)(*without_padding((x, w, b)), labels)
    np.testing.assert_array_equal(got.top_ids, want.top_ids)
    assert (np.asarray(got.top_ids[:, :2]) == [3, 20]).all(1).any()
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("classes", [21, 12])
def test_entropy_where_a_device_holds_no_possible_class(classes):
    """Of 24 columns on four devices the last are padding; the first are ruled out."""
    x, w, b, _, weights = linear_arrays()
    b[:6] = -np.inf

    def plain(x, w, b, weights):
        log_p = js.log_softmax((x @ w + b)[:, 6:classes])
        return -(weights * (jnp.exp(log_p) * log_p).sum(-1)).sum()

    def tiled(x, w, b, weights):
        options = {"b": b, "chunk": (4, 5), "classes": classes}
        return (weights * js.linear_softmax_summary(x, w, **options).entropy).sum()

    def parts(x, w, b, weights):
        found = js.linear_softmax_summary(x, w, b=b, axis_name="model", classes=classes)
        return weights * found.entropy

    specs = (ROWS, COLUMNS, P("model"), ROWS)
    spread = sharded(parts, (1, 4), specs, ROWS)
    arrays = x, w, b, weights
    want = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*arrays)
    for f in (tiled, lambda *arrays: spread(*arrays).sum()):
        assert_close(jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*arrays), want, 5e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_linear_summary_is_differentiated(check_vma):
    """From outside, by features, weights and biases."""
    x, w, b, labels, weights = linear_arrays()

    def parts(x, w, b, labels, weights, **options):
        found = js.linear_softmax_summary(x, w, labels, b=b, top_k=2, **options)
        rows = found.nll - found.lse + found.entropy + found.top_log_probs.sum(-1)
        return weights * rows

    spread = sharded(
        partial(parts, axis_name="model", classes=V),
        (2, 2),
        LINEAR,
        ROWS,
        check_vma=check_vma,
    )

    def grads(function, *arrays):
        return jax.jit(jax.grad(lambda *a: function(*a).sum(), (0, 1, 2)))(*arrays)

    arrays = x, w, b, labels, weights
    got = grads(spread, *arrays)
    want = grads(parts, *without_padding((x, w, b)), labels, weights)
    assert_close(without_padding(got), want, 5e-6)


# --- What the compiled program sends -----------------------------------------------


def collectives(program):
    """(kind, number of elements) of everything that travels."""
    sent = []
    pattern = r"= (\S.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\("
    for shapes, kind in re.findall(pattern, program.as_text()):
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            sent.append((kind, int(np.prod([int(d) for d in dims.split(",") if d]))))
    return sent


def sent_by_each(program, devices):
    """Numbers that a device brings in: of what is gathered, its own part."""
    sent = collectives(program)
    assert {kind for kind, _ in sent} == {"all-reduce", "all-gather"}
    shares = {"all-reduce": 1, "all-gather": devices}
    return sum(size / shares[kind] for kind, size in sent)


def test_three_numbers_travel_for_each_row():
    """Maximum, tail and the label's logit; and the gradient of x is added up."""
    rows, features, classes = 64, 8, 4096
    x, w, b, labels, weights = linear_arrays(rows, features, classes - 2)

    def dense(z, labels):
        return js.cross_entropy(z, labels, axis_name="model")

    run = sharded(dense, (1, 4), (BY_CLASS, ROWS), ROWS)
    grad = jax.jit(jax.grad(lambda z, y: run(z, y).sum()))
    z = jnp.zeros((rows, classes))
    assert sent_by_each(grad.lower(z, labels).compile(), 4) <= 3 * rows

    def mean(*arrays):
        return js.mean_linear_cross_entropy(
            *arrays[:2], arrays[3], b=arrays[2], axis_name="model", chunk=(rows, 256)
        )

    run = sharded(mean, (1, 4), (P(), COLUMNS, P("model"), P(), P()), P())
    grad = jax.jit(jax.grad(run, (0, 1, 2)))
    program = grad.lower(x, w, b, labels, weights).compile()
    assert sent_by_each(program, 4) <= (3 + features) * rows


def flops(program):
    return program.cost_analysis()["flops"]


@over_meshes
def test_rows_of_several_tiles_on_each_device(shape, monkeypatch, fresh_traces):
    monkeypatch.setattr(_lanes, "TILE", 1)  # so that 1024 classes are one
    monkeypatch.setattr(_lanes, "NARROWEST", 128)
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (8, 10_000)).astype(np.float32)
    labels = rng.integers(0, 10_000, 8)
    x, w = rng.normal(0, 1, (8, 4)), rng.normal(0, 1, (4, 10_000))
    x, w = x.astype(np.float32), w.astype(np.float32)

    def losses(z, x, w, labels):
        of = {"axis_name": "model", "chunk": (4, 10_000)}
        fused = js.linear_cross_entropy(x, w, labels, **of)
        return js.cross_entropy(z, labels, axis_name="model"), fused

    run = sharded(losses, shape, (BY_CLASS, ROWS, COLUMNS, ROWS), (ROWS, ROWS))
    dense, fused = run(z, x, w, labels)
    exact = -ref.at(ref.softmax(z).log_probs, labels)
    assert ref.ulp_error(dense, exact).max() <= 2
    assert_close(fused, js.cross_entropy(x @ w, labels), 1e-5)


def mean_of(x, w, b, y):
    return js.mean_linear_cross_entropy(x, w, y, b=b)


def rows_of(x, w, b, y):
    return js.linear_cross_entropy(x, w, y, b=b).mean()


def summary_of(x, w, b, y):
    return js.linear_softmax_summary(x, w, y, b=b, top_k=3).nll.mean()


@pytest.mark.parametrize(
    ("loss", "tokens", "fitting"),
    [
        (mean_of, 256, 60),
        (mean_of, 240, 60),
        (mean_of, 4 * 61, 60),
        (mean_of, 4 * 61, 70),
        (mean_of, 4 * 2053, 60),
        (rows_of, 256, 60),
        (rows_of, 4 * 2053, 60),
        (summary_of, 256, 60),
        (summary_of, 4 * 2053, 60),
    ],
)
@pytest.mark.parametrize("accelerator", [False, True])
def test_default_chunks_gather_nothing(
    loss, accelerator, tokens, fitting, monkeypatch, fresh_traces, request
):
    """Tokens over devices under plain jit, more of them than are kept at a time."""
    if accelerator:
        request.getfixturevalue("as_on_accelerators")
    kept = dict.fromkeys((True, False), 4 * 510 * fitting)
    monkeypatch.setattr(_linear_plan, "KEPT_BYTES", kept)
    monkeypatch.setattr(_linear_plan, "LEAST_TOKENS", 16)
    monkeypatch.setattr(_linear_plan, "KEEPING_COSTS", 1)
    mesh = mesh_of((4, 1))
    x, w, b, labels, _ = linear_arrays(tokens, 8, 510)
    of = (P("data"), P(), P(), P("data"))
    shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in of]
    grad = jax.value_and_grad(loss, (0, 1, 2))
    program = jax.jit(grad, in_shardings=shardings).lower(x, w, b, labels)
    if loss is mean_of and tokens in (256, 240):  # of the others, all at once
        assert "while" in program.as_text()
    sent = collectives(program.compile())
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert sum(size for _, size in sent) <= (8 + 1) * 512 + 1


def test_the_likeliest_of_rows_on_several_devices():
    """The compiler's partition gathers no logits for them; ties go to the left."""
    x, w, _, _, _ = linear_arrays(256, 8, 510)
    w[:, 500] = w[:, 3]
    mesh, of = mesh_of((4, 1)), (P("data"), P())
    shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in of]

    def top(x, w):
        found = js.linear_softmax_summary(x, w, top_k=3, chunk=(64, 128))
        return found.top_log_probs, found.top_ids

    program = jax.jit(top, in_shardings=shardings).lower(x, w).compile()
    assert not collectives(program)
    log_probs, ids = program(*jax.device_put((x, w), tuple(shardings)))
    want, want_ids = jax.lax.top_k(js.log_softmax(x @ w), 3)
    np.testing.assert_array_equal(ids, want_ids)
    assert (np.asarray(ids) == 500).any()
    np.testing.assert_allclose(log_probs, want, rtol=1e-5)


@pytest.mark.parametrize("tokens", [256, 64])
@pytest.mark.parametrize("mean", [False, True])
def test_tokens_over_devices_under_plain_jit(mean, tokens):
    """Nothing is gathered: the gradients of w and b are summed, and that is all.

    And each device does its part of the work, also with four chunks of tokens.
    """
    mesh = mesh_of((4, 1))
    rows, features, classes = 256, 8, 512
    x, w, b, labels, _ = linear_arrays(rows, features, classes - 2)
    chunk = (tokens, 128)

    def linear(x, w, b, labels):
        if mean:
            return js.mean_linear_cross_entropy(x, w, labels, b=b, chunk=chunk)
        return js.linear_cross_entropy(x, w, labels, b=b, chunk=chunk).mean()

    def dense(x, w, b, labels):
        return js.cross_entropy(x @ w + b, labels).mean()

    of = (P("data"), P(), P(), P("data"))
    shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in of]
    for loss in (linear, dense):
        grad = jax.value_and_grad(loss, (0, 1, 2))
        program = jax.jit(grad, in_shardings=shardings).lower(x, w, b, labels)
        compiled = program.compile()
        sent = collectives(compiled)
        assert {kind for kind, _ in sent} == {"all-reduce"}
        assert sum(size for _, size in sent) <= (features + 1) * classes + 8
        alone = jax.jit(grad).lower(x, w, b, labels).compile()
        assert flops(compiled) < flops(alone) / 3
        placed = jax.device_put((x, w, b, labels), tuple(shardings))
        assert_close(compiled(*placed), alone(x, w, b, labels), 1e-5)


def test_nan_is_the_likeliest_on_several_devices():
    x, w = jnp.ones((1, 1)), jnp.array([[1.0, jnp.nan, 2.0]])
    assert js.linear_softmax_summary(x, w, top_k=2).top_ids.tolist() == [[1, 2]]
