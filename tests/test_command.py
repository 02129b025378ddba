"""What every experiment that writes a folder says of one that cannot be written."""

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
