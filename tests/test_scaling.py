"""Several processes on one mesh: every row once, killed and gone on with, bad input."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    scaling,
    scaling_overhead,
    scaling_pod,
    scaling_settings,
    scaling_work,
)
from experiments.command import BadInput, Failed, main
from jax_softmax import SoftmaxRegression

SMALL = scaling.Scaling(rows=130, features=6, classes=4, epochs=40, checkpoint_every=20)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("rows", [130, 256, 1])
def test_every_row_is_seen_once_an_epoch(rows, shards):
    """And batch by batch the same ones, however many data shards there are."""
    orders = []
    for epoch in (0, 1):
        whole = list(scaling_work.batches(rows, 3, epoch, 64, 0, 1))
        parts = [
            list(scaling_work.batches(rows, 3, epoch, 64, shard, shards))
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
        (
            {"classes": 5, "mesh": "data=2,model=2"},
            "--classes 5 among 2 model shards",
        ),
        ({"processes": 0}, "^--processes must be at least 1, got 0.$"),
        ({"devices": 0}, "^--devices must be at least 1, got 0.$"),
        ({"rows": 0}, "^--rows must be at least 1, got 0.$"),
        ({"features": 0}, "^--features must be at least 1, got 0.$"),
        ({"classes": 0}, "^--classes must be at least 1, got 0.$"),
        ({"batch_size": 0}, "^--batch-size must be at least 1, got 0.$"),
        ({"checkpoint_every": 0}, "^--checkpoint-every must be at least 1, got 0.$"),
        ({"epochs": -1}, "^--epochs must be at least 0, got -1.$"),
        ({"seed": -1}, "--seed must be in .*, got -1.$"),
    ],
)
def test_bad_input_starts_nothing(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(BadInput, match=message):
        scaling.launch(replace(SMALL, **settings, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_seed_and_its_epochs_may_reach_the_end_of_32_bits():
    order = scaling_work.epoch_ids(9, 2**32 - 1, 1, 0, 1)
    assert sorted(order) == list(range(9))


def trained_alone(settings):
    """The same training, written down as plainly as it can be."""
    x, labels = scaling_work.examples(settings)
    optimizer = optax.sgd(0.1, momentum=0.9)
    model = scaling_work.first_model(settings)

    @jax.jit
    def step(model, state, x, y):
        def mean(model):
            log_probs = jax.nn.log_softmax(x @ model.w + model.b)
            return -jnp.take_along_axis(log_probs, y[:, None], 1).mean()

        updates, state = optimizer.update(jax.grad(mean)(model), state, model)
        return optax.apply_updates(model, updates), state

    state = optimizer.init(model)
    for epoch in range(settings.epochs):
        order = scaling_work.epoch_ids(settings.rows, settings.seed, epoch, 0, 1)
        for begin in range(0, settings.rows, settings.batch_size):
            ids = order[begin : begin + settings.batch_size]
            model, state = step(model, state, x[ids], labels[ids])
    return SoftmaxRegression(*map(np.asarray, model))


@pytest.fixture
def launched(monkeypatch):
    """As from the command line, with the launcher in this process."""
    jax.devices()  # those of this process, before the flag for them goes
    monkeypatch.delenv("XLA_FLAGS")
    flags = ["--rows=130", "--features=6", "--classes=4", "--epochs=40"]
    flags += ["--checkpoint-every=20"]

    def launch(*arguments, flags=flags):
        monkeypatch.setattr(sys, "argv", ["scaling", *flags, *arguments])
        main(scaling.run, scaling.Scaling, sys.argv[1:], program="scaling")

    return launch


def test_by_default_there_are_two_model_shards_where_that_divides():
    assert scaling_settings.mesh_shape(replace(SMALL, classes=4)) == (2, 2)
    assert scaling_settings.mesh_shape(replace(SMALL, classes=5, processes=2)) == (2, 1)


def test_killed_and_gone_on_with_by_other_processes(
    tmp_path, launched, monkeypatch, capfd
):
    """The first of two dies, without which the other cannot reach anyone."""
    out, again = tmp_path / "run", tmp_path / "again"
    started, killed = [], []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)

    def kill_the_first():
        while not (out / "checkpoints" / "20").exists():
            time.sleep(0.02)
        started[0].kill()
        killed.append(time.monotonic())

    threading.Thread(target=kill_the_first, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        launched("--processes=2", f"--out={out}")
    assert time.monotonic() - killed[0] < 60
    assert stop.value.code == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "Process 0 of 2 was killed (SIGKILL), and the others were stopped" in error
    assert f"--resume {out}" in error

    shutil.copytree(out, again)
    with pytest.raises(SystemExit) as stop:
        launched("--rows=9", f"--resume={out}", flags=())
    assert stop.value.code == 2
    error = capfd.readouterr().err
    assert f"The run in {out} has --rows 130, not 9: leave the flag out" in error
    launched("--processes=1", "--devices=4", f"--resume={out}", flags=())
    launched("--processes=2", "--mesh=data=2,model=1", f"--resume={again}")
    want = trained_alone(SMALL)
    for folder in (out, again):
        assert json.loads((folder / "summary.json").read_text())["went_on_after_step"]
        with np.load(folder / "params.npz") as got:
            for name in ("w", "b"):
                np.testing.assert_allclose(got[name], getattr(want, name), atol=1e-6)


def test_told_to_stop_by_a_terminal_all_processes_end_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "experiments.scaling", "--processes", "2"]
    command += ["--epochs", "100000", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    ) as run:
        processes = re.findall(r"pid (\d+)", run.stdout.readline())
        while not run.stdout.readline().startswith("epoch"):
            assert run.poll() is None
        os.killpg(run.pid, signal.SIGINT)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert len(error.splitlines()) == 1
    assert f"--resume {tmp_path / 'run'}" in error
    assert len(processes) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (["sleep 60", "exit 3"], "Process 1 of 2 failed with exit code 3"),
        (["sleep 60", "kill -9 $$"], r"Process 1 of 2 was killed \(SIGKILL\)"),
        (["kill -6 $$", "kill -9 $$"], r"Process 1 of 2 was killed \(SIGKILL\)"),
    ],
)
def test_the_process_to_blame_is_named(ends, message):
    """Of several that are gone, the one that was killed from outside."""
    workers = [subprocess.Popen(["sh", "-c", end]) for end in ends]
    try:
        for worker, end in zip(workers, ends, strict=True):
            if end != "sleep 60":
                worker.wait()
        with pytest.raises(Failed, match=message):
            scaling._watch(workers, replace(SMALL, processes=2))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_overhead_is_a_ratio_of_steps(tmp_path, monkeypatch, capsys):
    """The fastest: 30 ms / 10 ms; the median of the rounds' medians: 2 times."""
    times = {
        1: 6 * [[0.01, 0.02, 0.03]],
        2: [[0.03, m, 0.2] for m in (0.03, 0.03, 0.04, 0.04, 0.1, 0.1)],
    }

    def step_seconds(settings, mesh, processes, devices):
        assert processes * devices == 2
        return times[processes].pop(0)

    monkeypatch.setattr(scaling_overhead, "_step_seconds", step_seconds)
    flags = ["--rounds", "3", "--out", str(tmp_path)]
    main(scaling_overhead.run, scaling_overhead.Overhead, flags, program="overhead")
    found = json.loads((tmp_path / "overhead.json").read_text())
    for mesh in ("data=2,model=1", "data=1,model=2"):
        assert found["meshes"][mesh]["overhead"] == pytest.approx(3)
    assert found["environment"]["jax"]
    assert capsys.readouterr().out.count("2.00 (1.50 to 5.00)") == 2
    with pytest.raises(BadInput, match="--batch-size must be at least 2, got 1"):
        scaling_overhead.run(scaling_overhead.Overhead(batch_size=1, out=tmp_path))


