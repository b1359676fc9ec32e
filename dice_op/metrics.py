"""Keras metrics of the Dice family: hard scores, counted by the fused kernels, streaming."""

from __future__ import annotations

import typing

import keras
import numpy as np
from keras import ops

# Importing the losses checks Keras, and lets it load them with a model that has both.
from dice_op import _checks, _inputs, _keras, formulas, losses  # noqa: F401
from dice_op._arrays import Array
from dice_op._backends import backend
from dice_op._sums import DiceSums
from dice_op._types import Average, DataFormat, LabelSets, Prediction, Regions, TensorLike

if typing.TYPE_CHECKING:
    from typing_extensions import Unpack

_Over = typing.Literal["samples", "dataset"]
_Absent = typing.Literal["skip", "keep", "predicted"]


class ScoreOptions(typing.TypedDict, total=False):
    """The options of `OverlapScore`, for the scores that hand them on."""

    prediction: Prediction
    threshold: float
    from_logits: bool
    over: _Over
    average: Average
    include_background: bool
    absent: _Absent
    ignore_label: int | None
    regions: Regions | None
    label_sets: LabelSets | None
    data_format: DataFormat | None
    dtype: str | keras.DTypePolicy | None


class _Total:
    """A sum over batches, `[size]`: in float64, or where there is none, to twice the precision of
    float32.

    A data set may have more voxels than a float32 can count.
    """

    def __init__(self, metric: keras.metrics.Metric, name: str, size: int) -> None:
        def variable(name: str, dtype: str) -> keras.Variable:
            return metric.add_variable((size,), "zeros", dtype=dtype, name=name)

        self._rest = None  # what the rounding of the sum has lost
        if backend.has_float64():
            self._sum = variable(name, "float64")
        else:
            self._sum, self._rest = variable(name, "float32"), variable(f"{name}_rest", "float32")

    def add(self, values: Array) -> None:
        if self._rest is None:
            self._sum.assign_add(values)
            return
        before = ops.convert_to_tensor(self._sum)
        total = before + values
        added = total - before  # Knuth's sum of two numbers, which has no error
        self._rest.assign_add((before - (total - added)) + (values - added))
        self._sum.assign(total)

    def value(self) -> Array:
        total = ops.convert_to_tensor(self._sum)
        return total if self._rest is None else total + ops.convert_to_tensor(self._rest)


