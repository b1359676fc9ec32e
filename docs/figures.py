"""Computes the figures of the documentation with dice_op, and draws them into docs/figures.

    python docs/figures.py                  all of them, in about a minute
    python docs/figures.py overlap scores   some of them

A function for each figure returns its data, arrays by name, and another one draws them. Each file
holds a digest of its data, so that a test can tell when the losses or the script have changed since
it was drawn.

Most figures need a patch of millions of voxels of which only a few kinds differ: those of a lesion
that are found, those that are missed, and so on. Such a patch is given to the losses as one voxel
of each kind, whose weight is the number of voxels. The sums are the same.
"""

import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import matplotlib.backends.backend_svg
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np
import tensorflow as tf

import dice_op
from dice_op import core, formulas
from dice_op.losses import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    DownsampledLabels,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    GeneralizedWassersteinDiceLoss,
    MatthewsLoss,
    SumsLoss,
    TverskyLoss,
    UnifiedFocalLoss,
    deep_supervision,
)

FOLDER = pathlib.Path(__file__).resolve().parent / "figures"
PATCH = 128**3  # voxels
NO_BACKGROUND = {"include_background": False}
CROSS_ENTROPY = (DiceCELoss, {"lambda_dice": 0})


# --- patches of few kinds of voxels ---------------------------------------------------------------


def make(kind, options):
    """A loss in double precision that gives one value for each patch."""
    return kind(reduction=None, dtype="float64", **options)


def two_classes(probability):
    """Logits of background and foreground from the probability of the foreground."""
    logit = np.log(probability) - np.log1p(-np.asarray(probability, np.float64))
    return np.stack([np.zeros_like(logit), logit], -1)


def evaluate(loss, labels, logits, counts):
    """The loss of each patch, `[N]`, and the gradient of one voxel of each kind, `[N, kinds, C]`.

    labels: `[kinds]` or `[N, kinds]`, or with a last axis of classes.
    logits: `[N, kinds, C]` or `[kinds, C]`.
    counts: The number of voxels of each kind, `[N, kinds]`.
    """
    counts = np.asarray(counts, np.float64)
    labels = np.asarray(labels)
    axes = 2 if labels.ndim <= counts.ndim and np.issubdtype(labels.dtype, np.integer) else 3
    labels = np.broadcast_to(labels, (*counts.shape, np.shape(logits)[-1])[:axes])
    variable = tf.constant(np.broadcast_to(logits, (*counts.shape, np.shape(logits)[-1])))
    with tf.GradientTape() as tape:
        tape.watch(variable)
        losses = loss(np.ascontiguousarray(labels), variable, counts)
    gradient = tape.gradient(losses, variable).numpy()
    with np.errstate(invalid="ignore"):  # A kind without voxels has no gradient.
        return losses.numpy(), gradient / counts[..., np.newaxis]


def descend(loss, labels, logits, counts, free, steps=600, rate=0.1):
    """Minimises the loss of each patch by Adam. `free(variables)` makes the logits."""
    variables = tf.Variable(logits, dtype="float64")
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps, 0.01))
    labels, counts = tf.constant(labels), tf.constant(counts)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(loss(labels, free(variables), counts))
        optimizer.apply_gradients([(tape.gradient(total, variables), variables)])

    for _ in range(steps):
        step()
    return variables.numpy()


def compare(losses, labels, logits, counts, voxel, data=None):
    """`loss NAME` and `gradient NAME`, the length of one voxel's gradient, for each loss."""
    data = {} if data is None else data
    for name, loss in losses.items():
        value, gradient = evaluate(make(*loss), labels, logits, counts)
        data[f"loss {name}"] = value
        data[f"gradient {name}"] = np.abs(gradient[:, voxel, -1])
    return data


# --- the guide ------------------------------------------------------------------------------------


def overlap():
    """An object of 1000 voxels in 20,000, of which a share is found, with as many false alarms as
    misses, so that the share is the Dice score of the prediction."""
    share = np.linspace(0.01, 0.99, 50)
    counts = 1000 * np.stack([share, 1 - share, 1 - share, 18 + share], 1)
    logits = two_classes([0.95, 0.05, 0.95, 1e-4])
    losses = {
        "cross-entropy": CROSS_ENTROPY,
        "Dice": (DiceLoss, NO_BACKGROUND),
        "Jaccard": (DiceLoss, {"jaccard": True, **NO_BACKGROUND}),
        "Tversky": (TverskyLoss, {"alpha": 0.3, "beta": 0.7, **NO_BACKGROUND}),
        "focal Tversky": (TverskyLoss, {"alpha": 0.3, "beta": 0.7, "gamma": 2, **NO_BACKGROUND}),
        "log Dice": (DiceLoss, {"transform": "log", **NO_BACKGROUND}),
        "log-cosh Dice": (DiceLoss, {"transform": "log_cosh", **NO_BACKGROUND}),
        "Dice + CE": (DiceCELoss, NO_BACKGROUND),
    }
    return compare(losses, [1, 1, 0, 0], logits, counts, 1, {"overlap": share})


def draw_overlap(figure, data):
    left, right = panels(figure)
    loss, gradient = part(data, "loss"), part(data, "gradient")
    lines(left, data["overlap"], loss, labels=False)
    axis(left, "Dice score of the prediction", "loss", y=(0, 2.1))
    lines(right, data["overlap"], {k: 1e3 * v for k, v in gradient.items()})
    axis(right, "Dice score of the prediction", "gradient of a missed voxel × 1000", log="y")


def object_size():
    """A lesion in a patch of 128³ voxels: the network has given its voxels 0.1, and all others
    0.0001."""
    size = np.logspace(0, 5, 26)
    counts = np.stack([size, PATCH - size], 1)
    losses = {
        "cross-entropy": CROSS_ENTROPY,
        "focal CE": (DiceFocalLoss, {"lambda_dice": 0}),
        "Dice": (DiceLoss, NO_BACKGROUND),
        "Dice + CE": (DiceCELoss, NO_BACKGROUND),
        "generalized Dice": (GeneralizedDiceLoss, {}),
        "unified focal": (UnifiedFocalLoss, {}),
    }
    data = {"size": size}
    for name, loss in losses.items():
        value, gradient = evaluate(make(*loss), [1, 0], two_classes([0.1, 1e-4]), counts)
        lesion, others = (counts * np.abs(gradient[..., 1])).T
        data[f"loss {name}"], data[f"share {name}"] = value, lesion / (lesion + others)
    return data


