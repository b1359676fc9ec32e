"""Checks of what users pass, shared by losses and metrics."""

import operator

import tensorflow as tf

from dice_op import core

ACTIVATIONS = ("softmax", "sigmoid", "none")
DATA_FORMATS = ("channels_last", "channels_first")


def one_of(argument, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{argument} is {value!r}, but must be one of {names}")


def flag(argument, value):
    if value not in (True, False):
        raise ValueError(f"{argument} is {value!r}, but must be True or False")
    return bool(value)


def number(argument, value):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{argument} is {value!r}, but must be a number") from None


def at_least_0(argument, value):
    result = number(argument, value)
    if not 0 <= result < float("inf"):
        raise ValueError(f"{argument} is {value}, but must be finite and at least 0")
    return result


def label(argument, value):
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise ValueError(f"{argument} is {value!r}, but must be an integer or None") from None


def class_weight_list(argument, weights):
    if weights is None:
        return None
    if isinstance(weights, (str, dict)) or not hasattr(weights, "__iter__"):
        raise ValueError(
            f"{argument} is {weights!r}, but must be a list of one weight per class, in order"
        )
    weights = [number(argument, w) for w in weights]
    if not weights or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(
            f"{argument} is {weights}, but must be one finite weight per class, at least 0 and "
            "not all 0"
        )
    return weights


def class_weight_tensor(argument, weights, sums, include_background=True):
    """`[C]`, or None; checks that there is one for each class of the sums."""
    if weights is None:
        return None
    counted = sums.intersection.shape[1]
    if counted is not None and counted != len(weights):
        raise ValueError(
            f"{argument} has {len(weights)} entries, but {counted} classes count"
            f"{'' if include_background else ' (include_background=False)'}"
        )
    if counted is None:  # checked when it runs
        tf.debugging.assert_equal(tf.shape(sums.intersection)[1], len(weights))
    return tf.constant(weights, sums.intersection.dtype)


def check_background(classes, include_background):
    if classes == 1 and not include_background:
        raise ValueError("include_background=False leaves no class: y_pred has one, the foreground")


def check_not_activated(y_pred, activation, cross_entropy=False, instead='activation="none"'):
    """Finds the model that ends in a softmax, where the loss would apply another."""
    found = getattr(y_pred, "_keras_logits", None) is not None  # Keras' mark on its activations
    kind = ""
    if tf.is_symbolic_tensor(y_pred):
        op = y_pred.op
        while op.type in ("Cast", "Identity"):  # as a mixed-precision model's last layer
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


def weights(sample_weight, y_pred, data_format):
    """Keras' `sample_weight` as weights per voxel and per sample `[N]`; None what was not given."""
    if sample_weight is None:
        return None, None
    weight = tf.convert_to_tensor(sample_weight)
    shape = tf.shape(y_pred)

    def of_samples():
        return tf.broadcast_to(tf.reshape(weight, [-1]), [shape[0]])

    per_voxel = is_per_voxel(weight, y_pred)
    if isinstance(per_voxel, bool):
        return (weight, None) if per_voxel else (None, of_samples())
    axis = tf.rank(y_pred) - 1 if data_format == "channels_last" else 1
    voxels = tf.concat([shape[:axis], shape[axis + 1 :]], 0)
    return (
        tf.cond(
            per_voxel, lambda: tf.reshape(weight, voxels), lambda: tf.ones(voxels, weight.dtype)
        ),
        tf.cond(per_voxel, lambda: tf.ones([shape[0]], weight.dtype), of_samples),
    )


def is_per_voxel(weight, y_pred):
    """Whether `weight` is `[N, spatial...]` (also with a channel axis), not `[N]` or `[N, 1]`.

    A tensor where ranks are known only when running: Keras traces so after weights of both kinds.
    """
    if weight.shape.rank is None or y_pred.shape.rank is None:
        column = tf.logical_and(tf.rank(weight) == 2, tf.reduce_all(tf.shape(weight)[1:] == 1))
        voxels = tf.logical_and(tf.rank(weight) > 1, tf.rank(y_pred) > 2)
        return tf.logical_and(voxels, tf.logical_not(column))
    column = weight.shape.rank == 2 and weight.shape[1] == 1
    if weight.shape.rank > 1 and y_pred.shape.rank > 2 and not column:
        return True
    if weight.shape.rank > 0 and not weight.shape[:1].is_compatible_with(y_pred.shape[:1]):
        raise ValueError(
            f"sample_weight has shape {weight.shape}, but y_pred {y_pred.shape}: it must be [N], a "
            "weight per sample, or [N, spatial...], a weight per voxel"
        )
    return False


def is_soft(y_true, y_pred):
    """Whether the labels may be other than 0 and 1: floats, one for each class."""
    y_true = tf.convert_to_tensor(y_true)
    return y_true.dtype.is_floating and y_true.shape.rank == y_pred.shape.rank


def region_lists(regions, include_background):
    """The label values of each region, as lists; None as it is."""
    if regions is None:
        return None
    try:
        regions = [[operator.index(label) for label in region] for region in regions]
    except TypeError:
        raise ValueError(
            f"regions is {regions!r}, but must be lists of the label values of each class"
        ) from None
    if not regions:
        raise ValueError("regions is empty, but must have the label values of each class")
    core.region_masks(regions)  # says what is wrong with them
    if not include_background:
        raise ValueError(
            "include_background=False would leave out the first of the regions: name those that "
            "count in regions"
        )
    return regions
