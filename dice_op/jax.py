"""The fused sums and losses for JAX, by the same kernels.

>>> loss = dice_op.jax.DiceCELoss()
>>> value, gradient = jax.value_and_grad(loss)(logits, labels)

They work under `jit`, `grad`, `vmap` and on sharded arrays, and can be differentiated twice, in
reverse mode.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from dice_op import _family, _text, composite, core
from dice_op._arrays import channel_axis
from dice_op._sums import DiceSums
from dice_op._types import DataFormat

Array: typing.TypeAlias = jax.Array

if not hasattr(core, "ffi_targets"):
    raise ImportError(
        "this build of dice_op does not serve JAX, because it was made without XLA's header: "
        "install jaxlib and build again, or build without --no-build-isolation"
    )


def _refusal() -> str | None:
    """Why the running JAX refuses the handlers, or None.

    JAX itself would not say so before its first computation, and then compute nothing at all.
    """
    if jax.__version_info__ < (0, 7):
        return f"dice_op.jax needs JAX 0.7 or later, but JAX {jax.__version__} is installed"
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    text = header.read_text(encoding="utf-8") if header.exists() else ""
    running = re.findall(r"#define XLA_FFI_API_M(?:AJ|IN)OR (\d+)", text)
    built = core.build_info()["ffi"]
    if not running or [int(n) for n in built.split(".")] <= [int(n) for n in running]:
        return None
    return (
        f"this build of dice_op does not serve JAX {jax.__version__}: its handlers were compiled "
        f"with version {built} of XLA's foreign function interface, but jaxlib "
        f"{jaxlib.__version__} has version {'.'.join(running)}, and refuses later ones. Install a "
        "later JAX, or build dice_op where jaxlib==0.5.* is installed"
    )


_problem = _refusal()
if _problem:
    raise ImportError(_problem)
for _platform, _handlers in core.ffi_targets().items():
    for _name, _handler in _handlers.items():
        jax.ffi.register_ffi_target(_name, _handler, platform=_platform)


# --- the calls of XLA's handlers ------------------------------------------------------------------


def _attributes(text: str) -> dict[str, typing.Any]:
    """The handlers take each number as float64."""
    given = _text.attributes(text)
    return {k: np.float64(v) if isinstance(v, float) else v for k, v in given.items()}


def _inside_shard_map() -> bool:
    """Whether arrays are the parts of one device. Nothing is left to shard then."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _struct(shape: typing.Sequence[int], dtype: typing.Any, *inputs: Array) -> typing.Any:
    """What a result of these inputs looks like."""
    if not _inside_shard_map():
        return jax.ShapeDtypeStruct(shape, dtype)

    # It differs between the same devices as a sum of all inputs. Each version of JAX has another
    # way to say so.
    def as_wide(*inputs: Array) -> Array:
        return jnp.full(shape, 1, dtype) * sum(jnp.sum(x) for x in inputs).astype(dtype)

    return jax.eval_shape(as_wide, *inputs)


def _results(text: str, logits: Array, *others: Array) -> list[typing.Any]:
    """What the sums of these logits look like. A sum that is not asked for has no classes."""
    wide = jnp.float64 if _text.counts(text) else jnp.float32
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(logits.dtype, wide))
    return [_struct(s, dtype, logits, *others) for s in _text.shapes(text, logits.shape)]


def _call_sums(text: str, logits: Array, labels: Array, *weight: Array) -> tuple[Array, ...]:
    """The sums that are asked for."""
    spatial = logits.shape[1:-1] if _text.is_last(text) else logits.shape[2:]
    n, c = logits.shape[0], logits.shape[-1 if _text.is_last(text) else 1]
    # Nobody knows yet on which platform this will run, so that there is enough for each that can.
    sizes = []
    for platform in core.ffi_targets():
        with contextlib.suppress(NotImplementedError):  # A GPU says so itself, if it is to run.
            sizes.append(core.ffi_workspace(platform, n, math.prod(spatial), c))
    workspace = max(sizes)
    given = logits, labels, *weight
    results = [*_results(text, *given), _struct((workspace,), jnp.uint8, *given)]
    found = jax.ffi.ffi_call("dice_op_sums", results)(logits, labels, *weight, **_attributes(text))
    named = zip(DiceSums._fields, found, strict=False)
    return tuple(value for name, value in named if name in _text.asked(text))


