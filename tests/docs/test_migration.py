"""docs/migration.md, row by row: our code on that page computes what the other library computes.

A row's second cell is run as it is written (`written`). Its value and gradient are compared with
those of MONAI or Keras, or with the published formula (tests/helpers/peers.py), in double precision
on the very logits that ours get. Where a row says "differs", the tests show that the two differ,
and how.

The last tests look for rows that have no test. The others need MONAI and PyTorch: `make test-full`.
"""

import ast
import functools
import re
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import losses, metrics
from helpers.paths import DOCS, TESTS
from helpers.peers import (
    CLASSES,
    HAS_PEERS,
    NEEDS_PEERS,
    REGIONS,
    W,
    assert_conforms,
    hot,
    keras_tversky,
    kornia_loss,
    medicai_loss,
    mri_loss,
    nnunet_loss,
    nnunet_regions_loss,
    of_keras,
    of_ours,
    of_torch,
    sm_loss,
    smp_loss,
    soft_labels,
    spatial,
    volume,
)
from helpers.peers import unified_focal_loss as unified_focal
from helpers.reference import dice_losses
from helpers.tape import value_and_gradient

if HAS_PEERS:
    import torch
    from monai import losses as monai
    from monai import metrics as monai_metrics
    from monai.losses import unified_focal_loss

    from benchmarks import stability

pytestmark = pytest.mark.usefixtures("operation_by_operation")

PAGE = DOCS / "migration.md"
TESTS_OF_ROWS = {}  # {row: the names of the tests that run it}, filled by `runs`


class Row(typing.NamedTuple):
    """A row of the page, found by the heading above it and by its first cell."""

    heading: str
    cell: str


@functools.cache
def rows_of_page():
    """{Row: its other cells} for the rows of all tables of the page."""
    rows, heading, last = {}, "", None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|--"):
            del rows[last]  # the table's head
        elif line.startswith("|"):
            first, *others = (cell.strip() for cell in line.strip("|").split("|"))
            last = Row(heading, first)
            assert last not in rows, f"two rows of the page are {last}"
            rows[last] = others
    return rows


in_monai, in_nnunet, in_keras, in_sm, in_smp, in_mri, in_kornia, in_medicai = (
    functools.partial(Row, heading)
    for heading in (
        "MONAI 1.6",
        "nnU-Net 2.8",
        "Keras 3",
        "segmentation_models 1.0 (TensorFlow)",
        "segmentation_models_pytorch 0.5",
        "tensorflow-mri 0.23",
        "kornia 0.9",
        "medicai 0.0.4",
    )
)


def runs(*rows):
    """Says which rows of the page a test runs, and that it needs MONAI and PyTorch."""

    def decorate(test):
        for row in rows:
            TESTS_OF_ROWS.setdefault(row, []).append(test.__name__)
        for mark in NEEDS_PEERS:
            test = mark(test)
        return test

    return decorate


def written(row, template="{}", **names):
    """What the page's own code in a row's second cell builds.

    Args:
      template: what the pieces of code are filled into, as in "DiceLoss({}, batch=True)".
      names: the values of the names that the code leaves open.
    """
    pieces = re.findall("`([^`]+)`", rows_of_page()[row][0])
    return eval(template.format(*pieces), {**vars(losses), "metrics": metrics, **names})


def changed(loss, **options):
    """The same loss, or metric, with other arguments."""
    return type(loss).from_config({**loss.get_config(), **options})


class Case(typing.NamedTuple):
    """One way to write a row that is marked as equal. `template` and `names` are those of
    `written`."""

    template: str
    theirs: typing.Callable  # (x, y): value and gradient
    names: dict = {}
    classes: int = CLASSES
    channels: int | None = None  # of the logits, where there are fewer than label values
    ignored: int | None = None  # the label of voxels that do not count


def by_torch(formula, **arguments):
    return functools.partial(of_torch, lambda x, y: formula(x, y, **arguments))


def by_nnunet(formula, **arguments):
    """nnU-Net's loss holds -dice where ours, and the page's tables, hold 1 - dice."""
    weight = arguments.get("weight_dice", 1)
    return by_torch(lambda x, y: weight + formula(x, y, **arguments))


def by_monai(name, **arguments):
    """MONAI's loss of class indices; where there is one class, of a mask."""

    def loss(x, y):
        options = dict(arguments)
        if "weight" in options:
            options["weight"] = torch.tensor(options["weight"], dtype=x.dtype)
        if x.shape[1] == 1:
            return getattr(monai, name)(**options)(x, y.to(x.dtype))
        return getattr(monai, name)(to_onehot_y=True, **options)(x, y)

    return functools.partial(of_torch, loss)


def by_wasserstein(distances, **options):
    return by_torch(lambda x, y: monai.GeneralizedWassersteinDiceLoss(distances, **options)(x, y))


def by_keras(loss, activation=tf.nn.softmax):
    """A loss of one-hot labels and probabilities."""

    def of_logits(y, x):
        return loss(tf.one_hot(y, x.shape[-1], dtype=x.dtype), activation(x))

    return functools.partial(of_keras, of_logits)


def cross_entropy_and_dice(y, x):
    """The sum of Keras' cross-entropy and of Dice as docs/mathematics.md defines it."""
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    p, t = tf.nn.softmax(x), tf.one_hot(y, x.shape[-1], dtype=x.dtype)
    i, p, t = (tf.reduce_sum(v, list(range(1, x.shape.rank - 1))) for v in (p * t, p, t))
    return cross_entropy(y, x) + tf.reduce_mean(dice_losses(i, p, t))