def draw_object_size(figure, data):
    left, right = panels(figure)
    lines(left, data["size"], part(data, "loss"), labels=False)
    axis(left, "voxels of the lesion", "loss, lesion missed", log="xy", y=(1e-7, 3))
    shares = {k: 100 * v for k, v in part(data, "share").items()}
    lines(right, data["size"], shares)
    axis(right, "voxels of the lesion", "lesion's share of the gradient [%]", log="x", y=(0, 103))


def empty_patch():
    """A patch of 128³ voxels without foreground, and false positives of probability 0.5 in it.

    In the batch there is a second patch, with a lesion of 1000 voxels that is found but for 200,
    and 200 false positives.
    """
    volume = np.logspace(-2, 5, 36)
    labels = np.array([[0, 0, 0, 0], [1, 1, 0, 0]])
    logits = np.stack([two_classes([0.5, 0.5, 0.5, 1e-12]), two_classes([0.99, 0.01, 0.99, 1e-12])])
    lesion = [800, 200, 200, PATCH - 1200]
    tiny = 1e-12  # no voxels, but a gradient per voxel
    losses = {
        "smooth 1e-5": (DiceLoss, NO_BACKGROUND),
        "smooth 1": (DiceLoss, {"smooth_nr": 1, "smooth_dr": 1, **NO_BACKGROUND}),
        "smooth 100": (DiceLoss, {"smooth_nr": 100, "smooth_dr": 100, **NO_BACKGROUND}),
        "background too": (DiceLoss, {}),
        'absent="skip"': (DiceLoss, {"absent": "skip", **NO_BACKGROUND}),
        "batch=True": (DiceLoss, {"batch": True, **NO_BACKGROUND}),
        "cross-entropy": CROSS_ENTROPY,
    }
    data = {"volume": volume}
    for name, loss in losses.items():
        loss, found = make(*loss), []
        for v in volume:
            empty = [2 * v, tiny, tiny, PATCH - 2 * v]
            value, gradient = evaluate(loss, labels, logits, [empty, lesion])
            found.append((value[0], abs(gradient[0, 0, 1]) / 2))  # the mean of two patches
        data[f"loss {name}"], data[f"gradient {name}"] = np.transpose(found)
    return data


def draw_empty_patch(figure, data):
    left, right = panels(figure)
    gradient = {k: v for k, v in part(data, "gradient").items() if v.max() > 0}
    lines(left, data["volume"], part(data, "loss"), labels=False)
    axis(left, "false-positive volume [voxels]", "loss of the empty patch", log="x", y=(-0.12, 1.1))
    lines(right, data["volume"], gradient)
    axis(
        right,
        "false-positive volume [voxels]",
        "gradient of such a voxel",
        log="xy",
        y=(1e-11, 1),
    )
    write_at(left, 1e-2, 0, 'absent="skip", "one"', 'absent="skip"', (0, -11))


EMPTY_TRAINING = {
    "cross-entropy alone": CROSS_ENTROPY,
    "Dice": (DiceLoss, NO_BACKGROUND),
    "Dice, smooth = 1": (DiceLoss, {"smooth_nr": 1, "smooth_dr": 1, **NO_BACKGROUND}),
    "Dice, batch": (DiceLoss, {"batch": True, **NO_BACKGROUND}),
    "Dice + CE, with background": (DiceCELoss, {}),
    "Dice + CE": (DiceCELoss, NO_BACKGROUND),
    "Dice + CE, batch": (DiceCELoss, {"batch": True, "absent": "skip", **NO_BACKGROUND}),
}


def empty_patch_training():
    """What the smallest network learns, a logistic regression of a voxel's brightness, where four
    of five patches hold no lesion. A voxel of a lesion is brighter by 3.5 times the noise."""
    random = np.random.default_rng(0)
    patches, voxels, batch, epochs = 80, 4096, 8, 100
    labels = np.zeros((patches, voxels), np.uint8)
    for patch in labels[::5]:
        patch[: random.integers(20, 300)] = 1
    images = tf.constant(random.normal(size=labels.shape) + 3.5 * labels)
    order = np.concatenate([random.permutation(patches) for _ in range(epochs)])
    data = {"dice": [], "false_positives": [], "recall": []}
    for kind, options in EMPTY_TRAINING.values():
        loss = kind(dtype="float64", **options)
        weight = tf.Variable([0.0, 0.0], dtype="float64")
        steps = len(order) // batch
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.2, steps, 0.01))

        def logits(weight, images):
            foreground = weight[0] * images + weight[1]
            return tf.stack([tf.zeros_like(foreground), foreground], -1)

        @tf.function
        def step(images, labels):
            with tf.GradientTape() as tape:
                value = loss(labels, logits(weight, images))  # noqa: B023
            gradient = tape.gradient(value, weight)  # noqa: B023
            optimizer.apply_gradients([(gradient, weight)])  # noqa: B023

        for chosen in order.reshape(-1, batch):
            step(tf.gather(images, chosen), tf.constant(labels[chosen]))
        scores = core.scores(logits(weight, images).numpy(), labels)
        i, p, t = (scores[k][:, 1] for k in ("intersection", "pred_sum", "label_sum"))
        data["dice"].append(2 * i.sum() / (p.sum() + t.sum()))
        data["recall"].append(i.sum() / t.sum())
        data["false_positives"].append(p[t == 0].mean())
    return {name: np.array(values) for name, values in data.items()}


def draw_empty_patch_training(figure, data):
    left = figure.add_axes((0.33, 0.06, 0.22, 0.8))
    right = figure.add_axes((0.64, 0.06, 0.22, 0.8))
    rows = np.arange(len(EMPTY_TRAINING))[::-1]
    bars(left, rows, data["dice"], "{:.2f}", COLOURS["Dice"])
    bars(right, rows, data["false_positives"], "{:.1f}", COLOURS["cross-entropy"])
    left.set_yticks(rows, list(EMPTY_TRAINING))
    right.set_yticks([])
    axis(left, "", "Dice, whole data set")
    axis(right, "", "false positives per empty patch")


