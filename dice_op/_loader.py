"""Loads dice_op.so and dice_op_xla.so into TensorFlow, or says in words why it cannot."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import types
import warnings
from importlib import metadata

import tensorflow as tf

from dice_op import _gpu, core

LIBRARY = pathlib.Path(__file__).with_name("dice_op.so")
XLA_LIBRARY = pathlib.Path(__file__).with_name("dice_op_xla.so")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _rebuild(running: str) -> str:
    """The command that builds dice_op for the running TensorFlow."""
    return (
        f"DICE_OP_TENSORFLOW={_minor(running)} pip install --force-reinstall --no-deps . "
        "(in dice_op's source folder)"
    )


def _package() -> str:
    """The package that TensorFlow came from. The other one must not be installed over it."""
    try:
        metadata.version("tensorflow-cpu")
    except metadata.PackageNotFoundError:
        return "tensorflow"
    return "tensorflow-cpu"


def mismatch(built: str | None, running: str) -> str | None:
    """What to tell people whose TensorFlow is not the one that this build is for, else None.

    A build fits one minor version, because the C++ symbols of TensorFlow contain the version of its
    libraries.
    """
    if built is None:
        return f"this build of dice_op has no TensorFlow op; rebuild it: {_rebuild(running)}"
    if _minor(built) == _minor(running):
        return None
    return (
        f"this build of dice_op is for TensorFlow {_minor(built)} (built with {built}), but "
        f"TensorFlow {running} is running. Install the TensorFlow it was built for: "
        f'pip install "{_package()}=={_minor(built)}.*" - or rebuild dice_op: {_rebuild(running)}'
    )


@functools.cache
def library() -> types.ModuleType:
    """The module of the raw ops.

    Raises:
      ImportError: The library is missing, or was built for another TensorFlow. The message names
        both versions and the command that repairs it.
    """
    problem = mismatch(core.build_info()["tensorflow"], tf.__version__)
    if problem is None and not LIBRARY.exists():
        problem = (
            f"{LIBRARY} is missing, the installation is incomplete; rebuild dice_op: "
            f"{_rebuild(tf.__version__)}"
        )
    if problem is not None:
        raise ImportError(f"dice_op cannot load: {problem}")
    if tf.test.is_built_with_cuda():
        info = core.build_info()
        problem = _gpu.problem(info["cuda"], info["cuda_archs"], _gpu.machine())
        if problem is not None:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
    try:
        return tf.load_op_library(str(LIBRARY))
    except tf.errors.NotFoundError as error:
        raise ImportError(
            f"dice_op cannot load: {LIBRARY.name}, built with TensorFlow "
            f"{core.build_info()['tensorflow']}, does not fit the running TensorFlow "
            f"{tf.__version__}. Rebuild it: {_rebuild(tf.__version__)}. TensorFlow said: "
            f"{error.message}"
        ) from error


@functools.cache
def xla_problem() -> str | None:
    """Loads the ops' kernels for XLA. Returns why XLA cannot use them, or None."""
    library()
    if not XLA_LIBRARY.exists():
        return f"{XLA_LIBRARY} is missing; rebuild dice_op: {_rebuild(tf.__version__)}"
    try:
        tf.load_op_library(str(XLA_LIBRARY))
    except tf.errors.NotFoundError as error:
        return error.message
    refusal = ctypes.CDLL(str(XLA_LIBRARY)).dice_op_xla_refusal
    refusal.restype = ctypes.c_char_p
    return refusal().decode() or None
