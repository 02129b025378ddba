"""The main job on a mesh: the numbers of one device, and nothing large that travels."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_sharding import collectives

from experiments import fashion_mnist, learned, mesh, run_folder
from experiments.images import pixels
from jax_softmax import Progress, SoftmaxRegression, _fit

JOB = ["--dataset", "digits", "--epochs", "2", "--batch-size", "128"]
JOB += ["--optimizer", "momentum"]


@pytest.fixture(autouse=True, scope="module")
def only_training():
    assert len(jax.devices()) == 4  # now, before a mesh asks for others
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw", "gradient_gap"):
            patch.setattr(learned, name, lambda *_: "")
        yield


def trained(out, *arguments):
    fashion_mnist.command_line([*JOB, *arguments, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    flags = ["--mesh", "data=2,model=2", "--checkpoint-every", "7"]
    return trained(tmp_path_factory.mktemp("runs") / "four", *flags)


def assert_same(out, want):
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-6),
        run_folder.load(out).model,
        run_folder.load(want).model,
    )
    for row, other in zip(*map(run_folder.metrics, (out, want)), strict=True):
        assert row["validation_accuracy"] == other["validation_accuracy"]
        for name in ("train_loss", "validation_loss"):
            assert abs(row[name] - other[name]) < 1e-6


def test_the_numbers_of_one_device(on_one, on_four):
    assert_same(on_four, on_one)
    config = json.loads((on_four / "config.json").read_text())
    assert config["settings"]["mesh"] == "data=2,model=2"


def test_rows_that_do_not_divide(on_one, tmp_path):
    """A batch of 128, and the last one of 30, on three data shards."""
    assert_same(trained(tmp_path / "run", "--mesh", "model=1,data=3"), on_one)


def test_goes_on_on_another_mesh(on_one, on_four, tmp_path, capsys):
    """From within the second epoch, now with 10 classes on four model shards."""
    out = tmp_path / "run"
    shutil.copytree(on_four, out)
    shutil.rmtree(max((out / "checkpoints").iterdir()))
    fashion_mnist.command_line(["--resume", str(out), "--mesh", "data=1,model=4"])
    assert "epochs done: 1, and 7 of 12 steps" in capsys.readouterr().out
    assert_same(out, on_one)


def test_rows_and_classes_stay_where_they_are():
    """The compiler puts rows on data shards, and gathers neither them nor w."""
    model = SoftmaxRegression.init(jax.random.key(0), 784, 10)
    optimizer = optax.sgd(0.1, momentum=0.9)
    spread = mesh.Spread(mesh.mesh_of((2, 2)), 10)
    progress = spread.put(Progress.start(model, optimizer))
    lowered = _fit._train.lower(
        _fit._State(*progress[:3]),
        np.zeros((4, 64, 784), np.uint8),
        np.zeros((4, 64), np.int32),
        4,
        optimizer=optimizer,
        objective=spread.objective,
        transform=spread.rows(pixels),
    )
    program = lowered.compile()
    state, x, labels, _ = program.input_shardings[0]
    assert state.model.w.spec == P(None, "model")
    assert state.opt_state[0].trace.w.spec == P(None, "model")
    assert x.spec == labels.spec == P(None, "data")
    sent = collectives(program)
    assert {kind for kind, _ in sent} <= {"all-reduce", "collective-permute"}
    parts = 785 * 5 + 1  # of the gradient, the sum over data shards; and the loss
    assert sum(size for _, size in sent) <= parts + 32 * 20


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("data=0,model=1", "--mesh must be like data=2,model=2"),
        ("data=2,data=2", "got data=2,data=2"),
        ("data=2,tensor=2", "got data=2,tensor=2"),
        ("data=2", "got data=2."),
        ("", "--mesh is empty"),
        ("data=5,model=1", "needs 5 devices, and there are 4, of kind cpu"),
        ("data=999999999,model=999999999", "a processor plays 256 at most"),
    ],
)
def test_bad_meshes(capsys, tmp_path, flag, sentence):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        trained(out, "--mesh", flag)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_processor_plays_the_devices():
    code = "from experiments.mesh import mesh_of; print(mesh_of((3, 2)).devices.shape)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "(3, 2)\n", done.stderr