BOTH = (False, True)
W3 = [3.0, 0.5, 2.0]  # The weights of the classes but the background.
# as in the first row of its table
AS_SMP = 'DiceLoss(batch=True, absent="one", smooth_nr=0, smooth_dr=0, {})'
AS_NNUNET = "DiceCELoss(batch={batch}, include_background=False, {{}})"
EQUAL = {
    "MONAI 1.6": {
        "`DiceLoss(softmax=True, to_onehot_y=True)`": [
            Case("{}", by_monai("DiceLoss", softmax=True)),
        ],
        "`DiceLoss(sigmoid=True)`": [
            Case("{}", by_monai("DiceLoss", sigmoid=True), classes=c) for c in (1, CLASSES)
        ],
        "`include_background`, `squared_pred`, `jaccard`, `batch`, `smooth_nr`, `smooth_dr`": [
            Case("DiceLoss(**o)", by_monai("DiceLoss", softmax=True, **o), {"o": o})
            for o in (
                {"include_background": False},
                {"squared_pred": True},
                {"jaccard": True},
                {"batch": True},
                {"smooth_nr": 0.5},
                {"smooth_dr": 3.0},
                {"include_background": False, "jaccard": True, "batch": True, "smooth_nr": 1},
            )
        ],
        "`weight=w`": [
            Case(
                "DiceLoss({}, **o)",
                by_monai("DiceLoss", softmax=True, weight=w, **o),
                {"w": w, "o": o},
            )
            for w, o in ((W, {}), (W, {"batch": True}), (W3, {"include_background": False}))
        ],
        "`ignore_index` of `DiceLoss` and `TverskyLoss`": [
            Case(
                name + "({}=k, batch=batch)",
                by_monai(name, softmax=True, ignore_index=k, batch=batch),
                {"k": k, "batch": batch},
                ignored=k,
            )
            for name, k, batch in (
                ("DiceLoss", 9, False),
                ("DiceLoss", 0, True),
                ("DiceLoss", -1, True),
                ("TverskyLoss", 9, True),
                ("TverskyLoss", 2, False),
                ("TverskyLoss", -1, False),
            )
        ],
        "`TverskyLoss(alpha=a, beta=b)`": [
            Case("{}", by_monai("TverskyLoss", softmax=True, alpha=a, beta=b), {"a": a, "b": b})
            for a, b in ((0.5, 0.5), (0.2, 0.9), (1.0, 0.3))
        ],
        "`GeneralizedDiceLoss(w_type=t)`": [
            Case("{}", by_monai("GeneralizedDiceLoss", softmax=True, w_type=t), {"t": t})
            for t in ("square", "simple", "uniform")
        ],
        "`DiceCELoss(softmax=True)`, its `lambda_dice`, `lambda_ce`, `label_smoothing`": [
            Case("DiceCELoss(**o)", by_monai("DiceCELoss", softmax=True, **o), {"o": o})
            for o in (
                {},
                {"lambda_dice": 0.3, "lambda_ce": 2.0},
                {"label_smoothing": 0.2, "batch": True},
                {"lambda_ce": 0.5, "label_smoothing": 0.1, "include_background": False},
            )
        ],
        "`DiceCELoss(sigmoid=True)` of one class": [
            Case("{}", by_monai("DiceCELoss", sigmoid=True, **o), classes=1)
            for o in ({}, {"label_smoothing": 0.3})
        ],
        "`DiceCELoss(weight=w, batch=True)` of class indices (`to_onehot_y=True`)": [
            Case("{}", by_monai("DiceCELoss", softmax=True, weight=w, batch=True), {"w": w})
            for w in (W, [1, 1, 1, 1], [0.2, 0.1, 7, 2])
        ]
        + [
            Case(
                "DiceCELoss(class_weight={2}, ce_class_weight=w, batch=True, {1})",
                by_monai(
                    "DiceCELoss", softmax=True, weight=W, batch=True, include_background=False
                ),
                {"w": W, "C": CLASSES},
            )
        ],
        "`DiceFocalLoss(sigmoid=True, gamma=g, lambda_focal=f)`": [
            Case(
                "{}",
                by_monai("DiceFocalLoss", sigmoid=True, gamma=g, lambda_focal=f),
                {"g": g, "f": f},
                classes=c,
            )
            for g, f, c in ((2, 1, CLASSES), (0.5, 3, CLASSES), (3.5, 0.2, 1))
        ],
        "`GeneralizedDiceFocalLoss(sigmoid=True, gamma=g, lambda_gdl=d, lambda_focal=f)`": [
            Case(
                "{0}",
                by_monai(
                    "GeneralizedDiceFocalLoss",
                    sigmoid=True,
                    gamma=g,
                    lambda_gdl=d,
                    lambda_focal=f,
                ),
                {"g": g, "d": d, "f": f},
            )
            for g, d, f in ((2, 1, 1), (0.5, 2, 3))
        ],
        "`DiceFocalLoss(sigmoid=True, alpha=a)`": [
            Case("{0}", by_monai("DiceFocalLoss", sigmoid=True, alpha=a), {"a": a}, classes=c)
            for a, c in ((0.25, CLASSES), (0.8, 1))
        ],
        "`DiceCELoss(sigmoid=True, weight=[w])` of one class": [
            Case("{}", by_monai("DiceCELoss", sigmoid=True, weight=[w]), {"w": w}, classes=1)
            for w in (0.5, 3.0)
        ],
        "`MCCLoss(softmax=True)`": [
            Case(
                "{0}.from_config({0}.get_config() | o)",
                by_monai("MCCLoss", softmax=True, **o),
                {"o": o},
            )
            for o in ({}, {"include_background": False, "batch": True}, {"smooth_nr": 1.0})
        ],
        "`GeneralizedWassersteinDiceLoss(d)`, its `weighting_mode`, `smooth_nr`, `smooth_dr`": [
            Case(
                "{0}.from_config({0}.get_config() | o)",
                by_wasserstein(d, **o),
                {"d": d, "o": o},
                classes=len(d),
            )
            for d, o in (
                (1 - np.eye(3), {}),
                (np.array([[0, 1, 1], [1, 0, 0.5], [1, 0.25, 0]]), {"weighting_mode": "GDL"}),
                (np.array([[0, 4], [2, 0]]), {"smooth_nr": 1.0, "smooth_dr": 2.0}),
            )
        ],
        "`DiceFocalLoss(sigmoid=True, include_background=False)`": [
            Case(
                "{}",
                by_monai("DiceFocalLoss", sigmoid=True, include_background=False),
                {"C": c},
                classes=c,
            )
            for c in (2, 3, CLASSES)
        ],
    },
    "nnU-Net 2.8": {
        "`DC_and_CE_loss` over `MemoryEfficientSoftDiceLoss(batch_dice, do_bg=False, "
        "smooth=1e-5)`": [
            Case("{}", by_nnunet(nnunet_loss, batch_dice=b), {"batch_dice": b}) for b in BOTH
        ],
        "`ignore_label=k` with `batch_dice=True`": [
            Case(
                AS_NNUNET.format(batch=True),
                by_nnunet(nnunet_loss, batch_dice=True, ignore_label=k),
                {"k": k},
                ignored=k,
            )
            for k in (9, 3, -1)
        ],
        "`weight_ce=e`, `weight_dice=d`": [
            Case(
                AS_NNUNET.format(batch=b),
                by_nnunet(nnunet_loss, batch_dice=b, weight_ce=e, weight_dice=d),
                {"e": e, "d": d},
            )
            for b, e, d in ((False, 0.5, 2), (True, 3, 0.1), (True, 0, 1))
        ],
        "`DC_and_BCE_loss`, region-based training": [
            Case("{}", by_nnunet(nnunet_regions_loss, batch_dice=b), {"batch_dice": b}, channels=3)
            for b in BOTH
        ],
        "`DC_and_BCE_loss(use_ignore_label=True)` with `batch_dice=True`": [
            Case(
                'DiceCELoss(activation="sigmoid", batch=True, regions=regions, {})',
                by_nnunet(nnunet_regions_loss, batch_dice=True, ignore_label=k),
                {"C": len(REGIONS), "regions": REGIONS, "k": k},
                channels=3,
                ignored=k,
            )
            for k in (9, 0, 4)
        ],
    },
    "Keras 3": {
        "`Dice()` after a softmax, one-hot labels": [
            Case("{}", by_keras(keras.losses.Dice(dtype="float64"))),
        ],
        "`Tversky(alpha=a, beta=b)`": [
            Case("{}", by_keras(keras_tversky(a, b)), {"a": a, "b": b})
            for a, b in ((0.5, 0.5), (0.2, 0.8), (1.5, 0.1))
        ]
        + [  # With a softmax FP and FN are equal once all classes are added up.
            Case(
                '{0}.from_config({0}.get_config() | dict(activation="sigmoid"))',
                by_keras(keras_tversky(a, b), tf.nn.sigmoid),
                {"a": a, "b": b},
            )
            for a, b in ((0.2, 0.8), (1.5, 0.1))
        ],
        "`SparseCategoricalCrossentropy(from_logits=True)`, besides Dice": [
            Case("{}", functools.partial(of_keras, cross_entropy_and_dice)),
        ],
    },
    "segmentation_models 1.0 (TensorFlow)": {
        "`DiceLoss(per_image=False)`, smooth 1e-5": [Case("{}", by_torch(sm_loss))],
        "`DiceLoss(per_image=True)`": [Case("{}", by_torch(sm_loss, per_image=True))],
        "`JaccardLoss()`": [Case("{}", by_torch(sm_loss, jaccard=True))],
        # Weights whose mean is 1. For other weights there is
        # test_class_weights_of_segmentation_models_add_a_constant.
        "`class_weights=w`": [
            Case(
                "DiceLoss({}, batch=batch)",
                by_torch(sm_loss, weights=w, per_image=not batch),
                {"w": w, "batch": batch},
            )
            for w, batch in (([0.5, 1, 2, 0.5], True), ([1, 1, 1, 1], False), ([0, 4, 0, 0], True))
        ],
        "`DiceLoss() + CategoricalFocalLoss()`": [
            Case("{}", by_torch(sm_loss, focal=True), {"C": c}, classes=c) for c in (2, 3, CLASSES)
        ],
        "`class_indexes` without background, of `DiceLoss` and `JaccardLoss`": [
            Case("DiceLoss({}, batch=True)", by_torch(sm_loss, first_class=1)),
            Case("DiceLoss({})", by_torch(sm_loss, first_class=1, per_image=True)),
            Case(
                "DiceLoss({}, batch=True, jaccard=True, smooth_nr=2e-5, smooth_dr=2e-5)",
                by_torch(sm_loss, first_class=1, jaccard=True),
            ),
        ],
    },
    "segmentation_models_pytorch 0.5": {
        '`DiceLoss("multiclass")`': [Case("{}", by_torch(smp_loss, kind="dice"))],
        '`DiceLoss("multiclass", log_loss=True)`': [
            Case(AS_SMP, by_torch(smp_loss, kind="dice", log_loss=True)),
            Case(
                AS_SMP.format("{}, jaccard=True"), by_torch(smp_loss, kind="jaccard", log_loss=True)
            ),
        ],
        '`JaccardLoss("multiclass")`': [Case(AS_SMP, by_torch(smp_loss, kind="jaccard"))],
        '`TverskyLoss("multiclass", alpha=a, beta=b)`': [
            Case("{}", by_torch(smp_loss, kind="tversky", alpha=a, beta=b), {"a": a, "b": b})
            for a, b in ((0.5, 0.5), (0.3, 0.7), (1.2, 0.4))
        ],
        "`ignore_index=k` of `DiceLoss` and `TverskyLoss`": [
            Case(template, by_torch(smp_loss, kind=kind, ignore_index=k), {"k": k}, ignored=k)
            for k in (9, 1, -1)
            for kind, template in (("dice", AS_SMP), ("tversky", AS_SMP.replace("Dice", "Tversky")))
        ],
        'mode `"binary"`': [
            Case(AS_SMP, by_torch(smp_loss, kind="dice"), classes=1),
            Case(AS_SMP.format("{}, jaccard=True"), by_torch(smp_loss, kind="jaccard"), classes=1),
            Case(
                AS_SMP.format("{}, ignore_label=9"),
                by_torch(smp_loss, kind="dice", ignore_index=9),
                classes=1,
                ignored=9,
            ),
        ],
    },
    "tensorflow-mri 0.23": {
        "`FocalTverskyLoss(alpha=0.3, beta=0.7, gamma=0.75)`": [
            Case("{}", by_torch(mri_loss, alpha=0.3, beta=0.7, gamma=0.75)),
        ],
        "`DiceLoss()`, `JaccardLoss()`": [
            Case("{0}", by_torch(mri_loss, alpha=0.5, beta=0.5)),
            Case(
                "{0}.from_config({0}.get_config() | dict({1}))",
                by_torch(mri_loss, alpha=1, beta=1),
            ),
        ],
        '`average="macro"`, `"micro"`': [
            Case(
                "TverskyLoss(alpha=0.3, beta=0.7, average=average)",
                by_torch(mri_loss, alpha=0.3, beta=0.7, micro=average == "micro"),
                {"average": average},
            )
            for average in ("macro", "micro")
        ],
        '`average="weighted"`, by support': [
            Case(
                "TverskyLoss(alpha=0.3, beta=0.7, gamma=g, {})",
                by_torch(mri_loss, alpha=0.3, beta=0.7, gamma=g, weights="support"),
                {"g": g},
            )
            for g in (1.0, 0.75)
        ],
        '`average="weighted", class_weights=w`': [
            Case(
                "TverskyLoss(alpha=0.3, beta=0.7, gamma=g, {})",
                by_torch(mri_loss, alpha=0.3, beta=0.7, gamma=g, weights=w),
                {"w": w, "g": g},
            )
            for w, g in ((W, 0.75), ([0.1, 0.2, 0.3, 0.4], 1), ([0, 1, 0, 1], 2))
        ],
    },
    "kornia 0.9": {
        '`DiceLoss(average="micro", eps=1e-8)`': [Case("{}", by_torch(kornia_loss, micro=True))],
        '`DiceLoss(average="macro", eps=1e-8)`': [Case("{}", by_torch(kornia_loss))],
        "`TverskyLoss(alpha=a, beta=b, eps=1e-8)`": [
            Case("{}", by_torch(kornia_loss, tversky=(a, b)), {"a": a, "b": b})
            for a, b in ((0.5, 0.5), (0.3, 0.7), (1.2, 0.4))
        ],
        "`ignore_index=k`": [
            Case(template, by_torch(kornia_loss, ignore_index=k, **o), {"k": k}, ignored=k)
            for k in (-1, 9, 2)
            for template, o in (
                ('DiceLoss({}, average="micro", smooth_nr=0, smooth_dr=1e-8)', {"micro": True}),
                ('DiceLoss({}, absent="skip", smooth_nr=0, smooth_dr=1e-8)', {}),
            )
        ],
    },
    "unified-focal-loss (TensorFlow)": {
        f"`{kind}_unified_focal_loss(weight=w, delta=d, gamma=g)`": [
            Case(
                "{}",
                by_torch(unified_focal, weight=w, delta=d, gamma=g, asymmetric=kind == "asym"),
                {"w": w, "d": d, "g": g},
                classes=2,
            )
            for w, d, g in ((0.5, 0.6, 0.5), (0.3, 0.8, 0.2))
        ]
        for kind in ("asym", "sym")
    },
    "medicai 0.0.4": {
        "`SparseDiceLoss(from_logits=True, num_classes=C)`": [
            Case("{}", by_torch(medicai_loss, kind="dice")),
        ],
        "`SparseIoULoss`": [Case("{}", by_torch(medicai_loss, kind="iou"))],
        "`SparseTverskyLoss(alpha=a, beta=b)`": [
            Case("{}", by_torch(medicai_loss, kind="tversky", alpha=a, beta=b), {"a": a, "b": b})
            for a, b in ((0.3, 0.7), (1.2, 0.4))
        ],
        "`SparseGeneralizedDiceLoss(weight_type=t)`": [
            Case("{0}", by_torch(medicai_loss, kind="generalized", weight_type=t), {"t": t})
            for t in ("square", "simple")
        ],
        "`SparseDiceCELoss(dice_weight=d, ce_weight=e)`": [
            Case(
                "{}",
                by_torch(medicai_loss, kind="dice", dice_weight=d, ce_weight=e),
                {"C": c, "d": d, "e": e},
                classes=c,
            )
            for d, e, c in ((1, 1, CLASSES), (0.5, 2, 3), (1, 1, 2))
        ],
        "`BinaryDiceCELoss(from_logits=True, num_classes=C)`": [
            Case("{}", by_torch(medicai_loss, kind="dice", ce_weight=1, binary=True), classes=c)
            for c in (CLASSES, 2)
        ],
        "`target_class_ids` without background, of Dice, IoU and Tversky": [
            Case(template, by_torch(medicai_loss, kind=kind, first_class=1))
            for kind, template in (
                ("dice", "DiceLoss({}, smooth_nr=1e-7, smooth_dr=1e-7)"),
                ("iou", "DiceLoss({}, jaccard=True, smooth_nr=2e-7, smooth_dr=2e-7)"),
                ("tversky", "TverskyLoss({}, smooth_nr=1e-7, smooth_dr=1e-7)"),
            )
        ],
        "`ignore_class_ids=k`": [
            Case(
                "DiceCELoss({}, lambda_ce=e / C, smooth_nr=1e-7, smooth_dr=1e-7)",
                by_torch(medicai_loss, kind="dice", ce_weight=e, ignored=k),
                {"k": k, "e": e, "C": CLASSES},
                ignored=k,
            )
            for k, e in ((9, 0), (-1, 1), (2, 1))
        ],
    },
}
FORMS = {
    f"{heading}, {cell} {i}": (Row(heading, cell), form)
    for heading, cells in EQUAL.items()
    for cell, forms in cells.items()
    for i, form in enumerate(forms)
}
# A volume, the logits' type, the labels' type, the layout; labels with a channel axis or without.
SETTINGS = {
    "random": (tf.float32, tf.uint8, "channels_last", False),
    "two dimensions": (tf.float64, tf.int64, "channels_first", True),
    "one dimension": (tf.float16, tf.float32, "channels_last", False),
    "absent class": (tf.bfloat16, tf.int32, "channels_first", False),
    "all background": (tf.float32, tf.int8, "channels_last", True),
    "single-voxel lesion": (tf.float32, tf.int16, "channels_first", True),
    "one voxel": (tf.float64, tf.int32, "channels_last", True),
}
OF_FURTHER_FORMS = ("two dimensions", "one dimension", "absent class")
# The largest errors of value and gradient. What MONAI computes of float64 is float32 in places; a
# half gradient loses half a unit in the last place where it is stored.
TOLERANCES = {
    tf.float64: (1e-6, 1e-6),
    tf.float32: (1e-5, 1e-5),
    tf.float16: (1e-5, 2**-11),
    tf.bfloat16: (1e-5, 2**-8),
}


