"""Keras losses of the Dice family over the fused sums."""

import operator

import keras
import tensorflow as tf

from dice_op import formulas
from dice_op.ops import dice_sums

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"dice_op.losses needs Keras on TensorFlow, but its backend is {keras.backend.backend()}: "
        "set KERAS_BACKEND=tensorflow before importing keras"
    )

_ACTIVATIONS = ("softmax", "sigmoid", "none")
_DATA_FORMATS = ("channels_last", "channels_first")
_AVERAGES = ("macro", "micro")


class _Reduce(keras.losses.Loss):
    """Keras' reduction of values that are losses already."""

    def call(self, y_true, y_pred):
        return y_pred


class SumsLoss(keras.losses.Loss):
    """Base of the losses that are a formula over `dice_op.dice_sums`.

    Keras casts labels and logits to float32 before `call`. Here both reach the op as they are:
    integer labels stay integers, half logits half.
    """

    def __init__(
        self,
        *,
        activation,
        ignore_label,
        squared_pred,
        batch,
        data_format,
        reduction,
        name,
        dtype,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        _one_of("activation", activation, _ACTIVATIONS)
        _one_of("data_format", data_format, _DATA_FORMATS)
        self.activation = activation
        self.ignore_label = None if ignore_label is None else operator.index(ignore_label)
        self.squared_pred = bool(squared_pred)
        self.batch = bool(batch)
        self.data_format = data_format
        self._reduce = _Reduce(name=self.name, reduction=reduction, dtype=dtype)

    def from_sums(self, sums):
        """The loss of each sample, `[N]`, from a `DiceSums` (`[1]` for the whole batch)."""
        raise NotImplementedError

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The reduced loss.

        Args:
          y_true, y_pred: as for `dice_op.dice_sums`.
          sample_weight: A weight per sample, `[N]` or `[N, 1]`; or per voxel, `[N, spatial...]`,
            which enters the sums.
        """
        y_pred = tf.convert_to_tensor(y_pred)
        _check_not_activated(y_pred, self.activation)
        if sample_weight is None:
            losses = self.call(y_true, y_pred)
            return self._reduce(losses, losses)
        weight = tf.convert_to_tensor(sample_weight)

        def per_voxel():
            losses = self.call(y_true, y_pred, voxel_weight=weight)
            return losses, tf.ones_like(losses)

        def per_sample():
            flat = tf.broadcast_to(tf.reshape(weight, [-1]), [tf.shape(y_pred)[0]])
            if self.batch:  # one loss, whose sums the samples enter with their weights
                losses = self.call(y_true, y_pred, sample_weight=flat)
                return losses, tf.ones_like(losses)
            losses = self.call(y_true, y_pred)
            return losses, tf.cast(flat, losses.dtype)

        choice = _is_per_voxel(weight, y_pred)
        if isinstance(choice, bool):
            losses, weight = per_voxel() if choice else per_sample()
        else:
            losses, weight = tf.cond(choice, per_voxel, per_sample)
        return self._reduce(losses, losses, weight)

    def call(self, y_true, y_pred, voxel_weight=None, sample_weight=None):
        """The loss of each sample, `[N]`; the weights enter the sums."""
        sums = dice_sums(
            y_true,
            y_pred,
            activation=self.activation,
            squared_pred=self.squared_pred,
            voxel_weight=voxel_weight,
            ignore_label=self.ignore_label,
            data_format=self.data_format,
        )
        if sample_weight is not None:
            sums = formulas.weighted(sums, sample_weight)
        losses = self.from_sums(sums)
        return tf.broadcast_to(losses, [tf.shape(sums.intersection)[0]])

    def get_config(self):
        return {
            **super().get_config(),
            "activation": self.activation,
            "squared_pred": self.squared_pred,
            "ignore_label": self.ignore_label,
            "batch": self.batch,
            "data_format": self.data_format,
            "dtype": self.dtype,
        }


@keras.saving.register_keras_serializable(package="dice_op")
class DiceLoss(SumsLoss):
    """1 - (2 I + smooth_nr) / (P + T + smooth_dr), from the logits and integer labels in one pass.

    I, P, T are sums over the voxels of a sample and class: I = sum p t, P = sum p, T = sum t, with
    p the probability and t the label (Milletari et al., "V-Net", 2016; the smoothing is MONAI's).

    The three forms people write:

    - multi-class, mean over the classes: `DiceLoss()`;
    - class-weighted, sum over c of w_c (1 - dice_c): `DiceLoss(class_weight=w)`;
    - binary, over all voxels and channels jointly: `DiceLoss(activation="sigmoid",
      average="micro")`.

    Classes absent from a sample and its prediction have loss 0, not NaN, if smooth_nr = smooth_dr.

    Args:
      activation: What turns `y_pred` into probabilities: `"softmax"`, `"sigmoid"` (also for
        overlapping regions), or `"none"` where the model ends in one already. A softmax upon a
        softmax is refused where it can be seen: as the model's last operation.
      include_background: Whether class 0 counts.
      class_weight: Weight of each counted class. The losses are summed with these weights, which
        are not normalised: for a weighted mean let them sum to 1. With `average="micro"` they
        weight each class's sums.
      squared_pred: Squares in P and T.
      jaccard: 1 - intersection over union in place of Dice.
      smooth_nr, smooth_dr: Added to numerator and denominator. Where the denominator is 0, the
        loss is 0.
      average: `"macro"`: a loss per class, then their mean; `"micro"`: sums over all classes, then
        one loss.
      batch: Sums over the whole batch instead of per sample, as nnU-Net's `batch_dice`; weights per
        sample enter these sums. The batch's loss then stands for each sample, so that the reduction
        should be a mean.
      ignore_label: Voxels with this integer label count for nothing.
      data_format: `"channels_last"` or `"channels_first"`.
      reduction, name, dtype: as for every Keras loss; `dtype` is the loss's, never the logits'.

    Call:
      y_true: class indices `[N, spatial...]`, or labels of `y_pred`'s shape. With one class: the
        mask, `[N, spatial...]` or `[N, spatial..., 1]`, 0 or 1. Types: see `dice_op.dice_sums`.
      y_pred: logits `[N, spatial..., C]` (or channels first), any float type.
      sample_weight: `[N]`, or one weight per voxel, `[N, spatial...]`.

    Raises:
      ValueError: an argument, or a combination of them, that makes no sense.
    """

    def __init__(
        self,
        *,
        activation="softmax",
        include_background=True,
        class_weight=None,
        squared_pred=False,
        jaccard=False,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        average="macro",
        batch=False,
        ignore_label=None,
        data_format="channels_last",
        reduction="sum_over_batch_size",
        name="dice_loss",
        dtype=None,
    ):
        super().__init__(
            activation=activation,
            ignore_label=ignore_label,
            squared_pred=squared_pred,
            batch=batch,
            data_format=data_format,
            reduction=reduction,
            name=name,
            dtype=dtype,
        )
        _one_of("average", average, _AVERAGES)
        for argument, value in (("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{argument} is {value}, but must be finite and at least 0")
        self.include_background = bool(include_background)
        self.class_weight = _class_weight(class_weight)
        self.jaccard = bool(jaccard)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.average = average

    def from_sums(self, sums):
        sums, weight = self._counted(sums)
        if self.batch:
            if tf.distribute.get_strategy().num_replicas_in_sync > 1:
                raise NotImplementedError(
                    "batch=True does not yet sum over the replicas of a distribution strategy: "
                    "use batch=False"
                )
            sums = formulas.over_batch(sums)
        if self.average == "micro":
            sums, weight = formulas.over_classes(sums, weight), None
        coefficient = formulas.jaccard if self.jaccard else formulas.dice
        losses = 1 - coefficient(sums, smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)
        return formulas.mean_over_classes(losses, weight)

    def _counted(self, sums):
        """The sums of the classes that count, and their weights."""
        classes = sums.intersection.shape[1]
        if classes == 1 and self.activation == "softmax":
            raise ValueError(
                "y_pred has one class, whose softmax is 1 everywhere, so that nothing can be "
                'learnt: use activation="sigmoid" (or two classes, background and foreground)'
            )
        if not self.include_background:
            if classes == 1:
                raise ValueError(
                    "include_background=False leaves no class: y_pred has one, the foreground"
                )
            sums = formulas.select_classes(sums, 1)
        if self.class_weight is None:
            return sums, None
        counted = sums.intersection.shape[1]
        if counted is not None and counted != len(self.class_weight):
            raise ValueError(
                f"class_weight has {len(self.class_weight)} entries, but {counted} classes count"
                f"{'' if self.include_background else ' (include_background=False)'}"
            )
        if counted is None:  # checked when it runs
            known = tf.ensure_shape(sums.intersection, [None, len(self.class_weight)])
            sums = sums._replace(intersection=known)
        return sums, tf.constant(self.class_weight, sums.intersection.dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "include_background": self.include_background,
            "class_weight": self.class_weight,
            "jaccard": self.jaccard,
            "smooth_nr": self.smooth_nr,
            "smooth_dr": self.smooth_dr,
            "average": self.average,
        }


def _one_of(argument, value, allowed):
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{argument} is {value!r}, but must be one of {names}")


def _class_weight(weights):
    if weights is None:
        return None
    if isinstance(weights, (str, dict)) or not hasattr(weights, "__iter__"):
        raise ValueError(
            f"class_weight is {weights!r}, but must be a list of one weight per class, in order"
        )
    weights = [float(w) for w in weights]
    if not weights or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(
            f"class_weight is {weights}, but must be one finite weight per class, at least 0 and "
            "not all 0"
        )
    return weights


def _check_not_activated(y_pred, activation):
    """Finds the model that ends in a softmax, where the loss would apply another."""
    activated = hasattr(y_pred, "_keras_logits")  # Keras' mark on what its activations return
    if not activated and tf.is_symbolic_tensor(y_pred):
        op = y_pred.op
        while op.type in ("Cast", "Identity"):  # as a mixed-precision model's last layer
            op = op.inputs[0].op
        activated = op.type in ("Softmax", "Sigmoid")
    if activated and activation != "none":
        raise ValueError(
            "y_pred are probabilities, the output of a softmax or sigmoid, and "
            f"{activation=} would apply another: remove the model's last activation, so that "
            'y_pred are logits (the more exact way), or pass activation="none"'
        )


def _is_per_voxel(weight, y_pred):
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
