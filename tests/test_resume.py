"""Never losing a run: killed, stopped, starved of disk or tampered with, it goes on.

RESUME_KILLS=20 makes the test that kills at random moments a long one.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from experiments import fashion_mnist, learned, pictures, run_folder
from experiments.checkpoint import Checkpoints
from experiments.command import BadInput, Failed
from jax_softmax import Progress, SoftmaxRegression, fit

JOB = [sys.executable, "-W", "error", "-m", "experiments.fashion_mnist"]
RUN = ["--dataset", "digits", "--optimizer", "adam", "--checkpoint-every", "4"]
DRAW = learned.draw
FACTS = {"settings": {"seed": 0}, "fingerprint": "f", "shuffle": [0, 1]}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(learned, "draw", lambda *_: None)


@contextlib.contextmanager
def running(*arguments):
    """A training process, which does not outlive the test."""
    process = subprocess.Popen(
        [*JOB, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def epochs_done(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_epochs(folder, epochs, process):
    while epochs_done(folder) < epochs:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def command(*arguments):
    fashion_mnist.command_line([str(argument) for argument in arguments])


def refused(capsys, *arguments, code=2):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def outcome(folder):
    """Parameters, and metrics but for the time they took."""
    with np.load(folder / "params.npz") as params:
        params = {name: params[name] for name in params}
    rows = run_folder.metrics(folder)
    return params, [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_outcome(a, b):
    (params_a, rows_a), (params_b, rows_b) = outcome(a), outcome(b)
    assert rows_a == rows_b
    assert [row["epoch"] for row in rows_a] == list(range(1, len(rows_a) + 1))
    for name in params_a:
        assert (params_a[name] == params_b[name]).all()


def begin_or_go_on(folder):
    """A run killed before its first file was there has nothing to resume."""
    begun = (folder / "config.json").exists()
    return ["--resume" if begun else "--out", folder]


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path):
    kills = int(os.environ.get("RESUME_KILLS", "2"))
    moment = random.Random(time.time_ns())
    epochs = 8 * kills
    run = [*RUN, "--epochs", epochs]
    command(*run, "--out", tmp_path / "whole")
    killed = tmp_path / "killed"
    for _ in range(kills):
        how = moment.choice(["--stream", "--no-stream"])  # the bits are the same
        target = min(epochs_done(killed) + 1, epochs)
        with running(*run, how, *begin_or_go_on(killed)) as process:
            if moment.random() < 0.8:
                wait_for_epochs(killed, target, process)
            time.sleep(moment.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
    command(*run, *begin_or_go_on(killed))
    assert_same_outcome(tmp_path / "whole", killed)


def left_by_kills(patch, out, *arguments):
    """The command's folder as kills leave it: one after each write, one where the
    checkpoint that is being written is not there, one where a line is torn."""
    left, being_written = [], []

    def leave(spoil=lambda _: None):
        kill = out.with_name(f"{out.name}-{len(left)}")
        left.append(shutil.copytree(out, kill))
        spoil(kill)

    def lose_what_is_being_written(kill):
        shutil.rmtree(kill / "checkpoints" / being_written[0])

    def tear_the_last_line(kill):
        metrics = kill / "metrics.jsonl"
        metrics.write_text(metrics.read_text()[:-20])

    def after(home, name):
        write = getattr(home, name)

        def written(self, *given, **named):
            result = write(self, *given, **named)
            if home is Checkpoints:
                self._orbax.wait_until_finished()
                being_written[:] = [self._pending.name] if self._pending else []
            leave()
            if being_written:
                leave(lose_what_is_being_written)
            if name == "add_metrics":
                leave(tear_the_last_line)
            return result

        patch.setattr(home, name, written)

    for name in ("create", "save", "add_metrics", "keep_metrics"):
        after(run_folder, name)
    for name in ("save", "finish", "set_aside"):
        after(Checkpoints, name)
    command(*arguments)
    return left


def test_killed_after_any_write_it_ends_as_if_undisturbed(tmp_path, monkeypatch):
    whole, again = tmp_path / "whole", tmp_path / "again"
    with monkeypatch.context() as patch:
        left = left_by_kills(patch, whole, *RUN, "--epochs", 2, "--out", whole)
    behind = [kill for kill in left if epochs_done(kill) == 2]
    shutil.copytree(behind[1], again)
    with monkeypatch.context() as patch:
        left += left_by_kills(patch, again, "--resume", again)
    for kill in left:
        command("--resume", kill)
        assert_same_outcome(whole, kill)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_told_to_stop_it_saves_and_another_waits_its_turn(
    tmp_path, capsys, number, code
):
    out = tmp_path / "run"
    with running(*RUN, "--epochs", 100_000, "--out", out) as process:
        wait_for_epochs(out, 2, process)
        assert "Another run is writing" in refused(capsys, "--resume", out)
        told = time.monotonic()
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
        assert time.monotonic() - told < 5
        assert process.returncode == code
    assert f"Go on with --resume {out}" in error
    assert len(error.splitlines()) == 1
    newest = max((out / "checkpoints").iterdir())
    rows = run_folder.metrics(out)
    assert int(newest.name) >= 6 * len(rows)
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    with np.load(out / "params.npz") as params:
        assert params["w"].shape == (64, 10)


def ready_to_stop(process):
    """Whether it has a handler for SIGTERM, and so for both signals."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_while_all_is_imported(tmp_path, number):
    with running(*RUN, "--out", tmp_path / "run") as process:
        while not ready_to_stop(process):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (128 + number, "Interrupted.\n")
    assert not (tmp_path / "run").exists()