def in_setting(loss, x, y, labels, data_format, channel):
    """A loss's value, and its gradient as float64 with the channels last, as they are in x."""
    first = data_format == "channels_first"
    loss = changed(loss, data_format=data_format)
    if channel:
        y = np.expand_dims(y, 1 if first else -1)
    x = tf.constant(np.moveaxis(x, -1, 1) if first else x)
    y = tf.constant(y, labels)
    value, gradient = value_and_gradient(lambda x: loss(y, x), x)
    gradient = gradient.numpy().astype(np.float64)
    return value.numpy(), np.moveaxis(gradient, 1, -1) if first else gradient


def with_ignored(y, label, share=0.3):
    """Labels of which some are replaced by `label`, but never the first voxel of a sample."""
    hit = np.random.default_rng(9).random(y.shape) < share
    hit.reshape(len(y), -1)[:, 0] = False
    return np.where(hit, label, y)


@pytest.mark.parametrize(
    ("form", "volume_name"),
    [
        pytest.param(form, volume_name, id=f"{form}, {volume_name}")
        for form in FORMS
        for volume_name in (SETTINGS if form.endswith(" 0") else OF_FURTHER_FORMS)
    ],
)
@runs(*(row for row, _ in FORMS.values()))
def test_rows_marked_as_equal_are_equal(form, volume_name):
    row, case = FORMS[form]
    dtype, labels, data_format, channel = SETTINGS[volume_name]
    x, y = volume(volume_name, case.classes)
    x = tf.cast(x[..., : case.channels], dtype).numpy()
    if case.ignored is not None:
        y = with_ignored(y, case.ignored)
        if y.min() < 0 and labels.is_unsigned:
            labels = tf.int16
    theirs = case.theirs(x.astype(np.float64), y)
    ours = in_setting(written(row, case.template, **case.names), x, y, labels, data_format, channel)
    assert_conforms(ours, theirs, *TOLERANCES[dtype])