def _call_gradient(text: str, logits: Array, labels: Array, *rest: Array) -> Array:
    """rest: the weight, if there is one, and the derivatives of the sums that have a gradient."""
    given = [name for name, has_gradient in _text.asked(text).items() if has_gradient]
    weight, d = rest[: len(rest) - len(given)], dict(zip(given, rest[-len(given) :], strict=True))
    results = dict(zip(DiceSums._fields, _results(text, logits), strict=True))
    every = core.asked_sums(activation="sigmoid", cross_entropy=True) | {"distance_sum": True}
    d_sums = [
        d[name] if name in d else jnp.zeros((logits.shape[0], 0), results[name].dtype)
        for name in DiceSums._fields
        if every.get(name)
    ]
    result = _struct(logits.shape, logits.dtype, logits, labels, *rest)
    call = jax.ffi.ffi_call("dice_op_sums_grad", result)
    return call(logits, labels, *weight, *d_sums, **_attributes(text))


# --- on sharded arrays, and under vmap ------------------------------------------------------------
#
# Samples and voxels may be sharded, but classes may not. Each device computes the sums of its own
# part, and what crosses devices are these [N, C] numbers.


def _axes(text: str, ndim: int) -> list[str]:
    """A letter for each axis of the logits: n, those of the voxels, and c."""
    spatial = [f"s{i}" for i in range(ndim - 2)]
    return ["n", *spatial, "c"] if _text.is_last(text) else ["n", "c", *spatial]


# Coverage is not measured where XLA calls a function on a thread of its own.
def _axes_of(  # pragma: no cover - on XLA's threads
    array: typing.Any, text: str, logits_ndim: int
) -> list[str]:
    axes = _axes(text, logits_ndim)
    return axes if len(array.shape) == logits_ndim else [a for a in axes if a != "c"]


def _specs(  # pragma: no cover - on XLA's threads
    text: str, logits: typing.Any
) -> dict[str, typing.Any]:
    """The mesh axes over which each axis of the logits is sharded."""
    axes = _axes(text, len(logits.shape))
    spec = [*logits.sharding.spec, *[None] * len(axes)]
    return {a: None if a == "c" else spec[i] for i, a in enumerate(axes)}


def _flat(spec: typing.Any) -> tuple[str, ...]:  # pragma: no cover - on XLA's threads
    return () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)


def _partition(  # pragma: no cover - on XLA's threads
    text: str, mesh: typing.Any, arguments: typing.Any, result: typing.Any, is_gradient: bool
) -> typing.Any:
    call = _call_gradient if is_gradient else _call_sums
    logits = arguments[0]
    ndim, specs = len(logits.shape), _specs(text, arguments[0])

    def sharding(axes: list[str]) -> NamedSharding:
        return NamedSharding(logits.sharding.mesh, PartitionSpec(*(specs[a] for a in axes)))

    given = []
    volumes = len(arguments)
    if is_gradient:
        volumes -= sum(_text.asked(text).values())
    for i, array in enumerate(arguments):
        of_volume = _axes_of(array, text, ndim)
        given.append(sharding(of_volume if i < volumes else ["n", "c"]))
    if is_gradient:
        return mesh, functools.partial(call, text), sharding(_axes(text, ndim)), tuple(given)
    over = tuple(name for a, spec in specs.items() if a.startswith("s") for name in _flat(spec))

    def lowered(*local: Array) -> tuple[Array, ...]:
        sums = call(text, *local)
        return tuple(jax.lax.psum(s, over) for s in sums) if over else sums

    results = tuple(sharding(["n", "c"][: len(r.shape)]) for r in result)
    return mesh, lowered, results, tuple(given)


def _rule(text: str, mesh: typing.Any, arguments: typing.Any, results: typing.Any,
          is_gradient: bool) -> typing.Any:  # fmt: skip
    """The same for the compiler's own propagation, as an expression such as
    `n s0 c, n s0 -> n c, n`."""
    ndim = arguments[0].rank
    volumes = len(arguments) - (sum(_text.asked(text).values()) if is_gradient else 0)
    axes = _axes(text, ndim)

    def words(value: typing.Any, of_volume: bool) -> str:
        if not of_volume:
            return " ".join(["n", "c"][: value.rank])
        return " ".join(axes if value.rank == ndim else [a for a in axes if a != "c"])

    left = ", ".join(words(a, i < volumes) for i, a in enumerate(arguments))
    right = ", ".join(words(r, is_gradient) for r in results)
    return f"{left} -> {right}"


@functools.lru_cache(maxsize=128)
def _op(text: str, is_gradient: bool) -> typing.Callable[..., typing.Any]:
    """One of the two calls with these options, for sharded arrays and under vmap."""
    call = _call_gradient if is_gradient else _call_sums

    @custom_partitioning
    def sharded(*arrays: Array) -> typing.Any:
        return call(text, *arrays)

    sharded.def_partition(
        partition=lambda mesh, arguments, result: _partition(
            text, mesh, arguments, result, is_gradient
        ),
        sharding_rule=lambda mesh, arguments, results: _rule(
            text, mesh, arguments, results, is_gradient
        ),
    )

    @jax.custom_batching.custom_vmap
    def batched(*arrays: Array) -> typing.Any:
        return call(text, *arrays) if _inside_shard_map() else sharded(*arrays)

    @batched.def_vmap
    def _(size: int, is_batched: typing.Any, *arrays: Array) -> typing.Any:
        # The new axis and that of the samples become one.
        whole = [
            a if b else jnp.broadcast_to(a, (size, *a.shape))
            for a, b in zip(arrays, is_batched, strict=True)
        ]
        n = whole[0].shape[1]
        found = batched(*(a.reshape(size * n, *a.shape[2:]) for a in whole))
        again = jax.tree.map(lambda f: f.reshape(size, n, *f.shape[1:]), found)
        return again, jax.tree.map(lambda _: True, again)

    return batched


