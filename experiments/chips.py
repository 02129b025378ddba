"""Accelerators that are described, not there: their real compilers need no more.

Temporary memory, flops, bytes and the cost model's seconds of a compiled program are
exact, and the same on every machine.
"""

import os
from typing import Any

import jax
import numpy as np

from experiments.command import BadInput

V5E = {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def v5e(chips: int = 1) -> np.ndarray:
    """So many chips of a TPU v5e.

    Raises:
        BadInput: the compiler for TPUs is not installed.
    """
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    described = _described(
        "TPUs", "tpu", platform="tpu", topology_name=f"v5e:{V5E[chips]}"
    )
    return np.array(described.devices[:chips])


def h100() -> np.ndarray:
    """One H100.

    Raises:
        BadInput: the compiler for GPUs is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # or its plugin looks for a card first
    return np.array(
        _described(
            "GPUs", "cuda12", platform="cuda", target_config=H100, topology="1x1x1"
        ).devices
    )


def _described(chips: str, extra: str, **topology: Any) -> Any:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**topology)
    except Exception as error:
        raise BadInput(
            f"The compiler for {chips} is not there ({str(error).splitlines()[0]}): "
            f"put uv run --with 'jax[{extra}]' before the command."
        ) from None


def figures(program: jax.stages.Compiled) -> dict[str, float]:
    """What the compiler says of its program.

    For a GPU that is described, only memory: what the program reads and writes is
    counted here, and of flops and seconds nothing is known.
    """
    memory = program.memory_analysis()
    temp = {"temp_bytes": 0 if memory is None else memory.temp_size_in_bytes}
    cost: Any = program.cost_analysis()
    if cost is None:
        # Of another platform there is no public way.
        from jaxlib._jax import hlo_module_cost_analysis

        executable: Any = program.runtime_executable()
        (module,) = executable.hlo_modules()
        cost = hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        return temp | {"bytes_accessed": cost["bytes accessed"]}
    return temp | {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "seconds": cost["optimal_seconds"],
    }
