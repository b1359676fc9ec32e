"""Keras on JAX."""

from __future__ import annotations

import typing

import jax
from jax.experimental import sparse

from dice_op import jax as front_end
from dice_op._arrays import Array
from dice_op._backends.base import Backend
from dice_op._sums import DiceSums
from dice_op._types import TensorLike


class _Jax(Backend):
    # A batch that is sharded over devices is one array, so that its sums are those of all devices.

    def has_float64(self) -> bool:
        return bool(jax.config.jax_enable_x64)

    def dense_tensor(self, name: str, value: TensorLike) -> Array:
        if isinstance(value, sparse.JAXSparse):
            raise TypeError(f"{name} is a {type(value).__name__}, but must be dense: call todense")
        return super().dense_tensor(name, value)

    def dice_sums(self, y_true: Array, y_pred: Array, **options: typing.Any) -> DiceSums:
        return front_end.dice_sums(y_pred, y_true, **options)

    def knows_values(self, tensor: Array) -> bool:
        return not isinstance(tensor, jax.core.Tracer)


BACKEND = _Jax()