# --- rows that need a test of their own -----------------------------------------------------------

SOME = ("random", "two dimensions", "absent class")
# A row's pieces of code: our loss, and two losses that add up to theirs.
THREE = ("{0}", "{1}", "{2}")


def assert_differ(ours, theirs):
    """Value and gradient differ by far more than rounding."""
    (value, gradient), (expected, expected_gradient) = ours, theirs
    assert abs(value - expected) > 1e-3 * abs(expected)
    distance = np.linalg.norm(gradient - expected_gradient)
    assert distance > 1e-3 * np.linalg.norm(expected_gradient)


def total(*parts):
    """The loss that is the sum of several losses."""
    return lambda y, x: sum(part(y, x) for part in parts)


def sums_of(p, t, mask=1):
    return [(v * mask).sum(spatial(p)) for v in (p * t, p, t)]


def a_mask(y):
    """Which voxels count, `[N, spatial...]`; the first voxel of each sample always does."""
    return with_ignored(y, -1, 0.4) != -1


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai('`reduction="none"`'))
def test_monai_dice_without_reduction_is_equal(batch, volume_name):
    x, y = volume(volume_name)
    row = in_monai('`reduction="none"`')
    ours = written(row, "DiceLoss({}, batch=batch)", batch=batch)
    theirs = monai.DiceLoss(softmax=True, to_onehot_y=True, reduction="none", batch=batch)
    assert ours(y, x).shape == (len(y), CLASSES)
    weight = np.random.default_rng(1).random((len(y), CLASSES)).astype(np.float32)

    def of_theirs(x, y):
        each = theirs(x, y)
        ones = (1,) * (x.ndim - 2)
        assert each.shape == ((CLASSES,) if batch else (len(x), CLASSES)) + ones
        return (each.reshape(-1, CLASSES) * torch.tensor(weight)).sum()

    weighted = of_ours(lambda y, x: tf.reduce_sum(ours(y, x) * weight), x, y)
    assert_conforms(weighted, of_torch(of_theirs, x, y))


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "GeneralizedDiceLoss"])
@runs(in_monai("`soft_label=True` of `DiceLoss`, `TverskyLoss` and `GeneralizedDiceLoss`"))
def test_monai_soft_labels_are_equal(name, volume_name):
    x, y = volume(volume_name)
    row = in_monai("`soft_label=True` of `DiceLoss`, `TverskyLoss` and `GeneralizedDiceLoss`")
    ours = written(row, name + "({})")
    theirs = getattr(monai, name)(softmax=True, soft_label=True)
    t = soft_labels(y)

    def of_theirs(x, y):
        return theirs(x, torch.tensor(np.moveaxis(t, -1, 1)).to(x.dtype))

    if name == "GeneralizedDiceLoss":
        ours = changed(ours, smooth_nr=1e-5, smooth_dr=1e-5)  # MONAI's
    assert_conforms(of_ours(lambda y, x: ours(t, x), x, y), of_torch(of_theirs, x, y))


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("w", [0.5, 0.2])
@runs(
    in_monai(
        "`AsymmetricUnifiedFocalLoss(weight=w, gamma=g, delta=d)` of the softmax of two classes"
    )
)
def test_monai_unified_focal_loss_differs(w, volume_name):
    x, y = volume(volume_name, 2)
    row = in_monai(
        "`AsymmetricUnifiedFocalLoss(weight=w, gamma=g, delta=d)` of the softmax of two classes"
    )
    ours, again = (written(row, c, w=w, g=0.3, d=0.7) for c in ("{0}", "{1}"))
    theirs = monai.AsymmetricUnifiedFocalLoss(to_onehot_y=True, weight=w, gamma=0.3, delta=0.7)
    monais = of_torch(lambda x, y: theirs(torch.softmax(x, 1), y), x, y)
    assert_differ(of_ours(ours, x, y), monais)
    assert_conforms(of_ours(lambda y, x: (1 - w / 2) * again(y, x), x, y), monais)