# --- derivatives ----------------------------------------------------------------------------------


def _composite(text: str, logits: Array, labels: Array, weight: Array | None) -> tuple[Array, ...]:
    given = [] if weight is None else [weight]
    sums = composite.sums(logits, labels, given, **_text.for_composite(text))
    named = zip(DiceSums._fields, sums, strict=True)
    return tuple(value for name, value in named if name in _text.asked(text))


def _with_gradient(text: str, sums: typing.Sequence[Array]) -> tuple[Array, ...]:
    has_gradient = _text.asked(text).values()
    return tuple(s for s, has in zip(sums, has_gradient, strict=True) if has)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(text: str, logits: Array, labels: Array, weight: Array | None) -> tuple[Array, ...]:
    given = () if weight is None else (weight,)
    return typing.cast(tuple[Array, ...], _op(text, False)(logits, labels, *given))


def _sums_forward(
    text: str, logits: typing.Any, labels: typing.Any, weight: typing.Any
) -> typing.Any:
    inputs = logits.value, labels.value, None if weight is None else weight.value
    others = labels.perturbed, weight is not None and weight.perturbed
    return _sums(text, *inputs), (inputs, others)


def _sums_backward(text: str, kept: typing.Any, d_sums: typing.Any) -> typing.Any:
    (logits, labels, weight), others = kept
    if _text.counts(text):  # They have no gradient.
        return jnp.zeros_like(logits), None, None
    d_sums = tuple(
        jnp.zeros(d.shape, d.dtype) if isinstance(d, jax.custom_derivatives.SymbolicZero) else d
        for d in d_sums
    )
    d_logits = _gradient(text, logits, labels, weight, _with_gradient(text, d_sums))
    d_others = [None, None]
    # Few programs differentiate with respect to dense labels or weights.
    for i, wanted in enumerate(others):
        if wanted:
            inputs = [labels, weight]

            def of_one(x: Array, i: int = i, inputs: list[Array] = inputs) -> tuple[Array, ...]:
                return _composite(text, logits, *(x if j == i else v for j, v in enumerate(inputs)))

            (d_others[i],) = jax.vjp(of_one, inputs[i])[1](d_sums)
    return d_logits, *d_others


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


# shard_map does not tell which inputs a derivative is wanted for. It is computed for each, and
# `jit` drops those that nobody uses.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_sums(text: str, logits: Array, labels: Array, weight: Array | None) -> tuple[Array, ...]:
    return _sums.fun(text, logits, labels, weight)


def _local_forward(text: str, *inputs: typing.Any) -> typing.Any:
    floats = [x is not None and jnp.issubdtype(x.dtype, jnp.floating) for x in inputs[1:]]
    return _local_sums(text, *inputs), (inputs, floats)


