"""What docs/mathematics.md says of data sets in which not every organ is annotated."""

import re
import sys

import keras
import numpy as np
import tensorflow as tf

import dice_op
from helpers.paths import DOCS, EXAMPLES, PACKAGE
from helpers.processes import output_of


def test_label_sets_find_both_organs_and_unknown_as_background_loses_one():
    example = [sys.executable, EXAMPLES / "partial_labels.py", "--epochs", "2"]
    printed = output_of(*example, PYTHONPATH=str(PACKAGE.parent))
    rows = re.findall(r"^(unknown is background|label_sets) +(\S+) +(\S+)$", printed, re.MULTILINE)
    scores = {way: (float(discs), float(rings)) for way, discs, rings in rows}
    assert min(scores["label_sets"]) >= 0.9
    assert scores["unknown is background"][0] < 0.5  # It was below 0.03 with each of three seeds.


def test_the_code_of_the_page_trains_and_its_loss_is_that_of_two_classes():
    rng = np.random.default_rng(0)
    images_a, images_b = rng.normal(size=(2, 3, 8, 8, 1)).astype(np.float32)
    truth_a, truth_b = rng.integers(0, 3, (2, 3, 8, 8)).astype(np.uint8)
    labels_a, labels_b = np.where(truth_a == 1, truth_a, 0), np.where(truth_b == 2, truth_b, 0)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(3, 1)])
    page = (DOCS / "mathematics.md").read_text()
    code = re.search(r"```python\n(# Class 1 is the liver.*?)```", page, re.DOTALL)[1]
    names = {"dice_op": dice_op, "np": np, "model": model}
    names |= {"images_a": images_a, "images_b": images_b}
    exec(code, names | {"labels_a": labels_a, "labels_b": labels_b})

    two_classes = dice_op.losses.DiceCELoss(activation="none", include_background=False)
    for organ, images, labels in ((1, images_a, labels_a), (2, images_b, labels_b)):
        assert set(np.unique(labels)) == {organ, 199 + organ}
        logits = model(images)
        p = tf.nn.softmax(logits)[..., organ]
        wanted = two_classes((labels == organ).astype(np.uint8), tf.stack([1 - p, p], -1))
        np.testing.assert_allclose(model.loss(labels, logits), wanted, rtol=1e-5)
