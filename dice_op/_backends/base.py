"""`Backend`: what differs between the frameworks that Keras runs on."""

from __future__ import annotations

import typing

import keras

from dice_op._arrays import Array
from dice_op._sums import DiceSums
from dice_op._types import DataFormat, TensorLike

if typing.TYPE_CHECKING:
    from dice_op.losses import SumsLoss


class Backend:
    """The defaults are those of a framework that knows the shape of every array."""

    def has_float64(self) -> bool:
        return True

    def dense_tensor(self, name: str, value: TensorLike) -> Array:
        """`value` as a tensor. One that is not dense is an error that says what to do about it."""
        return keras.ops.convert_to_tensor(value)

    def dice_sums(self, y_true: Array, y_pred: Array, **options: typing.Any) -> DiceSums:
        """`dice_op.dice_sums` of tensors."""
        raise NotImplementedError

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        """The sums over all replicas or processes that share in the batch."""
        return sums

    def last_activation(self, y_pred: Array) -> typing.Literal["softmax", "sigmoid"] | None:
        """What a tensor is the output of, if that can be seen."""
        return None

    def knows_values(self, tensor: Array) -> bool:
        """Whether the values of a tensor can be looked at now."""
        raise NotImplementedError

    def formula(self, loss: SumsLoss) -> typing.Callable[..., Array] | None:
        """The reduced loss of a `DiceSums` and weights per sample, as a program where that is
        faster.

        It is None where operation by operation is no slower, or where a program cannot be made.
        """
        return None

    # --- for tensors whose shape only the running program knows ---------------

    def split_weights(
        self, weight: Array, y_pred: Array, data_format: DataFormat, voxels: Array | None
    ) -> tuple[Array, Array]:
        """`_inputs.split_weights` for weights of which nobody knows yet whether they are per voxel.

        Both results are arrays. Those that do not apply are ones.
        """
        raise NotImplementedError

    def centres(self, old: Array, new: Array, too_small: str) -> Array:
        """`_inputs._centres` for sizes of which one at least is a tensor."""
        raise NotImplementedError
