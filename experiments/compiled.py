"""Compiled programs, kept in the user's cache folder from one run to the next."""

import os
import platform
import warnings
from hashlib import sha256
from pathlib import Path

import jax

from experiments.cache import user_cache


def keep_programs() -> None:
    """Have JAX keep what it compiles, and find it again in the next process.

    A program is found by its text, its options and the versions of JAX and XLA; the
    folder is named by the processor, since a home folder may be seen from several. One
    that cannot be read, or written, is compiled as if there were no cache.
    JAX_COMPILATION_CACHE_DIR names another folder.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        kept = user_cache() / f"compiled-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")


def _processor() -> str:
    """Twelve digits that two processors share if they have the same instructions."""
    known = [platform.machine(), platform.processor()]
    if os.path.exists("/proc/cpuinfo"):
        about = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        known += [line for line in about if line.startswith(("model name", "flags"))]
    return sha256("\n".join(known).encode()).hexdigest()[:12]
