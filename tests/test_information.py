"""Entropies and divergences against the textbook's sums in 90 digits."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference as ref

import jax_softmax as js
from jax_softmax import Logits, Probs

pytestmark = pytest.mark.usefixtures("strict_types")

mpmath.mp.dps = 80
ZERO = mpmath.mpf(10) ** -70  # what cancels to less is 0
SIZES = (2, 10, 60)


# --- The reference: weights as lists of mpf, formulas as in the book ------------------


def weights(p):
    """In proportion to the probabilities; classes that are ruled out are 0."""
    values = [mpmath.mpf(float(x)) for x in np.ravel(p[0])]
    if isinstance(p, Probs):
        return values
    top, none = max(values), mpmath.mpf(0)
    return [mpmath.exp(x - top) if mpmath.isfinite(x) else none for x in values]


def with_logs(w):
    """(p, log p) of each class."""
    total = mpmath.fsum(w)
    return [(x / total, mpmath.log(x / total) if x else -mpmath.inf) for x in w]


def exact_cross_entropy(p, q):
    pairs = zip(with_logs(p), with_logs(q), strict=True)
    return -mpmath.fsum(x * log_y for (x, _), (_, log_y) in pairs if x)


def exact_entropy(p):
    return -mpmath.fsum(x * log_x for x, log_x in with_logs(p) if x)


def exact_kl(p, q):
    pairs = zip(with_logs(p), with_logs(q), strict=True)
    return mpmath.fsum(x * (log_x - log_y) for (x, log_x), (_, log_y) in pairs if x)


def exact_js(p, q):
    p, q = with_logs(p), with_logs(q)
    m = [(x + y) / 2 for (x, _), (y, _) in zip(p, q, strict=True)]
    terms = [-x * mpmath.log(x) if x else x for x in m]
    for part in (p, q):
        terms += [x * log_x / 2 for x, log_x in part if x]
    return mpmath.fsum(terms)


def marginals(w, shape):
    table = [w[i * shape[1] : (i + 1) * shape[1]] for i in range(shape[0])]
    columns = zip(*table, strict=True)
    return [mpmath.fsum(row) for row in table], [mpmath.fsum(c) for c in columns]


def exact_conditional(w, shape):
    return exact_entropy(w) - exact_entropy(marginals(w, shape)[0])


def exact_mutual(w, shape):
    rows, columns = marginals(w, shape)
    return exact_entropy(rows) + exact_entropy(columns) - exact_entropy(w)


def ulps(got, want, scale=None):
    """|got - want| in units in the last place of got's type at the size of want."""
    got, kind = np.asarray(got), np.finfo(np.asarray(got).dtype)
    if mpmath.isinf(want):
        return 0.0 if np.isinf(got) else np.inf
    want = want if abs(want) > ZERO else mpmath.mpf(0)
    size = max(abs(want) if scale is None else scale, mpmath.mpf(float(kind.tiny)))
    unit = mpmath.power(2, mpmath.floor(mpmath.log(size, 2))) * float(kind.eps)
    return float(abs(mpmath.mpf(float(got)) - want) / unit)


# --- What may stand in a row ----------------------------------------------------------


