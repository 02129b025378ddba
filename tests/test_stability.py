"""The stability experiment: its reference, and the facts on its page."""

import json

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from experiments import stability
from experiments.command import main
from experiments.stability_rivals import (
    OURS,
    by_definition,
    by_index,
    exact_losses,
    exact_softmax,
    ulp_error,
)

# What the library promises, in ULP.
LOSS, GRADIENT, SOFTMAX = 2, 3, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A quick run."""
    folder = tmp_path_factory.mktemp("stability")
    flags = ["--quick", "--out", str(folder)]
    main(stability.run, stability.Settings, flags, program="stability")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """Its numbers, from JSON that any reader of JSON accepts."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "stability.json").read_text()
    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def softmaxes(found):
    return {(row["dtype"], row["logits"]): row for row in found["softmax"]}


@pytest.fixture(scope="module")
def losses(found):
    return {row["batch"]: row["loss"] for row in found["losses"]}


def exactly(z, y):
    """Probabilities, loss and gradient of one row, with 120 digits."""
    with mpmath.workdps(120):
        e = [mpmath.exp(mpmath.mpf(float(x))) for x in z]
        probs = [x / sum(e) for x in e]
        gradient = [p - (j == y) for j, p in enumerate(probs)]
        rows = probs, [-mpmath.log(probs[y])], gradient
        return [np.array([float(x) for x in row]) for row in rows]


@pytest.mark.parametrize("batch", stability.batches())
def test_the_reference_is_exact(batch):
    logits, labels = stability.batches()[batch]
    for z, y in list(zip(logits, labels, strict=True))[:2]:
        probs, loss, gradient = exactly(z, y)
        got = exact_losses(z[None], np.array([y]))
        np.testing.assert_allclose(exact_softmax(z), probs, rtol=1e-13)
        np.testing.assert_allclose(got[0], loss, rtol=1e-13)
        np.testing.assert_allclose(got[1][0], gradient, rtol=1e-13)


def test_ulp_error_counts_roundings():
    one = jnp.array([1.0, 1 + 2**-23, 1.5, jnp.nan, jnp.inf, 0.0])
    exact = np.array([1.0, 1.0, 1.5 + 2**-24, 1.0, 1.0, 1e-40])
    assert ulp_error(one, exact).tolist() == [0, 1, 0.5, np.inf, np.inf, 0]


def test_exp_leaves_each_type_where_its_format_says(found):
    for dtype, limits in found["exp"].items():
        kind = jnp.finfo(dtype)
        assert limits["finite_up_to"] <= np.log(float(kind.max)) + float(kind.eps)
        spacing = 128 * float(kind.eps)
        assert limits["finite_up_to"] > np.log(float(kind.max)) - spacing
        assert abs(limits["all_digits_down_to"] - np.log(float(kind.tiny))) < spacing
        assert limits["positive_down_to"] <= limits["all_digits_down_to"]


@pytest.mark.parametrize("dtype", stability.DTYPES)
@pytest.mark.parametrize(
    "logits", ["[100, 104]", "[1000, 1004]", "[-104, -100]", "[-1004, -1000]"]
)
def test_naive_softmax_is_nan_far_from_zero_and_ours_exact(softmaxes, dtype, logits):
    row = softmaxes[dtype, logits]
    assert row["naive"]["probs"] == ["nan", "nan"]
    exact = np.array([0.01798620996209156, 0.9820137900379085])
    unit = float(jnp.finfo(dtype).eps)
    assert row[OURS]["worst_ulp"] <= 1
    np.testing.assert_allclose(row[OURS]["probs"], exact, rtol=unit)
    np.testing.assert_allclose(row["slightly smart"]["probs"], exact, rtol=2 * unit)


def test_the_threads_rows(softmaxes):
    assert softmaxes["float32", "[1, 1]"]["naive"]["probs"] == [0.5, 0.5]
    assert softmaxes["float32", "[1, 10]"]["naive"]["worst_ulp"] < 2
    assert softmaxes["float32", "[1, 100]"]["naive"]["probs"] == [0, "nan"]


def test_our_softmax_keeps_its_promise(softmaxes):
    for row in softmaxes.values():
        assert row[OURS]["worst_ulp"] <= SOFTMAX, row["logits"]
    assert softmaxes["float32", stability.SPREAD]["slightly smart"]["worst_ulp"] > 30


def test_our_losses_and_gradients_keep_their_promise(found):
    for row in found["losses"]:
        assert row["loss"][OURS]["worst_ulp"] <= LOSS, row["batch"]
        assert row["gradient"][OURS]["worst_ulp"] <= GRADIENT, row["batch"]


def test_peers_lose_the_loss_of_a_certain_model(found, losses):
    for name in ("definition", "indexing", "log_softmax", "optax"):
        assert losses["certain, by 20"][name]["median_ulp"] > 2**22
    at = found["margins"]["margin"].index(20)
    assert found["margins"]["loss"]["optax"][at] == 1  # it is 0
    assert found["margins"]["gradient"]["optax"][at] == 1
    assert found["margins"]["loss"][OURS][at] < 3e-7
    assert found["margins"]["gradient"][OURS][at] < 4e-7


def test_probabilities_lose_the_loss_of_a_bad_mistake(losses):
    mistaken = losses["mistaken, by 120"]
    assert mistaken["definition"]["worst_ulp"] == "inf"
    assert mistaken["indexing"]["worst_ulp"] == "inf"
    assert mistaken["optax"]["worst_ulp"] < 2


def test_one_hot_by_hand_is_nan_where_the_index_is_right():
    z, y = jnp.array([[120.0, 0.0]]), jnp.array([0])
    assert jnp.isnan(by_definition(z, y)[0])
    assert by_index(z, y)[0] == 0


def test_leaves_a_page_with_a_sentence_for_every_table(folder, found):
    names = {path.name for path in folder.iterdir()}
    assert names == {"stability.md", "stability.json", "margin.png", "offset.png"}
    page = (folder / "stability.md").read_text()
    sections = page.split("\n## ")[1:]
    assert len(sections) == 5
    for section in sections:
        table, sentence = section.split("|\n\n")
        assert table.count("\n|") >= 3
        assert "." in sentence
    assert found["environment"]["jax"]
    assert {"loss", "with gradient"} == {row["work"] for row in found["costs"]}


def test_refuses_unknown_flags_and_a_file_for_a_folder(tmp_path, capsys):
    for arguments in (["--fast"], ["--out", str(tmp_path / "file" / "x")]):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit) as stop:
            main(stability.run, stability.Settings, arguments, program="stability")
        assert stop.value.code == 2
    assert "choose another --out" in capsys.readouterr().err
