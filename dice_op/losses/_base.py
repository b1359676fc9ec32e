"""`SumsLoss`, the base of the losses: how Keras calls them, under TensorFlow."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable

import keras
import tensorflow as tf

from dice_op import _family, _inputs, _keras, formulas
from dice_op._sums import DiceSums
from dice_op._types import DataFormat, Reduction, TensorLike
from dice_op.losses import _compiled
from dice_op.ops import dense_tensor, dice_sums

_keras.require_keras_3_on_tensorflow()


class _Reduce(keras.losses.Loss):
    """Applies Keras' reduction to values that are losses already."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return y_pred


class SumsLoss(_family.SumsLoss, keras.losses.Loss):
    __doc__ = _family.SumsLoss.__doc__

    def __init__(
        self,
        *,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **options: typing.Any,
    ) -> None:
        name = name or _snake_case(type(self).__name__)
        keras.losses.Loss.__init__(self, name=name, reduction=reduction, dtype=dtype)
        super().__init__(**options)
        self._reduce = _Reduce(name=name, reduction=reduction, dtype=dtype)

    def default_data_format(self) -> DataFormat:
        return typing.cast(DataFormat, keras.config.image_data_format())

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
        return self.losses_of(self._sums(y_true, y_pred, voxel_weight), sample_weight)

    def get_config(self) -> dict[str, typing.Any]:
        config = keras.losses.Loss.get_config(self)
        return {**config, "dtype": self.dtype, **self.options()}

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
        _inputs.check_shapes(y_true, y_pred, self.data_format, self.each_sample_counts())
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

    def _weight_by_share(self, weight: tf.Tensor | None, share: tf.Tensor) -> tf.Tensor:
        """Weights per sample, or None, times the share of each sample's voxels that count."""
        if self.reduction in ("mean", "sum_over_batch_size"):
            # The mean is taken over the voxels that count, and not over the whole batch.
            total = tf.cast(tf.size(share), share.dtype)
            share *= tf.math.divide_no_nan(total, tf.reduce_sum(share))
        return share if weight is None else tf.cast(weight, share.dtype) * share

    def _sums(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, voxel_weight: tf.Tensor | None
    ) -> DiceSums:
        data_format = self.data_format
        rank = y_pred.shape.rank
        classes = rank and y_pred.shape[_inputs.channel_axis(data_format)]

        def are_soft() -> bool:
            options = {"ignore_label": self.ignore_label, "regions": self.regions}
            return _inputs.are_soft(y_true, y_pred, data_format, **options)

        options = self.options_of_sums(classes, are_soft)
        return dice_sums(y_true, y_pred, voxel_weight=voxel_weight, **options)

    def _reduced_from_sums(self, sums: DiceSums, weight: tf.Tensor | None) -> tf.Tensor:
        of_sums, of_losses = self._place_weight(weight)
        return self._reduced(self.losses_of(sums, of_sums), of_losses)

    def _place_weight(self, weight: tf.Tensor | None) -> tuple[tf.Tensor | None, tf.Tensor | None]:
        """Splits weights per sample into those of the sums and those of the losses.

        With `batch` there is only one loss, so that they can only enter the sums.
        """
        return (weight, None) if self.batch else (None, weight)

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        """The sums over all replicas of a distribution strategy."""
        if (
            tf.distribute.get_strategy().num_replicas_in_sync == 1
            or tf.distribute.in_cross_replica_context()
        ):
            return sums
        context = tf.distribute.get_replica_context()
        totals = context.all_reduce(tf.distribute.ReduceOp.SUM, [s for s in sums if s is not None])
        totals = iter(totals)
        return formulas.map_sums(lambda _: next(totals), sums)

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


def _snake_case(name: str) -> str:
    """`"DiceCELoss"` as `"dice_ce_loss"`, the name that Keras shows."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
