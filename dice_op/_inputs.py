"""What losses and metrics are called with: checks of labels and logits, weights, Keras' masks."""

from __future__ import annotations

import math
import typing
import warnings

from keras import ops

from dice_op import core
from dice_op._arrays import Array, channel_axis, dtype_name, is_floating, known_shape
from dice_op._backends import backend
from dice_op._types import Activation, DataFormat, TensorLike

try:
    from keras.src.backend.common.masking import get_keras_mask as _mask_of
except ImportError:  # An older Keras keeps a mask in an attribute alone.
    _mask_of = None

MANY_CLASSES = 64  # An axis that is longer than this may well be a spatial one.


def classes_of(y_pred: Array, data_format: DataFormat) -> int | None:
    """The number of classes, or None if TensorFlow does not know it yet."""
    shape = known_shape(y_pred)
    return None if shape is None else shape[channel_axis(data_format)]


# --- checks of labels and predictions -------------------------------------------------------------


def check_not_activated(
    y_pred: Array,
    activation: Activation,
    cross_entropy: bool = False,
    instead: str = 'activation="none"',
) -> None:
    """Finds a model that ends in a softmax or sigmoid, where the loss would apply another one."""
    kind = backend.last_activation(y_pred)
    # Keras leaves this mark on the outputs of its activations.
    found = kind is not None or getattr(y_pred, "_keras_logits", None) is not None
    binary = cross_entropy and kind == "sigmoid"
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
    y_true: Array, y_pred: Array, data_format: DataFormat, each_sample_counts: bool = True
) -> None:
    """Warns of shapes that are legal, but usually come from a mistake.

    A warning points to the line that calls the loss.

    each_sample_counts: whether every sample has an overlap of its own.
    """
    shape, of_labels = known_shape(y_pred), known_shape(y_true)
    if shape is None:
        return
    rank, shown = len(shape), tuple(shape)
    if rank == 2 and each_sample_counts:
        warnings.warn(
            f"y_pred has shape {shown}, no spatial axes: each row counts as a sample of one voxel, "
            "with a loss of its own. If the rows are the voxels of an image, keep its shape "
            "[N, spatial..., C], or pass batch=True, which adds up the sums of all rows",
            stacklevel=4,
        )
    if rank < 3 or of_labels is None or len(of_labels) != rank:
        return
    # Labels have the shape of the logits, with very many classes. Where there is only one other
    # axis, or the axis beside it has the same size, it was probably meant as a spatial axis.
    axis = channel_axis(data_format) % rank
    last = data_format == "channels_last"
    classes, beside = shape[axis], shape[axis - 1 if last else axis + 1]
    if classes is None or classes <= MANY_CLASSES or of_labels[axis] == 1:
        return
    if (rank == 3 or classes == beside) and not _are_one_hot(y_true, axis):
        other = "channels_first" if last else "channels_last"
        warnings.warn(
            f"y_true and y_pred both have shape {shown}, whose {'last axis' if last else 'axis 1'} "
            f"is taken for {classes} classes. If it is a spatial one, add the axis of the channels "
            f"to y_pred ({'y_pred[..., None]' if last else 'y_pred[:, None]'}), or, where the "
            f"channels are another axis, pass data_format={other!r}",
            stacklevel=4,
        )


