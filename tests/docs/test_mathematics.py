"""The code in docs/mathematics.md is run, and gives what the page says."""

import re

import numpy as np

from dice_op import core
from dice_op.metrics import DiceScore
from helpers.paths import DOCS


def test_the_code_that_averages_scores_gives_what_the_metric_gives():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (3, 6, 5)).astype(np.uint8)
    labels[0][labels[0] == 3] = 0  # The class is predicted there, but not labelled.
    prediction = rng.integers(0, 4, (3, 6, 5))
    metric = DiceScore()
    metric.update_state(labels, np.eye(4, dtype=np.float32)[prediction])
    page = (DOCS / "mathematics.md").read_text()
    code = re.search(r"```python\n(scores = .*?)```", page, re.DOTALL)[1].strip()
    *statements, result = code.splitlines()
    names = {"core": core, "np": np, "prediction": prediction, "labels": labels}
    exec("\n".join(statements), names)
    np.testing.assert_allclose(metric.result(), eval(result, names), rtol=1e-6)
    assert abs(np.nanmean(names["scores"]["dice"]) - float(metric.result())) > 1e-3
