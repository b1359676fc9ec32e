"""The fused ops: `dice_sums`, and the registered gradients."""

from __future__ import annotations

import functools
import math
import operator
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from dice_op import _loader, composite, core
from dice_op._arrays import dtype_of_sums
from dice_op._checks import is_list
from dice_op._sums import DiceSums
from dice_op._types import (
    Activation,
    DataFormat,
    DistMatrix,
    LabelSets,
    Prediction,
    Regions,
    TensorLike,
)

_ops = _loader.library()
if _loader.xla_problem():
    warnings.warn(
        "dice_op works, but not in programs that XLA compiles, as Keras does by default where "
        f"there is a GPU: pass jit_compile=False to compile(). The reason: {_loader.xla_problem()}",
        RuntimeWarning,
        stacklevel=2,
    )

# The options of a call, by the names of the op's attributes; and those of them that are numbers.
_OPTIONS = core.op_attributes()
_NUMBERS = [name for name, default in _OPTIONS.items() if isinstance(default, float)]
_WITHOUT_GRADIENT = typing.get_args(Prediction)
_LOGITS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
_INTEGERS = (tf.bool, tf.uint8, tf.int8, tf.uint16, tf.int16, tf.int32, tf.int64)


def dice_sums(
    y_true: TensorLike,
    y_pred: TensorLike,
    *,
    activation: Activation | Prediction,
    squared_pred: bool = False,
    soft_label: bool = False,
    voxel_weight: TensorLike | None = None,
    ignore_label: int | None = None,
    regions: Regions | None = None,
    label_sets: LabelSets | None = None,
    cross_entropy: bool = False,
    focal_gamma: float | Sequence[float] = 0.0,
    label_smoothing: float = 0.0,
    dist_matrix: DistMatrix | None = None,
    threshold: float = 0.0,
    data_format: DataFormat = "channels_last",
) -> DiceSums:
    """Computes the sums that every loss of the Dice family is made of, in one pass over the logits.

    The gradient with respect to `y_pred` takes one more pass, and keeps nothing from the first.
    Plain TensorFlow operations compute the gradients with respect to dense `y_true` and
    `voxel_weight`, and second derivatives.

    Args:
      y_true: The labels, as class indices `[N, spatial...]` (a channel axis of length 1 is
        accepted), or as one-hot or soft labels of the shape of `y_pred`, in [0, 1]. Their type is
        bool, uint8, int8, uint16, int16, int32, int64 or a float; class indices in floats must be
        whole numbers. With one class (C = 1) the labels are the foreground mask: integers are 0 or
        1, and floats may be soft, except with `ignore_label`, where they must be 0 or 1.
      y_pred: The logits, `[N, spatial..., C]`, or `[N, C, spatial...]` for `"channels_first"`, as
        float16, bfloat16, float32 or float64. The arithmetic is float32, or float64 for float64.
      activation: What turns `y_pred` into probabilities: `"softmax"`, `"sigmoid"`, or `"none"`
        where it holds probabilities already, in [0, 1]. Two more are for scores and have no
        gradient: `"argmax"` is 1 for the class of the largest logit (for the first of several) and
        0 for the others; `"threshold"` is 1 for every class whose logit is above `threshold`.
      squared_pred: Whether p and t are squared in `pred_sum` and `label_sum` (Milletari et al.,
        "V-Net", 2016).
      soft_label: Whether min(p, t) replaces p t in `intersection` if `y_true` has a float type and
        holds t itself (Wang et al., "Dice Semimetric Losses", 2023). For labels of 0 and 1 the two
        are equal. For fractions a Dice loss is smallest at p = t only with `soft_label` or with
        `squared_pred`; with both, p t stays. Where p = t, the derivative of min(p, t) is 1/2.
      voxel_weight: The weight of each voxel, `[N, spatial...]`, of any type. A voxel of weight 0
        does not count, whatever its logits are.
      ignore_label: Voxels with this class index do not count.
      regions: The label values of each class, for classes that are overlapping regions, such as
        `[(1, 2, 3), (2, 3), (3,)]` for the whole tumour, its core and its enhancing part. `y_true`
        then holds label values, up to 255. This works with `"sigmoid"` and `"threshold"`.
      label_sets: Label values that stand for one of several classes, for data in which not every
        class is annotated: with `{200: (0, 2, 3)}` a voxel of value 200 belongs to class 0, 2 or 3,
        and nobody knows to which. It says nothing about these classes (it adds nothing to their
        `intersection`, `pred_sum` and `label_sum`), and belongs to no other one. Its categorical
        cross-entropy is that of the sum of the classes' p, and counts for the lowest of them
        (marginal loss; Shi et al., 2021); the binary one leaves these classes out. The values are
        in [0, 255]; one that is a class, too, loses that meaning.
      cross_entropy: Whether the cross-entropy is summed as well. It is categorical, or binary for
        `"sigmoid"`. For `"none"` it is categorical, and probabilities below 1e-7 count as 1e-7.
      focal_gamma: The exponent of the focal cross-entropy (Lin et al., 2017), or a list of one for
        each class.
      label_smoothing: A number s in [0, 1]. In the cross-entropy (1 - s) t + s / C replaces t, and
        for `"sigmoid"` (1 - s) t + s / 2 does (Szegedy et al., 2016).
      dist_matrix: How far each class is from each other one, `[C, C]`; the row is the class of the
        label (Fidon et al., "Generalised Wasserstein Dice Score", 2017). Distances are finite, at
        least 0, and 0 from a class to itself; they are rounded to float32. This is for
        `"softmax"` and `"none"`, and for class indices without `label_sets`. GPUs take it for at
        most 25 classes.
      threshold: A logit; 0 stands for a probability of one half.
      data_format: `"channels_last"` or `"channels_first"`.

    Returns:
      A `DiceSums`.

    Raises:
      tf.errors.InvalidArgumentError, ValueError: The shapes do not fit, a label is not a class, or
        a prediction is not a probability although `activation` is `"none"`. The message names the
        argument, or the voxel and its value. Inside a graph, an error that the shapes show is
        raised while tracing.
        On a GPU such a value makes the sums of its sample NaN instead. With
        `DICE_OP_CHECK_LABELS=1` in the environment it is an error there as well, but every call
        then waits for the GPU. GPUs take at most 256 classes.
      TypeError: `y_pred` or `y_true` is ragged or sparse, or has a dtype that is not listed above.
    """
    label_smoothing, threshold = float(label_smoothing), float(threshold)
    gamma, gammas = _exponents(focal_gamma)
    y_true = dense_tensor("y_true", y_true)
    y_pred = dense_tensor("y_pred", y_pred)
    weight = [] if voxel_weight is None else [dense_tensor("voxel_weight", voxel_weight)]
    _check_dtype("y_pred", y_pred, _LOGITS)
    _check_dtype("y_true", y_true, _INTEGERS + _LOGITS)
    for tensor in weight:
        _check_dtype("voxel_weight", tensor, _INTEGERS + _LOGITS)
    counts = activation in _WITHOUT_GRADIENT  # float64 holds counts exactly
    options: dict[str, typing.Any] = {
        "activation": activation,
        "data_format": data_format,
        "squared_pred": squared_pred,
        "soft_label": soft_label,
        "with_cross_entropy": cross_entropy,
        "focal_gamma": gamma,
        "label_smoothing": label_smoothing,
        "threshold": threshold,
        "ignore_label": [] if ignore_label is None else [ignore_label],
        **_tables(regions, label_sets, gammas, _distances(dist_matrix)),
    }
    sums = _ops.dice_sums(
        y_pred,
        y_true,
        weight,
        Tsums="float64" if counts else dtype_of_sums(y_pred),
        remainders=_remainders(*(options[name] for name in _NUMBERS)),
        **options,
    )
    return DiceSums(*sums)._replace(
        cross_entropy=sums.cross_entropy if cross_entropy else None,
        negative_cross_entropy=(
            sums.negative_cross_entropy if cross_entropy and activation == "sigmoid" else None
        ),
        unknown_sum=sums.unknown_sum if label_sets else None,
        distance_sum=None if dist_matrix is None else sums.distance_sum,
    )


