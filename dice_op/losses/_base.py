"""Keras losses of the Dice family over the fused sums."""

import functools
import inspect
import json
import operator

import keras
import tensorflow as tf

from dice_op import _arguments, _loader, formulas
from dice_op.ops import dense_tensor, dice_sums

_loader.refuse_legacy_keras()
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"dice_op.losses needs Keras on TensorFlow, but its backend is {keras.backend.backend()}: "
        "set KERAS_BACKEND=tensorflow before importing keras"
    )

_AVERAGES = ("macro", "micro", "none")
_ABSENT = ("keep", "skip", "one")
_TRANSFORMS = {
    "linear": lambda score: 1 - score,
    "log": formulas.log_loss,
    "log_cosh": formulas.log_cosh_loss,
}


class _Reduce(keras.losses.Loss):
    """Keras' reduction of values that are losses already."""

    def call(self, y_true, y_pred):
        return y_pred


class SumsLoss(keras.losses.Loss):
    """Base of the losses that are a formula over `dice_op.dice_sums`; derive your own from it.

    A subclass implements `from_sums`, and names its own arguments in `_arguments`. Keras casts
    labels and logits to float32 before `call`; here both reach the op as they are: integer labels
    stay integers, half logits half.

    These arguments are those of every loss here.

    Args:
      activation: What turns `y_pred` into probabilities: `"softmax"`, `"sigmoid"` (also for
        overlapping regions), or `"none"` where the model ends in one already. A softmax upon a
        softmax is refused where it can be seen: as the model's last operation.
      include_background: Whether class 0 counts (for the cross-entropy it always does).
      squared_pred: Squares in P and T (Milletari et al., "V-Net", 2016).
      batch: Sums over the whole batch instead of per sample, as nnU-Net's `batch_dice`, and over
        all replicas of a distribution strategy; weights per sample enter these sums. The batch's
        loss then stands for each sample, so that the reduction should be a mean.
      ignore_label: Voxels with this integer label count for nothing.
      regions: For overlapping regions: for each class the label values in it, such as
        `[(1, 2, 3), (2, 3), (3,)]`; with `activation="sigmoid"`.
      data_format: `"channels_last"` or `"channels_first"`; None is Keras' setting,
        `keras.config.image_data_format()`, at the time the loss is made.
      reduction, name, dtype: as for every Keras loss; `dtype` is the loss's, never the logits'.

    Call:
      y_true: class indices `[N, spatial...]`, or labels of `y_pred`'s shape. With one class: the
        mask, `[N, spatial...]` or `[N, spatial..., 1]`, 0 or 1. Types: see `dice_op.dice_sums`.
      y_pred: logits `[N, spatial..., C]` (or channels first), any float type.
      sample_weight: `[N]`, or one weight per voxel, `[N, spatial...]`, which enters the sums.

    A mask that Keras' layers hand on with `y_pred` (`keras.layers.Masking`, `Embedding`) counts as
    a weight of 0 for the voxels that it leaves out, and each sample weighs by the voxels that are
    left, so that a mean is over these, as in Keras' own losses.

    Raises:
      ValueError: an argument, or a combination of them, that makes no sense.
    """

    _arguments = (
        "activation",
        "include_background",
        "squared_pred",
        "batch",
        "ignore_label",
        "regions",
        "data_format",
        "dtype",
    )

    def __init__(
        self,
        *,
        activation="softmax",
        include_background=True,
        squared_pred=False,
        batch=False,
        ignore_label=None,
        regions=None,
        data_format=None,
        reduction="sum_over_batch_size",
        name=None,
        dtype=None,
        **unknown,
    ):
        _arguments.refuse_unknown(self, unknown)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        _arguments.one_of("activation", activation, _arguments.ACTIVATIONS)
        self.activation = activation
        self.include_background = _arguments.flag("include_background", include_background)
        self.squared_pred = _arguments.flag("squared_pred", squared_pred)
        self.batch = _arguments.flag("batch", batch)
        self.ignore_label = _arguments.label("ignore_label", ignore_label)
        self.regions = _arguments.region_lists(regions, include_background)
        if self.regions and activation == "softmax":
            raise ValueError(
                'regions overlap, but activation="softmax" gives a voxel one class: use "sigmoid"'
            )
        self.data_format = _arguments.data_format(data_format)
        self._reduce = _Reduce(name=self.name, reduction=reduction, dtype=dtype)

    def from_sums(self, sums):
        """The loss of each sample, `[N]` or `[N, classes]`, from a `DiceSums`.

        With `batch` the sums are those of the whole batch, `[1, C]`, and so is the loss.
        """
        raise NotImplementedError

    def sum_options(self):
        """What `dice_sums` is asked for besides: `cross_entropy`, `focal_gamma`."""
        return {}

    def __call__(self, y_true, y_pred, sample_weight=None):
        """The reduced loss.

        Args:
          y_true, y_pred: as for `dice_op.dice_sums`.
          sample_weight: A weight per sample, `[N]` or `[N, 1]`; or per voxel, `[N, spatial...]`,
            which enters the sums.
        """
        y_pred = dense_tensor("y_pred", y_pred)
        weights = _arguments.weights(sample_weight, y_pred, self.data_format)
        return self._weighted(dense_tensor("y_true", y_true), y_pred, *weights)

    def _weighted(self, y_true, y_pred, voxel_weight, weight):
        """The reduced loss, from weights of each kind, or None."""
        _arguments.refuse_tf_keras()
        cross_entropy = self.sum_options().get("cross_entropy", False)
        _arguments.check_not_activated(y_pred, self.activation, cross_entropy)
        alone = not self.batch and getattr(self, "lambda_dice", 1) != 0
        _arguments.check_shapes(y_true, y_pred, self.data_format, alone)
        mask = _arguments.keras_mask(y_pred)
        if mask is not None:
            voxel_weight, share = _arguments.masked(mask, voxel_weight, y_pred, self.data_format)
            if not self.batch:
                weight = self._by_share(weight, share)
        compiled = _compiled(self) if _one_by_one() else None
        if compiled:
            return compiled(self._sums(y_true, y_pred, voxel_weight), weight)
        of_sums, of_losses = self._weights(weight)
        if _takes_weights(type(self)):
            losses = self.call(y_true, y_pred, voxel_weight, of_sums)
        elif voxel_weight is None and of_sums is None:  # as Keras calls it
            losses = self.call(tf.cast(y_true, self.dtype), tf.cast(y_pred, self.dtype))
        else:
            raise ValueError(
                f"{type(self).__name__}.call takes y_true and y_pred alone, but there are weights "
                "that enter the sums (one per voxel, a Keras mask, or batch=True with weights): "
                "give it the arguments voxel_weight=None, sample_weight=None, and hand them to "
                "super().call, or implement from_sums(self, sums) instead"
            )
        return self._reduced(losses, of_losses)

    def _by_share(self, weight, share):
        """Weights per sample, or None, times the share of each sample's voxels that count."""
        if self.reduction in ("mean", "sum_over_batch_size"):  # of what counts, not of the batch
            total = tf.cast(tf.size(share), share.dtype)
            share *= tf.math.divide_no_nan(total, tf.reduce_sum(share))
        return share if weight is None else tf.cast(weight, share.dtype) * share

    def call(self, y_true, y_pred, voxel_weight=None, sample_weight=None):
        """The loss of each sample, `[N]` or `[N, classes]`; the weights enter the sums."""
        return self._losses(self._sums(y_true, y_pred, voxel_weight), sample_weight)

    def _sums(self, y_true, y_pred, voxel_weight):
        return dice_sums(
            y_true,
            y_pred,
            activation=self.activation,
            squared_pred=self.squared_pred,
            voxel_weight=voxel_weight,
            ignore_label=self.ignore_label,
            regions=self.regions,
            data_format=self.data_format,
            **self.sum_options(),
        )

    def _losses(self, sums, sample_weight):
        samples = tf.shape(sums.intersection)[:1]
        if sample_weight is not None:
            sums = formulas.weighted(sums, sample_weight)
        if self.batch:
            sums = formulas.over_replicas(formulas.over_batch(sums))
        losses = self.from_sums(sums)
        return tf.broadcast_to(losses, tf.concat([samples, tf.shape(losses)[1:]], 0))

    def _weights(self, weight):
        """Weights per sample as those of sums and of losses: `batch` has but one loss."""
        return (weight, None) if self.batch else (None, weight)

    def _reduced(self, losses, weight):
        losses = tf.convert_to_tensor(losses)
        if weight is not None:
            weight = tf.cast(weight, losses.dtype)
            if losses.shape.rank == 2:
                weight = tf.broadcast_to(weight[:, tf.newaxis], tf.shape(losses))
        return self._reduce(losses, losses, weight)

    def overlap_sums(self, sums):
        """The sums of the classes that count in an overlap."""
        classes = sums.intersection.shape[1]
        if classes == 1 and self.activation == "softmax":
            raise ValueError(
                "y_pred has one class, whose softmax is 1 everywhere, so that nothing can be "
                'learnt: use activation="sigmoid" (or two classes, background and foreground)'
            )
        _arguments.check_background(classes, self.include_background)
        return sums if self.include_background else formulas.select_classes(sums, 1)

    def get_config(self):
        names = [n for c in type(self).__mro__ for n in c.__dict__.get("_arguments", ())]
        return {**super().get_config(), **{n: getattr(self, n) for n in names}}


