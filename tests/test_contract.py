"""The contract at the edges: one table, the same for every function by every road."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax as js

pytestmark = pytest.mark.usefixtures("strict_types")

INF, NAN = np.inf, np.nan
OF_ONE_PROGRAM = {
    *("_softmax", "_log_softmax", "_logsumexp", "_cross_entropy"),
    *("_cross_entropy_with_probs", "_weighted_sum", "_of_rows"),
    *("_of_kept", "_top_k_accuracy", "_reliability", "_threshold"),
}


class Loss(NamedTuple):
    """A way to the loss of each row of logits. Add one here to hold it to the table."""

    of: Callable  # (logits, labels, where) -> losses
    knows_labels: bool = True  # an id outside [0, classes) can reach it


def from_probs(logits, labels, where):
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return js.cross_entropy_with_probs(logits, targets, where=where)


def dense(logits, labels, where):
    return js.cross_entropy(logits, labels, where=where)


def from_log_softmax(logits, labels, where):
    safe = jnp.where(where[..., None], logits, 0)  # dropped before anything is computed
    picked = jnp.take_along_axis(js.log_softmax(safe), labels[..., None], -1)
    return jnp.where(where, -picked[..., 0], 0)


LOSSES = {
    "cross_entropy": Loss(dense),
    "cross_entropy_with_probs": Loss(from_probs, knows_labels=False),
    "log_softmax": Loss(from_log_softmax, knows_labels=False),
}
ROADS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f),
}


class Row(NamedTuple):
    """One row of the table: what goes in, and the loss and gradient that come out."""

    logits: list
    label: int
    loss: float
    gradient: list
    keep: bool = True


THIRD = 1 / 3
TABLE = {
    "uniform": Row([0, 0, 0], 0, np.log(3), [THIRD - 1, THIRD, THIRD]),
    "shifted": Row([1e6, 1e6, 1e6], 0, np.log(3), [THIRD - 1, THIRD, THIRD]),
    "certain and right": Row([200, 0, 0], 0, 0, [0, 0, 0]),
    "certain and wrong": Row([200, 0, 0], 1, 200, [1, -1, 0]),
    "1e9 on the label": Row([1e9, 0, 0], 0, 0, [0, 0, 0]),
    "1e9 elsewhere": Row([0, 1e9, 0], 0, 1e9, [-1, 1, 0]),
    "-inf elsewhere": Row([0, -INF, 0], 0, np.log(2), [-0.5, 0, 0.5]),
    "-inf on the label": Row([-INF, 0, 0], 0, INF, [-1, 0.5, 0.5]),
    "only the label is possible": Row([-INF, 0, -INF], 1, 0, [0, 0, 0]),
    "all -inf": Row([-INF, -INF, -INF], 0, NAN, [NAN, NAN, NAN]),
    "+inf on the label": Row([INF, 0, 0], 0, 0, [0, 0, 0]),
    "+inf elsewhere": Row([0, INF, 0], 0, INF, [-1, 1, 0]),
    "two +inf share": Row([INF, INF, 0], 0, np.log(2), [-0.5, 0.5, 0]),
    "NaN": Row([0, NAN, 0], 0, NAN, [NAN, NAN, NAN]),
    "NaN on the label": Row([NAN, 0, 0], 0, NAN, [NAN, NAN, NAN]),
    "dropped": Row([1, 2, 3], 0, 0, [0, 0, 0], keep=False),
    "dropped NaN": Row([NAN, INF, -INF], 0, 0, [0, 0, 0], keep=False),
    "dropped all -inf": Row([-INF, -INF, -INF], 0, 0, [0, 0, 0], keep=False),
}
BAD_LABELS = {
    f"label {label}{'' if keep else ', dropped'}": Row(
        [0, 1, 2], label, *((NAN, [NAN] * 3) if keep else (0, [0] * 3)), keep=keep
    )
    for label in (-1, -100, 3, 127)
    for keep in (True, False)
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_table(name, road):
    """All rows in one batch, so that none can spoil another."""
    loss = LOSSES[name]
    table = TABLE | (BAD_LABELS if loss.knows_labels else {})
    rows = list(table.values())
    logits = jnp.asarray([r.logits for r in rows], jnp.float32)
    labels = jnp.asarray([r.label for r in rows])
    where = jnp.asarray([r.keep for r in rows])

    def total(z, y, w):
        out = ROADS[road](loss.of)(z, y, w)
        return out.sum(), out

    gradient, losses = jax.grad(total, has_aux=True)(logits, labels, where)
    for key, row, got, grad in zip(table, rows, losses, gradient, strict=True):
        np.testing.assert_allclose(got, row.loss, rtol=1e-6, err_msg=key)
        if name == "cross_entropy":  # others add and subtract where the limit is inf
            np.testing.assert_allclose(grad, row.gradient, rtol=1e-6, err_msg=key)
        elif not row.keep:
            np.testing.assert_array_equal(grad, 0, err_msg=key)
        elif np.isfinite(row.loss):
            np.testing.assert_allclose(grad, row.gradient, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_spreads_over_the_possible_classes(smoothing):
    z = jnp.array([[0.0, -INF, 1.0]])
    want = js.cross_entropy(z[:, ::2], jnp.array([1]), label_smoothing=smoothing)
    loss = partial(js.cross_entropy, label_smoothing=smoothing)
    np.testing.assert_allclose(loss(z, jnp.array([2])), want, rtol=1e-6)
    gradient = jax.grad(lambda z: loss(z, jnp.array([2])).sum())(z)
    assert np.isfinite(gradient).all()
    assert gradient[0, 1] == 0


REDUCTIONS = {
    # logits: lse, softmax, gradient of lse
    "one class": ([3.0], 3.0, [1], [1]),
    "-inf": ([0.0, -INF], 0.0, [1, 0], [1, 0]),
    "all -inf": ([-INF, -INF], -INF, [NAN, NAN], [0, 0]),
    "+inf": ([INF, 0.0], INF, [1, 0], [1, 0]),
    "two +inf": ([INF, INF], INF, [0.5, 0.5], [0.5, 0.5]),
    "+inf and -inf": ([INF, -INF], INF, [1, 0], [1, 0]),
    "NaN": ([NAN, 0.0], NAN, [NAN, NAN], [NAN, NAN]),
    "1e9": ([1e9, 0.0], 1e9, [1, 0], [1, 0]),
    "the largest numbers": ([3e38, -3e38], 3e38, [1, 0], [1, 0]),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name, road):
    z, lse, probs, gradient = REDUCTIONS[name]
    z = jnp.asarray([z, [0.0] * len(z)])
    run = ROADS[road]
    np.testing.assert_allclose(run(js.logsumexp)(z)[0], lse, rtol=1e-6)
    np.testing.assert_allclose(run(js.softmax)(z)[0], probs, rtol=1e-6)
    np.testing.assert_allclose(np.exp(run(js.log_softmax)(z)[0]), probs, rtol=1e-6)
    got = jax.grad(lambda z: run(js.logsumexp)(z).sum())(z)
    np.testing.assert_allclose(got[0], gradient, rtol=1e-6)
    np.testing.assert_allclose(got[1], 1 / z.shape[1], rtol=1e-6)


@pytest.mark.parametrize("classes", [3, 20])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.usefixtures("elsewhere")
def test_the_edges_on_accelerators(kind, classes):
    """Of reductions and losses; what is more than a row's classes is ruled out."""
    eps = float(jnp.finfo(kind).eps)
    close = partial(np.testing.assert_allclose, rtol=2 * eps, atol=1e-37)

    def padded(rows, filler):
        rows = np.array([[*row, *[filler] * (classes - len(row))] for row in rows])
        return jnp.asarray(rows, jnp.float32)

    z = padded([r[0] for r in REDUCTIONS.values()], -INF).astype(kind)
    probs = padded([r[2] for r in REDUCTIONS.values()], 0)
    probs = jnp.where(jnp.isnan(probs).any(-1, keepdims=True), NAN, probs)
    close(np.float32(js.softmax(z)), probs)
    close(np.exp(np.float32(js.log_softmax(z))), probs)
    close(js.logsumexp(z), [r[1] for r in REDUCTIONS.values()])

    rows = [*TABLE.values(), *BAD_LABELS.values()]
    z = padded([r.logits for r in rows], -INF).astype(kind)
    labels = jnp.asarray([r.label for r in rows])
    labels = jnp.where(labels > 2, labels + classes, labels)
    where = jnp.asarray([r.keep for r in rows])

    def total(z):
        losses = js.cross_entropy(z, labels, where=where)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(z)
    close(losses, [r.loss for r in rows])
    want = padded([r.gradient for r in rows], 0)
    want = jnp.where(jnp.isnan(want).any(-1, keepdims=True), NAN, want)
    close(np.float32(gradient), want)


