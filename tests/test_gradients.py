"""The gradient experiment: its facts in the quick form, and a reader's own pair."""

import io
import json
import math
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
from PIL import Image

from experiments import gradients
from experiments.command import main

USER_MODULE = """
import jax.numpy as jnp

def squares(x, w):
    return jnp.sum(w * x**2)

def right(x, w):
    return 2 * w * x

def minus(x, w):
    return -2 * w * x

def narrow(x, w):
    return (2 * w * x)[:1]

def rows(x, *, where):
    return jnp.where(where, jnp.sin(x), 0)

def rows_vjp(x, cotangent, *, where):
    return jnp.where(where, cotangent * jnp.cos(x), 0)

def kink(x):
    return jnp.abs(x).sum()

def cancelling(x):
    return jnp.sum((x + 1e9) - 1e9) ** 2

def leaves(*args):
    raise SystemExit(0)

number = 3
"""


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """What the quick form writes, and what it prints."""
    folder = tmp_path_factory.mktemp("gradients")
    flags = ["--quick", "--dataset", "digits", "--out", str(folder)]
    with redirect_stdout(io.StringIO()) as printed:
        main(gradients.run, gradients.Settings, flags, program="gradients")
    return folder, printed.getvalue()


def test_prints_every_table_under_its_sentence(quick_run):
    folder, printed = quick_run
    tables = (folder / "tables.md").read_text()
    assert all(line in printed for line in tables.splitlines())
    sections = [part for part in tables.split("\n\n") if part.startswith("**")]
    assert len(sections) == 4
    assert all(part.endswith(".**") for part in sections)
    assert "reaches the gradient by textbook, stable form" in tables
    assert "closed form." not in tables.split("reaches the gradient by")[1][:60]


def test_our_rule_keeps_its_digits_and_a_masked_nan_out(quick_run):
    folder, _ = quick_run
    content = json.loads((folder / "gradients.json").read_text(), parse_constant=float)
    assert {"jax", "command", "cores"} <= content["environment"].keys()
    rows = {(row["case"], row["road"]): row for row in content["rows"]}
    case = "cross_entropy, masked NaN rows"
    assert rows[case, "jax_softmax"]["max_ulp"] <= 3
    assert rows[case, "jax_softmax"]["milliseconds"] > 0
    assert rows[case, "jax_softmax"]["doubts"] == []
    for road in ("textbook", "stable form", "optax"):
        assert rows[case, road]["max_ulp"] == "inf"


def test_json_is_strict(quick_run):
    folder, _ = quick_run

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((folder / "gradients.json").read_text(), parse_constant=refuse)


def test_errors_by_margin_tell_the_stable_form_from_ours(quick_run):
    folder, _ = quick_run
    (curves,) = json.loads((folder / "gradients.json").read_text())["by_margin"]
    assert curves["margins"] == [0, 20, 80]
    assert max(curves["ulps"]["jax_softmax"]) <= 3
    for road in ("stable form", "optax"):
        start, *sure = curves["relative"][road]
        assert start < 1e-6
        assert min(sure) >= 0.99


def test_differences_have_a_best_step(quick_run):
    folder, _ = quick_run
    (curves,) = json.loads((folder / "gradients.json").read_text())["by_step"]
    errors = np.asarray(curves["central"])
    assert 0 < errors.argmin() < len(errors) - 1
    assert errors.min() < 1e-6 < min(errors[0], errors[-1])
    assert curves["autodiff"] < 1e-12
    assert min(curves["richardson"]) < errors.min()


def test_figures_are_drawn(quick_run):
    folder, printed = quick_run
    for name in ("error_by_margin.png", "error_by_step.png"):
        assert str(folder / name) in printed
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture).std() > 5


