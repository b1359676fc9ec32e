"""The figures of the documentation are those that the losses give, and show what the guide says.

`python docs/figures.py` draws them again. A file that was drawn before a loss or the script has
changed fails here.
"""

import functools
import importlib.util
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from dice_op import losses
from helpers.paths import DOCS, ROOT

_spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)

SLOW = {"empty_patch_training", "noisy_labels"}
NAMES = [pytest.param(n, marks=pytest.mark.full if n in SLOW else ()) for n in figures.FIGURES]
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
# Adam takes a thousand steps to these, and the last digits of a processor decide on a voxel.
ROUGH = {"empty_patch_training": 0.02, "noisy_labels": 1e-3}


@functools.cache
def computed(name):
    """The data of a figure. No test may change them."""
    return figures.FIGURES[name][0]()


def drawn(name):
    """The digest in a file."""
    root = ET.parse(figures.FOLDER / f"{name}.svg").getroot()
    return json.loads(next(root.iter(DESCRIPTION)).text)


def at(data, name, x, where):
    """The value of a curve at a place."""
    return np.interp(x, data[where], data[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_shows_what_the_losses_give(name):
    found, wanted = drawn(name), figures.digest(computed(name))
    assert found.keys() == wanted.keys()
    for curve, values in wanted.items():
        np.testing.assert_allclose(
            found[curve], values, rtol=ROUGH.get(name, 2e-3), atol=1e-9, err_msg=curve
        )


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_small_and_its_words_are_text(name):
    text = (figures.FOLDER / f"{name}.svg").read_text()
    assert len(text) < 60_000
    assert "<text" in text and "sans-serif" in text
    assert "<dc:date>" not in text  # The same data give the same file.


def test_every_figure_is_on_a_page_and_every_page_has_its_figures():
    named = {}
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]*figures/[^)\s]+\.svg)\)", page.read_text()):
            named.setdefault((page.parent / target).resolve(), page)
    missing = {str(file): str(page) for file, page in named.items() if not file.exists()}
    assert not missing
    files = set(figures.FOLDER.glob("*.svg"))
    assert {file.stem for file in files} == set(figures.FIGURES)
    assert {file.stem for file in files - set(named)} == set()


# --- the same curves in plain NumPy ---------------------------------------------------------------