def test_where_along_the_class_axis():
    z = jnp.array([[1.0, NAN, 2.0], [INF, NAN, -INF]])
    keep = jnp.array([[True, False, True], [False, False, False]])
    first, last = js.softmax(z[0, ::2])
    np.testing.assert_allclose(js.softmax(z, where=keep)[0], [first, 0, last])
    np.testing.assert_array_equal(js.softmax(z, where=keep)[1], 0)
    np.testing.assert_array_equal(js.log_softmax(z, where=keep)[1], -INF)
    assert js.logsumexp(z, where=keep)[1] == -INF
    for f in (js.softmax, js.log_softmax, js.logsumexp):

        def total(z, f=f):
            out = f(z, where=keep)
            return jnp.where(jnp.isfinite(out), out, 0).sum()

        gradient = jax.grad(total)(z)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)
        assert gradient[0, 1] == 0


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (-1, 0), (0, 1, 2)])
@pytest.mark.parametrize("f", [js.logsumexp, js.softmax, js.log_softmax])
def test_axes(f, axis):
    z = jax.random.normal(jax.random.key(0), (2, 3, 4))
    peer = {js.logsumexp: jax.nn.logsumexp, js.softmax: jax.nn.softmax}.get(
        f, jax.nn.log_softmax
    )
    np.testing.assert_allclose(f(z, axis), peer(z, axis=axis), rtol=2e-6, atol=1e-6)
    if f is js.logsumexp:
        kept = f(z, axis, keepdims=True)
        assert kept.shape == jax.nn.logsumexp(z, axis, keepdims=True).shape


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "int32", "int64"])
@pytest.mark.parametrize("wide", [False, True])
def test_label_types(kind, wide):
    """Compared with the number of classes in a type that can hold both."""
    with jax.enable_x64(wide):
        labels = np.array([0, 127, -1 if kind[0] == "i" else 255]).astype(kind)
        losses = js.cross_entropy(np.zeros((3, 200), np.float32), labels)
        np.testing.assert_allclose(losses, [np.log(200), np.log(200), NAN], rtol=1e-6)


