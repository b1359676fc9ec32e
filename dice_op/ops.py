"""The fused ops: `dice_sums`, and the registered gradients."""

import math
import typing
import warnings

import numpy as np
import tensorflow as tf

from dice_op import _loader, composite, core

_ops = _loader.library()
if _loader.xla_problem():
    warnings.warn(
        "dice_op works, but not in programs that XLA compiles, as Keras does by default where "
        f"there is a GPU: pass jit_compile=False to compile(). The reason: {_loader.xla_problem()}",
        RuntimeWarning,
        stacklevel=2,
    )

_ATTRIBUTES = (
    "activation",
    "data_format",
    "squared_pred",
    "with_cross_entropy",
    "focal_gamma",
    "label_smoothing",
    "remainders",
    "ignore_label",
    "regions",
)
_WITHOUT_GRADIENT = ("argmax", "threshold")
_LOGITS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_INTEGERS = (tf.bool, tf.uint8, tf.int8, tf.uint16, tf.int16, tf.int32, tf.int64)


class DiceSums(typing.NamedTuple):
    """Sums over the voxels of each sample and class; float32, float64 for float64 logits.

    Scores ("argmax", "threshold") are counts, float64. N samples, C classes; m: weight, p:
    probability, t: label, each per voxel.
    """

    intersection: tf.Tensor
    """[N, C]: sum m p t."""
    pred_sum: tf.Tensor
    """[N, C]: sum m p, or sum m p^2 (`squared_pred`)."""
    label_sum: tf.Tensor
    """[N, C]: sum m t, or sum m t^2 (`squared_pred`)."""
    cross_entropy: tf.Tensor | None
    """[N, C]: sum m t (1 - p)^focal_gamma (-log p), for sigmoid plus sum m (1 - t) p^focal_gamma
    (-log(1 - p)); None unless asked for."""
    weight_sum: tf.Tensor
    """[N]: sum m."""


def dice_sums(
    y_true,
    y_pred,
    *,
    activation,
    squared_pred=False,
    voxel_weight=None,
    ignore_label=None,
    regions=None,
    cross_entropy=False,
    focal_gamma=0.0,
    label_smoothing=0.0,
    threshold=0.0,
    data_format="channels_last",
):
    """The sums that every loss of the Dice family is made of, in one pass over the logits.

    Differentiable with respect to `y_pred` in one more pass that keeps nothing from the first; with
    respect to dense `y_true` and `voxel_weight`, and to second order, through plain TensorFlow.

    Args:
      y_true: Labels. Either class indices `[N, spatial...]` (a channel axis of length 1 is
        accepted); or one-hot or soft labels of the shape of `y_pred`, in [0, 1]. bool, uint8, int8,
        uint16, int16, int32, int64 or a float; indices in floats must be whole numbers. With one
        class (C = 1) they are the foreground mask: integers 0 or 1, floats soft (but 0 or 1 with
        `ignore_label`).
      y_pred: Logits `[N, spatial..., C]`, or `[N, C, spatial...]` for `"channels_first"`; float16,
        bfloat16, float32 or float64. Arithmetic is float32, float64 for float64.
      activation: What turns `y_pred` into probabilities: `"softmax"`, `"sigmoid"`, or `"none"`
        where it holds probabilities already, in [0, 1]. For scores, without a gradient:
        `"argmax"`, 1 for the class of the largest logit (the first of several) and 0 for the
        others; `"threshold"`, 1 for every class whose logit is above `threshold`.
      squared_pred: Squares in both cardinalities (Milletari et al., "V-Net", 2016).
      voxel_weight: Weight of each voxel, `[N, spatial...]`, any type. Voxels of weight 0 count for
        nothing, whatever their logits hold.
      ignore_label: Voxels with this class index count for nothing.
      regions: For classes that are overlapping regions: for each class the label values in it, such
        as `[(1, 2, 3), (2, 3), (3,)]` for the whole tumour, its core, its enhancing part. `y_true`
        holds label values then; for `"sigmoid"` and `"threshold"`. At most 32, of labels up to 31.
      cross_entropy: Also sum the cross-entropy: categorical, or binary for `"sigmoid"`. For
        `"none"` it is categorical, of probabilities not below 1e-7.
      focal_gamma: Exponent of the focal cross-entropy (Lin et al., 2017).
      label_smoothing: s in [0, 1]: in the cross-entropy (1 - s) t + s / C stands for t, for
        `"sigmoid"` (1 - s) t + s / 2 (Szegedy et al., 2016).
      threshold: A logit; 0 is a probability of one half.
      data_format: `"channels_last"` or `"channels_first"`.

    Returns:
      A `DiceSums`.

    Raises:
      tf.errors.InvalidArgumentError, ValueError: shapes do not fit, a label is no class, or with
        `"none"` a prediction is no probability; names the argument, or the voxel and its value.
        Inside a graph, what its shapes show is raised while tracing.
        On a GPU such a value makes its sample's sums NaN instead;
        `DICE_OP_CHECK_LABELS=1` in the environment makes that this error, at the price of a wait
        in every call. GPUs take at most 256 classes.
      TypeError: `y_pred` or `y_true` have a dtype that is not listed above, or are ragged.
    """
    focal_gamma, label_smoothing, threshold = map(float, (focal_gamma, label_smoothing, threshold))
    y_true = dense_tensor("y_true", y_true)
    y_pred = dense_tensor("y_pred", y_pred)
    weight = [] if voxel_weight is None else [dense_tensor("voxel_weight", voxel_weight)]
    _check_dtype("y_pred", y_pred, _LOGITS)
    _check_dtype("y_true", y_true, _INTEGERS + _LOGITS)
    for tensor in weight:
        _check_dtype("voxel_weight", tensor, _INTEGERS + _LOGITS)
    counts = activation in _WITHOUT_GRADIENT  # exact in float64
    sums = _ops.dice_sums(
        y_pred,
        y_true,
        weight,
        Tsums=tf.float64 if counts or y_pred.dtype == tf.float64 else tf.float32,
        activation=activation,
        data_format=data_format,
        squared_pred=squared_pred,
        with_cross_entropy=cross_entropy,
        focal_gamma=focal_gamma,
        label_smoothing=label_smoothing,
        threshold=threshold,
        remainders=_remainders(focal_gamma, label_smoothing, threshold),
        ignore_label=[] if ignore_label is None else [ignore_label],
        regions=[] if regions is None else core.region_masks(regions),
    )
    return DiceSums(*sums)._replace(cross_entropy=sums.cross_entropy if cross_entropy else None)


