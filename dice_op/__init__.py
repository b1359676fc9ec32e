"""The Dice family of losses for medical image segmentation, fused: TensorFlow custom ops for Keras.

>>> import dice_op
>>> model.compile(optimizer="adam", loss=dice_op.losses.DiceLoss())

`dice_op.losses` and `dice_op.metrics` hold what Keras takes, `dice_op.dice_sums` the sums they are
made of, and `dice_op.core` the same on NumPy arrays. Importing the package imports neither
TensorFlow nor Keras; the first use of what needs them does.
"""

import importlib

try:
    from dice_op import core
except ImportError as error:
    raise ImportError(
        f"dice_op's compiled module cannot be loaded from {__path__[0]} ({error}). In a source "
        "folder run `make build`, or leave the folder to use an installed dice_op"
    ) from error

__version__ = core.build_info()["version"]

_HOME = {
    "dice_sums": "dice_op.ops",
    "DiceSums": "dice_op.ops",
    "formulas": "dice_op",
    "losses": "dice_op",
    "metrics": "dice_op",
}
__all__ = ["core", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'dice_op' has no attribute {name!r}")
    if _HOME[name] == __name__:
        return importlib.import_module(f"dice_op.{name}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