def soft_labels():
    """Fifty voxels whose labels are 0.01, 0.03, ... 0.99: the loss on the way from the opposite of
    rounding to rounding them; and the predictions that minimise it."""
    labels = (np.arange(50) + 0.5) / 50
    way = np.linspace(-0.95, 0.95, 77)
    rounded = np.round(labels)
    ways = {
        "product": {},
        "soft_label": {"soft_label": True},
        "squared_pred": {"squared_pred": True},
    }
    data = {"way": way, "label": labels}
    ones = np.ones((len(way), 50))
    for name, options in ways.items():
        loss = make(DiceLoss, {"activation": "sigmoid", **options})
        sharper = np.clip(labels + way[:, np.newaxis] * (rounded - labels), 1e-6, 1 - 1e-6)
        logits = np.log(sharper / (1 - sharper))[..., np.newaxis]
        soft = np.broadcast_to(labels[:, np.newaxis], logits.shape)
        data[f"loss {name}"] = evaluate(loss, soft, logits, ones)[0]
        best = descend(loss, soft[:1].copy(), np.zeros((1, 50, 1)), ones[:1], lambda v: v)
        data[f"best {name}"] = 1 / (1 + np.exp(-best[0, :, 0]))
    return data


def draw_soft_labels(figure, data):
    left, right = panels(figure)
    lines(left, data["way"], part(data, "loss"), labels=False)
    for name, loss in part(data, "loss").items():
        least = loss.argmin()
        left.plot(data["way"][least], loss[least], "o", color=colour(left, name), clip_on=False)
    axis(left, "blurred     ←  p = t  →     rounded", "loss (dot: its minimum)", y=(0, 0.55))
    lines(right, data["label"], part(data, "best"))
    axis(right, "label t", "prediction p that is best", y=(-0.03, 1.03))


def tversky_tradeoff():
    """A ball with a blurred border: at distance d from its centre a voxel is lesion with the
    probability 1 / (1 + exp((d - 10) / 1.5)). Which ball minimises the expected loss?"""
    distance = np.arange(0.025, 30, 0.05)
    volume = 4 * np.pi * distance**2 * 0.05
    probability = 1 / (1 + np.exp((distance - 10) / 1.5))
    predicted = (distance <= distance[:, np.newaxis]).astype(np.float64)
    labels = np.broadcast_to(np.stack([1 - probability, probability], -1), (*predicted.shape, 2))
    logits = np.stack([1 - predicted, predicted], -1)
    counts = np.broadcast_to(volume, predicted.shape)
    beta = np.arange(0.1, 0.96, 0.05)
    data = {"beta": beta, "threshold": [], "recall": [], "precision": []}
    for b in beta:
        options = {"alpha": 1 - b, "beta": b, "activation": "none", **NO_BACKGROUND}
        best = evaluate(make(TverskyLoss, options), labels, logits, counts)[0].argmin()
        found = (volume * probability)[: best + 1].sum()
        data["threshold"].append(probability[best])
        data["recall"].append(found / (volume * probability).sum())
        data["precision"].append(found / volume[: best + 1].sum())
    return {name: np.array(values) for name, values in data.items()}


def draw_tversky_tradeoff(figure, data):
    left, right = panels(figure, room=0.12)
    curves = {"recall": data["recall"], "precision": data["precision"]}
    lines(left, data["beta"], {"threshold": data["threshold"]}, labels=False)
    left.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    write_at(left, 0.45, 0.5, "cross-entropy")
    axis(left, "beta (alpha = 1 − beta)", "lesion where P(lesion) exceeds", y=(0, 0.9))
    lines(right, data["beta"], curves)
    axis(right, "beta (alpha = 1 − beta)", "of the prediction that is best", y=(0.4, 1))


NOISE = {
    "cross-entropy": CROSS_ENTROPY,
    "Dice": (DiceLoss, NO_BACKGROUND),
    "Dice + CE": (DiceCELoss, NO_BACKGROUND),
    "focal CE": (DiceFocalLoss, {"lambda_dice": 0}),
    "generalized Dice": (GeneralizedDiceLoss, {}),
    "both classes": (DiceLoss, {}),
    "both classes + CE": (DiceCELoss, {}),
}


def noisy_labels():
    """A lesion of one voxel in a hundred, and wrong labels: a share of the lesion's labels is
    missing; or a share of all labels is flipped. A network that can tell lesion from background,
    but not which labels are wrong, is trained, and held against the truth."""
    share = np.linspace(0, 0.95, 20)
    flips = np.linspace(0, 0.475, 20)
    counts = np.broadcast_to([PATCH / 100, PATCH * 99 / 100], (20, 2))
    noises = {"missing": (share, 1 - share, 0 * share), "flipped": (flips, 1 - flips, flips)}
    data = {}
    for noise, (level, lesion, rest) in noises.items():
        data[noise] = level
        labels = np.stack([lesion, rest], 1)
        labels = np.stack([1 - labels, labels], -1)
        for name, loss in NOISE.items():
            logits = descend(
                make(*loss),
                labels,
                np.zeros((20, 2)),
                counts,
                lambda v: tf.stack([tf.zeros_like(v), v], -1),
            )
            found = counts * (logits > 0)
            data[f"{noise}: {name}"] = 2 * found[:, 0] / (found.sum(1) + counts[:, 0])
    return data


def draw_noisy_labels(figure, data):
    left, right = panels(figure)
    lines(left, data["missing"], part(data, "missing:"), labels=False)
    write_at(left, 0.02, 1, "all with Dice", points=(0, -14))
    write_at(left, 0.5, 0, "CE, focal CE")
    axis(left, "share of the lesion not labelled", "Dice against the truth", y=(-0.03, 1.05))
    lines(right, data["flipped"], part(data, "flipped:"))
    axis(right, "share of all labels flipped", "Dice against the truth", y=(-0.03, 1.05))


def wrong_voxel():
    """One voxel of a lesion is labelled as background: its gradient against the probability that
    the network gives to lesion there. The lesion has 1000 voxels of 20,000."""
    probability = np.linspace(0.02, 0.98, 49)
    logits = np.broadcast_to(two_classes([0.95, 0.5, 1e-3]), (49, 3, 2)).copy()
    logits[:, 1] = two_classes(probability)
    counts = np.broadcast_to([999, 1, 19000], (49, 3))
    losses = {
        "cross-entropy": CROSS_ENTROPY,
        "smoothing 0.1": (DiceCELoss, {"lambda_dice": 0, "label_smoothing": 0.1}),
        "focal CE": (DiceFocalLoss, {"lambda_dice": 0}),
        "Dice": (DiceLoss, NO_BACKGROUND),
        "log Dice": (DiceLoss, {"transform": "log", **NO_BACKGROUND}),
        "Dice + CE": (DiceCELoss, NO_BACKGROUND),
    }
    return compare(losses, [1, 0, 0], logits, counts, 1, {"probability": probability})


