"""The examples in docstrings run. What they take for granted is here."""

import doctest
import importlib

import keras
import numpy as np
import pytest

from helpers.installed import needs
from helpers.paths import ROOT

SHAPE = (2, 16, 16, 16)
LABELS = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
LOGITS = np.random.default_rng(1).normal(size=(*SHAPE, 3)).astype(np.float32)


def of_keras(outputs):
    """A model with one output, or with several, each half as fine as the one before."""
    inputs = x = keras.Input((*SHAPE[1:], 1))
    predictions = []
    for _ in range(outputs):
        predictions.append(keras.layers.Conv3D(3, 1)(x))
        x = keras.layers.AveragePooling3D(2)(x)
    model = keras.Model(inputs, predictions if outputs > 1 else predictions[0])
    return {"model": model, "images": LOGITS[..., :1], "labels": LABELS}


def of_torch():
    import torch

    logits = torch.tensor(np.moveaxis(LOGITS, -1, 1).copy(), requires_grad=True)
    return {"logits": logits, "labels": torch.tensor(LABELS)}


def of_jax():
    import jax

    return {"jax": jax, "logits": LOGITS, "labels": LABELS}


GIVEN = {
    "__init__.py": lambda: of_keras(1),
    "losses/_deep_supervision.py": lambda: of_keras(4),
    "torch.py": of_torch,
    "jax.py": of_jax,
}
FILES = [p for p in sorted((ROOT / "dice_op").rglob("*.py")) if ">>> " in p.read_text()]
NAMES = [str(p.relative_to(ROOT / "dice_op")) for p in FILES]
NEEDS = {"torch.py": [pytest.mark.full, needs("torch")], "jax.py": [pytest.mark.full, needs("jax")]}


class ValuesMayBeLeftOut(doctest.OutputChecker):
    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", [pytest.param(n, marks=NEEDS.get(n, [])) for n in NAMES])
def test_the_examples_in_a_file_run(name):
    path = ROOT / "dice_op" / name
    module = ".".join(["dice_op", *path.relative_to(ROOT / "dice_op").with_suffix("").parts])
    names = {**vars(importlib.import_module(module.removesuffix(".__init__"))), **GIVEN[name]()}
    names["dice_op"] = importlib.import_module("dice_op")
    test = doctest.DocTestParser().get_doctest(path.read_text(), names, name, str(path), 0)
    runner = doctest.DocTestRunner(ValuesMayBeLeftOut(), verbose=False)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
