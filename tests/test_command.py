"""What every experiment says of bad flags and folders, before it makes any file."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from experiments import benchmark, benchmark_job, files, report
from experiments.catalog import DataError
from experiments.command import BadInput, main

SETTINGS = {
    "fashion_mnist": "Train",
    "scaling": "Scaling",
    "scaling_pod": "Pod",
    "scaling_overhead": "Overhead",
}
FOLDERS = {
    "benchmark_chips": "chips",
    "benchmark_dense": "dense",
    "benchmark_job": "job",
    "benchmark_linear": "linear",
    "benchmark_train": "train",
    "decisions": "decisions",
    "gradients": "gradients",
    "scaling_overhead": "scaling",
    "scaling_pod": "scaling",
    "solvers": "solvers",
    "stability": "stability",
    "sweep": "sweep",
    "vocabulary": "vocabulary",
}
BAD_FLAGS = {
    "benchmark_dense": ["--seconds 0", "--seconds nan"],
    "benchmark_job": ["--rounds 0"],
    "benchmark_linear": ["--seconds inf", "--gigabytes 0", "--shapes 1x1x1"],
    "benchmark_train": ["--seconds -1"],
    "decisions": ["--splits 0", "--times inf", "--seed 4294967296"],
    "scaling": ["--rows 0", "--seed -1"],
    "scaling_overhead": ["--rounds 0", "--batch-size 1", "--steps 1"],
    "scaling_pod": ["--chips 2"],
    "solvers": ["--limit 0", "--limit nan", "--ours sgd"],
    "sweep": [
        *("--rates 0", "--seeds 0", "--epochs 0", "--rounds 0", "--batch-sizes 0"),
        *("--lowest -1", "--lowest 4", "--highest inf"),
    ],
    "vocabulary": [
        *("--steps 0", "--steps -1", "--classes 0", "--classes 1", "--features 0"),
        *("--context 0", "--batch 0", "--rate nan", "--rate 0", "--rate inf"),
        *("--rate 1e39", "--rate -1", "--seed -1"),
    ],
}


def settings_of(name):
    experiment = import_module(f"experiments.{name}")
    return experiment, getattr(experiment, SETTINGS.get(name, "Settings"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, words) for name, many in BAD_FLAGS.items() for words in many],
)
def test_a_bad_flag_is_one_sentence_and_nothing_is_made(name, words, tmp_path, capsys):
    flag, got = words.split()
    error = refused(capsys, name, flag, got)
    assert error.startswith(flag)
    assert got.replace("e39", "e+39") in error.removeprefix(flag)
    assert list(tmp_path.iterdir()) == []


def refused(capsys, name, *arguments):
    """The one sentence that an experiment ends with."""
    experiment, settings = settings_of(name)
    run = getattr(experiment, "train" if name == "fashion_mnist" else "run")
    with pytest.raises(SystemExit) as stop:
        main(run, settings, arguments, program=name)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("solvers", "--peers=scikit-learn_saga,_float64", "it sets the goals"),
        ("solvers", "--dataset nothing", "nothing"),
        ("sweep", "--lowest 2 --highest 1", "no higher than --highest, 1, got 2"),
        ("sweep", "--quick --epochs 0", "--epochs must be at least 1, got 0"),
        ("sweep", "--quick --batch-sizes 10", "--quick has --batch-sizes of its own"),
        ("solvers", "--quick --limit 30", "leave --limit out, or --quick."),
        ("vocabulary", "--quick --classes 500", "--quick has --classes of its own"),
        ("decisions", "--quick --splits 7", "--quick has --splits of its own"),
        ("scaling_overhead", "--quick --steps 7", "--quick has --steps of its own"),
        ("benchmark_dense", "--quick --seconds 2", "--quick has --seconds of its own"),
        ("benchmark_train", "--quick --seconds 2", "--quick has --seconds of its own"),
        ("benchmark_job", "--quick --rounds 2", "--quick has --rounds of its own"),
        ("benchmark_linear", "--quick --shapes growth", "--quick has --shapes of its"),
        ("benchmark_linear", "--shapes", "must be some of 2048x512x32768, "),
        ("fashion_mnist", "--quick --epochs 5", "--quick has --epochs of its own"),
        ("sweep", "--batch-sizes", "numbers of at least 1, got none."),
        ("fashion_mnist", "--learning-rate 1e-50", "float32 number above 0, got 1e-50"),
        ("gradients", "--ulp 8", "--function is missing"),
        ("gradients", "--argnums 1", "--function is missing"),
    ],
)
def test_flags_that_say_nothing_together(name, words, sentence, tmp_path, capsys):
    arguments = [word.replace("_", " ") for word in words.split()]
    assert sentence in refused(capsys, name, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["benchmark_job", "benchmark_train", "gradients", "solvers", "sweep"]
)
def test_no_folder_is_made_for_a_data_set_that_there_is_not(name, tmp_path):
    experiment, settings = settings_of(name)
    with pytest.raises(DataError, match="no data set 'fashion'"):
        experiment.run(settings(dataset="fashion"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(
    name, tmp_path
):
    a_file = tmp_path / "file"
    a_file.touch()
    experiment, settings = settings_of(name)
    for out in (a_file, a_file / "results"):
        with pytest.raises(BadInput, match=r"file is a file, not a folder\).*--out"):
            experiment.run(settings(out=out))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_of_a_run_is_left_alone(name, tmp_path):
    (tmp_path / "config.json").touch()
    experiment, settings = settings_of(name)
    with pytest.raises(BadInput, match=r"holds a run.*choose another --out"):
        experiment.run(settings(out=tmp_path))


def test_what_was_measured_before_is_damaged(tmp_path):
    experiment, settings = settings_of("benchmark_linear")
    cut = {"shape": "growth", "classes": 1, "peers": [], "dtype": "float32"}
    texts = '{"rows": [', '{"rows": [1]}', "{}", "[]", json.dumps({"rows": [cut]})
    for text in texts:
        (tmp_path / "linear.json").write_text(text)
        with pytest.raises(BadInput, match=r"linear.json is damaged .*: restore"):
            experiment.run(settings(out=tmp_path))
        assert (tmp_path / "linear.json").read_text() == text


@pytest.mark.parametrize("disturbed", ["write_text", "replace"])
def test_a_file_stays_as_it_was_until_the_new_one_is_whole(
    tmp_path, monkeypatch, disturbed
):
    path = tmp_path / "results.json"
    files.save_json(path, [1])
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, disturbed, full)
    with pytest.raises(OSError, match="No space left on device") as error:
        files.save_json(path, [2])
    assert error.value.filename == str(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_saved_is_json():
    found = {"lost": np.float32("nan"), "far": [np.inf, np.array([1, -np.inf])]}
    saved = json.loads(report.to_json(found), parse_constant=pytest.fail)
    assert saved == {"lost": "nan", "far": ["inf", [1, "-inf"]]}


@pytest.mark.parametrize("say", ["print", "report.say"])
def test_a_reader_that_leaves_is_one_sentence(say):
    code = (
        "from experiments import report\n"
        "from experiments.command import main\n"
        f"main(lambda _: {say}('x' * 9**6), int, ['1'], program='x')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        run.stdout.close()
        said = run.stderr.read().decode()
    assert run.returncode == 1
    assert said.startswith("Stopped: nobody reads the output")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_is_without_a_word(number):
    code = (
        "import time\n"
        "from experiments.command import main\n"
        "main(lambda _: None, int, ['1'], program='x')\n"
        "print('done', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout.readline() == b"done\n"
        run.send_signal(number)
        assert run.wait(30) == 128 + number
        assert run.stderr.read() == b""


def test_a_benchmark_that_is_told_to_stop_leaves_no_process_behind(
    tmp_path, monkeypatch
):
    pids = []

    def told(pid, _):
        pids.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.wait4", told)
    with pytest.raises(KeyboardInterrupt):
        benchmark_job._process(["-c", "import time; time.sleep(60)"], tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(*pids, 0)


def test_too_little_memory_is_one_sentence(capsys):
    def run(_):
        jnp.zeros(10**15)

    with pytest.raises(SystemExit, match="1"):
        main(run, int, ["1"], program="x")
    said = capsys.readouterr().err
    assert said.startswith("Stopped for want of memory (RESOURCE_EXHAUSTED: Out of")
    assert said.endswith("give smaller sizes.\n")
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        main(_broken, int, ["1"], program="x")


def _broken(_):
    raise JaxRuntimeError("INTERNAL: of another kind")


def test_a_full_disk_is_one_sentence(capsys):
    def run(_):
        raise OSError(28, "No space left on device", "results.json")

    with pytest.raises(SystemExit) as stop:
        main(run, int, ["1"], program="x")
    assert stop.value.code == 1
    said = "Stopped: results.json cannot be used (No space left on device). Look at"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_quick_check_leaves_the_quoted_results_alone(name, tmp_path):
    for place in ("runs", "experiments"):
        (tmp_path / place).touch()  # so that each run ends at its folder
    experiment, settings = settings_of(name)
    for quick, out in (
        (False, f"experiments/results/{FOLDERS[name]} "),
        (True, f"runs/{FOLDERS[name]}-quick "),
    ):
        with pytest.raises(BadInput, match=f"output folder {out}"):
            experiment.run(settings(quick=quick))


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    experiment, settings = settings_of("stability")
    with pytest.raises(BadInput, match=r"cannot be written \(.* may not be written\)"):
        experiment.run(settings(out=tmp_path / "results"))


@pytest.mark.parametrize("arguments", [["--out", ""], ["--out="], ["--quick", ""]])
def test_an_empty_argument_is_refused(arguments, capsys):
    experiment, settings = settings_of("stability")
    with pytest.raises(SystemExit, match="2"):
        main(experiment.run, settings, arguments, program="stability")
    assert f"{arguments[0].rstrip('=')} is empty: give it" in capsys.readouterr().err


def test_help_of_the_benchmarks(capsys):
    benchmark.command_line(["--help"])
    printed = capsys.readouterr().out
    for name in benchmark.BENCHMARKS:
        assert f"python -m experiments.benchmark {name} " in printed
        with pytest.raises(SystemExit, match="0"):
            benchmark.command_line([name, "--help"])
        assert "--quick" in capsys.readouterr().out
    for words in ([], ["fast"]):
        with pytest.raises(SystemExit, match="2"):
            benchmark.command_line(words)
        assert (
            "Name a benchmark: dense, linear, chips, train, job"
            in capsys.readouterr().err
        )
