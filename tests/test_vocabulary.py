"""experiments.vocabulary and benchmark linear, from flags to files, on a small text."""

import json

import numpy as np
import pytest

from experiments import benchmark, benchmark_linear, english, vocabulary
from experiments.command import main


@pytest.fixture
def text(tmp_path):
    random = np.random.default_rng(0)
    chain = np.cumsum(random.integers(1, 3, 6000)) % 24  # a word tells much of the next
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chr(ord("a") + i) for i in chain))
    return path


def test_a_run_learns_and_both_losses_agree(text, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "LIMITS", (1e-3,))
    monkeypatch.setattr(vocabulary, "BLOCK", 20)
    out = tmp_path / "out"
    sizes = "--classes 30 --features 8 --context 2 --batch 64 --steps 60 --rate 0.05"
    flags = ["--text", str(text), "--out", str(out), *sizes.split()]
    main(vocabulary.run, vocabulary.Settings, flags, program="vocabulary")
    results = json.loads((out / "vocabulary.json").read_text())
    assert results["perplexity"]["trained"] < 0.2 * results["perplexity"]["unigram"]
    assert results["largest_difference_of_the_losses"] < 1e-4
    assert results["top_5_accuracy"] > 0.9
    assert (out / "curves.png").stat().st_size > 0
    assert (out / "predictions.md").read_text().count("\n") == 12


def test_the_shortest_run(text, tmp_path, monkeypatch):
    """One step, of the smallest model and a vocabulary of two."""
    monkeypatch.setattr(vocabulary, "filtering", lambda *_: [])
    sizes = "--classes 2 --features 1 --context 1 --batch 1 --steps 1"
    flags = ["--text", str(text), "--out", str(tmp_path), *sizes.split()]
    main(vocabulary.run, vocabulary.Settings, flags, program="vocabulary")
    results = json.loads((tmp_path / "vocabulary.json").read_text())
    assert len(results["losses"][vocabulary.OURS]) == 1
    assert min(results["tokens_per_second"].values()) > 0
    assert results["top_5_accuracy"] == 1


def test_ids_grow_as_words_get_rarer():
    text = english.as_ids(["a", "b", "b", "c", "c", "c", "d"], 3, "")
    assert text.vocabulary == [english.UNKNOWN, "c", "b"]
    assert text.ids.tolist() == [0, 2, 2, 1, 1, 1, 0]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    for path, sentence in (
        (tmp_path / "none", "none cannot be read (No such file or directory): give a"),
        (short, "short.txt has 3 words, too few to train on"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(
                vocabulary.run,
                vocabulary.Settings,
                ["--text", str(path)],
                program="vocabulary",
            )
        assert sentence in capsys.readouterr().err


def test_benchmark_linear(tmp_path, capsys):
    benchmark.command_line(["linear", "--quick", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "linear.json").read_text())["rows"]
    assert {benchmark_linear.OURS, benchmark_linear.OPTAX} <= set(row["milliseconds"])
    assert row["wrong_by"] == {}
    with pytest.raises(SystemExit, match="2"):
        benchmark.command_line(["linear", "--shapes", "1x1x1"])
    assert "--shapes 1x1x1 is none of 2048x512x32768, " in capsys.readouterr().err
