"""Losses of other libraries, and how ours are compared with them.

MONAI, PyTorch and Keras compute themselves; of nnU-Net, segmentation_models,
segmentation_models_pytorch, tensorflow-mri, kornia, medicai, the unified focal loss, the Combo loss
and the marginal loss the published formulas stand here. The others compute in double precision on
the very float32 logits that ours get.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.installed import has
from helpers.tape import value_and_gradient

HAS_PEERS = has("monai") and has("torch")
NEEDS_PEERS = [
    pytest.mark.full,
    pytest.mark.skipif(not HAS_PEERS, reason="MONAI and PyTorch are not installed: make test-full"),
]
if HAS_PEERS:
    import torch

CLASSES = 4
W = [0.5, 1.0, 2.0, 4.0]
REGIONS = [(1, 2, 3), (2, 3), (3,)]
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


def soft_labels(y):
    """Labels of each class in which every voxel has fractions, but most of its own class."""
    spread = np.random.default_rng(0).dirichlet(np.ones(CLASSES), y.shape)
    return (0.75 * (y[..., None] == np.arange(CLASSES)) + 0.25 * spread).astype(np.float32)


def of_ours(loss, x, y):
    """Value and gradient of a loss of dice_op, the same in each front end that is installed."""
    labels = tf.constant(y, tf.uint8)
    value, gradient = value_and_gradient(lambda x: loss(labels, x), tf.constant(x))
    found = value.numpy(), gradient.numpy()
    if type(loss).__module__ == "dice_op.losses" and value.shape.rank == 0:
        options = {**loss.options(), "reduction": "sum" if loss.reduction == "sum" else "mean"}
        for elsewhere in in_other_front_ends(type(loss).__name__, options, x, np.uint8(y)):
            assert_conforms(elsewhere, found, tolerance=1e-6, gradient_tolerance=1e-6)
    return found


def in_other_front_ends(name, options, x, y):
    """Value and gradient of a loss of this name in PyTorch and JAX."""
    if HAS_PEERS:
        import dice_op.torch

        logits = torch.tensor(x, requires_grad=True)
        value = getattr(dice_op.torch, name)(**options)(logits, torch.tensor(y))
        value.backward()
        yield value.item(), logits.grad.numpy()
    if has("jax"):
        import jax

        import dice_op.jax

        loss = getattr(dice_op.jax, name)(**options)
        value, gradient = jax.value_and_grad(loss)(jax.numpy.asarray(x), y)
        yield float(value), np.asarray(gradient)


def of_torch(loss, x, y):
    """Value and gradient of a loss that takes logits `[N, C, spatial...]` and class indices
    `[N, 1, spatial...]`, in double precision."""
    x = torch.tensor(np.moveaxis(x, -1, 1), dtype=torch.float64, requires_grad=True)
    value = loss(x, torch.tensor(y[:, None]))
    value.backward()
    return value.detach().numpy(), np.moveaxis(x.grad.numpy(), 1, -1)


def of_keras(loss, x, y):
    value, gradient = value_and_gradient(lambda x: loss(y, x), tf.constant(x, tf.float64))
    return value.numpy(), gradient.numpy()


def keras_tversky(alpha, beta):
    """Keras' Tversky loss whose alpha weighs the false negatives, in every version.

    Until 3.15 Keras' own alpha does so, against its own documentation; from 3.16 on it weighs the
    false positives.
    """
    if tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16):
        alpha, beta = beta, alpha
    return keras.losses.Tversky(alpha=alpha, beta=beta, dtype="float64")


def assert_conforms(ours, theirs, tolerance=1e-5, gradient_tolerance=1e-5):
    (value, gradient), (expected, expected_gradient) = ours, theirs
    assert np.isfinite(expected) and np.isfinite(expected_gradient).all()
    # A loss near 0 is 1 minus something near 1, and has the error of that.
    assert abs(value - expected) <= tolerance * max(abs(expected), 0.1)
    norm = np.linalg.norm(expected_gradient)
    if norm < 1e-12:
        assert np.linalg.norm(gradient) <= 1e-9
    else:
        assert np.linalg.norm(gradient - expected_gradient) <= gradient_tolerance * norm


def hot(y, classes, dtype):
    return torch.nn.functional.one_hot(y[:, 0].long(), classes).movedim(-1, 1).to(dtype)


# --- published formulas


def nnunet_loss(
    x, y, *, batch_dice, do_bg=False, smooth=1e-5, ignore_label=None, weight_ce=1, weight_dice=1
):
    """DC_and_CE_loss over MemoryEfficientSoftDiceLoss, as in nnunetv2/training/loss."""
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


def nnunet_regions_loss(x, y, *, batch_dice, smooth=1e-5, ignore_label=None):
    """DC_and_BCE_loss over the same Dice, with background, for every channel is a region."""
    t = torch.cat([torch.isin(y, torch.tensor(region)) for region in REGIONS], 1).to(x.dtype)
    mask = torch.ones_like(y, dtype=x.dtype) if ignore_label is None else (y != ignore_label)
    axes = (0, *spatial(x)) if batch_dice else spatial(x)
    p = torch.sigmoid(x)
    intersect, sum_pred, sum_gt = ((v * mask).sum(axes) for v in (p * t, p, t))
    dice = (2 * intersect + smooth) / (sum_pred + sum_gt + smooth)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    bce = bce.mean() if ignore_label is None else (bce * mask).sum() / mask.sum()
    return bce - dice.mean()


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
    """DiceLoss, JaccardLoss and TverskyLoss of segmentation_models_pytorch/losses: multiclass,
    or binary where there is one class."""
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


def counts(x, y, axes, activated=False):
    """TP, FP, FN added over `axes`, the softmax's probabilities, and one-hot labels.

    Args:
      activated: whether x are probabilities already, and no logits.
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
    if weights == "support":
        return (loss * (tp + fn) / (tp + fn).sum(1, keepdim=True)).sum(1).mean()
    return (loss * torch.tensor(weights, dtype=x.dtype)).sum(1).mean()


