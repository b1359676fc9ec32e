"""What formulas need of arrays, whichever library the arrays belong to.

NumPy, JAX and PyTorch have the functions that are used here under the same names, with the same
arguments. TensorFlow gets them from `_tensorflow`. No library is imported that has not made the
array.
"""

from __future__ import annotations

import functools
import sys
import types
import typing

from dice_op._types import DataFormat

Array: typing.TypeAlias = typing.Any


def channel_axis(data_format: DataFormat) -> int:
    return -1 if data_format == "channels_last" else 1


def library_of(array: Array) -> str:
    """`"tensorflow"`, `"torch"`, `"jax"` or `"numpy"`."""
    for kind in type(array).__mro__:  # It may be of a class that another library derives.
        name = kind.__module__.partition(".")[0]
        name = {"jaxlib": "jax", "keras": "tensorflow"}.get(name, name)
        if name in ("tensorflow", "torch", "jax", "numpy"):
            return name
    raise TypeError(
        f"{type(array).__name__} is no array of TensorFlow, PyTorch, JAX or NumPy, on which "
        "dice_op's formulas work"
    )


def namespace(array: Array) -> typing.Any:
    """The functions for arrays such as this one."""
    library = library_of(array)
    if library == "tensorflow":
        return _tensorflow()
    return sys.modules["jax.numpy" if library == "jax" else library]


@functools.cache
def _tensorflow() -> types.SimpleNamespace:
    import tensorflow as tf

    def reduction(function: typing.Callable[..., tf.Tensor]) -> typing.Callable[..., tf.Tensor]:
        return lambda x, axis=None, keepdims=False: function(x, axis, keepdims)

    same = ("abs", "cosh", "cumsum", "ones_like", "sqrt", "where", "zeros_like")
    return types.SimpleNamespace(
        **{name: getattr(tf, name) for name in same},
        clip=tf.clip_by_value,
        amax=reduction(tf.reduce_max),
        any=reduction(tf.reduce_any),
        concatenate=tf.concat,
        log=tf.math.log,
        mean=reduction(tf.reduce_mean),
        stack=tf.stack,
        sum=reduction(tf.reduce_sum),
    )


def cast(array: Array, like: Array) -> Array:
    """The array in the dtype of `like`."""
    library = library_of(like)
    if library == "tensorflow":
        return sys.modules[library].cast(array, like.dtype)
    return array.to(like.dtype) if library == "torch" else array.astype(like.dtype)


def constant(values: typing.Sequence[typing.Any], like: Array) -> Array:
    """Numbers, or rows of them, in the dtype and on the device of `like`."""
    library = library_of(like)
    if library == "tensorflow":
        return sys.modules[library].constant(values, like.dtype)
    if library == "torch":
        return sys.modules[library].tensor(values, dtype=like.dtype, device=like.device)
    return namespace(like).asarray(values, dtype=like.dtype)


def stop_gradient(array: Array) -> Array:
    library = library_of(array)
    if library == "tensorflow":
        return sys.modules[library].stop_gradient(array)
    if library == "jax":
        return sys.modules[library].lax.stop_gradient(array)
    return array.detach() if library == "torch" else array


def class_weights(
    argument: str,
    weights: list[float] | None,
    like: Array,
    include_background: bool = True,
) -> Array | None:
    """`[C]`, or None. Checks that there is one weight for each class of `like`, `[N, C]`."""
    if weights is None:
        return None
    counted = like.shape[1]
    if counted is not None and counted != len(weights):
        raise ValueError(
            f"{argument} has {len(weights)} entries, but {counted} classes count"
            f"{'' if include_background else ' (include_background=False)'}"
        )
    if counted is None:  # TensorFlow knows the number of classes only when the graph runs.
        tf = sys.modules["tensorflow"]
        tf.debugging.assert_equal(tf.shape(like)[1], len(weights))
    return constant(weights, like)


# --- what composite.py needs besides --------------------------------------------------------------
#
# TensorFlow may know a size only when the graph runs. Then it is a tensor.


def dtype_name(array: Array) -> str:
    """`"float32"`, `"bfloat16"` and so on."""
    return str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")


def is_floating(array: Array) -> bool:
    return "float" in dtype_name(array)


