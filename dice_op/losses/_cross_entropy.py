"""The losses that add a cross-entropy to Dice, from the same sums."""

from __future__ import annotations

import typing

import keras
import tensorflow as tf

from dice_op import _checks, _inputs, formulas
from dice_op._types import ClassWeight
from dice_op.losses._base import SumsLoss
from dice_op.losses._overlap import (
    DiceLoss,
    DiceOptions,
    GeneralizedDiceLoss,
    GeneralizedDiceOptions,
)
from dice_op.ops import DiceSums

if typing.TYPE_CHECKING:
    from typing_extensions import Unpack


class _CrossEntropyOptions(typing.TypedDict, total=False):
    """The options of `_WithCrossEntropy` without `focal_gamma`, whose default is each loss' own."""

    lambda_dice: float
    lambda_ce: float
    ce_class_weight: ClassWeight | None
    label_smoothing: float


class DiceCEOptions(DiceOptions, _CrossEntropyOptions, total=False):
    """The options of `DiceCELoss`, without `focal_gamma`, for the losses that hand them on."""


class _WithCrossEntropy(SumsLoss):
    """Adds a cross-entropy to the loss that follows in the order of bases. `DiceCELoss` describes
    the arguments."""

    _arguments: tuple[str, ...] = (
        "lambda_dice",
        "lambda_ce",
        "ce_class_weight",
        "focal_gamma",
        "label_smoothing",
    )

    def __init__(
        self,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        ce_class_weight: ClassWeight | None = None,
        focal_gamma: float = 0.0,
        label_smoothing: float = 0.0,
        name: str | None = None,
        **options: typing.Any,
    ) -> None:
        super().__init__(name=name, **options)
        self.lambda_dice = _checks.at_least_0("lambda_dice", lambda_dice)
        self.lambda_ce = _checks.at_least_0("lambda_ce", lambda_ce)
        self.ce_class_weight = _checks.weight_list("ce_class_weight", ce_class_weight)
        self.focal_gamma = _checks.at_least_0("focal_gamma", focal_gamma)
        self.label_smoothing = _checks.at_least_0("label_smoothing", label_smoothing)
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, but must be in [0, 1]")
        if self.lambda_dice == self.lambda_ce == 0:
            raise ValueError("lambda_dice and lambda_ce are both 0, so that nothing would count")
        if self.regions and self.activation == "none":
            raise ValueError(
                'regions need the binary cross-entropy, but that of activation="none" is '
                'categorical: pass logits and activation="sigmoid"'
            )
        if getattr(self, "average", None) == "none":
            raise ValueError('average="none" gives a loss per class, but the cross-entropy has one')

    def sum_options(self) -> dict[str, typing.Any]:
        return {
            "cross_entropy": True,
            "focal_gamma": self.focal_gamma,
            "label_smoothing": self.label_smoothing,
        }

    def from_sums(self, sums: DiceSums) -> tf.Tensor:
        if self.activation == "none" and sums.intersection.shape[1] == 1:
            raise ValueError(
                'y_pred has one class, but the cross-entropy of activation="none" is categorical: '
                'pass logits and activation="sigmoid"'
            )
        weight = _inputs.class_weight_tensor("ce_class_weight", self.ce_class_weight, sums)
        binary = self.activation == "sigmoid"
        mean = formulas.binary_cross_entropy if binary else formulas.cross_entropy
        overlap = super().from_sums(sums)
        return self.lambda_dice * overlap + self.lambda_ce * mean(sums, weight)

    def _each_sample_counts(self) -> bool:
        return super()._each_sample_counts() and self.lambda_dice != 0

    def _sums(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, voxel_weight: tf.Tensor | None
    ) -> DiceSums:
        if (
            self.ce_class_weight
            and self.squared_pred
            and _inputs.are_soft(
                y_true,
                y_pred,
                self.data_format,
                ignore_label=self.ignore_label,
                regions=self.regions,
            )
        ):
            raise ValueError(
                "ce_class_weight is normalised by the sum of the labels, which squared_pred=True "
                "squares: with soft labels leave one of the two out"
            )
        return super()._sums(y_true, y_pred, voxel_weight)


@keras.saving.register_keras_serializable(package="dice_op")
class DiceCELoss(_WithCrossEntropy, DiceLoss):
    """lambda_dice Dice + lambda_ce cross-entropy, both from the same pass over the logits.

    The cross-entropy is categorical, of all classes including the background, and the mean over the
    voxels of a sample. For `activation="sigmoid"` it is binary, and the mean over the classes as
    well. With `batch` it is the mean over the voxels of the whole batch, as in PyTorch. The two
    means differ where the samples have different numbers of voxels that count, or where
    `ce_class_weight` is given.

    Args:
      lambda_dice, lambda_ce: The weights of the two losses.
      ce_class_weight: The weight of each class in the cross-entropy, including the background. The
        categorical cross-entropy is divided by the weights of the voxels' classes, as in PyTorch,
        and the binary one by the sum of the weights.
      focal_gamma: The exponent of the focal cross-entropy (Lin et al., 2017).
      label_smoothing: A number s in [0, 1] that smooths the labels of the cross-entropy, as in
        `dice_op.dice_sums`.
      **options: They are those of `DiceLoss`.
    """

    def __init__(
        self,
        *,
        focal_gamma: float = 0.0,
        name: str | None = "dice_ce_loss",
        **options: Unpack[DiceCEOptions],
    ) -> None:
        super().__init__(focal_gamma=focal_gamma, name=name, **options)


@keras.saving.register_keras_serializable(package="dice_op")
class DiceFocalLoss(DiceCELoss):
    """`DiceCELoss` with the focal cross-entropy (1 - p)^focal_gamma (-log p) (Lin et al., 2017)."""

    def __init__(
        self,
        *,
        focal_gamma: float = 2.0,
        name: str | None = "dice_focal_loss",
        **options: Unpack[DiceCEOptions],
    ) -> None:
        super().__init__(focal_gamma=focal_gamma, name=name, **options)


class GeneralizedDiceCEOptions(GeneralizedDiceOptions, _CrossEntropyOptions, total=False):
    """The options of `GeneralizedDiceFocalLoss`, without `focal_gamma`."""


@keras.saving.register_keras_serializable(package="dice_op")
class GeneralizedDiceFocalLoss(_WithCrossEntropy, GeneralizedDiceLoss):
    """lambda_dice generalized Dice + lambda_ce focal cross-entropy, from the same pass.

    `focal_gamma=0` makes it generalized Dice and plain cross-entropy.

    Args:
      lambda_dice, lambda_ce, ce_class_weight, focal_gamma, label_smoothing: They are those of
        `DiceCELoss`.
      **options: They are those of `GeneralizedDiceLoss`.
    """

    def __init__(
        self,
        *,
        focal_gamma: float = 2.0,
        name: str | None = "generalized_dice_focal_loss",
        **options: Unpack[GeneralizedDiceCEOptions],
    ) -> None:
        super().__init__(focal_gamma=focal_gamma, name=name, **options)
