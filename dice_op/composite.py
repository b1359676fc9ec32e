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
) -> list[tf.Tensor]:
    """intersection, pred_sum, label_sum, cross_entropy [N, C] and weight_sum [N].

    The arguments are the ops' inputs and attributes: `voxel_weight` and `ignore_label` are lists of
    at most one entry, and `regions` is what `core.region_masks` makes.
    """
    dtype = dtype_of_sums(logits)
    x = _flat(tf.cast(logits, dtype), data_format)  # [N, V, C]
    batch, voxels, classes = tf.unstack(tf.shape(x))
    weight = tf.ones([batch, voxels], dtype)
    if voxel_weight:
        weight = tf.reshape(tf.cast(voxel_weight[0], dtype), [batch, voxels])

    def dense() -> tf.Tensor:
        return _flat(tf.cast(tf.reshape(labels, tf.shape(logits)), dtype), data_format)

    def one_hot() -> tf.Tensor:
        if regions:  # Each label has a mask of 32 bits, one for each class.
            bits = tf.constant([[m >> c & 1 for c in range(32)] for m in regions], dtype)
            return tf.gather(bits, tf.clip_by_value(index, 0, len(regions) - 1))[..., :classes]
        # Where there is one class, it is the foreground, and its label is 1.
        first = tf.cast(classes == 1, tf.int64)
        return tf.one_hot(index - first, classes, dtype=dtype)

    if _one_value_per_voxel(logits, labels, data_format):
        index = tf.reshape(tf.cast(labels, tf.int64), [batch, voxels])
        if ignore_label:
            weight = tf.where(index == ignore_label[0], tf.zeros_like(weight), weight)
        if labels.dtype.is_floating and not ignore_label and not regions:
            t = tf.cond(classes == 1, dense, one_hot)
        else:
            t = one_hot()
    else:
        t = dense()
    m = weight[..., tf.newaxis]
    x = tf.where(m == 0, tf.zeros_like(x), x)

    p = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid, "none": tf.identity}[activation](x)
    power = tf.square if squared_pred else tf.identity
    soft = soft_label and labels.dtype.is_floating and not squared_pred
    result = [
        tf.reduce_sum(m * (_least(p, t) if soft else p * t), 1),
        tf.reduce_sum(m * power(p), 1),
        tf.reduce_sum(m * power(t), 1),
    ]
    if with_cross_entropy:
        choices = 2 if activation == "sigmoid" else tf.cast(classes, dtype)
        smoothed = (1 - label_smoothing) * t + label_smoothing / choices
        losses = _cross_entropy(activation, x, p, smoothed, focal_gamma)
        result.append(tf.reduce_sum(m * losses, 1))
    else:
        result.append(tf.zeros([batch, 0], dtype))
    return [*result, tf.reduce_sum(weight, 1)]


def _cross_entropy(
    activation: Activation, x: tf.Tensor, p: tf.Tensor, t: tf.Tensor, gamma: float
) -> tf.Tensor:
    def focused(probability: tf.Tensor, log_probability: tf.Tensor) -> tf.Tensor:
        if gamma == 0:
            return -log_probability
        return -tf.pow(1 - probability, tf.cast(gamma, p.dtype)) * log_probability

    if activation == "sigmoid":
        absent = focused(1 - p, tf.math.log_sigmoid(-x))
        return t * focused(p, tf.math.log_sigmoid(x)) + (1 - t) * absent
    if activation == "softmax":
        return tf.math.multiply_no_nan(focused(p, tf.nn.log_softmax(x)), t)
    p = tf.maximum(p, core.PROBABILITY_EPSILON)
    return t * focused(p, tf.math.log(p))


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
