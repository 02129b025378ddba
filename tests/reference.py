"""Softmax and cross-entropy in double-double NumPy, naive and obvious.

A number is the unevaluated sum of two float64, high + low, good to about 30 digits, so
the formulas are written as in a textbook. Shares nothing with the library; mpmath
checks it in test_accuracy. (Dekker 1971; Hida, Li & Bailey, "Quad-double", 2001.)
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Exact(NamedTuple):
    """high + low, |low| <= ulp(high) / 2."""

    high: np.ndarray
    low: np.ndarray

    def __getitem__(self, index):
        return Exact(self.high[index], self.low[index])

    def __neg__(self):
        return Exact(-self.high, -self.low)

    def __add__(self, other):
        s, e = two_sum(self.high, other.high)
        t, f = two_sum(self.low, other.low)
        s, e = quick_two_sum(s, e + t)
        return Exact(*quick_two_sum(s, e + f))

    def __sub__(self, other):
        return self + -other

    def __mul__(self, other):
        p, e = two_product(self.high, other.high)
        return Exact(
            *quick_two_sum(p, e + (self.high * other.low + self.low * other.high))
        )

    def __truediv__(self, other):
        quotient = exact(self.high / other.high)
        for _ in range(2):
            rest = self - quotient * other
            quotient = quotient + exact(rest.high / other.high)
        return quotient


def exact(x) -> Exact:
    x = np.asarray(x).astype(np.float64)
    return Exact(x, np.zeros_like(x))


def two_sum(a, b):
    s = a + b
    a_part = s - b
    return s, (a - a_part) + (b - (s - a_part))


def quick_two_sum(a, b):
    s = a + b
    return s, b - (s - a)


def two_product(a, b):
    p = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def split(a):
    t = 134217729.0 * a  # 2^27 + 1
    high = t - (t - a)
    return high, a - high


def total(x: Exact) -> Exact:
    """The sum over the last axis, by pairs."""
    while x.high.shape[-1] > 1:
        if x.high.shape[-1] % 2:
            pad = [(0, 0)] * (x.high.ndim - 1) + [(0, 1)]
            x = Exact(np.pad(x.high, pad), np.pad(x.low, pad))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


BLOCK = 2**12
LN2 = Exact(np.float64(0.6931471805599453), np.float64(2.3190468138462996e-17))


def expm1(x: Exact) -> Exact:
    """exp(x) - 1 for |x| <= 15, with relative accuracy: Taylor at x / 4096, doubled."""
    x = x * exact(2.0**-12)
    series = exact(0.0)
    for k in range(9, 0, -1):
        series = x * (exact(1.0) + series) * (exact(1.0) / exact(k))
    for _ in range(12):
        series = series * (exact(2.0) + series)
    return series


def exp(x: Exact) -> Exact:
    """exp(x) for x <= 0; exp(-inf) = 0. By blocks that stay in the cache."""
    flat = Exact(x.high.ravel(), x.low.ravel())
    blocks = [_exp(flat[i : i + BLOCK]) for i in range(0, flat.high.size, BLOCK)]
    whole = Exact(*map(np.concatenate, zip(*blocks, strict=True)))
    return Exact(whole.high.reshape(x.high.shape), whole.low.reshape(x.high.shape))


def _exp(x: Exact) -> Exact:
    x = Exact(np.maximum(x.high, -2000.0), np.where(x.high < -2000.0, 0, x.low))
    k = np.rint(x.high / LN2.high)
    r = exact(1.0) + expm1(x - exact(k) * LN2)
    return Exact(np.ldexp(r.high, k.astype(int)), np.ldexp(r.low, k.astype(int)))


def log1p(x: Exact) -> Exact:
    """log(1 + x) for 0 <= x <= 1e8, with relative accuracy: one step of Newton."""
    guess = exact(np.log1p(x.high))
    grown = expm1(guess)
    return guess + (x - grown) / (exact(1.0) + grown)


class Softmax(NamedTuple):
    lse: Exact
    log_probs: Exact
    probs: Exact
    complements: Exact  # 1 - p, as the sum of the other probabilities


def softmax(z) -> Softmax:
    """All that follows from one row of finite logits, over the last axis."""
    z = exact(z)
    top = np.max(z.high, -1, keepdims=True)
    first_top = np.arange(z.high.shape[-1]) == z.high.argmax(-1)[..., None]
    shifted = z - exact(top)
    e = exp(shifted)
    rest = total(where(first_top, exact(0.0), e))
    rest = Exact(rest.high[..., None], rest.low[..., None])
    log_total = log1p(rest)
    whole = exact(1.0) + rest
    others = where(first_top, rest, whole - e)
    lse = exact(top) + log_total
    return Softmax(lse[..., 0], shifted - log_total, e / whole, others / whole)


def where(condition, a: Exact, b: Exact) -> Exact:
    return Exact(np.where(condition, a.high, b.high), np.where(condition, a.low, b.low))


def at(rows: Exact, labels) -> Exact:
    """rows[i, labels[i]]."""
    column = np.asarray(labels)[..., None]
    return Exact(
        np.take_along_axis(rows.high, column, -1)[..., 0],
        np.take_along_axis(rows.low, column, -1)[..., 0],
    )


def ulp_error(got, want: Exact, scale=None) -> np.ndarray:
    """|got - want| in units in the last place of got's type at want.

    scale measures in units of another, larger quantity. Results below the smallest
    normal number may flush to 0.
    """
    got = np.asarray(got)
    kind = ml_dtypes.finfo(got.dtype)
    size = np.abs(want.high if scale is None else scale)
    size = np.maximum(size.astype(np.float64), float(kind.tiny))
    unit = np.exp2(np.floor(np.log2(size))) * float(kind.eps)
    error = np.abs((got.astype(np.float64) - want.high) - want.low) / unit
    flushed = (np.abs(want.high) < float(kind.tiny)) & (got == 0)
    return np.where(flushed, 0, error)


def temperature(logits, labels) -> float:
    """Where the mean cross-entropy of logits / T has no slope, by bisection."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels)
    above = z - np.take_along_axis(z, y[:, None], -1)
    low, high = -400.0, 400.0  # log of the inverse temperature
    for _ in range(200):
        middle = (low + high) / 2
        scaled = np.exp(middle) * above
        p = np.exp(scaled - scaled.max(-1, keepdims=True))
        slope = (p / p.sum(-1, keepdims=True) * above).sum(-1).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float(np.exp(-low))


