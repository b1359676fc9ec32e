"""Losses for networks that predict at several resolutions, against labels of the finest one."""

from __future__ import annotations

import operator
import typing
from collections.abc import Sequence

import keras
from keras import ops

from dice_op import _checks, _inputs
from dice_op._arrays import Array, known_shape
from dice_op._backends import backend
from dice_op._types import TensorLike
from dice_op.losses._base import SumsLoss

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
    ) -> Array:
        mask = _inputs.keras_mask(y_pred)
        y_pred = backend.dense_tensor("y_pred", y_pred)
        y_true = backend.dense_tensor("y_true", y_true)
        data_format = self.loss.data_format
        predicted, given = known_shape(y_pred), known_shape(y_true)
        full = None  # [N, spatial...] of the labels
        if given and predicted and len(given) == len(predicted):
            full = _inputs.voxel_shape(y_true, data_format)
        elif given:
            full = list(ops.shape(y_true))
        voxel_weight, weight = _inputs.split_weights(sample_weight, y_pred, data_format, full)
        labels = _inputs.resampled("y_true", y_true, y_pred, data_format)
        if voxel_weight is not None:
            voxel_weight = _inputs.resampled("sample_weight", voxel_weight, y_pred, data_format)
        derived = type(self.loss).__call__ is not SumsLoss.__call__
        if derived and (voxel_weight is None or weight is None):
            return self.loss(labels, y_pred, weight if voxel_weight is None else voxel_weight)
        return self.loss._call_with_weights(labels, y_pred, voxel_weight, weight, mask)

    def get_config(self) -> dict[str, typing.Any]:
        return {"loss": keras.losses.serialize(self.loss), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, typing.Any]) -> DownsampledLabels:
        return cls(keras.losses.deserialize(config["loss"]), name=config["name"])


def deep_supervision(
    loss: SumsLoss,
    outputs: typing.SupportsIndex | Sequence[str],
    weights: _Scheme | Sequence[float] = "nnunet",
) -> dict[str, typing.Any]:
    """Losses and weights for a network that predicts at several resolutions, the finest first.

    >>> loss = dice_op.losses.DiceCELoss()
    >>> model.compile("adam", **dice_op.losses.deep_supervision(loss, outputs=4))
    >>> model.fit(images, [labels] * 4)

    Args:
      loss: A loss of this module, for each output.
      outputs: The number of outputs, where the model returns a list; or their names, where it
        returns a dict: `["full", "half", "quarter"]`.
      weights: One weight for each output; or `"nnunet"`: they are halved from one output to the
        next, the last one is 0, and their sum is 1 (Isensee et al., 2021). With two outputs, only
        the first one learns then.

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