class OverlapScore(keras.metrics.Metric):
    """Base of the metrics that are a score of hard predictions, from logits and labels in one pass.

    Args:
      prediction: `"argmax"` takes the class of the largest logit (it is also that of the largest
        probability); `"threshold"` takes every class whose logit is above a threshold, for regions
        and binary masks.
      threshold: The threshold of `"threshold"`, as a probability. With `from_logits=False` it is
        what `y_pred` itself must exceed.
      from_logits: Whether `y_pred` are logits.
      over: `"samples"`: the mean of the scores of the samples, weighted by `sample_weight`;
        `"dataset"`: the score of the counts of the whole data set, as if it were one volume.
      average: `"macro"`: the mean over the classes; `"weighted"`: the same, with each class
        weighted by its voxels in the labels; `"micro"`: the score of the counts of all classes
        together; `"none"`: `result()` is `[classes]`.
      include_background: Whether class 0 counts.
      absent: What becomes of a class that is not among the labels of a sample. `"skip"`: the sample
        says nothing about it (MONAI's `ignore_empty=True`); `"predicted"`: it counts if it is
        predicted, and usually scores 0 then (as in torchmetrics); `"keep"`: it always counts, and
        usually scores 1 if it is not predicted either, else 0. A class that never counts is left
        out of the mean, and is NaN with `average="none"`; a mean over no class is NaN, and so is
        every result before the first batch and after `reset_state()`.
      ignore_label: Voxels with this integer label do not count.
      regions: The label values of each class, for overlapping regions; with
        `prediction="threshold"`.
      label_sets: The classes that a label value may stand for, such as `{200: (0, 2, 3)}`. A voxel
        with such a label does not count for these classes, and is none of the others.
      data_format: `"channels_last"` or `"channels_first"`. None means Keras' setting,
        `keras.config.image_data_format()`, at the time when the metric is made.
      name, dtype: They are those of every Keras metric. Totals are kept in float64,
        where JAX has it (`jax_enable_x64`).

    Call:
      y_true, y_pred, sample_weight: They are those of `dice_op.losses.DiceLoss`. Voxels that a
        Keras mask of `y_pred` leaves out do not count, and a sample of which no voxel is left does
        not count either.

    With `over="samples"` the score of a sample is `average`d over its classes before the mean over
    the samples only where `average` is `"micro"` or `"weighted"`; otherwise each class has its mean
    over the samples first.

    More is better: callbacks such as `EarlyStopping(monitor="val_dice_score")` know it.
    """

    _arguments: tuple[str, ...] = (
        "prediction",
        "threshold",
        "from_logits",
        "over",
        "average",
        "include_background",
        "absent",
        "ignore_label",
        "regions",
        "label_sets",
        "data_format",
    )

    def __init__(
        self,
        *,
        prediction: Prediction = "argmax",
        threshold: float = 0.5,
        from_logits: bool = True,
        over: _Over = "samples",
        average: Average = "macro",
        include_background: bool = True,
        absent: _Absent = "skip",
        ignore_label: int | None = None,
        regions: Regions | None = None,
        label_sets: LabelSets | None = None,
        data_format: DataFormat | None = None,
        name: str | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **unknown: typing.Any,
    ) -> None:
        _checks.refuse_unknown(self, unknown, is_score=True)
        super().__init__(name=name, dtype=dtype)
        _checks.one_of("prediction", prediction, Prediction)
        _checks.one_of("over", over, _Over)
        _checks.one_of("average", average, Average)
        _checks.one_of("absent", absent, _Absent)
        self.prediction = prediction
        self.threshold = _checks.number("threshold", threshold)
        self.from_logits = _checks.flag("from_logits", from_logits)
        if from_logits and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {threshold}, but a probability must be between 0 and 1")
        if prediction == "argmax" and threshold != 0.5:
            raise ValueError(
                f'threshold is {threshold}, but prediction="argmax" has none: use "threshold"'
            )
        self.over = over
        self.average = average
        self.include_background = _checks.flag("include_background", include_background)
        self.absent = absent
        self.ignore_label = _checks.label("ignore_label", ignore_label)
        self.regions = _checks.region_list(regions, include_background)
        if self.regions and prediction == "argmax":
            raise ValueError(
                'regions overlap, but prediction="argmax" gives a voxel one class: use "threshold"'
            )
        self.label_sets = _checks.label_set_dict(label_sets)
        _checks.regions_or_label_sets(self.regions, self.label_sets)
        self.data_format = _checks.data_format(data_format, keras.config.image_data_format())
        self._direction = "up"  # Keras' callbacks ask for this attribute.
        self._totals: list[_Total] | None = None

    _needs_weight_sum = False  # whether `score` asks for `weight_sum`

    def score(self, sums: DiceSums) -> Array:
        """The score of each sample and class, `[N, C]`, from the counts."""
        raise NotImplementedError

    def _make_totals(self, classes: int | None) -> list[_Total]:
        if classes is None:
            raise ValueError(
                "y_pred has an unknown number of classes: give the model's last layer a fixed one"
            )
        if classes == 1 and self.prediction == "argmax":
            raise ValueError(
                "y_pred has one class, which is the largest everywhere: use "
                'prediction="threshold" for a binary mask'
            )
        _checks.background(classes, self.include_background)
        counted = classes if self.include_background else classes - 1
        if self.over == "samples":
            one = self.average in ("micro", "weighted")
            shapes = dict.fromkeys(("scores", "weights"), 1 if one else counted)
        else:
            shapes = dict.fromkeys(("i", "p", "t"), 1 if self.average == "micro" else counted)
            if self._needs_weight_sum:
                shapes["m"] = 1
                if self.label_sets:
                    shapes["u"] = shapes["t"]
        return [_Total(self, name, size) for name, size in shapes.items()]

    def update_state(
        self, y_true: TensorLike, y_pred: TensorLike, sample_weight: TensorLike | None = None
    ) -> None:
        """Adds a batch."""
        _keras.refuse_call_from_tf_keras()
        mask, share = _inputs.keras_mask(y_pred), None
        y_true = backend.dense_tensor("y_true", y_true)
        y_pred = backend.dense_tensor("y_pred", y_pred)
        if self._totals is None:
            self._totals = self._make_totals(_inputs.classes_of(y_pred, self.data_format))
        if self.from_logits and self.prediction == "threshold":
            _inputs.check_not_activated(y_pred, "sigmoid", instead="from_logits=False")
        voxel_weight, sample_weight = _inputs.split_weights(sample_weight, y_pred, self.data_format)
        _inputs.check_shapes(
            y_true, y_pred, self.data_format, each_sample_counts=self.over == "samples"
        )
        if mask is not None:
            voxel_weight, share = _inputs.apply_mask(mask, voxel_weight, y_pred, self.data_format)
        threshold = self.threshold
        if self.from_logits:
            threshold = float(np.log(threshold) - np.log1p(-threshold))
        sums = backend.dice_sums(
            y_true,
            y_pred,
            activation=self.prediction,
            threshold=threshold,
            voxel_weight=voxel_weight,
            ignore_label=self.ignore_label,
            regions=self.regions,
            label_sets=self.label_sets,
            data_format=self.data_format,
        )
        if not self.include_background:
            sums = formulas.select_classes(sums, 1)
        if self.average == "micro":
            sums = formulas.over_classes(sums)
        weight = ops.ones_like(sums.weight_sum)
        for factor in (sample_weight, None if share is None else share > 0):
            if factor is not None:
                weight *= ops.cast(factor, weight.dtype)
        if self.over == "samples":
            scores, counted = self._averaged(self.score(sums), sums)
            weight = weight[:, None] * ops.cast(counted, weight.dtype)
            added = [scores * weight, weight]
        else:
            sums = formulas.weighted(sums, weight)
            added = [sums.intersection, sums.pred_sum, sums.label_sum]
            if self._needs_weight_sum:
                added.append(sums.weight_sum[:, None])
                if self.label_sets:
                    added.append(sums.unknown_sum)
        for total, values in zip(self._totals, added, strict=True):
            total.add(ops.sum(values, 0))

    def _counted(self, sums: DiceSums) -> Array:
        """Whether each sample and class counts, `[N, C]`."""
        if self.absent == "keep":
            return ops.ones_like(sums.label_sum, "bool")
        labelled = sums.label_sum > 0
        return labelled if self.absent == "skip" else ops.logical_or(labelled, sums.pred_sum > 0)

    def _averaged(self, scores: Array, sums: DiceSums) -> tuple[Array, Array]:
        """The scores and whether they count, `[N, C]`; `[N, 1]` for `average="weighted"`."""
        if self.average != "weighted":
            return scores, self._counted(sums)
        mean = formulas.mean_by_support(scores, sums)[:, None]
        return mean, ops.any(sums.label_sum > 0, 1, keepdims=True)

    def result(self) -> Array:
        """The score: a scalar, or `[classes]` for `average="none"`."""
        if self._totals is None:
            return ops.cast(np.nan, self.dtype)
        totals = [total.value() for total in self._totals]
        if self.over == "samples":
            scores, weights = totals
            counted = weights > 0
            scores = ops.divide_no_nan(scores, weights)
        else:
            if not backend.has_float64():  # Scores are ratios, but products of totals may overflow.
                totals = [total / 2**20 for total in totals]
            names = ["intersection", "pred_sum", "label_sum", "weight_sum", "unknown_sum"]
            known = dict(zip(names, (total[None] for total in totals), strict=False))
            if self._needs_weight_sum:
                known["weight_sum"] = totals[3]
            sums = DiceSums(**dict.fromkeys(DiceSums._fields) | known)
            scores, counted = (v[0] for v in self._averaged(self.score(sums), sums))
        if self.average == "none":
            return ops.cast(ops.where(counted, scores, np.nan), self.dtype)
        mean = formulas.mean_over_classes(scores[None], counted=counted[None])[0]
        return ops.cast(ops.where(ops.any(counted), mean, np.nan), self.dtype)

    def get_config(self) -> dict[str, typing.Any]:
        return {**super().get_config(), **{n: getattr(self, n) for n in self._arguments}}


