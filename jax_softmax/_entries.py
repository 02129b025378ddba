"""Entries of a row, where XLA for CPU needs a hint to work on them as vectors."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax._platform import by_platform, once

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

    A CPU reads the columns' numbers from memory. XLA would count them in 64 bits, which
    takes the widest vectors, and on some CPUs those slow down all other arithmetic.
    """
    columns = jnp.arange(rows.shape[-1], dtype=column.dtype)
    if not (isinstance(column.size, int) and column.size < FEW_ROWS):
        columns = once(columns)
    return jnp.expand_dims(columns, range(column.ndim)) == column[..., None]


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
