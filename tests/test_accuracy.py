"""The published error bounds, in units in the last place (ULP) of the exact value."""

import os
import subprocess
import sys
from functools import cached_property, lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference as ref
from card import divides_within_2_ulp_only

import jax_softmax as js
from jax_softmax import _lanes
from jax_softmax._platform import rounded

pytestmark = pytest.mark.usefixtures("strict_types")

ROWS = {2: 256, 10: 64, 100: 8, 1000: 2, 50257: 1, 262144: 1}
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SMOOTHING = 0.1


# --- The grid: what may stand in a row of logits ---------------------------------


def families(rng, rows, n):
    """(name, logits, labels) in float64; rounding to the type under test comes last."""
    draw = partial(rng.normal, size=(rows, n))
    labels = rng.integers(n, size=rows)
    onehot = np.arange(n) == labels[:, None]

    def label_at(z, value):
        return np.where(onehot, value, z)

    for scale in SCALES:
        yield f"N(0, {scale:g})", draw(0, scale), labels
    for margin in (12, 20, 60):
        z = draw(0, 0.3)
        rest = np.where(onehot, -np.inf, z).max(-1, keepdims=True)
        yield f"label +{margin}", label_at(z, rest + margin), labels
    yield "label far below", label_at(draw(), -50.0), labels
    yield "label out of exp's reach", label_at(draw(), -500.0), labels
    for offset in (1e3, -1e4, 1e6):
        yield f"offset {offset:g}", draw() + offset, labels
    ties = np.round(draw(0, 3))
    yield "ties, label anywhere", ties, labels
    yield "ties at the label", label_at(ties, ties.max(-1, keepdims=True)), labels
    yield "huge label", label_at(draw(), 1e9), labels
    yield "huge other", np.where(np.roll(onehot, 1, -1), 1e9, draw()), labels
    yield "near-uniform", 1 + draw(0, 1e-6), labels
    yield "equal", np.full((rows, n), 0.7), labels
    yield "exp overflows", 88.72 + draw(0, 0.01), labels
    yield "largest numbers", np.where(rng.random((rows, n)) < 0.5, 3.4e38, 3e38), labels
    yield "p underflows", np.where(onehot, 0, -80 - np.abs(draw(0, 8))), labels
    yield "tiny numbers", draw(0, 1e-38), labels
    yield "lse near 0", draw(0, 0.1) - np.log(n), labels


class Case:
    """All families of one size as one batch of rows, and its exact results."""

    def __init__(self, n, dtype, rows=None):
        rng = np.random.default_rng(n)
        found = list(families(rng, rows or ROWS[n], n))
        self.names = np.repeat([name for name, _, _ in found], rows or ROWS[n])
        self.z = np.concatenate([z for _, z, _ in found]).astype(dtype)
        self.labels = np.concatenate([y for _, _, y in found])
        self.exact = ref.softmax(self.z)
        self.onehot = np.arange(n) == self.labels[:, None]
        raw = rng.gamma(0.3, size=self.z.shape) * (rng.random(self.z.shape) < 0.7)
        raw[:, 0] += 0.1
        wide = np.result_type(dtype, np.float32)
        self.targets = (raw / raw.sum(-1, keepdims=True)).astype(wide)


@lru_cache
def case(n, dtype=np.float32, rows=None):
    return Case(n, dtype, rows)


# --- What is promised ------------------------------------------------------------
#
# Each takes a case and a road, and gives ULP errors by row. A road makes a function
# of one batch of rows into another: eager, jit, vmap, scan.


def cross_entropy(c, road):
    got = road(js.cross_entropy)(c.z, c.labels)
    return ref.ulp_error(got, -ref.at(c.exact.log_probs, c.labels))


_gradient = jax.grad(lambda z, y: js.cross_entropy(z, y).sum())


def cross_entropy_gradient(c, road):
    return ref.ulp_error(road(_gradient)(c.z, c.labels), nll_gradient(c))


def nll_gradient(c):
    return ref.where(c.onehot, -c.exact.complements, c.exact.probs)


def softmax(c, road):
    return ref.ulp_error(road(js.softmax)(c.z), c.exact.probs)


def log_softmax(c, road):
    return ref.ulp_error(road(js.log_softmax)(c.z), c.exact.log_probs)


def log_softmax_vjp(c, road):
    def at_label(z, onehot):
        return jax.vjp(js.log_softmax, z)[1](onehot)[0]

    got = road(at_label)(c.z, c.onehot.astype(c.z.dtype))
    return ref.ulp_error(got, -nll_gradient(c))


