"""Values and gradients against MONAI, PyTorch and Keras themselves, and against the published
formulas of nnU-Net, segmentation_models, segmentation_models_pytorch, tensorflow-mri and kornia,
over ordinary and degenerate volumes.

The others compute in double precision on the very float32 logits that ours get. `make test-full`
installs what this needs. tests/test_migration.py runs docs/migration.md with these formulas.
"""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import losses

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("monai", "torch")),
        reason="MONAI and PyTorch are not installed: make test-full",
    ),
]
if importlib.util.find_spec("torch") and importlib.util.find_spec("monai"):
    import torch
    from monai import losses as monai

CLASSES = 4
VOLUMES = (
    "random",
    "two dimensions",
    "absent class",
    "all background",
    "one class everywhere",
    "single-voxel lesion",
    "confident",
    "one sample",
    "one voxel",
    "one dimension",
)


def volume(name, classes=CLASSES):
    """Logits `[N, spatial..., C]`, float32, and class indices `[N, spatial...]`."""
    rng = np.random.default_rng(VOLUMES.index(name))
    shape = {
        "two dimensions": (2, 9, 8),
        "one sample": (1, 6, 5, 4),
        "one voxel": (2, 1, 1, 1),
        "one dimension": (3, 40),
    }
    shape = shape.get(name, (3, 6, 5, 4))
    x = 2 * rng.normal(size=(*shape, classes))
    y = rng.integers(0, max(classes, 2), size=shape)
    if name == "absent class":
        y[y == max(classes, 2) - 1] = 0
        y[0] = 0
    elif name == "all background":
        y[:] = 0
    elif name == "one class everywhere":
        y[:] = 1
    elif name == "single-voxel lesion":
        y[:] = 0
        y[:, 2, 1, 3] = 1
    elif name == "confident":
        x = x + 6 * (y[..., None] == np.arange(classes))
    return x.astype(np.float32), y


def of_ours(loss, x, y):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(tf.constant(y, tf.uint8), x)
    return value.numpy(), tape.gradient(value, x).numpy()


def of_torch(loss, x, y):
    """loss(logits `[N, C, spatial...]`, class indices `[N, 1, spatial...]`), double."""
    x = torch.tensor(np.moveaxis(x, -1, 1), dtype=torch.float64, requires_grad=True)
    value = loss(x, torch.tensor(y[:, None]))
    value.backward()
    return value.detach().numpy(), np.moveaxis(x.grad.numpy(), 1, -1)