@pytest.mark.parametrize("kind", ["int64", "uint64"])
@pytest.mark.parametrize("wide", [False, True])
def test_labels_that_32_bits_do_not_hold(kind, wide):
    """JAX by itself wraps 2^32 to 0, and the least int64 too."""
    labels = np.array([2, 2**32, 2**32 + 1, np.iinfo(kind).max], kind)
    if kind == "int64":
        labels = np.append(labels, np.array([np.iinfo(kind).min, -(2**32)], kind))
    z = np.zeros((len(labels), 3), np.float32)
    expected = [np.log(3)] + [NAN] * (len(labels) - 1)
    with jax.enable_x64(wide):
        losses = js.cross_entropy(z, labels)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        losses = js.linear_cross_entropy(z, np.eye(3, dtype=np.float32), labels)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_batch_axes(batch):
    z = jax.random.normal(jax.random.key(1), (*batch, 4))
    y = jnp.full(batch, 2)
    losses = js.cross_entropy(z, y)
    assert losses.shape == js.logsumexp(z).shape == batch
    assert js.softmax(z).shape == js.log_softmax(z).shape == z.shape
    flat = js.cross_entropy(z.reshape(-1, 4), y.reshape(-1))
    np.testing.assert_array_equal(losses.reshape(-1), flat)
    assert js.mean_loss(losses) == (flat.mean() if flat.size else 0)


