"""The sums of dice_op.dice_sums in plain TensorFlow operations, differentiable to any order.

The fused kernels leave out what is rare, and this serves it: second derivatives, and gradients with
respect to dense labels and voxel weights. It makes tensors of the volume's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from dice_op import core
from dice_op._types import Activation, DataFormat


def dtype_of_sums(logits: tf.Tensor) -> tf.DType:
    return tf.float64 if logits.dtype == tf.float64 else tf.float32


def sums(
    logits: tf.Tensor,
    labels: tf.Tensor,
    voxel_weight: Sequence[tf.Tensor],
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
) -> list[tf.Tensor]:
    """The sums of `DiceSums`, in its order. One that is not asked for has no classes.

    The arguments are the ops' inputs and attributes: `voxel_weight` and `ignore_label` are lists of
    at most one entry, and the tables are what `core.op_attributes` makes.
    """
    dtype = dtype_of_sums(logits)
    x = _flat(tf.cast(logits, dtype), data_format)  # [N, V, C]
    batch, voxels, classes = tf.unstack(tf.shape(x))
    weight = tf.ones([batch, voxels], dtype)
    if voxel_weight:
        weight = tf.reshape(tf.cast(voxel_weight[0], dtype), [batch, voxels])
    unknown = None  # [N, V, C]: 1 for the classes that a voxel may belong to

    def dense() -> tf.Tensor:
        return _flat(tf.cast(tf.reshape(labels, tf.shape(logits)), dtype), data_format)

    def one_hot() -> tf.Tensor:
        if regions:
            return _rows(_classes_of_regions(regions), index, classes, dtype)
        # Where there is one class, it is the foreground, and its label is 1.
        first = tf.cast(classes == 1, tf.int64)
        return tf.one_hot(index - first, classes, dtype=dtype)

    if _one_value_per_voxel(logits, labels, data_format):
        index = tf.reshape(tf.cast(labels, tf.int64), [batch, voxels])
        if ignore_label:
            weight = tf.where(index == ignore_label[0], tf.zeros_like(weight), weight)
        if label_sets:
            index, unknown = _read_label_sets(label_sets, index, classes, dtype)
        if labels.dtype.is_floating and not ignore_label and not regions:
            t = tf.cond(classes == 1, dense, one_hot)
        else:
            t = one_hot()
    else:
        t = dense()
    m = weight[..., tf.newaxis]
    x = tf.where(m == 0, tf.zeros_like(x), x)
    known = m if unknown is None else m * (1 - unknown)

    p = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid, "none": tf.identity}[activation](x)
    power = tf.square if squared_pred else tf.identity
    soft = soft_label and labels.dtype.is_floating and not squared_pred
    nothing = tf.zeros([batch, 0], dtype)
    cross_entropy = negative = nothing
    if with_cross_entropy:
        binary = activation == "sigmoid"
        choices = 2 if binary else tf.cast(classes, dtype)
        smoothed = (1 - label_smoothing) * t + label_smoothing / choices
        gamma = tf.constant(focal_gammas or [focal_gamma], dtype)
        if binary:
            cross_entropy = tf.reduce_sum(
                known * smoothed * _focused(p, tf.math.log_sigmoid(x), gamma), 1
            )
            negative = tf.reduce_sum(
                known * (1 - smoothed) * _focused(1 - p, tf.math.log_sigmoid(-x), gamma), 1
            )
        else:
            losses = _categorical(activation, x, p, smoothed, gamma)
            if unknown is not None:
                lowest = tf.cast(tf.cumsum(unknown, -1) == 1, dtype)
                smoothed = (1 - label_smoothing) * lowest + label_smoothing / choices
                marginal = smoothed * _marginal(activation, x, p, unknown, gamma)
                losses = tf.where(unknown == 1, marginal, losses)
            cross_entropy = tf.reduce_sum(m * losses, 1)
    distance_sum = nothing
    if dist_matrix:
        distances = tf.reshape(tf.constant(dist_matrix, dtype), [classes, classes])
        distance = tf.reduce_sum(tf.matmul(t, distances) * p, -1, keepdims=True)
        distance_sum = tf.reduce_sum(m * t * distance, 1)
    return [
        tf.reduce_sum(known * (_least(p, t) if soft else p * t), 1),
        tf.reduce_sum(known * power(p), 1),
        tf.reduce_sum(known * power(t), 1),
        cross_entropy,
        negative,
        nothing if unknown is None else tf.reduce_sum(m * unknown, 1),
        distance_sum,
        tf.reduce_sum(weight, 1),
    ]


def _classes_of_regions(regions: Sequence[int]) -> list[list[int]]:
    """The classes of the label values 0, 1, ..., from the op's attribute: one bit for each."""
    words = -regions[0] if regions[0] < 0 else 1
    masks = regions[1:] if regions[0] < 0 else regions
    labels = [masks[i : i + words] for i in range(0, len(masks), words)]
    return [[c for c in range(32 * words) if label[c // 32] >> c % 32 & 1] for label in labels]


def _rows(
    classes_of: Sequence[Sequence[int]], index: tf.Tensor, classes: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """1 for the classes in `classes_of[index]`, 0 for the others, [N, V, C]."""
    width = 1 + max((c for row in classes_of for c in row), default=0)
    table = tf.constant([[float(c in row) for c in range(width)] for row in classes_of], dtype)
    table = tf.pad(table, [[0, 0], [0, tf.maximum(classes - width, 0)]])[:, :classes]
    return tf.gather(table, tf.clip_by_value(index, 0, len(classes_of) - 1))


def _read_label_sets(
    label_sets: Sequence[int], index: tf.Tensor, classes: tf.Tensor, dtype: tf.DType
) -> tuple[tf.Tensor, tf.Tensor]:
    """The voxels' classes, -1 for those that may belong to one of several, and 1 for these."""
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
    at = tf.clip_by_value(index, 0, most)
    unknown = _rows([*several, []], at, classes, dtype)
    return tf.where(
        index < most, tf.gather(tf.constant([*meaning, 0], tf.int64), at), index
    ), unknown


def _focused(probability: tf.Tensor, log_probability: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
    """-(1 - p)^gamma log p. Derivatives of any order are finite, and 0 where p is 1."""
    error = 1 - probability
    counts = tf.logical_and(error > 0, gamma > 0)
    power = tf.pow(tf.where(counts, error, tf.ones_like(error)), gamma)
    power = tf.where(tf.logical_or(counts, gamma == 0), power, tf.zeros_like(power))
    return -power * log_probability


def _categorical(
    activation: Activation, x: tf.Tensor, p: tf.Tensor, t: tf.Tensor, gamma: tf.Tensor
) -> tf.Tensor:
    if activation == "softmax":
        return tf.math.multiply_no_nan(_focused(p, tf.nn.log_softmax(x), gamma), t)
    p = tf.maximum(p, core.PROBABILITY_EPSILON)
    return t * _focused(p, tf.math.log(p), gamma)


def _marginal(
    activation: Activation, x: tf.Tensor, p: tf.Tensor, unknown: tf.Tensor, gamma: tf.Tensor
) -> tf.Tensor:
    """The cross-entropy of the sum of the unknown classes' p, [N, V, C] or [N, V, 1]."""
    # Where no class is unknown, the sum is over all of them: it must be finite, and is not used.
    counts = tf.logical_or(unknown == 1, tf.reduce_sum(unknown, -1, keepdims=True) == 0)
    q = tf.reduce_sum(tf.where(counts, p, tf.zeros_like(p)), -1, keepdims=True)
    if activation == "softmax":
        log_p = tf.where(counts, tf.nn.log_softmax(x), tf.cast(-float("inf"), p.dtype))
        return _focused(q, tf.reduce_logsumexp(log_p, -1, keepdims=True), gamma)
    q = tf.maximum(q, core.PROBABILITY_EPSILON)
    return _focused(q, tf.math.log(q), gamma)


def _least(p: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
    """min(p, t). Where they are equal, the derivative with respect to either is one half."""
    return (p + t - tf.abs(p - t)) / 2


def _flat(x: tf.Tensor, data_format: DataFormat) -> tf.Tensor:
    """[N, spatial..., C] or [N, C, spatial...] as [N, V, C]."""
    if data_format == "channels_first":
        x = tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1], _volume(x, 2)])
        return tf.transpose(x, [0, 2, 1])
    return tf.reshape(x, [tf.shape(x)[0], _volume(x, 1, -1), tf.shape(x)[-1]])


def _volume(x: tf.Tensor, first: int, last: int | None = None) -> tf.Tensor:
    """The number of voxels. A -1 in tf.reshape cannot replace it where the tensor is empty."""
    return tf.reduce_prod(tf.shape(x)[first:last])


def _one_value_per_voxel(logits: tf.Tensor, labels: tf.Tensor, data_format: DataFormat) -> bool:
    if logits.shape.rank is None or labels.shape.rank is None:
        raise ValueError(
            "second derivatives and gradients of labels or voxel weights need y_pred and y_true "
            "with a known number of axes: give them one with tf.ensure_shape"
        )
    kind = core.label_kind(
        logits.shape.as_list(), labels.shape.as_list(), labels.dtype.name, data_format=data_format
    )
    return kind != "per class"