@lru_cache
def rows(n, dtype=np.float32):
    """(name, logits)"""
    rng = np.random.default_rng(n)
    found = {f"N(0, {s})": rng.normal(0, s, n) for s in (0.1, 1, 5, 30)}
    certain = rng.normal(0, 0.3, n)
    for margin in (12, 20, 60):
        found[f"+{margin}"] = np.where(np.arange(n) == n // 2, margin, certain)
    found["offset 1e4"] = 1e4 + rng.normal(0, 1, n)
    found["near-uniform"] = 1 + rng.normal(0, 1e-6, n)
    found["equal"] = np.full(n, 0.7)
    found["one ruled out"] = np.where(np.arange(n) == 0, -np.inf, rng.normal(0, 1, n))
    return {name: z.astype(dtype) for name, z in found.items()}


@lru_cache
def pairs(n, dtype=np.float32):
    """(name, logits, logits)"""
    rng, z = np.random.default_rng(n + 1), rows(n, dtype)
    found = {
        f"{a}; {b}": (z[a], z[b])
        for a, b in (
            ("N(0, 1)", "N(0, 0.1)"),
            ("N(0, 5)", "N(0, 1)"),
            ("N(0, 1)", "N(0, 30)"),
            ("+12", "N(0, 1)"),
            ("+60", "+20"),
            ("N(0, 1)", "+20"),
            ("N(0, 1)", "offset 1e4"),
            ("one ruled out", "N(0, 5)"),
            ("one ruled out", "one ruled out"),
            ("N(0, 1)", "one ruled out"),
            ("near-uniform", "equal"),
        )
    }
    for a in ("N(0, 1)", "N(0, 5)", "+20", "offset 1e4", "one ruled out"):
        for step in (1e-2, 1e-4, 1e-6):
            near = (z[a] + rng.normal(0, step, n)).astype(dtype)
            found[f"{a}, {step:g} apart"] = (z[a], near)
    found["shifted"] = (z["offset 1e4"], (z["offset 1e4"] - dtype(1e4)))
    return found


@lru_cache
def tables(dtype=np.float32):
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (3, 1)), rng.normal(0, 2, (1, 4))
    found = {f"N(0, {s})": rng.normal(0, s, (3, 4)) for s in (0.1, 1, 5)}
    for step in (1e-2, 1e-4, 1e-6):
        found[f"{step:g} from independent"] = a + b + rng.normal(0, step, (3, 4))
    found["offset 100"] = 100 + a + b + rng.normal(0, 0.01, (3, 4))
    of_column = np.arange(4) % 3 == np.arange(3)[:, None]
    found["a function"] = np.where(of_column, b, -np.inf)
    found["a row ruled out"] = np.where(np.arange(3)[:, None] == 2, -np.inf, a + 2 * b)
    return {name: z.astype(dtype) for name, z in found.items()}


def as_probs(z, axis=-1):
    """Weights near exp(z), in the type of z, without those that XLA takes as 0."""
    w = np.exp(z.astype(np.float64) - z.max(axis, keepdims=True)).astype(z.dtype)
    return np.where(w < np.finfo(w.dtype).tiny, 0, w)


KINDS = {
    "logits": lambda z, axis=-1: Logits(z),
    "probs": lambda z, axis=-1: Probs(as_probs(z, axis)),
}
KIND = pytest.mark.parametrize("kind", KINDS)


def check(errors, bound):
    """Which cases are off by more than the bound."""
    assert {name: e for name, e in errors.items() if not e <= bound} == {}


def batch(kind, arrays):
    """One distribution per row; shorter rows are filled up with ruled-out classes."""
    arrays = list(arrays)
    longest = max(z.shape[-1] for z in arrays)
    shape = len(arrays), *arrays[0].shape[:-1], longest
    filled = np.full(shape, -np.inf, arrays[0].dtype)
    for row, z in zip(filled, arrays, strict=True):
        row[..., : z.shape[-1]] = z
    return KINDS[kind](filled, axis=tuple(range(-arrays[0].ndim, 0)))


# --- Values ---------------------------------------------------------------------------


@KIND
def test_one_distribution(kind):
    cases = {f"{name}, {n}": z for n in SIZES for name, z in rows(n).items()}
    p = batch(kind, cases.values())
    got = jax.jit(lambda p: (js.entropy(p), js.perplexity(p)))(p)
    entropies, perplexities = {}, {}
    for i, name in enumerate(cases):
        want = exact_entropy(weights(type(p)(p[0][i])))
        entropies[name] = ulps(got[0][i], want)
        perplexities[name] = ulps(got[1][i], mpmath.exp(want))
    check(entropies, 4)
    check(perplexities, 12)


