"""Checks of what users pass, shared by losses and metrics."""

import difflib
import inspect
import operator
import sys
import warnings

import keras
import tensorflow as tf

from dice_op import core, ops

ACTIVATIONS = ("softmax", "sigmoid", "none")
DATA_FORMATS = ("channels_last", "channels_first")
MANY_CLASSES = 64  # a last axis that is longer than this may well be a spatial one

# Arguments of other libraries' losses, and what to do about them here.
_ELSEWHERE = {
    "from_logits": 'y_pred are logits; for probabilities pass activation="none"',
    "axis": 'the axis of the classes is the last one, or with data_format="channels_first" axis 1',
    "num_classes": "the number of classes is that of y_pred's channels",
    "to_onehot_y": "labels stay class indices, nothing is to be converted",
    "softmax": 'the softmax is applied by default, activation="softmax"',
    "sigmoid": 'pass activation="sigmoid"',
}
_ELSEWHERE_IN_SCORES = _ELSEWHERE | {
    "activation": "scores need none: pass from_logits=False where y_pred are probabilities",
    "softmax": 'scores need none: prediction="argmax" takes the largest logit',
    "sigmoid": 'pass prediction="threshold"',
}


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


def refuse_unknown(found, unknown, is_score=False):
    """Says that `found`, a loss or metric, has no arguments of these names, and what to do."""
    if not unknown:
        return
    name = next(iter(unknown))
    known = {
        parameter
        for kind in type(found).__mro__
        for parameter, value in inspect.signature(kind.__init__).parameters.items()
        if value.kind is inspect.Parameter.KEYWORD_ONLY
    }
    advice = (_ELSEWHERE_IN_SCORES if is_score else _ELSEWHERE).get(name)
    if advice is None:
        similar = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(sorted(known))}"
    raise TypeError(f"{type(found).__name__} has no argument {name!r}: {advice}")


def data_format(value):
    """The layout asked for; for None Keras' setting, as in Keras' layers."""
    if value is None:
        value = keras.config.image_data_format()
    one_of("data_format", value, DATA_FORMATS)
    return value


def refuse_tf_keras():
    """Refuses a call that comes from tf_keras (Keras 2), which takes our classes for functions: it
    would not hand them its weights, and never reset a score."""
    if "tf_keras" not in sys.modules:
        return
    frame = sys._getframe(1)
    ours = ("dice_op", "keras", "tensorflow")
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame = frame.f_back
    if frame and frame.f_globals.get("__name__", "").partition(".")[0] == "tf_keras":
        raise TypeError(
            "this model is one of tf_keras (Keras 2), but dice_op's losses and metrics are for "
            "Keras 3: build the model with `import keras`, and leave TF_USE_LEGACY_KERAS unset. In "
            "a loop of your own, dice_op.dice_sums and dice_op.formulas work with any model"
        )


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


def check_shapes(y_true, y_pred, data_format, alone=True):
    """Warns of shapes that are legal, but mostly stand for something else.

    alone: whether the overlap of each sample counts by itself.
    """
    shape, rank = y_pred.shape, y_pred.shape.rank
    if rank == 2 and alone:
        warnings.warn(
            f"y_pred has shape {shape}, no spatial axes: each row counts as a sample of one voxel, "
            "with a loss of its own. If the rows are the voxels of an image, keep its shape "
            "[N, spatial..., C], or pass batch=True, which adds up the sums of all rows",
            stacklevel=4,
        )
    if rank is None or rank < 3 or y_true.shape.rank != rank:
        return
    # Labels of the logits' shape with very many classes: where there is but one other axis, or one
    # of the same size beside it, a spatial axis was mostly meant.
    last = data_format == "channels_last"
    axis, beside = (rank - 1, rank - 2) if last else (1, 2)
    classes = shape[axis]
    if classes is None or classes <= MANY_CLASSES or y_true.shape[axis] == 1:
        return
    if (rank == 3 or classes == shape[beside]) and not _are_one_hot(y_true, axis):
        other = "channels_first" if last else "channels_last"
        warnings.warn(
            f"y_true and y_pred both have shape {shape}, whose {'last axis' if last else 'axis 1'} "
            f"is taken for {classes} classes. If it is a spatial one, add the axis of the channels "
            f"to y_pred ({'y_pred[..., None]' if last else 'y_pred[:, None]'}), or, where the "
            f"channels are another axis, pass data_format={other!r}",
            stacklevel=4,
        )


def _are_one_hot(y_true, axis):
    """Whether labels add up to 1 over the classes, by a few voxels; not known inside a graph."""
    if tf.is_symbolic_tensor(y_true) or not y_true.shape[0]:
        return False
    rows = tf.reshape(
        tf.experimental.numpy.moveaxis(y_true[:1], axis, -1), [-1, y_true.shape[axis]]
    )
    few = tf.cast(rows[:: max(1, rows.shape[0] // 64)], tf.float32)
    return bool(tf.reduce_all(tf.abs(tf.reduce_sum(few, 1) - 1) < 0.01))


def weights(sample_weight, y_pred, data_format, voxels=None):
    """Keras' `sample_weight` as weights per voxel and per sample `[N]`; None what was not given.

    voxels: the shape `[N, spatial...]` of weights per voxel, if it is not that of `y_pred`.
    """
    if sample_weight is None:
        return None, None
    weight = ops.dense_tensor("sample_weight", sample_weight)
    samples = tf.shape(y_pred)[0]
    per_voxel = is_per_voxel(weight, y_pred)
    if isinstance(per_voxel, bool):
        if per_voxel:
            return weight, None
        return None, tf.broadcast_to(tf.reshape(weight, [-1]), [samples])
    # One program for both kinds, in which the sizes decide. A tf.cond would not do: XLA compiles
    # both of its branches, and the shape of one does not fit.
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


def voxel_shape(y_pred, data_format):
    """`[N, spatial...]` of the predictions, as a tensor."""
    shape = tf.shape(y_pred)
    axis = tf.rank(y_pred) - 1 if data_format == "channels_last" else 1
    return tf.concat([shape[:axis], shape[axis + 1 :]], 0)


def keras_mask(y_pred):
    """The mask that Keras' layers have handed on with `y_pred`, booleans `[N, ...]`, or None."""
    return getattr(y_pred, "_keras_mask", None)


def masked(mask, voxel_weight, y_pred, data_format):
    """`voxel_weight`, which may be None, with 0 where the Keras mask is False; and the share of
    each sample's voxels that are left, `[N]`.

    The mask has the first axes of `[N, spatial...]`, such as the time steps'.
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


def is_per_voxel(weight, y_pred):
    """Whether `weight` is `[N, spatial...]` (also with a channel axis), not `[N]` or `[N, 1]`.

    A tensor where that is known only when running: Keras traces so after weights of both kinds.
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


def is_soft(y_true, y_pred, **options):
    """Whether labels may be other than 0 and 1: floats that are not class indices.

    options: `data_format`, `ignore_label`, `regions`.
    """
    if not y_true.dtype.is_floating or None in (y_true.shape.rank, y_pred.shape.rank):
        return False
    kind = core.label_kind(
        y_pred.shape.as_list(), y_true.shape.as_list(), y_true.dtype.name, **options
    )
    axis = -1 if options["data_format"] == "channels_last" else 1
    return kind == "per class" or (kind == "mask" and y_pred.shape[axis] == 1)


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
