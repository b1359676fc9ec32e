"""The record that `make bench` left, what is written from it, and the measuring itself in small."""

import json
import pathlib
import re

import numpy as np
import pytest

from benchmarks import measuring, report
from benchmarks.cases import Case, cube

ROOT = pathlib.Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "cpu.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_what_is_written_is_what_was_measured(record):
    assert RECORD.with_suffix(".md").read_text() == report.markdown(record)
    part = f"{report.BEGIN}.*{report.END}"
    (written,) = re.findall(part, (ROOT / "README.md").read_text(), re.DOTALL)
    assert written == report.readme_part(record)
    assert RECORD.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_record_is_of_a_commit_and_whole(record):
    assert not record["machine"]["changed"], "measure what is committed"
    names = {r["name"] for r in record["results"]}
    assert set(report.README_CASES) <= names and len(names) > 20
    ours = [r for r in record["results"] if r["contender"] in ("dice_op", "dice_op, XLA")]
    assert not any("failed" in r or r["wrong"] for r in ours)


class SteadyMachine:
    def speed(self):
        return 1.0

    def limits(self):
        return {"read": 1e10, "copy": 2e10}


class SharedMachine:
    """One that somebody else uses: `speeds`, asked one after the other."""

    def __init__(self, *speeds):
        self.speeds = list(speeds)

    def speed(self):
        return self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]


@pytest.mark.parametrize(
    "speeds, expected",
    [
        ((1, 0.97), (1, 0.97)),  # quiet before and after
        ((0.6, 0.6, 1, 1), (1, 1)),  # waits for a quiet moment
        ((1, 0.5, 0.98, 0.96), (2, 0.96)),  # disturbed while it measured: again
        ((0.5, 0.4, 0.7, 0.6, 0.3), (2, 0.6)),  # never quiet: the best there was
    ],
)
def test_a_disturbed_measurement_is_repeated(speeds, expected, monkeypatch):
    never_quiet = max(speeds) < measuring.UNDISTURBED
    monkeypatch.setattr(measuring, "PATIENCE", 0.0 if never_quiet else 60.0)
    monkeypatch.setattr(measuring.time, "sleep", lambda seconds: None)
    attempts = iter(range(1, 100))
    assert measuring.undisturbed(SharedMachine(*speeds), lambda: next(attempts)) == expected


def test_the_machine_tells_its_speed_and_limits():
    machine = measuring.Machine()
    assert 0 < machine.speed() <= 1
    limits = machine.limits(megabytes=8, repeats=3)
    assert limits["threads"] >= 1 and limits["read"] > 1e8 and limits["copy"] > 1e8


@pytest.mark.parametrize(
    "case",
    [
        cube(12, 3),
        cube(12, 1),
        cube(12, 3, labels="one-hot", batch=2),
        cube(12, 3, data_format="channels_first", dtype="float16"),
        Case((7, 8, 9), 14),
    ],
    ids=str,
)
def test_contenders_compute_the_loss_in_question(case):
    contenders = ["dice_op.core", "dice_op, XLA", "vectorised"]
    if case == cube(12, 3):
        contenders += ["multi-class snippet, eager", "keras.losses.Dice"]
    for result in measuring.compare(case, contenders, seconds=0.01, machine=SteadyMachine()):
        assert "failed" not in result, result
        precise = result["contender"].startswith("dice_op") or case.dtype == "float32"
        assert result["error"] <= (1e-5 if precise else 1e-2) and not result["wrong"]
        assert result["seconds"] > 0 and result["repeats"] >= 3
        moved = case.logits_bytes + case.labels_bytes
        limit = moved / 1e10 + (moved + case.logits_bytes) / 2e10
        assert result["speed"] == 1
        assert np.isclose(result["of_limit"] * limit, result["seconds"])
        assert result["contender"] in report.line(result)
