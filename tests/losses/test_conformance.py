"""Our losses have the values and gradients of other libraries, on ordinary and degenerate volumes.

The others are MONAI, PyTorch and Keras themselves, and the published formulas of nnU-Net,
segmentation_models, segmentation_models_pytorch, tensorflow-mri, kornia, and of the unified focal,
Combo and marginal losses (helpers/peers.py). They compute in double precision on the very float32
logits that ours get. `make test-full` installs what this needs. tests/docs/test_migration.py runs
docs/migration.md with the same formulas.

`of_ours` computes in TensorFlow, and holds the losses of PyTorch and JAX to the same value and
gradient.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import losses
from helpers.each_loss import EACH
from helpers.peers import (
    CLASSES,
    HAS_PEERS,
    NEEDS_PEERS,
    VOLUMES,
    W,
    assert_conforms,
    combo_loss,
    hot,
    keras_tversky,
    kornia_loss,
    marginal_loss,
    mri_loss,
    nnunet_loss,
    of_keras,
    of_ours,
    of_torch,
    sm_loss,
    smp_loss,
    soft_labels,
    unified_focal_loss,
    volume,
)

if HAS_PEERS:
    import torch
    from monai import losses as monai

pytestmark = NEEDS_PEERS


@pytest.mark.parametrize("volume_name", ["random", "absent class", "one dimension"])
@pytest.mark.parametrize("name", EACH)
def test_each_loss_is_the_same_in_every_front_end(name, volume_name):
    """These losses have options as well that no other library has."""
    kind, options = EACH[name]
    of_ours(getattr(losses, kind)(data_format="channels_last", **options), *volume(volume_name))


# --- MONAI ----------------------------------------------------------------------------------------

COMMON = {
    "defaults": ({}, {}),
    "no background": ({"include_background": False}, {"include_background": False}),
    "batch": ({"batch": True}, {"batch": True}),
    "smoothing": ({"smooth_nr": 1.0, "smooth_dr": 2.0}, {"smooth_nr": 1.0, "smooth_dr": 2.0}),
}
# MONAI's default, which hides the errors in large volumes.
SMALL = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
SQUARED = ({"squared_pred": True}, {"squared_pred": True})
# name: (ours, its arguments, MONAI's, its arguments)
MONAI = {
    **{f"Dice, {k}": ("DiceLoss", a, "DiceLoss", b) for k, (a, b) in COMMON.items()},
    "Dice, squared": ("DiceLoss", SQUARED[0], "DiceLoss", SQUARED[1]),
    "Dice, Jaccard": ("DiceLoss", {"jaccard": True}, "DiceLoss", {"jaccard": True}),
    "Dice, weights": (
        "DiceLoss", {"class_weight": [w / 4 for w in W]}, "DiceLoss", {"weight": W},
    ),  # MONAI takes the mean of w (1 - dice).
    **{f"Tversky, {k}": ("TverskyLoss", a, "TverskyLoss", b) for k, (a, b) in COMMON.items()},
    "Tversky, recall": (
        "TverskyLoss", {"alpha": 0.3, "beta": 0.7}, "TverskyLoss", {"alpha": 0.3, "beta": 0.7},
    ),
    **{
        f"generalized Dice, {k}": ("GeneralizedDiceLoss", SMALL | a, "GeneralizedDiceLoss", b)
        for k, (a, b) in COMMON.items()
    },
    **{
        f"generalized Dice, {w}": (
            "GeneralizedDiceLoss", SMALL | {"weight_type": w}, "GeneralizedDiceLoss", {"w_type": w},
        )
        for w in ("simple", "uniform")
    },
    **{f"Dice + CE, {k}": ("DiceCELoss", a, "DiceCELoss", b) for k, (a, b) in COMMON.items()},
    "Dice + CE, lambdas": (
        "DiceCELoss", {"lambda_dice": 0.3, "lambda_ce": 2.0},
        "DiceCELoss", {"lambda_dice": 0.3, "lambda_ce": 2.0},
    ),
    "Dice + CE, label smoothing": (
        "DiceCELoss", {"label_smoothing": 0.1}, "DiceCELoss", {"label_smoothing": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("form", MONAI)
def test_softmax_losses_conform_to_monai(form, volume_name):
    ours, arguments, theirs, their_arguments = MONAI[form]
    x, y = volume(volume_name)
    their_arguments = dict(their_arguments)
    if "weight" in their_arguments:
        their_arguments["weight"] = torch.tensor(their_arguments["weight"])
    loss = getattr(monai, theirs)(softmax=True, to_onehot_y=True, **their_arguments)
    assert_conforms(of_ours(getattr(losses, ours)(**arguments), x, y), of_torch(loss, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize(
    "options", [{}, {"batch": True}, {"include_background": False}, {"smooth_dr": 1.0}], ids=str
)
def test_matthews_correlation_conforms_to_monai(options, volume_name):
    x, y = volume(volume_name)
    theirs = monai.MCCLoss(softmax=True, to_onehot_y=True, **options)
    assert_conforms(of_ours(losses.MatthewsLoss(**options), x, y), of_torch(theirs, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("w_type", ["square", "simple"])
def test_generalized_dice_and_focal_conform_to_monai(w_type, volume_name):
    x, y = volume(volume_name)
    theirs = monai.GeneralizedDiceFocalLoss(sigmoid=True, w_type=w_type, lambda_focal=0.5)
    ours = losses.GeneralizedDiceFocalLoss(
        activation="sigmoid", weight_type=w_type, lambda_ce=0.5, **SMALL
    )
    assert_conforms(
        of_ours(ours, x, y), of_torch(lambda x, y: theirs(x, hot(y, CLASSES, x.dtype)), x, y)
    )


DISTANCES = [[0, 1, 1, 0.8], [1, 0, 0.5, 0.3], [1, 0.25, 0, 0.6], [2, 0.5, 0.7, 0]]


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize(
    "options", [{}, {"smooth_nr": 0.5, "smooth_dr": 2.0}, {"weighting_mode": "GDL"}], ids=str
)
def test_generalized_wasserstein_dice_conforms_to_monai(options, volume_name):
    """The matrix is not symmetric, and its largest distance is not 1."""
    x, y = volume(volume_name)
    distances = np.array(DISTANCES)
    theirs = monai.GeneralizedWassersteinDiceLoss(distances, **options)
    ours = losses.GeneralizedWassersteinDiceLoss(distances, **options)
    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


SOFT = {"soft_label": True}
MONAI_SOFT = {
    "Dice": (losses.DiceLoss(**SOFT), "DiceLoss", SOFT),
    "Dice, batch": (losses.DiceLoss(batch=True, **SOFT), "DiceLoss", SOFT | {"batch": True}),
    "Dice, squares": (
        losses.DiceLoss(squared_pred=True, **SOFT), "DiceLoss", SOFT | {"squared_pred": True},
    ),
    "Jaccard": (losses.DiceLoss(jaccard=True, **SOFT), "DiceLoss", SOFT | {"jaccard": True}),
    "Tversky": (
        losses.TverskyLoss(alpha=0.3, beta=0.7, **SOFT),
        "TverskyLoss",
        SOFT | {"alpha": 0.3, "beta": 0.7},
    ),
    "generalized Dice": (
        losses.GeneralizedDiceLoss(**SOFT, **SMALL), "GeneralizedDiceLoss", SOFT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("form", MONAI_SOFT)
def test_losses_of_soft_labels_conform_to_monai(form, volume_name):
    ours, theirs, arguments = MONAI_SOFT[form]
    x, y = volume(volume_name)
    t = soft_labels(y)
    loss = getattr(monai, theirs)(softmax=True, **arguments)
    of_monai = of_torch(lambda x, _: loss(x, torch.tensor(np.moveaxis(t, -1, 1)).double()), x, y)
    assert_conforms(of_ours(lambda y, x: ours(t, x), x, y), of_monai)


MONAI_SIGMOID = {
    "Dice": (losses.DiceLoss(activation="sigmoid"), "DiceLoss", {}),
    "Dice, jointly": (
        losses.DiceLoss(activation="sigmoid", batch=True, squared_pred=True),
        "DiceLoss",
        {"batch": True, "squared_pred": True},
    ),
    "Tversky": (
        losses.TverskyLoss(activation="sigmoid", alpha=0.2, beta=0.8),
        "TverskyLoss",
        {"alpha": 0.2, "beta": 0.8},
    ),
    "generalized Dice": (
        losses.GeneralizedDiceLoss(activation="sigmoid", **SMALL),
        "GeneralizedDiceLoss",
        {},
    ),
    "Dice + focal": (losses.DiceFocalLoss(activation="sigmoid"), "DiceFocalLoss", {}),
    "Dice + focal, gamma": (
        losses.DiceFocalLoss(activation="sigmoid", focal_gamma=3.5, lambda_dice=0.5, lambda_ce=2),
        "DiceFocalLoss",
        {"gamma": 3.5, "lambda_dice": 0.5, "lambda_focal": 2},
    ),
}


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("form", MONAI_SIGMOID)
def test_sigmoid_losses_conform_to_monai(form, volume_name, classes):
    """Each class is a region of its own; one class alone is a binary mask."""
    ours, theirs, arguments = MONAI_SIGMOID[form]
    x, y = volume(volume_name, classes)
    loss = getattr(monai, theirs)(sigmoid=True, **arguments)

    def on_masks(x, y):
        return loss(x, y.to(x.dtype) if classes == 1 else hot(y, classes, x.dtype))

    assert_conforms(of_ours(ours, x, y), of_torch(on_masks, x, y))


def test_binary_dice_and_cross_entropy_conform_to_monai():
    for name in VOLUMES:
        x, y = volume(name, 1)
        loss = monai.DiceCELoss(sigmoid=True)
        ours = losses.DiceCELoss(activation="sigmoid")
        theirs = of_torch(lambda x, y, loss=loss: loss(x, y.to(x.dtype)), x, y)
        assert_conforms(of_ours(ours, x, y), theirs)


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_conforms_to_pytorch(smoothing, weighted, volume_name):
    x, y = volume(volume_name)
    weight = W if weighted else None
    ours = losses.DiceCELoss(
        lambda_dice=0, batch=True, ce_class_weight=weight, label_smoothing=smoothing
    )
    cross_entropy = torch.nn.CrossEntropyLoss(
        weight and torch.tensor(weight, dtype=torch.float64), label_smoothing=smoothing
    )
    assert_conforms(of_ours(ours, x, y), of_torch(lambda x, y: cross_entropy(x, y[:, 0]), x, y))


# --- Keras ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume_name", VOLUMES)
def test_dice_conforms_to_keras(volume_name):
    x, y = volume(volume_name)
    theirs = keras.losses.Dice(dtype="float64")
    exact = {"average": "micro", "batch": True, "smooth_nr": 0, "smooth_dr": 1e-7}

    def keras_loss(y, x):
        return theirs(tf.one_hot(y, CLASSES, dtype=tf.float64), tf.nn.softmax(x))

    assert_conforms(of_ours(losses.DiceLoss(**exact), x, y), of_keras(keras_loss, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_tversky_conforms_to_keras(activation, volume_name):
    """The alpha of `keras_tversky` weighs the false negatives, ours the false positives.

    With a softmax there are as many false positives as false negatives once all classes are added
    up, so that exchanging them would change nothing; with sigmoids it would.
    """
    x, y = volume(volume_name)
    theirs = keras_tversky(alpha=0.2, beta=0.8)
    exact = {"average": "micro", "batch": True, "smooth_nr": 0, "smooth_dr": 1e-7}

    def keras_loss(y, x):
        p = getattr(tf.nn, activation)(x)
        return theirs(tf.one_hot(y, CLASSES, dtype=tf.float64), p)

    ours = losses.TverskyLoss(activation=activation, alpha=0.8, beta=0.2, **exact)
    assert_conforms(of_ours(ours, x, y), of_keras(keras_loss, x, y))


# --- nnU-Net 2.8 (its published formulas) ---------------------------------------------------------


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("do_bg", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_dice_and_cross_entropy_conform_to_nnunet(batch_dice, do_bg, volume_name):
    """Ours is nnU-Net's loss plus 1, for it holds 1 - dice where nnU-Net's holds -dice."""
    x, y = volume(volume_name)

    def theirs(x, y):
        return 1 + nnunet_loss(x, y, batch_dice=batch_dice, do_bg=do_bg)

    ours = losses.DiceCELoss(batch=batch_dice, include_background=do_bg)
    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


@pytest.mark.parametrize("volume_name", [v for v in VOLUMES if v != "one voxel"])
def test_ignored_labels_conform_to_nnunet(volume_name):
    x, y = volume(volume_name)
    y[np.random.default_rng(9).random(y.shape) < 0.3] = 255

    def theirs(x, y):
        return 1 + nnunet_loss(x, y, batch_dice=True, do_bg=False, ignore_label=255)

    ours = losses.DiceCELoss(batch=True, include_background=False, ignore_label=255)
    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


# --- segmentation_models_pytorch 0.5 (its published formulas) -------------------------------------


SMP = {
    "Dice": (losses.DiceLoss, {}, {"kind": "dice"}),
    "log Dice": (losses.DiceLoss, {"transform": "log"}, {"kind": "dice", "log_loss": True}),
    "Jaccard": (losses.DiceLoss, {"jaccard": True}, {"kind": "jaccard"}),
    "Tversky": (
        losses.TverskyLoss,
        {"alpha": 0.3, "beta": 0.7},
        {"kind": "tversky", "alpha": 0.3, "beta": 0.7},
    ),
}


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("form", SMP)
def test_losses_conform_to_segmentation_models_pytorch(form, volume_name):
    loss, arguments, their_arguments = SMP[form]
    x, y = volume(volume_name)
    ours = loss(batch=True, absent="one", smooth_nr=0, smooth_dr=0, **arguments)
    theirs = of_torch(lambda x, y: smp_loss(x, y, **their_arguments), x, y)
    assert_conforms(of_ours(ours, x, y), theirs)


# --- segmentation_models 1.0, tensorflow-mri 0.23, kornia 0.9 (their published formulas) ----------


# 2 I / (P + T) is the same as I / (I + (FP + FN) / 2).
TWICE = {"smooth_nr": 2e-5, "smooth_dr": 2e-5}
FLAT = {"smooth_nr": 0, "smooth_dr": 1e-8}
BY_FORMULA = {
    "segmentation_models, Dice": (losses.DiceLoss(batch=True), sm_loss, {}),
    "segmentation_models, Dice per image": (losses.DiceLoss(), sm_loss, {"per_image": True}),
    "segmentation_models, Jaccard": (
        losses.DiceLoss(batch=True, jaccard=True, **TWICE), sm_loss, {"jaccard": True},
    ),
    "segmentation_models, class weights": (
        losses.DiceLoss(batch=True, class_weight=[w / 4 for w in (0.5, 1, 2, 0.5)]),
        sm_loss, {"weights": [0.5, 1, 2, 0.5]},
    ),  # The mean of the weights is 1; otherwise the two would differ by a constant.
    "segmentation_models, Dice + focal": (
        losses.DiceFocalLoss(batch=True, lambda_ce=0.25 / CLASSES), sm_loss, {"focal": True},
    ),
    "tensorflow-mri, focal Tversky": (
        losses.TverskyLoss(alpha=0.3, beta=0.7, gamma=0.75),
        mri_loss, {"alpha": 0.3, "beta": 0.7, "gamma": 0.75},
    ),
    "tensorflow-mri, Dice": (losses.DiceLoss(**TWICE), mri_loss, {"alpha": 0.5, "beta": 0.5}),
    "tensorflow-mri, Jaccard": (
        losses.DiceLoss(jaccard=True, **TWICE), mri_loss, {"alpha": 1, "beta": 1},
    ),
    "tensorflow-mri, micro": (
        losses.DiceLoss(average="micro", **TWICE),
        mri_loss, {"alpha": 0.5, "beta": 0.5, "micro": True},
    ),
    "kornia, Dice": (losses.DiceLoss(average="micro", **FLAT), kornia_loss, {"micro": True}),
    "kornia, Dice macro": (losses.DiceLoss(absent="skip", **FLAT), kornia_loss, {}),
    "kornia, Tversky": (
        losses.TverskyLoss(alpha=0.2, beta=0.6, absent="skip", **FLAT),
        kornia_loss, {"tversky": (0.2, 0.6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("form", BY_FORMULA)
def test_losses_conform_to_published_formulas(form, volume_name):
    ours, theirs, arguments = BY_FORMULA[form]
    x, y = volume(volume_name)
    expected = of_torch(lambda x, y: theirs(x, y, **arguments), x, y)
    assert_conforms(of_ours(ours, x, y), expected)


# --- the unified focal loss (Yeung et al., 2022) --------------------------------------------------

UNIFIED = {
    "the authors' defaults": {"weight": 0.5, "delta": 0.6, "gamma": 0.5},
    "other numbers": {"weight": 0.3, "delta": 0.8, "gamma": 0.2},
}


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("numbers", UNIFIED)
def test_unified_focal_loss_conforms_to_its_authors(numbers, asymmetric, classes, volume_name):
    """They have two classes. With more, all but class 0 are what their foreground is."""
    arguments = UNIFIED[numbers] | {"asymmetric": asymmetric}
    x, y = volume(volume_name, classes)
    theirs = of_torch(lambda x, y: unified_focal_loss(x, y, **arguments), x, y)
    assert_conforms(of_ours(losses.UnifiedFocalLoss(**arguments), x, y), theirs)


def test_the_defaults_of_the_unified_focal_loss_are_its_authors():
    config = losses.UnifiedFocalLoss().get_config()
    wanted = UNIFIED["the authors' defaults"] | {"asymmetric": True, "smooth": 1e-7}
    assert {name: config[name] for name in wanted} == wanted


# --- weights of the label 1 in the binary cross-entropy -------------------------------------------


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize(
    ("classes", "weight", "batch"), [(1, 3.0, False), (4, 0.2, True), (4, W, False)]
)
def test_pos_weight_conforms_to_pytorch(classes, weight, batch, volume_name):
    x, y = volume(volume_name, classes)
    dice = monai.DiceLoss(sigmoid=True, batch=batch)

    def theirs(x, y):
        t = y.to(x.dtype) if classes == 1 else hot(y, classes, x.dtype)
        of_label_1 = torch.tensor(weight, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 2))
        return dice(x, t) + torch.nn.BCEWithLogitsLoss(pos_weight=of_label_1)(x, t)

    ours = losses.DiceCELoss(activation="sigmoid", pos_weight=weight, batch=batch)
    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize(
    ("classes", "alpha", "gamma"), [(1, 0.25, 2.0), (4, 0.9, 0.5), (4, 0.4, 0.0)]
)
def test_focal_alpha_conforms_to_monai_and_keras(alpha, gamma, classes, volume_name):
    """MONAI's focal loss computes in float32, whatever it is given."""
    x, y = volume(volume_name, classes)
    dice = monai.DiceLoss(sigmoid=True)
    focal = monai.FocalLoss(alpha=alpha, gamma=gamma, use_softmax=False)
    of_keras_itself = keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, alpha=alpha, gamma=gamma, from_logits=True, dtype="float64"
    )

    def of_monai(x, y):
        t = y.to(x.dtype) if classes == 1 else hot(y, classes, x.dtype)
        return dice(x, t) + focal(x, t)

    def keras_loss(y, x):
        t = np.float64(y[..., None]) if classes == 1 else np.eye(classes)[y]
        return of_keras_itself(t, x)

    arguments = {"activation": "sigmoid", "focal_alpha": alpha, "focal_gamma": gamma}
    ours = of_ours(losses.DiceFocalLoss(**arguments), x, y)
    assert_conforms(ours, of_torch(of_monai, x, y))
    ours = of_ours(losses.DiceFocalLoss(lambda_dice=0, **arguments), x, y)
    assert_conforms(ours, of_keras(keras_loss, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("classes", [1, 4])
def test_combo_loss_is_dice_and_a_weighted_cross_entropy(classes, volume_name):
    """The published one adds up the Dice scores of the classes, and subtracts them from 0, not
    from the number of classes."""
    alpha, beta = 0.3, 0.6
    x, y = volume(volume_name, classes)
    of_dice = (1 - alpha) * classes
    ours = losses.DiceCELoss(
        activation="sigmoid", focal_alpha=beta, lambda_ce=alpha, lambda_dice=of_dice
    )

    def theirs(x, y):
        return of_dice + combo_loss(x, y, alpha=alpha, beta=beta)

    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


# --- labels that name a set of classes (Shi et al., 2021) -----------------------------------------

# One value means any class; one is another name of class 1.
LABEL_SETS = {200: (0, 2, 3), 201: (1, 2), 202: (0, 1, 2, 3), 203: (1,)}


def partly_labelled(name, classes=CLASSES):
    """A volume in which nearly half of the voxels, or all of a sample, name a set of classes."""
    x, y = volume(name, classes)
    rng = np.random.default_rng(3)
    return x, np.where(rng.random(y.shape) < 0.4, rng.choice(list(LABEL_SETS), y.shape), y)


def weights(name, y):
    """Weights per voxel, of which some are 0, or per sample."""
    rng = np.random.default_rng(4)
    return rng.integers(0, 3, y.shape) if name == "voxel_weight" else rng.random(len(y)) + 0.5


# The arguments of ours and of the formula, and which weights are given.
PARTLY = {
    "sums per sample": ({}, {}, None),
    "the batch without background": (
        {"batch": True, "include_background": False}, {"batch": True, "first_class": 1}, None,
    ),
    "ignored voxels": ({"ignore_label": 255}, {"ignore_label": 255}, None),
    "absent classes skipped": (
        {"absent": "skip", "lambda_ce": 0.5}, {"skip_absent": True, "lambda_ce": 0.5}, None,
    ),
    "weighted voxels without background": (
        {"include_background": False}, {"first_class": 1}, "voxel_weight",
    ),
    "weighted and ignored voxels": (
        {"ignore_label": 255, "batch": True}, {"ignore_label": 255, "batch": True}, "voxel_weight",
    ),
    "weighted samples": ({}, {}, "sample_weight"),
    "weighted samples of a batch": ({"batch": True}, {"batch": True}, "sample_weight"),
}  # fmt: skip


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", PARTLY)
def test_label_sets_conform_to_the_marginal_loss(form, activation, volume_name):
    arguments, their_arguments, weighted = PARTLY[form]
    x, y = partly_labelled(volume_name)
    if "ignore_label" in arguments:
        y = np.where(np.random.default_rng(5).random(y.shape) < 0.3, 255, y)
    weight = weights(weighted, y) if weighted else None
    given = {weighted: weight} if weighted else {}
    ours = losses.DiceCELoss(label_sets=LABEL_SETS, activation=activation, **arguments)

    def theirs(x, y):
        options = {"activation": activation, **their_arguments, **given}
        return marginal_loss(x, y, LABEL_SETS, **options)

    assert_conforms(of_ours(lambda y, x: ours(y, x, weight), x, y), of_torch(theirs, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("asymmetric", [True, False])
def test_label_sets_of_the_unified_focal_loss_count_for_their_lowest_class(asymmetric, volume_name):
    x, y = partly_labelled(volume_name)
    arguments = {"weight": 0.4, "delta": 0.7, "gamma": 0.5, "asymmetric": asymmetric}
    arguments["label_sets"] = LABEL_SETS
    theirs = of_torch(lambda x, y: unified_focal_loss(x, y, **arguments), x, y)
    assert_conforms(of_ours(losses.UnifiedFocalLoss(**arguments), x, y), theirs)
