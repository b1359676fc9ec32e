"""What losses and metrics are called with: checks of labels and logits, weights, Keras' masks."""

from __future__ import annotations

import typing
import warnings

import tensorflow as tf

from dice_op import core, ops
from dice_op._types import Activation, DataFormat, TensorLike

MANY_CLASSES = 64  # An axis that is longer than this may well be a spatial one.


def channel_axis(data_format: DataFormat) -> int:
    return -1 if data_format == "channels_last" else 1


def first_spatial_axis(data_format: DataFormat) -> int:
    return 1 if data_format == "channels_last" else 2


# --- checks of labels and predictions -------------------------------------------------------------


def check_not_activated(
    y_pred: tf.Tensor,
    activation: Activation,
    cross_entropy: bool = False,
    instead: str = 'activation="none"',
) -> None:
    """Finds a model that ends in a softmax or sigmoid, where the loss would apply another one."""
    # Keras leaves this mark on the outputs of its activations.
    found = getattr(y_pred, "_keras_logits", None) is not None
    kind = ""
    if tf.is_symbolic_tensor(y_pred):
        op = y_pred.op
        while op.type in ("Cast", "Identity"):  # The last layer of a mixed-precision model is one.
            op = op.inputs[0].op
        kind = op.type
        found = found or kind in ("Softmax", "Sigmoid")
    binary = cross_entropy and kind == "Sigmoid"
    if found and activation != "none":
        raise ValueError(
            "y_pred are probabilities, the output of a softmax or sigmoid, and "
            f"another would be applied ({activation=}): remove the model's last activation, so "
            f"that y_pred are logits (the more exact way){'' if binary else ', or pass ' + instead}"
        )
    if binary:
        raise ValueError(
            'y_pred are the output of a sigmoid, but the cross-entropy of activation="none" is '
            'categorical: remove the model\'s last activation and pass activation="sigmoid"'
        )


def check_shapes(
    y_true: tf.Tensor, y_pred: tf.Tensor, data_format: DataFormat, each_sample_counts: bool = True
) -> None:
    """Warns of shapes that are legal, but usually come from a mistake.

    A warning points to the line that calls the loss.

    each_sample_counts: whether every sample has an overlap of its own.
    """
    shape, rank = y_pred.shape, y_pred.shape.rank
    if rank == 2 and each_sample_counts:
        warnings.warn(
            f"y_pred has shape {shape}, no spatial axes: each row counts as a sample of one voxel, "
            "with a loss of its own. If the rows are the voxels of an image, keep its shape "
            "[N, spatial..., C], or pass batch=True, which adds up the sums of all rows",
            stacklevel=4,
        )
    if rank is None or rank < 3 or y_true.shape.rank != rank:
        return
    # Labels have the shape of the logits, with very many classes. Where there is only one other
    # axis, or the axis beside it has the same size, it was probably meant as a spatial axis.
    axis = channel_axis(data_format) % rank
    last = data_format == "channels_last"
    classes, beside = shape[axis], shape[axis - 1 if last else axis + 1]
    if classes is None or classes <= MANY_CLASSES or y_true.shape[axis] == 1:
        return
    if (rank == 3 or classes == beside) and not _are_one_hot(y_true, axis):
        other = "channels_first" if last else "channels_last"
        warnings.warn(
            f"y_true and y_pred both have shape {shape}, whose {'last axis' if last else 'axis 1'} "
            f"is taken for {classes} classes. If it is a spatial one, add the axis of the channels "
            f"to y_pred ({'y_pred[..., None]' if last else 'y_pred[:, None]'}), or, where the "
            f"channels are another axis, pass data_format={other!r}",
            stacklevel=4,
        )


