"""`python -m dice_op check`: it passes here, and notices what is wrong."""

import json
import sys

import numpy as np
import pytest

from dice_op import _check, core
from dice_op.__main__ import main
from helpers.installed import has
from helpers.processes import output_of


@pytest.mark.parametrize("name", ["NumPy", "TensorFlow"])
def test_every_case_passes_here(name):
    rows = _check.check_front_end(name)
    assert len(rows) == (1 if name == "NumPy" else 2)
    for row in rows:
        assert not row["failures"] and not row["skipped"]
        assert row["passed"] == row["cases"] == len(_check.CASES)


@pytest.mark.full
def test_the_command_tries_every_front_end():
    report = json.loads(output_of(sys.executable, "-m", "dice_op", "check", "--json"))
    assert report["version"] == core.build_info()["version"]
    for name, (module, _) in _check.FRONT_ENDS.items():
        rows = [row for row in report["rows"] if row["front_end"].startswith(name)]
        there = has(module)
        assert rows and all(("not_here" in row) != there for row in rows)
        assert all(row["passed"] == row["cases"] for row in rows if there)


def numpy_but(change):
    """The front end of NumPy, with another result for volumes in single precision."""
    ((_, right),) = _check.FRONT_ENDS["NumPy"][1]()

    def compute(case, *given):
        sums, gradient = right(case, *given)
        if case.dtype == "float32":
            change(sums, gradient)
        return sums, gradient

    return "NumPy", ("numpy", lambda: iter([("CPU", compute)]))


def one_voxel(sums, gradient):
    elements = gradient.reshape(-1)
    elements[np.abs(elements).argmax()] *= 1.01


def a_sum(sums, gradient):
    sums["pred_sum"] *= 1 + 1e-5


def not_a_number(sums, gradient):
    sums["intersection"][1] = np.nan


def an_exception(sums, gradient):
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_voxel, "gradient off by"),
        (a_sum, "sums off by 1.0e-05"),
        (not_a_number, "sums off by nan"),
        (an_exception, "RuntimeError: no memory"),
    ],
)
def test_a_wrong_result_is_noticed(change, says, monkeypatch):
    monkeypatch.setitem(_check.FRONT_ENDS, *numpy_but(change))
    (row,) = _check.check_front_end("NumPy")
    single = sum(case.dtype == "float32" for case in _check.CASES)
    assert row["passed"] == row["cases"] - single
    assert len(row["failures"]) == single and all(says in f for f in row["failures"])
    assert says in _check.line(row)


def test_what_is_not_here_is_no_failure(monkeypatch, capsys):
    monkeypatch.setitem(_check.FRONT_ENDS, "JAX", ("no_such_module", None))
    (row,) = _check.check_front_end("JAX")
    assert "not here: no_such_module is not installed" in _check.line(row)
    here = {"front_end": "NumPy", "device": "CPU", "passed": 1, "cases": 1, "failures": []}
    for rows, on_numpy_alone in (([here, row], True), ([here, here, row], False)):
        monkeypatch.setattr(_check, "check", lambda names, rows=rows: iter(rows))
        assert main(["check"]) == 0
        out = capsys.readouterr().out
        assert "Something failed" not in out
        assert ("To train, install PyTorch or JAX; or install TensorFlow" in out) == on_numpy_alone


def test_a_front_end_whose_process_dies_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(_check.sys, "executable", "/bin/false")
    assert main(["check", "--front-end", "NumPy"]) == 1
    out = capsys.readouterr().out
    assert "0 of 17 passed" in out and "its process ended with status 1" in out
    assert "Something failed: please report it" in out