@keras.saving.register_keras_serializable(package="dice_op")
class DiceScore(OverlapScore):
    """2 I / (P + T) of hard predictions: the Dice coefficient, or F1.

    The arguments are those of `OverlapScore`.
    """

    def __init__(self, *, name: str | None = "dice_score", **options: Unpack[ScoreOptions]) -> None:
        super().__init__(name=name, **options)

    def score(self, sums: DiceSums) -> Array:
        return formulas.dice(sums)


@keras.saving.register_keras_serializable(package="dice_op")
class JaccardScore(OverlapScore):
    """I / (P + T - I) of hard predictions: the Jaccard index, or IoU.

    The arguments are those of `OverlapScore`.
    """

    def __init__(
        self, *, name: str | None = "jaccard_score", **options: Unpack[ScoreOptions]
    ) -> None:
        super().__init__(name=name, **options)

    def score(self, sums: DiceSums) -> Array:
        return formulas.jaccard(sums)


@keras.saving.register_keras_serializable(package="dice_op")
class TverskyScore(OverlapScore):
    """I / (I + alpha FP + beta FN) of hard predictions: the Tversky index.

    Args:
      alpha: The weight of the false positives, FP = P - I.
      beta: The weight of the false negatives, FN = T - I.
      **options: They are those of `OverlapScore`.
    """

    _arguments = (*OverlapScore._arguments, "alpha", "beta")

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        name: str | None = "tversky_score",
        **options: Unpack[ScoreOptions],
    ) -> None:
        super().__init__(name=name, **options)
        self.alpha = _checks.at_least_0("alpha", alpha)
        self.beta = _checks.at_least_0("beta", beta)
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0, so that no error would count")

    def score(self, sums: DiceSums) -> Array:
        return formulas.tversky(sums, alpha=self.alpha, beta=self.beta)


