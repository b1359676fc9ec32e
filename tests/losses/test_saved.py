"""What version 0.1.0 saved still loads, and means the same.

`saved/` holds what that version wrote, and must stay as it is: the configuration of each loss and
metric with its value for the data below, and a model compiled with a loss and a metric.
"""

import json
import pathlib

import keras
import numpy as np
import pytest

import dice_op

SAVED = pathlib.Path(__file__).parent / "saved"
CONFIGS = json.loads((SAVED / "configs.json").read_text())
MODEL_VALUES = [6.082241058349609, 0.15132275223731995]  # its loss and its score


def data():
    rng = np.random.default_rng(0)
    logits = rng.integers(-8, 9, size=(2, 4, 3, 3)).astype(np.float32) / 4
    labels = rng.integers(0, 3, size=(2, 4, 3)).astype(np.uint8)
    return logits, labels


def without_new_options(config, old):
    """A configuration without the names that an older one lacks, at any depth."""
    if not (isinstance(config, dict) and isinstance(old, dict)):
        return config
    return {k: without_new_options(v, old[k]) for k, v in config.items() if k in old}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_configuration(name):
    saved = CONFIGS[name]
    module = dice_op.metrics if "Score" in name else dice_op.losses
    library = keras.metrics if "Score" in name else keras.losses
    loaded = library.deserialize(saved["config"])
    assert type(loaded) is getattr(module, saved["config"]["class_name"])
    logits, labels = data()
    np.testing.assert_allclose(loaded(labels, logits), saved["value"], rtol=1e-6)
    # What this version saves has the same names and values, and new options besides.
    assert without_new_options(library.serialize(loaded), saved["config"]) == saved["config"]


def test_a_saved_model():
    model = keras.models.load_model(SAVED / "model.keras")
    assert type(model.loss) is dice_op.losses.DiceCELoss
    logits, labels = data()
    np.testing.assert_allclose(model.evaluate(logits, labels, verbose=0), MODEL_VALUES, rtol=1e-6)