def draw_wrong_voxel(figure, data):
    left, right = panels(figure)
    gradient = part(data, "gradient")
    middle = len(data["probability"]) // 2
    lines(left, data["probability"], {k: 1e3 * v for k, v in gradient.items()}, labels=False)
    axis(left, "probability of lesion", "gradient of the voxel × 1000", y=(0, None))
    lines(right, data["probability"], {k: v / v[middle] for k, v in gradient.items()})
    axis(right, "probability of lesion", "as a multiple of that at 0.5", y=(0, 4))


def many_classes():
    """104 organs and the background. A patch holds some of the organs, 2000 voxels each, which are
    found with the probability 0.9; the other classes share the rest."""
    classes, voxels = 105, 96**3
    present = np.array([1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 104])
    counts = np.zeros((len(present), classes))
    for row, organs in zip(counts, present, strict=True):
        row[1 : organs + 1] = 2000
        row[0] = voxels - 2000 * organs
    probability = np.full((classes, classes), 0.1 / (classes - 1))
    np.fill_diagonal(probability, 0.9)
    probability[0] = 1e-4 / (classes - 1)
    probability[0, 0] = 1 - 1e-4
    data = {"present": present}
    for absent in ("keep", "skip", "one"):
        loss = make(DiceLoss, {"absent": absent, **NO_BACKGROUND})
        value, gradient = evaluate(loss, np.arange(classes), np.log(probability), counts)
        data[f"loss {absent}"], data[f"gradient {absent}"] = value, -gradient[:, 1, 1]
    return data


def draw_many_classes(figure, data):
    left, right = panels(figure)
    names = {k: f'absent="{k}"' for k in ("keep", "skip", "one")}
    lines(left, data["present"], part(data, "loss"), labels=False)
    axis(left, "organs in the patch, of 104", "loss", y=(0, 1))
    gradient = {k: v / data["gradient skip"] for k, v in part(data, "gradient").items()}
    lines(right, data["present"], gradient, names=names)
    axis(right, "organs in the patch, of 104", 'gradient, of that of "skip"', y=(0, 1.05))


def regions():
    """A tumour of edema (1), core (2) and enhancing part (3), of whose core a share is taken for
    edema. Otherwise all is found."""
    share = np.linspace(0, 1, 26)
    labels, found = np.array([0, 1, 2, 2, 3]), np.array([0, 1, 2, 1, 3])
    one = np.ones_like(share)
    counts = np.stack([20_000 * one, 500 * one, 300 * (1 - share), 300 * share, 200 * one], 1)
    of_classes = 20.0 * np.eye(4)[found]
    of_regions = 20.0 * np.stack([found >= 1, found >= 2, found >= 3], -1) - 10
    ways = {"activation": "sigmoid", "regions": [(1, 2, 3), (2, 3), (3,)]}
    data = {"share": share}
    data["loss classes"], _ = evaluate(make(DiceLoss, NO_BACKGROUND), labels, of_classes, counts)
    data["loss regions"], _ = evaluate(make(DiceLoss, ways), labels, of_regions, counts)
    apart = make(DiceLoss, {"average": "none", **ways})
    losses, _ = evaluate(apart, labels, of_regions, counts)
    for name, loss in zip(("whole tumour", "core", "enhancing"), losses.T, strict=True):
        data[f"score {name}"] = 1 - loss
    return data


def draw_regions(figure, data):
    left, right = panels(figure, labelled=0.4)
    lines(left, data["share"], part(data, "loss"))
    axis(left, "share of the core called edema", "loss", y=(0, 0.7))
    lines(right, data["share"], part(data, "score"))
    axis(right, "share of the core called edema", "1 − loss of each region", y=(0, 1.05))


def partial_labels():
    """A voxel of the spleen in a data set where only the liver is annotated, against the network's
    probability of spleen. Liver and background share the rest."""
    probability = np.linspace(0.02, 0.98, 49)
    rest = (1 - probability) / 2
    logits = np.log(np.stack([rest, rest, probability], -1))[:, np.newaxis]
    data = {"probability": probability}
    ways = {"as background": (0, {}), "label_sets": (200, {"label_sets": {200: (0, 2)}})}
    for name, (label, options) in ways.items():
        loss = make(DiceCELoss, {"lambda_dice": 0, **options})
        value, gradient = evaluate(loss, [label], logits, np.ones((len(probability), 1)))
        data[f"loss {name}"], data[f"pull {name}"] = value, np.abs(gradient[:, 0, 2])
    return data


def draw_partial_labels(figure, data):
    left, right = panels(figure)
    lines(left, data["probability"], part(data, "loss"), labels=False)
    axis(left, "probability of spleen", "cross-entropy of a spleen voxel", y=(0, 4))
    names = {"as background": "background: away", "label_sets": "label_sets: to it"}
    lines(right, data["probability"], part(data, "pull"), names=names)
    axis(right, "probability of spleen", "gradient of the spleen's logit", y=(0, 1.05))


def several_gpus():
    """One patch on each GPU. One of them has a lesion of 100 voxels, of which 80 are found, and
    each has 20 false positives."""
    gpus = np.arange(1, 17)
    data = {"GPUs": gpus}
    ways = {"each GPU": NO_BACKGROUND, "batch=True": {"batch": True, **NO_BACKGROUND}}
    for name, options in ways.items():
        values = []
        for count in gpus:
            counts = np.zeros((count, 4))
            counts[:, 2:] = 20, 900
            counts[0, :2] = 80, 20
            logits = two_classes([1 - 1e-9, 1e-9, 1 - 1e-9, 1e-9])
            value, _ = evaluate(make(DiceLoss, options), [1, 1, 0, 0], logits, counts)
            values.append(value.mean())
        data[f"loss {name}"] = np.array(values)
    return data


def draw_several_gpus(figure, data):
    left, right = panels(figure)
    lines(left, data["GPUs"], part(data, "loss"), labels=False)
    axis(left, "GPUs, one of which has a lesion", "loss", y=(0, 1))
    rest = {k: v - v[0] for k, v in part(data, "loss").items()}
    lines(right, data["GPUs"], rest)
    axis(right, "GPUs, one of which has a lesion", "of that, by the other GPUs", y=(-0.02, 1))


# --- a figure for each loss -----------------------------------------------------------------------


