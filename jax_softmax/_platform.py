"""One loop for CPUs and another for accelerators, chosen when XLA compiles."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax
from jax.typing import ArrayLike

Result = TypeVar("Result")


def by_platform(
    *operands: ArrayLike, cpu: Callable[..., Result], default: Callable[..., Result]
) -> Result:
    """cpu(*operands) on a CPU, default(*operands) elsewhere.

    And wherever rows are spread over an Explicit mesh: a CPU's loops cut them, which
    JAX does not do with what lies on several devices.
    """
    if any(_is_spread(operand) for operand in operands):
        return default(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def _is_spread(operand: ArrayLike) -> bool:
    spec = jax.typeof(operand).sharding.spec
    return len(spec) > 0 and spec[-1] is not None
