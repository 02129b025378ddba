"""Static facts, checked while tracing: free at run time, one sentence on failure."""

import math
import reprlib
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes
from jax.core import Tracer
from jax.typing import ArrayLike


def floating(name: str, value: ArrayLike) -> Array:
    """A floating-point array of at least 16 bits."""
    array = array_of(name, value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {array.dtype}")
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise TypeError(
            f"{name} must be floating point, of 16 bits or more, got {array.dtype}: "
            f"{_converted(name, 'jnp.float32')}"
        )
    return array


def scores(name: str, value: ArrayLike) -> Array:
    """Floating-point scores with a class axis that is not empty."""
    array = floating(name, value)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(
            f"{name} must have a last axis of at least one class, got {array.shape}"
        )
    return array


def class_ids(name: str, value: ArrayLike, batch: tuple[int, ...]) -> Array:
    """Integer labels, one for each row."""
    array = array_of(name, not_wrapped(value))
    if not jnp.issubdtype(array.dtype, jnp.integer):
        remedy = _converted(name, "int")
        if array.ndim > len(batch):
            remedy = "target distributions go to cross_entropy_with_probs"
        raise TypeError(
            f"{name} must be integer class ids, got {array.dtype}: {remedy}"
        )
    same_shape(name, array, batch)
    return _in_32_bits(array)


def _in_32_bits(ids: Array) -> Array:
    """As int32. An id that this does not hold is no class, and becomes none."""
    if ids.dtype.itemsize >= 4 and ids.dtype != jnp.int32:
        own, limits = jnp.iinfo(ids.dtype), jnp.iinfo(jnp.int32)
        ids = jnp.clip(ids, max(own.min, limits.min), min(own.max, limits.max))
    return ids.astype(jnp.int32)


def examples(
    x_name: str, x: ArrayLike, labels_name: str, labels: ArrayLike
) -> tuple[Array, Array]:
    """At least one row, and a class id for each."""
    x = array_of(x_name, x)
    some_rows(x_name, x)
    return x, class_ids(labels_name, labels, x.shape[:1])


def some_rows(name: str, x: Array | np.ndarray) -> None:
    """At least one."""
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {x.shape}")


def not_wrapped(ids: ArrayLike) -> ArrayLike:
    """64-bit ids that JAX would wrap to 32 bits, as the nearest that these hold: no
    class either."""
    if not isinstance(ids, np.ndarray | np.generic) or ids.dtype.kind not in "iu":
        return ids
    held = np.iinfo(dtypes.canonicalize_dtype(ids.dtype).name)
    return np.clip(ids, max(held.min, np.iinfo(ids.dtype.name).min), held.max)


def labelled(
    name: str, value: ArrayLike, labels: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Scores, a class id for each row of them, and which rows to keep."""
    array = scores(name, value)
    batch = array.shape[:-1]
    labels = class_ids("labels", labels, batch)
    return array, labels, row_mask("where", where, batch)


def row_mask(name: str, value: ArrayLike | None, batch: tuple[int, ...]) -> Array:
    """A boolean for each row, True = keep; all True when not given."""
    if value is None:
        return jnp.ones(batch, bool)
    array = _boolean(name, value)
    same_shape(name, array, batch)
    return array


def entry_mask(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    """A boolean for each entry, True = keep, broadcast to a shape."""
    array = _boolean(name, value)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to shape {shape}, got {array.shape}"
        ) from None


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


def same_shape(name: str, array: Array, wanted: tuple[int, ...]) -> None:
    """No argument is broadcast: a wrong shape is an error, not a guess."""
    if array.shape != wanted:
        raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The type that sums run in: the widest of the arrays', but at least float32."""
    widest = max((array.dtype for array in arrays), key=lambda kind: kind.itemsize)
    return widest if widest.itemsize >= 4 else jnp.dtype(jnp.float32)


def wide(array: Array) -> Array:
    """The array in the type that its sums run in."""
    return array.astype(accumulation_dtype(array))


def array_of(name: str, value: ArrayLike) -> Array:
    """An array of numbers, or of booleans."""
    value = _listed(plain(name, value))
    held(name, value)
    try:
        return jnp.asarray(value)
    except OverflowError:
        raise ValueError(
            f"{name} must fit {jnp.asarray(0).dtype}, got {reprlib.repr(value)}"
        ) from None
    except (TypeError, ValueError):
        kind = f" of {value.dtype}" if isinstance(value, np.ndarray) else ""
        raise TypeError(
            f"{name} must be an array of numbers, got {type(value).__name__}{kind}"
        ) from None


def _listed(value: ArrayLike) -> ArrayLike:
    """Lists of Python's numbers by NumPy, which takes a hundredth of JAX's time."""
    if not isinstance(value, list | tuple):
        return value
    if not {*map(type, jax.tree.leaves(value))} <= {bool, int, float}:
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        return value
    return array if array.dtype.kind in "bif" else value


def plain(name: str, value: ArrayLike) -> ArrayLike:
    """NumPy's arrays without what jax.jit does not see: a mask, another byte order."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array, whose mask JAX drops: fill it, and "
            "say what to keep by an argument such as where"
        )
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def held(name: str, value: ArrayLike) -> None:
    """No integers that the type JAX has for them does not hold, and would wrap."""
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "iu":
        return
    kind = dtypes.canonicalize_dtype(value.dtype)
    if kind == value.dtype or not value.size:
        return
    limits, least, most = np.iinfo(kind.name), value.min(), value.max()
    if not limits.min <= least <= most <= limits.max:
        raise ValueError(
            f"{name} must fit {kind}, got numbers from {least} to {most}: "
            f"{_converted(name, 'np.float32')}, or enable x64"
        )


def _converted(name: str, kind: str) -> str:
    if " " in name:
        return f"convert them with astype({kind})"
    return f"convert with {name}.astype({kind})"


def scalar(name: str, value: ArrayLike) -> Array:
    """One number, which may be traced."""
    if isinstance(value, tuple | list):
        raise TypeError(f"{name} must be one number, got a {type(value).__name__}")
    array = array_of(name, value)
    if array.ndim:
        raise ValueError(f"{name} must be one number, got shape {array.shape}")
    if array.dtype == bool or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be a real number, got {array.dtype}")
    return array


def _boolean(name: str, value: ArrayLike) -> Array:
    array = array_of(name, value)
    if array.dtype != bool:
        raise TypeError(f"{name} must be boolean (True = keep), got {array.dtype}")
    return array