@pytest.mark.parametrize(
    "f",
    [
        js.softmax,
        js.log_softmax,
        js.logsumexp,
        lambda z: js.cross_entropy(z, jnp.zeros(7, int), label_smoothing=0.1),
        lambda z: js.cross_entropy_with_probs(z, z),
        lambda z: js.mean_linear_cross_entropy(z, z.T, jnp.zeros(7, int)),
        lambda z: js.linear_softmax_summary(z, z.T, jnp.zeros(7, int)),
        lambda z: js.kl_divergence(js.Logits(z), js.Probs(z)),
        lambda z: js.mutual_information(js.Probs(z)),
        lambda z: js.top_k_accuracy(z, jnp.zeros(7, int)),
        lambda z: js.reliability(z, jnp.zeros(7, int)),
        lambda z: js.conformal_threshold(z, jnp.zeros(7, int), miss_rate=0.1),
    ],
)
def test_called_by_hand_it_is_compiled_once_and_in_a_trace_it_is_no_call(f, caplog):
    f(jnp.ones((7, 4)))  # JAX 0.12 forgets its programs when a primitive is made
    z = jnp.ones((7, 5))
    with jax.log_compiles(True):
        f(z)
        assert OF_ONE_PROGRAM & compiled(caplog)
        caplog.clear()
        f(z)
    assert not OF_ONE_PROGRAM & compiled(caplog)
    calls = set(re.findall(r"call @(\w+)", jax.jit(f).lower(z).as_text()))
    assert not calls & OF_ONE_PROGRAM


def compiled(caplog):
    """The names of the programs that JAX says it compiles."""
    return set(re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text))


def test_what_is_not_a_jax_array():
    z = np.array([[1.0, 2.0]], np.float32)
    assert js.cross_entropy(z, np.array([1])).shape == (1,)
    assert js.cross_entropy(z[0], 1).shape == ()
    assert js.cross_entropy(z[0], np.int64(1)).dtype == jnp.float32
    assert js.logsumexp(z).dtype == js.softmax(z).dtype == jnp.float32
    assert js.mean_loss(3.0) == 3
    assert js.mean_loss(np.float32(3)).dtype == jnp.float32


def test_weak_types_stay_out_of_the_answer():
    z = jnp.broadcast_to(jnp.asarray(1.0), (2, 3))
    assert js.logsumexp(z).dtype == js.softmax(z).dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_x64_leaves_float32_alone():
    z = jnp.zeros((2, 3), jnp.float32)
    y = jnp.zeros(2, int)
    for out in (
        js.cross_entropy(z, y),
        js.cross_entropy(z, y, label_smoothing=0.1),
        js.cross_entropy_with_probs(z, z + 1),
        js.nll_from_probs(z + 1, y),
        js.logsumexp(z),
        js.softmax(z),
        js.mean_loss(z),
    ):
        assert out.dtype == jnp.float32
    assert js.cross_entropy(z.astype(jnp.float64), y).dtype == jnp.float64


def table_of(z):
    """A table of two variables, made of a row so that derivatives stay in theirs."""
    return js.Logits(jnp.stack([z, z[..., ::-1]], -2))


def entries(f):
    """A reduction with whole rows dropped; what is left of them is -inf or 0."""

    def kept(z, y, w):
        out = f(z, where=jnp.broadcast_to(w[..., None], z.shape))
        return jnp.where(jnp.isneginf(out), 0, out)

    return kept


