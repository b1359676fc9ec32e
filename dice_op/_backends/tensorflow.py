"""Keras on TensorFlow, which has graphs, tensors of unknown shape, and distribution strategies."""

from __future__ import annotations

import functools
import json
import typing

import tensorflow as tf

from dice_op import _keras, formulas, ops
from dice_op._arrays import channel_axis
from dice_op._backends.base import Backend
from dice_op._sums import DiceSums
from dice_op._types import DataFormat, TensorLike

if typing.TYPE_CHECKING:
    from dice_op.losses import SumsLoss

_keras.require_keras_3()


class _TensorFlow(Backend):
    def dense_tensor(self, name: str, value: TensorLike) -> tf.Tensor:
        return ops.dense_tensor(name, value)

    def dice_sums(self, y_true: tf.Tensor, y_pred: tf.Tensor, **options: typing.Any) -> DiceSums:
        return ops.dice_sums(y_true, y_pred, **options)

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        if (
            tf.distribute.get_strategy().num_replicas_in_sync == 1
            or tf.distribute.in_cross_replica_context()
        ):
            return sums
        context = tf.distribute.get_replica_context()
        totals = context.all_reduce(tf.distribute.ReduceOp.SUM, [s for s in sums if s is not None])
        totals = iter(totals)
        return formulas.map_sums(lambda _: next(totals), sums)

    def last_activation(self, y_pred: tf.Tensor) -> typing.Literal["softmax", "sigmoid"] | None:
        if not tf.is_symbolic_tensor(y_pred):
            return None
        op = y_pred.op
        while op.type in ("Cast", "Identity"):  # The last layer of a mixed-precision model is one.
            op = op.inputs[0].op
        names: dict[str, typing.Literal["softmax", "sigmoid"]]
        names = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
        return names.get(op.type)

    def knows_values(self, tensor: tf.Tensor) -> bool:
        return not tf.is_symbolic_tensor(tensor)

    def compiled_formula(self, loss: SumsLoss) -> CompiledFormula | None:
        """Run operation by operation, the formula takes longer than the sums of a small volume."""
        eager = tf.executing_eagerly() and not tf.config.functions_run_eagerly()
        # On a replica the formula has to add up over the others.
        if not eager or tf.distribute.has_strategy():
            return None
        kind: typing.Any = type(loss)
        # The formula of a class that users derive may depend on more than what its configuration
        # holds.
        if kind.__module__ != "dice_op.losses":
            return None
        try:
            config = json.dumps(loss.get_config())
        except TypeError:
            return None
        return _formula(kind, config)

    # --- tensors whose shape only the running program knows -------------------

    def split_weights(
        self,
        weight: tf.Tensor,
        y_pred: tf.Tensor,
        data_format: DataFormat,
        voxels: tf.Tensor | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One program serves both kinds of weights, and the sizes decide.

        A tf.cond is no way out: XLA compiles both of its branches, and in one of them the shape
        does not fit.
        """
        column = tf.logical_and(tf.rank(weight) == 2, tf.reduce_all(tf.shape(weight)[1:] == 1))
        volumes = tf.logical_and(tf.rank(weight) > 1, tf.rank(y_pred) > 2)
        per_voxel = tf.logical_and(volumes, tf.logical_not(column))
        if not weight.dtype.is_floating:
            weight = tf.cast(weight, tf.float32)
        if voxels is None:
            shape = tf.shape(y_pred)
            axis = channel_axis(data_format) % tf.rank(y_pred)
            voxels = tf.concat([shape[:axis], shape[axis + 1 :]], 0)
        samples, volume = tf.shape(y_pred)[0], tf.reduce_prod(voxels[1:])
        table = tf.reshape(weight, tf.where(per_voxel, [samples, volume], [tf.size(weight), 1]))
        of_voxels = tf.where(per_voxel, table, tf.ones_like(table))
        of_samples = tf.where(per_voxel, tf.ones([], weight.dtype), tf.reduce_sum(table[:, :1], 1))
        return (
            tf.reshape(tf.broadcast_to(of_voxels, [samples, volume]), voxels),
            tf.broadcast_to(of_samples, [samples]),
        )

    def centres(self, old: tf.Tensor, new: tf.Tensor, too_small: str) -> tf.Tensor:
        with tf.control_dependencies([tf.debugging.assert_less_equal(new, old, too_small)]):
            return ((2 * tf.range(new) + 1) * old) // (2 * new)


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


@functools.lru_cache(maxsize=64)
def _formula(kind: typing.Any, config: str) -> CompiledFormula:
    return CompiledFormula(kind.from_config(json.loads(config)))


BACKEND = _TensorFlow()