@keras.saving.register_keras_serializable(package="dice_op")
class Sensitivity(OverlapScore):
    """I / T of hard predictions: which share of a class is found. It is also called recall.

    Where a class counts that is not among the labels (`absent`), it is 1 if the class is not
    predicted either, else 0. The arguments are those of `OverlapScore`.
    """

    def __init__(
        self, *, name: str | None = "sensitivity", **options: Unpack[ScoreOptions]
    ) -> None:
        super().__init__(name=name, **options)

    def score(self, sums: DiceSums) -> Array:
        return formulas.sensitivity(sums)


@keras.saving.register_keras_serializable(package="dice_op")
class Precision(OverlapScore):
    """I / P of hard predictions: which share of what is predicted as a class belongs to it.

    Where nothing is predicted, it is 0, or 1 if the class is not among the labels either. The
    arguments are those of `OverlapScore`.
    """

    def __init__(self, *, name: str | None = "precision", **options: Unpack[ScoreOptions]) -> None:
        super().__init__(name=name, **options)

    def score(self, sums: DiceSums) -> Array:
        return formulas.precision(sums)


@keras.saving.register_keras_serializable(package="dice_op")
class Specificity(OverlapScore):
    """TN / (TN + FP) of hard predictions: which share of the other voxels is not taken for a class.

    The arguments are those of `OverlapScore`.
    """

    _needs_weight_sum = True

    def __init__(
        self, *, name: str | None = "specificity", **options: Unpack[ScoreOptions]
    ) -> None:
        super().__init__(name=name, **options)

    def score(self, sums: DiceSums) -> Array:
        return formulas.specificity(sums)


@keras.saving.register_keras_serializable(package="dice_op")
class Matthews(OverlapScore):
    """The Matthews correlation of hard predictions and labels, between -1 and 1.

    `dice_op.losses.MatthewsLoss` has the formula. The arguments are those of `OverlapScore`.
    """

    _needs_weight_sum = True

    def __init__(self, *, name: str | None = "matthews", **options: Unpack[ScoreOptions]) -> None:
        super().__init__(name=name, **options)

    def score(self, sums: DiceSums) -> Array:
        return formulas.matthews(sums)
