"""Refuses Keras 2, which the losses and metrics cannot work with, and says what to do instead."""

from __future__ import annotations

import os
import sys
import types

_OWN_LOOP = "In a loop of your own, dice_op.dice_sums and dice_op.formulas work with any model"


def require_keras_3() -> None:
    """Refuses to import losses and metrics where `tf.keras` is Keras 2.

    Raises:
      ImportError: `TF_USE_LEGACY_KERAS` is set.
    """
    if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        raise ImportError(
            "dice_op's losses and metrics are for Keras 3, but TF_USE_LEGACY_KERAS is set, which "
            "makes tf.keras the older tf_keras (Keras 2): unset it before importing tensorflow. "
            f"{_OWN_LOOP}"
        )


def refuse_call_from_tf_keras() -> None:
    """Refuses a call that comes from a model of tf_keras (Keras 2).

    Such a model takes our classes for plain functions. It would never pass its weights to a loss,
    and never reset a score, so that its numbers would be wrong without a word.
    """
    if "tf_keras" not in sys.modules:
        return
    frame: types.FrameType | None = sys._getframe(1)
    while frame and _package(frame) in ("dice_op", "keras", "tensorflow"):
        frame = frame.f_back
    if frame and _package(frame) == "tf_keras":
        raise TypeError(
            "this model is one of tf_keras (Keras 2), but dice_op's losses and metrics are for "
            "Keras 3: build the model with `import keras`, and leave TF_USE_LEGACY_KERAS unset. "
            f"{_OWN_LOOP}"
        )


def _package(frame: types.FrameType) -> str:
    """The top-level package that the code of a frame belongs to."""
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
