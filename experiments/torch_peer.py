"""torch, a peer that takes part where it is installed, on the device that JAX has."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from experiments.measure import Contender

INSTALLED = find_spec("torch") is not None


def tensor(array: np.ndarray, dtype: str, *, differentiated: bool = False) -> Any:
    """A copy of the array."""
    torch: Any = import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    kind = getattr(torch, dtype)
    return torch.tensor(array).to(device, kind).requires_grad_(differentiated)


def contender(run: Callable[[], Any]) -> Contender:
    """What runs, and waits for the device."""
    torch: Any = import_module("torch")
    if jax.default_backend() != "gpu":
        return Contender(run)

    def run_and_wait() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return Contender(run_and_wait)


def numbers(result: Any) -> np.ndarray:
    """A tensor, or an array of JAX's, as float32 for NumPy."""
    if hasattr(result, "detach"):
        result = result.detach().float().cpu().numpy()
    return np.asarray(result, np.float32)
