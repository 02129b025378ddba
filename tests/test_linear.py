import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import at, softmax, ulp_error

from jax_softmax import _linear_plan
from jax_softmax._linear import linear_cross_entropy, mean_linear_cross_entropy
from jax_softmax._linear_summary import linear_softmax_summary

pytestmark = pytest.mark.usefixtures("strict_types", "as_on_one_device")

ROWS, FEATURES, CLASSES = 11, 5, 23  # a prime number of classes
V = CLASSES
CHUNKS = [(4, 1), (4, V // 2 + 1), (11, V - 1), (3, V), (16, V + 3), None]
SCALES = [0.1, 30.0]


def arrays(scale=1.0, seed=0, rows=ROWS, features=FEATURES, classes=CLASSES):
    """Logits of about this size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    w = rng.normal(size=(features, classes)).astype(np.float32)
    w *= np.float32(scale / features**0.5)
    b = (scale * rng.normal(size=classes)).astype(np.float32)
    labels = rng.integers(0, classes, rows).astype(np.int32)
    return tuple(map(jnp.asarray, (x, w, b, labels)))


def plain(x, w, b, labels, smoothing=0.0, softcap=None):
    """(loss, lse) as in a textbook, differentiated by JAX."""
    z = x @ w + b
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    lse = jax.nn.logsumexp(z, -1)
    nll = lse - jnp.take_along_axis(z, labels[..., None], -1)[..., 0]
    return (1 - smoothing) * nll + smoothing * (lse[..., None] - z).mean(-1), lse


def close(got, want, tolerance=1e-5):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        size = max(1e-30, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * size)


def exact_error(loss, x, w, b, labels):
    z = np.asarray(jax.jit(lambda x, w, b: x @ w + b)(x, w, b))
    return ulp_error(np.asarray(loss), -at(softmax(z).log_probs, labels))


# Integers as features and weights: every way to multiply gives the same logits.
def whole_numbers(scale, seed=0, rows=64, features=16, classes=1009):
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, (rows, features)).astype(np.float32)
    w = rng.integers(-4, 5, (features, classes)).astype(np.float32) / 64 * scale
    b = rng.integers(-64, 65, classes).astype(np.float32) / 64
    labels = rng.integers(0, classes, rows).astype(np.int32)
    return tuple(map(jnp.asarray, (x, w.astype(np.float32), b, labels)))


@pytest.mark.parametrize("chunk", [(64, 1009), (17, 100)])
def test_loss_is_within_3_ulp_of_the_exact_loss_of_its_logits(chunk):
    run = jax.jit(lambda x, w, b, y: linear_cross_entropy(x, w, y, b=b, chunk=chunk))
    for scale in (0.25, 4.0, 32.0):
        x, w, b, labels = whole_numbers(scale)
        likely = (x @ w + b).argmax(-1).astype(jnp.int32)
        for ids in (labels, likely):
            loss = run(x, w, b, ids)
            assert exact_error(loss, x, w, b, ids).max() <= 3
            assert (loss >= 0).all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_chunk_gives_values_and_gradients_of_the_plain_loss(chunk):
    labels = arrays()[-1]
    cotangents = tuple(jax.random.normal(jax.random.key(1), (2, ROWS)))
    options = {"label_smoothing": 0.1, "softcap": 20.0}

    def ours(x, w, b):
        more = {"return_lse": True, "chunk": chunk}
        return linear_cross_entropy(x, w, labels, b=b, **more, **options)

    def theirs(x, w, b):
        return plain(x, w, b, labels, *options.values())

    def pulled(f):
        return jax.jit(lambda *a: (f(*a), jax.vjp(f, *a)[1](cotangents)))

    ours, theirs = pulled(ours), pulled(theirs)
    for scale in SCALES:
        x, w, b, _ = arrays(scale)
        close(ours(x, w, b), theirs(x, w, b))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_any_chunk_gives_the_mean_and_its_gradients(chunk):
    labels = arrays()[-1]
    weights = jax.random.uniform(jax.random.key(1), (ROWS,))

    def ours(x, w, b, weights):
        options = {"weights": weights, "z_loss": 0.01, "chunk": chunk}
        return mean_linear_cross_entropy(x, w, labels, b=b, **options)

    def theirs(x, w, b, weights):
        loss, lse = plain(x, w, b, labels)
        return ((loss + 0.01 * lse**2) * weights).sum() / weights.sum()

    every = (0, 1, 2, 3)
    ours, theirs = (jax.jit(jax.value_and_grad(f, every)) for f in (ours, theirs))
    for scale in SCALES:
        x, w, b, _ = arrays(scale)
        close(ours(x, w, b, weights), theirs(x, w, b, weights), 2e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_forward_mode_and_hessian_vector_products(mean):
    x, w, b, labels = arrays(2.0)
    tangents = (x[::-1], w[:, ::-1], b[::-1])
    a = jnp.linspace(-1, 1, ROWS)

    def ours(x, w, b):
        if mean:
            options = {"weights": a, "normalizer": 3.0, "label_smoothing": 0.1}
            return mean_linear_cross_entropy(
                x, w, labels, b=b, chunk=(11, 9), **options
            )
        options = {"label_smoothing": 0.1, "chunk": (11, 9)}
        return (a * linear_cross_entropy(x, w, labels, b=b, **options)).sum() / 3

    def theirs(x, w, b):
        return (a * plain(x, w, b, labels, 0.1)[0]).sum() / 3

    def derivatives(f):
        grad = jax.grad(f, (0, 1, 2))

        def run(*primals):
            forward = jax.jvp(f, primals, tangents)
            over_reverse = jax.jvp(grad, primals, tangents)[1]
            over_forward = jax.grad(lambda x: jax.jvp(f, (x, w, b), tangents)[1])(x)
            return forward, over_reverse, over_forward

        return jax.jit(run)

    close(derivatives(ours)(x, w, b), derivatives(theirs)(x, w, b))


def test_vmap_is_a_loop():
    x, w, b, labels = arrays()
    many = jnp.stack([w, -w, 2 * w])

    def step(w):
        def loss(x, w):
            rows = linear_cross_entropy(x, w, labels, b=b, chunk=(11, 9))
            return rows.sum() + mean_linear_cross_entropy(x, w, labels, chunk=(11, 9))

        return jax.value_and_grad(loss, (0, 1))(x, w)

    looped = [jax.jit(step)(w) for w in many]
    close(jax.jit(jax.vmap(step))(many), jax.tree.map(lambda *a: jnp.stack(a), *looped))

    def outside(x, w):
        one = jax.vmap(lambda x, y: linear_cross_entropy(x, w, y, chunk=(2, 9)))
        return one(x[:, None], labels[:, None]).sum()

    want = jax.grad(lambda *a: plain(*a, 0 * b, labels)[0].sum(), (0, 1))(x, w)
    close(jax.jit(jax.grad(outside, (0, 1)))(x, w), want)


def test_a_square_tied_embedding_is_read_the_way_it_is_said_to_be():
    x, w, _, labels = arrays(features=7, classes=7)

    def mean(w, tied):
        return mean_linear_cross_entropy(x, w, labels, tied=tied)

    run = jax.jit(jax.value_and_grad(mean), static_argnums=1)
    (value, grad), (tied_value, tied_grad) = run(w, False), run(w.T, True)
    close((tied_value, tied_grad.T), (value, grad))
    assert not np.allclose(run(w, True)[0], value)


def test_batch_axes_and_jit_agree_with_flat_and_eager():
    x, w, _, labels = arrays(rows=12)
    shaped = jax.jit(linear_cross_entropy)(x.reshape(3, 4, -1), w, labels.reshape(3, 4))
    assert shaped.shape == (3, 4)
    close(shaped.reshape(-1), linear_cross_entropy(x, w, labels))


def test_edges_of_the_contract():
    x, w, b, labels = arrays()
    keep = jnp.arange(ROWS) % 3 > 0
    x = x.at[0].set(jnp.nan).at[3].set(jnp.inf)  # dropped
    b = b.at[5].set(-jnp.inf)
    labels = labels.at[0].set(-100).at[1].set(4).at[2].set(4)

    def loss(x, w, b):
        options = {"where": keep, "label_smoothing": 0.1, "chunk": (4, 9)}
        rows = linear_cross_entropy(x, w, labels, b=b, **options)
        return rows.sum() + mean_linear_cross_entropy(
            x, w, labels, b=b, **options
        ), rows

    labels = jnp.where(labels == 5, 4, labels)
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, rows), (dx, dw, db) = run(x, w, b)
    assert (rows[~keep] == 0).all()
    assert np.isfinite(rows).all()
    assert (dx[~keep] == 0).all()
    assert all(np.isfinite(g).all() for g in (dx, dw, db))
    assert (dw[:, 5] == 0).all()
    assert db[5] == 0

    def none_kept(w):
        return mean_linear_cross_entropy(x, w, labels, where=jnp.zeros(ROWS, bool))

    value, grad = jax.jit(jax.value_and_grad(none_kept))(w)
    assert value == 0
    assert (grad == 0).all()


def test_optax_takes_a_negative_label_for_a_class_counted_from_the_end():
    x, w, _, labels = arrays()

    def loss(x, labels):
        rows = linear_cross_entropy(x, w, labels, chunk=(4, 9))
        return rows.sum(), rows

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    others = np.arange(ROWS) != 2
    for label in (-1, -100, CLASSES, 2**31 - 1):
        (_, rows), dx = run(x, labels.at[2].set(label))
        assert np.isnan(rows[2])
        assert np.isfinite(rows[others]).all()
        assert np.isnan(dx[2]).all()
        assert np.isfinite(dx[others]).all()


def test_tokamax_counts_the_zero_columns_it_pads_classes_with():
    x, w, labels = jnp.zeros((4, 8)), jnp.zeros((8, 3328)), jnp.zeros(4, jnp.int32)
    options = {"chunk": (4, 2048), "return_lse": True}
    b = jnp.full(3328, -9.0)
    run = jax.jit(lambda: linear_cross_entropy(x, w, labels, b=b, **options))
    loss, lse = run()
    np.testing.assert_allclose(lse, np.log(3328) - 9, rtol=1e-6)
    np.testing.assert_allclose(loss, np.log(3328), rtol=1e-6)


def test_maxtext_drops_the_cotangent_of_the_second_output():
    x, w, b, labels = arrays()

    def z_loss(x):
        options = {"b": b, "return_lse": True, "chunk": (4, 9)}
        return (linear_cross_entropy(x, w, labels, **options)[1] ** 2).sum()

    want = jax.grad(lambda x: (plain(x, w, b, labels)[1] ** 2).sum())(x)
    close(jax.jit(jax.grad(z_loss))(x), want)


def test_liger_cannot_rescale_the_gradient_of_a_row():
    x, w, b, labels = arrays()
    scale = jnp.linspace(-3, 5, ROWS)

    def loss(x):
        return (scale * linear_cross_entropy(x, w, labels, b=b)).sum()

    want = jax.grad(lambda x: (scale * plain(x, w, b, labels)[0]).sum())(x)
    close(jax.jit(jax.grad(loss))(x), want)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16])
def test_narrow_types_against_the_float32_of_the_same_numbers(kind):
    """Forward and backward have one precision: at |logit| = 160 as well as at 0.1."""
    labels = arrays(rows=32)[-1]

    def mean(x, w):
        return mean_linear_cross_entropy(x, w, labels, chunk=(16, 12))

    def rows(x, w):
        return linear_cross_entropy(x, w, labels, chunk=(16, 12)).mean()

    def oracle(x, w):
        return plain(x, w, 0, labels)[0].mean()

    runs = [jax.jit(jax.value_and_grad(f, (0, 1))) for f in (oracle, mean, rows)]
    for scale in (0.1, 4.0, 160.0):
        x, w, *_ = arrays(scale, features=16, rows=32)
        x, w = x.astype(kind), w.astype(kind)
        value, grads = runs[0](x.astype(jnp.float32), w.astype(jnp.float32))
        for run in runs[1:]:
            got, got_grads = run(x, w)
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, value, rtol=1e-5)
            assert all(g.dtype == kind for g in got_grads)
            close(got_grads, grads, 4 * float(jnp.finfo(kind).eps))


def test_mixed_types_keep_their_own_gradients(strict_types):
    x, w, b, labels = arrays()

    def loss(x, w, b):
        rows = linear_cross_entropy(x, w, labels, b=b, chunk=(4, 9))
        return rows.sum() + mean_linear_cross_entropy(x, w, labels, b=b, chunk=(4, 9))

    primals = (x.astype(jnp.bfloat16), w, b.astype(jnp.float16))
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*primals)
    assert [g.dtype for g in grads] == [p.dtype for p in primals]


def test_ragged_micro_batches_add_up_to_the_mean():
    x, w, b, labels = arrays()

    def mean(w, start, stop, normalizer):
        rows = slice(start, stop)
        options = {"b": b, "normalizer": normalizer}
        return mean_linear_cross_entropy(x[rows], w, labels[rows], **options)

    step = jax.jit(jax.value_and_grad(mean), static_argnums=(1, 2))
    edges = [0, 2, 3, 11]
    parts = [step(w, start, stop, 11.0) for start, stop in itertools.pairwise(edges)]
    total = jax.tree.map(lambda *a: sum(a), *parts)
    close(total, step(w, 0, 11, None), 1e-6)


@pytest.fixture
def firsts(fresh_traces, monkeypatch):
    """How many tokens were cut off for a first chunk, each time that tiles were cut."""
    cut, found = _linear_plan._cut, []

    def recorded(*args):
        head = cut(*args)
        found.append(head.first)
        return head

    monkeypatch.setattr(_linear_plan, "_cut", recorded)
    return found


def test_what_is_kept_where_the_gradient_of_w_will_be(firsts, monkeypatch):
    """By default on a CPU, of as many tokens as there are features; then of others."""
    monkeypatch.setattr(_linear_plan, "KEEPING_COSTS", 1)

    def flat(w, x, labels):
        return plain(x, w, 0, labels)[0].mean()

    def ours(w, x, labels):
        return mean_linear_cross_entropy(x, w, labels)

    def tied(w, x, labels):
        return mean_linear_cross_entropy(x, w.T, labels, tied=True)

    def derivatives(f, w, x, labels):
        def loss(w, x):
            return f(w, x, labels)

        found = jax.value_and_grad(loss, (0, 1))(w, x)
        if len(x) == 7:
            return found, jax.jvp(jax.grad(loss), (w, x), (w[::-1], x))[1]
        return found

    for rows in (7, 3, 12):  # as many as features, fewer, more
        x, w, _, labels = arrays(3.0, rows=rows, features=7, classes=1031)
        want, *got = (
            jax.jit(jax.vmap(partial(derivatives, f), in_axes=(0, None, None)))
            for f in ((flat, ours, tied) if rows == 7 else (flat, ours))
        )
        many = jnp.stack([w, 0 * w])  # all equal: every class is a largest one
        for one in got:
            firsts.clear()
            close(one(many, x, labels), want(many, x, labels))
            assert min(rows, 7) in firsts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("limit", "first"),
    [({"MOST_IN_PLACE": 4}, 4), ({"KEPT_BYTES": {True: 0, False: 0}}, 7)],
    ids=["few", "rest made again"],
)
def test_a_first_chunk_in_place_and_others(limit, first, tied, firsts, monkeypatch):
    monkeypatch.setattr(_linear_plan, "KEEPING_COSTS", 1)
    for name, value in limit.items():
        monkeypatch.setattr(_linear_plan, name, value)
    x, w, b, labels = arrays(3.0, rows=29, features=7, classes=1031)

    def ours(x, w, b):
        w = w.T if tied else w
        return mean_linear_cross_entropy(x, w, labels, b=b, tied=tied)

    def flat(x, w, b):
        return plain(x, w, b, labels)[0].mean()

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, w, b) for f in (ours, flat)
    )
    close(got, want)
    assert first in firsts


@pytest.mark.parametrize(("features", "first"), [(768, 512), (300, 300), (64, 0)])
def test_logits_are_kept_where_matmuls_cost_more(features, first, firsts):
    shapes = (1024, features), (features, 5000)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    labels = jax.ShapeDtypeStruct((1024,), jnp.int32)
    jax.jit(jax.grad(mean_linear_cross_entropy, (0, 1))).trace(x, w, labels)
    assert first in firsts
    assert max(firsts) == first


def test_skipped_tiles_change_the_gradient_by_no_more_than_is_said():
    x, w, _, labels = arrays(1.0, rows=64, features=16, classes=1031)
    labels = labels % 100
    b = jnp.where(jnp.arange(1031) < 200, 0.0, -9.0)

    def mean(limit):
        def loss(w, b):
            options = {"b": b, "chunk": (16, 40), "skip_below": limit}
            return mean_linear_cross_entropy(x, w, labels, **options)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(w, b)

    value, (_, db) = mean(0.0)
    skipped, (_, skipped_db) = mean(1e-4)
    np.testing.assert_allclose(skipped, value, rtol=1e-6)
    assert (skipped_db[200:] == 0).all()
    assert (db[200:] != 0).all()
    assert jnp.abs(db - skipped_db).max() <= 1e-4


def test_only_what_is_differentiated_is_multiplied():
    x, w, _, labels = arrays()

    def products(argnums):
        step = jax.grad(lambda *a: mean_linear_cross_entropy(*a, labels), argnums)
        return jax.jit(step).lower(x, w).as_text().count("dot_general")

    alone = products(0)
    assert products((0, 1)) > alone


@pytest.mark.parametrize("chunk", [(4, 12), (16, V + 3), (3, 1)])
def test_summary(chunk):
    x, w, b, labels = arrays(2.0)
    run = jax.jit(
        lambda: linear_softmax_summary(x, w, labels, b=b, top_k=5, chunk=chunk)
    )
    got = run()
    log_p = jax.nn.log_softmax(x @ w + b)
    top, ids = jax.lax.top_k(log_p, 5)
    close(got.nll, plain(x, w, b, labels)[0])
    close(got.lse, plain(x, w, b, labels)[1])
    close(got.entropy, -(jnp.exp(log_p) * log_p).sum(-1))
    close(got.top_log_probs, top)
    assert (got.top_ids == ids).all()
    assert (got.argmax == ids[:, 0]).all()


def test_summary_of_ties_and_ruled_out_classes():
    b = jnp.array([-jnp.inf, 0.0, 0.0, -jnp.inf, 0.0])
    x, w, options = jnp.zeros((1, 2)), jnp.zeros((2, 5)), {"top_k": 3, "chunk": (1, 2)}
    got = jax.jit(lambda: linear_softmax_summary(x, w, b=b, **options))()
    assert got.nll is None
    assert got.top_ids.tolist() == [[1, 2, 4]]
    np.testing.assert_allclose(got.entropy, np.log(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": jnp.zeros((4, 1), int)}, r"labels must have shape \(4,\)"),
        ({"labels": jnp.zeros(4)}, "labels must be integer"),
        ({"x": jnp.zeros((4, 3))}, "x must have 2 features"),
        ({"x": jnp.zeros((4, 2), int)}, "x must be floating"),
        ({"w": jnp.zeros((2, 0))}, "w must be a matrix"),
        ({"b": jnp.zeros(2)}, r"b must have shape \(3,\)"),
        ({"where": jnp.zeros(4)}, "where must be boolean"),
        ({"chunk": (0, 1)}, "chunk must be a tuple .* positive integers"),
        ({"chunk": [2, 1]}, r"chunk must be a tuple .* got \[2, 1\]"),
        ({"chunk": (2.0, 1)}, "chunk must be a tuple .* positive integers"),
        ({"chunk": (True, 1)}, r"chunk must be a tuple .* got \(True, 1\)"),
        ({"softcap": 0.0}, r"softcap must be in \[1e-30, 1e30\], got 0.0"),
        ({"softcap": 1e39}, r"softcap must be in \[1e-30, 1e30\], got 1e\+39"),
        (
            {"softcap": "a"},
            "softcap must be a Python number.* got str",
        ),
        ({"softcap": np.inf}, "softcap must be finite, got inf"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"tied": "yes"}, "tied must be True or False, got str"),
        ({"tied": np.array(True)}, "tied must be True or False, got ndarray"),
        ({"precision": jnp.float32(1)}, "precision must be as in"),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(wrong, message, our_errors):
    right = {
        "x": jnp.zeros((4, 2)),
        "w": jnp.zeros((2, 3)),
        "labels": jnp.zeros(4, int),
    }
    for function in (linear_cross_entropy, mean_linear_cross_entropy):
        with pytest.raises((TypeError, ValueError), match=message):
            function(**(right | wrong))


def test_skip_below_is_checked(our_errors):
    x, w, labels = jnp.zeros((4, 2)), jnp.zeros((2, 3)), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"skip_below must be in \[0, 1\), got 1.5"):
        mean_linear_cross_entropy(x, w, labels, skip_below=1.5)
    with pytest.raises(ValueError, match="skip_below must be 0 with label_smoothing"):
        mean_linear_cross_entropy(x, w, labels, skip_below=0.1, label_smoothing=0.1)


def test_options_that_are_not_known_while_tracing(our_errors):
    x, w, labels = jnp.zeros((4, 2)), jnp.zeros((2, 3)), jnp.zeros(4, int)
    for name in ("z_loss", "softcap", "skip_below"):

        def traced(value, name=name):
            return mean_linear_cross_entropy(x, w, labels, **{name: value})

        with pytest.raises(TypeError, match=f"{name} must be a Python number, known"):
            jax.jit(traced)(0.1)
        assert np.isfinite(traced(np.float32(0.1)))
    for wrong in (2.0, np.array(2)):
        with pytest.raises(TypeError, match="top_k must be a Python integer"):
            linear_softmax_summary(x, w, top_k=wrong)
    with pytest.raises(ValueError, match="z_loss must be finite, got nan"):
        mean_linear_cross_entropy(x, w, labels, z_loss=np.nan)
    with pytest.raises(TypeError, match="normalizer must be an array of numbers"):
        mean_linear_cross_entropy(x, w, labels, normalizer="2")
    with pytest.raises(ValueError, match=r"normalizer must be one number.*\(2,\)"):
        mean_linear_cross_entropy(x, w, labels, normalizer=jnp.ones(2))
    with pytest.raises(TypeError, match="return_lse must be True or False"):
        linear_cross_entropy(x, w, labels, return_lse="yes")


def test_precision_as_a_list():
    x, w, labels = jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.zeros(4, int)
    losses = linear_cross_entropy(x, w, labels, precision=["highest", "highest"])
    np.testing.assert_allclose(losses, np.log(3), rtol=1e-6)


def test_no_row_at_all():
    x, w, labels = jnp.zeros((0, 2)), jnp.zeros((2, 3)), jnp.zeros(0, int)
    run = jax.jit(jax.value_and_grad(mean_linear_cross_entropy, (0, 1)))
    value, (dx, dw) = run(x, w, labels)
    assert value == 0
    assert dx.shape == (0, 2)
    assert (dw == 0).all()
    assert linear_cross_entropy(x, w, labels).shape == (0,)
    assert linear_softmax_summary(x, w, labels).top_ids.shape == (0, 1)