def test_overlap_is_that_of_the_formulas():
    data = computed("overlap")
    x = data["overlap"]
    true = 950 * x + 50 * (1 - x)
    predicted = true + 950 * (1 - x) + 1e-4 * (18_000 + 1000 * x)
    dice = (2 * true + 1e-5) / (predicted + 1000 + 1e-5)
    jaccard = (2 * true + 1e-5) / (2 * (predicted + 1000 - true) + 1e-5)
    tversky = (true + 1e-5) / (0.3 * predicted + 0.7 * 1000 + 1e-5)
    wanted = {
        "loss Dice": 1 - dice,
        "loss Jaccard": 1 - jaccard,
        "loss Tversky": 1 - tversky,
        "loss focal Tversky": (1 - tversky) ** 2,
        "loss log Dice": -np.log(dice),
        "loss log-cosh Dice": np.log(np.cosh(1 - dice)),
        "gradient Dice": 0.95 * 0.05 * (2 - dice) / (predicted + 1000 + 1e-5),
        "gradient cross-entropy": np.full(50, 0.95 / 20_000),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(data[name], values, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(
        data["loss Dice + CE"], data["loss Dice"] + data["loss cross-entropy"], rtol=1e-12
    )
    assert round(data["gradient log Dice"][0] / data["gradient Dice"][0]) == 17
    assert np.all(np.diff(data["gradient Jaccard"]) > 0)


def test_voxels_of_a_kind_count_as_so_many_voxels():
    """The patches of the figures are given as a voxel of each kind, with their number as weight."""
    counts, labels, p = np.array([7, 3, 20]), np.array([1, 1, 0]), [0.8, 0.1, 0.05]
    logits = figures.two_classes(p)
    for kind in (losses.DiceCELoss, losses.UnifiedFocalLoss, losses.GeneralizedDiceLoss):
        loss = figures.make(kind, {})
        value, gradient = figures.evaluate(loss, labels, logits, [counts])
        each = np.repeat(np.arange(3), counts)
        whole, of_each = figures.evaluate(loss, labels[each], logits[each], np.ones((1, 30)))
        np.testing.assert_allclose(value, whole, rtol=1e-12)
        np.testing.assert_allclose(gradient[:, each], of_each, rtol=1e-9)


def test_an_empty_patch_has_no_gradient_but_with_a_batch_or_a_cross_entropy():
    data = computed("empty_patch")
    p = data["volume"]
    for name, smooth in {"smooth 1e-5": 1e-5, "smooth 1": 1, "smooth 100": 100}.items():
        # The derivative of the logit is 1 / 4, and the mean of two patches takes one half. Far from
        # the false positives, the probability is not quite 0.
        gradient = smooth / (p + smooth) ** 2 / 8
        np.testing.assert_allclose(data[f"loss {name}"], p / (p + smooth), rtol=1e-3)
        np.testing.assert_allclose(data[f"gradient {name}"], gradient, rtol=2e-3, atol=1e-12)
    assert not data['loss absent="skip"'].any() and not data['gradient absent="skip"'].any()
    batch = data["gradient batch=True"]
    assert batch[0] == pytest.approx(at(data, "gradient batch=True", 100, "volume"), rel=0.15)
    assert data["gradient smooth 1"][0] / batch[0] == pytest.approx(1200, rel=0.05)
    assert data["gradient smooth 100"][0] / batch[0] == pytest.approx(12, rel=0.05)
    assert at(data, "gradient smooth 1e-5", 6.31, "volume") == pytest.approx(3e-8, rel=0.1)


def test_object_size_and_rare_lesions():
    data = computed("object_size")
    shares = {n: at(data, f"share {n}", 10, "size") for n in ("cross-entropy", "Dice")}
    assert {name: round(100 * v) for name, v in shares.items()} == {"cross-entropy": 4, "Dice": 49}
    assert at(data, "loss cross-entropy", 10, "size") == pytest.approx(1e-4, rel=0.2)
    assert round(at(data, "loss Dice", 10, "size"), 2) == 0.99
    for name in ("generalized Dice", "unified focal", "Dice + CE"):
        assert np.allclose(data[f"share {name}"], data["share Dice"], atol=0.06)
    assert data["share focal CE"].min() > 0.999
    at_ten_thousand = [at(data, f"share {n}", 1e4, "size") for n in ("cross-entropy", "Dice")]
    assert np.ptp(at_ten_thousand) < 1e-3


def test_the_table_of_tversky_says_what_the_figure_shows():
    data = computed("tversky_tradeoff")
    rows = re.findall(
        r"^\| .*`alpha=(\S+), beta=(\S+)` \| (\S+) \| (\S+) \| (\S+) \|$",
        (DOCS / "which_loss.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 4
    for alpha, beta, *wanted in rows:
        index = np.abs(data["beta"] - float(beta)).argmin()
        assert float(alpha) + float(beta) == pytest.approx(1)
        found = [data[name][index] for name in ("threshold", "recall", "precision")]
        assert [f"{value:.2f}" for value in found] == wanted
    # What is best for a ratio of sums is a threshold, alpha times the best score.
    d = np.arange(0.0005, 40, 0.001)
    p = 1 / (1 + np.exp((d - 10) / 1.5))
    found, predicted = np.cumsum(d**2 * p), np.cumsum(d**2)
    for beta, threshold in zip(data["beta"], data["threshold"], strict=True):
        score = (found / ((1 - beta) * predicted + beta * found[-1])).max()
        assert threshold == pytest.approx((1 - beta) * score, abs=0.01)


def test_soft_labels_are_best_at_p_equals_t_but_for_the_product():
    data = computed("soft_labels")
    t = data["label"]
    for name in ("soft_label", "squared_pred"):
        assert data["way"][data[f"loss {name}"].argmin()] == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(data[f"best {name}"], t, atol=0.02)
    hard = t > 0.38
    np.testing.assert_allclose(data["best product"], hard, atol=0.05)
    best = max(2 * t[t > c].sum() / ((t > c).sum() + t.sum()) for c in t)
    assert round(best / 2, 2) == 0.38


@pytest.mark.full
def test_noisy_labels_fail_where_the_guide_says():
    data = computed("noisy_labels")
    bad = {name: data[name.split(":")[0]][data[name] < 0.5] for name in data if ":" in name}
    for name in ("cross-entropy", "focal CE"):
        assert bad[f"missing: {name}"].min() == pytest.approx(0.5)
        assert not len(bad[f"flipped: {name}"])
    assert bad["flipped: Dice"].min() == pytest.approx(0.1)
    assert bad["flipped: Dice + CE"].min() == pytest.approx(0.425)
    assert bad["missing: both classes + CE"].min() == pytest.approx(0.95)
    failing = {name for name, levels in bad.items() if len(levels)}
    assert failing == {
        "missing: cross-entropy",
        "missing: focal CE",
        "missing: both classes + CE",
        "flipped: Dice",
        "flipped: Dice + CE",
    }


def test_a_wrong_label_pulls_at_a_sure_voxel_unless_the_loss_is_dice():
    data = computed("wrong_voxel")
    middle = len(data["probability"]) // 2
    at_end = {k[9:]: v[-1] / v[middle] for k, v in data.items() if k.startswith("gradient")}
    assert f"{at_end['focal CE']:.1f} {at_end['cross-entropy']:.1f}" == "3.7 2.0"
    assert at_end["Dice"] < 0.1 and at_end["log Dice"] < 0.1
    ends = [data[f"gradient {name}"][-1] for name in ("smoothing 0.1", "cross-entropy")]
    assert round(ends[0] / ends[1], 2) == 0.95
    np.testing.assert_allclose(
        data["gradient cross-entropy"], data["probability"] / 20_000, rtol=1e-6
    )


def test_many_classes():
    data = computed("many_classes")
    row = list(data["present"]).index(24)
    assert [round(data[f"loss {a}"][row], 2) for a in ("keep", "skip")] == [0.78, 0.06]
    ratio = data["gradient keep"] / data["gradient skip"]
    np.testing.assert_allclose(ratio, data["present"] / 104, rtol=0.01)
    np.testing.assert_allclose(data["gradient one"], data["gradient keep"], rtol=0.01)


def test_small_lesions_are_gone_at_low_resolution():
    data = computed("deep_supervision")
    five = list(data["diameter"]).index(5)
    assert [round(100 * data[f"left {r}"][five]) for r in ("1/4", "1/8")] == [85, 10]


def test_generalized_dice_is_that_of_the_lesion():
    data = computed("loss_generalized_dice")
    assert round(at(data, "missed square", 250, "size"), 3) == 0.996
    t = data["size"]
    assert data["half smooth 1e-05"][-1] < 0.05 < data["half smooth 0"][-1]
    np.testing.assert_allclose(
        data["half smooth 1e-05"], 1 - (1 / t + 1e-5) / (1.5 / t + 1e-5), rtol=1e-4
    )


def test_matthews_sees_that_all_is_called_object():
    data = computed("loss_matthews")
    np.testing.assert_allclose(data["everything Matthews"], 1, atol=1e-6)
    share = data["share"]
    np.testing.assert_allclose(data["everything Dice"], 1 - 2 * share / (1 + share), rtol=1e-5)


def test_scores_of_a_larger_and_a_smaller_ball():
    data = computed("scores")
    true = list(data["radius"]).index(10)
    for name in ("Dice", "Jaccard", "Sensitivity", "Precision", "Specificity", "Matthews"):
        assert data[f"radius: {name}"][true] == data[f"shift: {name}"][0] == 1
    assert np.all(data["radius: Sensitivity"][true:] == 1)
    assert np.all(data["radius: Precision"][: true + 1] == 1)
    np.testing.assert_allclose(data["shift: Dice"], data["shift: Sensitivity"], rtol=1e-12)


@pytest.mark.full
def test_the_table_of_empty_patches_says_what_the_training_gives():
    data = computed("empty_patch_training")
    page = (DOCS / "which_loss.md").read_text()
    rows = re.findall(r"^\| (.+?): `(\w+Loss\(.*\))` \| (\S+) \| (\S+) \| (\S+) \|$", page, re.M)
    assert [name for name, *_ in rows] == list(figures.EMPTY_TRAINING)
    for index, (name, code, dice, recall, alarms) in enumerate(rows):
        kind, options = figures.EMPTY_TRAINING[name]
        assert eval(code, vars(losses)).options() == kind(**options).options()
        assert float(dice) == pytest.approx(data["dice"][index], abs=0.015)
        assert float(recall) == pytest.approx(data["recall"][index], abs=0.015)
        assert float(alarms) == pytest.approx(data["false_positives"][index], abs=0.3)
