"""Keras on TensorFlow, which has graphs, tensors of unknown shape, and distribution strategies."""

from __future__ import annotations

import functools
import json
import os
import typing

import tensorflow as tf

from dice_op import _keras, core, formulas, ops
from dice_op._arrays import channel_axis
from dice_op._backends.base import Backend
from dice_op._sums import DiceSums
from dice_op._types import DataFormat, TensorLike

if typing.TYPE_CHECKING:
    from dice_op.losses import SumsLoss

_keras.require_keras_3()

_Program: typing.TypeAlias = typing.Callable[..., list[tf.Tensor | None]]
_Step: typing.TypeAlias = typing.Callable[..., list[tf.Tensor]]


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
        return _filled(sums, context.all_reduce(tf.distribute.ReduceOp.SUM, _tensors(sums)))

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

    def formula(self, loss: SumsLoss) -> Formula | None:
        if tf.config.functions_run_eagerly():
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


# --- the formula as a program ---------------------------------------------------------------------


@functools.cache
def _xla_takes_the_gpus() -> bool:
    if os.environ.get("DICE_OP_XLA") == "0":
        return False
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus or core.build_info()["cuda"] is None:
        return False
    details = map(tf.config.experimental.get_device_details, gpus)
    # From compute capability 12 on, XLA aborts in TensorFlow 2.21 and before (tensorflow#111958).
    return all(d.get("compute_capability", (0, 0)) < (12, 0) for d in details)


def _on_gpu(tensor: tf.Tensor) -> bool:
    """Whether a tensor is, or in a graph may be, on a GPU that XLA can compile for."""
    return _xla_takes_the_gpus() and "CPU" not in tensor.device


class Formula:
    """The reduced loss from the sums, with as few launches as possible.

    Operation by operation, the formula takes longer than the sums of a small volume. So XLA
    compiles it where a GPU runs it, in graphs too, unless XLA compiles the whole graph anyway. On a
    CPU this would take longer than it saves; there, eager execution gets a function that is traced.
    """

    def __init__(self, loss: SumsLoss) -> None:
        self._loss = loss
        self._programs: dict[typing.Any, _Program] = {}

    def __call__(self, sums: DiceSums, weight: tf.Tensor | None) -> tf.Tensor:
        loss, strategy = self._loss, tf.distribute.has_strategy()
        compiled = _on_gpu(sums.intersection) and not tf.__internal__.get_enclosing_xla_context()
        traced = tf.executing_eagerly() and not strategy
        # XLA leaves out the check of a number of classes that only the running program knows.
        if sums.intersection.shape[1] is None or not (compiled or traced):
            return loss._reduced_from_sums(sums, weight)
        if not (loss.batch and strategy):
            (reduced,) = self._run(_whole, compiled, sums, weight)
            return reduced
        # XLA cannot add up over the replicas, so that this lies between two programs.
        totals = _filled(sums, self._run(_totals, compiled, sums, weight))
        totals = loss.over_replicas(totals)
        (reduced,) = self._run(_reduced_from_totals, compiled, totals, sums.weight_sum)
        return reduced

    def _run(
        self, function: _Step, compiled: bool, sums: DiceSums, of_samples: tf.Tensor | None
    ) -> list[tf.Tensor]:
        """What a step of the formula returns, from a program that is traced once for all sizes of
        a batch. XLA compiles it for each size that it meets."""
        tensors = [*_tensors(sums), *([] if of_samples is None else [of_samples])]
        form = formulas.map_sums(lambda _: True, sums)
        # Keras divides a mean by the number of replicas.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        classes, dtypes = sums.intersection.shape[1], tuple(t.dtype for t in tensors)
        key = (function, compiled, form, classes, dtypes, replicas)
        if key not in self._programs:

            def program(*tensors: tf.Tensor) -> list[tf.Tensor]:
                last = tensors[-1] if len(tensors) > len(_tensors(form)) else None
                return function(self._loss, _filled(form, tensors), last)

            specs = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in tensors]
            if compiled:
                of_logits = {id(s) for s in ops.with_gradient(sums)}
                first = [at for at, t in enumerate(tensors) if id(t) in of_logits]
                self._programs[key] = _compiled(program, specs, first)
            else:
                traced = tf.function(program, autograph=False)
                self._programs[key] = traced.get_concrete_function(*specs)
        return self._programs[key](*tensors)


# The steps of the formula: the sums, and weights or another array of the samples, as tensors.


def _whole(loss: SumsLoss, sums: DiceSums, weight: tf.Tensor | None) -> list[tf.Tensor]:
    return [loss._reduced_from_sums(sums, weight)]


def _totals(loss: SumsLoss, sums: DiceSums, weight: tf.Tensor | None) -> list[tf.Tensor]:
    return _tensors(loss._totals(sums, loss._of_each_sample(weight, sums)))


def _reduced_from_totals(loss: SumsLoss, totals: DiceSums, samples: tf.Tensor) -> list[tf.Tensor]:
    return [loss._reduced(loss._losses_of_totals(totals, samples), None)]


def _tensors(sums: DiceSums) -> list[tf.Tensor]:
    return [s for s in sums if s is not None]


def _filled(form: DiceSums, tensors: typing.Iterable[tf.Tensor]) -> DiceSums:
    """Tensors in the place of the sums that are not None in `form`."""
    values = iter(tensors)
    return formulas.map_sums(lambda _: next(values), form)


def _compiled(
    function: _Program, specs: typing.Sequence[tf.TensorSpec], first: typing.Sequence[int]
) -> _Program:
    """`function` and its gradient as programs that XLA compiles.

    The gradient computes everything anew from the inputs. So the first program writes its results
    alone, which few kernels can do.

    first: the inputs whose gradients are always wanted. Those of the others are a program of their
      own, which a graph leaves out if nothing needs it.
    """
    options = {"autograph": False, "jit_compile": True}
    forward = tf.function(function, **options).get_concrete_function(*specs)
    results = [tf.TensorSpec(t.shape, t.dtype) for t in forward.outputs]

    def gradient_for(wanted: typing.Sequence[int], without: tf.UnconnectedGradients) -> _Program:
        def gradient(*tensors: tf.Tensor) -> list[tf.Tensor | None]:
            inputs, d_results = tensors[: len(specs)], tensors[len(specs) :]
            sources = [inputs[at] for at in wanted]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                found = function(*inputs)
            return tape.gradient(found, sources, d_results, without)

        return tf.function(gradient, **options).get_concrete_function(*specs, *results)

    others = [at for at in range(len(specs)) if at not in first]
    gradients = [
        # The zeros that TensorFlow would make in the place of None are a launch each.
        (first, gradient_for(first, tf.UnconnectedGradients.ZERO)),
        (others, gradient_for(others, tf.UnconnectedGradients.NONE)),
    ]

    @tf.custom_gradient
    def program(*tensors: tf.Tensor) -> typing.Any:
        def gradient(*d_results: tf.Tensor) -> list[tf.Tensor | None]:
            found = [None] * len(tensors)
            # Eager execution runs both.
            for wanted, part in gradients:
                for at, value in zip(wanted, part(*tensors, *d_results), strict=True):
                    found[at] = value
            return found

        return forward(*tensors), gradient

    return program


@functools.lru_cache(maxsize=64)
def _formula(kind: typing.Any, config: str) -> Formula:
    return Formula(kind.from_config(json.loads(config)))


BACKEND = _TensorFlow()
