"""`make demo` in small: every part of it runs for a few steps and writes what it promises."""

import json
import sys

from helpers.paths import EXAMPLES
from helpers.processes import output_of


def test_the_quick_demo_runs_and_writes_what_it_promises(tmp_path):
    demo = [sys.executable, EXAMPLES / "brain_segmentation.py", "--quick", "--output", tmp_path]
    printed = output_of(*demo)
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