def _are_one_hot(y_true: Array, axis: int) -> bool:
    """Whether labels add up to 1 over the classes, judged by a few voxels.

    Inside a graph nobody knows, and the answer is no.
    """
    if not backend.knows_values(y_true) or not y_true.shape[0]:
        return False
    rows = ops.reshape(ops.moveaxis(y_true[:1], axis, -1), [-1, y_true.shape[axis]])
    few = ops.cast(rows[:: max(1, rows.shape[0] // 64)], "float32")
    return bool(ops.all(ops.abs(ops.sum(few, 1) - 1) < 0.01))


def are_soft(y_true: Array, y_pred: Array, data_format: DataFormat, **options: typing.Any) -> bool:
    """Whether labels may be other than 0 and 1. Floats may be, unless they are class indices.

    options: `ignore_label` and `regions`.
    """
    shape, of_labels = known_shape(y_pred), known_shape(y_true)
    if not is_floating(y_true) or shape is None or of_labels is None:
        return False
    kind = core.label_kind(shape, of_labels, dtype_name(y_true), data_format=data_format, **options)
    return kind == "per class" or (kind == "mask" and shape[channel_axis(data_format)] == 1)


# --- weights --------------------------------------------------------------------------------------


def voxel_shape(y_pred: Array, data_format: DataFormat) -> list[typing.Any]:
    """`[N, spatial...]` of predictions, or of labels that have their axes.

    Its entries are whole numbers, or tensors for what is not known.
    """
    shape = list(ops.shape(y_pred))
    del shape[channel_axis(data_format)]
    return shape


def split_weights(
    sample_weight: TensorLike | None,
    y_pred: Array,
    data_format: DataFormat,
    voxels: Array | None = None,
) -> tuple[Array | None, Array | None]:
    """Keras' `sample_weight` as weights per voxel and weights per sample, `[N]` or `[1]`.

    Usually one of the two is None. Both are tensors where only the running program knows which kind
    the weights are: Keras traces such a program once it has seen weights of both kinds.

    voxels: the shape `[N, spatial...]` of weights per voxel, if it is not that of `y_pred`.
    """
    if sample_weight is None:
        return None, None
    weight = backend.dense_tensor("sample_weight", sample_weight)
    shape, predicted = known_shape(weight), known_shape(y_pred)
    if shape is None or predicted is None:
        return backend.split_weights(weight, y_pred, data_format, voxels)
    if len(shape) > 1 and len(predicted) > 2 and shape[1:] != [1]:
        if shape[1:] == [None]:
            return backend.split_weights(weight, y_pred, data_format, voxels)
        return weight, None
    if shape and None not in (shape[0], predicted[0]) and shape[0] != predicted[0]:
        raise ValueError(
            f"sample_weight has shape {tuple(shape)}, but y_pred {tuple(predicted)}: it must be "
            "[N], a weight per sample, or [N, spatial...], a weight per voxel"
        )
    return None, ops.reshape(weight, [-1])


def keras_mask(y_pred: Array) -> Array | None:
    """The mask that Keras' layers have attached to `y_pred`, booleans `[N, ...]`, or None."""
    mask = getattr(y_pred, "_keras_mask", None)
    if mask is None and _mask_of is not None:  # JAX's arrays take no attributes.
        mask = _mask_of(y_pred)
    return mask


def apply_mask(
    mask: Array, voxel_weight: Array | None, y_pred: Array, data_format: DataFormat
) -> tuple[Array, Array]:
    """`voxel_weight` with 0 where the Keras mask is False, and the share of each sample's voxels
    that are left, `[N]`.

    The mask has the first axes of `[N, spatial...]`, such as the one of the time steps.
    """
    voxels = voxel_shape(y_pred, data_format)
    mask = ops.cast(mask, "bool")
    of_mask = list(ops.shape(mask))
    missing = [1] * (len(voxels) - len(of_mask))
    mask = ops.broadcast_to(ops.reshape(mask, [*of_mask, *missing]), voxels)
    volume = math.prod(voxels[1:])
    left = ops.count_nonzero(ops.reshape(mask, [voxels[0], volume]), 1)
    share = ops.divide_no_nan(ops.cast(left, "float32"), ops.cast(volume, "float32"))
    if voxel_weight is None:
        return mask, share
    voxel_weight = ops.reshape(voxel_weight, voxels)
    return ops.where(mask, voxel_weight, ops.zeros_like(voxel_weight)), share


# --- several resolutions --------------------------------------------------------------------------


def resampled(name: str, volume: Array, y_pred: Array, data_format: DataFormat) -> Array:
    """The values of `volume` at the centres of the voxels of `y_pred`, which are larger."""
    shape, predicted = known_shape(volume), known_shape(y_pred)
    if predicted is None or shape is None or len(predicted) - len(shape) not in (0, 1):
        raise ValueError(
            f"{name} has shape {shape and tuple(shape)}, and y_pred "
            f"{predicted and tuple(predicted)}: {name} must have the axes [N, spatial...], or "
            "those of y_pred; where they are not known, tf.ensure_shape tells them"
        )
    new = ops.shape(y_pred)
    first = of_volume = 1 if data_format == "channels_last" else 2
    if len(shape) < len(predicted):
        of_volume = 1
    for axis in range(len(predicted) - 2):
        old = ops.shape(volume)[of_volume + axis]
        centres = _centres(name, old, new[first + axis])
        volume = ops.take(volume, centres, of_volume + axis)
    return volume


def _centres(name: str, old: typing.Any, new: typing.Any) -> typing.Any:
    """Where the centres of `new` voxels are among `old` smaller ones, as indices.

    The sizes are whole numbers, or tensors where TensorFlow does not know them yet.
    """
    too_small = f"{name} is smaller than y_pred: give labels of the finest resolution"
    if not isinstance(old, int) or not isinstance(new, int):
        return backend.centres(old, new, too_small)
    if new > old:
        raise ValueError(f"{too_small}; their sizes are {old} and {new}")
    return [(2 * i + 1) * old // (2 * new) for i in range(new)]