def test_told_to_stop_while_pictures_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learned, "draw", DRAW)
    told = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(pictures, "curves", told)
    job = ["--dataset", "digits", "--epochs", 1, "--out", tmp_path / "run"]
    error = refused(capsys, *job, code=130)
    assert "the model is trained, and kept in" in error
    assert f"--resume {tmp_path / 'run'} draws the rest" in error
    assert not list((tmp_path / "run").glob("*.png"))


@pytest.fixture
def tiny_disk(tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mounted)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("this user cannot mount a tmpfs")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def fill(file):
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(256))


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tiny_disk):
    out = tiny_disk / "run"
    with running(*RUN, "--epochs", 100_000, "--out", out) as process:
        wait_for_epochs(out, 2, process)
        fill(tiny_disk / "fill")
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "No space left" in error
    assert "make room there" in error
    assert "Traceback" not in error
    rows = run_folder.metrics(out)
    (tiny_disk / "fill").unlink()
    with running("--resume", out) as process:
        wait_for_epochs(out, len(rows) + 1, process)


def progress(optimizer=None):
    model = SoftmaxRegression.init(jax.random.key(0), 4, 3)
    start = Progress.start(model, optimizer or optax.adam(0.1))
    return start._replace(losses=np.float32([1.5, 1.25]))


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, after 2 and 4 steps."""
    kept = Checkpoints(tmp_path, FACTS, 2)
    kept.save(progress())
    kept.save(progress()._replace(epoch=2))
    kept.finish()
    return kept


def test_a_checkpoint_is_what_was_saved(saved):
    found = saved.newest(progress())
    assert (found.name, found.progress.epoch, found.passed_over) == ("000000004", 2, [])
    for a, b in zip(
        jax.tree.leaves(found.progress),
        jax.tree.leaves(progress()._replace(epoch=2)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, strict=True)


def test_only_the_newest_are_kept(saved):
    saved.save(progress()._replace(epoch=3))
    saved.finish()
    names = sorted(path.name for path in saved.folder.iterdir())
    assert names == ["000000004", "000000006"]


def tear(path):
    for file in path.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(path):
    file = path / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))


def forget(path):
    (path / "_CHECKPOINT_METADATA").unlink()


def change_facts(**facts):
    def change(path):
        file = path / "_CHECKPOINT_METADATA"
        content = json.loads(file.read_text())
        content["custom_metadata"] |= facts
        file.write_text(json.dumps(content))

    return change


DAMAGES = [
    (tear, "is torn"),
    (flip_a_bit, "is torn"),
    (forget, "is torn"),
    (change_facts(epoch=9), "it is that of 18 steps"),
    (change_facts(epoch="2"), "is torn"),
    (change_facts(leaves=None), "is torn"),
    (change_facts(leaves={"model.w": ["flobt32", 4, 3]}), "is torn"),
    (change_facts(format="1"), "is torn"),
    (change_facts(sha256=None), "is torn"),
    (change_facts(kind="a CNN"), "by another program"),
    (change_facts(format=99), "newer version of this program"),
    (change_facts(settings={"seed": 1}), "with other settings"),
    (change_facts(fingerprint="g"), "with another data set"),
    (change_facts(shuffle=[1, 0]), "another order of the rows"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_the_newest_usable_checkpoint_is_used_and_said_so(saved, damage, sentence):
    damage(saved.folder / "000000004")
    found = saved.newest(progress())
    assert found.name == "000000002"
    (said,) = found.passed_over
    assert said.startswith("Checkpoint 000000004 ")
    assert sentence in said
    saved.set_aside(newer_than=found.name)
    names = sorted(path.name for path in saved.folder.iterdir())
    assert names == ["000000002", "000000004.torn"]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_without_a_usable_checkpoint_nothing_is_changed(saved, damage, sentence):
    for path in saved.folder.iterdir():
        damage(path)
    before = sorted(saved.folder.rglob("*"))
    with pytest.raises(BadInput, match=sentence):
        saved.newest(progress())
    assert sorted(saved.folder.rglob("*")) == before


def test_a_checkpoint_of_another_optimizer(saved):
    with pytest.raises(BadInput, match="another model or optimizer"):
        saved.newest(progress(optax.sgd(0.1, momentum=0.9)))


def test_a_checkpoint_that_cannot_be_written(saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved._orbax, "save", full)
    with pytest.raises(Failed, match=r"No space left.*checkpoint 000000004 is whole"):
        saved.save(progress()._replace(epoch=3))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = fashion_mnist.Train(
        dataset="digits", epochs=2, out=out, tensorboard=True
    )
    fashion_mnist.train(settings)
    return out


def test_flags_that_contradict_the_run(short_run, capsys):
    resume = ["--resume", short_run]
    error = refused(capsys, *resume, "--learning-rate", "0.2")
    assert "has --learning-rate 0.1, not 0.2: leave the flag out" in error
    assert "has --dataset digits" in refused(capsys, *resume, "--dataset", "mnist")
    assert "leave --out out" in refused(capsys, *resume, "--out", "elsewhere")


def test_a_finished_run_is_finished(short_run, capsys):
    before = (short_run / "metrics.jsonl").read_text()
    command("--resume", short_run, "--learning-rate", "0.1")
    assert "epochs done: 2, and 0 of 6 steps" in capsys.readouterr().out
    assert (short_run / "metrics.jsonl").read_text() == before


@pytest.fixture
def copied(short_run, tmp_path):
    """A run that has done its two epochs, to be spoilt."""
    return shutil.copytree(short_run, tmp_path / "copied")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-9],
        lambda text: "garbage\n" + text,
        lambda text: text.splitlines(keepends=True)[0],
        lambda text: text.replace('"epoch": 2', '"epoch": 3'),
        lambda text: text.replace('"train_loss"', '"loss"'),
    ],
)
def test_metrics_of_epochs_done_that_are_damaged(copied, capsys, spoil):
    metrics = copied / "metrics.jsonl"
    spoilt = spoil(metrics.read_text())
    metrics.write_text(spoilt)
    error = refused(capsys, "--resume", copied)
    assert "does not hold a line for each of the 2 epochs done" in error
    assert metrics.read_text() == spoilt


def test_metrics_of_later_epochs_only_are_no_damage(tmp_path):
    """As of a run whose metrics were moved away, killed after its next epoch."""
    figures = dict.fromkeys((*run_folder.FIGURES, "seconds"), 0.5)
    run_folder.add_metrics(tmp_path, {"epoch": 3, **figures})
    run_folder.check_metrics(tmp_path, 2)
    assert run_folder.keep_metrics(tmp_path, 2) == []


def test_the_remedy_for_damaged_metrics(tmp_path, capsys):
    """Moved away, they begin with a later epoch, and so a resume takes them."""
    out, epochs = tmp_path / "run", []
    for told in (2, 4, None):
        with running(*RUN, "--epochs", 6, *begin_or_go_on(out)) as process:
            if told:
                wait_for_epochs(out, 2, process)
                process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert (process.returncode, bool(error)) == (
            (130, True) if told else (0, False)
        )
        epochs += [[row["epoch"] for row in run_folder.metrics(out)]]
        if told == 2:
            (out / "metrics.jsonl").unlink()
    assert epochs[2][-1] == 6
    assert epochs[2] == [*range(epochs[0][-1] + 1, 7)]


def test_a_finished_run_without_checkpoints_is_not_begun_again(copied, capsys):
    shutil.rmtree(copied / "checkpoints")
    before = {p: p.read_bytes() for p in copied.iterdir() if p.is_file()}
    error = refused(capsys, "--resume", copied)
    assert "has done 2 epochs, but has no checkpoint to go on from" in error
    assert {p: p.read_bytes() for p in copied.iterdir() if p.is_file()} == before


def test_a_run_does_not_write_over_what_is_there(copied, capsys):
    (copied / "config.json").unlink()
    for file in ("calibration.json", "curves.png", "params.npz"):
        error = refused(capsys, "--dataset", "digits", "--out", copied)
        assert "is there already, and a run would write over it: choose" in error
        (copied / file).unlink(missing_ok=True)


def test_what_is_no_file_of_a_run_is_not_in_its_way(tmp_path, capsys):
    (tmp_path / "log.txt").touch()
    (tmp_path / ".config.json.123").touch()  # of one that was killed
    command("--dataset", "digits", "--epochs", 0, "--out", tmp_path)
    command("--resume", tmp_path)  # of no epoch there is no checkpoint
    assert "log.txt" not in capsys.readouterr().out


def test_tensorboard_events(short_run):
    events = min((short_run / "tensorboard").iterdir())
    assert events.read_bytes().count(b"validation_accuracy") >= 2


def test_folders_that_cannot_be_resumed(short_run, capsys, tmp_path):
    assert "There is no run folder" in refused(capsys, "--resume", tmp_path / "none")
    assert "holds no run" in refused(capsys, "--resume", tmp_path)
    config = json.loads((short_run / "config.json").read_text())
    for change, sentence in (
        ({"kind": "a CNN"}, "of another model"),
        ({"settings": config["settings"] | {"depth": 3}}, "does not know (depth)"),
        ({"fingerprint": "0"}, "was started with another data set"),
        ({"settings": None}, "settings is missing or no dict"),
        ({"class_names": None}, "class_names is missing or no list"),
        ({"class_names": [0, 1]}, "class_names holds what is no str"),
        (
            {"settings": config["settings"] | {"epochs": "ten"}},
            "epochs is of type str",
        ),
        ({"settings": config["settings"] | {"mesh": 4}}, "mesh is of type int"),
        ({"settings": config["settings"] | {"optimizer": "x"}}, "not know (x)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert sentence in refused(capsys, "--resume", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is damaged" in refused(capsys, "--resume", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("batch_size", [5, 20, 50])
def test_fit_goes_on_from_any_moment_to_the_same_bits(batch_size):
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(23, 4)).astype(np.float32)
    labels = numbers.integers(0, 3, 23)
    model = SoftmaxRegression.init(jax.random.key(0), 4, 3)
    moments = []
    arguments = {
        "optimizer": optax.adam(0.1),
        "key": jax.random.key(1),
        "epochs": 3,
        "batch_size": batch_size,
        "watch_every": 2,
    }
    whole = list(fit(model, x, labels, **arguments, watch=moments.append))
    moments += [epoch.progress for epoch in whole]
    for moment in moments:
        rest = list(fit(model, x, labels, **arguments, progress=moment))
        ends = rest[-1] if rest else whole[-1]
        assert (ends.model.w == whole[-1].model.w).all()
        assert ends.train_loss == whole[-1].train_loss
        if rest:
            jax.tree.map(
                np.testing.assert_array_equal, ends.progress, whole[-1].progress
            )


def test_what_ended_with_an_epoch_goes_on_in_the_next_whatever_the_batch_size():
    x, labels = np.eye(12, dtype=np.float32), np.arange(12) % 3
    model = SoftmaxRegression.init(jax.random.key(0), 12, 3)
    arguments = {"optimizer": optax.sgd(0.1), "key": jax.random.key(1), "epochs": 2}
    first = next(fit(model, x, labels, **arguments, batch_size=4))
    (second,) = fit(
        model, x, labels, **arguments, batch_size=2, progress=first.progress
    )
    assert second.number == 2
    as_it_once_was = first.progress._replace(epoch=1, losses=np.ones(3, np.float32))
    again, whole = (
        list(fit(model, x, labels, **arguments, batch_size=4, progress=progress))
        for progress in (as_it_once_was, first.progress)
    )
    jax.tree.map(np.testing.assert_array_equal, again, whole)