def of_masked(loss, x, y, mask):
    return of_ours(lambda y, x: loss(y, x, mask.astype(np.float32)), x, y)


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai("`MaskedDiceLoss(softmax=True)` of one-hot labels"))
def test_monai_masked_dice_of_one_hot_labels_is_equal(batch, activation, volume_name):
    x, y = volume(volume_name)
    mask = a_mask(y)
    ours = written(in_monai("`MaskedDiceLoss(softmax=True)` of one-hot labels"), "{0}")
    theirs = monai.MaskedDiceLoss(**{activation: True}, batch=batch)

    def masked(x, y):
        return theirs(x, hot(y, CLASSES, x.dtype), torch.tensor(mask[:, None]).to(x.dtype))

    ours = changed(ours, activation=activation, batch=batch)
    assert_conforms(of_masked(ours, x, y, mask), of_torch(masked, x, y))


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai("`MaskedDiceLoss(softmax=True, to_onehot_y=True)`"))
def test_monai_masked_dice_of_class_indices_differs(batch, volume_name):
    """MONAI takes masked voxels for background: T of class 0 grows by their number."""
    x, y = volume(volume_name)
    mask = a_mask(y)
    counted = torch.tensor(mask[:, None])
    loss = changed(
        written(in_monai("`MaskedDiceLoss(softmax=True, to_onehot_y=True)`"), "{0}"), batch=batch
    )

    def masked(x, y, **options):
        options |= {"softmax": True, "to_onehot_y": True, "batch": batch}
        return monai.MaskedDiceLoss(**options)(x, y, counted.long())

    def by_formula(x, y, masked_are_background):
        i, p, t = sums_of(torch.softmax(x, 1), hot(y, CLASSES, x.dtype), counted)
        if masked_are_background:
            t[:, 0] += (~counted).sum((1, *spatial(x)))
        if batch:
            i, p, t = i.sum(0), p.sum(0), t.sum(0)
        return dice_losses(i, p, t).mean()

    ours, theirs = of_masked(loss, x, y, mask), of_torch(masked, x, y)
    assert_differ(ours, theirs)
    assert_conforms(ours, of_torch(lambda x, y: by_formula(x, y, False), x, y))
    assert_conforms(of_torch(lambda x, y: by_formula(x, y, True), x, y), theirs)
    without = of_torch(lambda x, y: masked(x, y, include_background=False), x, y)
    assert_conforms(of_masked(changed(loss, include_background=False), x, y, mask), without)


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai("`DiceCELoss(sigmoid=True)` of several classes"))
def test_monai_cross_entropy_beside_a_sigmoid_differs(batch, volume_name):
    x, y = volume(volume_name)
    row = in_monai("`DiceCELoss(sigmoid=True)` of several classes")
    ours, dice, cross_entropy = (changed(written(row, c), batch=batch) for c in THREE)
    theirs = by_monai("DiceCELoss", sigmoid=True, batch=batch)(x, y)
    assert_differ(of_ours(ours, x, y), theirs)
    assert_conforms(of_ours(total(dice, cross_entropy), x, y), theirs)

    def by_formula(x, y):
        t = hot(y, CLASSES, x.dtype)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t)
        return monai.DiceLoss(sigmoid=True, batch=batch)(x, t) + bce

    assert_conforms(of_ours(ours, x, y), of_torch(by_formula, x, y))


def weighted_cross_entropy(x, y, weight):
    """The cross-entropy of each voxel, and each voxel's weight; both are `[N, spatial...]`."""
    w = torch.tensor(weight, dtype=x.dtype)
    each = torch.nn.functional.cross_entropy(x, y[:, 0], weight=w, reduction="none")
    return each, w[y[:, 0]]


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("background", [False, True])
@runs(in_monai("`DiceCELoss(weight=w)` of class indices (`to_onehot_y=True`)"))
def test_monai_weights_of_single_samples_differ(background, volume_name):
    """MONAI's cross-entropy is that of the batch even where its Dice is that of each sample."""
    x, y = volume(volume_name)
    row = in_monai("`DiceCELoss(weight=w)` of class indices (`to_onehot_y=True`)")
    w = W if background else [0.0] + W3
    ours, dice, cross_entropy = (written(row, c, w=W) for c in THREE)
    # Without background Dice has no weight for class 0, and its mean is over the other classes.
    if not background:
        of_dice = {"class_weight": [v / 3 for v in W3], "include_background": False}
        ours = changed(ours, ce_class_weight=w, **of_dice)
        dice, cross_entropy = changed(dice, **of_dice), changed(cross_entropy, ce_class_weight=w)
    options = {"weight": w, "include_background": background}
    theirs = by_monai("DiceCELoss", softmax=True, **options)(x, y)
    assert_conforms(of_ours(total(dice, cross_entropy), x, y), theirs)

    def by_formula(x, y):
        each, weights = weighted_cross_entropy(x, y, w)
        voxels = tuple(range(1, each.ndim))
        of_samples = each.sum(voxels) / weights.sum(voxels)
        first = 0 if background else 1
        losses = dice_losses(*sums_of(torch.softmax(x, 1), hot(y, CLASSES, x.dtype)))
        losses = losses[:, first:] * torch.tensor(w[first:], dtype=x.dtype)
        return losses.mean() + of_samples.mean()

    # This class is mostly in the first sample.
    y[0][np.random.default_rng(2).random(y[0].shape) < 0.8] = 3
    theirs = by_monai("DiceCELoss", softmax=True, **options)(x, y)
    assert_differ(of_ours(ours, x, y), theirs)
    assert_conforms(of_ours(ours, x, y), of_torch(by_formula, x, y))
    assert_conforms(of_ours(total(dice, cross_entropy), x, y), theirs)


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai("`DiceCELoss(weight=w)` of one-hot labels"))
def test_monai_weights_of_one_hot_labels_differ(batch, volume_name):
    """For one-hot labels PyTorch divides by the number of voxels, for class indices by their
    weights.

    Ours gives the same for both kinds of labels.
    """
    x, y = volume(volume_name)
    row = in_monai("`DiceCELoss(weight=w, batch=True)` of class indices (`to_onehot_y=True`)")
    ours = changed(written(row, w=W), batch=batch)
    weight = torch.tensor(W, dtype=torch.float64)
    of_one_hot = monai.DiceCELoss(softmax=True, weight=weight, batch=batch)
    theirs = of_torch(lambda x, y: of_one_hot(x, hot(y, CLASSES, x.dtype)), x, y)
    assert_differ(of_ours(ours, x, y), theirs)
    dice = monai.DiceLoss(softmax=True, to_onehot_y=True, weight=weight, batch=batch)

    def by_formula(x, y):
        each, _ = weighted_cross_entropy(x, y, W)
        return dice(x, y) + each.sum() / y.numel()

    assert_conforms(of_torch(by_formula, x, y), theirs)
    of_classes = of_ours(ours, x, y)
    one_hot = of_ours(lambda y, x: ours(tf.one_hot(y, CLASSES), x), x, y)
    assert_conforms(one_hot, of_classes)


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai("`DiceFocalLoss(softmax=True)`"))
def test_monai_focal_loss_beside_a_softmax_differs(batch, volume_name):
    x, y = volume(volume_name)
    ours, dice, focal = (
        changed(written(in_monai("`DiceFocalLoss(softmax=True)`"), c), batch=batch) for c in THREE
    )
    theirs = by_monai("DiceFocalLoss", softmax=True, batch=batch)(x, y)
    assert_differ(of_ours(ours, x, y), theirs)
    assert_conforms(of_ours(total(dice, focal), x, y), theirs)

    def by_formula(x, y):
        t = hot(y, CLASSES, x.dtype)
        log_p = torch.log_softmax(x, 1)
        focal = -(t * (1 - log_p.exp()) ** 2 * log_p).sum(1).mean()
        return monai.DiceLoss(softmax=True, batch=batch)(x, t) + focal

    assert_conforms(of_ours(ours, x, y), of_torch(by_formula, x, y))


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_monai("`DiceFocalLoss(sigmoid=True, include_background=False)`"))
def test_monai_focal_loss_without_background_is_equal(batch, volume_name):
    """MONAI leaves the background out of the focal term as well; ours needs the row's weights for
    it."""
    x, y = volume(volume_name)
    row = in_monai("`DiceFocalLoss(sigmoid=True, include_background=False)`")
    ours = changed(written(row, C=CLASSES), batch=batch)
    options = {"include_background": False, "batch": batch}
    theirs = by_monai("DiceFocalLoss", sigmoid=True, **options)(x, y)
    assert_conforms(of_ours(ours, x, y), theirs)

    def of_all_classes(x, y):
        focal = monai.FocalLoss(to_onehot_y=True)(x, y)
        return monai.DiceLoss(sigmoid=True, to_onehot_y=True, **options)(x, y) + focal

    unweighted = of_ours(changed(ours, ce_class_weight=None), x, y)
    assert_conforms(unweighted, of_torch(of_all_classes, x, y))
    assert_differ(unweighted, theirs)