def _exponents(focal_gamma: typing.Any) -> tuple[float, tuple[float, ...] | None]:
    """The exponent of all classes, and where each class has its own, these."""
    if not is_list(focal_gamma):
        try:
            return float(focal_gamma), None
        except TypeError:
            raise TypeError(
                f"focal_gamma is {focal_gamma!r}, but must be a number, or a list of one for each "
                "class, in order"
            ) from None
    gammas = tuple(map(float, focal_gamma))
    if not gammas:
        raise ValueError("focal_gamma is empty, but must have one exponent for each class")
    return 0.0, gammas


def _distances(dist_matrix: DistMatrix | None) -> tuple[tuple[float, ...], ...] | None:
    if dist_matrix is None:
        return None
    try:
        rows = np.asarray(dist_matrix, np.float64)
    except (TypeError, ValueError):
        rows = np.zeros(0)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"dist_matrix is {dist_matrix!r}, but must be a distance for each pair of classes, "
            "[C, C]"
        )
    return tuple(map(tuple, rows.tolist()))


def dense_tensor(name: str, value: TensorLike) -> tf.Tensor:
    """`value` as a tensor. A ragged or sparse one is an error that says what to do about it."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(
            f"{name} is a {type(value).__name__}, but must be a dense tensor: pad the samples to "
            "one shape (tf.RaggedTensor.to_tensor), and leave the padding out by ignore_label or a "
            "weight of 0"
        )
    return tf.convert_to_tensor(value)


def _tables(
    regions: Regions | None,
    label_sets: LabelSets | None,
    focal_gammas: tuple[float, ...] | None,
    dist_matrix: tuple[tuple[float, ...], ...] | None,
) -> Mapping[str, Sequence[float]]:
    """The op's attributes that are tables. The same come with every call, so they are made once."""
    try:
        hashable_regions, hashable_sets = None, None
        if regions is not None:
            hashable_regions = tuple(tuple(map(operator.index, r)) for r in regions)
        if label_sets is not None:
            hashable_sets = tuple(
                (operator.index(k), tuple(map(operator.index, v))) for k, v in label_sets.items()
            )
    except (AttributeError, TypeError):
        # This usually raises the error that says what they must be.
        return _lists(
            core.op_attributes(
                regions=regions,
                label_sets=label_sets,
                focal_gammas=focal_gammas,
                dist_matrix=dist_matrix,
            )
        )
    return _tables_of(hashable_regions or None, hashable_sets or None, focal_gammas, dist_matrix)


