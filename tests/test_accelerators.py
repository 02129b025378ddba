"""What the compilers for CPU and TPU make of arithmetic that must not be simplified.

shifted_exp and probability rest on two-sums, which a compiler that takes floating point
for real numbers would cancel. The TPU compiler needs no TPU, only the package libtpu.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import jax_softmax as js
from jax_softmax._partition import two_sum


def tpu():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return described.devices[0]


TARGETS = {"cpu": lambda: jax.devices("cpu")[0], "tpu": tpu}


def compiled(target, f, *shapes):
    sharding = SingleDeviceSharding(TARGETS[target]())
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes]
    return jax.jit(f).lower(*shapes).compile()


def operations(program):
    return len(re.findall(r"= f32\S* (?:add|subtract)\(", program.as_text()))


@pytest.mark.parametrize("target", TARGETS)
def test_the_compiler_keeps_a_two_sum(target):
    """Six additions go in, of which five give the rounding; six come out."""
    shape = (1024, 256)
    program = compiled(target, lambda a, b: two_sum(a, b), shape, shape)
    assert operations(program) >= 6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("f", [js.logsumexp, js.softmax, js.log_softmax])
def test_public_functions_compile(target, f):
    program = compiled(target, f, (1024, 50257))
    assert operations(program) >= 6


def test_a_large_vocabulary_fits_a_tpu():
    """16384 tokens, 4096 features, 128256 classes: the logits alone would be 8.4 GB."""
    sharding = SingleDeviceSharding(tpu())
    x, w, labels = (
        jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
        for shape, kind in (
            ((16384, 4096), jnp.bfloat16),
            ((4096, 128256), jnp.bfloat16),
            ((16384,), jnp.int32),
        )
    )
    step = jax.jit(jax.value_and_grad(js.mean_linear_cross_entropy, (0, 1)))
    memory = step.lower(x, w, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.7e9


def test_the_cpu_gives_the_rounding():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, [[1.0], [1e4]], (2, 1000)).astype(np.float32)
    total, rounding = jax.jit(two_sum)(a, b)
    exact = a.astype(np.float64) + b
    np.testing.assert_array_equal(np.float64(total) + np.float64(rounding), exact)