def monai_score(x, y, **options):
    score = monai_metrics.DiceMetric(num_classes=CLASSES, **options)
    score(torch.tensor(x.argmax(-1)[:, None]), torch.tensor(y[:, None]))
    return score.aggregate().numpy()


def our_score(score, x, y):
    score.update_state(y, x)
    return score.result().numpy()


@pytest.mark.parametrize("background", [False, True])
@runs(in_monai("`DiceMetric(ignore_empty=True)`"))
def test_monai_metric_differs_where_classes_are_absent(background):
    x, y = volume("absent class")  # Sample 0 is all background, and no sample has class 3.
    y[1][y[1] == 2] = 1
    mean, each = (
        changed(
            written(in_monai("`DiceMetric(ignore_empty=True)`"), c), include_background=background
        )
        for c in ("{0}", "{1}")
    )
    of_classes = monai_score(x, y, reduction="mean_batch", include_background=background)
    assert of_classes[-1] == 0 and np.isnan(our_score(each, x, y)[-1])
    np.testing.assert_allclose(our_score(each, x, y)[:-1], of_classes[:-1], rtol=1e-6)
    ours = our_score(mean, x, y)
    np.testing.assert_allclose(ours, of_classes[:-1].mean(), rtol=1e-6)
    assert abs(ours - monai_score(x, y, include_background=background)) > 1e-3


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("background", [False, True])
@runs(in_monai("`DiceMetric(ignore_empty=False)`"))
def test_monai_metric_that_counts_empty_labels_is_equal(background, volume_name):
    x, y = volume(volume_name)
    score = written(in_monai("`DiceMetric(ignore_empty=False)`"))
    theirs = monai_score(x, y, ignore_empty=False, include_background=background)
    ours = our_score(changed(score, include_background=background), x, y)
    np.testing.assert_allclose(ours, theirs[0], rtol=1e-6)


@pytest.mark.parametrize("label", [9, 3, 255])
@pytest.mark.parametrize("volume_name", SOME)
@runs(
    in_nnunet("`ignore_label=k` with `batch_dice=False`"),
    in_nnunet("`DC_and_BCE_loss(use_ignore_label=True)` with `batch_dice=False`"),
)
def test_nnunet_ignored_voxels_of_single_samples_differ(volume_name, label):
    """nnU-Net's cross-entropy is the mean over the batch's voxels, ours the mean of the samples'
    means."""
    x, y = volume(volume_name)
    y[0] = with_ignored(y, label, 0.7)[0]
    row = in_nnunet("`ignore_label=k` with `batch_dice=False`")
    ours = written(row, "DiceCELoss(include_background=False, {0})", k=label)
    parts = (written(row, code, k=label) for code in ("{1}", "{2}"))
    theirs = by_nnunet(nnunet_loss, batch_dice=False, ignore_label=label)(x, y)
    assert_differ(of_ours(ours, x, y), theirs)
    assert_conforms(of_ours(total(*parts), x, y), theirs)

    def of_samples(formula):
        each = by_nnunet(formula, batch_dice=False, ignore_label=label)
        values, gradients = zip(
            *(each(x[n : n + 1], y[n : n + 1]) for n in range(len(x))), strict=True
        )
        return np.mean(values), np.concatenate(gradients) / len(x)

    assert_conforms(of_ours(ours, x, y), of_samples(nnunet_loss))
    x = x[..., : len(REGIONS)]
    row = in_nnunet("`DC_and_BCE_loss(use_ignore_label=True)` with `batch_dice=False`")
    template = 'DiceCELoss(activation="sigmoid", regions=regions, {})'
    ours = written(row, template, regions=REGIONS, C=len(REGIONS), k=label)
    theirs = by_nnunet(nnunet_regions_loss, batch_dice=False, ignore_label=label)(x, y)
    assert_differ(of_ours(ours, x, y), theirs)
    assert_conforms(of_ours(ours, x, y), of_samples(nnunet_regions_loss))
    of_batch = changed(ours, batch=True, lambda_dice=0)
    dice = changed(ours, lambda_ce=0)
    assert_conforms(of_ours(total(dice, of_batch), x, y), theirs)


@runs()
def test_nnunet_adds_the_cross_entropy_of_regions_up_where_a_label_is_ignored():
    """It does so even for a label that no voxel has: its cross-entropy is then C times as large."""
    x, y = volume("random")
    x = x[..., : len(REGIONS)]
    dice = written(in_nnunet("`DC_and_BCE_loss`, region-based training"), batch_dice=True)
    dice, _ = of_ours(changed(dice, lambda_ce=0), x, y)
    without, _ = by_nnunet(nnunet_regions_loss, batch_dice=True)(x, y)
    ignoring, _ = by_nnunet(nnunet_regions_loss, batch_dice=True, ignore_label=9)(x, y)
    np.testing.assert_allclose(ignoring - dice, len(REGIONS) * (without - dice), rtol=1e-6)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("batch_size", [2, 4])
