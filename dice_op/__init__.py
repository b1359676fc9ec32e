"""The Dice family of losses for medical image segmentation, fused: TensorFlow custom ops for Keras.

>>> import dice_op
>>> model.compile(optimizer="adam", loss=dice_op.losses.DiceLoss())

`dice_op.losses` and `dice_op.metrics` hold what Keras takes. `dice_op.dice_sums` computes the sums
that they are made of, and `dice_op.core` does the same on NumPy arrays. `dice_op.torch` and
`dice_op.jax` have the losses for PyTorch and JAX. Importing the package imports none of these
frameworks; the first use of something that needs one does, and imports no other.
"""

from __future__ import annotations

import importlib
import os
import sys
import typing
import warnings

if typing.TYPE_CHECKING:
    from dice_op import formulas, losses, metrics
    from dice_op import jax as jax
    from dice_op import torch as torch
    from dice_op._sums import DiceSums
    from dice_op.ops import dice_sums

__all__ = ["DiceSums", "core", "dice_sums", "formulas", "losses", "metrics"]


def _other_copy() -> str | None:
    """The folder of another dice_op that this process has loaded, or None.

    The system's loader knows a library by its name, whichever folder it came from, so that a second
    dice_op would get the kernels of the first.
    """
    try:
        with open("/proc/self/maps") as maps:
            libraries = {
                line.split(maxsplit=5)[-1].strip() for line in maps if "dice_op_kernels" in line
            }
    except OSError:  # pragma: no cover - Linux has /proc
        return None
    here = os.path.dirname(os.path.realpath(os.path.join(__path__[0], "dice_op_kernels.so")))
    folders = {os.path.dirname(library) for library in libraries} - {here}
    return min(folders, default=None)


def _is_second_interpreter() -> bool:
    """Whether this is a second interpreter of its process.

    From 3.12 on, Python itself refuses to import the compiled module there. Before, the import
    would wait forever.
    """
    if sys.version_info >= (3, 12):  # pragma: no cover - a matter of the Python
        return False
    try:
        interpreters = importlib.import_module("_xxsubinterpreters")
    except ImportError:  # pragma: no cover - every CPython has it
        return False
    return bool(interpreters.get_current() != interpreters.get_main())


if _is_second_interpreter():  # pragma: no cover - coverage.py is not in there; test_faults.py is
    raise ImportError(
        "dice_op cannot be imported in a second interpreter of a process: start a process instead",
        name=__name__,
    )
_elsewhere = _other_copy()
if _elsewhere:  # pragma: no cover - test_import.py tries it with a copy
    raise ImportError(
        f"dice_op is in this process already, from {_elsewhere}, and cannot be loaded a second "
        f"time, from {__path__[0]}: start a new process, or take one of the two off sys.path",
        name=__name__,
    )
try:
    import dice_op.core as core
except ImportError as error:  # pragma: no cover - test_import.py tries it with a copy
    raise ImportError(
        f"dice_op's compiled module cannot be loaded from {__path__[0]} ({error}). In a source "
        "folder run `make build`, or leave the folder to use an installed dice_op",
        name=__name__,
    ) from error

__version__ = core.build_info()["version"]

_wanted, _levels = os.environ.get("DICE_OP_SIMD"), core.build_info()["simd_levels"]
if _wanted and _wanted not in _levels:
    warnings.warn(
        f"DICE_OP_SIMD is {_wanted!r}, but must be one of {', '.join(_levels)}; "
        f"{core.build_info()['simd_level']} is used",
        RuntimeWarning,
        stacklevel=2,
    )

if not typing.TYPE_CHECKING:  # It would make a type checker believe that every name exists.

    def __getattr__(name):
        if name not in (*__all__, "torch", "jax"):  # `import *` must not import these two.
            raise AttributeError(f"module 'dice_op' has no attribute {name!r}")
        homes = {"DiceSums": "dice_op._sums", "dice_sums": "dice_op.ops"}
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        return importlib.import_module(f"dice_op.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
