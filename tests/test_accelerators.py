"""What the compilers for CPU, TPU and GPU make of it all.

Exponentials rest on two-sums, which a compiler that takes floating point for real
numbers would cancel. The compilers for a TPU and an H100 need neither, only packages:
uv run --with 'jax[tpu]' pytest, and with JAX_PLATFORMS=cpu, --with 'jax[cuda12]'.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import jax_softmax as js
from experiments import benchmark_chips, chips
from jax_softmax._exponential import two_sum


def tpu():
    pytest.importorskip("libtpu")
    return chips.v5e().item(0)


def gpu():
    pytest.importorskip("jax_plugins.xla_cuda12")
    return chips.h100().item(0)


TARGETS = {"cpu": lambda: jax.devices("cpu")[0], "tpu": tpu, "gpu": gpu}


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


def test_a_large_vocabulary_on_a_tpu():
    """16384 tokens, 4096 features, 128256 classes: the logits alone would be 8.4 GB."""
    row = benchmark_chips.linear_row(tpu(), benchmark_chips.LINEAR)
    assert row["ours"]["temp_bytes"] <= 0.7e9 < 8e9 < row["peer"]["temp_bytes"]
    assert row["matmuls"]["ours"] <= 3.05
    assert row["ours"]["seconds"] <= 1.1 * row["peer"]["seconds"]


def test_a_large_vocabulary_on_an_h100():
    row = benchmark_chips.linear_row(gpu(), benchmark_chips.LINEAR)
    assert row["ours"]["temp_bytes"] <= 0.7e9 < 8e9 < row["peer"]["temp_bytes"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["65536 x 10", "8192 x 1000"])
def test_a_softmax_on_an_h100_reads_a_row_once(shape, dtype):
    rows = benchmark_chips.dense_rows(gpu(), shape, dtype)
    (row,) = (row for row in rows if row["function"] == "softmax")
    assert row["ours"]["temp_bytes"] <= row["peer"]["temp_bytes"]
    assert row["ours"]["bytes_accessed"] <= row["peer"]["bytes_accessed"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_on_a_tpu_cost_no_more_than_with_jax_nn(dtype):
    """But for some numbers of each row: the sum of the others and what it has lost, the
    tail, and how many maxima there are."""
    rows = 8192
    for row in benchmark_chips.dense_rows(tpu(), "8192 x 1000", dtype):
        ours, peer = row["ours"], row["peer"]
        assert ours["temp_bytes"] <= peer["temp_bytes"] + 100 * rows, row
        assert ours["bytes_accessed"] <= peer["bytes_accessed"] + 100 * rows, row
        assert ours["seconds"] <= 1.01 * peer["seconds"], row


def test_the_cpu_gives_the_rounding():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, [[1.0], [1e4]], (2, 1000)).astype(np.float32)
    total, rounding = jax.jit(two_sum)(a, b)
    exact = a.astype(np.float64) + b
    np.testing.assert_array_equal(np.float64(total) + np.float64(rounding), exact)