@runs(in_nnunet("batch Dice gathered over GPUs (`AllGatherGrad`)"))
def test_nnunet_batch_dice_of_two_gpus_is_that_of_the_whole_batch(batch_size, ignored):
    """Two halves of a batch stand for two GPUs. nnU-Net takes the Dice of all samples, and the mean
    of the two cross-entropies.

    tests/losses/test_distribute.py shows that the replicas of a strategy are one batch.
    """
    x, y = (np.tile(v, (2,) + (1,) * (v.ndim - 1))[:batch_size] for v in volume("random"))
    x = x + np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    x[: batch_size // 2] *= 3
    if ignored:
        y[: batch_size // 2] = with_ignored(y, 9, 0.6)[: batch_size // 2]
    ours = of_ours(losses.DiceCELoss(batch=True, include_background=False, ignore_label=9), x, y)

    def theirs(x, y):
        dice = nnunet_loss(x, y, batch_dice=True, ignore_label=9, weight_ce=0)
        halves = zip(x.chunk(2), y.chunk(2), strict=True)
        of_gpus = [
            nnunet_loss(*half, batch_dice=True, ignore_label=9, weight_dice=0) for half in halves
        ]
        return 1 + dice + sum(of_gpus) / 2

    if ignored:
        assert_differ(ours, of_torch(theirs, x, y))
    else:
        assert_conforms(ours, of_torch(theirs, x, y))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 8, 3), (2, 4, 4, 3), (1, 3, 4, 5, 3)])
@runs(in_keras("`Tversky(alpha=a, beta=b)`"), in_keras("`Dice()` after a softmax, one-hot labels"))
def test_keras_losses_are_1_where_labels_and_probabilities_are_0(shape, dtype):
    zeros = tf.zeros(shape, tf.float64)
    p = tf.zeros(shape, dtype)
    for theirs, row in (
        (keras_tversky(0.2, 0.8), in_keras("`Tversky(alpha=a, beta=b)`")),
        (keras.losses.Dice(dtype="float64"), in_keras("`Dice()` after a softmax, one-hot labels")),
    ):
        assert abs(float(theirs(zeros, zeros)) - 1) <= 1e-6
        ours = changed(written(row, a=0.2, b=0.8), activation="none")
        assert abs(float(ours(tf.zeros(shape, tf.uint8), p)) - 1) <= 1e-6
        smoothed = changed(ours, smooth_nr=1e-7)
        assert abs(float(smoothed(tf.zeros(shape, tf.uint8), p))) <= 1e-6


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("batch", [False, True])
@runs(in_sm("`class_weights=w`"))
def test_class_weights_of_segmentation_models_add_a_constant(batch, volume_name):
    """Where the mean of the weights is not 1, ours is larger by that mean minus 1; the gradients
    agree."""
    x, y = volume(volume_name)
    ours = written(in_sm("`class_weights=w`"), "DiceLoss({}, batch=batch)", w=W, batch=batch)
    value, gradient = by_torch(sm_loss, weights=W, per_image=not batch)(x, y)
    assert np.mean(W) == 1.875
    assert_conforms(of_ours(ours, x, y), (value + 0.875, gradient))


OF_PROBABILITIES = {
    "segmentation_models Dice": (
        in_sm("`DiceLoss(per_image=False)`, smooth 1e-5"),
        by_torch(sm_loss, activated=True),
    ),
    "segmentation_models Dice per image": (
        in_sm("`DiceLoss(per_image=True)`"),
        by_torch(sm_loss, per_image=True, activated=True),
    ),
    "segmentation_models Jaccard": (
        in_sm("`JaccardLoss()`"),
        by_torch(sm_loss, jaccard=True, activated=True),
    ),
    "tensorflow-mri focal Tversky": (
        in_mri("`FocalTverskyLoss(alpha=0.3, beta=0.7, gamma=0.75)`"),
        by_torch(mri_loss, alpha=0.3, beta=0.7, gamma=0.75, activated=True),
    ),
    "Keras Dice": (
        in_keras("`Dice()` after a softmax, one-hot labels"),
        functools.partial(
            of_keras,
            lambda y, p: keras.losses.Dice(dtype="float64")(
                tf.one_hot(y, CLASSES, dtype=p.dtype), p
            ),
        ),
    ),
}


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("name", OF_PROBABILITIES)
@runs()
def test_losses_of_probabilities_are_equal(name, volume_name):
    """activation="none" is for models that end in a softmax; the gradient is that of the
    probabilities."""
    row, theirs = OF_PROBABILITIES[name]
    x, y = volume(volume_name)
    p = tf.nn.softmax(x).numpy()
    assert_conforms(of_ours(changed(written(row), activation="none"), p, y), theirs(p, y))


@pytest.mark.parametrize("volume_name", SOME)
@runs(in_smp('`DiceLoss("multiclass", log_loss=True)`'))
def test_smp_raises_smaller_scores_to_1e_7_before_the_logarithm(volume_name):
    """smp takes the logarithm of 1e-7 for every smaller score, which then has no gradient."""
    x, y = volume(volume_name)
    x[..., 1] -= 50
    loss = written(in_smp('`DiceLoss("multiclass", log_loss=True)`'), AS_SMP)
    log_loss = functools.partial(by_torch, smp_loss, kind="dice", log_loss=True)
    theirs = log_loss()(x, y)
    assert_differ(of_ours(loss, x, y), theirs)
    assert_conforms(of_ours(loss, x, y), log_loss(eps=1e-40)(x, y))
    value, gradient = of_ours(changed(loss, class_weight=[1 / 4, 0, 1 / 4, 1 / 4]), x, y)
    assert_conforms((value - np.log(1e-7) / 4, gradient), theirs)


@pytest.mark.parametrize("volume_name", SOME)
@pytest.mark.parametrize("gamma", [0.75, 2, 3])
@runs(in_smp('`TverskyLoss("multiclass", gamma=g)`'))
def test_gamma_of_smp_differs(gamma, volume_name):
    """smp raises the mean to that power, ours each class's loss; of one class they are equal."""
    x, y = volume(volume_name)
    x[..., 1] += 4 * (y == 1)
    template = AS_SMP.replace("DiceLoss(", "TverskyLoss(alpha=0.3, beta=0.7, ")
    ours = written(in_smp('`TverskyLoss("multiclass", gamma=g)`'), template, g=gamma)
    options = {"kind": "tversky", "alpha": 0.3, "beta": 0.7}
    theirs = by_torch(smp_loss, gamma=gamma, **options)
    assert_differ(of_ours(ours, x, y), theirs(x, y))
    assert_conforms(of_torch(lambda x, y: smp_loss(x, y, **options) ** gamma, x, y), theirs(x, y))

    def by_formula(x, y):
        i, p, t = (v.sum(0) for v in sums_of(torch.softmax(x, 1), hot(y, CLASSES, x.dtype)))
        each = 1 - i / (i + 0.3 * (p - i) + 0.7 * (t - i))
        return torch.where(t > 0, each**gamma, 0).mean()

    assert_conforms(of_ours(ours, x, y), of_torch(by_formula, x, y))
    x, y = volume("random", 1)
    assert_conforms(of_ours(changed(ours, activation="sigmoid"), x, y), theirs(x, y))


