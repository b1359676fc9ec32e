"""Loads dice_op.so into TensorFlow, or says in words why it cannot."""

import functools
import pathlib

import tensorflow as tf

from dice_op import core

LIBRARY = pathlib.Path(__file__).with_name("dice_op.so")


def _minor(version):
    return ".".join(version.split(".")[:2])


def mismatch(built, running):
    """What to tell someone whose TensorFlow is not the one this build is for; None if it is.

    TensorFlow's C++ symbols carry the version of its libraries, so a build fits one minor version.
    """
    if built is None:
        return (
            "this build of dice_op has no TensorFlow op; reinstall it where TensorFlow is "
            "installed: pip install --force-reinstall --no-deps dice-op"
        )
    if _minor(built) == _minor(running):
        return None
    return (
        f"this build of dice_op is for TensorFlow {_minor(built)} (built with {built}), but "
        f"TensorFlow {running} is running. Install the TensorFlow it was built for: "
        f'pip install "tensorflow=={_minor(built)}.*" - or rebuild dice_op for this one: '
        "pip install --no-build-isolation --force-reinstall --no-deps dice-op"
    )


@functools.cache
def library():
    """The module of the raw ops.

    Raises:
      ImportError: the library is missing, or built for another TensorFlow. Names both versions and
        the command that mends it.
    """
    problem = mismatch(core.build_info()["tensorflow"], tf.__version__)
    if problem is None and not LIBRARY.exists():
        problem = (
            f"{LIBRARY} is missing, the installation is incomplete; reinstall it: "
            "pip install --force-reinstall --no-deps dice-op"
        )
    if problem is not None:
        raise ImportError(f"dice_op cannot load: {problem}")
    try:
        return tf.load_op_library(str(LIBRARY))
    except tf.errors.NotFoundError as error:
        raise ImportError(
            f"dice_op cannot load: {LIBRARY.name}, built with TensorFlow "
            f"{core.build_info()['tensorflow']}, does not fit the running TensorFlow "
            f"{tf.__version__}. Rebuild it: pip install --no-build-isolation --force-reinstall "
            f"--no-deps dice-op. TensorFlow said: {error.message}"
        ) from error