def logsumexp(c, road):
    # Below max = 0 it and log1p(tail) cancel: lse is ill-conditioned in the logits.
    size = np.abs(c.exact.lse.high)
    largest = np.abs(c.z.astype(np.float64)).max(-1)
    scale = np.where(c.z.max(-1) < 0, np.maximum(size, largest), size)
    return ref.ulp_error(road(js.logsumexp)(c.z), c.exact.lse, scale)


def logsumexp_gradient(c, road):
    got = road(jax.grad(lambda z: js.logsumexp(z).sum()))(c.z)
    return ref.ulp_error(got, c.exact.probs)


def smoothed_target(c):
    n = c.z.shape[-1]
    return ref.exact((1 - SMOOTHING) * c.onehot + SMOOTHING / n)


_smoothed = partial(js.cross_entropy, label_smoothing=SMOOTHING)


def smoothed(c, road):
    got = road(_smoothed)(c.z, c.labels)
    want = ref.total(smoothed_target(c) * -c.exact.log_probs)
    return ref.ulp_error(got, want)


def smoothed_gradient(c, road):
    def loss(z, y):
        return js.cross_entropy(z, y, label_smoothing=SMOOTHING).sum()

    return target_gradient_error(
        road(jax.grad(loss))(c.z, c.labels), c, smoothed_target(c)
    )


def soft_labels(c, road):
    got = road(js.cross_entropy_with_probs)(c.z, c.targets)
    want = ref.total(ref.exact(c.targets) * -c.exact.log_probs)
    return ref.ulp_error(got, want)


def soft_labels_gradient(c, road):
    def loss(z, t):
        return js.cross_entropy_with_probs(z, t).sum()

    got = road(jax.grad(loss))(c.z, c.targets)
    return target_gradient_error(got, c, ref.exact(c.targets))


def target_gradient_error(got, c, target):
    """d loss / d z = sum(t) p - t, against the size of its two terms."""
    mass = ref.total(target)[..., None]
    scaled = mass * c.exact.probs
    return ref.ulp_error(got, scaled - target, scaled.high + target.high)


BOUNDS = {
    cross_entropy: 2,
    cross_entropy_gradient: 3,
    softmax: 3,
    log_softmax: 3,
    log_softmax_vjp: 3,
    logsumexp: 2,
    logsumexp_gradient: 3,
    smoothed: 4,
    smoothed_gradient: 4,
    soft_labels: 4,
    soft_labels_gradient: 4,
}
SEARCHED = (cross_entropy, cross_entropy_gradient, softmax, log_softmax, logsumexp)


def entropy(c, road):
    terms = c.exact.probs * -c.exact.log_probs
    return sum_error(road(_of_logits(js.entropy))(c.z), terms)


def cross_entropy_between(c, road):
    terms = c.exact.probs * -c.other_exact.log_probs
    return sum_error(road(_of_logits(js.cross_entropy_between))(c.z, c.other), terms)


def kl_divergence(c, road):
    terms = c.exact.probs * (c.exact.log_probs - c.other_exact.log_probs)
    return sum_error(road(_of_logits(js.kl_divergence))(c.z, c.other), terms)


@lru_cache  # what is compiled for one function is kept with it
def _of_logits(f):
    return lambda *logits: f(*map(js.Logits, logits))


def sum_error(got, terms):
    """In ULP of the sum, but for sums near which terms underflow."""
    want = ref.total(terms)
    return np.where(want.high < 1e-30, 0, ref.ulp_error(got, want))


SUMS = {
    smoothed: 4,
    soft_labels: 4,
    entropy: 4,
    cross_entropy_between: 5,
    kl_divergence: 8,
}


def scanned(f):
    """f on one row at a time, inside a scan."""

    @jax.jit
    def run(*args):
        rows = tuple(a[:, None] for a in map(jnp.asarray, args))
        return jax.lax.scan(lambda _, row: (None, f(*row)[0]), None, rows)[1]

    return run


ROADS = {
    "eager": lambda f: lambda *args: f(*map(jnp.asarray, args)),
    "jit": jax.jit,
    "vmap": lambda f: jax.jit(
        lambda *args: jax.vmap(lambda *row: first(f, row))(*args)
    ),
    "scan": scanned,
}


def first(f, row):
    return f(*(r[None] for r in row))[0]


# --- The tests -------------------------------------------------------------------


def within(errors, names, bound):
    by_row = errors.reshape(len(names), -1).max(-1)
    worst = by_row.argmax()
    assert not np.isnan(by_row).any(), set(names[np.isnan(by_row)])
    assert by_row[worst] <= bound, f"{by_row[worst]:.2f} ULP on {names[worst]}"