@functools.cache
def _takes_weights(kind):
    """Whether a loss's `call` takes weights, and not `y_true` and `y_pred` alone, as in Keras."""
    try:
        inspect.signature(kind.call).bind(None, None, None, None, None)
    except TypeError:
        return False
    return True


class _CompiledFormula:
    """A loss from its sums as one function: operation by operation it takes an eager call longer
    than the sums of a small volume."""

    def __init__(self, loss):
        self._loss = loss
        self._functions = {}

    def __call__(self, sums, weight):
        tensors = [s for s in (*sums, weight) if s is not None]
        classes = sums.intersection.shape[1]
        key = (classes, weight is None, *(t.dtype for t in tensors))
        if key not in self._functions:
            self._functions[key] = self._trace(classes, weight is not None, sums, tensors)
        return self._functions[key](*tensors)

    def _trace(self, classes, weighted, sums, tensors):
        def formula(*tensors):
            values = iter(tensors)
            of_sums, of_losses = self._loss._weights(tensors[-1] if weighted else None)
            traced = type(sums)(*(None if s is None else next(values) for s in sums))
            return self._loss._reduced(self._loss._losses(traced, of_sums), of_losses)

        shapes = ([None, classes] if t.shape.rank == 2 else [None] for t in tensors)
        specs = [tf.TensorSpec(s, t.dtype) for s, t in zip(shapes, tensors, strict=True)]
        return tf.function(formula, autograph=False).get_concrete_function(*specs)


