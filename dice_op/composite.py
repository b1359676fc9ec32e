"""The sums of `dice_op.dice_sums` in plain operations of any library, differentiable to any order.

The fused kernels leave out what is rare, and this serves it: second derivatives, and gradients with
respect to dense labels and voxel weights. It makes arrays of the volume's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dice_op import _arrays, core
from dice_op._arrays import Array, astype, namespace, reshape, sizes
from dice_op._types import Activation, DataFormat


def sums(
    logits: Array,
    labels: Array,
    voxel_weight: Sequence[Array],
    *,
    activation: Activation,
    data_format: DataFormat,
    squared_pred: bool,
    soft_label: bool,
    with_cross_entropy: bool,
    focal_gamma: float,
    label_smoothing: float,
    ignore_label: Sequence[int],
    regions: Sequence[int],
    label_sets: Sequence[int],
    focal_gammas: Sequence[float],
    dist_matrix: Sequence[float],
) -> list[Array]:
    """The sums of `DiceSums`, in its order. One that is not asked for has no classes.

    The arguments are the ops' inputs and attributes: `voxel_weight` and `ignore_label` are lists of
    at most one entry, and the tables are what `core.op_attributes` makes.
    """
    one_value_per_voxel = _one_value_per_voxel(logits, labels, data_format)
    xp = namespace(logits)
    dtype = _arrays.dtype_of_sums(logits)
    x = _flat(astype(logits, dtype), data_format)  # [N, V, C]
    batch, voxels, classes = sizes(x)
    if voxel_weight:
        weight = reshape(astype(voxel_weight[0], dtype), [batch, voxels])
    else:
        weight = xp.sum(xp.zeros_like(x), -1) + 1
    unknown = None  # [N, V, C]: 1 for the classes that a voxel may belong to

    def dense() -> Array:
        return _flat(astype(reshape(labels, sizes(logits)), dtype), data_format)

    def one_hot() -> Array:
        if regions:
            return _rows(_classes_of_regions(regions), index, classes, x)
        # Where there is one class, it is the foreground, and its label is 1.
        return _arrays.one_hot(index - astype(classes == 1, "int64", x), classes, x)

    if one_value_per_voxel:
        index = reshape(astype(labels, "int64"), [batch, voxels])
        if ignore_label:
            weight = xp.where(index == ignore_label[0], xp.zeros_like(weight), weight)
        if label_sets:
            index, unknown = _read_label_sets(label_sets, index, classes, x)
        if _arrays.is_floating(labels) and not ignore_label and not regions:
            t = _arrays.choose(classes == 1, dense, one_hot)
        else:
            t = one_hot()
    else:
        t = dense()
    m = weight[..., None]
    x = xp.where(m == 0, xp.zeros_like(x), x)
    known = m if unknown is None else m * (1 - unknown)

    activate = _arrays.activations(x)
    p = x if activation == "none" else getattr(activate, activation)(x)
    soft = soft_label and _arrays.is_floating(labels) and not squared_pred
    nothing = xp.sum(x, 1)[:, :0]
    cross_entropy = negative = nothing
    if with_cross_entropy:
        binary = activation == "sigmoid"
        choices = 2 if binary else astype(classes, dtype, x)
        smoothed = (1 - label_smoothing) * t + label_smoothing / choices
        gamma = _arrays.constant(focal_gammas or [focal_gamma], x)
        if binary:
            present = _focused(p, activate.log_sigmoid(x), gamma)
            absent = _focused(1 - p, activate.log_sigmoid(-x), gamma)
            cross_entropy = xp.sum(known * smoothed * present, 1)
            negative = xp.sum(known * (1 - smoothed) * absent, 1)
        else:
            losses = _categorical(activation, x, p, smoothed, gamma)
            if unknown is not None:
                lowest = astype(xp.cumsum(unknown, -1) == 1, dtype)
                smoothed = (1 - label_smoothing) * lowest + label_smoothing / choices
                marginal = smoothed * _marginal(activation, x, p, unknown, gamma)
                losses = xp.where(unknown == 1, marginal, losses)
            cross_entropy = xp.sum(m * losses, 1)
    distance_sum = nothing
    if dist_matrix:
        count = math.isqrt(len(dist_matrix))
        matrix = reshape(_arrays.constant(dist_matrix, x), [count, count])
        row = _arrays.rows(matrix, xp.clip(index, 0, count - 1))
        distance = xp.sum(row * p, -1, keepdims=True)
        distance_sum = xp.sum(m * t * distance, 1)
    return [
        xp.sum(known * (_least(p, t) if soft else p * t), 1),
        xp.sum(known * (p * p if squared_pred else p), 1),
        xp.sum(known * (t * t if squared_pred else t), 1),
        cross_entropy,
        negative,
        nothing if unknown is None else xp.sum(m * unknown, 1),
        distance_sum,
        xp.sum(weight, 1),
    ]


def _classes_of_regions(regions: Sequence[int]) -> list[list[int]]:
    """The classes of the label values 0, 1, ..., from the op's attribute: one bit for each."""
    words = -regions[0] if regions[0] < 0 else 1
    masks = regions[1:] if regions[0] < 0 else regions
    labels = [masks[i : i + words] for i in range(0, len(masks), words)]
    return [[c for c in range(32 * words) if label[c // 32] >> c % 32 & 1] for label in labels]


def _rows(
    classes_of: Sequence[Sequence[int]], index: Array, classes: Array | int, like: Array
) -> Array:
    """1 for the classes in `classes_of[index]`, 0 for the others, [N, V, C]."""
    xp = namespace(like)
    width = 1 + max((c for row in classes_of for c in row), default=0)
    table = _arrays.constant([[float(c in row) for c in range(width)] for row in classes_of], like)
    row = _arrays.rows(table, xp.clip(index, 0, len(classes_of) - 1))
    # Each class takes its column, and those behind the table take a column of zeros.
    zeros = xp.zeros_like(row[..., :1])
    column = xp.clip(_arrays.numbers(classes, like), 0, width)
    return _arrays.columns(xp.concatenate([row, zeros], -1), column)


def _read_label_sets(
    label_sets: Sequence[int], index: Array, classes: Array | int, like: Array
) -> tuple[Array, Array]:
    """The voxels' classes, -1 for those that may belong to one of several, and 1 for these."""
    xp = namespace(like)
    sets, rest = {}, list(label_sets)
    while rest:
        label, count, *rest = rest
        sets[label], rest = rest[:count], rest[count:]
    most = max(sets) + 1
    meaning = [
        sets[v][0] if len(sets.get(v, ())) == 1 else -1 if v in sets else v for v in range(most)
    ]
    several = [sets[v] if len(sets.get(v, ())) > 1 else [] for v in range(most)]
    # All values from `most` on are the classes of that number, and like the row behind the table.
    at = xp.clip(index, 0, most)
    unknown = _rows([*several, []], at, classes, like)
    meant = astype(_arrays.rows(_arrays.constant([*meaning, 0], like), at), "int64")
    return xp.where(index < most, meant, index), unknown


def _focused(probability: Array, log_probability: Array, gamma: Array) -> Array:
    """-(1 - p)^gamma log p. Derivatives of any order are finite, and 0 where p is 1."""
    xp = namespace(probability)
    error = 1 - probability
    counts = (error > 0) & (gamma > 0)
    power = xp.where(counts, error, xp.ones_like(error)) ** gamma
    power = xp.where(counts | (gamma == 0), power, xp.zeros_like(power))
    return -power * log_probability


def _categorical(activation: Activation, x: Array, p: Array, t: Array, gamma: Array) -> Array:
    xp = namespace(x)
    if activation == "softmax":
        losses = _focused(p, _arrays.activations(x).log_softmax(x), gamma)
        # 0 times infinity is 0 here.
        counts = (t != 0) | (losses != float("inf"))
        return xp.where(counts, losses, xp.zeros_like(losses)) * t
    p = _at_least(p, core.PROBABILITY_EPSILON)
    return t * _focused(p, xp.log(p), gamma)


def _marginal(activation: Activation, x: Array, p: Array, unknown: Array, gamma: Array) -> Array:
    """The cross-entropy of the sum of the unknown classes' p, [N, V, C] or [N, V, 1]."""
    xp = namespace(x)
    # Where no class is unknown, the sum is over all of them: it must be finite, and is not used.
    counts = (unknown == 1) | (xp.sum(unknown, -1, keepdims=True) == 0)
    q = xp.sum(xp.where(counts, p, xp.zeros_like(p)), -1, keepdims=True)
    if activation == "softmax":
        activate = _arrays.activations(x)
        log_p = xp.where(counts, activate.log_softmax(x), xp.zeros_like(x) - float("inf"))
        return _focused(q, activate.log_sum_exp(log_p), gamma)
    q = _at_least(q, core.PROBABILITY_EPSILON)
    return _focused(q, xp.log(q), gamma)


def _at_least(p: Array, floor: float) -> Array:
    """p, or where it is smaller, this number, which has no derivative."""
    xp = namespace(p)
    return xp.where(p < floor, xp.zeros_like(p) + floor, p)


def _least(p: Array, t: Array) -> Array:
    """min(p, t). Where they are equal, the derivative with respect to either is one half."""
    return (p + t - namespace(p).abs(p - t)) / 2


def _flat(x: Array, data_format: DataFormat) -> Array:
    """[N, spatial..., C] or [N, C, spatial...] as [N, V, C]."""
    shape = sizes(x)
    spatial = shape[2:] if data_format == "channels_first" else shape[1:-1]
    volume = 1  # A -1 in a reshape cannot replace it where the array is empty.
    for size in spatial:
        volume = volume * size
    if data_format == "channels_first":
        return _arrays.swap_last_axes(reshape(x, [shape[0], shape[1], volume]))
    return reshape(x, [shape[0], volume, shape[-1]])


def _one_value_per_voxel(logits: Array, labels: Array, data_format: DataFormat) -> bool:
    known = _arrays.known_shape(logits), _arrays.known_shape(labels)
    if known[0] is None or known[1] is None:
        raise ValueError(
            "second derivatives and gradients of labels or voxel weights need y_pred and y_true "
            "with a known number of axes: give them one with tf.ensure_shape"
        )
    dtype = _arrays.dtype_name(labels)
    return core.label_kind(known[0], known[1], dtype, data_format=data_format) != "per class"