def dtype_of_sums(logits: Array) -> str:
    return "float64" if dtype_name(logits) == "float64" else "float32"


def known_shape(array: Array) -> list[int | None] | None:
    """The shape, with None for a size that is not known, or None if the rank is not."""
    if library_of(array) == "tensorflow":
        return None if array.shape.rank is None else array.shape.as_list()
    return list(array.shape)


def sizes(array: Array) -> list[typing.Any]:
    if library_of(array) == "tensorflow":
        tf = sys.modules["tensorflow"]
        return tf.unstack(tf.shape(array))
    return list(array.shape)


def reshape(array: Array, shape: typing.Sequence[typing.Any]) -> Array:
    if library_of(array) == "tensorflow":
        return sys.modules["tensorflow"].reshape(array, shape)
    return array.reshape(tuple(shape))


def swap_last_axes(array: Array) -> Array:
    """`[A, B, C]` as `[A, C, B]`."""
    if library_of(array) == "tensorflow":
        return sys.modules["tensorflow"].transpose(array, [0, 2, 1])
    return array.swapaxes(1, 2)


def astype(array: Array, dtype: str, like: Array | None = None) -> Array:
    """An array in another dtype; `like` is an array of its library where it may be a number."""
    library = library_of(array if like is None else like)
    if library == "tensorflow":
        return sys.modules[library].cast(array, dtype)
    if isinstance(array, (bool, int)):
        return int(array)
    if library == "torch":
        return array.to(getattr(sys.modules[library], dtype))
    if library == "jax":  # It may have no types of 64 bits.
        dtype = sys.modules[library].dtypes.canonicalize_dtype(dtype)
    return array.astype(dtype)


def choose(condition: Array | bool, if_true: typing.Any, if_false: typing.Any) -> Array:
    """What one of two functions returns. TensorFlow may know which only when the graph runs."""
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    return sys.modules["tensorflow"].cond(condition, if_true, if_false)


def numbers(count: Array | int, like: Array) -> Array:
    """0, 1, ... as integers, on the device of `like`."""
    library = library_of(like)
    if library == "tensorflow":
        tf = sys.modules[library]
        return tf.range(tf.cast(count, tf.int64))
    if library == "torch":
        return sys.modules[library].arange(count, device=like.device)
    return namespace(like).arange(count)


def one_hot(index: Array, classes: Array | int, like: Array) -> Array:
    """`[..., classes]` in the dtype of `like`. An index that is no class gives zeros."""
    return cast(index[..., None] == numbers(classes, like), like)


def rows(table: Array, index: Array) -> Array:
    """`table[index]`."""
    if library_of(table) == "tensorflow":
        return sys.modules["tensorflow"].gather(table, index)
    return table[index]


def columns(table: Array, index: Array) -> Array:
    """`table[..., index]`."""
    if library_of(table) == "tensorflow":
        return sys.modules["tensorflow"].gather(table, index, axis=-1)
    return table[..., index]


def activations(array: Array) -> types.SimpleNamespace:
    """softmax, log_softmax, sigmoid, log_sigmoid and log_sum_exp over the last axis."""
    library = library_of(array)
    if library == "tensorflow":
        tf = sys.modules[library]
        return types.SimpleNamespace(
            softmax=tf.nn.softmax,
            log_softmax=tf.nn.log_softmax,
            sigmoid=tf.nn.sigmoid,
            log_sigmoid=tf.math.log_sigmoid,
            log_sum_exp=lambda x: tf.reduce_logsumexp(x, -1, keepdims=True),
        )
    if library == "torch":
        torch = sys.modules[library]
        return types.SimpleNamespace(
            softmax=lambda x: torch.softmax(x, -1),
            log_softmax=lambda x: torch.log_softmax(x, -1),
            sigmoid=torch.sigmoid,
            log_sigmoid=torch.nn.functional.logsigmoid,
            log_sum_exp=lambda x: torch.logsumexp(x, -1, keepdim=True),
        )
    nn = sys.modules["jax"].nn
    return types.SimpleNamespace(
        softmax=nn.softmax,
        log_softmax=nn.log_softmax,
        sigmoid=nn.sigmoid,
        log_sigmoid=nn.log_sigmoid,
        log_sum_exp=lambda x: nn.logsumexp(x, -1, keepdims=True),
    )