def dense_tensor(name, value):
    """`value` as a tensor; says what to do about one that has no rows of equal length."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(
            f"{name} is a {type(value).__name__}, but must be a dense tensor: pad the samples to "
            "one shape (tf.RaggedTensor.to_tensor), and leave the padding out by ignore_label or a "
            "weight of 0"
        )
    return tf.convert_to_tensor(value)


def _remainders(*values):
    """What each value lacks as a float32, in two more: no attribute of an op is a double."""
    remainders = []
    for value in values:
        for part in range(3):
            with np.errstate(over="ignore"):
                single = float(np.float32(value))
            if not math.isfinite(single):  # what follows cannot mend it
                single = value = 0.0
            value -= single
            if part:
                remainders.append(single)
    return remainders if any(remainders) else []


def _check_dtype(name, tensor, allowed):
    if tensor.dtype not in allowed:
        names = ", ".join(dtype.name for dtype in allowed)
        raise TypeError(f"{name} has dtype {tensor.dtype.name}, but must be one of: {names}")


def _attributes(op):
    attributes = {name: op.get_attr(name) for name in _ATTRIBUTES}
    for name in ("activation", "data_format"):
        if isinstance(attributes[name], bytes):
            attributes[name] = attributes[name].decode()
    return attributes


def _options(attributes):
    """The attributes as the arguments of `composite.sums`."""
    options = {k: v for k, v in attributes.items() if k != "remainders"}
    for at, name in enumerate(("focal_gamma", "label_smoothing")):
        options[name] += sum(attributes["remainders"][2 * at : 2 * at + 2])
    return options


def _split(op, inputs):
    """An op's inputs as (logits, labels, [voxel_weight], the rest)."""
    count = len(op.get_attr("Tweight"))
    return inputs[0], inputs[1], list(inputs[2 : 2 + count]), list(inputs[2 + count :])


def _composite_gradients(function, inputs, d_output, wanted):
    """Gradients of `function` with respect to those of the `wanted` inputs that can have one."""
    sources = {i: inputs[i] for i in wanted if inputs[i].dtype.is_floating}
    gradients = [None] * len(inputs)
    if sources:
        with tf.GradientTape() as tape:
            tape.watch(list(sources.values()))
            output = function()
        found = tape.gradient(output, sources, d_output)
        for i, gradient in found.items():
            gradients[i] = gradient
    return gradients


def _wanted(op, indices):
    skipped = getattr(op, "skip_input_indices", None) or ()
    return [i for i in indices if i not in skipped]


def _gradient_of(name):
    """As `tf.RegisterGradient`, but harmless where the module is imported once more: the function
    that is registered already does the same."""

    def register(function):
        try:
            return tf.RegisterGradient(name)(function)
        except KeyError:
            return function

    return register


@_gradient_of("DiceSums")
def _dice_sums_grad(op, *d_sums):
    inputs = list(op.inputs)
    logits, labels, weight, _ = _split(op, inputs)
    attributes = _attributes(op)
    if attributes["activation"] in _WITHOUT_GRADIENT:
        return [None] * len(inputs)
    # The rare ones: dense labels and weights that somebody differentiates.
    gradients = _composite_gradients(
        lambda: composite.sums(logits, labels, weight, **_options(attributes)),
        inputs,
        list(d_sums),
        _wanted(op, range(1, len(inputs))),
    )
    gradients[0] = _ops.dice_sums_grad(
        logits, labels, weight, d_sums[0], d_sums[1], d_sums[3], **attributes
    )
    return gradients


@_gradient_of("DiceSumsGrad")
def _dice_sums_grad_grad(op, d_d_logits):
    inputs = list(op.inputs)
    logits, labels, weight, (d_intersection, d_pred_sum, d_cross_entropy) = _split(op, inputs)
    attributes = _attributes(op)

    def d_logits():
        with tf.GradientTape() as tape:
            tape.watch(logits)
            sums = composite.sums(logits, labels, weight, **_options(attributes))
        targets = [sums[0], sums[1], sums[3]]
        return tape.gradient(targets, logits, [d_intersection, d_pred_sum, d_cross_entropy])

    return _composite_gradients(d_logits, inputs, d_d_logits, _wanted(op, range(len(inputs))))
