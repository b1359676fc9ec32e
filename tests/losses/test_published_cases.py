"""The cases that the test suites of other libraries publish: their inputs and expected values.

The suites are those of MONAI 1.6, Keras 3.16, segmentation_models_pytorch 0.5, torchmetrics 1.9,
kornia 0.8 (its weights), DeepReg 0.1 and tensorflow-mri 0.23. None of these libraries is needed
here. `EQUAL` has the cases in which ours gives the published value. `DEVIATIONS` has the others,
each with the reason: there our value is the one that our formula yields, and it is not the
published one. Where a suite states a formula instead of numbers, the tests at the end compute it.

These kinds of cases are left out, because they are no values of the Dice family:

- top-k cross-entropy, clDice, Lovász, Hausdorff and surface distances, and metrics at the best
  threshold, of the top k predictions or of connected components;
- losses of each voxel that no mean is taken of (`reduction="none"` of MONAI's, kornia's and Keras'
  cross-entropies), and weights that differ for the classes of one voxel;
- accuracy, the negative predictive value, and other measures without TP;
- errors about shapes or arguments, tests of configs, dtypes, devices, TorchScript and training,
  orders ("a good prediction has the smaller loss"), labels that are NaN, and predicted indices that
  are no class (ours come as one score for each class);
- cases whose inputs only PyTorch's generator draws, if no formula stands beside them, and volumes
  that are large to show that a counter in float32 is too small.
"""

import itertools
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import DiceSums, dice_sums, formulas, losses, metrics
from helpers.reference import flat, log_softmax, one_hot

pytestmark = pytest.mark.usefixtures("operation_by_operation")

nan = float("nan")


class Data(typing.NamedTuple):
    """Predictions, labels and weights of a batch."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None = None


class Case(typing.NamedTuple):
    """A published value, and what computes it here.

    A value may differ by half a unit of the last of its published digits, which stand after the
    point, or by the suite's own relative tolerance, `rtol`, which is at most 1e-4.
    """

    ours: typing.Callable[[Data], typing.Any]
    data: Data
    published: typing.Any
    rtol: float = 1e-5
    digits: int = 6
    # What `published` stands for, by the suite's formula, where the suite has cut off digits and
    # not rounded them, or calls a small number 0. The two differ by a unit of the last digit.
    exact: typing.Any = None


class Deviation(typing.NamedTuple):
    """A published value that is not ours."""

    case: Case
    gives: typing.Any  # our formula's value, or the class of our error
    theirs: typing.Callable[[Data], typing.Any] | None  # how ours makes the published value
    reason: str


def data(x, y, weight=None):
    return Data(*(None if v is None else np.array(v, np.float32) for v in (x, y, weight)))


def of(name, **options):
    """The value of one of our losses; or of our metrics, after one batch, or a list of batches."""

    def value(batches):
        if not hasattr(metrics, name):
            return getattr(losses, name)(**options)(batches.y, batches.x, batches.weight)
        metric = getattr(metrics, name)(**options)
        for batch in batches if isinstance(batches, list) else [batches]:
            metric.update_state(batch.y, batch.x, batch.weight)
        return metric.result()

    return value


def first(name, **options):
    """The same with the channels first, as PyTorch has them."""
    return of(name, data_format="channels_first", **options)


def by_sample(value):
    """Of each sample alone: an axis more."""
    return lambda d: np.stack([value(Data(d.x[n, None], d.y[n, None])) for n in range(len(d.x))])


def then(value, function):
    """What a suite makes of our value."""
    return lambda d: function(np.asarray(value(d)))


def total(*values):
    """The sum of values. Each may be a tuple: its weight and the value."""
    pairs = [v if isinstance(v, tuple) else (1, v) for v in values]
    return lambda d: sum(weight * np.asarray(value(d)) for weight, value in pairs)


def one_minus(value):
    return then(value, lambda v: 1 - v)


def picked(value, classes):
    """Of these classes alone."""
    return then(value, lambda v: v[classes])


def by_formula(name, **options):
    """A loss by its formula over sums that NumPy adds up, also where they are of no probabilities.

    The channels are first.
    """

    def value(d):
        p = flat(np.moveaxis(d.x.astype(np.float64), 1, -1))
        y = np.moveaxis(d.y, 1, -1)
        t = flat(y if d.y.shape == d.x.shape else one_hot(y[..., 0], d.x.shape[1]))
        voxels = np.full(len(p), p.shape[1], np.float64)
        found = {"intersection": (p * t).sum(1), "pred_sum": p.sum(1), "label_sum": t.sum(1)}
        found["weight_sum"] = voxels
        sums = DiceSums(
            *(tf.constant(found[n], tf.float64) if n in found else None for n in DiceSums._fields)
        )
        loss = getattr(losses, name)(activation="none", **options)
        sums = formulas.over_batch(sums) if loss.batch else sums
        return tf.reduce_mean(loss.from_sums(sums))

    return value


def agree(got, expected, rtol, atol):
    """Whether shapes and values are equal. NaN equals NaN."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return False
    size = np.abs(np.where(np.isfinite(expected), expected, 0))
    near = np.abs(got - expected) <= np.maximum(atol, rtol * size)
    return (near | (np.isnan(got) & np.isnan(expected))).all()


def tolerance(case):
    return {"rtol": case.rtol, "atol": 0.5 * 10.0**-case.digits}


def assert_published(got, case):
    if case.exact is None:
        assert agree(got, case.published, **tolerance(case)), (got, case.published)
    else:
        assert agree(case.exact, case.published, rtol=0, atol=10.0**-case.digits)
        assert agree(got, case.exact, rtol=1e-5, atol=5e-7), (got, case.exact)


def smooth(number):
    return {"smooth_nr": number, "smooth_dr": number}


# --- MONAI: losses --------------------------------------------------------------------------------

SIGMOID, NONE = {"activation": "sigmoid"}, {"activation": "none"}
EACH = {"average": "none", "reduction": None}  # MONAI's reduction="none"
ALL = {"average": "none", "reduction": "sum"}
FOREGROUND = {"include_background": False}

CROSS = [[1, -1], [-1, 1]]
ONE = data([[CROSS]], [[[[1, 0], [1, 1]]]])
TWO = data([[CROSS], [CROSS]], [[[[1, 1], [1, 1]]], [[[1, 0], [1, 0]]]])
TWO_WITH_0 = TWO._replace(x=np.array([[[[1, 0], [-1, 1]]], [CROSS]], np.float32))
FRACTIONS = data(*[[[[[0.3, 0.4], [0.7, 0.9]]], [[[1, 0.1], [0.5, 0.3]]]]] * 2)
RIGHT_X = [[[1, 1, 0], [0, 0, 1]], [[1, 0, 1], [0, 1, 0]]]
RIGHT = data(RIGHT_X, [[[0, 0, 1]], [[0, 1, 0]]])
RIGHT_ONE_HOT = data(RIGHT_X, RIGHT_X)
RIGHT_AND_SURE = data([[[100, 100, 0], [0, 0, 1]], RIGHT_X[1]], RIGHT.y)
LINE = data([[[-1, 0, 1], [1, 0, -1]], [[0, 0, 0], [0, 0, 0]]], [[[1, 0, 0]], [[1, 1, 0]]])
FLAT = data([[[0, 10, 10, 10], [10, 0, 0, 0]]], [[[1, 1, 0, 0]]])
DIAGONAL = data(*[[[[[1, 0], [0, 1]]]]] * 2)
INVERTED = data([[[[0, 1], [1, 0]]]], DIAGONAL.y)
RAMP = data([[[[1, 1], [0.5, 0]]] * 3], [[[[0, 1], [2, 0]]]])
ONES, ZEROS = np.ones((1, 1, 3, 3), np.float32), np.zeros((1, 1, 3, 3), np.float32)

MONAI_DICE = {
    "sigmoid": Case(first("DiceLoss", **SIGMOID, **smooth(1e-6)), ONE, 0.307576),
    "two samples": Case(first("DiceLoss", **SIGMOID, **smooth(1e-4)), TWO, 0.416657),
    "soft label": Case(first("DiceLoss", **NONE, soft_label=True, **smooth(1e-4)), FRACTIONS, 0.0),
    "no soft label": Case(first("DiceLoss", **NONE, **smooth(1e-4)), FRACTIONS, 0.307773),
    "no background": Case(first("DiceLoss", **NONE, **FOREGROUND, **smooth(0)), RIGHT, 0.0),
    "two classes": Case(first("DiceLoss", **SIGMOID, **smooth(1e-4)), LINE, 0.435050),
    "no reduction": Case(
        first("DiceLoss", **SIGMOID, **EACH, **smooth(1e-4)),
        LINE,
        [[0.296529, 0.415136], [0.599976, 0.428559]],
    ),
    "softmax": Case(first("DiceLoss", **smooth(1e-4)), LINE, 0.383713),
    "softmax, sum": Case(first("DiceLoss", **ALL, **smooth(1e-4)), LINE, 1.534853),
    "squared": Case(first("DiceLoss", **SIGMOID, squared_pred=True), ONE, 0.178337),
    "Jaccard": Case(first("DiceLoss", **SIGMOID, jaccard=True), ONE, 0.470451),
}
MASK_OF_RIGHT = np.array([[1, 1, 1], [0, 1, 0]], np.float32)
MONAI_MASKED_DICE = {
    "no background": Case(
        first("DiceLoss", **NONE, **FOREGROUND, **smooth(0)),
        RIGHT._replace(weight=MASK_OF_RIGHT),
        0.0,
    ),
    **{
        f"no mask, {name}": MONAI_DICE[name]
        for name in ("sigmoid", "no reduction", "softmax", "softmax, sum", "squared", "Jaccard")
    },
}
MONAI_GENERALIZED = {
    "sigmoid": Case(first("GeneralizedDiceLoss", **SIGMOID, **smooth(1e-6)), ONE, 0.307576),
    "two samples": Case(first("GeneralizedDiceLoss", **SIGMOID, **smooth(1e-4)), TWO, 0.416597),
    "soft label": Case(
        first("GeneralizedDiceLoss", **NONE, soft_label=True, **smooth(1e-4)), FRACTIONS, 0.0
    ),
    "no soft label": Case(
        first("GeneralizedDiceLoss", **NONE, **smooth(1e-4)), FRACTIONS, 0.307748
    ),
    "no background": Case(
        first("GeneralizedDiceLoss", **NONE, **FOREGROUND, **smooth(0)), RIGHT, 0.0
    ),
    "two classes": Case(first("GeneralizedDiceLoss", **SIGMOID, **smooth(1e-4)), LINE, 0.469964),
    "softmax": Case(first("GeneralizedDiceLoss", **smooth(1e-4)), LINE, 0.414507),
    "sum": Case(first("GeneralizedDiceLoss", reduction="sum", **smooth(1e-4)), LINE, 0.829015),
    "no reduction": Case(
        first("GeneralizedDiceLoss", reduction=None, **smooth(1e-4)), LINE, [0.273476, 0.555539]
    ),
    "no foreground": Case(
        first("GeneralizedDiceLoss", **NONE, **FOREGROUND, **smooth(1e-8)),
        RIGHT._replace(y=0 * RIGHT.y),
        0.0,
    ),
    "simple": Case(first("GeneralizedDiceLoss", weight_type="simple"), FLAT, 0.250023),
}
MONAI_TVERSKY = {
    "sigmoid": Case(first("TverskyLoss", **SIGMOID, **smooth(1e-6)), ONE, 0.307576),
    "two samples": Case(first("TverskyLoss", **SIGMOID, **smooth(1e-4)), TWO, 0.416657),
    "soft label": Case(
        first("TverskyLoss", **NONE, soft_label=True, **smooth(1e-4)), FRACTIONS, 0.0
    ),
    "no soft label": Case(first("TverskyLoss", **NONE, **smooth(1e-4)), FRACTIONS, 0.307773),
    "no background": Case(first("TverskyLoss", **NONE, **FOREGROUND, **smooth(0)), RIGHT, 0.0),
    "smooth_dr alone": Case(
        first("TverskyLoss", **NONE, **FOREGROUND, smooth_nr=0, smooth_dr=1e-3), RIGHT, 0.000999
    ),
    "two classes": Case(first("TverskyLoss", **SIGMOID, **smooth(1e-4)), LINE, 0.435050),
    "batch": Case(first("TverskyLoss", **SIGMOID, batch=True), LINE, 0.422979),
    "sum": Case(first("TverskyLoss", **SIGMOID, **ALL, **smooth(1e-4)), LINE, 1.74013, digits=5),
    "softmax": Case(first("TverskyLoss", **smooth(1e-4)), LINE, 0.383713),
    "no reduction": Case(
        first("TverskyLoss", **EACH, **smooth(1e-4)),
        LINE,
        [[0.210961, 0.295339], [0.599952, 0.428547]],
    ),
    "recall": Case(
        first("TverskyLoss", **SIGMOID, alpha=0.3, beta=0.7, **smooth(1e-6)), ONE, 0.3589, digits=4
    ),
    "precision": Case(
        first("TverskyLoss", **SIGMOID, alpha=0.7, beta=0.3, **smooth(1e-6)), ONE, 0.247366
    ),
}
MONAI_MCC = {
    "sigmoid": Case(first("MatthewsLoss", **SIGMOID), ONE, 0.733197),
    "two samples": Case(first("MatthewsLoss", **SIGMOID), TWO, 1.0),
    "perfect": Case(first("MatthewsLoss", **NONE), DIAGONAL, 0.0),
    "inverted": Case(first("MatthewsLoss", **NONE), INVERTED, 2.0),
    "no background": Case(first("MatthewsLoss", **NONE, **FOREGROUND), RIGHT, 0.0),
    "two classes": Case(first("MatthewsLoss", **SIGMOID), LINE, 0.836617),
    "batch": Case(first("MatthewsLoss", **SIGMOID, batch=True), LINE, 0.845961),
    "sum": Case(first("MatthewsLoss", **SIGMOID, **ALL), LINE, 3.346468),
    "softmax": Case(first("MatthewsLoss"), LINE, 0.730736),
    "no reduction": Case(first("MatthewsLoss", **EACH), LINE, [[0.461472, 0.461472], [1.0, 1.0]]),
    "all ones": Case(first("MatthewsLoss", **NONE), Data(ONES, ONES), 0.0),
    "all zeros": Case(first("MatthewsLoss", **NONE), Data(ZEROS, ZEROS), 0.0),
}