def loss_dice():
    """The forms of Dice against the share of an object that is found; and the gradient of one voxel
    against its probability, in an object of 1000 voxels that is found with 0.8."""
    share = np.linspace(0.01, 0.99, 50)
    counts = 1000 * np.stack([share, 1 - share, 1 - share, 20 + share], 1)
    losses = {
        "Dice": (DiceLoss, NO_BACKGROUND),
        "jaccard": (DiceLoss, {"jaccard": True, **NO_BACKGROUND}),
        "log": (DiceLoss, {"transform": "log", **NO_BACKGROUND}),
        "log_cosh": (DiceLoss, {"transform": "log_cosh", **NO_BACKGROUND}),
        "squared_pred": (DiceLoss, {"squared_pred": True, **NO_BACKGROUND}),
    }
    hard = two_classes([1 - 1e-9, 1e-9, 1 - 1e-9, 1e-9])
    data = {"overlap": share, "probability": share}
    for name, loss in losses.items():
        data[f"loss {name}"] = evaluate(make(*loss), [1, 1, 0, 0], hard, counts)[0]
    logits = np.broadcast_to(two_classes([0.8, 0.5, 1e-6]), (50, 3, 2)).copy()
    logits[:, 1] = two_classes(share)
    counts = np.broadcast_to([999, 1, 19000], (50, 3))
    for name, loss in losses.items():
        gradient = evaluate(make(*loss), [1, 1, 0], logits, counts)[1]
        data[f"gradient {name}"] = -gradient[:, 1, 1]
    return data


def draw_loss_dice(figure, data):
    left, right = panels(figure)
    loss = {k: v for k, v in part(data, "loss").items() if k != "squared_pred"}
    lines(left, data["overlap"], loss, labels=False)
    axis(left, "Dice score of the prediction", "loss", y=(0, 2.1))
    gradient = {k: 1e3 * v for k, v in part(data, "gradient").items()}
    lines(right, data["probability"], gradient)
    axis(right, "probability of a lesion's voxel", "its pull upwards × 1000", y=(None, None))


def loss_tversky():
    """An object of 1000 voxels: a share is missed, or as many voxels are false alarms."""
    share = np.linspace(0, 1, 41)
    none = np.full(41, 1e-12)
    hard = two_classes([1 - 1e-12, 1e-12, 1 - 1e-12])
    data = {"share": share, "score": share}
    for alpha in (0.5, 0.3, 0.1):
        options = {"alpha": alpha, "beta": 1 - alpha, **NO_BACKGROUND}
        loss = make(TverskyLoss, options)
        missed = np.stack([1000 * (1 - share), 1000 * share, none], 1) + 1e-12
        alarms = np.stack([none + 1000, none, 1000 * share], 1) + 1e-12
        name = f"{alpha:g}, {1 - alpha:g}"
        data[f"missed {name}"] = evaluate(loss, [1, 1, 0], hard, missed)[0]
        data[f"alarms {name}"] = evaluate(loss, [1, 1, 0], hard, alarms)[0]
    for gamma in (0.75, 1, 4 / 3, 2):
        loss = make(TverskyLoss, {"gamma": gamma, **NO_BACKGROUND})
        counts = 1000 * np.stack([share, 1 - share, 1 - share], 1) + 1e-12
        data[f"gamma {gamma:.3g}"] = evaluate(loss, [1, 1, 0], hard, counts)[0]
    return data


def draw_loss_tversky(figure, data):
    left, right = panels(figure, 0.5)
    for name, line in (("missed", "-"), ("alarms", "--")):
        curves = {f"beta {k[5:]}": v for k, v in part(data, name).items()}
        lines(left, data["share"], curves, labels=line == "-", style=line)
    axis(left, "share of the object", "loss: missed; dashed: alarms", y=(0, 1.02))
    lines(right, data["score"], part(data, "gamma"), names=lambda k: f"γ = {k}")
    axis(right, "score", "focal: (1 − score)^γ", y=(0, 1.02))


def loss_generalized_dice():
    """A lesion of some voxels beside an organ of 100,000 that is found but for a tenth: the loss if
    the lesion is missed. And MONAI's smoothing, 1e-5, for one class that is half found."""
    size = np.logspace(0, 6, 31)
    eps = 1e-12
    p = np.array([[1 - 2 * eps, eps, eps], [eps, 1 - 2 * eps, eps]])
    logits = np.log(np.stack([p[1], p[0], p[0], p[0]]))  # organ, its missed tenth, lesion, rest
    counts = np.stack([9e4 + 0 * size, 1e4 + 0 * size, size, PATCH + 0 * size], 1)
    losses = {
        "square": (GeneralizedDiceLoss, NO_BACKGROUND),
        "simple": (GeneralizedDiceLoss, {"weight_type": "simple", **NO_BACKGROUND}),
        "uniform": (GeneralizedDiceLoss, {"weight_type": "uniform", **NO_BACKGROUND}),
        "DiceLoss": (DiceLoss, NO_BACKGROUND),
    }
    data = {"size": size}
    for name, loss in losses.items():
        data[f"missed {name}"] = evaluate(make(*loss), [1, 1, 2, 0], logits, counts)[0]
    half = np.stack([size / 2, size / 2, PATCH + 0 * size], 1)
    for smooth in (0, 1e-5):
        loss = make(
            GeneralizedDiceLoss, {"smooth_nr": smooth, "smooth_dr": smooth, **NO_BACKGROUND}
        )
        hard = two_classes([1 - eps, eps, eps])
        data[f"half smooth {smooth:g}"] = evaluate(loss, [1, 1, 0], hard, half)[0]
    return data


def draw_loss_generalized_dice(figure, data):
    left, right = panels(figure, 0.5)
    lines(left, data["size"], part(data, "missed"))
    axis(left, "voxels of the lesion", "loss, the lesion missed", log="x", y=(0, 1.02))
    lines(right, data["size"], part(data, "half"))
    axis(right, "voxels of one class", "loss, half of it found", log="x", y=(0, 0.5))


DISTANCES = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]  # background, edema, core


def loss_generalized_wasserstein_dice():
    """A tumour of 1000 voxels of edema and 1000 of core: a share of the core is taken for edema, or
    for background."""
    share = np.linspace(0, 1, 41)
    eps = 1e-12
    p = np.full((3, 3), eps) + np.eye(3) * (1 - 3 * eps)
    labels = [1, 2, 2, 0]
    counts = 1000 * np.stack([1 + 0 * share, 1 - share, share, 20 + 0 * share], 1) + eps
    data = {"share": share}
    for taken, column in (("edema", 1), ("background", 0)):
        logits = np.log(p[[1, 2, column, 0]])
        wasserstein = make(GeneralizedWassersteinDiceLoss, {"dist_matrix": DISTANCES})
        plain = make(DiceLoss, NO_BACKGROUND)
        data[f"wasserstein as {taken}"] = evaluate(wasserstein, labels, logits, counts)[0]
        data[f"plain as {taken}"] = evaluate(plain, labels, logits, counts)[0]
    return data