def _are_one_hot(y_true: tf.Tensor, axis: int) -> bool:
    """Whether labels add up to 1 over the classes, judged by a few voxels.

    Inside a graph nobody knows, and the answer is no.
    """
    if tf.is_symbolic_tensor(y_true) or not y_true.shape[0]:
        return False
    rows = tf.reshape(
        tf.experimental.numpy.moveaxis(y_true[:1], axis, -1), [-1, y_true.shape[axis]]
    )
    few = tf.cast(rows[:: max(1, rows.shape[0] // 64)], tf.float32)
    return bool(tf.reduce_all(tf.abs(tf.reduce_sum(few, 1) - 1) < 0.01))


def are_soft(
    y_true: tf.Tensor, y_pred: tf.Tensor, data_format: DataFormat, **options: typing.Any
) -> bool:
    """Whether labels may be other than 0 and 1. Floats may be, unless they are class indices.

    options: `ignore_label` and `regions`.
    """
    if not y_true.dtype.is_floating or None in (y_true.shape.rank, y_pred.shape.rank):
        return False
    kind = core.label_kind(
        y_pred.shape.as_list(),
        y_true.shape.as_list(),
        y_true.dtype.name,
        data_format=data_format,
        **options,
    )
    one_class = y_pred.shape[channel_axis(data_format)] == 1
    return kind == "per class" or (kind == "mask" and one_class)


# --- weights --------------------------------------------------------------------------------------


def voxel_shape(y_pred: tf.Tensor, data_format: DataFormat) -> tf.Tensor:
    """`[N, spatial...]` of the predictions, as a tensor."""
    shape = tf.shape(y_pred)
    axis = channel_axis(data_format) % tf.rank(y_pred)
    return tf.concat([shape[:axis], shape[axis + 1 :]], 0)


def split_weights(
    sample_weight: TensorLike | None,
    y_pred: tf.Tensor,
    data_format: DataFormat,
    voxels: tf.Tensor | None = None,
) -> tuple[tf.Tensor | None, tf.Tensor | None]:
    """Keras' `sample_weight` as weights per voxel and weights per sample, `[N]`.

    Usually one of the two is None. Both are tensors where only the running program knows which kind
    the weights are.

    voxels: the shape `[N, spatial...]` of weights per voxel, if it is not that of `y_pred`.
    """
    if sample_weight is None:
        return None, None
    weight = ops.dense_tensor("sample_weight", sample_weight)
    samples = tf.shape(y_pred)[0]
    per_voxel = _are_per_voxel(weight, y_pred)
    if isinstance(per_voxel, bool):
        if per_voxel:
            return weight, None
        return None, tf.broadcast_to(tf.reshape(weight, [-1]), [samples])
    # One program serves both kinds, and the sizes decide. A tf.cond is no way out: XLA compiles
    # both of its branches, and in one of them the shape does not fit.
    if not weight.dtype.is_floating:
        weight = tf.cast(weight, tf.float32)
    voxels = voxel_shape(y_pred, data_format) if voxels is None else voxels
    volume = tf.reduce_prod(voxels[1:])
    table = tf.reshape(weight, tf.where(per_voxel, [samples, volume], [tf.size(weight), 1]))
    of_voxels = tf.where(per_voxel, table, tf.ones_like(table))
    of_samples = tf.where(per_voxel, tf.ones([], weight.dtype), tf.reduce_sum(table[:, :1], 1))
    return (
        tf.reshape(tf.broadcast_to(of_voxels, [samples, volume]), voxels),
        tf.broadcast_to(of_samples, [samples]),
    )


def _are_per_voxel(weight: tf.Tensor, y_pred: tf.Tensor) -> bool | tf.Tensor:
    """Whether `weight` is `[N, spatial...]` (also with a channel axis), not `[N]` or `[N, 1]`.

    The answer is a tensor where only the running program knows it. Keras traces such a program once
    it has seen weights of both kinds.
    """
    if weight.shape.rank is None or y_pred.shape.rank is None:
        column = tf.logical_and(tf.rank(weight) == 2, tf.reduce_all(tf.shape(weight)[1:] == 1))
        voxels = tf.logical_and(tf.rank(weight) > 1, tf.rank(y_pred) > 2)
        return tf.logical_and(voxels, tf.logical_not(column))
    if weight.shape.rank == 2 and weight.shape[1] is None and y_pred.shape.rank > 2:
        return tf.shape(weight)[1] != 1
    column = weight.shape.rank == 2 and weight.shape[1] == 1
    if weight.shape.rank > 1 and y_pred.shape.rank > 2 and not column:
        return True
    if weight.shape.rank > 0 and not weight.shape[:1].is_compatible_with(y_pred.shape[:1]):
        raise ValueError(
            f"sample_weight has shape {weight.shape}, but y_pred {y_pred.shape}: it must be [N], a "
            "weight per sample, or [N, spatial...], a weight per voxel"
        )
    return False


def keras_mask(y_pred: tf.Tensor) -> tf.Tensor | None:
    """The mask that Keras' layers have attached to `y_pred`, booleans `[N, ...]`, or None."""
    return getattr(y_pred, "_keras_mask", None)


def apply_mask(
    mask: tf.Tensor, voxel_weight: tf.Tensor | None, y_pred: tf.Tensor, data_format: DataFormat
) -> tuple[tf.Tensor, tf.Tensor]:
    """`voxel_weight` with 0 where the Keras mask is False, and the share of each sample's voxels
    that are left, `[N]`.

    The mask has the first axes of `[N, spatial...]`, such as the one of the time steps.
    """
    voxels = voxel_shape(y_pred, data_format)
    mask = tf.cast(mask, tf.bool)
    missing = tf.ones([tf.size(voxels) - tf.rank(mask)], tf.int32)
    mask = tf.broadcast_to(tf.reshape(mask, tf.concat([tf.shape(mask), missing], 0)), voxels)
    volume = tf.reduce_prod(voxels[1:])
    left = tf.math.count_nonzero(tf.reshape(mask, tf.stack([voxels[0], volume])), 1)
    share = tf.math.divide_no_nan(tf.cast(left, tf.float64), tf.cast(volume, tf.float64))
    if voxel_weight is None:
        return mask, share
    voxel_weight = tf.reshape(voxel_weight, voxels)
    return tf.where(mask, voxel_weight, tf.zeros_like(voxel_weight)), share
