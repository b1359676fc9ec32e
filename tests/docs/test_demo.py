"""`make demo` in small: every part of it runs for a few steps and writes what it promises."""

import json
import sys

import pytest

from helpers.installed import needs
from helpers.paths import EXAMPLES
from helpers.processes import output_of


def quick_demo(folder, **environment):
    demo = [sys.executable, EXAMPLES / "brain_segmentation.py", "--quick", "--output", folder]
    return output_of(*demo, **environment)


@pytest.mark.full
@needs("torch")
def test_the_quick_demo_runs_on_another_backend(tmp_path):
    """On JAX it takes several minutes, most of them to compile for tiles of four sizes."""
    assert "dice_op.torch" in quick_demo(tmp_path, KERAS_BACKEND="torch")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["backend"] == "torch"
    assert all(cost["error"] <= 1e-6 for cost in summary["loss_and_gradient"].values())


def test_the_quick_demo_runs_and_writes_what_it_promises(tmp_path):
    printed = quick_demo(tmp_path)
    assert (tmp_path / "brain.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    costs = summary["loss_and_gradient"]
    assert set(costs) == {"dice_op", "dice_op, XLA", "vectorised", "vectorised, XLA"}
    for contender in ("dice_op", "dice_op, XLA"):
        assert costs[contender]["error"] <= 1e-6
    for name in ("grey matter", "white matter"):
        assert 0 <= summary["held_out_dice"]["trained network"][name] <= 1
    for words in ("held-out Dice", "x logits", "vectorised, XLA"):
        assert words in printed