@pytest.mark.parametrize("promise", BOUNDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("n", "rows"), [(2, 1000), (10, 1000), (1000, 2), (50257, 1)])
def test_float32(n, rows, promise):
    c = case(n, np.float32, rows)
    within(promise(c, ROADS["jit"]), c.names, BOUNDS[promise])


class Rows:
    """Rows of any logits, their labels all 0 or by others, and their exact results."""

    def __init__(self, z, other):
        self.z, self.labels, self.other = z, np.zeros(len(z), int), other
        self.onehot = np.arange(z.shape[-1]) == self.labels[:, None]
        self.exact = ref.softmax(z)

    @cached_property
    def other_exact(self):
        return ref.softmax(self.other)

    @property
    def targets(self):
        return self.other_exact.probs.high.astype(np.float32)


def drawn(rng, rows, n):
    """Of any scale; some with an offset, some with a leader, some far below it."""
    z = rng.normal(size=(rows, n)) * 10.0 ** rng.uniform(-5, 1.5, (rows, 1))
    kind = rng.integers(4, size=(rows, 1))
    z = np.where(kind == 1, z + 10.0 ** rng.uniform(-2, 4, (rows, 1)), z)
    leads = np.arange(n) == rng.integers(n, size=(rows, 1))
    z = np.where((kind == 2) & leads, z + 10.0 ** rng.uniform(-1, 1.5, (rows, 1)), z)
    z = np.where(kind == 3, z - rng.exponential(5, (rows, n)), z)
    return z.astype(np.float32)


def moved(rng, z):
    """Some or all logits of each row, by a few last places up to a tenth."""
    some = rng.random(z.shape) < rng.choice([1 / z.shape[-1], 0.3, 1], (len(z), 1))
    size = rng.choice([1e-7, 1e-3, 0.1], (len(z), 1))
    return np.where(some, z * (1 + size * rng.normal(size=z.shape)), z).astype(z.dtype)


def largest_error(promise, n, *, rounds, arrays=1):
    """The worst rows so far, moved a little, beside fresh ones, again and again."""
    rng = np.random.default_rng(n)
    best = drawn(rng, 32 * arrays, n)
    for _ in range(rounds):
        near = np.repeat(best.reshape(32, -1), 8, axis=0).reshape(-1, n)
        z = np.concatenate((best, moved(rng, near), drawn(rng, 128 * arrays, n)))
        rows = Rows(z[::arrays], z[arrays - 1 :: arrays])
        errors = promise(rows, ROADS["jit"]).reshape(len(rows.z), -1).max(-1)
        of_row = z.reshape(len(rows.z), -1)
        best = of_row[np.argsort(errors)[-32:]].reshape(-1, n)
    return errors.max()


@pytest.mark.parametrize("n", [3, 12, 30, 100])
@pytest.mark.parametrize("promise", SEARCHED, ids=lambda f: f.__name__)
def test_bounds_hold_where_a_search_makes_the_error_large(promise, n):
    few = n <= 16 and promise in (cross_entropy, logsumexp)
    assert largest_error(promise, n, rounds=150) <= (2.3 if few else BOUNDS[promise])


@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("promise", SUMS, ids=lambda f: f.__name__)
def test_the_bounds_of_weighted_sums_hold_there_too(promise, n):
    assert largest_error(promise, n, rounds=100, arrays=2) <= SUMS[promise]


@pytest.mark.parametrize("narrowest", [16, 512])
def test_rows_of_many_tiles(narrowest, monkeypatch, fresh_traces):
    monkeypatch.setattr(_lanes, "TILE", 2**17)  # a row of them is five, or all that fit
    monkeypatch.setattr(_lanes, "NARROWEST", narrowest)
    c = case(50257)
    for promise in (logsumexp, cross_entropy, softmax):
        within(promise(c, ROADS["jit"]), c.names, BOUNDS[promise])


@pytest.mark.parametrize("n", [20, 300, 777, 1500])
def test_slices_of_any_width(n):
    c = case(n, np.float32, 2)
    for promise in (logsumexp, cross_entropy, softmax):
        within(promise(c, ROADS["jit"]), c.names, BOUNDS[promise])


def test_float32_of_the_largest_vocabulary():
    c = case(262144)
    for promise, bound in BOUNDS.items():  # in one test: the reference takes a while
        within(promise(c, ROADS["jit"]), c.names + f", {promise.__name__}", bound)


