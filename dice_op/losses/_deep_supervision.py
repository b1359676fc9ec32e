"""Losses for networks that predict at several resolutions, against labels of the finest one."""

from __future__ import annotations

import operator
import typing
from collections.abc import Sequence

import keras
import tensorflow as tf

from dice_op import _checks, _inputs
from dice_op._types import TensorLike
from dice_op.losses._base import SumsLoss
from dice_op.ops import dense_tensor

_Scheme = typing.Literal["nnunet"]


@keras.saving.register_keras_serializable(package="dice_op")
class DownsampledLabels(keras.losses.Loss):
    """A loss for one resolution of a deeply supervised network, against labels of the full one.

    Each voxel of `y_pred` is compared with the label at its centre (nearest neighbour). Only class
    indices of the size of the prediction are made for that. Where the sizes are equal, this is the
    same as `loss`.

    Args:
      loss: A loss of this module.

    Call:
      y_true, sample_weight: They are those of `loss`, but may be larger.
    """

    def __init__(self, loss: SumsLoss, *, name: str | None = None) -> None:
        if not isinstance(loss, SumsLoss):
            raise ValueError(f"loss is {loss!r}, but must be a loss of dice_op.losses")
        super().__init__(name=name or loss.name, reduction=loss.reduction)
        self.loss = loss

    def __call__(
        self, y_true: TensorLike, y_pred: TensorLike, sample_weight: TensorLike | None = None
    ) -> tf.Tensor:
        y_pred = dense_tensor("y_pred", y_pred)
        data_format = self.loss.data_format
        first = _inputs.first_spatial_axis(data_format)
        rank = y_pred.shape.rank
        size = rank and tf.shape(y_pred)[first : first + rank - 2]

        def resampled(name: str, volume: tf.Tensor) -> tf.Tensor:
            if rank is None or volume.shape.rank not in (rank - 1, rank):
                raise ValueError(
                    f"{name} has shape {volume.shape}, and y_pred {y_pred.shape}: {name} must have "
                    "the axes [N, spatial...], or those of y_pred; where they are not known, "
                    "tf.ensure_shape tells them"
                )
            return _nearest(name, volume, size, first if volume.shape.rank == rank else 1)

        y_true = dense_tensor("y_true", y_true)
        full = tf.shape(y_true)
        if y_true.shape.rank == rank:  # There is an axis of channels.
            full = _inputs.voxel_shape(y_true, data_format)
        labels = resampled("y_true", y_true)
        voxel_weight, weight = _inputs.split_weights(sample_weight, y_pred, data_format, full)
        if voxel_weight is not None:
            if voxel_weight.shape.rank is None:
                voxel_weight = tf.reshape(voxel_weight, full)
                voxel_weight.set_shape([None] * (rank - 1))
            voxel_weight = resampled("sample_weight", voxel_weight)
        if voxel_weight is None or weight is None:
            return self.loss(labels, y_pred, weight if voxel_weight is None else voxel_weight)
        # Keras' `sample_weight` is one tensor. These two stand for weights of an unknown kind.
        return self.loss._call_with_weights(labels, y_pred, voxel_weight, weight)

    def get_config(self) -> dict[str, typing.Any]:
        return {"loss": keras.losses.serialize(self.loss), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, typing.Any]) -> DownsampledLabels:
        return cls(keras.losses.deserialize(config["loss"]), name=config["name"])


def _nearest(name: str, volume: tf.Tensor, size: tf.Tensor, first: int) -> tf.Tensor:
    """The values of `volume` at the centres of `size` voxels along the axes from `first` on."""
    for axis in range(size.shape[0]):
        old, new = tf.shape(volume)[first + axis], size[axis]
        too_small = f"{name} is smaller than y_pred: give labels of the finest resolution"
        known = tf.get_static_value(new), volume.shape[first + axis]
        if None not in known and known[0] > known[1]:
            raise ValueError(f"{too_small}; their sizes are {known[1]} and {known[0]}")
        with tf.control_dependencies([tf.debugging.assert_less_equal(new, old, too_small)]):
            centre = ((2 * tf.range(new) + 1) * old) // (2 * new)
        volume = tf.gather(volume, centre, axis=first + axis)
    return volume


def deep_supervision(
    loss: SumsLoss,
    outputs: typing.SupportsIndex | Sequence[str],
    weights: _Scheme | Sequence[float] = "nnunet",
) -> dict[str, typing.Any]:
    """Losses and weights for a network that predicts at several resolutions, the finest first.

    >>> model.compile("adam", **dice_op.losses.deep_supervision(DiceCELoss(), outputs=4))
    >>> model.fit(images, [labels] * 4)

    Args:
      loss: A loss of this module, for each output.
      outputs: The number of outputs, where the model returns a list; or their names, where it
        returns a dict: `["full", "half", "quarter"]`.
      weights: One weight for each output; or `"nnunet"`: they are halved from one output to the
        next, the last one is 0, and their sum is 1 (Isensee et al., 2021).

    Returns:
      A dict of `loss` and `loss_weights`, as `compile` takes them.

    Raises:
      ValueError: An argument has a wrong value.
    """
    names: list[str] | None = None
    if isinstance(outputs, typing.SupportsIndex):
        count = operator.index(outputs)
    else:
        names = list(outputs)
        count = len(names)
    if count < 1 or isinstance(outputs, str):
        raise ValueError(f"outputs is {outputs!r}, but must be a number or a list of names")
    if isinstance(weights, str):
        _checks.one_of("weights", weights, _Scheme)
        halved = [0.5**i for i in range(max(1, count - 1))] + [0.0] * (count > 1)
        weights = [w / sum(halved) for w in halved]
    checked = _checks.weight_list("weights", weights)
    if checked is None or len(checked) != count:
        raise ValueError(f"weights is {checked}, but there are {count} outputs")
    losses = [DownsampledLabels(loss) for _ in checked]
    if names is None:
        return {"loss": losses, "loss_weights": checked}
    return {
        "loss": dict(zip(names, losses, strict=True)),
        "loss_weights": dict(zip(names, checked, strict=True)),
    }