def focal(**options):
    return first("DiceFocalLoss", lambda_dice=0, **options)


def sure_of(labels, classes, logit, depth=()):
    """Logits of one sample that are very sure of the right class."""
    y = np.broadcast_to(labels, (1, *depth, 4, 4))
    return data(np.moveaxis(logit * (2 * one_hot(y, classes) - 1), -1, 1), y)


MIDDLE = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
FOUR = [[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]]
SURE = {
    "2D": sure_of(MIDDLE, 2, 50),
    "empty class": sure_of(0, 2, 500),
    "six classes": sure_of(FOUR, 6, 500),
    "3D": sure_of(MIDDLE, 2, 500, depth=(3,)),
}


def hot_labels(d):
    """The same with one-hot labels."""
    return d._replace(y=np.moveaxis(one_hot(d.y, d.x.shape[1]), -1, 1).astype(np.float32))


def lone_voxel():
    """MONAI's test_foreground: all background, but for one voxel that is labelled foreground."""
    x = np.stack([np.ones((1, 5, 5)), np.zeros((1, 5, 5))], 1)
    y = x.copy()
    y[0, :, 2, 2] = [0, 1]
    return data(x, y)


RAMP_INDICES = RAMP._replace(y=RAMP.y[:, 0])
MONAI_FOCAL = {
    "sigmoid": Case(focal(**SIGMOID), RAMP, 0.34959, digits=5),
    "one-hot labels": Case(focal(**SIGMOID), hot_labels(RAMP_INDICES), 0.34959, digits=5),
    "no background": Case(focal(**SIGMOID, ce_class_weight=[0, 1, 1]), RAMP, 0.36498, digits=5),
    # MONAI's mean is over the classes as well.
    "softmax": Case(focal(lambda_ce=1 / 3), RAMP, 0.16276, digits=5),
    "sigmoid, alpha 0.8": Case(focal(**SIGMOID, focal_alpha=0.8), RAMP, 0.08423, digits=5),
    # MONAI's alpha of a softmax is a weight of each class. Its mean is over voxels and classes, and
    # ours divides by the weights of the labels 0, 1, 2, 0, whose mean is 0.5.
    "softmax, alpha 0.8": Case(
        then(focal(ce_class_weight=[0.2, 0.8, 0.8]), lambda v: v * 0.5 / 3),
        RAMP,
        0.08138,
        digits=5,
    ),
    **{
        f"right and sure, {name}, alpha 0.5": Case(focal(**SIGMOID, focal_alpha=0.5), d, 0.0)
        for name, d in SURE.items()
    },
    "foreground and background": Case(focal(**SIGMOID), lone_voxel(), 0.1116, digits=4),
    "foreground alone": Case(
        focal(**SIGMOID, ce_class_weight=[0, 1]), lone_voxel(), 0.1733, digits=4
    ),
    **{
        f"right and sure, {name}, {activation}, {kind}": Case(
            focal(activation=activation), d if kind == "indices" else hot_labels(d), 0.0
        )
        for name, d in SURE.items()
        for activation in ("softmax", "sigmoid")
        for kind in (("indices", "one-hot") if name in ("six classes", "3D") else ("indices",))
    },
}

MONAI_CROSS_ENTROPY = {
    "DiceCELoss, weight 0.5 of the one class": Case(
        first("DiceCELoss", **SIGMOID, pos_weight=0.5),
        data([[[0.8, 0.6, 0.0]], [[0.0, 0.0, 0.9]]], [[[0, 0, 1]], [[0, 1, 0]]]),
        1.445239,
    ),
}

# The suite of MONAI's DeepSupervisionLoss has logits of one volume at three resolutions, and
# MONAI takes the labels of the smaller ones from the large ones.
SIZES = [
    data([RIGHT_X], [[[[1, 0, 1], [0, 1, 0]]]]),
    data([[[[1, 1], [0, 0]], [[1, 0], [0, 1]]]], [[[[1, 1], [0, 0]]]]),
    data([[[[1], [0]], [[1], [0]]]], [[[[0], [1]]]]),
]


def of_sizes(value, weights):
    """The weighted sum over the resolutions."""
    return lambda sizes: sum(w * np.asarray(value(d)) for w, d in zip(weights, sizes, strict=True))


EXPONENTIAL = (1, 0.5, 0.25)
RAW_DICE = first("DiceLoss", **NONE)
MONAI_SIZES = {
    "Dice, one resolution": Case(RAW_DICE, SIZES[0], 0.166666),
    "Dice": Case(of_sizes(RAW_DICE, EXPONENTIAL), SIZES, 0.666665),
}


# --- MONAI: metrics -------------------------------------------------------------------------------

HARD = {"prediction": "threshold", "from_logits": False}


def score(name, **options):
    return first(name, **HARD, **options)


def scores(name, **options):
    """The scores of each sample and class, `[N, C]`."""
    return by_sample(score(name, average="none", **options))


def summed(value):
    """Over the samples, without those that do not count."""
    return then(value, lambda v: np.nansum(v, 0))


SMALL = data([[[[1, 0], [0, 1]]]], [[[[1, 0], [1, 1]]]])
THREE_CLASSES = data(
    [
        [[[0, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 0], [0, 0]]],
        [[[0, 0], [0, 1]], [[1, 0], [0, 0]], [[0, 1], [1, 0]]],
    ],
    [
        [[[0, 0], [0, 1]], [[1, 0], [1, 0]], [[0, 1], [0, 0]]],
        [[[0, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 0], [1, 0]]],
    ],
)
O2, I2 = [[0, 0], [0, 0]], [[1, 1], [1, 1]]
LAST_EVERYWHERE = data(
    [[O2, O2, I2], [O2, O2, I2]], [[I2, O2, O2], [[[0, 1], [1, 0]], [[1, 0], [0, 1]], O2]]
)
OVERLAPPING_X = [
    [[[1, 1], [1, 0]], [[0, 1], [0, 0]], [[0, 1], [1, 1]]],
    [[[1, 0], [1, 1]], [[0, 1], [1, 1]], [[0, 1], [1, 0]]],
]
OVERLAPPING = data(
    OVERLAPPING_X, [[I2, O2, O2], [[[0, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 0], [1, 0]]]]
)
BACKGROUND_ALONE = data(OVERLAPPING_X, [[I2, O2, O2], [I2, O2, O2]])
WITH_AND_WITHOUT = data(
    [THREE_CLASSES.x[0], *LAST_EVERYWHERE.x], [THREE_CLASSES.y[0], *LAST_EVERYWHERE.y]
)
BOTH_ONES = Data(*[np.ones((2, 2, 3, 3), np.float32)] * 2)
BOTH_ZEROS = Data(*[np.zeros((2, 2, 3, 3), np.float32)] * 2)
FALSE_ONES = Data(BOTH_ONES.x, BOTH_ZEROS.y)
MISSED_ONES = Data(BOTH_ZEROS.x, BOTH_ONES.y)
ALL_1, ALL_0 = np.ones((2, 2)), np.zeros((2, 2))
# Two batches of two samples, as MONAI's handlers get them.
STEPS = [
    data([[[0], [1]], [[1], [0]]], [[[0], [1]], [[0], [1]]]),
    data([[[0], [1]], [[1], [0]]], [[[0], [1]], [[1], [0]]]),
]
STEPS_TOGETHER = Data(*(np.concatenate([getattr(s, k) for s in STEPS]) for k in ("x", "y")))

# The data, options, Dice and Jaccard of each case.
OVERLAPS = {
    "one class": (SMALL, {}, [[0.8]], [[0.6667]]),
    "no background": (
        THREE_CLASSES, FOREGROUND, [[0.5, 0.0], [0.6667, 0.6667]], [[0.3333, 0.0], [0.5, 0.5]],
    ),
    "ones": (BOTH_ONES, {}, ALL_1, ALL_1),
    "zeros": (BOTH_ZEROS, {"absent": "keep"}, ALL_1, ALL_1),
    "ones, none right": (FALSE_ONES, {"absent": "keep"}, ALL_0, ALL_0),
}  # fmt: skip
MONAI_OVERLAPS = {}
for place, name, theirs in ((2, "DiceScore", "DiceMetric"), (3, "JaccardScore", "MeanIoU")):
    dice = place == 2
    for label, row in OVERLAPS.items():
        MONAI_OVERLAPS[f"{theirs}, {label}"] = Case(
            scores(name, **row[1]), row[0], row[place], digits=4
        )
    MONAI_OVERLAPS |= {
        f"{theirs}, which are NaN": Case(
            then(scores(name), np.isnan),
            LAST_EVERYWHERE,
            [[False, True, True], [False, False, True]],
        ),
        f"{theirs}, mean_batch": Case(
            score(name, average="none"),
            OVERLAPPING,
            [0.6786, 0.4, 0.6667] if dice else [0.5416, 0.25, 0.5],
            digits=4,
            exact=None if dice else [13 / 24, 0.25, 0.5],
        ),
        f"{theirs}, sum_batch": Case(
            summed(scores(name)),
            BACKGROUND_ALONE,
            [1.7143, 0.0, 0.0] if dice else [1.5, 0.0, 0.0],
            digits=4,
        ),
        f"{theirs}, mean": Case(score(name), BACKGROUND_ALONE, 0.857143 if dice else 0.75),
        f"{theirs}, sum_batch without background": Case(
            summed(scores(name, **FOREGROUND)), BACKGROUND_ALONE, [0.0, 0.0]
        ),
        f"handler of {theirs}, no background": Case(
            score(name, **FOREGROUND), STEPS, 0.66666, rtol=1e-4, digits=5
        ),
        f"handler of {theirs}, mean_channel": Case(
            by_sample(score(name)), STEPS_TOGETHER, [1.0, 0.0, 1.0, 1.0]
        ),
    }
MONAI_OVERLAPS["DiceMetric, mean_batch without background"] = Case(
    score("DiceScore", average="none", **FOREGROUND), OVERLAPPING, [0.4, 0.6667], digits=4
)


def generalized(**options):
    """Our loss of hard predictions is 1 - the generalized Dice score."""
    return one_minus(first("GeneralizedDiceLoss", **NONE, **options))


