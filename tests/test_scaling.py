"""Several processes on one mesh: every row once, killed and gone on with, bad input."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import scaling, scaling_pod
from experiments.command import BadInput
from jax_softmax import SoftmaxRegression

SMALL = scaling.Scaling(rows=130, features=6, classes=4, epochs=40, checkpoint_every=20)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("rows", [130, 256, 1])
def test_every_row_is_seen_once_an_epoch(rows, shards):
    """And batch by batch the same ones, however many data shards there are."""
    orders = []
    for epoch in (0, 1):
        whole = list(scaling.batches(rows, 3, epoch, 64, 0, 1))
        parts = [
            list(scaling.batches(rows, 3, epoch, 64, shard, shards))
            for shard in range(shards)
        ]
        seen = []
        for batch, *others in zip(whole, *parts, strict=True):
            here = [ids for part in others for ids in part.ids[part.weights > 0]]
            assert sorted(here) == sorted(batch.ids[batch.weights > 0])
            seen += sorted(here)
        assert sorted(seen) == list(range(rows))
        orders.append(seen)
    assert rows == 1 or orders[0] != orders[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data=2"}, "--mesh must be like data=2,model=2.* got data=2"),
        ({"mesh": "data=3,model=2"}, "--mesh data=3,model=2 has 6 devices.* are 4"),
        ({"batch_size": 7}, "--batch-size 7 must divide among 2 data shards"),
        ({"classes": 5}, "--classes 5 among 2 model shards"),
        ({"processes": 0}, "must be positive"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(BadInput, match=message):
        scaling.mesh_shape(replace(SMALL, **settings))


def command(*arguments):
    flags = ["--rows", "130", "--features", "6", "--classes", "4", "--epochs", "40"]
    here = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.scaling", *flags, *arguments],
        cwd=here,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained_alone(settings):
    """The same training, written down as plainly as it can be."""
    x, labels = scaling.examples(settings)
    optimizer = optax.sgd(0.1, momentum=0.9)
    model = scaling.first_model(settings)

    @jax.jit
    def step(model, state, x, y):
        def mean(model):
            log_probs = jax.nn.log_softmax(x @ model.w + model.b)
            return -jnp.take_along_axis(log_probs, y[:, None], 1).mean()

        updates, state = optimizer.update(jax.grad(mean)(model), state, model)
        return optax.apply_updates(model, updates), state

    state = optimizer.init(model)
    for epoch in range(settings.epochs):
        order = scaling.epoch_ids(settings.rows, settings.seed, epoch, 0, 1)
        for begin in range(0, settings.rows, settings.batch_size):
            ids = order[begin : begin + settings.batch_size]
            model, state = step(model, state, x[ids], labels[ids])
    return SoftmaxRegression(*map(np.asarray, model))


def test_killed_and_gone_on_with_by_another_number_of_processes(tmp_path):
    out = tmp_path / "run"
    running = command("--processes", "2", "--checkpoint-every", "20", "--out", str(out))
    pids = running.stdout.readline()
    victim = int(pids.split("pid ")[2].split(")")[0])
    while running.poll() is None and not (out / "checkpoints" / "20").exists():
        time.sleep(0.02)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert running.returncode == 1
    assert "Process 1 of 2 was killed (SIGKILL), and the others were stopped" in errors
    assert f"--resume {out}" in errors

    more = ("--checkpoint-every", "20", "--resume", str(out))
    again = command("--processes", "1", "--devices", "4", *more)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert '"went_on_after_step": 0' not in (out / "summary.json").read_text()
    want = trained_alone(SMALL)
    with np.load(out / "params.npz") as got:
        for name in ("w", "b"):
            np.testing.assert_allclose(got[name], getattr(want, name), atol=1e-6)


def test_four_chips_by_the_compiler_for_tpus():
    """A small shape: half the memory of the naive loss, and nothing more travels."""
    pytest.importorskip("libtpu")
    shape = scaling_pod.Shape(512, 512, 32768)
    row = scaling_pod.measured(4, shape)
    assert row["ours"]["temp_bytes"] <= row["naive"]["temp_bytes"] / 2
    assert row["ours"]["collective_bytes"] <= 1.2 * row["least_bytes"]
    assert set(row["ours"]["collectives"]) == {"all-reduce"}


def test_traffic_is_read_from_the_program():
    program = (
        "  %a = f32[2,1024]{1,0} all-reduce(f32[2,1024]{1,0} %x), channel_id=1\n"
        "  %b = (bf16[8]{0}, f32[4]{0}) all-reduce-start(bf16[8]{0} %y, f32[4]{0} %z)\n"
        "  %c = f32[3]{0} add(f32[3]{0} %u, f32[3]{0} %v)\n"
    )
    assert scaling_pod.traffic(program) == {"all-reduce": 2 * 1024 * 4 + 16 + 16}
