"""The formulas of the losses as compiled functions, for calls outside a `tf.function`.

Run operation by operation, the formula takes longer than the sums of a small volume.
"""

from __future__ import annotations

import functools
import json
import typing

import tensorflow as tf

if typing.TYPE_CHECKING:
    from dice_op._sums import DiceSums
    from dice_op.losses._base import SumsLoss


class CompiledFormula:
    """The reduced loss from the sums, compiled once for each number of classes and set of types."""

    def __init__(self, loss: SumsLoss) -> None:
        self._loss = loss
        self._functions: dict[typing.Any, typing.Any] = {}

    def __call__(self, sums: DiceSums, weight: tf.Tensor | None) -> tf.Tensor:
        tensors = [s for s in (*sums, weight) if s is not None]
        classes = sums.intersection.shape[1]
        key = (classes, weight is None, *(t.dtype for t in tensors))
        if key not in self._functions:
            self._functions[key] = self._trace(classes, weight is not None, sums, tensors)
        return self._functions[key](*tensors)

    def _trace(
        self, classes: int, weighted: bool, sums: DiceSums, tensors: list[tf.Tensor]
    ) -> typing.Any:
        def formula(*tensors: tf.Tensor) -> tf.Tensor:
            values = iter(tensors)
            traced = type(sums)(*(None if s is None else next(values) for s in sums))
            return self._loss._reduced_from_sums(traced, next(values) if weighted else None)

        shapes = ([None, classes] if t.shape.rank == 2 else [None] for t in tensors)
        specs = [tf.TensorSpec(s, t.dtype) for s, t in zip(shapes, tensors, strict=True)]
        return tf.function(formula, autograph=False).get_concrete_function(*specs)


def formula_of(loss: SumsLoss) -> CompiledFormula | None:
    """The formula of a loss with its present attributes.

    It is None for classes that users derive, since their formula may depend on more than what the
    configuration holds, and where the configuration cannot be written as JSON.
    """
    kind: typing.Any = type(loss)
    if kind.__module__ != __package__:
        return None
    try:
        config = json.dumps(loss.get_config())
    except TypeError:
        return None
    return _formula(kind, config)


@functools.lru_cache(maxsize=64)
def _formula(kind: typing.Any, config: str) -> CompiledFormula:
    return CompiledFormula(kind.from_config(json.loads(config)))