ELEVENTHS = [0.545455, 0.545455]
OF_CLASSES = [[0.857143, 0.0, 0.0], [0.5, 0.4, 0.666667]]
MONAI_SCORES = {
    **MONAI_OVERLAPS,
    "GeneralizedDiceScore, one class": Case(generalized(), SMALL, 0.8),
    "GeneralizedDiceScore, no background": Case(
        score("DiceScore", average="none", absent="keep", **FOREGROUND),
        THREE_CLASSES,
        [0.583333, 0.333333],
    ),
    "GeneralizedDiceScore, mean": Case(generalized(), OVERLAPPING, 0.5454, digits=4, exact=6 / 11),
    "GeneralizedDiceScore, sum": Case(
        then(generalized(reduction=None), np.sum), BACKGROUND_ALONE, 1.045455
    ),
    **{
        f"GeneralizedDiceScore, {label}": Case(scores("DiceScore", absent="keep"), d, expected)
        for label, d, expected in (
            ("ones", BOTH_ONES, ALL_1),
            ("ones, none right", FALSE_ONES, ALL_0),
            ("ones, none found", MISSED_ONES, ALL_0),
            ("zeros", BOTH_ZEROS, ALL_1),
            ("of classes", OVERLAPPING, OF_CLASSES),
        )
    },
    "GeneralizedDiceScore, mean_batch": Case(
        score("DiceScore", average="none", absent="keep"), OVERLAPPING, np.mean(OF_CLASSES, 0)
    ),
    "GeneralizedDiceScore, mean_channel": Case(generalized(reduction=None), OVERLAPPING, ELEVENTHS),
    "GeneralizedDiceScore, sum_over_classes": Case(
        generalized(reduction=None), OVERLAPPING, ELEVENTHS
    ),
}

# Of ConfusionMatrixMetric: our metric, what is made of it, the values of the classes, their mean.
RATES = {
    "tpr": ("Sensitivity", None, [0.5, 0.5, 0.5], 0.5),
    "fnr": ("Sensitivity", one_minus, [0.5, 0.5, 0.5], 0.5),
    "tnr": ("Specificity", None, [0.8333, 0.75, 0.6667], 0.75),
    "fpr": ("Specificity", one_minus, [0.1667, 0.25, 0.3333], 0.25),
    "ppv": ("Precision", None, [0.5, 0.75, 0.25], 0.5),
    "fdr": ("Precision", one_minus, [0.5, 0.25, 0.75], 0.5),
    "ts": ("JaccardScore", None, [0.5, 0.4167, 0.25], 0.3889),
    "f1": ("DiceScore", None, [0.5, 0.5833, 0.3333], 0.4722),
    "mcc": ("Matthews", None, [0.3333, 0.2887, 0.1220], 0.2480),
}
MONAI_RATES = {}
for label, (name, change, of_classes, mean) in RATES.items():
    for reduction, average, expected in (
        ("mean_batch", "none", of_classes), ("mean", "macro", mean),
    ):  # fmt: skip
        value = score(name, average=average)
        MONAI_RATES[f"ConfusionMatrixMetric, {label}, {reduction}"] = Case(
            change(value) if change else value, THREE_CLASSES, expected, digits=4
        )
for label, share, of_classes, mean in (
    ("balanced accuracy", 0.5, [0.6667, 0.6250, 0.5833], 0.6250),
    ("informedness + 1", 1.0, np.array([0.3333, 0.2500, 0.1667]) + 1, 0.2500 + 1),
):
    for average, expected in (("none", of_classes), ("macro", mean)):
        MONAI_RATES[f"ConfusionMatrixMetric, {label}, {average}"] = Case(
            total(*((share, score(n, average=average)) for n in ("Sensitivity", "Specificity"))),
            THREE_CLASSES,
            expected,
            digits=4,
        )


def counts(d):
    """TP, FP, TN and FN of each sample and class."""
    sums = dice_sums(d.y, d.x, activation="threshold", threshold=0.5, data_format="channels_first")
    i, p, t, m = (np.array(s) for s in (*sums[:3], sums.weight_sum[:, None]))
    return np.stack([i, p - i, m - p - t + i, t - i], -1)


