"""`SumsLoss`, the base of the losses: how Keras calls them."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable

import keras
from keras import ops

from dice_op import _family, _inputs, _keras
from dice_op._arrays import Array
from dice_op._backends import backend
from dice_op._sums import DiceSums
from dice_op._types import DataFormat, Reduction, TensorLike


class _Reduce(keras.losses.Loss):
    """Applies Keras' reduction to values that are losses already."""

    def call(self, y_true: Array, y_pred: Array) -> Array:
        return y_pred


class SumsLoss(_family.SumsLoss, keras.losses.Loss):
    __doc__ = _family.SumsLoss.__doc__
    _call_takes_weights = True

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

    def __init_subclass__(cls, **options: typing.Any) -> None:
        super().__init_subclass__(**options)
        cls._call_takes_weights = _takes_weights(cls.call)

    def default_data_format(self) -> DataFormat:
        return typing.cast(DataFormat, keras.config.image_data_format())

    def __call__(
        self, y_true: TensorLike, y_pred: TensorLike, sample_weight: TensorLike | None = None
    ) -> Array:
        """The reduced loss.

        Args:
          y_true, y_pred: They are those of `dice_op.dice_sums`.
          sample_weight: A weight per sample, `[N]` or `[N, 1]`; or per voxel, `[N, spatial...]`,
            which enters the sums.
        """
        mask = _inputs.keras_mask(y_pred)  # torch.compile loses sight of it later
        y_pred = backend.dense_tensor("y_pred", y_pred)
        weights = _inputs.split_weights(sample_weight, y_pred, self.data_format)
        y_true = backend.dense_tensor("y_true", y_true)
        return self._call_with_weights(y_true, y_pred, *weights, mask)

    def call(
        self,
        y_true: Array,
        y_pred: Array,
        voxel_weight: Array | None = None,
        sample_weight: Array | None = None,
    ) -> Array:
        """The loss of each sample, `[N]` or `[N, classes]`. The weights enter the sums."""
        return self.losses_of(self._sums(y_true, y_pred, voxel_weight), sample_weight)

    def get_config(self) -> dict[str, typing.Any]:
        config = keras.losses.Loss.get_config(self)
        return {**config, "dtype": self.dtype, **self.options()}

    def _call_with_weights(
        self,
        y_true: Array,
        y_pred: Array,
        voxel_weight: Array | None,
        weight: Array | None,
        mask: Array | None,
    ) -> Array:
        """The reduced loss. `weight` is `[N]` or `[1]`, `mask` the one of Keras' layers."""
        _keras.refuse_call_from_tf_keras()
        cross_entropy = self.sum_options().get("cross_entropy", False)
        _inputs.check_not_activated(y_pred, self.activation, cross_entropy)
        _inputs.check_shapes(y_true, y_pred, self.data_format, self.each_sample_counts())
        if mask is not None:
            voxel_weight, share = _inputs.apply_mask(mask, voxel_weight, y_pred, self.data_format)
            if not self.batch:
                weight = self._weight_by_share(weight, share)
        formula = backend.formula(self)
        if formula:
            return formula(self._sums(y_true, y_pred, voxel_weight), weight)
        if weight is not None:
            weight = ops.broadcast_to(weight, [ops.shape(y_pred)[0]])
        of_sums, of_losses = self._place_weight(weight)
        if self._call_takes_weights:
            losses = self.call(y_true, y_pred, voxel_weight, of_sums)
        elif voxel_weight is None and of_sums is None:  # Keras casts both for such a `call`.
            losses = self.call(ops.cast(y_true, self.dtype), ops.cast(y_pred, self.dtype))
        else:
            raise ValueError(
                f"{type(self).__name__}.call takes y_true and y_pred alone, but there are weights "
                "that enter the sums (one per voxel, a Keras mask, or batch=True with weights): "
                "give it the arguments voxel_weight=None, sample_weight=None, and hand them to "
                "super().call, or implement from_sums(self, sums) instead"
            )
        return self._reduced(losses, of_losses)

    def _weight_by_share(self, weight: Array | None, share: Array) -> Array:
        """Weights per sample, or None, times the share of each sample's voxels that count."""
        if self.reduction in ("mean", "sum_over_batch_size"):
            # The mean is taken over the voxels that count, and not over the whole batch.
            share *= ops.divide_no_nan(ops.ones_like(share), ops.mean(share))
        return share if weight is None else ops.cast(weight, share.dtype) * share

    def _sums(self, y_true: Array, y_pred: Array, voxel_weight: Array | None) -> DiceSums:
        data_format = self.data_format

        def are_soft() -> bool:
            options = {"ignore_label": self.ignore_label, "regions": self.regions}
            return _inputs.are_soft(y_true, y_pred, data_format, **options)

        options = self.options_of_sums(_inputs.classes_of(y_pred, data_format), are_soft)
        return backend.dice_sums(y_true, y_pred, voxel_weight=voxel_weight, **options)

    def _reduced_from_sums(self, sums: DiceSums, weight: Array | None) -> Array:
        of_sums, of_losses = self._place_weight(self._of_each_sample(weight, sums))
        return self._reduced(self.losses_of(sums, of_sums), of_losses)

    def _of_each_sample(self, weight: Array | None, sums: DiceSums) -> Array | None:
        """Weights per sample, `[N]`, from those that may be one for all, `[1]`."""
        return None if weight is None else ops.broadcast_to(weight, ops.shape(sums.weight_sum))

    def _place_weight(self, weight: Array | None) -> tuple[Array | None, Array | None]:
        """Splits weights per sample into those of the sums and those of the losses.

        With `batch` there is only one loss, so that they can only enter the sums.
        """
        return (weight, None) if self.batch else (None, weight)

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        """The sums over all replicas or processes that share in the batch."""
        return backend.over_replicas(sums)

    def _reduced(self, losses: TensorLike, weight: Array | None) -> Array:
        losses = ops.convert_to_tensor(losses)
        if weight is not None:
            weight = ops.cast(weight, losses.dtype)
            if len(losses.shape) == 2:
                weight = ops.broadcast_to(weight[:, None], ops.shape(losses))
        return self._reduce(losses, losses, weight)


def _takes_weights(call: Callable[..., Array]) -> bool:
    """Whether the method `call` of a loss takes weights. In Keras it takes none."""
    try:
        inspect.signature(call).bind(None, None, None, None, None)
    except TypeError:
        return False
    return True


def _snake_case(name: str) -> str:
    """`"DiceCELoss"` as `"dice_ce_loss"`, the name that Keras shows."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
