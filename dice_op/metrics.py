"""Keras metrics of the Dice family: hard scores, counted by the fused kernels, streaming."""

import keras
import numpy as np
import tensorflow as tf

from dice_op import _arguments, formulas
from dice_op.losses import SumsLoss  # noqa: F401  checks Keras' backend
from dice_op.ops import DiceSums, dense_tensor, dice_sums

_PREDICTIONS = ("argmax", "threshold")
_OVER = ("samples", "dataset")
_AVERAGES = ("macro", "micro", "none")
_ABSENT = ("skip", "keep")


class OverlapScore(keras.metrics.Metric):
    """Base of the metrics that are a score of hard predictions, from logits and labels in one pass.

    Args:
      prediction: `"argmax"`, the class of the largest logit (or probability: the same), or
        `"threshold"`, every class whose logit is above one, for regions and binary masks.
      threshold: Of that: a probability, of which the logit is taken; with `from_logits=False` what
        `y_pred` itself must exceed.
      from_logits: Whether `y_pred` are logits.
      over: `"samples"`: the mean of the samples' scores, weighted by `sample_weight`; `"dataset"`:
        the score of the whole data set's counts, as if it were one volume.
      average: `"macro"`: the mean over the classes; `"micro"`: all classes' counts together;
        `"none"`: `result()` is `[classes]`.
      include_background: Whether class 0 counts.
      absent: What becomes of a class that is not among a sample's labels. `"skip"`: the sample says
        nothing about it (MONAI's `ignore_empty=True`); `"keep"`: 1 if it is not predicted either,
        else 0. A class without any sample is left out of the mean, and NaN with `average="none"`;
        a mean of no class is NaN.
      ignore_label: Voxels with this integer label count for nothing.
      regions: For overlapping regions: for each class the label values in it; with
        `prediction="threshold"`.
      data_format: `"channels_last"` or `"channels_first"`; None is Keras' setting,
        `keras.config.image_data_format()`, at the time the metric is made.
      name, dtype: as for every Keras metric. Totals are kept in float64.

    Call:
      y_true, y_pred, sample_weight: as for `dice_op.losses.DiceLoss`. Voxels that a Keras mask of
        `y_pred` leaves out count for nothing, and so does a sample of which none is left.

    More is better: callbacks such as `EarlyStopping(monitor="val_dice_score")` know it.
    """

    _arguments = (
        "prediction",
        "threshold",
        "from_logits",
        "over",
        "average",
        "include_background",
        "absent",
        "ignore_label",
        "regions",
        "data_format",
    )

    def __init__(
        self,
        *,
        prediction="argmax",
        threshold=0.5,
        from_logits=True,
        over="samples",
        average="macro",
        include_background=True,
        absent="skip",
        ignore_label=None,
        regions=None,
        data_format=None,
        name=None,
        dtype=None,
        **unknown,
    ):
        _arguments.refuse_unknown(self, unknown, is_score=True)
        super().__init__(name=name, dtype=dtype)
        _arguments.one_of("prediction", prediction, _PREDICTIONS)
        _arguments.one_of("over", over, _OVER)
        _arguments.one_of("average", average, _AVERAGES)
        _arguments.one_of("absent", absent, _ABSENT)
        self.prediction = prediction
        self.threshold = _arguments.number("threshold", threshold)
        self.from_logits = _arguments.flag("from_logits", from_logits)
        if from_logits and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {threshold}, but a probability must be between 0 and 1")
        if prediction == "argmax" and threshold != 0.5:
            raise ValueError(
                f'threshold is {threshold}, but prediction="argmax" has none: use "threshold"'
            )
        self.over = over
        self.average = average
        self.include_background = _arguments.flag("include_background", include_background)
        self.absent = absent
        self.ignore_label = _arguments.label("ignore_label", ignore_label)
        self.regions = _arguments.region_lists(regions, include_background)
        if self.regions and prediction == "argmax":
            raise ValueError(
                'regions overlap, but prediction="argmax" gives a voxel one class: use "threshold"'
            )
        self.data_format = _arguments.data_format(data_format)
        self._direction = "up"  # what Keras' callbacks ask
        self._totals = None

    def score(self, sums):
        """Of the counts I, P, T, `[N, C]`."""
        raise NotImplementedError

    def _build(self, classes):
        if classes is None:
            raise ValueError(
                "y_pred has an unknown number of classes: give the model's last layer a fixed one"
            )
        if classes == 1 and self.prediction == "argmax":
            raise ValueError(
                "y_pred has one class, which is the largest everywhere: use "
                'prediction="threshold" for a binary mask'
            )
        _arguments.check_background(classes, self.include_background)
        classes -= not self.include_background
        shape = (1 if self.average == "micro" else classes,)

        def zeros(name):
            return self.add_variable(shape, "zeros", dtype="float64", name=name)

        names = ("scores", "weights") if self.over == "samples" else ("i", "p", "t")
        self._totals = [zeros(name) for name in names]

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch."""
        _arguments.refuse_tf_keras()
        y_true, y_pred = dense_tensor("y_true", y_true), dense_tensor("y_pred", y_pred)
        axis = -1 if self.data_format == "channels_last" else 1
        if self._totals is None:
            self._build(y_pred.shape[axis])
        if self.from_logits and self.prediction == "threshold":
            _arguments.check_not_activated(y_pred, "sigmoid", instead="from_logits=False")
        voxel_weight, sample_weight = _arguments.weights(sample_weight, y_pred, self.data_format)
        _arguments.check_shapes(y_true, y_pred, self.data_format, alone=self.over == "samples")
        mask, share = _arguments.keras_mask(y_pred), None
        if mask is not None:
            voxel_weight, share = _arguments.masked(mask, voxel_weight, y_pred, self.data_format)
        threshold = self.threshold
        if self.from_logits:
            threshold = float(np.log(threshold) - np.log1p(-threshold))
        sums = dice_sums(
            y_true,
            y_pred,
            activation=self.prediction,
            threshold=threshold,
            voxel_weight=voxel_weight,
            ignore_label=self.ignore_label,
            regions=self.regions,
            data_format=self.data_format,
        )
        if not self.include_background:
            sums = formulas.select_classes(sums, 1)
        if self.average == "micro":
            sums = formulas.over_classes(sums)
        weight = tf.ones_like(sums.weight_sum)
        if sample_weight is not None:
            weight *= tf.cast(sample_weight, tf.float64)
        if share is not None:
            weight *= tf.cast(share > 0, tf.float64)
        if self.over == "samples":
            weight = weight[:, tf.newaxis] * tf.cast(self._counted(sums), tf.float64)
            added = [self.score(sums) * weight, weight]
        else:
            sums = formulas.weighted(sums, weight)
            added = [sums.intersection, sums.pred_sum, sums.label_sum]
        for total, values in zip(self._totals, added, strict=True):
            total.assign_add(tf.reduce_sum(values, 0))

    def _counted(self, sums):
        if self.absent == "keep":
            return tf.ones_like(sums.label_sum, tf.bool)
        return sums.label_sum > 0

    def result(self):
        """The score: a scalar, or `[classes]` for `average="none"`."""
        if self._totals is None:
            return tf.constant(np.nan, self.dtype)
        totals = [tf.convert_to_tensor(t) for t in self._totals]
        if self.over == "samples":
            scores, weights = totals
            counted = weights > 0
            scores = tf.math.divide_no_nan(scores, weights)
        else:
            i, p, t = (total[tf.newaxis] for total in totals)
            sums = DiceSums(i, p, t, None, None)
            scores, counted = self.score(sums)[0], self._counted(sums)[0]
        if self.average == "none":
            nan = tf.constant(np.nan, scores.dtype)
            return tf.cast(tf.where(counted, scores, nan), self.dtype)
        mean = formulas.mean_over_classes(scores[tf.newaxis], counted=counted[tf.newaxis])[0]
        return tf.cast(tf.where(tf.reduce_any(counted), mean, np.nan), self.dtype)

    def get_config(self):
        return {**super().get_config(), **{n: getattr(self, n) for n in self._arguments}}


@keras.saving.register_keras_serializable(package="dice_op")
class DiceScore(OverlapScore):
    """2 I / (P + T) of hard predictions: Dice coefficient, F1. Arguments: see `OverlapScore`."""

    def __init__(self, *, name="dice_score", **options):
        super().__init__(name=name, **options)

    def score(self, sums):
        return formulas.dice(sums)


@keras.saving.register_keras_serializable(package="dice_op")
class JaccardScore(OverlapScore):
    """I / (P + T - I) of hard predictions: Jaccard, IoU. Arguments: see `OverlapScore`."""

    def __init__(self, *, name="jaccard_score", **options):
        super().__init__(name=name, **options)

    def score(self, sums):
        return formulas.jaccard(sums)
