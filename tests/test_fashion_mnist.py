"""The main job: what it prints, writes and refuses; on real images where they are."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import data, fashion_mnist, learned, run_folder

JOB = ["-m", "experiments.fashion_mnist"]
DIGITS = ["--dataset", "digits", "--epochs", "3"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """One run as a user starts it, warnings being errors."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = subprocess.run(
        [sys.executable, "-W", "error", *JOB, *DIGITS, "--out", str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def refused(capsys, *arguments, code=2):
    """The one sentence that a bad command ends with."""
    with pytest.raises(SystemExit) as stop:
        fashion_mnist.command_line([str(argument) for argument in arguments])
    assert stop.value.code == code
    return capsys.readouterr().err


def test_prints_the_story_in_order(digits_run):
    _, printed = digits_run
    starts = ["Data: digits", "Settings: sgd", "epoch  1", "epoch  2", "epoch  3"]
    starts += ["Final: epoch  3", "Gradient of one batch", "Calibration: ECE"]
    starts += ["Time:", "Files:"]
    places = [printed.index(start) for start in starts]
    assert places == sorted(places)


def test_writes_config_metrics_params_and_pictures(digits_run):
    folder, printed = digits_run
    names = {path.name for path in folder.iterdir() if path.is_file()}
    pictures = {f"{name}.png" for name in ("curves", "misclassified", "weights")}
    assert names == pictures | {
        *("confusion.png", "config.json", "metrics.jsonl", "params.npz"),
        "times.json",
        *("reliability.png", "calibration.json"),
    }
    assert all(str(folder / name) in printed for name in names)
    rows = run_folder.metrics(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["validation_accuracy"] > 0.7
    assert json.loads((folder / "config.json").read_text())["settings"]["seed"] == 0
    for name in names:
        if name.endswith(".png"):
            with Image.open(folder / name) as picture:
                assert min(picture.size) > 300
                assert np.asarray(picture).std() > 5


def test_times_add_up_to_the_life_of_the_process(digits_run):
    times = json.loads((digits_run[0] / "times.json").read_text())
    parts = dict(times["seconds"])
    assert sum(parts.values()) == pytest.approx(2 * parts["all"])
    assert min(parts.values()) >= 0
    assert parts["compilation"] > 0.1
    assert 0 < times["waited_for_rows"] < parts["all"]
    assert 50 < times["peak_megabytes"] < 5000


def test_says_how_well_calibrated_it_is(digits_run):
    folder, printed = digits_run
    found = json.loads((folder / "calibration.json").read_text())
    assert f"ECE {found['ece']:.4f}" in printed
    assert f"Brier score {found['brier']:.4f}" in printed
    assert f"temperature {found['temperature']:.3f}" in printed
    assert 0 < found["temperature"] < 1  # after three epochs it is not sure enough
    assert sum(found["bins"]["rows"]) == 359


def test_autodiff_and_closed_form_agree_on_the_batch(digits_run):
    _, printed = digits_run
    line = next(line for line in printed.splitlines() if line.startswith("Gradient"))
    difference = float(line.split("differ by ")[1].split()[0])
    assert 0 <= difference < 1e-6


def test_predicts_test_images(digits_run, capsys):
    folder, _ = digits_run
    fashion_mnist.command_line(["predict", "--run", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all("%" in line and ", then" in line for line in lines)


def test_predicts_png_files(digits_run, capsys, tmp_path):
    folder, _ = digits_run
    digits = data.load("digits")
    path = tmp_path / "three.png"
    Image.fromarray(digits.test_images[0]).save(path)
    fashion_mnist.command_line(["predict", "--run", str(folder), str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith(str(path))
    assert printed.count("%") == 2
    deep = tmp_path / "deep.png"
    Image.fromarray(digits.test_images[0].astype(np.uint16) * 257).save(deep)
    fashion_mnist.command_line(["predict", "--run", str(folder), str(deep)])
    assert capsys.readouterr().out == printed.replace(str(path), str(deep))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "fashion"], "no data set 'fashion': choose one of"),
        (["--data-dir", "nowhere/at/all"], "does not exist"),
        ([*DIGITS, "--data-dir", "."], "bundled with scikit-learn"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--epochs", "-1"], "--epochs must be at least 0, got -1"),
        (["--learning-rate", "0"], "finite float32 number above 0, got 0"),
        (["--learning-rate", "nan"], "finite float32 number above 0, got nan"),
        (["--learning-rate", "inf"], "finite float32 number above 0, got inf"),
        (["--learning-rate", "1e39"], "finite float32 number above 0, got 1e+39"),
        (["--learning-rate", "-1"], "finite float32 number above 0, got -1"),
        (["--seed", "-1"], "--seed must be in"),
        ([*DIGITS, "--epochs", "200000000"], "more than 999,999,999 steps: lower it"),
    ],
)
def test_bad_settings(capsys, arguments, sentence):
    error = refused(capsys, *arguments)
    assert sentence in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "flag", ["--epochs=two", "--optimizer=lbfgs", "--no-such-flag"]
)
def test_flags_that_do_not_parse(capsys, flag):
    assert flag.split("=")[0] in refused(capsys, flag)


def test_an_empty_data_folder(capsys, tmp_path):
    assert "is empty" in refused(capsys, "--data-dir", tmp_path)


def test_an_output_folder_is_refused_before_data_are_loaded(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "load", None)
    (tmp_path / "file").touch()
    error = refused(capsys, *DIGITS, "--out", tmp_path / "file" / "run")
    assert f"({tmp_path / 'file'} is a file, not a folder): choose another" in error
    for empty in (["--out", ""], ["--out="]):
        assert "--out is empty: give it a value" in refused(capsys, *DIGITS, *empty)


def test_a_run_is_never_overwritten(capsys, digits_run, monkeypatch):
    folder, _ = digits_run
    monkeypatch.setattr(data, "load", None)
    before = (folder / "metrics.jsonl").read_text()
    assert "already holds a run" in refused(capsys, *DIGITS, "--out", folder)
    assert (folder / "metrics.jsonl").read_text() == before


def test_run_folders_that_cannot_predict(capsys, digits_run, tmp_path):
    folder, _ = digits_run
    predict = ["predict", "--run"]
    assert "There is no run folder" in refused(capsys, *predict, tmp_path / "none")
    assert "no finished run" in refused(capsys, *predict, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "params.npz").write_bytes((folder / "params.npz").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": "a CNN"}))
    assert "of another model" in refused(capsys, *predict, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.savez(tmp_path / "params.npz", w=np.zeros((3, 10)), b=np.zeros(10))
    assert "of another model" in refused(capsys, *predict, tmp_path)
    np.savez(tmp_path / "params.npz", w=np.zeros((64, 10), int), b=np.zeros(10))
    assert "of another model" in refused(capsys, *predict, tmp_path)
    w = np.full((64, 10), np.nan)
    np.savez(tmp_path / "params.npz", w=w, b=np.zeros(10))
    assert "numbers that are not finite" in refused(capsys, *predict, tmp_path)
    encrypted = bytearray((folder / "params.npz").read_bytes())
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1  # says its entry of the directory
    for torn in (b"torn", encrypted):
        (tmp_path / "params.npz").write_bytes(torn)
        assert "is damaged" in refused(capsys, *predict, tmp_path)
    shutil.copy(folder / "params.npz", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"fingerprint": "0"}))
    assert "another data set" in refused(capsys, *predict, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is damaged" in refused(capsys, *predict, tmp_path)


def test_images_that_cannot_be_read(capsys, digits_run, tmp_path, monkeypatch):
    predict = ["predict", "--run", digits_run[0]]
    assert "cannot be read" in refused(capsys, *predict, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    assert "is not an image" in refused(capsys, *predict, tmp_path / "text.png")
    Image.new("L", (28, 28)).save(tmp_path / "large.png")
    error = refused(capsys, *predict, tmp_path / "large.png")
    assert "28 x 28 pixels" in error
    assert "8 x 8" in error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "cannot be read" in refused(capsys, *predict, tmp_path / "large.png")


def test_divergence_says_where_and_keeps_the_last_good_state(capsys, tmp_path):
    out = tmp_path / "run"
    error = refused(*(capsys, *DIGITS, "--learning-rate", "1e38", "--out", out), code=1)
    assert "at step" in error
    assert str(out / "params.npz") in error
    with np.load(out / "params.npz") as params:
        assert all(np.isfinite(params[name]).all() for name in params)


def real_images():
    if not data.available("fashion_mnist"):
        if os.environ.get("REQUIRE_REAL_DATA"):
            pytest.fail("Fashion-MNIST is not on this machine")
        pytest.skip("Fashion-MNIST is not on this machine")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_real_images_end_where_the_book_does(tmp_path, seed):
    real_images()
    fashion_mnist.train(fashion_mnist.Train(seed=seed, out=tmp_path / "run"))
    rows = run_folder.metrics(tmp_path / "run")
    assert len(rows) == 10
    assert 0.82 <= rows[-1]["validation_accuracy"] <= 0.845
    assert 0.42 <= rows[-1]["train_loss"] <= 0.48


def test_real_images_same_seed_same_metrics(tmp_path):
    real_images()
    runs = []
    for name in ("a", "b"):
        settings = fashion_mnist.Train(epochs=2, out=tmp_path / name)
        fashion_mnist.train(settings)
        rows = run_folder.metrics(tmp_path / name)
        runs.append([{**row, "seconds": None} for row in rows])
    assert runs[0] == runs[1]
    assert (tmp_path / "a/params.npz").read_bytes() == (
        tmp_path / "b/params.npz"
    ).read_bytes()


def test_a_disk_that_is_full_when_pictures_are_drawn(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learned, "draw", full)
    job = ["--dataset", "digits", "--epochs", 1, "--out", tmp_path / "run"]
    said = refused(capsys, *job, code=1)
    assert "No space left on device" in said
    assert "--resume" in said
    assert "Traceback" not in said
    monkeypatch.undo()
    fashion_mnist.command_line(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "curves.png").exists()
