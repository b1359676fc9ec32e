"""`SumsLoss`, the base of the losses: from labels and logits by way of the sums to one number."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable

import keras
import tensorflow as tf

from dice_op import _checks, _inputs, _keras, formulas
from dice_op._types import Activation, DataFormat, LabelSets, Reduction, Regions, TensorLike
from dice_op.losses import _compiled
from dice_op.ops import DiceSums, dense_tensor, dice_sums

_keras.require_keras_3_on_tensorflow()


class SumsOptions(typing.TypedDict, total=False):
    """The options of `SumsLoss`, for the losses that hand them on."""

    activation: Activation
    include_background: bool
    squared_pred: bool
    soft_label: bool
    batch: bool
    ignore_label: int | None
    regions: Regions | None
    label_sets: LabelSets | None
    data_format: DataFormat | None
    reduction: Reduction | None
    dtype: str | keras.DTypePolicy | None


class _Reduce(keras.losses.Loss):
    """Applies Keras' reduction to values that are losses already."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return y_pred


class SumsLoss(keras.losses.Loss):
    """Base of the losses that are a formula over `dice_op.dice_sums`; derive your own from it.

    A subclass implements `from_sums`, and lists the names of its own arguments in `_arguments`, so
    that they are saved. Keras casts labels and logits to float32 before `call`. Here both reach the
    op as they are: integer labels stay integers, and half-precision logits stay so.

    Every loss here has these arguments.

    Args:
      activation: What turns `y_pred` into probabilities: `"softmax"`, `"sigmoid"` (also for
        overlapping regions), or `"none"` where the model ends in one already. A softmax on top of a
        softmax is an error where the loss can see it, as the last operation of the model.
      include_background: Whether class 0 counts. In a cross-entropy it always does.
      squared_pred: Whether p and t are squared in P and T (Milletari et al., "V-Net", 2016).
      soft_label: Whether I is the sum of min(p, t), not of p t, for labels that are fractions (Wang
        et al., "Dice Semimetric Losses", 2023). Without it the loss is not smallest where p = t,
        unless `squared_pred` is given. It makes no difference for class indices, and for labels of
        0 and 1.
      batch: Whether the sums are taken over the whole batch and not per sample, as nnU-Net's
        `batch_dice`, and over all replicas of a distribution strategy. Weights per sample then
        enter these sums. Each sample has the loss of the batch, so that the reduction should be a
        mean.
      ignore_label: Voxels with this integer label do not count.
      regions: The label values of each class, for overlapping regions, such as
        `[(1, 2, 3), (2, 3), (3,)]`; with `activation="sigmoid"`.
      label_sets: The classes that a label value may stand for, such as `{200: (0, 2, 3)}`, for data
        in which not every class is annotated (marginal loss; Shi et al., 2021).
        `dice_op.dice_sums` says what such a voxel adds. A class that no voxel of a sample is known
        to belong to is absent from it, so that `absent="skip"` is often wanted as well.
      data_format: `"channels_last"` or `"channels_first"`. None means Keras' setting,
        `keras.config.image_data_format()`, at the time when the loss is made.
      reduction, name, dtype: They are those of every Keras loss. `dtype` is the type of the loss,
        never that of the logits.

    Call:
      y_true: Class indices `[N, spatial...]`, or labels of the shape of `y_pred`. With one class it
        is the mask, `[N, spatial...]` or `[N, spatial..., 1]`, of 0 and 1. `dice_op.dice_sums`
        lists the types.
      y_pred: Logits `[N, spatial..., C]` (or channels first) of any float type.
      sample_weight: `[N]`, or one weight per voxel, `[N, spatial...]`, which enters the sums.

    Keras' layers may attach a mask to `y_pred` (`keras.layers.Masking`, `Embedding`). The voxels
    that it leaves out then have the weight 0, and each sample is weighted by the share of its
    voxels that are left, so that a mean is taken over these voxels, as in Keras' own losses.

    Raises:
      ValueError: An argument has a wrong value, or does not go with another one.
    """

    _arguments: tuple[str, ...] = (
        "activation",
        "include_background",
        "squared_pred",
        "soft_label",
        "batch",
        "ignore_label",
        "regions",
        "label_sets",
        "data_format",
        "dtype",
    )

    def __init__(
        self,
        *,
        activation: Activation = "softmax",
        include_background: bool = True,
        squared_pred: bool = False,
        soft_label: bool = False,
        batch: bool = False,
        ignore_label: int | None = None,
        regions: Regions | None = None,
        label_sets: LabelSets | None = None,
        data_format: DataFormat | None = None,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **unknown: typing.Any,
    ) -> None:
        _checks.refuse_unknown(self, unknown)
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        _checks.one_of("activation", activation, Activation)
        self.activation = activation
        self.include_background = _checks.flag("include_background", include_background)
        self.squared_pred = _checks.flag("squared_pred", squared_pred)
        self.soft_label = _checks.flag("soft_label", soft_label)
        self.batch = _checks.flag("batch", batch)
        self.ignore_label = _checks.label("ignore_label", ignore_label)
        self.regions = _checks.region_list(regions, include_background)
        if self.regions and activation == "softmax":
            raise ValueError(
                'regions overlap, but activation="softmax" gives a voxel one class: use "sigmoid"'
            )
        self.label_sets = _checks.label_set_dict(label_sets)
        _checks.regions_or_label_sets(self.regions, self.label_sets)
        self.data_format = _checks.data_format(data_format)
        self._reduce = _Reduce(name=self.name, reduction=reduction, dtype=dtype)

    def from_sums(self, sums: DiceSums) -> tf.Tensor:
        """The loss of each sample, `[N]` or `[N, classes]`, from a `DiceSums`.

        With `batch` the sums are those of the whole batch, `[1, C]`, and so is the loss.
        """
        raise NotImplementedError

    def sum_options(self) -> dict[str, typing.Any]:
        """Further arguments for `dice_sums`: `cross_entropy`, `focal_gamma`, `label_smoothing`."""
        return {}

    def __call__(
        self, y_true: TensorLike, y_pred: TensorLike, sample_weight: TensorLike | None = None
    ) -> tf.Tensor:
        """The reduced loss.

        Args:
          y_true, y_pred: They are those of `dice_op.dice_sums`.
          sample_weight: A weight per sample, `[N]` or `[N, 1]`; or per voxel, `[N, spatial...]`,
            which enters the sums.
        """
        y_pred = dense_tensor("y_pred", y_pred)
        weights = _inputs.split_weights(sample_weight, y_pred, self.data_format)
        return self._call_with_weights(dense_tensor("y_true", y_true), y_pred, *weights)

    def call(
        self,
        y_true: tf.Tensor,
        y_pred: tf.Tensor,
        voxel_weight: tf.Tensor | None = None,
        sample_weight: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The loss of each sample, `[N]` or `[N, classes]`. The weights enter the sums."""
        return self._losses(self._sums(y_true, y_pred, voxel_weight), sample_weight)

    def overlap_sums(self, sums: DiceSums) -> DiceSums:
        """The sums of the classes that count in an overlap."""
        classes = sums.intersection.shape[1]
        if classes == 1 and self.activation == "softmax":
            raise ValueError(
                "y_pred has one class, whose softmax is 1 everywhere, so that nothing can be "
                'learnt: use activation="sigmoid" (or two classes, background and foreground)'
            )
        _inputs.check_background(classes, self.include_background)
        return sums if self.include_background else formulas.select_classes(sums, 1)

    def get_config(self) -> dict[str, typing.Any]:
        names = [n for c in type(self).__mro__ for n in c.__dict__.get("_arguments", ())]
        return {**super().get_config(), **{n: getattr(self, n) for n in names}}

    def _call_with_weights(
        self,
        y_true: tf.Tensor,
        y_pred: tf.Tensor,
        voxel_weight: tf.Tensor | None,
        weight: tf.Tensor | None,
    ) -> tf.Tensor:
        """The reduced loss. `weight` is `[N]`."""
        _keras.refuse_call_from_tf_keras()
        cross_entropy = self.sum_options().get("cross_entropy", False)
        _inputs.check_not_activated(y_pred, self.activation, cross_entropy)
        _inputs.check_shapes(y_true, y_pred, self.data_format, self._each_sample_counts())
        mask = _inputs.keras_mask(y_pred)
        if mask is not None:
            voxel_weight, share = _inputs.apply_mask(mask, voxel_weight, y_pred, self.data_format)
            if not self.batch:
                weight = self._weight_by_share(weight, share)
        compiled = _compiled.formula_of(self) if _runs_eagerly() else None
        if compiled:
            return compiled(self._sums(y_true, y_pred, voxel_weight), weight)
        of_sums, of_losses = self._place_weight(weight)
        if _takes_weights(type(self).call):
            losses = self.call(y_true, y_pred, voxel_weight, of_sums)
        elif voxel_weight is None and of_sums is None:  # Keras casts both for such a `call`.
            losses = self.call(tf.cast(y_true, self.dtype), tf.cast(y_pred, self.dtype))
        else:
            raise ValueError(
                f"{type(self).__name__}.call takes y_true and y_pred alone, but there are weights "
                "that enter the sums (one per voxel, a Keras mask, or batch=True with weights): "
                "give it the arguments voxel_weight=None, sample_weight=None, and hand them to "
                "super().call, or implement from_sums(self, sums) instead"
            )
        return self._reduced(losses, of_losses)

    def _each_sample_counts(self) -> bool:
        """Whether every sample has an overlap of its own."""
        return not self.batch

    def _weight_by_share(self, weight: tf.Tensor | None, share: tf.Tensor) -> tf.Tensor:
        """Weights per sample, or None, times the share of each sample's voxels that count."""
        if self.reduction in ("mean", "sum_over_batch_size"):
            # The mean is taken over the voxels that count, and not over the whole batch.
            total = tf.cast(tf.size(share), share.dtype)
            share *= tf.math.divide_no_nan(total, tf.reduce_sum(share))
        return share if weight is None else tf.cast(weight, share.dtype) * share

    def _sum_options_of(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> dict[str, typing.Any]:
        """`sum_options` for these labels and logits. A loss that cannot take them raises an
        error."""
        return self.sum_options()

    def _sums(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, voxel_weight: tf.Tensor | None
    ) -> DiceSums:
        return dice_sums(
            y_true,
            y_pred,
            activation=self.activation,
            squared_pred=self.squared_pred,
            soft_label=self.soft_label,
            voxel_weight=voxel_weight,
            ignore_label=self.ignore_label,
            regions=self.regions,
            label_sets=self.label_sets,
            data_format=self.data_format,
            **self._sum_options_of(y_true, y_pred),
        )

    def _reduced_from_sums(self, sums: DiceSums, weight: tf.Tensor | None) -> tf.Tensor:
        of_sums, of_losses = self._place_weight(weight)
        return self._reduced(self._losses(sums, of_sums), of_losses)

    def _place_weight(self, weight: tf.Tensor | None) -> tuple[tf.Tensor | None, tf.Tensor | None]:
        """Splits weights per sample into those of the sums and those of the losses.

        With `batch` there is only one loss, so that they can only enter the sums.
        """
        return (weight, None) if self.batch else (None, weight)

    def _losses(self, sums: DiceSums, sample_weight: tf.Tensor | None) -> tf.Tensor:
        samples = tf.shape(sums.intersection)[:1]
        if sample_weight is not None:
            sums = formulas.weighted(sums, sample_weight)
        if self.batch:
            sums = formulas.over_replicas(formulas.over_batch(sums))
        losses = self.from_sums(sums)
        return tf.broadcast_to(losses, tf.concat([samples, tf.shape(losses)[1:]], 0))

    def _reduced(self, losses: TensorLike, weight: tf.Tensor | None) -> tf.Tensor:
        losses = tf.convert_to_tensor(losses)
        if weight is not None:
            weight = tf.cast(weight, losses.dtype)
            if losses.shape.rank == 2:
                weight = tf.broadcast_to(weight[:, tf.newaxis], tf.shape(losses))
        return self._reduce(losses, losses, weight)


@functools.cache
def _takes_weights(call: Callable[..., tf.Tensor]) -> bool:
    """Whether the method `call` of a loss takes weights. In Keras it takes none."""
    try:
        inspect.signature(call).bind(None, None, None, None, None)
    except TypeError:
        return False
    return True


def _runs_eagerly() -> bool:
    """Whether each operation runs as soon as it is called, and on one device, not on a replica."""
    eager = tf.executing_eagerly() and not tf.config.functions_run_eagerly()
    return eager and not tf.distribute.has_strategy()