# --- Your own pair ---------------------------------------------------------------


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """The command on a reader's module and file: exit code, output, errors."""
    (tmp_path / "users_module.py").write_text(USER_MODULE)
    (tmp_path / "program.py").write_text("import sys; sys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "users_module", None)
    monkeypatch.delitem(sys.modules, "users_module")
    x, w = np.array([1.0, -2.0, 3.0], np.float32), np.float32(0.3)
    np.savez(tmp_path / "args.npz", x, w)

    def run(function, *flags, file="args.npz"):
        code = 0
        flags = ["--function", function, "--args", str(tmp_path / file), *flags]
        try:
            main(gradients.run, gradients.Settings, flags, program="gradients")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def own(name):
    return f"users_module:{name}"


def test_a_right_pair_is_printed_and_saved(compare, tmp_path):
    flags = ("--closed-form", own("right"), "--ulp", "2", "--out", str(tmp_path / "o"))
    code, out, err = compare(own("squares"), *flags)
    assert (code, err) == (0, "")
    assert "closed form" in out
    assert "within 2 ULP" in out
    saved = json.loads((tmp_path / "o" / "comparison.json").read_text())
    assert saved["closed_form"] == own("right")
    assert max(float(row["max_ulp"]) for row in saved["rows"][:2]) <= 2


def test_a_wrong_pair_is_shown_and_fails_only_as_a_check(compare):
    flags = ("--closed-form", own("minus"))
    code, out, err = compare(own("squares"), *flags)
    assert (code, err) == (0, "")
    assert "minus the judge's" in out
    code, out, err = compare(own("squares"), *flags, "--ulp", "8")
    assert code == 1
    assert "closed form of x[2] is" in err
    assert "----" not in err


def test_a_doubt_fails_a_check(compare, tmp_path):
    np.savez(tmp_path / "zero.npz", np.zeros(2, np.float32))
    assert compare(own("kink"), file="zero.npz")[0] == 0
    code, _, err = compare(own("kink"), "--ulp", "8", file="zero.npz")
    assert code == 1
    assert "not differentiable" in err


def test_arguments_by_name_and_a_cotangent(compare, tmp_path):
    x = np.linspace(-1, 1, 4, dtype=np.float32)
    np.savez(tmp_path / "named.npz", where=x > -1, x=x)
    flags = ("--closed-form", own("rows_vjp"), "--ulp", "4")
    code, out, err = compare(own("rows"), *flags, file="named.npz")
    assert (code, err) == (0, ""), err
    assert "x     closed form" in out


def test_float64_files_stay_float64_unless_told(compare, tmp_path):
    np.savez(tmp_path / "wide.npz", w=np.array(0.3), x=np.array([0.1, 0.7]))
    flags = ("--closed-form", own("right"), "--argnums", "0", "--out", str(tmp_path))
    for more, dtype in (((), "float64"), (("--dtype", "bfloat16"), "bfloat16")):
        code, _, err = compare(own("squares"), *flags, *more, file="wide.npz")
        assert (code, err) == (0, "")
        saved = json.loads((tmp_path / "comparison.json").read_text())
        assert {row["dtype"] for row in saved["rows"]} == {dtype}
    assert not math.isnan(float(saved["rows"][0]["max_ulp"]))


def test_files_of_another_byte_order(compare, tmp_path):
    np.savez(tmp_path / "swapped.npz", x=np.ones(3, ">f4"), w=np.array(2, ">f4"))
    flags = ("--closed-form", own("right"), "--ulp", "2")
    code, _, err = compare(own("squares"), *flags, file="swapped.npz")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("function", "flags", "file", "said"),
    [
        ("nowhere:f", (), "args.npz", "no module nowhere"),
        ("users_module:nothing", (), "args.npz", "no attribute 'nothing'"),
        ("users_module:number", (), "args.npz", "is a int: name something to call"),
        ("users_module", (), "args.npz", "not of the form module:name"),
        ("program:f", (), "args.npz", "importing program ends the program"),
        ("users_module:leaves", (), "args.npz", "cannot be called with arr_0"),
        (
            "users_module:squares",
            ("--closed-form", "users_module:leaves"),
            "args.npz",
            "cannot be compared (SystemExit: 0)",
        ),
        ("users_module:squares", (), "absent.npz", "There is no file"),
        ("users_module:squares", (), "damaged.npz", "cannot be read"),
        ("users_module:squares", (), "text.npz", "is not an .npz file made with nu"),
        ("users_module:squares", (), "empty.npz", "is not an .npz file made with nu"),
        ("users_module:squares", (), "objects.npz", "holds what is no array of num"),
        ("users_module:squares", (), "words.npz", "which is no number"),
        ("users_module:squares", (), "longer.npz", "longer.npz: w is of type float128"),
        ("users_module:squares", (), "single.npz", "is a single array"),
        ("users_module:squares", (), "three.npz", "cannot be called with arr_0"),
        (
            "users_module:squares",
            ("--closed-form", "users_module:narrow"),
            "args.npz",
            "got float32[1], wanted float32[3]",
        ),
        ("users_module:squares", ("--argnums", "7"), "args.npz", "argnums: got 7"),
        ("users_module:squares", ("--floor", "nan"), "args.npz", "in [0, 1], got nan"),
        ("users_module:squares", ("--ulp", "nan"), "args.npz", "at least 0, got nan"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    compare, tmp_path, function, flags, file, said
):
    whole = (tmp_path / "args.npz").read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("1 2 3")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "objects.npz", np.array([None]))
    np.savez(tmp_path / "words.npz", np.array(["a"]))
    np.savez(tmp_path / "longer.npz", x=np.ones(3), w=np.longdouble(2))
    (tmp_path / "single.npz").write_bytes(b"")
    with (tmp_path / "single.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    np.savez(tmp_path / "three.npz", np.zeros(1), np.zeros(1), np.zeros(1))
    code, _, err = compare(function, *flags, file=file)
    assert code == 2
    assert said in err
    assert "pickle" not in err
    assert len(err.splitlines()) == 1


def test_half_a_pair_is_refused(capsys):
    for flags, said in (
        (["--closed-form", "a:b"], "--function is missing"),
        (["--argnums", "0"], "--function is missing"),
        (["--order", "1"], "--function is missing"),
        (["--floor", "0"], "--function is missing"),
        (["--function", "math:sin"], "--args is missing"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(gradients.run, gradients.Settings, flags, program="gradients")
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--quick"], ["--dataset", "nonsense"], ["--data-dir", "there"]]
)
def test_what_a_pair_would_ignore_is_refused(compare, flags):
    code, out, err = compare(own("squares"), *flags)
    assert (code, out) == (2, "")
    assert f"{flags[0]} is not for a pair of your own" in err
    assert len(err.splitlines()) == 1