def test_four_chips_by_the_compiler_for_tpus():
    """A small shape: half the memory of the naive loss, and nothing more travels."""
    pytest.importorskip("libtpu")
    shape = scaling_pod.Shape(512, 512, 32768)
    row = scaling_pod.measured(4, shape)
    assert row["ours"]["temp_bytes"] <= row["naive"]["temp_bytes"] / 2
    assert row["ours"]["collective_bytes"] <= 1.2 * row["least_bytes"]
    assert set(row["ours"]["collectives"]) == {"all-reduce", "all-gather"}
    three_numbers = 3 * 4 * shape.rows * row["mesh"]["model"]
    assert row["ours"]["collectives"]["all-gather"] <= three_numbers


@pytest.mark.parametrize(("chips", "shown"), [((16, 64), []), ((4, 16), [1.0, 1.0])])
def test_a_picture_shows_efficiency_from_four_chips_or_none(
    chips, shown, tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(
        scaling_pod, "save_figure", lambda path, figure: figures.append(figure)
    )
    rows = []
    for n in chips:
        side = math.isqrt(n)
        figure = {"temp_bytes": 0, "seconds": 1 / side}
        mesh = {"data": side, "model": side}
        rows.append({"chips": n, "mesh": mesh, "ours": figure, "naive": figure})
    scaling_pod.draw(rows, tmp_path / "pod.png")
    assert figures[0].axes[1].lines[0].get_ydata().tolist() == shown


def test_traffic_is_read_from_the_program():
    program = (
        "  %a = f32[2,1024]{1,0} all-reduce(f32[2,1024]{1,0} %x), channel_id=1\n"
        "  %b = (bf16[8]{0}, f32[4]{0}) all-reduce-start(bf16[8]{0} %y, f32[4]{0} %z)\n"
        "  %c = f32[3]{0} add(f32[3]{0} %u, f32[3]{0} %v)\n"
    )
    assert scaling_pod.traffic(program) == {"all-reduce": 2 * 1024 * 4 + 16 + 16}