PAIRS = {
    "cross_entropy_between": (js.cross_entropy_between, exact_cross_entropy, 4),
    "kl_divergence": (js.kl_divergence, exact_kl, 6),
    "js_divergence": (js.js_divergence, exact_js, 6),
}


@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS])
def test_two_distributions(kinds):
    cases = {f"{name}, {n}": pair for n in SIZES for name, pair in pairs(n).items()}
    p, q = (
        batch(kind, (pair[i] for pair in cases.values()))
        for i, kind in enumerate(kinds)
    )
    got = jax.jit(lambda p, q: {name: f(p, q) for name, (f, *_) in PAIRS.items()})(p, q)
    for f, (_, reference, bound) in PAIRS.items():
        errors = {}
        for i, name in enumerate(cases):
            want = reference(weights(type(p)(p[0][i])), weights(type(q)(q[0][i])))
            scale = None
            if f != "cross_entropy_between" and kinds[0] != kinds[1]:
                # A probability's own rounding: 8 ULP of sqrt(KL) are below 1e-6.
                scale = max(want, mpmath.sqrt(want))
            errors[f"{f} {name}"] = ulps(got[f][i], want, scale)
        check(errors, bound)


@KIND
@pytest.mark.parametrize("wide", [False, True])
def test_tables(kind, wide):
    with jax.enable_x64(wide):
        found = tables(np.float64 if wide else np.float32)
        p = batch(kind, found.values())
        turned = type(p)(np.swapaxes(p[0], -2, -1))
        got = jax.jit(
            lambda p, turned: (
                js.conditional_entropy(p, given=-2),
                js.conditional_entropy(turned, given=-1),
                js.mutual_information(p),
                js.mutual_information(turned),
            )
        )(p, turned)
    conditionals, mutuals = {}, {}
    for i, name in enumerate(found):
        w, shape = weights(type(p)(p[0][i])), p[0][i].shape
        want = exact_conditional(w, shape)
        conditionals |= {f"{name}": ulps(got[0][i], want)}
        conditionals |= {f"{name}, turned": ulps(got[1][i], want)}
        want = exact_mutual(w, shape)
        scale = None if kind == "logits" else max(want, mpmath.sqrt(abs(want)))
        mutuals |= {f"{name}": ulps(got[2][i], want, scale)}
        mutuals |= {f"{name}, turned": ulps(got[3][i], want, scale)}
    check(conditionals, 6)
    check(mutuals, 8)


@pytest.mark.parametrize("wide", [False, True])
def test_two_classes(wide):
    """Where one class has nearly all of both, nothing averages errors out."""
    rng = np.random.default_rng(7)
    kind, least = (np.float64, -30) if wide else (np.float32, -14)
    rare = 10 ** rng.uniform(least, -0.5, 300)
    for step in (0.1, 1, 3):
        other = rare * np.exp(rng.normal(0, step, 300))
        one = np.ones(300)
        w = [np.stack((one, x), 1).astype(kind) for x in (rare, other)]
        for make, kl_bound in ((Probs, 7), (Logits, 6)):
            with jax.enable_x64(wide):
                p, q = (make(x if make is Probs else np.log(x)) for x in w)
                got = jax.jit(
                    lambda p, q: (js.kl_divergence(p, q), js.js_divergence(p, q))
                )(p, q)
            kl, halfway = {}, {}
            for i in range(300):
                pair = weights(make(p[0][i])), weights(make(q[0][i]))
                kl[i] = ulps(got[0][i], exact_kl(*pair))
                halfway[i] = ulps(got[1][i], exact_js(*pair))
            check(kl, kl_bound)
            check(halfway, 8)