@runs(
    in_kornia('`DiceLoss(average="macro", eps=1e-8)`'),
    in_kornia("`TverskyLoss(alpha=a, beta=b, eps=1e-8)`"),
)
def test_kornia_losses_are_what_a_calculation_by_hand_gives():
    """Four pixels are labelled 0, 0, 1, 1, and each has p = 1/2, 1/4, 1/4: class 2 is absent.

    TP, FP, FN are 1, 1, 1 for class 0 and 1/2, 1/2, 3/2 for class 1. kornia 0.9 takes the mean over
    these two classes. Until 0.8 its Dice took the mean over all three, and its Tversky loss added
    the classes up first.
    """
    x = np.tile(np.log([0.5, 0.25, 0.25]), (1, 2, 2, 1)).astype(np.float32)
    y = np.array([[[0, 0], [1, 1]]])
    dice = written(in_kornia('`DiceLoss(average="macro", eps=1e-8)`'), "{0}")
    row = in_kornia("`TverskyLoss(alpha=a, beta=b, eps=1e-8)`")
    tversky = written(row, "{0}", a=0.3, b=0.7)
    of_dice, of_tversky = 1 - (1 / 2 + 1 / 3) / 2, 1 - (1 / 2 + 0.5 / 1.7) / 2
    for loss, formula, expected, until_0_8, options in (
        (dice, by_torch(kornia_loss), of_dice, 1 - (1 / 2 + 1 / 3) / 3, {}),
        (tversky, by_torch(kornia_loss, tversky=(0.3, 0.7)), of_tversky, 1 - 1.5 / 4,
         {"average": "micro"}),
    ):  # fmt: skip
        assert abs(float(loss(y, x)) - expected) <= 1e-6
        assert_conforms(of_ours(loss, x, y), formula(x, y))
        assert abs(float(formula(x, y)[0]) - expected) <= 1e-6
        old = changed(loss, absent="keep", **options)
        assert abs(float(old(y, x)) - until_0_8) <= 1e-6
        assert abs(until_0_8 - expected) > 0.02


@pytest.mark.parametrize("ignored", [-1, 9, 2])
@runs(in_kornia("`ignore_index=k`"))
def test_a_sample_that_is_ignored_as_a_whole_is_1_in_kornia(ignored):
    """kornia's mean over no class is 1, ours is 0. Where all classes are added up, both losses are
    1."""
    x, y = volume("random")
    y = with_ignored(y, ignored)
    y[1] = ignored
    for cell, options, mean_is_1 in (
        ('`DiceLoss(average="micro", eps=1e-8)`', {"micro": True}, False),
        ('`DiceLoss(average="macro", eps=1e-8)`', {}, True),
        ("`TverskyLoss(alpha=a, beta=b, eps=1e-8)`", {"tversky": (0.3, 0.7)}, True),
    ):
        loss = changed(written(in_kornia(cell), "{0}", a=0.3, b=0.7), ignore_label=ignored)
        ours = in_setting(loss, x, y, tf.int16, "channels_last", False)
        value, gradient = by_torch(kornia_loss, ignore_index=ignored, **options)(x, y)
        assert_conforms(ours, (value - mean_is_1 / len(y), gradient))


@pytest.mark.parametrize("gamma", [0.25, 0.75])
@pytest.mark.parametrize("volume_name", SOME)
@runs()
def test_monai_unified_focal_loss_has_an_exponent_for_the_foreground_alone(volume_name, gamma):
    """MONAI's loss of the foreground is ours with gamma = 1 - its gamma; the background has no
    exponent."""
    x, y = volume(volume_name, 2)
    theirs = unified_focal_loss.AsymmetricFocalTverskyLoss(
        to_onehot_y=True, gamma=gamma, reduction="none"
    )
    ours = losses.TverskyLoss(
        alpha=0.3, beta=0.7, gamma=1 - gamma, smooth_nr=1e-7, smooth_dr=1e-7, average="none",
        reduction="sum",
    )  # fmt: skip
    for c, loss in ((0, changed(ours, gamma=1)), (1, ours)):
        of_class = changed(loss, class_weight=[1 - c, c])
        expected = of_torch(lambda x, y, c=c: theirs(x.softmax(1), y)[:, c].sum(), x, y)
        assert_conforms(of_ours(of_class, x, y), expected)


# The page's second half: what `python -m benchmarks.stability` prints.

of_stability = functools.partial(Row, "Where the others stop")
SIZES = {"10³": 10, "46³": 46, "100³": 100, "216³": 216}
STOPS = (
    "float32, 96³",
    "float16, 96³",
    "float16, 160³",
    "a class absent from the patch",
    "all background, background left out",
    "a lesion of one voxel",
    "a lesion of one voxel, float16",
)


@pytest.mark.parametrize("case", STOPS)
@runs(*map(of_stability, STOPS))
def test_the_numbers_about_where_the_others_stop_are_right(case):
    """The exact numbers of the row and ours hold to their last digit, those of others to 2 %."""
    exact, *cells = map(float, rows_of_page()[of_stability(case)])
    edge, kind, dtype, background = stability.CASES[case]
    x, y = stability.volume(edge, kind, dtype)
    value, gradient = stability.by_monai(x.astype(np.float64), y, background)
    assert abs(value - exact) <= 1e-6
    norm = np.linalg.norm(gradient)
    for compute in stability.CONTENDERS.values():
        got, of_x = compute(x, y, background)
        share = np.linalg.norm(of_x.astype(np.float64)) / norm
        value, expected, *cells = cells
        ours = compute is stability.by_dice_op
        assert abs(got - value) <= (1.5e-6 if ours else 2e-2)
        assert abs(share - expected) <= (1e-3 if ours else 2e-2 * max(1, expected))


@pytest.mark.parametrize("size", SIZES)
@runs(*map(of_stability, SIZES))
def test_the_numbers_about_generalized_dice_of_large_volumes_are_right(size):
    """Both classes have V / 2 voxels, so that MONAI's loss is 8 / V / (8 / V + 1e-5)."""
    ours, theirs = map(float, rows_of_page()[of_stability(size)])
    got = stability.generalized_dice(SIZES[size])
    np.testing.assert_allclose(got, (ours, theirs), atol=6e-4)
    classes = 8 / SIZES[size] ** 3
    np.testing.assert_allclose(got, (1, classes / (classes + 1e-5)), rtol=2e-4)


# --- no row without a test ------------------------------------------------------------------------

ELSEWHERE = {
    in_nnunet("`DeepSupervisionWrapper`, its weights"): [
        "losses/test_deep_supervision.py::test_the_default_weights_are_those_of_nnunet",
        "losses/test_deep_supervision.py::test_a_network_of_several_resolutions_trains",
    ],
    in_nnunet("batch Dice gathered over GPUs (`AllGatherGrad`)"): [
        "losses/test_distribute.py::test_two_replicas_train_as_one_device",
        "losses/test_distribute.py::test_two_processes_train_as_one",
    ],
}


def test_every_row_has_a_test():
    """A new row must be named in `EQUAL`, or in the `runs` of a test, or in `ELSEWHERE`."""
    rows = {row for row, (ours, *_) in rows_of_page().items() if ours != "not here"}
    tested = set(TESTS_OF_ROWS) | set(ELSEWHERE)
    assert not rows - tested, "rows that no test runs"
    assert not tested - rows, "tests of rows that are not on the page"
    assert len(rows) > 50


def test_marks_say_what_the_tests_show():
    """A row is marked "differs" if and only if the name of one of its tests says so."""
    for row, (ours, *others) in rows_of_page().items():
        if row.heading != "Where the others stop":
            tests = TESTS_OF_ROWS.get(row, []) + ELSEWHERE.get(row, [])
            differs = any("differ" in test for test in tests)
            mark = "" if ours == "not here" else "differs" if differs else "✓"
            assert others == [mark], row


def test_the_tests_named_in_other_files_exist():
    for file, test in (name.split("::") for tests in ELSEWHERE.values() for name in tests):
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert test in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