def draw_loss_generalized_wasserstein_dice(figure, data):
    left, right = panels(figure)
    lines(left, data["share"], part(data, "plain"), labels=False)
    axis(left, "share of the core that is wrong", "DiceLoss", y=(0, 0.7))
    lines(right, data["share"], part(data, "wasserstein"))
    axis(right, "share of the core that is wrong", "generalized Wasserstein Dice", y=(0, 0.7))


def loss_matthews():
    """An object that fills a share of the patch: of a prediction whose Dice score is 0.8, and of
    one that calls everything foreground."""
    share = np.logspace(-3, np.log10(0.8), 30)
    eps = 1e-12
    hard = two_classes([1 - eps, eps, 1 - eps, eps])
    patch = 1e6
    good = np.stack([0.8 * share, 0.2 * share, 0.2 * share, 1 - 1.2 * share], 1) * patch
    everything = np.stack([share, 0 * share, 1 - share, 0 * share], 1) * patch + eps
    data = {"share": share}
    losses = {"Matthews": (MatthewsLoss, NO_BACKGROUND), "Dice": (DiceLoss, NO_BACKGROUND)}
    for name, loss in losses.items():
        for what, counts in (("good", good), ("everything", everything)):
            data[f"{what} {name}"] = evaluate(make(*loss), [1, 1, 0, 0], hard, counts)[0]
    return data


def draw_loss_matthews(figure, data):
    left, right = panels(figure)
    lines(left, data["share"], part(data, "good"), labels=False)
    axis(left, "object's share of the patch", "prediction of Dice 0.8: loss", log="x", y=(0, 1.05))
    lines(right, data["share"], part(data, "everything"))
    axis(right, "object's share of the patch", "all called object: loss", log="x", y=(0, 1.05))


def loss_dice_ce():
    """The gradient of a lesion's voxel: against its probability, in a lesion of 1000 voxels of
    20,000; and against the size of the lesion, in a patch of 128³ voxels."""
    probability = np.linspace(0.01, 0.99, 50)
    size = np.logspace(0, 5, 26)
    losses = {
        "Dice": (DiceLoss, NO_BACKGROUND),
        "cross-entropy": CROSS_ENTROPY,
        "Dice + CE": (DiceCELoss, NO_BACKGROUND),
    }
    logits = np.broadcast_to(two_classes([0.8, 0.5, 1e-4]), (50, 3, 2)).copy()
    logits[:, 1] = two_classes(probability)
    counts = np.broadcast_to([999, 1, 19000], (50, 3))
    sizes = np.stack([size, PATCH - size], 1)
    data = {"probability": probability, "size": size}
    for name, loss in losses.items():
        gradient = evaluate(make(*loss), [1, 1, 0], logits, counts)[1]
        data[f"probability: {name}"] = -gradient[:, 1, 1]
        gradient = evaluate(make(*loss), [1, 0], two_classes([0.5, 1e-4]), sizes)[1]
        data[f"size: {name}"] = -gradient[:, 0, 1]
    return data


def draw_loss_dice_ce(figure, data):
    left, right = panels(figure)
    curves = {k: 1e3 * v for k, v in part(data, "probability:").items()}
    lines(left, data["probability"], curves, labels=False)
    axis(left, "probability of a lesion's voxel", "its pull upwards × 1000", y=(0, None))
    lines(right, data["size"], part(data, "size:"))
    axis(right, "voxels of the lesion", "pull of a voxel of p = 0.5", log="xy")


def loss_dice_focal():
    """One voxel's focal cross-entropy, and its gradient, against the probability of its class."""
    probability = np.linspace(0.01, 0.99, 50)
    data = {"probability": probability}
    logits = two_classes(probability)[:, np.newaxis]
    for gamma in (0, 1, 2, 4):
        loss = make(DiceFocalLoss, {"lambda_dice": 0, "focal_gamma": gamma})
        value, gradient = evaluate(loss, np.ones((50, 1), np.uint8), logits, np.ones((50, 1)))
        data[f"loss γ = {gamma}"], data[f"gradient γ = {gamma}"] = value, -gradient[:, 0, 1]
    return data


def draw_loss_dice_focal(figure, data):
    left, right = panels(figure)
    lines(left, data["probability"], part(data, "loss"), labels=False)
    axis(left, "probability of the right class", "focal cross-entropy", y=(0, 3))
    lines(right, data["probability"], part(data, "gradient"))
    axis(right, "probability of the right class", "pull upwards", y=(0, 1.5))


def loss_generalized_dice_focal():
    """A lesion, beside an organ of 100,000 voxels, both found with 0.5: the two parts of the loss
    pull at a voxel of each."""
    size = np.logspace(1, 5, 25)
    p = np.array([[0.5, 0.5 - 1e-4, 1e-4], [0.5, 1e-4, 0.5 - 1e-4], [1 - 2e-4, 1e-4, 1e-4]])
    counts = np.stack([1e5 + 0 * size, size, PATCH - 1e5 - size], 1)
    data = {"size": size}
    for name, weights in {
        "generalized Dice": {"lambda_ce": 0},
        "focal CE": {"lambda_dice": 0},
        "sum": {},
    }.items():
        loss = make(GeneralizedDiceFocalLoss, weights)
        gradient = evaluate(loss, [1, 2, 0], np.log(p), counts)[1]
        data[f"organ {name}"] = np.abs(gradient[:, 0, 1])
        data[f"lesion {name}"] = np.abs(gradient[:, 1, 2])
    return data


def draw_loss_generalized_dice_focal(figure, data):
    left, right = panels(figure)
    for axes, what in ((left, "organ"), (right, "lesion")):
        lines(axes, data["size"], part(data, what), labels=axes is right)
        title = f"pull of a voxel of the {what}"
        axis(axes, "voxels of the lesion", title, log="xy", y=(1e-10, 1e-1))