def of_keras(loss, x, y):
    x = tf.constant(x, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(y, x)
    return value.numpy(), tape.gradient(value, x).numpy()


def assert_conforms(ours, theirs, tolerance=1e-5, gradient_tolerance=1e-5):
    (value, gradient), (expected, expected_gradient) = ours, theirs
    assert np.isfinite(expected) and np.isfinite(expected_gradient).all()
    # Of a loss near 0 the error is that of the 1 it is taken from.
    assert abs(value - expected) <= tolerance * max(abs(expected), 0.1)
    norm = np.linalg.norm(expected_gradient)
    if norm < 1e-12:
        assert np.linalg.norm(gradient) <= 1e-9
    else:
        assert np.linalg.norm(gradient - expected_gradient) <= gradient_tolerance * norm


# --- MONAI ----------------------------------------------------------------------------------------

W = [0.5, 1.0, 2.0, 4.0]
COMMON = {
    "defaults": ({}, {}),
    "no background": ({"include_background": False}, {"include_background": False}),
    "batch": ({"batch": True}, {"batch": True}),
    "smoothing": ({"smooth_nr": 1.0, "smooth_dr": 2.0}, {"smooth_nr": 1.0, "smooth_dr": 2.0}),
}
# MONAI's default, which hides the errors of large volumes
SMALL = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
SQUARED = ({"squared_pred": True}, {"squared_pred": True})
# name: (ours, its arguments, MONAI's, its arguments)
MONAI = {
    **{f"Dice, {k}": ("DiceLoss", a, "DiceLoss", b) for k, (a, b) in COMMON.items()},
    "Dice, squared": ("DiceLoss", SQUARED[0], "DiceLoss", SQUARED[1]),
    "Dice, Jaccard": ("DiceLoss", {"jaccard": True}, "DiceLoss", {"jaccard": True}),
    "Dice, weights": (
        "DiceLoss", {"class_weight": [w / 4 for w in W]}, "DiceLoss", {"weight": W},
    ),  # MONAI: the mean of w (1 - dice)
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
def test_monai_softmax(form, volume_name):
    ours, arguments, theirs, their_arguments = MONAI[form]
    x, y = volume(volume_name)
    their_arguments = dict(their_arguments)
    if "weight" in their_arguments:
        their_arguments["weight"] = torch.tensor(their_arguments["weight"])
    loss = getattr(monai, theirs)(softmax=True, to_onehot_y=True, **their_arguments)
    assert_conforms(of_ours(getattr(losses, ours)(**arguments), x, y), of_torch(loss, x, y))


def hot(y, classes, dtype):
    return torch.nn.functional.one_hot(y[:, 0].long(), classes).movedim(-1, 1).to(dtype)


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
def test_monai_sigmoid(form, volume_name, classes):
    """Regions, each a class of its own; with one class, a binary mask."""
    ours, theirs, arguments = MONAI_SIGMOID[form]
    x, y = volume(volume_name, classes)
    loss = getattr(monai, theirs)(sigmoid=True, **arguments)

    def on_masks(x, y):
        return loss(x, y.to(x.dtype) if classes == 1 else hot(y, classes, x.dtype))

    assert_conforms(of_ours(ours, x, y), of_torch(on_masks, x, y))


def test_monai_binary_dice_and_cross_entropy():
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
def test_pytorch_cross_entropy(smoothing, weighted, volume_name):
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
def test_keras_dice(volume_name):
    x, y = volume(volume_name)
    theirs = keras.losses.Dice(dtype="float64")
    exact = {"average": "micro", "batch": True, "smooth_nr": 0, "smooth_dr": 1e-7}

    def keras_loss(y, x):
        return theirs(tf.one_hot(y, CLASSES, dtype=tf.float64), tf.nn.softmax(x))

    assert_conforms(of_ours(losses.DiceLoss(**exact), x, y), of_keras(keras_loss, x, y))


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_keras_tversky(activation, volume_name):
    """Until Keras 3.15 its alpha weighs the false negatives, against its own documentation.

    With a softmax there are as many false positives as false negatives once all classes are added
    up, so that the exchange changes nothing; with sigmoids it does.
    """
    x, y = volume(volume_name)
    exchanged = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 16)
    theirs = keras.losses.Tversky(alpha=0.2, beta=0.8, dtype="float64")
    alpha, beta = (0.8, 0.2) if exchanged else (0.2, 0.8)
    exact = {"average": "micro", "batch": True, "smooth_nr": 0, "smooth_dr": 1e-7}

    def keras_loss(y, x):
        p = getattr(tf.nn, activation)(x)
        return theirs(tf.one_hot(y, CLASSES, dtype=tf.float64), p)

    ours = losses.TverskyLoss(activation=activation, alpha=alpha, beta=beta, **exact)
    assert_conforms(of_ours(ours, x, y), of_keras(keras_loss, x, y))


# --- nnU-Net 2.8 (its published formulas) ---------------------------------------------------------


def nnunet_loss(
    x, y, *, batch_dice, do_bg=False, smooth=1e-5, ignore_label=None, weight_ce=1, weight_dice=1
):
    """DC_and_CE_loss over MemoryEfficientSoftDiceLoss, nnunetv2/training/loss."""
    mask = torch.ones_like(y, dtype=x.dtype)
    target = y.clone()
    if ignore_label is not None:
        mask = (y != ignore_label).to(x.dtype)
        target[y == ignore_label] = 0
    p, t = torch.softmax(x, 1), hot(target, x.shape[1], x.dtype)
    if not do_bg:
        p, t = p[:, 1:], t[:, 1:]
    axes = tuple(range(2, x.ndim))
    sums = [(v * mask).sum(axes) for v in (p * t, p, t)]
    if batch_dice:
        sums = [s.sum(0) for s in sums]
    intersect, sum_pred, sum_gt = sums
    dice = (2 * intersect + smooth) / torch.clip(sum_gt + sum_pred + smooth, 1e-8)
    ignored = -100 if ignore_label is None else ignore_label
    ce = torch.nn.functional.cross_entropy(x, y[:, 0], ignore_index=ignored)
    return weight_ce * ce - weight_dice * dice.mean()


REGIONS = [(1, 2, 3), (2, 3), (3,)]


def nnunet_regions_loss(x, y, *, batch_dice, smooth=1e-5, ignore_label=None):
    """DC_and_BCE_loss over the same Dice, with background: every channel is a region."""
    t = torch.cat([torch.isin(y, torch.tensor(region)) for region in REGIONS], 1).to(x.dtype)
    mask = torch.ones_like(y, dtype=x.dtype) if ignore_label is None else (y != ignore_label)
    axes = (0, *spatial(x)) if batch_dice else spatial(x)
    p = torch.sigmoid(x)
    intersect, sum_pred, sum_gt = ((v * mask).sum(axes) for v in (p * t, p, t))
    dice = (2 * intersect + smooth) / (sum_pred + sum_gt + smooth)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    bce = bce.mean() if ignore_label is None else (bce * mask).sum() / mask.sum()
    return bce - dice.mean()


@pytest.mark.parametrize("volume_name", VOLUMES)
@pytest.mark.parametrize("do_bg", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_nnunet(batch_dice, do_bg, volume_name):
    """Ours is its loss plus 1: 1 - dice for -dice."""
    x, y = volume(volume_name)

    def theirs(x, y):
        return 1 + nnunet_loss(x, y, batch_dice=batch_dice, do_bg=do_bg)

    ours = losses.DiceCELoss(batch=batch_dice, include_background=do_bg)
    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


@pytest.mark.parametrize("volume_name", [v for v in VOLUMES if v != "one voxel"])
def test_nnunet_ignore_label(volume_name):
    x, y = volume(volume_name)
    y[np.random.default_rng(9).random(y.shape) < 0.3] = 255

    def theirs(x, y):
        return 1 + nnunet_loss(x, y, batch_dice=True, do_bg=False, ignore_label=255)

    ours = losses.DiceCELoss(batch=True, include_background=False, ignore_label=255)
    assert_conforms(of_ours(ours, x, y), of_torch(theirs, x, y))


# --- segmentation_models_pytorch 0.5 (its published formulas) -------------------------------------


def smp_loss(
    x,
    y,
    *,
    kind,
    log_loss=False,
    alpha=0.5,
    beta=0.5,
    gamma=1.0,
    smooth=0.0,
    eps=1e-7,
    ignore_index=None,
):
    """DiceLoss, JaccardLoss, TverskyLoss of segmentation_models_pytorch/losses: multiclass, and
    binary where there is one class."""
    counted = torch.ones_like(y) if ignore_index is None else (y != ignore_index).long()
    y = y * counted
    if x.shape[1] == 1:
        p, t = torch.sigmoid(x) * counted, y.to(x.dtype)
    else:
        p, t = torch.softmax(x, 1) * counted, hot(y, x.shape[1], x.dtype) * counted
    axes = (0, *range(2, x.ndim))
    i, p, t = (p * t).sum(axes), p.sum(axes), t.sum(axes)
    numerator, denominator = {
        "dice": (2 * i, p + t),
        "jaccard": (i, p + t - i),
        "tversky": (i, i + alpha * (p - i) + beta * (t - i)),
    }[kind]
    score = (numerator + smooth) / (denominator + smooth).clamp_min(eps)
    loss = -torch.log(score.clamp_min(eps)) if log_loss else 1 - score
    return (loss * (t > 0).to(x.dtype)).mean() ** gamma


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
def test_smp(form, volume_name):
    loss, arguments, their_arguments = SMP[form]
    x, y = volume(volume_name)
    ours = loss(batch=True, absent="one", smooth_nr=0, smooth_dr=0, **arguments)
    theirs = of_torch(lambda x, y: smp_loss(x, y, **their_arguments), x, y)
    assert_conforms(of_ours(ours, x, y), theirs)


# --- segmentation_models 1.0, tensorflow-mri 0.23, kornia 0.9 (their published formulas) ----------


def counts(x, y, axes, activated=False):
    """tp, fp, fn of softmax probabilities, added over `axes`; the probabilities; one-hot labels.

    `activated`: x are the probabilities already.
    """
    p, t = x if activated else torch.softmax(x, 1), hot(y, x.shape[1], x.dtype)
    return (p * t).sum(axes), (p * (1 - t)).sum(axes), ((1 - p) * t).sum(axes), p, t


def spatial(x):
    return tuple(range(2, x.ndim))


def sm_loss(
    x,
    y,
    *,
    per_image=False,
    jaccard=False,
    weights=1.0,
    focal=False,
    first_class=0,
    activated=False,
):
    """DiceLoss, JaccardLoss and CategoricalFocalLoss of segmentation_models/losses.py."""
    axes = spatial(x) if per_image else (0, *spatial(x))
    tp, fp, fn, p, t = counts(x, y, axes, activated)
    if jaccard:
        score = (tp + 1e-5) / (tp + fp + fn + 1e-5)
    else:
        score = (2 * tp + 1e-5) / (2 * tp + fn + fp + 1e-5)
    loss = 1 - (score[..., first_class:] * torch.as_tensor(weights, dtype=x.dtype)).mean()
    if focal:
        clipped = p.clip(1e-7, 1 - 1e-7)
        loss = loss - (t * 0.25 * (1 - clipped) ** 2 * torch.log(clipped)).mean()
    return loss


def mri_loss(x, y, *, alpha, beta, gamma=1.0, micro=False, weights=None, activated=False):
    """FocalTverskyLoss of tensorflow_mri/python/losses/confusion_losses.py, and its children."""
    tp, fp, fn, *_ = counts(x, y, spatial(x), activated)
    if micro:
        tp, fp, fn = (s.sum(1, keepdim=True) for s in (tp, fp, fn))
    loss = (1 - (tp + 1e-5) / (tp + alpha * fp + beta * fn + 1e-5)) ** gamma
    if weights is None:
        return loss.mean()
    return (loss * torch.tensor(weights, dtype=x.dtype)).sum(1).mean()


def kornia_loss(x, y, *, tversky=None, micro=False, ignore_index=-100):
    """kornia/losses: dice_loss with average="micro" or "macro"; tversky_loss, always macro."""
    counted = (y != ignore_index).to(x.dtype)
    p = torch.softmax(x, 1) * counted
    t = hot(torch.where(y == ignore_index, 0, y), x.shape[1], x.dtype) * counted
    axes = (1, *spatial(x)) if micro else spatial(x)
    i, p, t = ((v.sum(axes)) for v in (p * t, p, t))
    alpha, beta = tversky or (0.5, 0.5)
    eps = 1e-8 if tversky else 0.5e-8  # Dice's is added to twice this denominator
    score = i / (i + alpha * (p - i) + beta * (t - i) + eps)
    if micro:
        return (1 - score).mean()
    present = (t > 0).to(x.dtype)  # in the sample's labels: where none is, the loss is 1
    return (1 - (score * present).sum(1) / present.sum(1).clamp_min(1)).mean()


TWICE = {"smooth_nr": 2e-5, "smooth_dr": 2e-5}  # 2 I / (P + T) is I / (I + (FP + FN) / 2)
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
    ),  # of mean 1: with others the two differ by a constant
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
def test_published_formulas(form, volume_name):
    ours, theirs, arguments = BY_FORMULA[form]
    x, y = volume(volume_name)
    expected = of_torch(lambda x, y: theirs(x, y, **arguments), x, y)
    assert_conforms(of_ours(ours, x, y), expected)
