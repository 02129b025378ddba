"""What every experiment that writes a folder says of one that cannot be written."""

import subprocess
import sys
from importlib import import_module

import pytest

from experiments.command import BadInput

WRITE_A_FOLDER = {
    "benchmark_dense": "Settings",
    "benchmark_job": "Settings",
    "benchmark_linear": "Settings",
    "benchmark_train": "Settings",
    "decisions": "Settings",
    "gradients": "Settings",
    "scaling_pod": "Pod",
    "solvers": "Settings",
    "stability": "Settings",
    "sweep": "Settings",
    "vocabulary": "Settings",
}


@pytest.mark.parametrize("name", WRITE_A_FOLDER)
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(
    name, tmp_path
):
    a_file = tmp_path / "file"
    a_file.touch()
    experiment = import_module(f"experiments.{name}")
    settings = getattr(experiment, WRITE_A_FOLDER[name])(out=a_file / "results")
    with pytest.raises(BadInput, match=r"output folder .* cannot be written .*--out"):
        experiment.run(settings)


def test_a_reader_that_leaves_is_one_sentence():
    code = (
        "from experiments.command import main\n"
        "main(lambda _: print('x' * 9**6), int, ['1'], program='x')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        run.stdout.close()
        said = run.stderr.read().decode()
    assert run.returncode == 1
    assert said.startswith("Stopped: nobody reads the output")
    assert len(said.splitlines()) == 1
