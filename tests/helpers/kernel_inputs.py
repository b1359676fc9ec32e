"""Volumes and labels for the kernels, and the names that reference.py has for their options."""

import numpy as np

from helpers import reference

NAMES = ("intersection", "pred_sum", "label_sum", "cross_entropy")
FORMATS = ("channels_last", "channels_first")
REGIONS = [(1, 2, 3), (2, 3), (3,), (0, 4)]  # the label values of each class, which overlap


def make(shape, label_kind="uint8", activation="softmax", seed=0):
    """Logits [N, V, C] in float32, the labels to pass, and the same labels as t [N, V, C]."""
    n, v, c = shape
    rng = np.random.default_rng(seed)
    x = (3 * rng.normal(size=shape)).astype(np.float32)
    if activation == "none":
        x = np.exp(x) / np.exp(x).sum(-1, keepdims=True) if c > 1 else 1 / (1 + np.exp(-x))
        x = x.astype(np.float32)
    index = rng.integers(0, max(c, 2), size=(n, v))
    if label_kind == "soft":
        t = rng.random(size=shape).astype(np.float32)
        t[rng.random(size=shape) < 0.3] = 0
        return x, t, t
    t = reference.one_hot(index, c)
    if label_kind.startswith("dense "):
        return x, t.astype(label_kind[6:]), t
    if c > 127 and label_kind in ("uint8", "int8"):
        label_kind = "uint16"
    return x, index.astype(label_kind), t


def sure(x, gap, seed=0):
    """The same logits [N, V, C], but the largest of each voxel is larger by `gap`.

    Half of the voxels have it in their own largest class, and half in another one.
    """
    rng = np.random.default_rng(seed)
    largest = np.where(
        rng.random(x.shape[:2]) < 0.5, x.argmax(-1), rng.integers(0, x.shape[2], x.shape[:2])
    )
    at = largest[..., None] == np.arange(x.shape[2])
    return np.where(at, x.max(-1, keepdims=True) + gap, x).astype(x.dtype)


def with_label_sets(label_sets, index, classes, seed=0):
    """Class indices of which some are replaced by the values of label sets.

    Returns the labels, t [N, V, C], and 1 for the classes that a voxel may belong to.
    """
    rng = np.random.default_rng(seed)
    values = [*label_sets, *(c for c in range(classes) if c not in label_sets)]
    labels = rng.choice(values, index.shape)
    return labels.astype(index.dtype), *read_label_sets(label_sets, labels, classes)


def read_label_sets(label_sets, labels, classes):
    """t [..., C] of labels [...], and 1 for the classes that a voxel may belong to."""
    t, unknown = np.zeros((2, *labels.shape, classes))
    for value in np.unique(labels):
        stands_for = label_sets.get(value, (value,))
        for c in stands_for:
            (t if len(stands_for) == 1 else unknown)[labels == value, c] = 1
    return t, unknown


def distances_of(classes, seed=0):
    """A matrix of distances that float32 holds exactly. It is not symmetric."""
    distances = np.random.default_rng(seed).integers(1, 65, (classes, classes)) / 64
    return distances * (1 - np.eye(classes))


def in_format(data_format, *arrays):
    """Arrays of shape [N, V, C] laid out as asked; those of rank 2 stay as they are."""
    if data_format == "channels_last":
        return arrays
    return tuple(np.ascontiguousarray(a.swapaxes(1, 2)) if a.ndim == 3 else a for a in arrays)


def renamed(options):
    names = {
        "squared_pred": "squared",
        "soft_label": "soft",
        "focal_gamma": "gamma",
        "focal_gammas": "gamma",
        "label_smoothing": "smoothing",
    }
    of_labels = ("ignore_label", "regions", "label_sets")  # What these do is in t and the weights.
    return {names.get(k, k): v for k, v in options.items() if k not in of_labels}


def coefficients_by_name(coefficients, activation, distances=False):
    """Derivatives with respect to intersection, pred_sum, cross_entropy, negative_cross_entropy
    and distance_sum, as arguments of `core.gradient`. Those that a call must not have are left out;
    where there are three, the last is for both cross-entropies."""
    names = ["d_intersection", "d_pred_sum", "d_cross_entropy"]
    given = dict(zip(names, coefficients, strict=False))
    if activation == "sigmoid" and "d_cross_entropy" in given:
        given["d_negative_cross_entropy"] = coefficients[:4][-1]
    if distances:
        given["d_distance_sum"] = coefficients[4]
    return given