@functools.lru_cache(maxsize=64)
def _tables_of(
    regions: tuple[tuple[int, ...], ...] | None,
    label_sets: tuple[tuple[int, tuple[int, ...]], ...] | None,
    focal_gammas: tuple[float, ...] | None,
    dist_matrix: tuple[tuple[float, ...], ...] | None,
) -> Mapping[str, Sequence[float]]:
    return _lists(
        core.op_attributes(
            regions=regions,
            label_sets=label_sets and dict(label_sets),
            focal_gammas=focal_gammas,
            dist_matrix=dist_matrix,
        )
    )


def _lists(attributes: Mapping[str, typing.Any]) -> Mapping[str, Sequence[float]]:
    tables = ("regions", "label_sets", "focal_gammas", "dist_matrix")
    return {name: attributes[name].tolist() for name in tables}


def _remainders(*values: float) -> list[float]:
    """What each value loses as a float32, in two more of them.

    The attributes of an op are float32, and these numbers give it the exact double.
    """
    remainders = []
    for value in values:
        for part in range(3):
            with np.errstate(over="ignore"):
                single = float(np.float32(value))
            if not math.isfinite(single):  # No remainder can make up for that.
                single = value = 0.0
            value -= single
            if part:
                remainders.append(single)
    return remainders if any(remainders) else []


