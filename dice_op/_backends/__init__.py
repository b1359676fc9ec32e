"""What losses and metrics need of the framework that Keras runs on. The rest is `keras.ops`."""

from __future__ import annotations

import importlib
import typing

import keras

from dice_op._backends.base import Backend

_NAMES = ("tensorflow", "jax", "torch")


def _chosen() -> Backend:
    """That of Keras.

    Raises:
      ImportError: Keras runs on a framework that cannot train, or one that is not known here.
    """
    name = keras.config.backend()
    if name not in _NAMES:
        raise ImportError(
            f"dice_op's losses and metrics work with Keras on {', '.join(_NAMES)}, but its backend "
            f"is {name}: set KERAS_BACKEND to one of these before importing keras"
        )
    return typing.cast(Backend, importlib.import_module(f"dice_op._backends.{name}").BACKEND)


backend = _chosen()