PERFECT_AND_HALF = [
    Data(THREE_CLASSES.x, THREE_CLASSES.x),
    data([[[[0, 1], [1, 0]], [[1, 0], [1, 1]], [[0, 1], [0, 0]]]], np.ones((1, 3, 2, 2))),
]
MONAI_RATES |= {
    "confusion matrix": Case(
        counts,
        THREE_CLASSES,
        [
            [[0, 1, 2, 1], [1, 1, 1, 1], [0, 1, 2, 1]],
            [[1, 0, 3, 0], [1, 0, 2, 1], [1, 1, 2, 0]],
        ],
    ),
    "confusion matrix, no background": Case(
        lambda d: counts(d)[:, 1:],
        THREE_CLASSES,
        [[[1, 1, 1, 1], [0, 1, 2, 1]], [[1, 0, 2, 1], [1, 1, 2, 0]]],
    ),
    "confusion matrix of a classification": Case(
        counts,
        data([[[1], [0], [0]], [[0], [0], [1]]], [[[1], [0], [0]], [[0], [1], [0]]]),
        [
            [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
            [[0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]],
        ],
    ),
    "ConfusionMatrixMetric, tpr, sum_batch, classes without voxels": Case(
        summed(scores("Sensitivity")), WITH_AND_WITHOUT, [0.0, 0.5, 0.0]
    ),
    "ConfusionMatrixMetric, tpr, how many count": Case(
        then(scores("Sensitivity"), lambda v: (~np.isnan(v)).sum(0)), WITH_AND_WITHOUT, [3, 2, 1]
    ),
    "ConfusionMatrixMetric, tpr, sum, classes without voxels": Case(
        then(scores("Sensitivity"), np.nansum), WITH_AND_WITHOUT, 0.5
    ),
    "handler of ConfusionMatrix, f1": Case(
        score("DiceScore", over="dataset", average="micro"), STEPS, 0.75
    ),
    "handler of ConfusionMatrix, ppv": Case(
        score("Precision", over="dataset", **FOREGROUND), STEPS, 1.0
    ),
    "handler of ConfusionMatrix, f1, mean_batch": Case(
        score("DiceScore", over="dataset", average="none"), STEPS, [0.6667, 0.8], digits=4
    ),
    "handler of ConfusionMatrix, tpr": Case(
        score("Sensitivity", over="dataset", average="micro"), PERFECT_AND_HALF, 0.7
    ),
}


def f_beta(beta, **options):
    """F-beta is the Tversky index with these weights."""
    weights = {"alpha": 1 / (1 + beta**2), "beta": beta**2 / (1 + beta**2)}
    return of("TverskyScore", over="dataset", absent="keep", **weights, **options)


def rows(x, y, weight=None):
    """Samples of one voxel, from `[N, C]`."""
    return data(np.array(x)[:, None], np.array(y)[:, None], weight)


JOINTLY = {**HARD, "average": "micro"}
STRIPES = rows(np.ones((3, 3)), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
MONAI_F_BETA = {
    "FBetaScore, 1": Case(f_beta(1, **JOINTLY), STRIPES, 0.714286),
    "FBetaScore, 0.5": Case(f_beta(0.5, **JOINTLY), STRIPES, 0.609756),
    "FBetaScore, 2": Case(f_beta(2, **JOINTLY), STRIPES, 0.862069),
    "FBetaScore, nothing labelled": Case(
        f_beta(2, **JOINTLY), rows(np.ones((3, 3)), np.zeros((3, 3))), 0.0
    ),
    "FBetaScore, no background": Case(
        f_beta(1, **JOINTLY, **FOREGROUND), rows(np.ones((3, 4)), [[0, 1, 1, 1]] * 3), 1.0
    ),
}
SQUARE = np.pad(np.ones((2, 2), np.int64), 1)
FLAT_DISTANCES = [[0.0, 1.0], [1.0, 0.0]]


def wasserstein(labels, good, mode):
    logits = 1000 * np.eye(2, dtype=np.float32)[labels if good else 1 - labels]
    return Case(
        of("GeneralizedWassersteinDiceLoss", dist_matrix=FLAT_DISTANCES, weighting_mode=mode),
        data(logits[None], labels[None]),
        0.0 if good else 1.0,
        digits=3,
    )


MONAI_WASSERSTEIN = {
    f"{shape}, {'good' if good else 'poor'}, {mode}": wasserstein(labels, good, mode)
    for shape, labels in (
        ("square", SQUARE),
        ("empty", 0 * SQUARE),
        ("three planes", np.stack([SQUARE] * 3)),
    )
    for good in (True, False)
    for mode in ("default", "GDL")
}
MONAI = {
    **{f"DiceLoss, {k}": c for k, c in MONAI_DICE.items()},
    **{f"MaskedDiceLoss, {k}": c for k, c in MONAI_MASKED_DICE.items()},
    **{f"GeneralizedDiceLoss, {k}": c for k, c in MONAI_GENERALIZED.items()},
    **{f"GeneralizedWassersteinDiceLoss, {k}": c for k, c in MONAI_WASSERSTEIN.items()},
    **{f"TverskyLoss, {k}": c._replace(rtol=1e-4) for k, c in MONAI_TVERSKY.items()},
    **{f"MCCLoss, {k}": c._replace(rtol=1e-4) for k, c in MONAI_MCC.items()},
    **{f"FocalLoss, {k}": c._replace(rtol=1e-4) for k, c in MONAI_FOCAL.items()},
    **{k: c._replace(rtol=1e-4) for k, c in MONAI_CROSS_ENTROPY.items()},
    **{f"DeepSupervisionLoss, {k}": c for k, c in MONAI_SIZES.items()},
    **MONAI_SCORES,
    **MONAI_RATES,
    **MONAI_F_BETA,
}

# --- Keras ----------------------------------------------------------------------------------------

TOGETHER = {**NONE, "average": "micro", "batch": True, "smooth_nr": 0, "smooth_dr": 1e-7}
EACH_SAMPLE = {**NONE, "reduction": None, "smooth_nr": 0, "smooth_dr": 1e-7}
LARGE_NUMBERS = data([[[4, 1], [6, 1]]], [[[1, 2], [1, 2]]])
CHECKS = rows([[0, 1, 0, 1], [1, 0, 1, 1]] * 2, [[1, 0, 1, 0], [0, 1, 0, 1]] * 2)
MASKS = data(
    [[[[0], [1]], [[0], [1]]], [[[0.4], [0]], [[0], [0.9]]]], [[[[1], [1]], [[0], [0]]]] * 2
)
RECALL = {"alpha": 0.2, "beta": 0.8}  # Keras means the same from 3.16 on
KERAS_OVERLAP = {
    "Dice, binary": Case(of("DiceLoss", **TOGETHER), CHECKS, 0.77777773),
    "Dice, binary, axis": Case(of("DiceLoss", **EACH_SAMPLE), MASKS, [0.5, 0.75757575]),
    "Tversky, binary": Case(of("TverskyLoss", **TOGETHER), CHECKS, 0.77777779),
    "Tversky, binary, axis": Case(of("TverskyLoss", **EACH_SAMPLE), MASKS, [0.5, 0.75757575]),
    "Tversky, coefficients": Case(of("TverskyLoss", **TOGETHER, **RECALL), CHECKS, 0.76190472),
    "Tversky, coefficients, axis": Case(
        of("TverskyLoss", **EACH_SAMPLE, **RECALL), MASKS, [0.5, 0.78494626]
    ),
}


def binary(gamma, **options):
    return of("DiceFocalLoss", **SIGMOID, lambda_dice=0, focal_gamma=gamma, **options)


def categorical(**options):
    return of("DiceFocalLoss", lambda_dice=0, lambda_ce=0.25, **options)


def logits(p):
    return np.log(np.array(p) / (1 - np.array(p)))


def focal_terms(p, gamma):
    """The focal cross-entropy of each element, whose right answer has the probability p."""
    return -((1 - np.array(p)) ** gamma) * np.log(p)


UNIT = np.eye(3)
# Keras gets the probabilities 0.9, 0.8, 0.7, 0.2.
PROBABLE = rows(logits([[0.9, 0.8], [0.7, 0.2]]), [[1, 0], [1, 0]])
OF_PROBABLE = focal_terms([[0.9, 0.2], [0.7, 0.8]], 2).mean(1)
LOGITS = rows([[1.5, -2.7, 2.9], [-3.8, 1.2, -4.5]], [[1, 1, 0], [0, 1, 0]])
SIGNED = np.array([[1.5, -2.7, -2.9], [3.8, 1.2, 4.5]])
OF_LOGITS = focal_terms(1 / (1 + np.exp(-SIGNED)), 3).mean(1)
TWO_WEIGHTS = np.array([1.2, 3.4], np.float32)
CATEGORIES = rows([[8, 1, 1], [0, 9, 1], [2, 3, 5]], UNIT)
OF_CATEGORIES = 0.25 * focal_terms(np.exp(np.diag(log_softmax(CATEGORIES.x[:, 0]))), 2)
THREE_WEIGHTS = np.array([1.2, 3.4, 5.6], np.float32)
# Rows that do not add up to 1, which Keras divides by their sums.
UNNORMALISED = rows([[0.9, 0.05, 0.05], [0.5, 0.89, 0.6], [0.05, 0.01, 0.94]], UNIT)
NORMALISED = UNNORMALISED._replace(x=UNNORMALISED.x / UNNORMALISED.x.sum(-1, keepdims=True))
OF_NORMALISED = 0.25 * focal_terms(np.diag(NORMALISED.x[:, 0].astype(float)), 2)
SMOOTHED = data([[[0.8, 0.1], [0.1, 0.8], [0.1, 0.1]], [[0.1, 0.8], [0.8, 0.1], [0.1, 0.1]]],
                [[[1, 0], [0, 1], [0, 0]], [[0, 1], [1, 0], [0, 0]]])  # fmt: skip
SMOOTHED_LABELS = 0.9 * SMOOTHED.y + 0.1 / 3
KERAS_FOCAL = {
    "binary, all right": Case(binary(2), rows(100 * (2 * UNIT - 1), UNIT), 0.0),
    "binary": Case(binary(2), PROBABLE, 0.268, digits=3),
    "binary, logits": Case(binary(3), LOGITS, 0.799, digits=3),
    "binary, one weight": Case(
        binary(2),
        PROBABLE._replace(weight=np.full(2, 1.23)),
        0.3296,
        digits=4,
        exact=np.mean(1.23 * OF_PROBABLE),
    ),
    "binary, logits, one weight": Case(
        binary(3), LOGITS._replace(weight=np.full(2, 3.21)), 2.565, digits=3
    ),
    # In the next two cases Keras, too, gives the exact value; its suite allows for 1.5e-3.
    "binary, weights": Case(
        binary(2),
        PROBABLE._replace(weight=TWO_WEIGHTS),
        0.34415,
        digits=4,
        exact=np.mean(TWO_WEIGHTS * OF_PROBABLE),
    ),
    "binary, logits, weights": Case(
        binary(3),
        LOGITS._replace(weight=TWO_WEIGHTS),
        0.95977,
        digits=3,
        exact=np.mean(TWO_WEIGHTS * OF_LOGITS),
    ),
    "binary, no reduction": Case(binary(2, reduction=None), PROBABLE, [0.515547, 0.020513]),
    "categorical, all right": Case(categorical(**NONE), rows(UNIT, UNIT), 0.0),
    "categorical, all right, logits": Case(categorical(), rows(10 * UNIT, UNIT), 0.0),
    "categorical, logits": Case(categorical(), CATEGORIES, 0.000345),
    "categorical, logits, one weight": Case(
        categorical(), CATEGORIES._replace(weight=np.full(3, 2.3)), 0.000794
    ),
    "categorical, logits, weights": Case(
        categorical(),
        CATEGORIES._replace(weight=THREE_WEIGHTS),
        0.001933,
        exact=np.mean(THREE_WEIGHTS * OF_CATEGORIES),
    ),
    "categorical, no reduction": Case(
        categorical(reduction=None), CATEGORIES, [1.5096224e-09, 2.4136547e-11, 1.0360638e-03]
    ),
    "categorical, label smoothing": Case(
        categorical(label_smoothing=0.1), rows([[4.9, -0.5, 2.05]], [[1, 0, 0]]), 0.06685, digits=5
    ),
    "categorical, label smoothing, axis": Case(
        categorical(label_smoothing=0.1, data_format="channels_first", **NONE),
        SMOOTHED,
        (-0.25 * SMOOTHED_LABELS * (1 - SMOOTHED.x) ** 2 * np.log(SMOOTHED.x)).sum(1).mean(),
    ),
}


def indices(y, x, classes, weight=None):
    """Predicted classes, as voxels of one sample."""
    weight = None if weight is None else np.reshape(weight, (1, -1))
    return data(one_hot(np.reshape(x, (1, -1)), max(classes, 2)), np.reshape(y, (1, -1)), weight)


def above(threshold, y, x, weight=None):
    """Keras' `BinaryIoU` has two classes: what is above the threshold, and what is not."""
    weight = None if weight is None else np.reshape(weight, (1, -1))
    x = np.reshape(x, (1, -1))
    return data(np.stack([np.full_like(x, threshold), x], -1), np.reshape(y, (1, -1)), weight)


def iou(**options):
    return of("JaccardScore", over="dataset", absent="predicted", **options)


VOXELS, FOUND = [0, 0, 1, 1], [0, 1, 0, 1]
W4 = [0.2, 0.3, 0.4, 0.1]
WEIGHTED_IOU = (0.2 / (0.6 + 0.5 - 0.2) + 0.1 / (0.4 + 0.5 - 0.1)) / 2
ODD, ODD_P = [0, 1, 0, 1], [0.1, 0.2, 0.4, 0.7]
ONE_HOT = data(
    [[[0.2, 0.3, 0.5], [0.1, 0.2, 0.7], [0.5, 0.3, 0.1], [0.1, 0.4, 0.5]]],
    [[[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]]],
)
FIVE = data([[*ONE_HOT.x[0], [0.6, 0.2, 0.2]]], [[*ONE_HOT.y[0], [1, 0, 0]]])
FIVE_IOU = (0.1 / (0.4 + 0.6 - 0.1) + 0 + 0.1 / (0.6 + 0.1 - 0.1)) / 3
FIRST_AND_LAST = then(iou(average="none"), lambda v: v[[0, 2]].mean())
KERAS_IOU = {
    **{
        f"{name}, {label}": Case(iou(), d, expected)
        for name in ("IoU", "MeanIoU")
        for label, d, expected in (
            ("unweighted", indices(VOXELS, FOUND, 2), 1 / 3),
            ("weighted", indices(VOXELS, FOUND, 2, W4), WEIGHTED_IOU),
            ("multi-dimensional", indices([[0, 0], [1, 1]], [[0, 1], [0, 1]], 2, W4), WEIGHTED_IOU),
            ("zero and non-zero entries", indices([1], [1], 2), 1.0),
        )
    },
    "IoU, absent classes": Case(iou(), indices(VOXELS, FOUND, 4), 1 / 3),
    "MeanIoU, absent classes": Case(iou(), indices([0] * 4, [0] * 4, 3), 1.0),
    "MeanIoU, ignored 255": Case(
        iou(ignore_label=255), indices([0, 1, 2, 255], [0, 1, 1, 1], 3), 0.5
    ),
    "MeanIoU, ignored -1": Case(iou(ignore_label=-1), indices([0, 1, 2, -1], [0, 1, 1, 1], 3), 0.5),
    "MeanIoU, weighted, ignored -1": Case(
        iou(ignore_label=-1),
        indices([0, 0, 1, -1], FOUND, 2, W4),
        (0.2 / (0.6 + 0.5 - 0.2) + 0.0 / (0.3 + 0.4 - 0.0)) / 2,
    ),
    "BinaryIoU, 0.3, weighted": Case(iou(), above(0.3, ODD, ODD_P, W4), WEIGHTED_IOU),
    "BinaryIoU, 0.5, weighted": Case(
        iou(),
        above(0.5, ODD, ODD_P, [0.1, 0.2, 0.4, 0.3]),
        (0.5 / (0.5 + 0.7 - 0.5) + 0.3 / (0.5 + 0.3 - 0.3)) / 2,
    ),
    "BinaryIoU, 0.3": Case(iou(), above(0.3, ODD, ODD_P), 1 / 3),
    "BinaryIoU, 0.5": Case(iou(), above(0.5, ODD, ODD_P), (2 / 3 + 1 / 2) / 2),
    "BinaryIoU, multi-dimensional": Case(
        iou(),
        above(0.4, [[0, 1], [0, 1]], [[0.1, 0.7], [0.9, 0.3]], W4),
        (0.2 / (0.6 + 0.3 - 0.2) + 0.3 / (0.4 + 0.7 - 0.3)) / 2,
    ),
    "BinaryIoU, zero and non-zero entries": Case(iou(), above(0.5, [1], [0.6]), 1.0),
    "OneHotIoU": Case(FIRST_AND_LAST, ONE_HOT, (0 + 1 / 3) / 2),
    "OneHotIoU, weighted": Case(
        FIRST_AND_LAST,
        ONE_HOT._replace(weight=np.array([[0.1, 0.2, 0.3, 0.4]])),
        (0 / (0.3 + 0.6 - 0) + 0.1 / (0.7 + 0.1 - 0.1)) / 2,
    ),
    "OneHotMeanIoU": Case(iou(), ONE_HOT, (0 + 0 + 1 / 3) / 3),
    "OneHotMeanIoU, weighted": Case(
        iou(), FIVE._replace(weight=np.array([[0.1, 0.2, 0.3, 0.3, 0.1]])), FIVE_IOU
    ),
    "OneHotMeanIoU, whole weights": Case(
        iou(), FIVE._replace(weight=np.array([[1.0, 2, 3, 3, 1]])), FIVE_IOU
    ),
}

F_X = [[0.7, 0.7, 0.7], [1, 0, 0], [0.9, 0.8, 0]]
F_PERFECT = rows(F_X, [[1, 1, 1], [1, 0, 0], [1, 1, 0]])
F_WORST = rows(F_X, [[0, 0, 0], [0, 1, 0], [0, 0, 1]])
F_RANDOM = rows(F_X, [[0, 0, 1], [1, 1, 0], [1, 1, 1]])
F_ARGMAX = rows(
    [[0.9, 0.1, 0], [0.2, 0.6, 0.2], [0, 0, 1], [0.4, 0.3, 0.3], [0, 0.9, 0.1], [0, 0, 1]],
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1]],
)
BETAS = (0.5, 1.0, 2.0)
AVERAGES = ("micro", "macro", "weighted")
AT_066 = {**HARD, "threshold": 0.66}
# {average: the values for each beta}
F_OF_RANDOM = {
    "none": ([0.71428573, 0.5, 0.833334], [0.8, 0.5, 0.6666667], [0.9090904, 0.5, 0.555556]),
    "micro": (0.6666667, 0.6666667, 0.6666667),
    "macro": (0.6825397, 0.6555555, 0.6548822),
    "weighted": (0.6825397, 0.6555555, 0.6548822),
}
F_OF_ARGMAX = {
    "none": ([0.9090904, 0.555556, 1.0], [0.8, 0.6666667, 1.0], [0.71428573, 0.833334, 1.0]),
    "micro": (0.833334, 0.833334, 0.833334),
    "macro": (0.821549, 0.822222, 0.849206),
    "weighted": (0.880471, 0.844445, 0.829365),
}
NO_WEIGHTS = [1.0] * 6
F_WEIGHTS = {"some are 0": [1.0, 0, 1, 1, 0, 1], "some are 0.5": [0.5, 1, 1, 1, 0.5, 1]}
F_OF_WEIGHTED = {
    "some are 0": {"micro": (1.0, 1.0, 1.0), "weighted": (1.0, 1.0, 1.0)},
    "some are 0.5": {
        "none": ([0.9375, 0.714286, 1.0], [0.857143, 0.8, 1.0], [0.789474, 0.909091, 1.0]),
        "micro": (0.9, 0.9, 0.9),
        "macro": (0.883929, 0.885714, 0.899522),
        "weighted": (0.917857, 0.902857, 0.897608),
    },
}
KERAS_F_BETA = {
    **{
        f"{label}, {average}, {beta}": Case(f_beta(beta, **AT_066, average=average), d, expected)
        for label, d, expected in (("perfect", F_PERFECT, 1.0), ("worst", F_WORST, 0.0))
        for average in AVERAGES
        for beta in BETAS
    },
    **{
        f"{label}, {average}, {beta}": Case(f_beta(beta, average=average, **options), d, expected)
        for label, options, d, table in (
            ("random", AT_066, F_RANDOM, F_OF_RANDOM),
            ("argmax", {}, F_ARGMAX, F_OF_ARGMAX),
            ("weights of 1", {}, F_ARGMAX._replace(weight=np.ones(6)), F_OF_ARGMAX),
            *(
                (label, {}, F_ARGMAX._replace(weight=np.array(weights)), F_OF_WEIGHTED[label])
                for label, weights in F_WEIGHTS.items()
            ),
        )
        for average, values in table.items()
        for beta, expected in zip(BETAS, values, strict=True)
    },
    "one weight": Case(
        f_beta(1, **HARD, average="none"),
        rows([[0.2, 0.6], [0.2, 0.6]], [[1, 1], [1, 0]], np.full(2, 0.5)),
        [0.0, 0.6666665],
    ),
}


