"""Types of the arguments that several functions and classes share.

A `Literal` here is the only list of the names that an argument takes: type checkers read it, and
`_checks.one_of` holds the value to it when the program runs.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence

if typing.TYPE_CHECKING:
    import numpy.typing as npt
    import tensorflow as tf

TensorLike: typing.TypeAlias = "tf.Tensor | npt.ArrayLike"
Regions: typing.TypeAlias = Sequence[Collection[int]]
LabelSets: typing.TypeAlias = Mapping[int, Collection[int]]
DistMatrix: typing.TypeAlias = "Sequence[Sequence[float]] | npt.NDArray[typing.Any]"
ClassWeight: typing.TypeAlias = "Sequence[float] | npt.NDArray[typing.Any]"

Activation = typing.Literal["softmax", "sigmoid", "none"]
Prediction = typing.Literal["argmax", "threshold"]  # hard predictions, which have no gradient
DataFormat = typing.Literal["channels_last", "channels_first"]
Average = typing.Literal["macro", "weighted", "micro", "none"]
Reduction = typing.Literal[
    "sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none"
]  # Keras' names
WeightType = typing.Literal["square", "simple", "uniform"]  # of generalized Dice
InfiniteWeight = typing.Literal["largest", "zero"]
WeightingMode = typing.Literal["default", "GDL"]  # of generalized Wasserstein Dice, MONAI's names