def kornia_loss(x, y, *, tversky=None, micro=False, ignore_index=-100):
    """kornia/losses: dice_loss with average="micro" or "macro"; or tversky_loss, which is macro."""
    counted = (y != ignore_index).to(x.dtype)
    p = torch.softmax(x, 1) * counted
    t = hot(torch.where(y == ignore_index, 0, y), x.shape[1], x.dtype) * counted
    axes = (1, *spatial(x)) if micro else spatial(x)
    i, p, t = ((v.sum(axes)) for v in (p * t, p, t))
    alpha, beta = tversky or (0.5, 0.5)
    eps = 1e-8 if tversky else 0.5e-8  # Dice adds its eps to twice this denominator.
    score = i / (i + alpha * (p - i) + beta * (t - i) + eps)
    if micro:
        return (1 - score).mean()
    present = (t > 0).to(x.dtype)  # Where no class is in the sample's labels, the loss is 1.
    return (1 - (score * present).sum(1) / present.sum(1).clamp_min(1)).mean()


def medicai_loss(
    x,
    y,
    *,
    kind,
    alpha=0.5,
    beta=0.5,
    dice_weight=1.0,
    ce_weight=0.0,
    weight_type="square",
    binary=False,
    first_class=0,
    ignored=None,
):
    """The losses of medicai/losses, with from_logits=True; `ce_weight` is that of its DiceCELoss.

    Args:
      kind: "dice", "iou", "tversky" or "generalized".
      binary: whether the probabilities are those of a sigmoid.
    """
    smooth = 1e-7
    valid = torch.ones_like(y) if ignored is None else y != ignored
    valid = valid.to(x.dtype)
    t = hot(torch.where(valid == 0, 0, y), x.shape[1], x.dtype)[:, first_class:]
    p = torch.sigmoid(x) if binary else torch.softmax(x, 1)
    p = p.clip(smooth, 1 - smooth)[:, first_class:]
    i, s, v = ((valid * term).sum(spatial(x)) for term in (p * t, p, t))
    if kind == "generalized":
        w = 1 / (v ** {"square": 2, "simple": 1}[weight_type] + smooth)
        w = torch.where(v < smooth, 0, w)
        score = 2 * (w * i).sum(1) / ((w * (s + v)).sum(1) + smooth)
    else:
        numerator, denominator = {
            "dice": (2 * i, s + v),
            "iou": (i, s + v - i),
            "tversky": (i, i + alpha * (s - i) + beta * (v - i)),
        }[kind]
        score = (numerator + smooth) / (denominator + smooth)
    if not ce_weight:
        return dice_weight * (1 - score).mean()
    each = -t * torch.log(p)
    if binary:
        each = each - (1 - t) * torch.log(1 - p)
    cross_entropy = (valid * each).sum(spatial(x)) / valid.sum(spatial(x))
    return (dice_weight * (1 - score) + ce_weight * cross_entropy).mean()


def combo_loss(x, y, *, alpha, beta, smooth=1e-5):
    """Combo loss (Taghanaki et al., 2019, equation 3) of each sample, and the mean of these.

    alpha weighs the cross-entropy, which is a mean over voxels and classes, against the Dice scores
    of all classes, which are added up; beta weighs the label 1.
    """
    t = hot(y, x.shape[1], x.dtype) if x.shape[1] > 1 else y.to(x.dtype)
    log_p, log_q, p = (torch.nn.functional.logsigmoid(s * x) for s in (1, -1, 1))
    p = p.exp()
    cross_entropy = -(beta * t * log_p + (1 - beta) * (1 - t) * log_q).mean((1, *spatial(x)))
    i, total = (p * t).sum(spatial(x)), (p + t).sum(spatial(x))
    dice = ((2 * i + smooth) / (total + smooth)).sum(1)
    return (alpha * cross_entropy - (1 - alpha) * dice).mean()


