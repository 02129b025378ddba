"""experiments.vocabulary and benchmark linear, from flags to files, on a small text."""

import gzip
import json

import numpy as np
import pytest

from experiments import benchmark, benchmark_linear, english, vocabulary
from experiments.command import BadInput, main


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


@pytest.mark.parametrize(("steps", "averaged"), [(1, 1), (20, 4), (120, 20)])
def test_a_curve_has_points_that_are_seen(steps, averaged, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        vocabulary, "save_figure", lambda _, figure: figures.append(figure)
    )
    runs = {vocabulary.OURS: vocabulary.Run(print, 1, [2.0] * steps, [])}
    by_name = {vocabulary.OURS: 1.0}
    results = {"perplexity": {"unigram": 3.0}, "tokens_per_second": by_name}
    results["temp_bytes_of_a_step"] = by_name
    vocabulary.draw(runs, results, tmp_path / "curves.png")
    curve = figures[0].axes[0]
    line = curve.lines[0]
    assert line.get_xdata().tolist() == list(range(averaged, steps + 1))
    assert len(line.get_xdata()) > 1 or line.get_marker() == "o"
    assert curve.get_ylabel().endswith(f"(steps averaged: {averaged})")


def test_a_damaged_dictionary_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "gcide.dict.dz"
    monkeypatch.setattr(english, "DICTIONARY", path)
    packed = gzip.compress(b"a few words")
    for damaged in (packed[:-9], packed[:10] + b"\xff" + packed[11:], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"is damaged: delete .* and try again"):
            english.load(None, 10)


def test_ids_grow_as_words_get_rarer():
    text = english.as_ids(["a", "b", "b", "c", "c", "c", "d"], 3, "")
    assert text.vocabulary == [english.UNKNOWN, "c", "b"]
    assert text.ids.tolist() == [0, 2, 2, 1, 1, 1, 0]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    for path, sentence in (
        (tmp_path / "none", "none cannot be read (No such file or directory): give a"),
        (short, "short.txt has 3 words, too few to train on: give a longer --text, or"),
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
    assert "growth.png" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        benchmark.command_line(["linear", "--shapes", "1x1x1"])
    assert "--shapes 1x1x1 is none of 2048x512x32768, " in capsys.readouterr().err


def test_a_picture_of_growth_is_of_one_type(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        benchmark_linear, "save_figure", lambda path, figure: figures.append(figure)
    )
    monkeypatch.setattr(benchmark_linear, "GROWTH", (16,))
    monkeypatch.setitem(benchmark_linear.SHAPES, "growth", (8, 4, 0))
    for dtype in ("bfloat16", "float32"):
        flags = ["--shapes", "growth", "--seconds", "0.01", "--dtype", dtype]
        benchmark.command_line(["linear", *flags, "--out", str(tmp_path)])
        rows = json.loads((tmp_path / "linear.json").read_text())["rows"]
        (line, *_) = figures[-1].axes[0].lines
        expected = rows[-1]["milliseconds"][benchmark_linear.OURS] / 1e3
        assert line.get_ydata().tolist() == [expected]
        assert figures[-1].get_suptitle() == f"8 tokens, 4 features, {dtype}"
