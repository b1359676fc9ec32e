"""The losses that add a cross-entropy to an overlap: their options and formulas."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

from dice_op import _checks, formulas
from dice_op._arrays import Array, class_weights, namespace
from dice_op._family.base import SumsLoss, SumsOptions
from dice_op._family.overlap import (
    DiceLoss,
    DiceOptions,
    GeneralizedDiceLoss,
    GeneralizedDiceOptions,
)
from dice_op._sums import DiceSums
from dice_op._types import ClassWeight

if typing.TYPE_CHECKING:
    from typing_extensions import Unpack


class _CrossEntropyOptions(typing.TypedDict, total=False):
    """The options of `_WithCrossEntropy` without `focal_gamma`, whose default is each loss' own."""

    lambda_dice: float
    lambda_ce: float
    ce_class_weight: ClassWeight | None
    pos_weight: float | ClassWeight | None
    focal_alpha: float | None
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
        "pos_weight",
        "focal_alpha",
        "focal_gamma",
        "label_smoothing",
    )

    def __init__(
        self,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        ce_class_weight: ClassWeight | None = None,
        pos_weight: float | ClassWeight | None = None,
        focal_alpha: float | None = None,
        focal_gamma: float | Sequence[float] = 0.0,
        label_smoothing: float = 0.0,
        **options: typing.Any,
    ) -> None:
        super().__init__(**options)
        self.lambda_dice = _checks.at_least_0("lambda_dice", lambda_dice)
        self.lambda_ce = _checks.at_least_0("lambda_ce", lambda_ce)
        self.ce_class_weight = _checks.weight_list("ce_class_weight", ce_class_weight)
        self.pos_weight = _checks.weight_or_list("pos_weight", pos_weight)
        self.focal_alpha = (
            None if focal_alpha is None else _checks.number("focal_alpha", focal_alpha)
        )
        self.focal_gamma = _checks.exponents("focal_gamma", focal_gamma)
        self.label_smoothing = _checks.at_least_0("label_smoothing", label_smoothing)
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, but must be in [0, 1]")
        if self.lambda_dice == self.lambda_ce == 0:
            raise ValueError("lambda_dice and lambda_ce are both 0, so that nothing would count")
        if self.focal_alpha is not None and not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"focal_alpha is {focal_alpha}, but must be in [0, 1]")
        if self.focal_alpha is not None and self.pos_weight is not None:
            raise ValueError("pos_weight and focal_alpha both weight the label 1: pass one of them")
        for argument in ("pos_weight", "focal_alpha"):
            if getattr(self, argument) is not None and self.activation != "sigmoid":
                raise ValueError(
                    f"{argument} is for the binary cross-entropy of activation='sigmoid': for the "
                    f"categorical one of {self.activation!r}, pass ce_class_weight"
                )
        if self.label_sets and self.ce_class_weight and self.activation != "sigmoid":
            raise ValueError(
                "ce_class_weight is normalised by the voxels of each class, which label_sets do "
                "not tell: leave one of the two out"
            )
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

    def from_sums(self, sums: DiceSums) -> Array:
        if self.activation == "none" and sums.intersection.shape[1] == 1:
            raise ValueError(
                'y_pred has one class, but the cross-entropy of activation="none" is categorical: '
                'pass logits and activation="sigmoid"'
            )
        weight = class_weights("ce_class_weight", self.ce_class_weight, sums.intersection)
        overlap = super().from_sums(sums)
        if self.activation == "sigmoid":
            loss = formulas.binary_cross_entropy(sums, weight, *self._label_weights(sums))
        else:
            loss = formulas.cross_entropy(sums, weight)
        return self.lambda_dice * overlap + self.lambda_ce * loss

    def _label_weights(self, sums: DiceSums) -> tuple[Array, float]:
        """The weights of the labels 1 and 0 in the binary cross-entropy."""
        if self.focal_alpha is not None:
            return self.focal_alpha, 1 - self.focal_alpha
        if isinstance(self.pos_weight, list):
            return class_weights("pos_weight", self.pos_weight, sums.intersection), 1.0
        return 1.0 if self.pos_weight is None else self.pos_weight, 1.0

    def each_sample_counts(self) -> bool:
        return super().each_sample_counts() and self.lambda_dice != 0

    def options_of_sums(
        self, classes: int | None, are_soft: Callable[[], bool]
    ) -> dict[str, typing.Any]:
        if self.ce_class_weight and self.squared_pred and are_soft():
            raise ValueError(
                "ce_class_weight is normalised by the sum of the labels, which squared_pred=True "
                "squares: with soft labels leave one of the two out"
            )
        return super().options_of_sums(classes, are_soft)


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
      pos_weight: The weight of the label 1 in the binary cross-entropy, for all classes or a list
        of one for each, as in PyTorch's `BCEWithLogitsLoss`.
      focal_alpha: A number a in [0, 1]: the binary cross-entropy of the label 1 is weighted by a,
        and that of the label 0 by 1 - a (Lin et al., 2017). With `lambda_ce` and `lambda_dice` this
        is the Combo loss (Taghanaki et al., 2019), whose beta it is.
      focal_gamma: The exponent of the focal cross-entropy (Lin et al., 2017), or a list of one for
        each class.
      label_smoothing: A number s in [0, 1] that smooths the labels of the cross-entropy, as in
        `dice_op.dice_sums`.
      **options: They are those of `DiceLoss`.
    """

    def __init__(
        self,
        *,
        focal_gamma: float | Sequence[float] = 0.0,
        **options: Unpack[DiceCEOptions],
    ) -> None:
        super().__init__(focal_gamma=focal_gamma, **options)


class DiceFocalLoss(DiceCELoss):
    """`DiceCELoss` with the focal cross-entropy (1 - p)^focal_gamma (-log p) (Lin et al., 2017)."""

    def __init__(
        self,
        *,
        focal_gamma: float | Sequence[float] = 2.0,
        **options: Unpack[DiceCEOptions],
    ) -> None:
        super().__init__(focal_gamma=focal_gamma, **options)


class GeneralizedDiceCEOptions(GeneralizedDiceOptions, _CrossEntropyOptions, total=False):
    """The options of `GeneralizedDiceFocalLoss`, without `focal_gamma`."""


class GeneralizedDiceFocalLoss(_WithCrossEntropy, GeneralizedDiceLoss):
    """lambda_dice generalized Dice + lambda_ce focal cross-entropy, from the same pass.

    `focal_gamma=0` makes it generalized Dice and plain cross-entropy.

    Args:
      lambda_dice, lambda_ce, ce_class_weight, focal_gamma, label_smoothing: They are those of
        `DiceCELoss`, and so are `pos_weight` and `focal_alpha`.
      **options: They are those of `GeneralizedDiceLoss`.
    """

    def __init__(
        self,
        *,
        focal_gamma: float | Sequence[float] = 2.0,
        **options: Unpack[GeneralizedDiceCEOptions],
    ) -> None:
        super().__init__(focal_gamma=focal_gamma, **options)


class UnifiedFocalLoss(SumsLoss):
    """weight * focal Tversky + (1 - weight) * focal cross-entropy (Yeung et al., "Unified Focal
    loss", 2022), from the same pass over the logits.

    Class 0 is the background, and all other classes are foreground. With the Tversky score s_c =
    (I + smooth) / (I + delta FN + (1 - delta) FP + smooth), the first part is the mean over the
    classes of (1 - s_c)^(1 - gamma), which strengthens classes that are nearly right. The second is
    the mean over the voxels of d (1 - p)^gamma (-log p) of the label's class, with d = delta for
    the foreground and d = 1 - delta for the background.

    Args:
      weight: The weight of the overlap, in [0, 1].
      delta: The weight of missed foreground against false alarms, in [0, 1].
      gamma: In [0, 1). It strengthens hard foreground and weakens easy background.
      asymmetric: Whether gamma strengthens only the foreground's overlap and weakens only the
        background's cross-entropy. Else both parts have it for all classes.
      smooth: It is added to numerator and denominator of the score.
      **options: They are those of `SumsLoss`, without `include_background`, `squared_pred` and
        `regions`; `activation` is `"softmax"` or `"none"`.
    """

    _arguments: tuple[str, ...] = ("weight", "delta", "gamma", "asymmetric", "smooth")

    def __init__(
        self,
        *,
        weight: float = 0.5,
        delta: float = 0.6,
        gamma: float = 0.5,
        asymmetric: bool = True,
        smooth: float = 1e-7,
        **options: Unpack[SumsOptions],
    ) -> None:
        super().__init__(**options)
        self.weight = _checks.at_least_0("weight", weight)
        self.delta = _checks.at_least_0("delta", delta)
        self.gamma = _checks.at_least_0("gamma", gamma)
        for argument in ("weight", "delta"):
            if getattr(self, argument) > 1:
                raise ValueError(f"{argument} is {getattr(self, argument)}, but must be in [0, 1]")
        if self.gamma >= 1:
            raise ValueError(f"gamma is {gamma}, but must be below 1: the exponent is 1 - gamma")
        self.asymmetric = _checks.flag("asymmetric", asymmetric)
        self.smooth = _checks.at_least_0("smooth", smooth)
        if self.activation == "sigmoid":
            raise ValueError(
                "the unified focal loss compares background and foreground, which are classes of "
                "a softmax: give the model an output for the background and pass "
                'activation="softmax"'
            )
        if self.regions:
            raise ValueError(
                "regions overlap, but the unified focal loss compares background and foreground, "
                "of which a voxel is one: use DiceFocalLoss"
            )
        if not self.include_background:
            raise ValueError(
                "the unified focal loss has a part for the background, so that "
                "include_background=False leaves out what it needs"
            )
        if self.squared_pred:
            raise ValueError(
                "squared_pred=True would make FP = P - I negative, and reward it: leave it out"
            )

    def sum_options(self) -> dict[str, typing.Any]:
        """Those of `SumsLoss`. With `asymmetric` the exponents depend on the number of classes, and
        `focal_gamma` must be `[gamma, 0, 0, ...]` in place of the one given here."""
        return {"cross_entropy": True, "focal_gamma": self.gamma}

    def from_sums(self, sums: DiceSums) -> Array:
        if sums.intersection.shape[1] == 1:
            raise ValueError(
                "y_pred has one class, but the unified focal loss compares background and "
                "foreground: give the model an output for each of them"
            )
        score = formulas.tversky(
            sums,
            alpha=1 - self.delta,
            beta=self.delta,
            smooth_nr=self.smooth,
            smooth_dr=self.smooth,
        )
        background = 1.0 if self.asymmetric else 1 - self.gamma
        exponent = self._of_classes(sums, background, 1 - self.gamma)
        overlap = formulas.mean_over_classes(formulas.focal_loss(score, exponent))
        weight = self._of_classes(sums, 1 - self.delta, self.delta)
        weighted = sums._replace(cross_entropy=weight * sums.cross_entropy)
        return self.weight * overlap + (1 - self.weight) * formulas.cross_entropy(weighted)

    def options_of_sums(
        self, classes: int | None, are_soft: Callable[[], bool]
    ) -> dict[str, typing.Any]:
        options = super().options_of_sums(classes, are_soft)
        if not self.asymmetric or self.gamma == 0:
            return options
        if classes is None:
            raise ValueError(
                "y_pred has an unknown number of classes, but the asymmetric loss has an exponent "
                "for each: give the model's last layer a fixed number"
            )
        return {**options, "focal_gamma": [self.gamma, *[0.0] * (classes - 1)]}

    def each_sample_counts(self) -> bool:
        return super().each_sample_counts() and self.weight != 0

    @staticmethod
    def _of_classes(sums: DiceSums, background: float, foreground: float) -> Array:
        """`[1, C]`: one number for class 0, and one for all others."""
        xp = namespace(sums.intersection)
        ones = xp.ones_like(sums.intersection[:1])
        return xp.concatenate([background * ones[:, :1], foreground * ones[:, 1:]], 1)