_local_sums.defvjp(_local_forward, _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(text: str, logits: Array, labels: Array, weight: Array | None,
              d_sums: tuple[Array, ...]) -> Array:  # fmt: skip
    given = () if weight is None else (weight,)
    return typing.cast(Array, _op(text, True)(logits, labels, *given, *d_sums))


def _gradient_forward(text: str, *inputs: typing.Any) -> typing.Any:
    return _gradient(text, *inputs), inputs


def _gradient_backward(text: str, kept: typing.Any, dd: Array) -> typing.Any:
    floats = [x is not None and jnp.issubdtype(x.dtype, jnp.floating) for x in kept[:3]]

    def gradient(inputs: list[Array], d_sums: tuple[Array, ...]) -> Array:
        of_floats = iter(inputs)
        logits, labels, weight = (
            next(of_floats) if is_float else x for x, is_float in zip(kept, floats, strict=False)
        )

        def sums(x: Array) -> tuple[Array, ...]:
            return _with_gradient(text, _composite(text, x, labels, weight))

        return typing.cast(Array, jax.vjp(sums, logits)[1](d_sums)[0])

    inputs = [x for x, is_float in zip(kept, floats, strict=False) if is_float]
    found, d_d_sums = jax.vjp(gradient, inputs, kept[3])[1](dd)
    of_floats = iter(found)
    return *(next(of_floats) if is_float else None for is_float in floats), d_d_sums


_gradient.defvjp(_gradient_forward, _gradient_backward)


# --- sums and losses ------------------------------------------------------------------------------


def dice_sums(
    logits: Array,
    labels: Array,
    *,
    voxel_weight: Array | None = None,
    data_format: DataFormat = "channels_last",
    **options: typing.Any,
) -> DiceSums:
    """`dice_op.dice_sums` for JAX: the sums that every loss of the family is made of.

    Args:
      logits: `[N, spatial..., C]`, or channels first, as float16, bfloat16, float32 or float64.
        Samples and voxels may be sharded over devices.
      labels: Class indices `[N, spatial...]` (a channel axis of length 1 is accepted), or one-hot
        or soft labels of the shape of `logits`.
      voxel_weight: `[N, spatial...]`. A voxel of weight 0 does not count, whatever its logits are.
      data_format: `"channels_last"` or `"channels_first"`.
      **options: The other arguments of `dice_op.dice_sums`, with the same meaning. The counts of
        scores (`"argmax"`, `"threshold"`) are float64 with `jax_enable_x64`, and are rounded to
        float32 without it.

    Returns:
      A `DiceSums` of arrays. Those that are not asked for are None.

    Raises:
      ValueError: The shapes do not fit, or an option has a wrong value.
      jax.errors.JaxRuntimeError: A label is not a class, or a prediction is not a probability
        although `activation` is `"none"`. On a GPU such a value makes the sums of its sample NaN
        instead.
    """
    text = _text.written({"data_format": data_format, **options})
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    # The handlers check this as well, but a trace of the program says where it was written.
    known = [[s if isinstance(s, int) else None for s in a.shape] for a in (logits, labels)]
    core.label_kind(
        known[0],
        known[1],
        labels.dtype.name,
        data_format=data_format,
        ignore_label=options.get("ignore_label"),
        regions=options.get("regions"),
    )
    axis = channel_axis(data_format)
    if labels.ndim == logits.ndim and labels.shape[axis] == 1 != logits.shape[axis]:
        labels = labels.squeeze(axis)
    weight = None if voxel_weight is None else jnp.asarray(voxel_weight)
    if weight is not None and weight.ndim == logits.ndim and weight.shape[axis] == 1:
        weight = weight.squeeze(axis)
    sums = _local_sums if _inside_shard_map() else _sums
    found = iter(sums(text, logits, labels, weight))
    asked = _text.asked(text)
    return DiceSums(**{n: next(found) if n in asked else None for n in DiceSums._fields})


class SumsLoss(_family.LogitsFirst):
    """Base of the losses that are a formula over `dice_sums`; derive your own from it.

    The arguments are those of `dice_op.losses.SumsLoss`, but for these.

    Args:
      data_format: `"channels_last"` by default.
      reduction: `"mean"` or `"sum"` over the samples, or `"none"`.

    Call:
      logits: `[N, spatial..., C]` of any float type.
      labels: Class indices `[N, spatial...]` of any integer type, or labels of the shape of the
        logits.
      weight: `[N]`, or one weight per voxel, `[N, spatial...]`.
    """

    def __call__(self, logits: Array, labels: Array, weight: Array | None = None) -> Array:
        return typing.cast(Array, self.value(dice_sums, logits, labels, weight))


class OverlapLoss(_family.OverlapLoss, SumsLoss):
    __doc__ = _family.OverlapLoss.__doc__


class DiceLoss(_family.DiceLoss, OverlapLoss):
    __doc__ = _family.DiceLoss.__doc__


class TverskyLoss(_family.TverskyLoss, OverlapLoss):
    __doc__ = _family.TverskyLoss.__doc__


class MatthewsLoss(_family.MatthewsLoss, OverlapLoss):
    __doc__ = _family.MatthewsLoss.__doc__


class GeneralizedDiceLoss(_family.GeneralizedDiceLoss, SumsLoss):
    __doc__ = _family.GeneralizedDiceLoss.__doc__


class GeneralizedWassersteinDiceLoss(_family.GeneralizedWassersteinDiceLoss, SumsLoss):
    __doc__ = _family.GeneralizedWassersteinDiceLoss.__doc__


class DiceCELoss(_family.DiceCELoss, DiceLoss):
    __doc__ = _family.DiceCELoss.__doc__


class DiceFocalLoss(_family.DiceFocalLoss, DiceCELoss):
    __doc__ = _family.DiceFocalLoss.__doc__


class GeneralizedDiceFocalLoss(_family.GeneralizedDiceFocalLoss, GeneralizedDiceLoss):
    __doc__ = _family.GeneralizedDiceFocalLoss.__doc__


class UnifiedFocalLoss(_family.UnifiedFocalLoss, SumsLoss):
    __doc__ = _family.UnifiedFocalLoss.__doc__
