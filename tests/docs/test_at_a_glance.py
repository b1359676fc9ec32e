"""docs/at_a_glance.md: what a cell tells people to write can be written, and computes a loss."""

import re

import numpy as np
import pytest

from dice_op.losses import *  # noqa: F403 - the cells name the losses as their readers do
from helpers.paths import DOCS

PAGE = DOCS / "at_a_glance.md"


def cells():
    """The code in the second column: whole losses, and arguments of losses."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("|") and "`" in line:
            yield from re.findall(r"`([^`]+)`", line.split("|")[2])


def loss_of(code):
    """The loss of a cell, or one that takes the argument of a cell."""
    if "compile" in code:
        pytest.skip("losses/test_deep_supervision.py trains with deep_supervision")
    if re.match(r"[A-Z]\w+\(", code):
        return eval(code)
    sigmoid = "activation='sigmoid', " if code.startswith("focal_alpha") else ""
    try:
        return eval(f"DiceLoss({sigmoid}{code})")
    except TypeError:  # an argument of the cross-entropy
        return eval(f"DiceCELoss({sigmoid}{code})")


@pytest.mark.parametrize("code", [c for c in cells() if c not in ("gamma", "sample_weight")])
def test_a_cell_is_a_loss_that_computes(code):
    loss = loss_of(code)
    config = loss.get_config()
    classes = 1 if config["activation"] == "sigmoid" and not config["regions"] else 3
    weights = [config.get(name) for name in ("class_weight", "ce_class_weight")]
    assert all(w is None or len(w) == 3 for w in weights)
    y_true = np.random.default_rng(0).integers(0, max(classes, 2), (2, 4, 5, 6)).astype(np.uint8)
    y_pred = np.random.default_rng(1).uniform(0, 1, (2, 4, 5, 6, classes)).astype(np.float32)
    if config["data_format"] == "channels_first":
        y_pred = np.moveaxis(y_pred, -1, 1)
    if config["activation"] == "none":
        y_pred /= y_pred.sum(axis=-1, keepdims=True)
    assert np.isfinite(float(loss(y_true, y_pred)))