@functools.lru_cache(maxsize=64)
def _compiled_formula(kind, config):
    return _CompiledFormula(kind.from_config(json.loads(config)))


def _compiled(loss):
    """The `_CompiledFormula` of a loss as it is now; None for a loss or attributes not of here."""
    if type(loss).__module__ != __name__:
        return None
    try:
        config = json.dumps(loss.get_config())
    except TypeError:
        return None
    return _compiled_formula(type(loss), config)


def _one_by_one():
    """Whether operations run as they are called, here and not on a replica."""
    eager = tf.executing_eagerly() and not tf.config.functions_run_eagerly()
    return eager and not tf.distribute.has_strategy()


class OverlapLoss(SumsLoss):
    """Base of the losses that are 1 - score for a score of each class between 0 and 1.

    Args:
      class_weight: Weight of each counted class. The losses are summed with these weights, which
        are not normalised: for a weighted mean let them sum to 1. With `average="micro"` they
        weight each class's sums.
      smooth_nr, smooth_dr: Added to numerator and denominator. Where the denominator is 0, the
        loss is 0.
      average: `"macro"`: a loss per class, then their mean; `"micro"`: sums over all classes, then
        one loss; `"none"`: `[N, classes]`, for Keras' reduction to average.
      absent: What a class that is not among a sample's labels (the batch's with `batch`) adds.
        `"keep"`: what the formula gives, near 1 once anything is predicted; `"skip"`: nothing, the
        mean is over the others; `"one"`: a score of 1, loss 0.
      transform: Of the score: `"linear"`, 1 - score; `"log"`, -log(score); `"log_cosh"`,
        log(cosh(1 - score)) (Jadon, 2020).
      **options: those of `SumsLoss`.
    """

    _arguments = ("class_weight", "smooth_nr", "smooth_dr", "average", "absent", "transform")

    def __init__(
        self,
        *,
        class_weight=None,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        average="macro",
        absent="keep",
        transform="linear",
        **options,
    ):
        super().__init__(**options)
        _arguments.one_of("average", average, _AVERAGES)
        _arguments.one_of("absent", absent, _ABSENT)
        _arguments.one_of("transform", transform, _TRANSFORMS)
        if average == "micro" and absent != "keep":
            raise ValueError(
                f'{absent=} asks about each class, but average="micro" adds all classes up first'
            )
        if average == "none" and absent == "skip":
            raise ValueError('absent="skip" leaves classes out of a mean, but average="none"')
        self.class_weight = _arguments.class_weight_list("class_weight", class_weight)
        self.smooth_nr = _arguments.at_least_0("smooth_nr", smooth_nr)
        self.smooth_dr = _arguments.at_least_0("smooth_dr", smooth_dr)
        self.average = average
        self.absent = absent
        self.transform = transform

    def score(self, sums):
        """1 where prediction and labels agree, towards 0 where they do not; `[N, C]`."""
        raise NotImplementedError

    def loss_of_score(self, score):
        """The transform."""
        return _TRANSFORMS[self.transform](score)

    def from_sums(self, sums):
        sums = self.overlap_sums(sums)
        weight = _arguments.class_weight_tensor(
            "class_weight", self.class_weight, sums, self.include_background
        )
        present = None if self.absent == "keep" else sums.label_sum > 0
        if self.average == "micro":
            sums, weight = formulas.over_classes(sums, weight), None
        losses = self.loss_of_score(self.score(sums))
        if self.absent == "one":
            losses, present = tf.where(present, losses, tf.zeros_like(losses)), None
        if self.average == "none":
            return losses if weight is None else losses * weight
        return formulas.mean_over_classes(losses, weight, present)