def test_halfway_of_two_that_are_nearly_certain():
    rng = np.random.default_rng(5)
    top = rng.uniform(3, 60, 200)
    z = np.stack((top, 0 * top), 1).astype(np.float32)
    y = np.stack((top + rng.uniform(-14, 14, 200), 0 * top), 1).astype(np.float32)
    got = jax.jit(lambda z, y: js.js_divergence(Logits(z), Logits(y)))(z, y)
    errors = {}
    for i in range(200):
        want = exact_js(weights(Logits(z[i])), weights(Logits(y[i])))
        errors[i] = ulps(got[i], want) if want > 1e-28 else 0
    check(errors, 6)


@KIND
def test_float64(kind, x64):
    cases = pairs(10, np.float64)
    p, q = (batch(kind, (pair[i] for pair in cases.values())) for i in range(2))
    got = jax.jit(lambda p, q: (js.kl_divergence(p, q), js.js_divergence(p, q)))(p, q)
    errors = {}
    for i, name in enumerate(cases):
        w = weights(type(p)(p[0][i])), weights(type(q)(q[0][i]))
        errors[f"KL {name}"] = ulps(got[0][i], exact_kl(*w))
        errors[f"JS {name}"] = ulps(got[1][i], exact_js(*w))
    check(errors, 6)


def test_a_row_of_a_table_that_nearly_underflows():
    z = np.float32([[42, -36, -9, -108], [79.5, -66, 81.35, 32], [-41, -96, -12, -5.7]])
    value, gradient = jax.value_and_grad(js.mutual_information)(Logits(z))
    assert ulps(value, exact_mutual(weights(Logits(z)), z.shape)) <= 8
    assert np.isfinite(gradient[0]).all()


def test_a_vocabulary():
    """50257 classes: the sums are long, and the two rows 1e-6 to 1 apart."""
    rng = np.random.default_rng(5)
    z = np.stack([rng.normal(0, s, 50257) for s in (0.1, 1, 10)]).astype(np.float32)
    steps = np.float32([[1e-6], [1e-3], [1]]) * rng.normal(size=z.shape)
    y = (z + steps).astype(np.float32)
    with_log = [ref.softmax(x) for x in (z, y)]
    p, q = (x.probs for x in with_log)
    log_p, log_q = (x.log_probs for x in with_log)
    got = jax.jit(
        lambda z, y: (
            js.entropy(Logits(z)),
            js.cross_entropy_between(Logits(z), Logits(y)),
            js.kl_divergence(Logits(z), Logits(y)),
        )
    )(z, y)
    for value, terms, bound in zip(
        got, (p * -log_p, p * -log_q, p * (log_p - log_q)), (4, 4, 6), strict=True
    ):
        assert ref.ulp_error(value, ref.total(terms)).max() <= bound
    assert q.high.shape == z.shape


def test_a_rounded_probability_is_told_from_1_by_the_others():
    z = np.float32([20, 0, 0])
    p = jax.nn.softmax(z)
    assert p[0] == 1
    assert ulps(js.entropy(Probs(p)), exact_entropy(weights(Logits(z)))) < 8


def test_only_proportions_matter():
    z, y = pairs(10)["N(0, 1), 0.0001 apart"]
    p, q = as_probs(z), as_probs(y)
    moved = js.kl_divergence(Probs(4 * p), Probs(4 * q))
    assert ulps(moved, exact_kl(weights(Probs(p)), weights(Probs(q)))) <= 6
    z, y = np.float32([[0.25, 0.5, -1], [0.25, 0.5 + 2**-12, -1]])
    moved = js.kl_divergence(Logits(z - 512), Logits(y + 256))
    assert ulps(moved, exact_kl(weights(Logits(z)), weights(Logits(y)))) <= 6