def loss_unified_focal():
    """The overlap's part of the loss against the score, in a patch of 128³ voxels; and the
    cross-entropy of a voxel of the foreground and of the background."""
    share = np.linspace(0.01, 0.99, 50)
    eps = 1e-12
    hard = two_classes([1 - eps, eps, 1 - eps, eps])
    counts = np.stack([1000 * share, 1000 * (1 - share), 1000 * (1 - share), PATCH + 0 * share], 1)
    data = {"share": share}
    for gamma in (0, 0.25, 0.5, 0.75):
        loss = make(UnifiedFocalLoss, {"weight": 1, "delta": 0.5, "gamma": gamma})
        data[f"overlap γ = {gamma}"] = evaluate(loss, [1, 1, 0, 0], hard, counts)[0]
    logits = two_classes(share)[:, np.newaxis]
    ones = np.ones((50, 1))
    for name, label, order in (("foreground", 1, 1), ("background", 0, -1)):
        for gamma in (0, 0.5):
            loss = make(UnifiedFocalLoss, {"weight": 0, "gamma": gamma})
            value = evaluate(loss, (label * ones).astype(np.uint8), logits[..., ::order], ones)[0]
            if name == "background" or gamma:
                data[f"voxel {name}, γ = {gamma}"] = value
    return data


def draw_loss_unified_focal(figure, data):
    left, right = panels(figure, 0.5)
    lines(left, data["share"], part(data, "overlap"))
    axis(left, "score of the foreground", "the overlap's part", y=(0, 0.52))
    lines(right, data["share"], part(data, "voxel"), names=lambda k: k.replace("γ = ", ""))
    axis(right, "probability of the class", "cross-entropy of a voxel", y=(0, 2))


class LabelVoxels(SumsLoss):
    """Not a loss: how many voxels the lesion has at a resolution."""

    def from_sums(self, sums):
        return sums.label_sum[:, 1]