def nll_from_probs(z, y, w):
    safe = jnp.where(w[..., None], z, 1)  # it has no where of its own
    return jnp.where(w, js.nll_from_probs(safe, y), 0)


def linear(f):
    return lambda z, y, w: f(z, jnp.eye(3, dtype=z.dtype), y, where=w)


PUBLIC = {
    "logsumexp": entries(js.logsumexp),
    "softmax": entries(js.softmax),
    "log_softmax": entries(js.log_softmax),
    "cross_entropy": lambda z, y, w: js.cross_entropy(z, y, where=w),
    "cross_entropy_with_probs": lambda z, y, w: js.cross_entropy_with_probs(
        z, jnp.full_like(z, 0.25), where=w
    ),
    "nll_from_probs": nll_from_probs,
    "mean_loss": lambda z, y, w: jax.vmap(js.mean_loss)(z[..., 1], w),
    "linear_cross_entropy": linear(js.linear_cross_entropy),
    "mean_linear_cross_entropy": lambda z, y, w: jax.vmap(
        linear(js.mean_linear_cross_entropy)
    )(z[:, None], y[:, None], w[:, None]),
    "linear_softmax_summary": lambda z, y, w: (
        linear(js.linear_softmax_summary)(z, y, w).nll
    ),
    "entropy": lambda z, y, w: js.entropy(js.Logits(z), where=w),
    "perplexity": lambda z, y, w: js.perplexity(js.Probs(z), where=w),
    "cross_entropy_between": lambda z, y, w: js.cross_entropy_between(
        js.Probs(z), js.Logits(z), where=w
    ),
    "kl_divergence": lambda z, y, w: js.kl_divergence(
        js.Logits(z), js.Logits(z[..., ::-1]), where=w
    ),
    "js_divergence": lambda z, y, w: js.js_divergence(
        js.Logits(z), js.Probs(z), where=w
    ),
    "mutual_information": lambda z, y, w: js.mutual_information(table_of(z), where=w),
    "conditional_entropy": lambda z, y, w: js.conditional_entropy(
        table_of(z), given=-1, where=w
    ),
}
OF_ROWS = [
    *("reductions", "losses", "linear", "linear_summary"),
    *("information", "divergences", "tables"),
]


def test_the_list_of_public_functions_of_rows_is_whole():
    rooms = {f"jax_softmax._{room}" for room in OF_ROWS}
    functions = {n for n, f in vars(js).items() if inspect.isfunction(f)}
    assert set(PUBLIC) == {n for n in functions if vars(js)[n].__module__ in rooms}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function(name):
    """Dropped rows, NaN in its own row only, vmap, no rows, narrow types."""
    f = PUBLIC[name]
    z = jnp.array([[0.5, 1, 2], [0, NAN, 1], [NAN, INF, -INF], [0.5, 1, 2]])
    y, w = jnp.array([1, 1, -100, 1]), jnp.array([True, True, False, True])

    @jax.jit
    def results(z, y, w):
        def total(z):
            rows = f(z, y, w)
            return rows.sum(), rows

        gradient, rows = jax.grad(total, has_aux=True)(z)
        one_by_one = jax.vmap(lambda *row: f(*(r[None] for r in row))[0])(z, y, w)
        narrow = z.astype(jnp.bfloat16)
        low = f(narrow, y, w), jax.grad(lambda z: f(z, y, w).sum())(narrow)
        return rows, gradient, one_by_one, low, f(z[:0], y[:0], w[:0])

    rows, gradient, one_by_one, low, none = results(z, y, w)
    good = rows[0]
    assert np.isfinite(good).all()
    assert np.isfinite(gradient[0]).all()
    np.testing.assert_array_equal(rows[3], good)
    np.testing.assert_array_equal(gradient[3], gradient[0])
    assert np.isnan(rows[1]).any()
    np.testing.assert_array_equal(rows[2], 0)
    np.testing.assert_array_equal(gradient[2], 0)
    np.testing.assert_allclose(one_by_one, rows, rtol=1e-6)
    assert none.shape == (0, *rows.shape[1:])
    assert rows.dtype == jnp.float32
    keeps_type = name in ("softmax", "log_softmax")
    assert low[0].dtype == (jnp.bfloat16 if keeps_type else jnp.float32)
    assert low[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(low[0].astype(jnp.float32), rows, rtol=0.02)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_wants_floating_point(name):
    z, y, w = jnp.ones((2, 3), int), jnp.zeros(2, int), jnp.ones(2, bool)
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match="float"):
        jax.eval_shape(PUBLIC[name], z, y, w)


