"""Entries of a row, where XLA for CPU needs a hint to work on them as vectors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_softmax._platform import by_platform

FEW_CLASSES = 16  # are compared, or added up, one after the other
FEW_ROWS = 8  # are not worth an array of all columns


def row_entry(rows: Array, column: Array) -> Array:
    """rows[i, column[i]].

    Accelerators compare on their way over the row, where a gather would have a row of
    another type written out. So do CPUs where classes are few: a gather is no vector
    loop.
    """

    def gathered(rows: Array, column: Array) -> Array:
        return jnp.take_along_axis(rows, column[..., None], axis=-1)[..., 0]

    on_cpu = _compared_as_bits if rows.shape[-1] <= FEW_CLASSES else gathered
    return by_platform(rows, column, cpu=on_cpu, default=_compared)


def _compared(rows: Array, column: Array) -> Array:
    entries = jnp.where(is_column(rows, column), rows, 0)
    return entries.sum(-1, dtype=rows.dtype)


def is_column(rows: Array, column: Array) -> Array:
    """Whether an entry of rows[i] stands in column[i].

    A CPU reads the columns: it counts in 64 bits, and the widest vectors, which that
    takes, slow down all others on some.
    """
    columns = jnp.arange(rows.shape[-1], dtype=column.dtype)
    if column.size >= FEW_ROWS:
        columns = once(columns)
    return columns == column[..., None]


@jax.custom_jvp
def _compared_as_bits(rows: Array, column: Array) -> Array:
    """XLA for CPU adds whole numbers up in the loop that compares them.

    Others it writes out first, for a loop of their own.
    """
    bits = lax.bitcast_convert_type(rows, f"int{8 * rows.dtype.itemsize}")
    return lax.bitcast_convert_type(_compared(bits, column), rows.dtype)


@_compared_as_bits.defjvp
def _compared_as_bits_jvp(primals, tangents):
    (rows, column), (d_rows, _) = primals, tangents
    return _compared_as_bits(rows, column), _compared(d_rows, column)


def once(array: Array) -> Array:
    """An array that XLA for CPU is not to make again for every number it is used for.

    What a loop leaves is read from memory; a barrier alone is gone by then.
    """

    def on_cpu(array: Array) -> Array:
        def kept(index: Array, array: Array) -> Array:
            return lax.optimization_barrier((array, index))[0]

        return lax.fori_loop(0, 2, kept, array)

    return by_platform(array, cpu=on_cpu, default=lambda array: array)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: Array, kind: np.dtype) -> Array:
    """x.astype(kind).

    XLA for CPU converts to bfloat16 one number at a time where more than a little is
    fused with that, so there it is done on bits.
    """
    if x.dtype != jnp.float32 or kind != jnp.bfloat16:
        return x.astype(kind)

    def by_bits(x: Array) -> Array:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        to_even = (bits >> 16) & 1
        bits = (bits + (0x7FFF + to_even)) >> 16
        bits = jnp.where(jnp.isnan(x), 0x7FC0, bits).astype(jnp.uint16)
        return lax.bitcast_convert_type(bits, kind)

    return by_platform(x, cpu=by_bits, default=lambda x: x.astype(kind))


@rounded.defjvp
def _rounded_jvp(kind, primals, tangents):
    return rounded(*primals, kind), tangents[0].astype(kind)