def mask(x, y, weight=None):
    """Voxels of one sample, with one class."""
    x, y = (np.reshape(v, (1, -1, 1)) for v in (x, y))
    return data(x, y, None if weight is None else np.reshape(weight, (1, -1)))


def rate(name, threshold=0.5, **options):
    options = {"over": "dataset", "absent": "keep", "average": "none"} | options
    return of(name, **HARD, threshold=threshold, **options)


def at(name, *thresholds):
    """The rates at several thresholds, of one class."""
    return lambda d: np.concatenate([rate(name, t)(d) for t in thresholds])


COIN = np.random.default_rng(0).integers(0, 2, 100)
MIXED = mask([1, 0, 1, 0], [0, 1, 1, 0])
HIGH = mask([1, 0, 0.6, 0], [0, 1, 1, 0])
EIGHT = [1, 2, 3, 4, 4, 3, 2, 1]
FIVE_ROWS = [[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]
FIVE_CLASSES = data([FIVE_ROWS], [UNIT[[2, 0, 1, 0, 2]]])
HIGH_SQUARE = ([[1, 0], [0.6, 0]], [[0, 1], [1, 0]])
OF_PRECISION = mask(*HIGH_SQUARE, [[4, 0], [3, 1]])
OF_RECALL = mask(*HIGH_SQUARE, [[1, 4], [3, 2]])
KERAS_RATES = {}
for name, theirs in (("Precision", "Precision"), ("Sensitivity", "Recall")):
    weighted = OF_PRECISION if name == "Precision" else OF_RECALL
    KERAS_RATES |= {
        f"{theirs}, unweighted": Case(rate(name), MIXED, [0.5]),
        f"{theirs}, all incorrect": Case(rate(name), mask(COIN, 1 - COIN), [0.0]),
        f"{theirs}, thresholds": Case(at(name, 0.5, 0.7), HIGH, [0.5, 0.0]),
        f"{theirs}, weights and thresholds": Case(at(name, 0.5, 1.0), weighted, [3 / 7, 0.0]),
        f"{theirs}, two updates": Case(at(name, 0.5, 1.0), [weighted, weighted], [3 / 7, 0.0]),
        f"{theirs}, one class of three": Case(picked(rate(name), 1), FIVE_CLASSES, 1.0),
    }
KERAS_RATES |= {
    "Precision, weighted": Case(
        rate("Precision"),
        mask([[1, 0, 1, 0], [1, 0, 1, 0]], [[0, 1, 1, 0], [1, 0, 0, 1]], EIGHT),
        [(3 + 4) / ((1 + 3) + (4 + 2))],
    ),
    "Recall, weighted": Case(
        rate("Sensitivity"),
        mask([[1, 0, 1, 0], [0, 1, 0, 1]], [[0, 1, 1, 0], [1, 0, 0, 1]], EIGHT),
        [(3 + 1) / ((2 + 3) + (4 + 1))],
    ),
}
KERAS = {
    **{k: c._replace(rtol=1e-6) for k, c in KERAS_OVERLAP.items()},
    **{f"FocalCrossentropy, {k}": c._replace(rtol=1e-4) for k, c in KERAS_FOCAL.items()},
    **KERAS_IOU,
    **{f"FBetaScore, {k}": c._replace(rtol=1e-6) for k, c in KERAS_F_BETA.items()},
    **KERAS_RATES,
}

# --- segmentation_models_pytorch ------------------------------------------------------------------

AS_SMP = {**NONE, "batch": True, "absent": "one", **smooth(0)}
LEFT, OUTER, RIGHT_HALF = [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]
ROWS_OF_4 = [LEFT, RIGHT_HALF]


def one_class(x, y):
    return data([[x]], [[y]])


def classes_of(x, y):
    return data([x], [y])


SMP = {
    **{
        f"soft_{kind}_score, {label}": Case(
            one_minus(first(loss, **NONE, **smooth(0), **options)), one_class(x, y), expected
        )
        for kind, loss, options, half in (
            ("jaccard", "DiceLoss", {"jaccard": True}, 0.5),
            ("dice", "DiceLoss", {}, 2 / 3),
            ("tversky", "TverskyLoss", {}, 2 / 3),
        )
        for label, x, y, expected in (
            ("ones", [1] * 4, [1] * 4, 1.0),
            ("equal", OUTER, OUTER, 1.0),
            ("half", LEFT, [1] * 4, half),
        )
    },
    **{
        f"soft_jaccard_score of rows, {label}": Case(
            one_minus(first("DiceLoss", **NONE, **smooth(0), jaccard=True)),
            classes_of(x, y),
            expected,
        )
        for label, x, y, expected in (
            ("equal", ROWS_OF_4, ROWS_OF_4, 1.0),
            ("none right", [[0, 0, 1, 0], [0, 1, 0, 0]], ROWS_OF_4, 0.0),
            ("one missed", [LEFT, [0] * 4], [LEFT, [0, 0, 0, 1]], 0.5),
        )
    },
    **{
        f"{kind}, binary, {label}": Case(
            first(loss, **AS_SMP, **options), one_class(x, y), expected
        )
        for kind, loss, options, voxels in (
            ("DiceLoss", "DiceLoss", {}, 3),
            ("TverskyLoss", "TverskyLoss", {}, 3),
            ("JaccardLoss", "DiceLoss", {"jaccard": True}, 1),
        )
        for label, x, y, expected in (
            ("ones", [1] * voxels, [1] * voxels, 0.0),
            ("equal", [1, 0, 1], [1, 0, 1], 0.0),
            ("zeros", [0] * 3, [0] * 3, 0.0),
            ("nothing labelled", [1] * 3, [0] * 3, 0.0),
            ("inverted", [1, 0, 1], [0, 1, 0], 1.0),
            ("nothing found", [0] * 3, [1] * 3, 1.0),
        )
    },
    **{
        f"JaccardLoss, {kind}, {label}": Case(
            first("DiceLoss", **AS_SMP, jaccard=True), data([x], [y]), expected
        )
        for kind, label, x, y, expected in (
            ("multiclass", "equal", ROWS_OF_4, [0, 0, 1, 1], 0.0),
            ("multiclass", "inverted", ROWS_OF_4, [1, 1, 0, 0], 1.0),
            ("multiclass", "a third", [[1, 0, 1, 0], [0, 1, 0, 1]], [1, 1, 0, 0], 2 / 3),
            ("multilabel", "equal", ROWS_OF_4, ROWS_OF_4, 0.0),
            ("multilabel", "inverted", ROWS_OF_4, ROWS_OF_4[::-1], 1.0),
            ("multilabel", "a third", [OUTER, OUTER], [LEFT, LEFT], 2 / 3),
        )
    },
    **{
        f"MCCLoss, {label}": Case(
            first("MatthewsLoss", **NONE), one_class(np.ravel(x), np.ravel(y)), expected
        )
        for label, x, y, expected in (
            ("equal", ROWS_OF_4, ROWS_OF_4, 0.0),
            ("inverted", ROWS_OF_4, ROWS_OF_4[::-1], 2.0),
            ("half", [OUTER, OUTER], [LEFT, LEFT], 1.0),
            ("zeros for half", [[0] * 4] * 2, [LEFT, LEFT], 1.0),
        )
    },
}

# --- torchmetrics ---------------------------------------------------------------------------------

AS_TORCHMETRICS = {**HARD, "absent": "predicted"}


def missing_classes():
    """Three samples: one with the classes 1 and 3, one with a false positive, an empty one."""
    x, y = np.zeros((2, 3, 4, 10, 10))
    y[0, 1, :4, :4] = x[0, 1, :2, :2] = 1
    y[0, 3, 4:, 4:] = x[0, 3, 8:, 8:] = 1
    x[1, 3, :2, :2] = 1
    return data(x, y)


MISSING = missing_classes()
EMPTY = Data(*[np.zeros((4, 3, 8, 8), np.float32)] * 2)
LEVELS = {"samplewise": "samples", "global": "dataset"}


def dice_score(average, level):
    return first("DiceScore", **AS_TORCHMETRICS, average=average, over=LEVELS[level])


def predicted_indices(x, y, classes):
    """Predicted classes of several samples."""
    return data(one_hot(x, classes), y)


TORCHMETRICS = {
    **{
        f"DiceScore, missing classes, {average}, {level}": Case(
            dice_score(average, level), MISSING, expected, digits=4
        )
        for average, level, expected in (
            ("micro", "samplewise", 0.1333),
            ("none", "samplewise", [nan, 0.4, nan, 0.1]),
            ("micro", "global", 0.25),
            ("macro", "global", 0.2909),
            ("weighted", "global", 0.2490),
            ("none", "global", [nan, 0.4, nan, 0.1818]),
        )
    },
    **{
        f"DiceScore, nothing anywhere, {average}, {level}": Case(
            dice_score(average, level), EMPTY, [nan] * 3 if average == "none" else nan
        )
        for average in (*AVERAGES, "none")
        for level in LEVELS
    },
    "MeanIoU, absent class": Case(
        of("JaccardScore", absent="predicted"),
        predicted_indices([[0, 1], [1, 0]], [[0, 1], [1, 0]], 3),
        1.0,
    ),
    "MeanIoU, perfect": Case(
        of("JaccardScore", absent="predicted", average="none"),
        predicted_indices([[0, 1], [1, 0], [2, 2]], [[0, 1], [1, 0], [2, 2]], 3),
        [1.0, 1.0, 1.0],
    ),
}

# --- kornia ---------------------------------------------------------------------------------------

ALMOST = {"smooth_nr": 0, "smooth_dr": 1e-8}
E10, E1 = np.exp(10.0), np.exp(1.0)


def kornia_logits(columns, classes=3, samples=1):
    """Logits of 1 x 4 voxels, each with its own large class."""
    x = np.zeros((samples, classes, 1, len(columns)))
    for v, c in enumerate(columns):
        x[:, c, 0, v] = 100
    return x


ZEROS_OF_3 = data([[[[10, 10]], [[1, 1]], [[1, 1]]]] * 2, np.zeros((2, 1, 2)))
THREE_OF_FOUR = data([[[[10, 10, 10, 1]], [[1, 1, 1, 10]]]], np.zeros((1, 1, 4)))
SHARE = (3 * E10 + E1) / (E1 + E10)
PARTLY = data(kornia_logits([0, 2, 2, 2], 3, 4), np.broadcast_to([[[0, 1, 2, 2]]], (4, 1, 4)))
PARTLY_OF_4 = PARTLY._replace(x=np.concatenate([PARTLY.x, 0 * PARTLY.x[:, :1]], 1))


def ignoring(label):
    y = np.zeros((2, 1, 4))
    y[..., 2:] = label
    return data(kornia_logits([0, 1, 1, 1], 2, 2), y)


KORNIA = {
    **{
        f"{theirs}, all zeros, ignored {label}": Case(
            first(name, average="micro", ignore_label=label, **ALMOST),
            ZEROS_OF_3,
            0.0,
            digits=3,
            exact=1 - E10 / (E10 + 2 * E1),
        )
        for name, theirs in (("DiceLoss", "DiceLoss"), ("TverskyLoss", "TverskyLoss"))
        for label in (-100, None)
    },
    **{
        f"{name}, ignored {label}": Case(
            first(name, average="micro", ignore_label=label, **ALMOST), ignoring(label), 0.5
        )
        for name in ("DiceLoss", "TverskyLoss")
        for label in (-100, 255)
    },
    "binary focal loss, alpha 0.25, large logits": Case(
        focal(**SIGMOID, focal_alpha=0.25), data([[[100.0, -100.0]]], [[[1.0, 0.0]]]), 0.0
    ),
    "DiceLoss, micro": Case(
        first("DiceLoss", average="micro", **ALMOST), THREE_OF_FOUR, 1 - 2 * SHARE / 8
    ),
    "DiceLoss, macro": Case(
        first("DiceLoss", **ALMOST), THREE_OF_FOUR, (1 - 2 * SHARE / (4 + SHARE) + 1) / 2
    ),
    **{
        f"DiceLoss, {average}, weight of {label}": Case(
            first("DiceLoss", average=average, class_weight=w, **ALMOST), PARTLY, expected
        )
        for average in ("micro", "macro")
        for label, w, expected in (
            ("a class that is right", [1, 0, 0], 0.0),
            ("a class that is wrong", [0, 1, 0], 1.0),
            ("a class that is partly right", [0, 0, 1], 1 / 5),
        )
    },
    # kornia's value is that of three classes: Dice of 1, 0 and 4 / 5.
    "DiceLoss, micro, a fourth class without weight": Case(
        first("DiceLoss", average="micro", class_weight=[1, 1, 1, 0], **ALMOST), PARTLY_OF_4, 1 / 4
    ),
    "DiceLoss, macro, a fourth class without weight": Case(
        first("DiceLoss", class_weight=[1 / 3, 1 / 3, 1 / 3, 0], **ALMOST), PARTLY_OF_4, 1.2 / 3
    ),
    "DiceLoss, macro, fractions as weights": Case(
        first("DiceLoss", class_weight=[0.3, 0.7, 0], **ALMOST), PARTLY, 0.7
    ),
    **{
        f"mean_iou, {label}": Case(
            by_sample(of("JaccardScore", absent="keep", average="none")),
            predicted_indices(x, y, classes),
            expected,
        )
        for label, classes, x, y, expected in (
            ("perfect", 2, [[1] * 4 + [0] * 4], [[1] * 4 + [0] * 4], [[1.0, 1.0]]),
            ("perfect, two samples", 2, [[1] * 4 + [0] * 4] * 2, [[1] * 4 + [0] * 4] * 2, ALL_1),
            ("one wrong", 2, [[1] * 4 + [0, 0, 0, 1]], [[1] * 4 + [0] * 4], [[0.75, 0.80]]),
            (
                "four classes", 4, *[[[[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2]] * 2, [[1.0] * 4],
            ),
            (
                "one missing", 4, [[[3, 3, 2, 2]] * 2 + [[2, 2, 3, 3]] * 2],
                [[[0, 0, 0, 0]] * 2 + [[2, 2, 3, 3]] * 2], [[0.0, 1.0, 0.5, 0.5]],
            ),
        )
    },
}  # fmt: skip

# --- DeepReg --------------------------------------------------------------------------------------


def alike(value):
    """One class in which predictions and labels are this value."""
    return Data(*[np.full((1, 10, 1), value, np.float32)] * 2)


def deepreg(smooth_nr, smooth_dr, jaccard=False):
    """Jaccard has twice the smoothing here, as its fraction is twice that of DeepReg."""
    s = 2 if jaccard else 1
    return one_minus(
        of("DiceLoss", **NONE, jaccard=jaccard, smooth_nr=s * smooth_nr, smooth_dr=s * smooth_dr)
    )


DEEPREG_NAMES = (("DiceScore", False, 20), ("JaccardIndex", True, 10))  # and P + T, or the union
DEEPREG = {
    f"{name} of {value}, {nr}, {dr}": Case(
        deepreg(nr, dr, jaccard),
        alike(value),
        published,
        digits=5,
        exact=(value * volume + nr) / (value * volume + dr),
    )
    for name, jaccard, volume in DEEPREG_NAMES
    for value, nr, dr, published in (
        (0, 1e-5, 1e-5, 1),
        (0, 0, 1e-5, 0),
        (0, 1e-7, 1e-7, 1),
        (1, 1e-5, 1e-5, 1),
        (1, 0, 1e-5, 1),
        (1, 1e-5, 0, 1),
        (1, 0, 0, 1),
        (1, 1e-7, 1e-7, 1),
    )
}

# --- tensorflow-mri: metrics ----------------------------------------------------------------------

TWELVE = mask(
    [0.4, 0.7, 0.3, 0.9, 0.2, 0.8, 0.6, 0.8, 0.1, 0.2, 0.3, 0.9],
    [1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1],
)
EIGHT_ROWS = data(
    [
        [
            [0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6],
            [0.1, 0.3, 0.6], [0.7, 0.1, 0.2], [0.5, 0.2, 0.3], [0.1, 0.4, 0.5],
        ]
    ],
    [UNIT[[0, 0, 1, 2, 1, 0, 0, 2]]],
)  # fmt: skip
HALF_ONES = mask([1] * 4 + [0] * 4, [1] * 4 + [0] * 4)


def after_reset(name, **options):
    def value(d):
        metric = getattr(metrics, name)(**HARD, over="dataset", **options)
        metric.update_state(d.y, d.x)
        metric.reset_state()
        return metric.result()

    return value


# TP, TN, FP and FN of the three classes, as the suite writes them.
CONFUSION = np.array([(3, 1, 2), (4, 5, 5), (0, 1, 1), (1, 1, 0)], float)
# theirs: ours, its options, the formula
MRI_METRICS = {
    **dict.fromkeys(
        ("TruePositiveRate", "Recall", "Sensitivity"),
        ("Sensitivity", {}, lambda tp, tn, fp, fn: tp / (tp + fn)),
    ),
    **dict.fromkeys(
        ("TrueNegativeRate", "Specificity", "Selectivity"),
        ("Specificity", {}, lambda tp, tn, fp, fn: tn / (tn + fp)),
    ),
    **dict.fromkeys(
        ("PositivePredictiveValue", "Precision"),
        ("Precision", {}, lambda tp, tn, fp, fn: tp / (tp + fp)),
    ),
    "TverskyIndex": (
        "TverskyScore",
        {"alpha": 0.3, "beta": 0.7},
        lambda tp, tn, fp, fn: tp / (tp + 0.3 * fp + 0.7 * fn),
    ),
    "FBetaScore": (
        "TverskyScore",
        {"alpha": 0.8, "beta": 0.2},
        lambda tp, tn, fp, fn: 1.25 * tp / (1.25 * tp + fp + 0.25 * fn),
    ),
    **dict.fromkeys(
        ("F1Score", "DiceIndex"),
        ("DiceScore", {}, lambda tp, tn, fp, fn: tp / (tp + 0.5 * fp + 0.5 * fn)),
    ),
    **dict.fromkeys(
        ("IoU", "JaccardIndex"),
        ("JaccardScore", {}, lambda tp, tn, fp, fn: tp / (tp + fp + fn)),
    ),
}
MRI = {}
for theirs, (name, options, formula) in MRI_METRICS.items():
    over = {"over": "dataset", **options}
    of_classes = formula(*CONFUSION)
    MRI |= {
        f"{theirs}, before reset_state": Case(of(name, **HARD, **over), HALF_ONES, 1.0),
        f"{theirs}, binary": Case(of(name, **HARD, **over), TWELVE, formula(4, 5, 2, 1)),
        f"{theirs}, threshold 0.75": Case(
            of(name, **HARD, threshold=0.75, **over), TWELVE, formula(3, 6, 1, 2)
        ),
        f"{theirs}, no average": Case(of(name, **over, average="none"), EIGHT_ROWS, of_classes),
        f"{theirs}, macro": Case(of(name, **over), EIGHT_ROWS, of_classes.mean()),
        f"{theirs}, micro": Case(
            of(name, **over, average="micro"), EIGHT_ROWS, formula(*CONFUSION.sum(1))
        ),
        **{
            f"{theirs}, class {c}, {average}": Case(
                picked(of(name, **over, average="none"), c), EIGHT_ROWS, of_classes[c]
            )
            for c in range(3)
            for average in (None, "macro", "micro")
        },
    }

SUITES = {
    "MONAI": MONAI,
    "Keras": KERAS,
    "segmentation_models_pytorch": SMP,
    "torchmetrics": TORCHMETRICS,
    "kornia": KORNIA,
    "DeepReg": DEEPREG,
    "tensorflow-mri": {k: c._replace(rtol=1e-6) for k, c in MRI.items()},
}
EQUAL = {f"{suite}, {name}": case for suite in SUITES for name, case in SUITES[suite].items()}

# --- where the values differ ----------------------------------------------------------------------

NOT_PROBABLE = (
    "The numbers are no probabilities. Ours computes with predictions and labels between 0 and 1 "
    "alone, and is an error otherwise; the formula is the same."
)
OTHER_CROSS_ENTROPY = (
    "MONAI takes a softmax or sigmoid of the same numbers for the cross-entropy, but none for "
    "Dice. Ours has one activation for both."
)
MASKED_LOGITS = (
    "MONAI sets masked class indices to 0, the background, and up to 1.5 masked logits to 0, whose "
    "sigmoid is one half. Ours leaves these voxels out."
)
MEAN_OF_MEANS = (
    "The suite's mean is over the classes of each sample, then over the samples. Ours is over the "
    "samples for each class, then over the classes."
)
NEVER_THERE = "Ours has NaN for a class that never counts, and the suite has a number for it."
NO_NEGATIVES = "A class that is everywhere has no negatives: NaN in MONAI, and 1 in ours."
NOTHING_YET = "Without data the suite's result is 0. Ours is NaN, because there is no score yet."
NO_CLASS = "Keras skips labels that are no class. Ours takes them for a mistake: use ignore_label."
ABSENT_IS_0 = "0 / 0 is 0 in Keras. Ours is 1: nothing was to be found, and nothing was found."
DIVIDED = "Keras divides the probabilities of a voxel by their sum. Ours takes them as they are."
ALL_VOXELS = "smp divides by the number of all voxels, and ours by that of the voxels that count."
COUNTS_WITH_EPS = (
    "smp adds 1e-5 to TP, TN, FP and FN. Ours is 0 where nothing is wrong, otherwise 1 where the "
    "correlation is 0 / 0."
)
EMPTY_SAMPLE = "In torchmetrics a sample without labels scores 0. Ours does not count it."
WEIGHT_SQUARED = "Before 0.9 kornia has the square of the weight in the intersection."
ZERO_BY_ZERO = "DeepReg divides by 0. Ours is 1: nothing was to be found, and nothing was found."


def refused(name, activation, d, published, digits=6, **options):
    """A case of MONAI's with an activation that does not give probabilities."""
    given = d._replace(x=activation(d.x).astype(np.float32))
    rtol = 1e-4 if name in ("TverskyLoss", "MatthewsLoss") else 1e-5  # as above
    return Deviation(
        Case(first(name, **NONE, **options), given, published, rtol, digits),
        tf.errors.InvalidArgumentError,
        by_formula(name, **options),
        NOT_PROBABLE,
    )


def log_softmax_first(x):
    return np.moveaxis(log_softmax(np.moveaxis(x.astype(np.float64), 1, -1)), -1, 1)


S4, NR0 = smooth(1e-4), {"smooth_nr": 0, "smooth_dr": 1e-4}
REFUSED = {
    "MONAI, DiceLoss, tanh": refused("DiceLoss", np.tanh, TWO, 0.999963, **S4),
    "MONAI, DiceLoss, log-softmax": refused("DiceLoss", log_softmax_first, LINE, -8.522593, **S4),
    "MONAI, DiceLoss, log-softmax, weight": refused(
        "DiceLoss", log_softmax_first, LINE, -8.268515, class_weight=[0, 0.5], **S4
    ),
    "MONAI, DiceLoss, tanh, batch": refused(
        "DiceLoss", np.tanh, TWO_WITH_0, 0.774718, batch=True, **S4
    ),
    "MONAI, DiceLoss, tanh, batch, smooth_dr": refused(
        "DiceLoss", np.tanh, TWO_WITH_0, 0.774733, batch=True, **NR0
    ),
    "MONAI, DiceLoss, tanh, smooth_dr": refused("DiceLoss", np.tanh, TWO_WITH_0, 0.840058, **NR0),
    "MONAI, GeneralizedDiceLoss, tanh": refused(
        "GeneralizedDiceLoss", np.tanh, TWO, 0.99970, digits=5, **S4
    ),
    "MONAI, GeneralizedDiceLoss, log-softmax": refused(
        "GeneralizedDiceLoss", log_softmax_first, LINE, -0.097833, **S4
    ),
    "MONAI, TverskyLoss, tanh": refused("TverskyLoss", np.tanh, TWO, 0.999963, **S4),
    "MONAI, TverskyLoss, tanh, batch": refused(
        "TverskyLoss", np.tanh, TWO, 0.999963, batch=True, smooth_nr=0, smooth_dr=1e-3
    ),
    "MONAI, TverskyLoss, log-softmax": refused(
        "TverskyLoss", log_softmax_first, LINE, -8.533317, **S4
    ),
    "MONAI, MCCLoss, tanh": refused("MatthewsLoss", np.tanh, TWO, 1.0),
    **{
        f"Keras, {name}": Deviation(
            Case(first(loss, **NONE, **options), LARGE_NUMBERS, published),
            tf.errors.InvalidArgumentError,
            by_formula(loss, average="micro", smooth_nr=0, smooth_dr=1e-7, **options),
            NOT_PROBABLE,
        )
        for name, loss, options, published in (
            ("Dice, large numbers", "DiceLoss", {}, -0.55555546),
            ("Tversky, large numbers", "TverskyLoss", {}, -0.55555558),
            ("Tversky, large numbers, coefficients", "TverskyLoss", RECALL, -0.94444442),
        )
    },
}

SOFTMAX_PART = first("DiceCELoss", lambda_dice=0)
TAKEN_TWICE = {
    **{
        f"MONAI, DiceCELoss, {label}": Deviation(
            Case(first("DiceCELoss", **NONE), d, 0.3133, digits=4),
            0.0,
            total(RAW_DICE, SOFTMAX_PART),
            OTHER_CROSS_ENTROPY,
        )
        for label, d in (
            ("class indices", RIGHT),
            ("one-hot", RIGHT_ONE_HOT),
            ("one-hot integers", RIGHT_ONE_HOT._replace(y=RIGHT_ONE_HOT.y.astype(np.uint8))),
        )
    },
    **{
        f"MONAI, DiceCELoss, {label}": Deviation(
            Case(
                first("DiceCELoss", **NONE, **FOREGROUND),
                RIGHT_AND_SURE,
                published,
                digits=4,
                exact=exact,
            ),
            tf.errors.InvalidArgumentError,
            total(
                by_formula("DiceLoss", **FOREGROUND),
                first("DiceCELoss", lambda_dice=0, lambda_ce=ce, ce_class_weight=w, batch=True),
            ),
            OTHER_CROSS_ENTROPY,
        )
        for label, ce, w, published, exact in (
            ("no background", 1, [1, 1], 0.2088, None),
            ("lambda_ce", 2, [1, 1], 0.4176, 4 / 3 * np.log1p(np.exp(-1))),
            ("weight of the foreground", 1, [0, 1], 0.3133, None),
        )
    },
}
# At each resolution, this share of the voxels has the probability 0 for its class, which should be
# 1. The Dice loss is the same share. In the cross-entropy, the 0 counts as 1e-7.
WRONG = (1 / 6, 3 / 4, 1 / 2)


def of_wrong(weights):
    return np.dot(weights, WRONG[: len(weights)]) * (1 - np.log(1e-7))


for label, weights, published, digits in (
    ("one resolution", (1,), 0.606557, 6),
    ("exponential", EXPONENTIAL, 1.78144, 5),
    ("same", (1, 1, 1), 3.5529, 4),
    ("two", (1, 0.5, 0.5), 2.07973, 5),
    ("given", (0.1, 0.2, 0.3), 0.76924, 5),
):
    TAKEN_TWICE[f"MONAI, DeepSupervisionLoss, DiceCE, {label}"] = Deviation(
        Case(
            of_sizes(first("DiceCELoss", **NONE), weights),
            SIZES[: len(weights)],
            published,
            digits=digits,
        ),
        of_wrong(weights),
        of_sizes(total(RAW_DICE, SOFTMAX_PART), weights),
        OTHER_CROSS_ENTROPY,
    )
for label, weights, published in (
    ("one resolution", (1,), 0.32124),
    ("exponential", EXPONENTIAL, 1.06452),
):
    TAKEN_TWICE[f"MONAI, DeepSupervisionLoss, DiceFocal, {label}"] = Deviation(
        Case(
            of_sizes(first("DiceFocalLoss", **NONE), weights),
            SIZES[: len(weights)],
            published,
            digits=5,
        ),
        of_wrong(weights),
        of_sizes(total(RAW_DICE, focal(**SIGMOID)), weights),
        OTHER_CROSS_ENTROPY,
    )

MASKED = {
    "half a sample": (ONE, [[[0, 0], [1, 1]]], 1e-6, 0.5),
    "half of the second sample": (TWO, [[[1, 1], [1, 1]], [[1, 1], [0, 0]]], 1e-4, 0.422969),
    "class indices": (LINE, [[1, 1, 0], [1, 1, 0]], 1e-4, 0.47033),
}


def masked_dice(d, number):
    """Dice of a sigmoid, of the voxels in the mask."""
    mask = d.weight[:, None]
    t = d.y if d.y.shape == d.x.shape else np.moveaxis(one_hot(d.y[:, 0], 2), -1, 1)
    p, t = mask / (1 + np.exp(-d.x.astype(np.float64))), mask * t
    i, p, t = (v.sum(tuple(range(2, v.ndim))) for v in (p * t, p, t))
    return np.mean(1 - (2 * i + number) / (p + t + number))


def zeros_where_masked(d):
    """What MONAI makes of a mask up to 1.5: 0 as a logit, and 0 as a label."""
    mask = d.weight[:, None]
    return Data(d.x * mask, d.y * mask)


# our metric, its data, what is published, the exact value if that is cut off, and ours
OTHER_MEANS = {
    "DiceMetric, mean": (
        "DiceScore", OVERLAPPING, 0.689683, None, (19 / 28 + 0.4 + 2 / 3) / 3,
    ),
    "MeanIoU, mean": (
        "JaccardScore", OVERLAPPING, 0.5555, 5 / 9, (13 / 24 + 0.25 + 0.5) / 3,
    ),
    "handler of DiceMetric": ("DiceScore", STEPS_TOGETHER, 0.75, None, (1 + 2 / 3) / 2),
    "handler of MeanIoU": ("JaccardScore", STEPS_TOGETHER, 0.75, None, (1 + 2 / 3) / 2),
}  # fmt: skip
SPECIFICITY = scores("Specificity", absent="keep")
TNR_SUMS = [1.6667, 2.5, 0.6667]
OF_REST = {
    **{
        f"MONAI, MaskedDiceLoss, {name}": Deviation(
            Case(first("DiceLoss", **SIGMOID, **smooth(number)), d, published, digits=5),
            masked_dice(d, number),
            lambda d, number=number: first("DiceLoss", **SIGMOID, **smooth(number))(
                zeros_where_masked(d)
            ),
            MASKED_LOGITS,
        )
        for name, (full, mask_of, number, published) in MASKED.items()
        for d in [full._replace(weight=np.array(mask_of, np.float32))]
    },
    **{
        f"MONAI, {name}": Deviation(
            Case(score(ours), d, published, digits=6 if exact is None else 4, exact=exact),
            gives,
            then(by_sample(score(ours)), np.mean),
            MEAN_OF_MEANS,
        )
        for name, (ours, d, published, exact, gives) in OTHER_MEANS.items()
    },
    "MONAI, DiceHelper, threshold": Deviation(
        Case(score("DiceScore", average="none"), LAST_EVERYWHERE, [0.0, 0.0, 0.0]),
        [0.0, 0.0, nan],
        then(score("DiceScore", average="none"), np.nan_to_num),
        NEVER_THERE,
    ),
    "MONAI, DiceHelper, argmax": Deviation(
        Case(first("DiceScore", average="none", **FOREGROUND), LAST_EVERYWHERE, [0.0, 0.0]),
        [0.0, nan],
        then(first("DiceScore", average="none", **FOREGROUND), np.nan_to_num),
        NEVER_THERE,
    ),
    "MONAI, ConfusionMatrixMetric, tnr, sum": Deviation(
        Case(then(SPECIFICITY, np.sum), WITH_AND_WITHOUT, 4.8333, digits=4),
        4 + 5 / 6 + 1,
        then(SPECIFICITY, lambda v: np.sum(v) - 1),
        NO_NEGATIVES,
    ),
    "MONAI, ConfusionMatrixMetric, tnr, sum_batch": Deviation(
        Case(summed(SPECIFICITY), WITH_AND_WITHOUT, TNR_SUMS, digits=4),
        [5 / 3 + 1, 2.5, 2 / 3],
        then(SPECIFICITY, lambda v: v.sum(0) - [1, 0, 0]),
        NO_NEGATIVES,
    ),
    **{
        f"Keras, {name}, before the first batch": Deviation(
            Case(iou(), [], 0.0), nan, then(iou(), np.nan_to_num), NOTHING_YET
        )
        for name in ("IoU", "BinaryIoU", "MeanIoU")
    },
    **{
        f"Keras, {name}, label {label}": Deviation(
            Case(iou(), indices(y, x, 2), 1.0),
            tf.errors.InvalidArgumentError,
            iou(ignore_label=label),
            NO_CLASS,
        )
        for name, label, y, x in (
            ("IoU", 2, [0, 2], [0, 1]),
            ("IoU", -1, [-1, 0], [0, 0]),
            ("MeanIoU", 3, [0, 3], [0, 1]),
            ("MeanIoU", -1, [0, -1], [0, 1]),
        )
    },
    **{
        f"Keras, FBetaScore, class without weight, {average}, {beta}": Deviation(
            Case(
                f_beta(beta, average=average),
                F_ARGMAX._replace(weight=np.array(F_WEIGHTS["some are 0"])),
                published,
            ),
            gives,
            then(f_beta(beta, average="none"), change),
            ABSENT_IS_0,
        )
        for beta in BETAS
        for average, published, gives, change in (
            ("none", [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], lambda v: v * [1, 0, 1]),
            ("macro", 0.666667, 1.0, lambda v: (v * [1, 0, 1]).mean()),
        )
    },
    **{
        f"Keras, {theirs} of nothing": Deviation(
            Case(rate(name), mask([0] * 4, [0] * 4), [0.0]), [1.0], None, ABSENT_IS_0
        )
        for name, theirs in (("Precision", "Precision"), ("Sensitivity", "Recall"))
    },
    **{
        f"Keras, CategoricalFocalCrossentropy, {label}": Deviation(
            Case(
                categorical(**NONE),
                UNNORMALISED._replace(weight=weight),
                published,
                rtol=1e-4,
                digits=digits,
                exact=np.mean((1 if weight is None else weight) * OF_NORMALISED),
            ),
            0.25 * np.mean((1 if weight is None else weight) * focal_terms([0.9, 0.89, 0.94], 2)),
            lambda d: categorical(**NONE)(d._replace(x=NORMALISED.x)),
            DIVIDED,
        )
        for label, weight, published, digits in (
            ("unweighted", None, 0.02059, 5),
            ("one weight", np.full(3, 2.3), 0.047368, 6),
            ("weights", THREE_WEIGHTS, 0.06987, 5),
        )
    },
    "smp, SoftCrossEntropyLoss": Deviation(
        Case(
            of("DiceCELoss", lambda_dice=0, batch=True, label_smoothing=0.1, ignore_label=-100),
            rows(18 * np.eye(4) - 9, np.array([[0], [1], [-100], [3]])),
            1.0125,
            digits=4,
        ),
        0.1 / 4 * 3 * 18,
        total(
            (
                3 / 4,
                of("DiceCELoss", lambda_dice=0, batch=True, label_smoothing=0.1, ignore_label=-100),
            )
        ),
        ALL_VOXELS,
    ),
    "smp, SoftBCEWithLogitsLoss": Deviation(
        Case(
            of("DiceCELoss", **SIGMOID, lambda_dice=0, label_smoothing=0.2, ignore_label=-100),
            mask([-9, 9, 1, 9, -9], [0, 1, -100, 1, 0]),
            0.7201,
            digits=4,
        ),
        0.1 * 9 + np.log1p(np.exp(-9)),
        total(
            (
                4 / 5,
                of("DiceCELoss", **SIGMOID, lambda_dice=0, label_smoothing=0.2, ignore_label=-100),
            )
        ),
        ALL_VOXELS,
    ),
    "smp, MCCLoss, zeros for ones": Deviation(
        Case(first("MatthewsLoss", **NONE), one_class([0] * 8, [1] * 8), 1.5),
        1.0,
        None,
        COUNTS_WITH_EPS,
    ),
    "smp, MCCLoss, ones for ones": Deviation(
        Case(first("MatthewsLoss", **NONE), one_class([1] * 8, [1] * 8), 0.5),
        0.0,
        None,
        COUNTS_WITH_EPS,
    ),
    "torchmetrics, DiceScore, missing classes, macro, samplewise": Deviation(
        Case(dice_score("macro", "samplewise"), MISSING, 0.15, digits=4),
        (0.4 + (0.2 + 0) / 2) / 2,
        then(by_sample(dice_score("macro", "samplewise")), np.nanmean),
        MEAN_OF_MEANS,
    ),
    "torchmetrics, DiceScore, missing classes, weighted, samplewise": Deviation(
        Case(dice_score("weighted", "samplewise"), MISSING, 0.1308, digits=4),
        (16 * 0.4 + 36 * 0.2) / 52,
        total((1 / 2, dice_score("weighted", "samplewise"))),
        EMPTY_SAMPLE,
    ),
    "torchmetrics, MeanIoU, absent class, per class": Deviation(
        Case(
            of("JaccardScore", absent="predicted", average="none"),
            predicted_indices([[0, 1], [1, 0]], [[0, 1], [1, 0]], 3),
            [1.0, 1.0, -1.0],
        ),
        [1.0, 1.0, nan],
        then(
            of("JaccardScore", absent="predicted", average="none"),
            lambda v: np.nan_to_num(v, nan=-1),
        ),
        NEVER_THERE,
    ),
    "kornia, DiceLoss, micro, fractions as weights": Deviation(
        Case(
            first("DiceLoss", average="micro", class_weight=[0.3, 0.7, 0], **ALMOST),
            PARTLY,
            1 - 2 * 0.3**2 / (0.3 * 2 + 0.7),
        ),
        1 - 2 * 0.3 / (0.3 * 2 + 0.7),
        None,
        WEIGHT_SQUARED,
    ),
    **{
        f"DeepReg, {name} of 0, {nr}, 0": Deviation(
            Case(deepreg(nr, 0, jaccard), alike(0), published), 1.0, None, ZERO_BY_ZERO
        )
        for name, jaccard, _ in DEEPREG_NAMES
        for nr, published in ((1e-5, np.inf), (0, nan))
    },
    **{
        f"tensorflow-mri, {theirs}, after reset_state": Deviation(
            Case(after_reset(name, **options), HALF_ONES, 0.0),
            nan,
            then(after_reset(name, **options), np.nan_to_num),
            NOTHING_YET,
        )
        for theirs, (name, options, _) in MRI_METRICS.items()
    },
}
DEVIATIONS = {**REFUSED, **TAKEN_TWICE, **OF_REST}


@pytest.mark.parametrize("name", EQUAL)
def test_published_values_are_ours(name):
    case = EQUAL[name]
    assert_published(case.ours(case.data), case)


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviations_are_those_of_our_formula(name):
    """Ours is what our formula yields and not what is published. Where it can be said so, what is
    published is made of ours."""
    case, gives, theirs, _ = DEVIATIONS[name]
    if isinstance(gives, type):
        with pytest.raises(gives):
            case.ours(case.data)
    else:
        ours = case.ours(case.data)
        assert not agree(ours, case.published, rtol=1e-3, atol=1e-3), "no deviation any more"
        assert agree(ours, gives, rtol=1e-5, atol=5e-7), (ours, gives)
    if theirs is not None:
        assert_published(theirs(case.data), case)


# --- what the suites state by formulas ------------------------------------------------------------


def random_batch(classes, shape=(3, 5, 5), seed=0):
    """Logits `[N, spatial..., C]`, class indices, and labels of each class."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*shape, classes)).astype(np.float32)
    return x, rng.integers(0, classes, shape), rng.integers(0, 2, x.shape).astype(np.float32)


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("weight", [None, [1.0, 1.0, 2.0], [3, 2.0, 1]], ids=str)
@pytest.mark.parametrize("name", ["DiceFocalLoss", "GeneralizedDiceFocalLoss"])
def test_monai_dice_focal_losses_are_the_sum_of_their_parts(name, weight, share):
    x, _, t = random_batch(3)
    options = {**SIGMOID, "focal_gamma": 1.0, "ce_class_weight": weight}
    alone = getattr(losses, name.replace("Focal", ""))(**SIGMOID)
    for reduction in ("sum", "sum_over_batch_size", None):
        whole = getattr(losses, name)(lambda_ce=share, reduction=reduction, **options)(t, x)
        part = losses.DiceFocalLoss(lambda_dice=0, reduction=reduction, **options)(t, x)
        overlap = type(alone).from_config(alone.get_config() | {"reduction": reduction})(t, x)
        close(whole, overlap + share * part)


def test_a_focal_loss_without_exponent_is_the_cross_entropy():
    """As MONAI's suite and kornia's state it; and that an exponent of 0.1 makes a difference."""
    x, y, t = random_batch(10)
    for labels, dense in ((t, t), (y, one_hot(y, 10))):
        expected = keras.losses.BinaryCrossentropy(from_logits=True)(dense, x)
        close(binary(0.0)(Data(x, labels)), expected)
        assert abs(binary(0.1)(Data(x, labels)) - expected) > 1e-3
    fractions = np.random.default_rng(1).random(x.shape).astype(np.float32)
    expected = keras.losses.BinaryCrossentropy(from_logits=True)(fractions, x)
    close(binary(0.0)(Data(x, fractions)), expected)


@pytest.mark.parametrize("ignored", [0, 1, 255])
@pytest.mark.parametrize("name", ["DiceLoss", "DiceFocalLoss", "TverskyLoss"])
def test_what_is_ignored_makes_no_difference_to_monai_losses_and_ours(name, ignored):
    for activation, classes in (("softmax", 2), ("softmax", 3), ("sigmoid", 1)):
        x, y, _ = random_batch(max(classes, 2), (1, 4, 4))
        x = x[..., :classes]
        y[:, 2:] = ignored
        loss = getattr(losses, name)(activation=activation, ignore_label=ignored)
        other = x.copy()
        other[y == ignored] += 5 * np.arange(1, classes + 1)
        assert loss(y, x) == loss(y, other)


@pytest.mark.parametrize("name", ["DiceScore", "JaccardScore"])
def test_what_is_ignored_makes_no_difference_to_monai_metrics_and_ours(name):
    x, y, _ = random_batch(2, (1, 4, 4))
    y[:, 2:] = 255
    other = x.copy()
    other[:, 2:] *= -1
    value = of(name, ignore_label=255)
    assert value(Data(x, y)) == value(Data(other, y))


@pytest.mark.parametrize("options", [{}, {"jaccard": True}, None], ids=str)
def test_smp_class_weights_are_divided_by_their_sum(options):
    """Equal weights change nothing, others do; only their proportions count."""
    make = losses.TverskyLoss if options is None else losses.DiceLoss
    x, y, t = random_batch(3, (2, 4, 4))
    for labels, activation in ((y, "softmax"), (t, "sigmoid")):
        arguments = {"activation": activation, "batch": True, **smooth(0), **(options or {})}

        def loss(*w, arguments=arguments, labels=labels):
            weight = [v / sum(w) for v in w] if w else None
            return make(class_weight=weight, **arguments)(labels, x)

        close(loss(1, 1, 1), loss())
        close(loss(10, 20, 5), loss(1, 2, 0.5))
        assert abs(loss(1, 2, 0.5) - loss()) > 1e-6


def test_smp_focal_class_weights_have_no_scale():
    x, y, _ = random_batch(3, (2, 4, 4))

    def loss(weight):
        return of("DiceFocalLoss", lambda_dice=0, batch=True, ce_class_weight=weight)(Data(x, y))

    close(loss([1, 1, 1]), loss(None))
    close(loss([10, 20, 5]), loss([1, 2, 0.5]))


def test_f1_is_f_beta_with_1_and_dice():
    """As Keras' suite states it."""
    dice = of("DiceScore", average="none", over="dataset")
    close(f_beta(1, average="none")(F_ARGMAX), dice(F_ARGMAX))


@pytest.mark.parametrize("jaccard", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("background", [0.0, 0.1, 0.5, 1.0])
def test_deepreg_scores_are_ours_of_two_classes(background, hard, jaccard):
    """DeepReg's weight of the background is that of a class of its own, 1 - p."""
    weight = [background, 1 - background]
    for shape in ((1,), (10,), (100,), (2, 3), (2, 3, 4)):
        x, y = np.random.default_rng(0).random((2, 1, *shape)).astype(np.float32)
        if hard:
            x, y = x >= 0.5, y >= 0.5
        x, y = (np.stack([1 - v, v], -1).astype(np.float32) for v in (x, y))
        i, s = ((weight * v.reshape(-1, 2).sum(0)).sum() for v in (x * y, x + y))
        expected = (i + 1e-5) / (s - i + 1e-5) if jaccard else (2 * i + 1e-5) / (s + 1e-5)
        number = 2e-5 if jaccard else 1e-5
        ours = one_minus(
            of(
                "DiceLoss", **NONE, average="micro", class_weight=weight, jaccard=jaccard,
                **smooth(number),
            )
        )  # fmt: skip
        close(ours(Data(x, y)), expected)


MRI_DEFAULTS = {"alpha": 0.3, "beta": 0.7, "gamma": 0.75, "epsilon": 1e-5}
MRI_OTHERS = {"alpha": 0.2, "beta": 0.8, "gamma": 0.5, "epsilon": 1e-3}
# theirs: alpha, beta and gamma of the formula, where they are not arguments; our loss
MRI_LOSSES = {
    "FocalTverskyLoss": ({}, "TverskyLoss"),
    "TverskyLoss": ({"gamma": 1.0}, "TverskyLoss"),
    "F1Loss": ({"alpha": 0.5, "beta": 0.5, "gamma": 1.0}, "DiceLoss"),
    "IoULoss": ({"alpha": 1.0, "beta": 1.0, "gamma": 1.0}, "DiceLoss"),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", MRI_LOSSES)
def test_tensorflow_mri_losses_are_ours(name, average):
    """The suite's own random numbers, which NumPy draws, and its formula."""
    fixed, loss = MRI_LOSSES[name]
    for shape, arguments, with_weights in itertools.product(
        ((2, 4, 3), (4, 3), (3, 6, 6, 4)), (MRI_DEFAULTS, MRI_OTHERS), (False, True)
    ):
        a, b, g, epsilon = (arguments | fixed).values()
        y = np.random.default_rng(4).binomial(1, 0.5, shape)
        x = np.random.default_rng(4).uniform(0, 1, shape)
        axes = tuple(range(1, len(shape) - (average != "micro")))
        tp, fp, fn = (v.sum(axes) for v in (y * x, (1 - y) * x, y * (1 - x)))
        expected = (1 - (tp + epsilon) / (tp + a * fp + b * fn + epsilon)) ** g
        options = {**NONE, "average": average}
        if average == "macro":
            expected = expected.mean(-1)
        elif average == "weighted":
            weight = (tp + fn) / (tp + fn).sum(-1, keepdims=True)
            if with_weights:
                weight = np.random.default_rng(7).uniform(0, 1, shape[-1])
                options |= {"average": "macro", "class_weight": weight.tolist()}
            expected = (expected * weight).sum(-1)
        if loss == "TverskyLoss":
            options |= {"alpha": a, "beta": b, "gamma": g, **smooth(epsilon)}
        else:
            options |= {"jaccard": name == "IoULoss", **smooth(2 * epsilon)}
        if len(shape) == 2:
            x, y = x[:, None], y[:, None]
        close(of(loss, **options)(Data(x.astype(np.float32), y)), expected.mean())
