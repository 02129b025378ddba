"""What is no array of the formula: options, functions, models, known while tracing."""

import math
import reprlib
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes
from jax.core import Tracer


def axes(axis: int | tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes that exist, counted from the front, and hold at least one entry."""
    wanted = axis if isinstance(axis, tuple) else (axis,)
    rank = len(shape)
    if not all(isinstance(a, Integral) and not isinstance(a, bool) for a in wanted):
        raise TypeError(f"axis must be an int or a tuple of ints, got {axis!r}")
    if not wanted or not all(-rank <= a < rank for a in wanted):
        raise ValueError(f"axis must name axes of an array of rank {rank}, got {axis}")
    found = tuple(a % rank for a in wanted)
    if len(set(found)) < len(found):
        raise ValueError(f"axis must not repeat an axis, got {axis}")
    if math.prod(shape[a] for a in found) == 0:
        raise ValueError(f"axis {axis} must hold at least one entry, got shape {shape}")
    return found


def number(name: str, value: float) -> float:
    """A finite number that is known while tracing."""
    scalar = isinstance(value, Array | np.ndarray) and value.ndim == 0
    if isinstance(value, Tracer) or not (scalar or isinstance(value, Real)):
        raise TypeError(_not_static(name, "number", value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {reprlib.repr(value)}")
    return number


def integer(name: str, value: int) -> int:
    """An integer that is known while tracing."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(_not_static(name, "integer", value))
    return int(value)


def _not_static(name: str, wanted: str, value: Any) -> str:
    known = ", known while tracing (under jit, a static argument)"
    known = known if isinstance(value, Array) else ""
    return f"{name} must be a Python {wanted}{known}, got {type(value).__name__}"


def at_least(least: int, name: str, value: int) -> int:
    """An integer that is known while tracing, and no smaller."""
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def flag(name: str, value: bool) -> bool:
    """True or False, known while tracing."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def fraction(name: str, value: float) -> float:
    """A number in [0, 1] that is known while tracing."""
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def cap(name: str, value: float | None) -> float | None:
    """What logits stay below, known while tracing, or None."""
    if value is None:
        return None
    value = number(name, value)
    if not 1e-30 <= value <= 1e30:  # float32 holds 1 / it
        raise ValueError(f"{name} must be in [1e-30, 1e30], got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """A finite number >= 0 that is known while tracing."""
    value = number(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def functions(**values: object) -> None:
    """Each can be called."""
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {type(value).__name__}")


def static(**values: object) -> None:
    """Each can be part of what a compiled program is kept by."""
    for name, value in values.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{name} must be hashable, as functions and frozen dataclasses are, "
                f"got {type(value).__name__}"
            ) from None


def on_the_host(name: str, *values: Any) -> None:
    """Nothing is traced."""
    if any(isinstance(value, Tracer) for value in values):
        raise TypeError(
            f"{name} runs on the host and compiles what it needs: call it outside of "
            "jit, grad and vmap"
        )


def _pytree(model: Any) -> None:
    if isinstance(model, type):
        raise TypeError(
            f"model must be an instance, got the class {model.__name__}: make one first"
        )
    numbers = hasattr(model, "dtype") or isinstance(model, Real)
    if not numbers and jax.tree_util.all_leaves([model]):
        raise TypeError(
            f"model must be a pytree, got {type(model).__name__}: register it with "
            "jax.tree_util.register_dataclass"
        )


def trainable(model: Any) -> None:
    """A pytree of floating-point arrays."""
    _pytree(model)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        kind = getattr(leaf, "dtype", None) or np.result_type(type(leaf))
        if not jnp.issubdtype(kind, jnp.floating):
            name = f"model{jax.tree_util.keystr(path)}"
            raise TypeError(f"{name} must be floating point, got {kind}")


def has_logits(model: Any) -> None:
    """What evaluation asks of a model."""
    if not callable(getattr(model, "logits", None)):
        raise TypeError(
            "model must have a method logits(x), as SoftmaxRegression has, "
            f"got {type(model).__name__}"
        )
    _pytree(model)


def optimizer(name: str, value: Any) -> None:
    """One of optax's."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name} must be one of optax's, such as optax.sgd(0.1), got {value!r}"
        )


def one_key(name: str, value: Array) -> None:
    """One PRNG key, typed or raw."""
    kind = getattr(value, "dtype", None)
    raw = kind == jnp.uint32
    if not raw and (kind is None or not jnp.issubdtype(kind, dtypes.prng_key)):
        raise TypeError(
            f"{name} must be a key, as jax.random.key(0), got {type(value).__name__}"
        )
    batch = value.shape
    if raw:
        try:
            batch = jax.eval_shape(jax.random.wrap_key_data, value).shape
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must be a key, as jax.random.key(0), got raw numbers of shape "
                f"{value.shape}"
            ) from None
    if batch:
        raise ValueError(f"{name} must be one key, got keys of shape {batch}")
