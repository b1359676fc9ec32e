"""Keras on PyTorch."""

from __future__ import annotations

import typing

import keras
import torch

from dice_op import torch as front_end
from dice_op._arrays import Array
from dice_op._backends.base import Backend
from dice_op._sums import DiceSums
from dice_op._types import TensorLike


class _Torch(Backend):
    def dense_tensor(self, name: str, value: TensorLike) -> torch.Tensor:
        tensor = value if isinstance(value, torch.Tensor) else torch.empty(0)
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(
                f"{name} is a sparse or nested tensor, but must be a dense one: call to_dense, or "
                "pad the samples to one shape"
            )
        return keras.ops.convert_to_tensor(value)

    def dice_sums(self, y_true: Array, y_pred: Array, **options: typing.Any) -> DiceSums:
        return front_end.dice_sums(y_pred, y_true, **options)

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        return front_end.over_processes(sums)

    def last_activation(self, y_pred: torch.Tensor) -> typing.Literal["softmax", "sigmoid"] | None:
        step = y_pred.grad_fn
        while step is not None and step.name() == "ToCopyBackward0":  # of mixed precision
            step = step.next_functions[0][0]
        name = "" if step is None else step.name()
        names: dict[str, typing.Literal["softmax", "sigmoid"]]
        names = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}
        return names.get(name)

    def knows_values(self, tensor: torch.Tensor) -> bool:
        return not tensor.is_meta and not torch.compiler.is_compiling()


BACKEND = _Torch()
