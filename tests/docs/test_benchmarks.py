"""What is written from the record that `make bench` left is true to it. And measuring, in small."""

import json
import re

import numpy as np
import pytest

from benchmarks import cpu, machine, report
from benchmarks.cases import Case, cube
from benchmarks.contenders import CONTENDERS
from helpers.paths import BENCHMARKS, ROOT

RECORD = BENCHMARKS / "results" / "cpu.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_what_is_written_is_what_was_measured(record):
    assert RECORD.with_suffix(".md").read_text() == report.markdown(record)
    part = f"{report.BEGIN}.*{report.END}"
    (written,) = re.findall(part, (ROOT / "README.md").read_text(), re.DOTALL)
    assert written == report.readme_part(record)
    assert RECORD.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_record_is_complete_and_was_made_from_a_commit(record):
    assert not record["machine"]["changed"], "measure what is committed"
    names = {r["name"] for r in record["results"]}
    assert set(report.README_CASES) <= names and len(names) > 20
    ours = [r for r in record["results"] if r["contender"] in ("dice_op", "dice_op, XLA")]
    assert not any("failed" in r or r["wrong"] for r in ours)


def test_the_record_says_what_is_true_of_the_contenders(record):
    for result in record["results"]:
        assert {"ours", "same_loss", "snippet", "simd_level"} <= set(result)
        if contender := CONTENDERS.get(result["contender"]):  # There may be fewer of them now.
            assert contender.facts().items() <= result.items()
        case = Case.from_json(result["case"])
        assert result["name"] == str(case)
        assert result.get("logits_bytes", case.logits_bytes) == case.logits_bytes


class SteadyMachine:
    def pace(self):
        return 1.0

    def near_its_fastest(self, pace):
        return True

    def limits(self):
        return {"read": 1e10, "copy": 2e10}


class SharedMachine:
    """A machine that somebody else uses as well: it tells one of `paces` after the other."""

    def __init__(self, *paces):
        self.paces = list(paces)

    def pace(self):
        return self.paces.pop(0) if len(self.paces) > 1 else self.paces[0]

    def near_its_fastest(self, pace):
        return pace < 1.1


@pytest.mark.parametrize(
    "paces, attempt, pace",
    [
        ((1, 1.05), 1, 1.05),  # The machine is quiet before and after.
        ((2, 2, 1, 1), 1, 1),  # It waits for a quiet moment.
        ((1, 2, 1.02, 1.04), 2, 1.04),  # It is disturbed while it measures, and measures again.
        ((2, 3, 1.5, 1.6, 3), 2, 1.6),  # It is never quiet: the best attempt is taken.
    ],
)
def test_a_disturbed_measurement_is_repeated(paces, attempt, pace, monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0.0 if min(paces) > 1.1 else 60.0)
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    attempts = iter(range(1, 100))
    result = machine.undisturbed(SharedMachine(*paces), lambda: {"attempt": next(attempts)})
    assert result == {"attempt": attempt, "pace": pace}


def test_a_failure_is_final_but_replaces_no_result(monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 0.0)
    outcomes = iter([{"seconds": 1}, {"failed": "no memory"}, {"failed": "never asked"}])
    result = machine.undisturbed(SharedMachine(2), lambda: next(outcomes))
    assert result == {"seconds": 1, "pace": 2}
    assert machine.undisturbed(SharedMachine(2), lambda: {"failed": "x"}) == {"failed": "x"}


def test_the_machine_tells_its_pace_and_limits(monkeypatch):
    monkeypatch.setattr(machine, "CALIBRATION", 0.05)
    watched = machine.Machine()
    assert 1e-4 < watched.pace() and watched.near_its_fastest(watched.fastest)
    assert not watched.near_its_fastest(watched.fastest / machine.UNDISTURBED * 1.01)
    limits = watched.limits(megabytes=8, repeats=3)
    assert limits["threads"] >= 1 and limits["read"] > 1e8 and limits["copy"] > 1e8


def test_the_report_says_what_was_disturbed(record):
    record = json.loads(json.dumps(record))
    for result in record["results"]:
        result["pace"] = 1.0
    record["results"][0]["pace"] = 2.0
    text = report.markdown(record)
    assert text.count("(processors at 50%)") == 1 and f"1 of {len(record['results'])} " in text


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
    for result in cpu.compare(case, contenders, seconds=0.01, machine=SteadyMachine()):
        assert "failed" not in result, result
        precise = result["ours"] or case.dtype == "float32"
        assert result["error"] <= (1e-5 if precise else 1e-2) and not result["wrong"]
        assert result["seconds"] > 0 and result["repeats"] >= 3
        moved = case.logits_bytes + case.labels_bytes
        limit = moved / 1e10 + (moved + case.logits_bytes) / 2e10
        assert result["pace"] == 1 and result["limits"] == SteadyMachine().limits()
        assert np.isclose(result["of_limit"] * limit, result["seconds"])
        assert result["contender"] in report.line(result)