@pytest.mark.parametrize("promise", BOUNDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("road", ["eager", "vmap", "scan"])
def test_every_road(road, promise):
    for n in (10, 1000):
        c = case(n)
        within(promise(c, ROADS[road]), c.names, BOUNDS[promise])


OTHER_ON_GPUS = softmax, log_softmax_vjp, logsumexp_gradient  # where classes are few


@pytest.mark.parametrize("promise", BOUNDS, ids=lambda f: f.__name__)
def test_the_loops_of_accelerators(promise, elsewhere):
    alike = elsewhere == "as_on_gpus" and promise not in OTHER_ON_GPUS
    for n in (100, 1000) if alike else (10, 100, 1000):
        c = case(n)
        errors = promise(c, divides_within_2_ulp_only)
        within(errors, c.names, BOUNDS[promise])


@pytest.mark.usefixtures("elsewhere")
def test_a_row_at_a_time_on_accelerators():
    """XLA fuses one row otherwise than many."""
    for n in (10, 1000):
        c = case(n)
        within(softmax(c, ROADS["scan"]), c.names, BOUNDS[softmax])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("promise", BOUNDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_float64(n, promise):
    c = case(n, np.float64)
    within(promise(c, ROADS["jit"]), c.names, BOUNDS[promise])


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("where", ["here", "as_on_accelerators", "as_on_gpus"])
def test_half_precision_is_rounded_once(where, kind, request):
    """Quicker exponentials, where all that is handed out is rounded to 16 bits.

    Half an ULP is that rounding; losses of such logits are as exact as ever.
    """
    if where != "here":
        request.getfixturevalue(where)
    rng = np.random.default_rng(0)
    for n, scale in ((2, 5), (10, 0.1), (10, 5), (100, 30), (1000, 3)):
        z = rng.normal(0, scale, (64, n))
        z[:8, 0] += 20  # certain
        z = np.asarray(jnp.asarray(z, jnp.float32).astype(kind))
        y = rng.integers(n, size=64)
        exact, onehot = ref.softmax(z), np.arange(n) == y[:, None]
        gradient = ref.where(onehot, -exact.complements, exact.probs)
        got = jax.grad(lambda z, y=y: js.cross_entropy(z, y).sum())(z)
        narrow = {
            "softmax": (js.softmax(z), exact.probs),
            "log_softmax": (js.log_softmax(z), exact.log_probs),
            "gradient": (got, gradient),
        }
        for name, (got, want) in narrow.items():
            assert got.dtype == kind, name
            assert ref.ulp_error(got, want).max() <= 0.51, name
        loss, lse = js.cross_entropy(z, y), js.logsumexp(z)
        assert loss.dtype == lse.dtype == jnp.float32
        assert ref.ulp_error(loss, -ref.at(exact.log_probs, y)).max() <= 2
        assert ref.ulp_error(lse, exact.lse).max() <= 2


def test_rounding_to_bfloat16_is_that_of_the_type():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000).astype(np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    special = np.array([0, np.inf, np.nan, 3.4028235e38, 1e-45], np.float32)
    x = np.concatenate(
        [bits.view(np.float32), ties.view(np.float32), special, -special]
    )
    got = jax.jit(lambda x: rounded(x, jnp.dtype("bfloat16")))(x)
    with np.errstate(invalid="ignore"):  # NaN
        want = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(got), np.float32(want))


@pytest.mark.parametrize("n", [2, 10, 300])
def test_the_reference_agrees_with_mpmath(n):
    rng = np.random.default_rng(n)
    for scale in (0.1, 1, 100):
        z = rng.normal(0, scale, n)
        exact = ref.softmax(z)
        with mpmath.workdps(250):
            wide = [mpmath.mpf(float(v)) for v in z]
            total = mpmath.fsum(map(mpmath.exp, wide))
            lse = mpmath.log(total)
            assert relative(exact.lse, lse) < 1e-28
            for j in range(n):
                p = mpmath.exp(wide[j]) / total
                assert relative(exact.log_probs[j], wide[j] - lse) < 1e-28
                assert relative(exact.probs[j], p) < 1e-28
                assert relative(exact.complements[j], 1 - p) < 1e-28


def relative(got, want):
    found = mpmath.mpf(float(got.high)) + mpmath.mpf(float(got.low))
    return abs(found / want - 1)


FLAGS = {
    "--xla_cpu_enable_fast_min_max=true": BOUNDS,
    "--xla_backend_optimization_level=0": BOUNDS,
    "--xla_cpu_multi_thread_eigen=false": BOUNDS,
    # By definition it lets the compiler take (a + b) - a for b, as a two-sum cannot be.
    "--xla_cpu_enable_fast_math=true": dict.fromkeys(BOUNDS, 70),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_users_set(flags):
    code = (
        "import test_accuracy as t\n"
        "c = t.case(10)\n"
        f"for promise, bound in t.FLAGS[{flags!r}].items():\n"
        "    t.within(promise(c, t.ROADS['jit']), c.names, bound)\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