def _check_dtype(name: str, tensor: tf.Tensor, allowed: Iterable[tf.DType]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(dtype.name for dtype in allowed)
        raise TypeError(f"{name} has dtype {tensor.dtype.name}, but must be one of: {names}")


# --- gradients ------------------------------------------------------------------------------------


def _attributes(op: tf.Operation) -> dict[str, typing.Any]:
    attributes = {name: op.get_attr(name) for name in (*_OPTIONS, "remainders")}
    for name in ("activation", "data_format"):
        if isinstance(attributes[name], bytes):
            attributes[name] = attributes[name].decode()
    return attributes


def _composite_options(attributes: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """An op's attributes as the options of `composite.sums`."""
    options = {k: v for k, v in attributes.items() if k != "remainders"}
    for at, name in enumerate(_NUMBERS):
        options[name] += sum(attributes["remainders"][2 * at : 2 * at + 2])
    del options["threshold"]  # that of an activation without a gradient
    return options


def _split_inputs(
    op: tf.Operation, inputs: list[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
    """An op's inputs as (logits, labels, [voxel_weight], the rest)."""
    count = len(op.get_attr("Tweight"))
    return inputs[0], inputs[1], inputs[2 : 2 + count], inputs[2 + count :]


def _composite_gradients(
    function: Callable[[], typing.Any],
    inputs: list[tf.Tensor],
    d_output: typing.Any,
    wanted: list[int],
) -> list[tf.Tensor | None]:
    """The gradients of `function` with respect to those `wanted` inputs that can have one."""
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


def _wanted(op: tf.Operation, indices: Iterable[int]) -> list[int]:
    """Those of the indices whose inputs TensorFlow asks a gradient for."""
    skipped = getattr(op, "skip_input_indices", None) or ()
    return [i for i in indices if i not in skipped]


_Gradient = typing.TypeVar("_Gradient", bound=Callable[..., typing.Any])


def _register_gradient(name: str) -> Callable[[_Gradient], _Gradient]:
    """Does what `tf.RegisterGradient` does, but may do it again.

    When the module is imported once more, the function that is registered does the same already.
    """

    def register(function: _Gradient) -> _Gradient:
        try:
            return tf.RegisterGradient(name)(function)
        except KeyError:
            return function

    return register


def with_gradient(sums: Iterable[tf.Tensor]) -> list[tf.Tensor]:
    """Those of the sums that depend on the logits."""
    of = DiceSums(*sums)
    return [
        of.intersection,
        of.pred_sum,
        of.cross_entropy,
        of.negative_cross_entropy,
        of.distance_sum,
    ]


@_register_gradient("DiceSums")
def _dice_sums_grad(op: tf.Operation, *d_sums: tf.Tensor) -> list[tf.Tensor | None]:
    inputs = list(op.inputs)
    logits, labels, weight, _ = _split_inputs(op, inputs)
    attributes = _attributes(op)
    if attributes["activation"] in _WITHOUT_GRADIENT:
        return [None] * len(inputs)
    # Few programs differentiate with respect to dense labels or weights.
    gradients = _composite_gradients(
        lambda: composite.sums(logits, labels, weight, **_composite_options(attributes)),
        inputs,
        list(d_sums),
        _wanted(op, range(1, len(inputs))),
    )
    # A sum that nobody asked for is empty, and serves as its own gradient: on a GPU, the zeros that
    # TensorFlow makes in its place are one more launch.
    d_sums = tuple(
        tf.stop_gradient(s) if s.shape[-1] == 0 else d
        for s, d in zip(op.outputs, d_sums, strict=True)
    )
    gradients[0] = _ops.dice_sums_grad(logits, labels, weight, *with_gradient(d_sums), **attributes)
    return gradients


@_register_gradient("DiceSumsGrad")
def _dice_sums_grad_grad(op: tf.Operation, d_d_logits: tf.Tensor) -> list[tf.Tensor | None]:
    inputs = list(op.inputs)
    logits, labels, weight, d_sums = _split_inputs(op, inputs)
    attributes = _attributes(op)

    def d_logits() -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            sums = composite.sums(logits, labels, weight, **_composite_options(attributes))
        return tape.gradient(with_gradient(sums), logits, d_sums)

    return _composite_gradients(d_logits, inputs, d_d_logits, _wanted(op, range(len(inputs))))
