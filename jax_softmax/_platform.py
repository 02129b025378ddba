"""One loop for CPUs, others for accelerators, chosen when XLA compiles."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

Result = TypeVar("Result")


def by_platform(
    *operands: ArrayLike,
    cpu: Callable[..., Result],
    gpu: Callable[..., Result] | None = None,
    default: Callable[..., Result],
) -> Result:
    """cpu(*operands) on a CPU, gpu(*operands) on a GPU, default(*operands) elsewhere.

    default also where the last axis of an operand is spread over an Explicit mesh: the
    loops for CPUs cut that axis into slices, which JAX refuses where it is spread.
    """
    if any(_is_spread(operand) for operand in operands):
        return default(*operands)
    loops = {"cpu": cpu} if gpu is None else {"cpu": cpu, "cuda": gpu, "rocm": gpu}
    return lax.platform_dependent(*operands, **loops, default=default)


def _is_spread(operand: ArrayLike) -> bool:
    spec = jax.typeof(operand).sharding.spec
    return len(spec) > 0 and spec[-1] is not None


def once(array: Array) -> Array:
    """An array that XLA for CPU computes once, not again within each loop that uses it.

    What a loop leaves lies in memory; a barrier alone is gone before loops are fused.
    """

    def on_cpu(array: Array) -> Array:
        return lax.fori_loop(0, 2, _left, array)

    return by_platform(array, cpu=on_cpu, default=lambda array: array)


def _left(index: Array, array: Array) -> Array:
    return lax.optimization_barrier((array, index))[0]


def both_once(a: Array, b: Array) -> tuple[Array, Array]:
    """The same of two, as one array of complex numbers: XLA for CPU has no loop that
    makes two."""

    def on_cpu(a: Array, b: Array) -> tuple[Array, Array]:
        both = once(lax.complex(a, b))
        return lax.real(both), lax.imag(both)

    return by_platform(a, b, cpu=on_cpu, default=lambda a, b: (a, b))


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
