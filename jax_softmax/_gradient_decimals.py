"""The operations of a traced program, on arrays of Decimals and of whole numbers.

A table of what JAX calls each and of what NumPy or `decimal` does instead; what only
moves entries is named, since its indices can be moved in their stead.
"""

import decimal
import functools
import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIGITS = 60
_TINY = Decimal(10) ** -(DIGITS // 2)


class Unsupported(NotImplementedError):
    """What decimals cannot do, or not in time."""


def _dot(a: Any, b: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    (over_a, over_b), (batch_a, batch_b) = dimension_numbers

    def matrices(x: Any, over: Any, batch: Any, last: bool) -> tuple[Any, Any]:
        free = [i for i in range(x.ndim) if i not in (*over, *batch)]
        moved = x.transpose(*batch, *(free + list(over) if last else [*over, *free]))
        sizes = [math.prod(x.shape[i] for i in axes) for axes in (batch, free, over)]
        shape = (sizes[0], *((sizes[1], sizes[2]) if last else (sizes[2], sizes[1])))
        return moved.reshape(shape), [x.shape[i] for i in free]

    left, free_a = matrices(a, over_a, batch_a, last=True)
    right, free_b = matrices(b, over_b, batch_b, last=False)
    if left.shape[2] == 0:
        raise Unsupported("an empty dot_general")
    shape = [a.shape[i] for i in batch_a]
    return np.matmul(left, right).reshape((*shape, *free_a, *free_b))


def _scatter_add(operand: Any, indices: Any, updates: Any, **params: Any) -> Any:
    """Where an update lands is where its gather, which is its transpose, reads."""
    dims = params["dimension_numbers"]
    numbers = jax.lax.ScatterDimensionNumbers(*dims)
    places = jnp.arange(1.0, operand.size + 1).reshape(operand.shape)

    def scattered(u: Any) -> Any:
        return jax.lax.scatter_add(
            jnp.zeros(operand.shape), indices, u, numbers, mode=params["mode"]
        )

    (where,) = jax.vjp(scattered, jnp.zeros(np.shape(updates)))[1](places)
    where = np.asarray(where).astype(int).ravel() - 1
    out = operand.ravel().copy()
    inside = where >= 0
    np.add.at(out, where[inside], updates.ravel()[inside])
    return out


def _broadcast(x: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    aligned = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        aligned[axis] = size
    return np.broadcast_to(x.reshape(aligned), shape)


def _slice(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    steps = strides or [None] * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _elementwise(f: Callable[..., Any]) -> Callable[..., Any]:
    run = np.frompyfunc(f, len(inspect.signature(f).parameters), 1)

    def operation(*args: Any, **_: Any) -> Any:
        return run(*args)

    return operation


def _sum(x: Any, *, axes: Any, **_: Any) -> Any:
    return np.add.reduce(x, axis=tuple(axes), initial=Decimal(0))


def _product(x: Any, *, axes: Any, **_: Any) -> Any:
    return np.multiply.reduce(x, axis=tuple(axes), initial=Decimal(1))


def _extreme(f: Any, x: Any, axes: Any) -> Any:
    return functools.reduce(lambda y, axis: f.reduce(y, axis), sorted(axes)[::-1], x)


def _larger(a: Decimal, b: Decimal) -> Decimal:
    return a if a.is_nan() or a >= b else b


def _smaller(a: Decimal, b: Decimal) -> Decimal:
    return a if a.is_nan() or a <= b else b


def _log1p(x: Decimal) -> Decimal:
    return x if abs(x) < _TINY else (1 + x).ln()


def _expm1(x: Decimal) -> Decimal:
    return x if abs(x) < _TINY else x.exp() - 1


def _tanh(x: Decimal) -> Decimal:
    grown = _expm1(-2 * abs(x))
    return (-grown / (2 + grown)).copy_sign(x)


def _logistic(x: Decimal) -> Decimal:
    small = (-abs(x)).exp()
    return (small if x < 0 else Decimal(1)) / (1 + small)


def _sign(x: Decimal) -> Decimal:
    return x if x.is_nan() or x == 0 else Decimal(1).copy_sign(x)


def _power(a: Decimal, b: Decimal | int) -> Decimal:
    return Decimal(1) if b == 0 else a**b  # Decimal has no 0 to the 0


def _rounded(x: Any, *, rounding_method: Any) -> Any:
    to_even = rounding_method == jax.lax.RoundingMethod.TO_NEAREST_EVEN
    how = decimal.ROUND_HALF_EVEN if to_even else decimal.ROUND_HALF_UP
    return np.frompyfunc(lambda a: a.to_integral_value(how), 1, 1)(x)


def _converted(x: Any, *, new_dtype: Any, **_: Any) -> Any:
    if jnp.issubdtype(new_dtype, jnp.floating):
        return x
    if jnp.issubdtype(new_dtype, jnp.bool_):
        return x != 0
    try:
        return np.frompyfunc(int, 1, 1)(x)
    except (OverflowError, ValueError) as refusal:
        raise Unsupported("an infinity to an integer") from refusal


TO_DECIMAL = np.frompyfunc(lambda v: Decimal(float(v)), 1, 1)
_MAXIMUM, _MINIMUM = np.frompyfunc(_larger, 2, 1), np.frompyfunc(_smaller, 2, 1)
SLOW = {"exp", "log", "log1p", "expm1", "tanh", "logistic", "pow", "cosh", "sinh"}
ANY_TYPE = {
    *("broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "rev"),
    *("concatenate", "select_n", "copy", "iota", "lt", "le", "gt", "ge", "eq", "ne"),
}
MOVES = {"gather", "dynamic_slice", "dynamic_update_slice", "pad", "scatter"}
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _elementwise(lambda a, b: a + b),
    "add_any": _elementwise(lambda a, b: a + b),
    "sub": _elementwise(lambda a, b: a - b),
    "mul": _elementwise(lambda a, b: a * b),
    "div": _elementwise(lambda a, b: a / b),
    "max": _elementwise(_larger),
    "min": _elementwise(_smaller),
    "pow": _elementwise(_power),
    "neg": _elementwise(lambda a: -a),
    "abs": _elementwise(lambda a: abs(a)),
    "sign": _elementwise(_sign),
    "sqrt": _elementwise(lambda a: a.sqrt()),
    "rsqrt": _elementwise(lambda a: 1 / a.sqrt()),
    "square": _elementwise(lambda a: a * a),
    "one_minus_square": _elementwise(lambda a: 1 - a * a),
    "exp": _elementwise(lambda a: a.exp()),
    "log": _elementwise(lambda a: a.ln()),
    "log1p": _elementwise(_log1p),
    "expm1": _elementwise(_expm1),
    "tanh": _elementwise(_tanh),
    "logistic": _elementwise(_logistic),
    "cosh": _elementwise(lambda a: (a.exp() + (-a).exp()) / 2),
    "sinh": _elementwise(lambda a: (_expm1(a) - _expm1(-a)) / 2),
    "round": _rounded,
    "floor": _elementwise(lambda a: a.to_integral_value(decimal.ROUND_FLOOR)),
    "is_finite": _elementwise(lambda a: a.is_finite()),
    "lt": _elementwise(lambda a, b: a < b),
    "le": _elementwise(lambda a, b: a <= b),
    "gt": _elementwise(lambda a, b: a > b),
    "ge": _elementwise(lambda a, b: a >= b),
    "eq": _elementwise(lambda a, b: a == b),
    "ne": _elementwise(lambda a, b: a != b),
    "clamp": _elementwise(lambda low, x, high: _smaller(_larger(x, low), high)),
    "integer_pow": lambda x, *, y, **_: x**y if y >= 0 else 1 / x**-y,
    "reduce_sum": _sum,
    "reduce_prod": _product,
    "reduce_max": lambda x, *, axes, **_: _extreme(_MAXIMUM, x, axes),
    "reduce_min": lambda x, *, axes, **_: _extreme(_MINIMUM, x, axes),
    "argmax": lambda x, *, axes, **_: np.argmax(x, axes[0]),
    "cumsum": lambda x, *, axis, reverse, **_: (
        np.flip(np.cumsum(np.flip(x, axis), axis), axis)
        if reverse
        else np.cumsum(x, axis)
    ),
    "dot_general": _dot,
    "scatter-add": _scatter_add,
    "convert_element_type": _converted,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "transpose": lambda x, *, permutation: x.transpose(permutation),
    "squeeze": lambda x, *, dimensions: x.squeeze(tuple(dimensions)),
    "slice": _slice,
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "split": lambda x, *, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
    "optimization_barrier": lambda *xs: xs,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "select_n": lambda which, *cases: np.select(
        [np.asarray(which) == i for i in range(len(cases))], cases, cases[0]
    ),
    "iota": lambda *, shape, dimension, **_: np.broadcast_to(
        np.arange(shape[dimension]).reshape(
            [-1 if axis == dimension else 1 for axis in range(len(shape))]
        ),
        shape,
    ),
    "copy": lambda x: x,
    "stop_gradient": lambda x, **_: x,
}