def test_mean_of_nothing_is_0_with_gradient_0():
    losses, nothing = jnp.array([NAN, INF]), jnp.array([False, False])
    assert js.mean_loss(losses, nothing) == 0
    gradient = jax.grad(lambda x: js.mean_loss(x, nothing))(losses)
    np.testing.assert_array_equal(gradient, 0)


def test_no_rows_of_numpys_64_bit_labels():
    losses = js.cross_entropy(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert losses.shape == (0,)


def test_a_mean_over_0_is_0_with_gradient_0():
    def mean(losses):
        return js.mean_loss(losses, normalizer=0.0)

    value, gradient = jax.value_and_grad(mean)(jnp.array([1.0, 2.0]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_of_no_class_spoils_the_gradient_of_its_row_too(label):
    p, y = jnp.full((3, 2), 0.5), jnp.array([0, label, 1])
    for f in (js.nll_from_probs, js.brier_score):
        gradient = jax.grad(lambda p, f=f: f(p, y).sum())(p)
        np.testing.assert_array_equal(
            np.isnan(gradient), [2 * [False], 2 * [True], 2 * [False]]
        )
    keep = jnp.array([True, True, False])
    for f in (
        js.expected_calibration_error,
        lambda *rows, where: sum(js.brier_decomposition(*rows, where=where)),
    ):
        value, gradient = jax.value_and_grad(f)(p, y, where=keep)
        assert np.isnan(value)
        assert np.isnan(gradient[:2]).any(-1).all()
        np.testing.assert_array_equal(gradient[2], 0)


def test_nll_from_probs_of_a_row_with_a_nan():
    p = jnp.array([[0.5, NAN], [0.5, 0.5]])
    losses = js.nll_from_probs(p, jnp.array([0, 0]))
    np.testing.assert_array_equal(np.isnan(losses), [True, False])


def test_nll_from_probs():
    probs = jnp.array([[0.25, 0.75], [0, 1], [0.5, 0.5]])
    got = js.nll_from_probs(probs, jnp.array([0, 0, 2]))
    np.testing.assert_allclose(got, [np.log(4), INF, NAN], rtol=1e-6)


F, N, B = np.zeros((2, 3), np.float32), np.zeros((2, 3), int), np.zeros((2, 3), bool)
Y = np.zeros(2, int)
MISTAKES = {
    "integer logits": (lambda: js.cross_entropy(N, Y), TypeError, "logits", "int"),
    "boolean x": (lambda: js.softmax(B), TypeError, "x", "bool"),
    "integer x": (lambda: js.logsumexp(N), TypeError, "x", "int"),
    "complex x": (lambda: js.logsumexp(F + 1j), TypeError, "x", "complex"),
    "scalar logits": (lambda: js.cross_entropy(1.0, 0), ValueError, "logits", r"\(\)"),
    "no class": (
        lambda: js.cross_entropy(F[:, :0], Y),
        ValueError,
        "logits",
        r"\(2, 0\)",
    ),
    "empty axis": (lambda: js.softmax(F[:, :0]), ValueError, "axis", r"\(2, 0\)"),
    "axis too large": (lambda: js.softmax(F, 2), ValueError, "axis", "2"),
    "axis twice": (lambda: js.softmax(F, (1, -1)), ValueError, "axis", r"\(1, -1\)"),
    "labels [batch, 1]": (
        lambda: js.cross_entropy(F, Y[:, None]),
        ValueError,
        "labels",
        r"\(2,\), got \(2, 1\)",
    ),
    "labels (1,)": (
        lambda: js.cross_entropy(F, Y[:1]),
        ValueError,
        "labels",
        r"\(2,\), got \(1,\)",
    ),
    "scalar label": (
        lambda: js.cross_entropy(F, 0),
        ValueError,
        "labels",
        r"\(2,\), got \(\)",
    ),
    "float labels": (
        lambda: js.cross_entropy(F, F[:, 0]),
        TypeError,
        "labels",
        r"convert with labels.astype\(int\)",
    ),
    "probabilities for labels": (
        lambda: js.cross_entropy(F, F),
        TypeError,
        "labels",
        "cross_entropy_with_probs",
    ),
    "one-hot integer labels": (
        lambda: js.cross_entropy(F, N),
        ValueError,
        "labels",
        r"\(2,\), got \(2, 3\)",
    ),
    "labels as probs": (
        lambda: js.cross_entropy_with_probs(
            np.zeros((3, 3), np.float32), np.zeros(3, int)
        ),
        TypeError,
        "probs",
        "int",
    ),
    "one row of probs": (
        lambda: js.cross_entropy_with_probs(F, F[:1]),
        ValueError,
        "probs",
        r"\(2, 3\), got \(1, 3\)",
    ),
    "where by class": (
        lambda: js.cross_entropy(F, Y, where=B),
        ValueError,
        "where",
        r"\(2,\), got \(2, 3\)",
    ),
    "where of numbers": (
        lambda: js.cross_entropy(F, Y, where=F[:, 0]),
        TypeError,
        "where",
        "float32",
    ),
    "where too long": (
        lambda: js.softmax(F, where=np.ones(4, bool)),
        ValueError,
        "where",
        r"\(2, 3\), got \(4,\)",
    ),
    "smoothing 2": (
        lambda: js.cross_entropy(F, Y, label_smoothing=2),
        ValueError,
        "label_smoothing",
        "2",
    ),
    "smoothing that is traced": (
        lambda: jax.jit(lambda s: js.cross_entropy(F, Y, label_smoothing=s))(0.1),
        TypeError,
        "label_smoothing",
        "known while tracing",
    ),
    "no logits": (lambda: js.cross_entropy(None, Y), TypeError, "logits", "NoneType"),
    "words for labels": (
        lambda: js.cross_entropy(F, ["cat", "dog"]),
        TypeError,
        "labels",
        "list",
    ),
    "no axis": (lambda: js.softmax(F, axis=None), TypeError, "axis", "int.*None"),
    "axis True": (lambda: js.softmax(F, axis=True), TypeError, "axis", "int.*True"),
    "axis 1.0": (lambda: js.softmax(F, axis=1.0), TypeError, "axis", r"int.*1\.0"),
    "base e": (lambda: js.entropy(js.Logits(F), base="e"), TypeError, "base", "str"),
    "integer probs": (lambda: js.nll_from_probs(N, Y), TypeError, "probs", "int"),
    "integer losses": (lambda: js.mean_loss(Y), TypeError, "losses", "int"),
    "untold distribution": (lambda: js.entropy(F), TypeError, "p", "Logits.*Probs"),
    "integer distribution": (lambda: js.entropy(js.Probs(N)), TypeError, "p", "int"),
    "no class to be in": (
        lambda: js.entropy(js.Logits(F[:, :0])),
        ValueError,
        "p",
        r"\(2, 0\)",
    ),
    "two shapes": (
        lambda: js.kl_divergence(js.Logits(F), js.Probs(F[0])),
        ValueError,
        "q",
        r"\(2, 3\), got \(3,\)",
    ),
    "where by class of p": (
        lambda: js.entropy(js.Logits(F), where=B),
        ValueError,
        "where",
        r"\(2,\), got \(2, 3\)",
    ),
    "a row for a table": (
        lambda: js.mutual_information(js.Probs(F[0])),
        ValueError,
        "joint",
        r"two axes, got shape \(3,\)",
    ),
    "given 0": (
        lambda: js.conditional_entropy(js.Probs(F), given=0),
        ValueError,
        "given",
        "0",
    ),
    "base 1": (lambda: js.entropy(js.Logits(F), base=1), ValueError, "base", "1"),
    "a masked array": (
        lambda: js.softmax(np.ma.masked_array(F, np.asarray(F) > 0)),
        TypeError,
        "x must not be a masked array",
        "where",
    ),
    "words": (
        lambda: js.softmax(np.array(["a"])),
        TypeError,
        "x must be an array of numbers",
        "<U1",
    ),
    "a label beyond 64 bits": (
        lambda: js.cross_entropy(F, [2**70, 0]),
        ValueError,
        "labels must fit int32",
        str(2**70),
    ),
    "half a bin": (
        lambda: js.reliability(F, Y, bins=2.5),
        TypeError,
        "bins must be a Python integer",
        "float",
    ),
    "half a guess": (
        lambda: js.top_k_accuracy(F, Y, k=1.0),
        TypeError,
        "k must be a Python integer",
        "float",
    ),
    "a base that is an array": (
        lambda: js.entropy(js.Logits(F), base=F[0]),
        TypeError,
        "base must be a Python number",
        "ndarray",
    ),
    "an infinite pull": (
        lambda: js.vector_scaling(F, Y, l2=INF),
        ValueError,
        "l2 must be finite",
        "inf",
    ),
    "a rate in words": (
        lambda: js.conformal_threshold(F, Y, miss_rate="a tenth"),
        TypeError,
        "miss_rate must be a Python number",
        "str",
    ),
    "a normalizer that int32 does not hold": (
        lambda: js.mean_loss(F[0], normalizer=np.int64(2**32)),
        ValueError,
        "normalizer must fit int32",
        "4294967296",
    ),
    "a normalizer that is a mask": (
        lambda: js.mean_loss(F[0], normalizer=True),
        TypeError,
        "normalizer must be a real number",
        "bool",
    ),
    "several normalizers": (
        lambda: js.mean_loss(F[0], normalizer=F[0]),
        ValueError,
        "normalizer must be one number",
        r"\(3,\)",
    ),
    "several penalties": (
        lambda: js.SoftmaxRegression(F, F[0]).objective(F[:, :2], Y, l2=F[0]),
        ValueError,
        "l2 must be one number",
        r"\(3,\)",
    ),
}


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_static_mistakes_name_argument_got_and_wanted(mistake):
    call, error, argument, detail = MISTAKES[mistake]
    with pytest.raises(error, match=f"(?s){argument}.*{detail}"):
        call()
    with pytest.raises(error):
        jax.eval_shape(call)


@pytest.mark.parametrize("rows", [7, 8])
def test_called_by_hand_again_nothing_is_compiled(rows, caplog):
    """Nor kept: each program that is would stay in memory."""
    p, y = jnp.full((rows, 10), 0.1), jnp.arange(rows)
    both = js.Probs(p), js.Logits(p)
    calls = [
        lambda: js.nll_from_probs(p, y),
        lambda: js.entropy(both[0]),
        lambda: js.js_divergence(*both),
        lambda: jax.grad(lambda p: js.kl_divergence(js.Probs(p), both[1]).sum())(p),
        lambda: js.top_k_accuracy(p, y),
        lambda: js.conformal_threshold(p, y, miss_rate=0.1),
        lambda: js.brier_decomposition(p, y),
        lambda: js.confusion_matrix(y, y, 10),
    ]
    for call in calls:
        call()
        with jax.log_compiles(True):
            call()
    assert not compiled(caplog)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_types_too_narrow_for_a_contract_are_refused(dtype):
    """They have no infinity, or hold no loss."""
    with pytest.raises(TypeError, match="of 16 bits or more, got float8"):
        js.softmax(jnp.zeros((2, 3), dtype))
