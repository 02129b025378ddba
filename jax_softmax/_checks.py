"""Arrays as they are handed over: their types and shapes, checked while tracing."""

import reprlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes
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


def class_ids(
    name: str, value: ArrayLike, batch: tuple[int, ...] | None = None
) -> Array:
    """Integer labels, one for each row; any shape is a batch's where none is given."""
    array = array_of(name, not_wrapped(value))
    batch = array.shape if batch is None else batch
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