def test_proportions_matter_too_where_their_sum_is_beyond_the_largest_number():
    p, q = np.float32([[1, 2, 3]]), np.float32([[3, 3, 3]])
    table, huge = np.float32([[1, 2], [2, 1]]), np.float32(1e38)
    for of in (
        lambda by: js.entropy(Probs(by * p)),
        lambda by: js.perplexity(Probs(by * p)),
        lambda by: js.kl_divergence(Probs(by * p), Probs(by * q)),
        lambda by: js.js_divergence(Probs(by * p), Probs(by * q)),
        lambda by: js.cross_entropy_between(Probs(by * p), Probs(by * q)),
        lambda by: js.mutual_information(Probs(by * table)),
        lambda by: js.conditional_entropy(Probs(by * table), given=-1),
    ):
        np.testing.assert_allclose(of(huge), of(np.float32(1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([9.581466, 4.7683696e-07], [9.8210535, 0.23958826]),
        (
            [6.59233379e-08, 9.5725639e-08, -5.32859978e-08],
            [0.152983665, 0.152983695, 0.152983546],
        ),
    ],
)
def test_logits_that_differ_by_a_constant_but_for_1e_14(p, q):
    """A difference of two differences has no digits beyond them to lose."""
    p, q = (Logits(np.array(z, np.float32)) for z in (p, q))
    assert ulps(js.kl_divergence(p, q), exact_kl(weights(p), weights(q))) <= 6


def test_never_negative_and_symmetric():
    rng = np.random.default_rng(1)
    z = rng.normal(0, 3, (5000, 6)).astype(np.float32)
    steps = rng.choice([0, 1e-7, 1e-5, 1e-2], (5000, 1)) * rng.normal(size=z.shape)
    y = (z + steps).astype(np.float32)
    for make in KINDS.values():
        p, q = make(z), make(y)
        assert (js.kl_divergence(p, q) >= 0).all()
        assert (js.kl_divergence(p, p) == 0).all()
        both = js.js_divergence(p, q), js.js_divergence(q, p)
        assert (both[0] >= 0).all()
        np.testing.assert_allclose(*both, rtol=5e-7)
        assert (js.mutual_information(make(z.reshape(-1, 2, 3), (-2, -1))) >= 0).all()


# --- Derivatives ----------------------------------------------------------------------


def slope(f, w, i):
    """d f / d log(w_i), by a difference quotient in 90 digits."""
    h = mpmath.mpf(10) ** -25
    up, down = list(w), list(w)
    up[i], down[i] = w[i] * mpmath.exp(h), w[i] * mpmath.exp(-h)
    return (f(up) - f(down)) / (2 * h)


def check_gradient(name, got, f, w, bound=6):
    """Entries to within `bound` ULP of the largest of the row."""
    want = [slope(f, w, i) for i in range(len(w))]
    scale = max(map(abs, want))
    scale = scale if scale > ZERO else mpmath.mpf(1)
    got = np.ravel(got)
    check({f"{name} {i}": ulps(got[i], want[i], scale) for i in range(len(w))}, bound)


def test_gradients():
    """In logits, each row's entries to within 6 ULP of its largest."""
    one = batch("logits", rows(6).values())
    z, y = (batch("logits", (pair[i] for pair in pairs(6).values())) for i in range(2))
    table = batch("logits", tables().values())

    @jax.jit
    def gradients(one, z, y, table):
        def mutual_and_conditional(p):
            return (
                jax.grad(lambda p: js.mutual_information(p).sum())(p)[0],
                jax.grad(lambda p: js.conditional_entropy(p, given=-2).sum())(p)[0],
            )

        of_two = {
            name: jax.grad(lambda z, y, f=f: f(z, y).sum(), (0, 1))(z, y)
            for name, (f, *_) in PAIRS.items()
        }
        of_one = jax.grad(lambda p: js.entropy(p).sum())(one)[0]
        return of_one, of_two, mutual_and_conditional(table)

    of_one, of_two, (mutual, conditional) = gradients(one, z, y, table)
    for i, name in enumerate(rows(6)):
        check_gradient(name, of_one[i], exact_entropy, weights(Logits(one[0][i])))
    for f, (of_z, of_y) in of_two.items():
        of = PAIRS[f][1]
        for i, name in enumerate(pairs(6)):
            p, q = weights(Logits(z[0][i])), weights(Logits(y[0][i]))
            if mpmath.isinf(of(p, q)):
                assert np.isfinite(of_y[0][i]).all()
                continue
            name = f"{f}, {name}"
            check_gradient(name, of_z[0][i], lambda p, q=q, of=of: of(p, q), p)
            check_gradient(name, of_y[0][i], lambda q, p=p, of=of: of(p, q), q)
    for i, name in enumerate(tables()):
        w, shape = weights(Logits(table[0][i])), table[0][i].shape
        check_gradient(name, mutual[i], lambda w, s=shape: exact_mutual(w, s), w, 8)
        check_gradient(
            name, conditional[i], lambda w, s=shape: exact_conditional(w, s), w
        )


def test_gradient_halfway_where_one_is_far_off():
    """What leads in p has next to nothing in q: what is left of it counts."""
    z, y = np.float32([0, -3.4, -30]), np.float32([0, 15.3, 39.7])
    p, q = weights(Logits(z)), weights(Logits(y))
    got = jax.grad(lambda z: js.js_divergence(Logits(z), Logits(y)))(z)
    check_gradient("js_divergence", got, lambda p: exact_js(p, q), p)


LEADERS = {
    # p, q: what leads in p is nearly as likely in one as in the other under q, by far
    "unlikely": ([0, 0, -20], [0, 1e-6, 3]),
    "impossible": ([0, 0, -80], [0, 1e-6, 50]),
    "unequal": ([0, 1e-3, -20], [0, 1.1e-3, 8]),
    "far off": ([1e4, 1e4, 9990], [-50, -50 + 1e-5, 0]),
    "likely": ([-30, -30, 0], [2, 2 + 1e-6, 0]),
    "alike": ([0, 0.5, -20], [3, 3.5 + 1e-6, 3]),
}


@pytest.mark.parametrize(
    ("f", "kind"), [("cross_entropy_between", "probs"), *((f, "logits") for f in PAIRS)]
)
def test_gradients_where_the_leading_classes_tie(f, kind):
    """KL and JS from probabilities hang on their rounding there."""
    of, reference, _ = PAIRS[f]
    gradient = jax.jit(jax.grad(lambda z, y: of(Logits(z), y)))
    for name, (z, y) in LEADERS.items():
        z, q = np.float32(z), KINDS[kind](np.float32(y))
        p = weights(Logits(z))
        check_gradient(name, gradient(z, q), lambda p, q=q: reference(p, weights(q)), p)


def test_gradient_in_probabilities_is_along_the_simplex():
    z, y = pairs(6)["one ruled out, 0.0001 apart"]
    p, q = as_probs(z), as_probs(y)
    got = jax.grad(js.kl_divergence, (0, 1))(Probs(p), Probs(q))
    w = weights(Probs(p)), weights(Probs(q))
    check_gradient("p", got[0][0] * p, lambda x: exact_kl(x, w[1]), w[0], 6)
    check_gradient("q", got[1][0] * q, lambda x: exact_kl(w[0], x), w[1], 6)


def textbook_surprise(p, q):
    return -(p * jnp.log(q)).sum()


def textbook_mutual(p):
    return (p * jnp.log(p / p.sum(-1, keepdims=True) / p.sum(-2, keepdims=True))).sum()


TEXTBOOK = {
    "entropy": (js.entropy, lambda p: textbook_surprise(p, p)),
    "perplexity": (js.perplexity, lambda p: jnp.exp(textbook_surprise(p, p))),
    "conditional": (
        lambda p: js.conditional_entropy(p, given=-2),
        lambda p: textbook_surprise(p, p / p.sum(-1, keepdims=True)),
    ),
    "mutual": (js.mutual_information, textbook_mutual),
    "cross_entropy": (js.cross_entropy_between, textbook_surprise),
    "kl": (
        js.kl_divergence,
        lambda p, q: textbook_surprise(p, q) - textbook_surprise(p, p),
    ),
    "js": (
        js.js_divergence,
        lambda p, q: (
            textbook_surprise((p + q) / 2, (p + q) / 2)
            - textbook_surprise(p, p) / 2
            - textbook_surprise(q, q) / 2
        ),
    ),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_hessians_by_every_road(name, x64):
    f, textbook = TEXTBOOK[name]
    shape = (2, 3) if name in ("mutual", "conditional") else (5,)
    count = textbook.__code__.co_argcount
    rng = np.random.default_rng(2)
    z = [jnp.asarray(rng.normal(0, 1, shape)) for _ in range(count)]
    where = tuple(range(count))

    def by_softmax(*z):
        return textbook(*(jax.nn.softmax(x, axis=None) for x in z))

    @jax.jit
    def hessians(*z):
        def ours(make):
            return lambda *z: f(*(make(x) for x in z))

        return jax.hessian(by_softmax, where)(*z), [
            road(jax.grad(ours(make), where), where)(*z)
            for make in (Logits, lambda z: Probs(7 * jnp.exp(z)))
            for road in (jax.jacfwd, jax.jacrev)
        ]

    want, found = hessians(*z)
    for got in found:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want
        )


def test_zeros_have_finite_derivatives():
    """Value, gradient, jvp and Hessian, where neither of two infinities meets."""
    p, q = jnp.array([0.5, 0.5, 0, 0]), jnp.array([0.2, 0.3, 0.5, 0])
    z, y = jnp.array([1, 2, -jnp.inf, -jnp.inf]), jnp.array([2, 0, 1, -jnp.inf])
    t = jnp.array([[0.5, 0, 0.25, 0], [0, 0, 0.25, 0], [0, 0, 0, 0]])
    arrays = {Logits: (z, y, jnp.log(t)), Probs: (p, q, t)}

    for name, (f, textbook) in TEXTBOOK.items():
        two = textbook.__code__.co_argcount == 2
        place = 2 if name in ("mutual", "conditional") else 0
        pairs = ((Logits, Probs), (Probs, Logits))
        for kinds in pairs if two else ((Logits,), (Probs,)):
            x = tuple(arrays[kind][place + i] for i, kind in enumerate(kinds))

            def of(*x, f=f, kinds=kinds):
                return f(*(k(v) for k, v in zip(kinds, x, strict=True)))

            def value_and_grad(*x, of=of):
                both = jax.value_and_grad(of, tuple(range(len(x))))(*x)
                return both, both

            # The derivatives of the pair are the jvp along each axis and the Hessian.
            derivatives = jax.jacfwd(value_and_grad, tuple(range(len(x))), has_aux=True)
            for leaf in jax.tree.leaves(jax.jit(derivatives)(*x)):
                assert np.isfinite(leaf).all(), f"{name} {kinds}"


# --- Edges ----------------------------------------------------------------------------


def test_textbook_examples():
    table = Probs(jnp.array([[0.1, 0.5], [0.1, 0.3]]))
    joint, h_x, h_y = (
        js.entropy(Probs(p), base=2)
        for p in (table.probs.ravel(), table.probs.sum(-1), table.probs.sum(-2))
    )
    np.testing.assert_allclose(joint, 1.6855, atol=5e-5)
    of_y = js.conditional_entropy(table, given=-2, base=2)
    of_x = js.conditional_entropy(table, given=-1, base=2)
    mutual = js.mutual_information(table, base=2)
    np.testing.assert_allclose(of_y, joint - h_x, rtol=1e-6)
    np.testing.assert_allclose(of_x, joint - h_y, rtol=1e-6)
    np.testing.assert_allclose(mutual, h_x + h_y - joint, atol=3e-7)
    np.testing.assert_allclose(mutual, joint - of_x - of_y, atol=3e-7)


@pytest.mark.parametrize(
    "f", [js.mutual_information, lambda p: js.conditional_entropy(p, given=-1)]
)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_table_without_a_class_is_an_error_that_names_it(f, shape):
    for kind, name in ((Logits, "joint.logits"), (Probs, "joint.probs")):
        with pytest.raises(ValueError, match=f"{name} must h.*at least one class"):
            f(kind(jnp.ones(shape)))


def test_a_base_beyond_any_float():
    with pytest.raises(ValueError, match="base must be finite, got 1000"):
        js.entropy(Probs(jnp.ones(3)), base=10**400)


def test_limits():
    nan, inf = np.nan, np.inf
    z = jnp.array([[-inf, -inf], [1, inf], [inf, inf], [0, -inf], [nan, 0]])
    np.testing.assert_allclose(
        js.entropy(Logits(z)), [nan, 0, np.log(2), 0, nan], rtol=1e-6
    )
    w = jnp.array([[1.0, 1], [0, 0], [nan, 1], [-1, 2], [0, 1]])
    np.testing.assert_array_equal(np.isnan(js.entropy(Probs(w))), [0, 1, 1, 1, 0])
    assert js.kl_divergence(Probs(w[0]), Probs(w[4])) == inf
    assert js.kl_divergence(Probs(w[4]), Probs(w[0])) == np.float32(np.log(2))


def test_a_far_model_of_certain_targets_stays_finite():
    target, z = Probs(jnp.array([0.0, 1.0])), Logits(jnp.array([200.0, 0.0]))
    np.testing.assert_allclose(js.kl_divergence(target, z), 200, rtol=1e-7)
    np.testing.assert_allclose(js.cross_entropy_between(target, z), 200, rtol=1e-7)
    gradient = jax.grad(js.kl_divergence, 1)(target, z)[0]
    np.testing.assert_allclose(gradient, [1, -1])


def test_weights_may_be_as_far_apart_as_numbers_are():
    far = Probs(jnp.array([1e30, 1e-20]))
    got = js.kl_divergence(Probs(jnp.array([1.0, 1.0])), far)
    np.testing.assert_allclose(got, 50 * np.log(10) / 2 - np.log(2), rtol=1e-6)


def test_a_negative_weight_makes_its_row_nan_in_values_and_gradients():
    p = jnp.array([[1.0, 0, 0], [1, 0, 0]])
    q = jnp.array([[0.5, -0.1, 0.6], [0.5, 0, 0.5]])
    for f in (js.kl_divergence, js.cross_entropy_between, js.js_divergence):
        for pair in ((p, q), (q, p)):
            spoilt = f(*map(Probs, pair))
            np.testing.assert_array_equal(np.isnan(spoilt), [True, False])
        slopes = jax.grad(lambda q, f=f: f(Probs(p), Probs(q)).sum())(q)
        np.testing.assert_array_equal(np.isnan(slopes).any(-1), [True, False])


@pytest.mark.parametrize("classes", [10**4, 10**5, 10**6])
@pytest.mark.parametrize("share", [0.0034, 0.013232238131081995, 0.5])
def test_perplexity_of_many_classes(classes, share):
    weights = np.full(classes, (1 - share) / (classes - 1), np.float32)
    weights[0] = share
    one, others = weights[:2].astype(np.float64)
    total = one + (classes - 1) * others
    p, q = one / total, others / total
    nats = -(p * np.log(p) + (classes - 1) * q * np.log(q))
    for distribution in (Probs(jnp.array(weights)), Logits(jnp.log(weights))):
        exact = np.exp(nats)
        if isinstance(distribution, Logits):
            z = np.asarray(distribution.logits, np.float64)[:2]
            lse = np.log(np.exp(z[0]) + (classes - 1) * np.exp(z[1]))
            exact = np.exp(
                lse
                - np.exp(z[0] - lse) * z[0]
                - (classes - 1) * np.exp(z[1] - lse) * z[1]
            )
        ulps = abs(float(js.perplexity(distribution)) - exact) / np.spacing(
            np.float32(exact)
        )
        assert ulps <= max(12, 3 * nats)