@keras.saving.register_keras_serializable(package="dice_op")
class DiceLoss(OverlapLoss):
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
      jaccard: 1 - intersection over union in place of Dice: the Jaccard or IoU loss.
      **options: `class_weight`, `smooth_nr`, `smooth_dr`, `average`, `absent`, `transform` as for
        `OverlapLoss`; `activation`, `include_background`, `squared_pred`, `batch`, `ignore_label`,
        `data_format`, `reduction`, `name`, `dtype` as for `SumsLoss`.
    """

    _arguments = ("jaccard",)

    def __init__(self, *, jaccard=False, name="dice_loss", **options):
        super().__init__(name=name, **options)
        self.jaccard = _arguments.flag("jaccard", jaccard)

    def score(self, sums):
        coefficient = formulas.jaccard if self.jaccard else formulas.dice
        return coefficient(sums, smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)


@keras.saving.register_keras_serializable(package="dice_op")
class TverskyLoss(OverlapLoss):
    """1 - (I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr) (Salehi et al., 2017).

    FP = P - I, FN = T - I. alpha = beta = 0.5 is Dice, alpha = beta = 1 Jaccard; beta > alpha
    favours recall, which small lesions want. With `gamma` the focal Tversky loss (1 - score)^gamma
    (Abraham & Khan, 2019; their exponent is 1 / gamma).

    Args:
      alpha: Weight of the false positives, as in MONAI and tensorflow-mri. (`keras.losses.Tversky`
        documents it so, and until Keras 3.15 has the two exchanged.)
      beta: Weight of the false negatives.
      gamma: Exponent; above 1 it weakens classes that are well segmented already.
      **options: those of `DiceLoss`.
    """

    _arguments = ("alpha", "beta", "gamma")

    def __init__(self, *, alpha=0.5, beta=0.5, gamma=1.0, name="tversky_loss", **options):
        super().__init__(name=name, **options)
        self.alpha = _arguments.at_least_0("alpha", alpha)
        self.beta = _arguments.at_least_0("beta", beta)
        self.gamma = _arguments.at_least_0("gamma", gamma)
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0, so that no error would count")
        if self.gamma == 0:
            raise ValueError("gamma is 0, so that every loss would be 1")
        if self.squared_pred:
            raise ValueError(
                "squared_pred=True would make FP = P - I negative, and reward it: use DiceLoss"
            )
        if self.gamma != 1 and self.transform != "linear":
            raise ValueError(
                f"gamma={self.gamma} and transform={self.transform!r} exclude each other"
            )

    def score(self, sums):
        smooth = {"smooth_nr": self.smooth_nr, "smooth_dr": self.smooth_dr}
        return formulas.tversky(sums, alpha=self.alpha, beta=self.beta, **smooth)

    def loss_of_score(self, score):
        if self.gamma == 1:
            return super().loss_of_score(score)
        return formulas.focal_loss(score, self.gamma)


@keras.saving.register_keras_serializable(package="dice_op")
class GeneralizedDiceLoss(SumsLoss):
    """1 - (2 sum_c w I + smooth_nr) / (sum_c w (P + T) + smooth_dr) (Sudre et al., 2017).

    One loss per sample, whose classes weigh by the inverse of their volume.

    Args:
      weight_type: w: `"square"`, 1 / T^2; `"simple"`, 1 / T; `"uniform"`, 1.
      infinite_weight: The weight of a class with T = 0: `"largest"`, the sample's largest finite
        one (MONAI's policy); `"zero"`, so that the class does not count.
      smooth_nr, smooth_dr: Added to numerator and denominator, which are near 1 / T for
        `"square"`: MONAI's 1e-5 is no longer small there for classes of 10,000 voxels, and hides
        the errors of those of 1,000,000. Where the denominator is 0, the loss is 0.
      **options: those of `SumsLoss`.
    """

    _arguments = ("weight_type", "infinite_weight", "smooth_nr", "smooth_dr")

    def __init__(
        self,
        *,
        weight_type="square",
        infinite_weight="largest",
        smooth_nr=0.0,
        smooth_dr=0.0,
        name="generalized_dice_loss",
        **options,
    ):
        super().__init__(name=name, **options)
        _arguments.one_of("weight_type", weight_type, ("square", "simple", "uniform"))
        _arguments.one_of("infinite_weight", infinite_weight, ("largest", "zero"))
        self.weight_type = weight_type
        self.infinite_weight = infinite_weight
        self.smooth_nr = _arguments.at_least_0("smooth_nr", smooth_nr)
        self.smooth_dr = _arguments.at_least_0("smooth_dr", smooth_dr)

    def from_sums(self, sums):
        return 1 - formulas.generalized_dice(
            self.overlap_sums(sums),
            weight=self.weight_type,
            infinite_weight=self.infinite_weight,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
        )


@keras.saving.register_keras_serializable(package="dice_op")
class DiceCELoss(DiceLoss):
    """lambda_dice Dice + lambda_ce cross-entropy, both from the same pass over the logits.

    The cross-entropy is categorical, of all classes, background too, the mean over the voxels of a
    sample; or for `activation="sigmoid"` binary, the mean over the classes as well. With `batch` it
    is the mean over the voxels of the whole batch, as PyTorch's: that differs where samples have
    different numbers of voxels that count, or `ce_class_weight` is given.

    Args:
      lambda_dice, lambda_ce: Weights of the two losses.
      ce_class_weight: Weight of each class in the cross-entropy, the background's too; normalised
        as in PyTorch: by the weights of the voxels' classes (binary: by the sum of the weights).
      focal_gamma: Exponent of the focal cross-entropy (Lin et al., 2017).
      label_smoothing: s in [0, 1]: of the cross-entropy's labels, as in `dice_op.dice_sums`.
      **options: those of `DiceLoss`.
    """

    _arguments = ("lambda_dice", "lambda_ce", "ce_class_weight", "focal_gamma", "label_smoothing")

    def __init__(
        self,
        *,
        lambda_dice=1.0,
        lambda_ce=1.0,
        ce_class_weight=None,
        focal_gamma=0.0,
        label_smoothing=0.0,
        name="dice_ce_loss",
        **options,
    ):
        super().__init__(name=name, **options)
        self.lambda_dice = _arguments.at_least_0("lambda_dice", lambda_dice)
        self.lambda_ce = _arguments.at_least_0("lambda_ce", lambda_ce)
        self.ce_class_weight = _arguments.class_weight_list("ce_class_weight", ce_class_weight)
        self.focal_gamma = _arguments.at_least_0("focal_gamma", focal_gamma)
        self.label_smoothing = _arguments.at_least_0("label_smoothing", label_smoothing)
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, but must be in [0, 1]")
        if self.lambda_dice == self.lambda_ce == 0:
            raise ValueError("lambda_dice and lambda_ce are both 0, so that nothing would count")
        if self.regions and self.activation == "none":
            raise ValueError(
                'regions need the binary cross-entropy, but that of activation="none" is '
                'categorical: pass logits and activation="sigmoid"'
            )
        if self.average == "none":
            raise ValueError('average="none" gives a loss per class, but the cross-entropy has one')

    def sum_options(self):
        options = {"focal_gamma": self.focal_gamma, "label_smoothing": self.label_smoothing}
        return {"cross_entropy": True, **options}

    def _sums(self, y_true, y_pred, voxel_weight):
        layout = {
            "data_format": self.data_format,
            "ignore_label": self.ignore_label,
            "regions": self.regions,
        }
        if (
            self.ce_class_weight
            and self.squared_pred
            and _arguments.is_soft(y_true, y_pred, **layout)
        ):
            raise ValueError(
                "ce_class_weight is normalised by the sum of the labels, which squared_pred=True "
                "squares: with soft labels leave one of the two out"
            )
        return super()._sums(y_true, y_pred, voxel_weight)

    def from_sums(self, sums):
        if self.activation == "none" and sums.intersection.shape[1] == 1:
            raise ValueError(
                'y_pred has one class, but the cross-entropy of activation="none" is categorical: '
                'pass logits and activation="sigmoid"'
            )
        weight = _arguments.class_weight_tensor("ce_class_weight", self.ce_class_weight, sums)
        binary = self.activation == "sigmoid"
        mean = formulas.binary_cross_entropy if binary else formulas.cross_entropy
        dice = super().from_sums(sums)
        return self.lambda_dice * dice + self.lambda_ce * mean(sums, weight)


@keras.saving.register_keras_serializable(package="dice_op")
class DiceFocalLoss(DiceCELoss):
    """`DiceCELoss` with the focal cross-entropy (1 - p)^focal_gamma (-log p) (Lin et al., 2017)."""

    def __init__(self, *, focal_gamma=2.0, name="dice_focal_loss", **options):
        super().__init__(focal_gamma=focal_gamma, name=name, **options)


@keras.saving.register_keras_serializable(package="dice_op")
class DownsampledLabels(keras.losses.Loss):
    """A loss of one resolution of a deeply supervised network, against labels of the full one.

    Each voxel of `y_pred` is held to the label at its centre, nearest neighbour: class indices of
    the prediction's size are all that is made. Where the sizes are equal this is `loss` itself.

    Args:
      loss: A loss of this module.

    Call:
      y_true, sample_weight: as for `loss`, of a size that may be larger.
    """

    def __init__(self, loss, *, name=None):
        if not isinstance(loss, SumsLoss):
            raise ValueError(f"loss is {loss!r}, but must be a loss of dice_op.losses")
        super().__init__(name=name or loss.name, reduction=loss.reduction)
        self.loss = loss

    def __call__(self, y_true, y_pred, sample_weight=None):
        y_pred = dense_tensor("y_pred", y_pred)
        first = 1 if self.loss.data_format == "channels_last" else 2
        rank = y_pred.shape.rank
        size = rank and tf.shape(y_pred)[first : first + rank - 2]

        def resampled(name, volume):
            if rank is None or volume.shape.rank not in (rank - 1, rank):
                raise ValueError(
                    f"{name} has shape {volume.shape}, and y_pred {y_pred.shape}: {name} must have "
                    "the axes [N, spatial...], or those of y_pred; where they are not known, "
                    "tf.ensure_shape tells them"
                )
            return _nearest(name, volume, size, first if volume.shape.rank == rank else 1)

        y_true = dense_tensor("y_true", y_true)
        full = tf.shape(y_true)
        if y_true.shape.rank == rank:  # with an axis of channels
            full = _arguments.voxel_shape(y_true, self.loss.data_format)
        labels = resampled("y_true", y_true)
        voxel_weight, weight = _arguments.weights(
            sample_weight, y_pred, self.loss.data_format, full
        )
        if voxel_weight is not None:
            if voxel_weight.shape.rank is None:
                voxel_weight = tf.reshape(voxel_weight, full)
                voxel_weight.set_shape([None] * (rank - 1))
            voxel_weight = resampled("sample_weight", voxel_weight)
        if voxel_weight is None or weight is None:
            return self.loss(labels, y_pred, weight if voxel_weight is None else voxel_weight)
        return self.loss._weighted(labels, y_pred, voxel_weight, weight)

    def get_config(self):
        return {"loss": keras.losses.serialize(self.loss), "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(keras.losses.deserialize(config["loss"]), name=config["name"])


def _nearest(name, volume, size, first):
    """`volume` with its spatial axes, from axis `first` on, at the centres of `size` voxels."""
    for axis in range(size.shape[0]):
        old, new = tf.shape(volume)[first + axis], size[axis]
        larger = f"{name} is smaller than y_pred: give labels of the finest resolution"
        known = tf.get_static_value(new), volume.shape[first + axis]
        if None not in known and known[0] > known[1]:
            raise ValueError(f"{larger}; their sizes are {known[1]} and {known[0]}")
        with tf.control_dependencies([tf.debugging.assert_less_equal(new, old, larger)]):
            centre = ((2 * tf.range(new) + 1) * old) // (2 * new)
        volume = tf.gather(volume, centre, axis=first + axis)
    return volume


def deep_supervision(loss, outputs, weights="nnunet"):
    """Losses and weights for a network that predicts at several resolutions, the finest first.

    >>> model.compile("adam", **dice_op.losses.deep_supervision(DiceCELoss(), outputs=4))
    >>> model.fit(images, [labels] * 4)

    Args:
      loss: A loss of this module, for each output.
      outputs: Their number, where the model's outputs are a list; or their names, where they are a
        dict: `["full", "half", "quarter"]`.
      weights: One for each output; or `"nnunet"`: halved from one to the next, 0 for the last, of
        sum 1 (Isensee et al., 2021).

    Returns:
      A dict of `loss` and `loss_weights`, as `compile` takes them.

    Raises:
      ValueError: an argument makes no sense.
    """
    names = None if hasattr(outputs, "__index__") else list(outputs)
    count = operator.index(outputs) if names is None else len(names)
    if count < 1 or isinstance(outputs, str):
        raise ValueError(f"outputs is {outputs!r}, but must be a number or a list of names")
    if isinstance(weights, str):
        _arguments.one_of("weights", weights, ("nnunet",))
        halved = [0.5**i for i in range(max(1, count - 1))] + [0.0] * (count > 1)
        weights = [w / sum(halved) for w in halved]
    weights = _arguments.class_weight_list("weights", weights)
    if weights is None or len(weights) != count:
        raise ValueError(f"weights is {weights}, but there are {count} outputs")
    losses = [DownsampledLabels(loss) for _ in weights]
    if names is not None:
        losses, weights = (
            dict(zip(names, losses, strict=True)),
            dict(zip(names, weights, strict=True)),
        )
    return {"loss": losses, "loss_weights": weights}