def read_labels(y, classes, label_sets, dtype):
    """What labels `[N, 1, spatial...]` say when some of them name a set of classes.

    Returns, `[N, C, spatial...]` each: whether the voxel may belong to the class; the label t,
    which is 1 only where the voxel surely belongs to it; and 1 where the voxel tells which of the
    two it is.
    """
    sets = {c: (c,) for c in range(classes)} | label_sets
    may = torch.stack(
        [
            sum((y[:, 0] == v) for v, members in sets.items() if c in members)
            for c in range(classes)
        ],
        1,
    ).bool()
    several = may.sum(1, keepdim=True) > 1
    return may, (may & ~several).to(dtype), (~(may & several)).to(dtype)


def log_of_set(x, may):
    """log sum p over the classes that a voxel may belong to, of a softmax, `[N, spatial...]`."""
    may = may | ~may.any(1, keepdim=True)  # A voxel with no class has the weight 0.
    return torch.log_softmax(x, 1).masked_fill(~may, -torch.inf).logsumexp(1)


def unified_focal_loss(x, y, *, weight, delta, gamma, asymmetric, smooth=1e-7, label_sets=None):
    """Unified focal loss (Yeung et al., 2022), as the authors' loss_functions.py has it for two
    classes: class 0 is the background, and every other class is treated as their foreground.

    They clip all p to [1e-7, 1 - 1e-7]. Here no p is as small as that, so that clipping would only
    hide the gradients of voxels that are nearly sure, and is left out. An error of 0, of which they
    take a negative power, which is NaN, has the loss 0 and no gradient.
    """
    p, classes = torch.softmax(x, 1), x.shape[1]
    may, t, known = read_labels(y, classes, label_sets or {}, x.dtype)
    tp, fn, fp = ((known * v).sum(spatial(x)) for v in (t * p, t * (1 - p), (1 - t) * p))
    error = 1 - (tp + smooth) / (tp + delta * fn + (1 - delta) * fp + smooth)
    of_class = [(1.0 if asymmetric else 1 - gamma), *[1 - gamma] * (classes - 1)]
    tversky = power_of(error, torch.tensor(of_class, dtype=x.dtype)).mean()

    first = may.int().argmax(1)  # A set counts for the lowest of its classes.
    gammas = torch.tensor([gamma, *[0.0 if asymmetric else gamma] * (classes - 1)])[first]
    deltas = torch.where(first == 0, 1 - delta, delta)
    miss = torch.where(may, 0, p).sum(1)  # 1 - q without its rounding
    focal = -(deltas * power_of(miss, gammas) * log_of_set(x, may)).mean()
    return weight * tversky + (1 - weight) * focal


def power_of(error, exponent):
    """error^exponent without a gradient where the error is 0, and 1 where the exponent is."""
    positive = torch.where(error > 0, error, 1)
    return torch.where((error > 0) | (exponent == 0), positive**exponent, 0)


def marginal_loss(
    x,
    y,
    label_sets,
    *,
    activation="softmax",
    batch=False,
    first_class=0,
    ignore_label=None,
    voxel_weight=None,
    sample_weight=None,
    lambda_ce=1.0,
    skip_absent=False,
    smooth=1e-5,
):
    """Dice + cross-entropy of labels of which some name a set of classes (Shi et al., 2021).

    The categorical cross-entropy is that of the sum of the set's p. The binary one leaves the
    classes of the set out, and so does Dice.
    """
    m = torch.ones_like(y, dtype=x.dtype)
    if voxel_weight is not None:
        m = m * torch.as_tensor(voxel_weight, dtype=x.dtype)[:, None]
    if ignore_label is not None:
        m = m * (y != ignore_label)
    each = torch.ones(len(x), dtype=x.dtype)
    if sample_weight is not None:
        each = torch.as_tensor(sample_weight, dtype=x.dtype)
    if batch:
        m = m * each.reshape(-1, *[1] * (x.ndim - 1))
    may, t, known = read_labels(y, x.shape[1], label_sets, x.dtype)
    p = torch.softmax(x, 1) if activation == "softmax" else torch.sigmoid(x)
    if activation == "softmax":
        terms, counted = -log_of_set(x, may)[:, None], torch.ones_like(m)
    else:
        terms = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
        counted = known

    def total(v):
        v = (m * v).sum(spatial(x))
        return v.sum(0, keepdim=True) if batch else v

    i, both, labels = (total(known * v) for v in (p * t, p + t, t))
    dice = 1 - (2 * i + smooth) / (both + smooth)
    dice, labels = dice[:, first_class:], labels[:, first_class:]
    if skip_absent:
        present = (labels > 0).to(x.dtype)
        dice = (dice * present).sum(1) / present.sum(1).clamp_min(1)
    else:
        dice = dice.mean(1)
    terms, counted = total(counted * terms).sum(1), total(counted).sum(1)
    losses = dice + lambda_ce * torch.where(counted > 0, terms / counted.clamp_min(1e-30), 0)
    return losses.mean() if batch else (each * losses).mean()