def deep_supervision_figure():
    """Balls of random centres in 32³ voxels: how many of them are left at 1/2, 1/4 and 1/8 of the
    resolution; and the weights of the outputs."""
    random = np.random.default_rng(0)
    diameters = np.arange(1, 17)
    places, size = 100, 32
    grid = np.indices((size,) * 3).astype(np.float32)
    centres = random.uniform(8, 24, (places, 3, 1, 1, 1)).astype(np.float32)
    distance = np.sqrt(((grid - centres) ** 2).sum(1))
    data = {"diameter": diameters}
    voxels = DownsampledLabels(LabelVoxels(reduction=None))
    left = {factor: [] for factor in (1, 2, 4, 8)}
    for diameter in diameters:
        labels = (distance <= diameter / 2).astype(np.uint8)
        for factor in left:
            logits = tf.zeros((places, *(size // factor,) * 3, 2))
            left[factor].append(np.mean(voxels(labels, logits).numpy() > 0))
    for factor, shares in left.items():
        data[f"left {'full' if factor == 1 else f'1/{factor}'}"] = np.array(shares)
    for outputs in (3, 5):
        weights = deep_supervision(DiceCELoss(), outputs=outputs)["loss_weights"]
        data[f"weight {outputs} outputs"] = np.array(weights)
    return data


def draw_deep_supervision(figure, data):
    left, right = panels(figure, room=0.03)
    curves = {k: 100 * v for k, v in part(data, "left").items()}
    lines(left, data["diameter"], curves, labels=False)
    for name, y in curves.items():
        if name != "full":
            write_at(left, np.interp(20, y, data["diameter"]), 20, name, name, (4, -3))
    axis(left, "diameter of a lesion [voxels]", "lesions with a voxel left [%]", y=(0, 103))
    for name, weights in part(data, "weight").items():
        lines(right, np.arange(len(weights)), {name: weights}, marker="o", labels=False)
        last = len(weights) - 3  # where the curves are apart
        write_at(right, last, weights[last], name, name, (8, 4))
    axis(right, "output, the finest first", 'weight, "nnunet"', y=(0, 0.75), x=(-0.2, 4.2))
    right.set_xticks(range(5), ["1", "1/2", "1/4", "1/8", "1/16"])


def ball(size, radius, shift=0.0):
    """Balls in size³ voxels, `[N, size, size, size]`, moved along one axis."""
    radius, shift = np.broadcast_arrays(radius, shift)
    grid = np.arange(size) - (size - 1) / 2
    squares = [(grid - shift[:, np.newaxis]) ** 2, *np.broadcast_to(grid**2, (2, 1, size))]
    d = squares[0][:, :, None, None] + squares[1][:, None, :, None] + squares[2][:, None, None, :]
    return (d <= radius[:, None, None, None] ** 2).astype(np.uint8)


def scores():
    """A ball of radius 10 in 64³ voxels, and a prediction that is moved, or larger or smaller."""
    shift, radius = np.arange(0, 22.0), np.arange(4, 21.0)
    truth = ball(64, [10.0])
    data = {"shift": shift, "radius": radius}
    predictions = {"shift": ball(64, 10.0, shift), "radius": ball(64, radius)}
    for what, prediction in predictions.items():
        found = core.scores(prediction, np.repeat(truth, len(prediction), 0), classes=2)
        i, p, t = (found[k][:, 1:].astype(float) for k in ("intersection", "pred_sum", "label_sum"))
        sums = dice_op.DiceSums(i, p, t, None, None, None, None, np.full(len(i), 64.0**3))
        data[f"{what}: Dice"] = found["dice"][:, 1]
        data[f"{what}: Jaccard"] = found["jaccard"][:, 1]
        for name in ("sensitivity", "precision", "specificity", "matthews"):
            data[f"{what}: {name.capitalize()}"] = getattr(formulas, name)(sums)[:, 0]
    return data


def draw_scores(figure, data):
    left, right = panels(figure)
    lines(left, data["shift"], part(data, "shift:"), labels=False)
    axis(left, "shift of a ball of radius 10 [voxels]", "score", y=(0, 1.03))
    lines(right, data["radius"], part(data, "radius:"))
    axis(right, "radius of the prediction [voxels]", "score, the true radius is 10", y=(0, 1.03))


FIGURES = {
    "overlap": (overlap, draw_overlap),
    "object_size": (object_size, draw_object_size),
    "empty_patch": (empty_patch, draw_empty_patch),
    "empty_patch_training": (empty_patch_training, draw_empty_patch_training),
    "tversky_tradeoff": (tversky_tradeoff, draw_tversky_tradeoff),
    "soft_labels": (soft_labels, draw_soft_labels),
    "noisy_labels": (noisy_labels, draw_noisy_labels),
    "wrong_voxel": (wrong_voxel, draw_wrong_voxel),
    "many_classes": (many_classes, draw_many_classes),
    "regions": (regions, draw_regions),
    "partial_labels": (partial_labels, draw_partial_labels),
    "several_gpus": (several_gpus, draw_several_gpus),
    "loss_dice": (loss_dice, draw_loss_dice),
    "loss_tversky": (loss_tversky, draw_loss_tversky),
    "loss_generalized_dice": (loss_generalized_dice, draw_loss_generalized_dice),
    "loss_generalized_wasserstein_dice": (
        loss_generalized_wasserstein_dice,
        draw_loss_generalized_wasserstein_dice,
    ),
    "loss_matthews": (loss_matthews, draw_loss_matthews),
    "loss_dice_ce": (loss_dice_ce, draw_loss_dice_ce),
    "loss_dice_focal": (loss_dice_focal, draw_loss_dice_focal),
    "loss_generalized_dice_focal": (loss_generalized_dice_focal, draw_loss_generalized_dice_focal),
    "loss_unified_focal": (loss_unified_focal, draw_loss_unified_focal),
    "deep_supervision": (deep_supervision_figure, draw_deep_supervision),
    "scores": (scores, draw_scores),
}


# --- how they look --------------------------------------------------------------------------------

INK, GREY = "#333333", "#888888"
# After Okabe and Ito: colours that differ for colour-blind readers, too. Dashes differ as well.
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#AA3377", "#B07D00", "#3A9BD9", "#555555", "#8C564B"]
DASHES = ["-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), ":", (0, (3, 2))]
COLOURS = {
    "Dice": CYCLE[0],
    "cross-entropy": CYCLE[1],
    "Dice + CE": CYCLE[2],
    "focal CE": CYCLE[4],
    "generalized Dice": CYCLE[3],
}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "dice_op",
}


def part(data, word):
    """The curves whose names begin with the word, by the rest of their names."""
    return {k[len(word) :].strip(): v for k, v in data.items() if k.startswith(word + " ")}


def colour(axes, name):
    """The colour of a curve: the same in both panels of a figure, and for these losses in all."""
    chosen = axes.figure.__dict__.setdefault("colours", {})
    if name not in chosen:
        free = [c for c in CYCLE if c not in chosen.values()]
        chosen[name] = COLOURS.get(name) or (free or CYCLE)[0]
    return chosen[name]


def dark(colour):
    """A colour for text, which is thinner than a curve."""
    return tuple(0.8 * np.array(matplotlib.colors.to_rgb(colour)))


def panels(figure, labelled=0.0, room=0.21):
    """Two panels. Labels stand to the right of the second one, in `room`; those of the first one
    take the share `labelled` of this."""
    width = (1 - 0.085 - 0.1 - room * (1 + labelled)) / 2
    left = figure.add_axes((0.085, 0.165, width, 0.7))
    right = figure.add_axes((0.085 + width + 0.1 + labelled * room, 0.165, width, 0.7))
    return left, right


def axis(axes, x_label, title, *, log="", x=None, y=None):
    axes.set_xlabel(x_label)
    axes.set_title(title, x=-0.13)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    if x:
        axes.set_xlim(*x)
    if y:
        axes.set_ylim(*y)


def lines(axes, x, curves, *, labels=True, names=None, style=None, **options):
    """Draws curves. `place_labels` names them later, when the axes have their limits."""
    for name in (*(n for n in COLOURS if n in curves), *curves):
        colour(axes, name)
    order = list(axes.figure.colours)
    for name, y in curves.items():
        dashes = style or DASHES[order.index(name) % len(DASHES)]
        axes.plot(x, y, color=colour(axes, name), linestyle=dashes, **options)
    if labels:
        find = names if callable(names) else lambda k: (names or {}).get(k, k)
        axes.ends = [(find(name), y[-1], colour(axes, name)) for name, y in curves.items()]


def place_labels(axes, gap=12.5):
    """Writes the name of each curve at its right end, moved where names would overlap."""
    ends = getattr(axes, "ends", [])
    low, high = axes.get_window_extent().intervaly
    heights = [axes.transData.transform((1, max(y, 1e-300)))[1] for _, y, _ in ends]
    heights = np.clip(heights, low, high) * 72 / axes.figure.dpi
    order = np.argsort(heights, kind="stable")
    placed = heights[order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 0:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
    bottom, top = low * 72 / axes.figure.dpi, high * 72 / axes.figure.dpi
    placed += max(0, bottom - placed.min(initial=bottom)) - max(0, placed.max(initial=top) - top)
    for index, height in zip(order, placed, strict=True):
        name, _, shade = ends[index]
        y = (height - bottom) / (top - bottom)
        axes.text(1.04, y, name, transform=axes.transAxes, color=dark(shade), va="center")


def write_at(axes, x, y, text, name=None, points=(0, 4), **options):
    """Writes beside a point; in the colour of a curve, if it names one."""
    shade = dark(colour(axes, name)) if name else INK
    place = {"xytext": points, "textcoords": "offset points"}
    axes.annotate(text, (x, y), color=shade, **place, **options)


def bars(axes, rows, values, form, shade):
    axes.barh(rows, values, color=shade, height=0.62)
    axes.grid(False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            form.format(value),
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )


# --- files ----------------------------------------------------------------------------------------


def digest(data):
    """Of each array: six of its numbers, evenly spaced, and its mean, to four digits."""

    def short(values):
        values = np.asarray(values, np.float64)
        chosen = values[np.linspace(0, len(values) - 1, 6).round().astype(int)]
        return [float(f"{v:.4g}") for v in (*chosen, values.mean())]

    return {name: short(values) for name, values in data.items()}


def draw(name, folder=FOLDER):
    """Computes the data of a figure, draws it, and returns its file."""
    compute, paint = FIGURES[name]
    data = compute()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(6.5, 3.2))
        matplotlib.backends.backend_svg.FigureCanvasSVG(figure)
        # White, so that the figure can be read where the page is dark, too.
        card = matplotlib.patches.FancyBboxPatch(
            (0.02, 0.02),
            6.46,
            3.16,
            boxstyle="round,pad=0,rounding_size=0.08",
            transform=figure.dpi_scale_trans,
            facecolor="white",
            edgecolor="#DDDDDD",
            linewidth=0.6,
            zorder=-1,
        )
        figure.add_artist(card)
        paint(figure, data)
        for axes in figure.axes:
            place_labels(axes)
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.svg"
        text = json.dumps(digest(data), separators=(",", ":"))
        figure.savefig(file, metadata={"Date": None, "Title": name, "Description": text})
    return file


def main():
    for name in sys.argv[1:] or FIGURES:
        start = time.perf_counter()
        file = draw(name)
        size = file.stat().st_size / 1000
        print(f"{file.name:40} {size:5.1f} kB {time.perf_counter() - start:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