def vector_scaling_gradient(logits, labels, w, b, *, l2):
    """Of mean cross-entropy of w z + b, plus l2 / 2 (|w - 1|^2 + |b|^2)."""
    z, w, b = (np.asarray(a, np.float64) for a in (logits, w, b))
    scaled = w * z + b
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    residual = (p - np.eye(z.shape[1])[labels]) / len(z)
    return (residual * z).sum(0) + l2 * (w - 1), residual.sum(0) + l2 * b


def brier_parts(probs, labels, bins):
    """Reliability, resolution, uncertainty and within, row by row and bin by bin."""
    parts = np.zeros(4)
    for j in range(probs.shape[1]):
        p, y = probs[:, j].astype(np.float64), (labels == j).astype(np.float64)
        overall = y.mean()
        parts[2] += overall * (1 - overall)
        edges = np.linspace(0, 1, bins + 1)
        index = np.searchsorted(edges[1:-1], p)
        for b in np.unique(index):
            here = index == b
            p_b, y_b, share = p[here].mean(), y[here].mean(), here.mean()
            beyond = p[here] - p_b
            parts[0] += share * (p_b - y_b) ** 2
            parts[1] += share * (y_b - overall) ** 2
            parts[3] += share * (beyond**2 - 2 * beyond * (y[here] - y_b)).mean()
    return parts
