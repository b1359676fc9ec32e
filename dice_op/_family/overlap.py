"""The losses that measure an overlap: their options and formulas."""

from __future__ import annotations

import typing

from dice_op import _checks, formulas
from dice_op._arrays import Array, class_weights, namespace
from dice_op._family.base import SumsLoss, SumsOptions
from dice_op._sums import DiceSums
from dice_op._types import (
    Average,
    ClassWeight,
    DistMatrix,
    InfiniteWeight,
    WeightingMode,
    WeightType,
)

if typing.TYPE_CHECKING:
    from typing_extensions import Unpack

_Absent = typing.Literal["keep", "skip", "one"]
_Transform = typing.Literal["linear", "log", "log_cosh"]
_TRANSFORMS: dict[_Transform, typing.Callable[[Array], Array]] = {
    "linear": lambda score: 1 - score,
    "log": formulas.log_loss,
    "log_cosh": formulas.log_cosh_loss,
}


class UnsmoothedOptions(SumsOptions, total=False):
    """The options of `OverlapLoss` without the smoothing, for the losses that hand them on."""

    class_weight: ClassWeight | None
    average: Average
    absent: _Absent
    transform: _Transform


class OverlapOptions(UnsmoothedOptions, total=False):
    """The options of `OverlapLoss`, for the losses that hand them on."""

    smooth_nr: float
    smooth_dr: float


class OverlapLoss(SumsLoss):
    """Base of the losses that are 1 - score, for a score of each class between 0 and 1.

    Args:
      class_weight: The weight of each class that counts. The losses are summed with these weights,
        which are not normalised; for a weighted mean, choose weights that sum to 1. With
        `average="micro"` they weight the sums of each class.
      smooth_nr, smooth_dr: They are added to numerator and denominator. Where the denominator is 0,
        the loss is 0.
      average: `"macro"` computes a loss per class, then their mean; `"weighted"` does the same, but
        weights each class by the number of its voxels in the labels (its T); `"micro"` adds the
        sums of all classes, then computes one loss; `"none"` returns `[N, classes]`, which the
        reduction averages.
      absent: What a class contributes that is not among the labels of a sample (with `batch`, of
        the batch). `"keep"`: what the formula gives, which is near 1 once anything is predicted;
        `"skip"`: nothing, and the mean is over the other classes; `"one"`: a score of 1, so a loss
        of 0.
      transform: What turns the score into a loss: `"linear"`, 1 - score; `"log"`, -log(score);
        `"log_cosh"`, log(cosh(1 - score)) (Jadon, 2020).
      **options: They are those of `SumsLoss`.
    """

    _arguments: tuple[str, ...] = (
        "class_weight",
        "smooth_nr",
        "smooth_dr",
        "average",
        "absent",
        "transform",
    )

    def __init__(
        self,
        *,
        class_weight: ClassWeight | None = None,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        average: Average = "macro",
        absent: _Absent = "keep",
        transform: _Transform = "linear",
        **options: Unpack[SumsOptions],
    ) -> None:
        super().__init__(**options)
        _checks.one_of("average", average, Average)
        _checks.one_of("absent", absent, _Absent)
        _checks.one_of("transform", transform, _Transform)
        if average == "micro" and absent != "keep":
            raise ValueError(
                f'{absent=} asks about each class, but average="micro" adds all classes up first'
            )
        if average == "weighted" and class_weight is not None:
            raise ValueError(
                'average="weighted" takes weights from the labels, but class_weight gives others'
            )
        if average == "none" and absent == "skip":
            raise ValueError('absent="skip" leaves classes out of a mean, but average="none"')
        self.class_weight = _checks.weight_list("class_weight", class_weight)
        self.smooth_nr = _checks.at_least_0("smooth_nr", smooth_nr)
        self.smooth_dr = _checks.at_least_0("smooth_dr", smooth_dr)
        self.average = average
        self.absent = absent
        self.transform = transform

    def score(self, sums: DiceSums) -> Array:
        """The score of each sample and class, `[N, C]`.

        It is 1 where prediction and labels agree, and falls towards 0 where they do not.
        """
        raise NotImplementedError

    def loss_of_score(self, score: Array) -> Array:
        """Applies the transform."""
        return _TRANSFORMS[self.transform](score)

    def from_sums(self, sums: DiceSums) -> Array:
        sums = self.overlap_sums(sums)
        weight = class_weights(
            "class_weight", self.class_weight, sums.intersection, self.include_background
        )
        present = None if self.absent == "keep" else sums.label_sum > 0
        if self.average == "micro":
            sums, weight = formulas.over_classes(sums, weight), None
        losses = self.loss_of_score(self.score(sums))
        if self.absent == "one":
            xp = namespace(losses)
            losses, present = xp.where(present, losses, xp.zeros_like(losses)), None
        if self.average == "none":
            return losses if weight is None else losses * weight
        if self.average == "weighted":
            return formulas.mean_by_support(losses, sums)
        return formulas.mean_over_classes(losses, weight, present)


class DiceOptions(OverlapOptions, total=False):
    """The options of `DiceLoss`, for the losses that hand them on."""

    jaccard: bool


class DiceLoss(OverlapLoss):
    """1 - (2 I + smooth_nr) / (P + T + smooth_dr), from the logits and integer labels in one pass.

    I, P and T are sums over the voxels of a sample and class: I = sum p t, P = sum p, T = sum t,
    with the probability p and the label t (Milletari et al., "V-Net", 2016; the smoothing is
    MONAI's).

    People write three forms of it:

    - multi-class, mean over the classes: `DiceLoss()`;
    - class-weighted, sum over c of w_c (1 - dice_c): `DiceLoss(class_weight=w)`;
    - binary, over all voxels and channels jointly: `DiceLoss(activation="sigmoid",
      average="micro")`.

    A class that is absent from a sample and its prediction has the loss 0, not NaN, if smooth_nr =
    smooth_dr.

    Args:
      jaccard: Whether the loss is 1 - intersection over union (Jaccard, IoU) and not Dice.
      **options: `class_weight`, `smooth_nr`, `smooth_dr`, `average`, `absent` and `transform` are
        those of `OverlapLoss`; `activation`, `include_background`, `squared_pred`, `soft_label`,
        `batch`, `ignore_label`, `regions`, `label_sets`, `data_format`, `reduction`, `name` and
        `dtype` are those of `SumsLoss`.
    """

    _arguments: tuple[str, ...] = ("jaccard",)

    def __init__(
        self,
        *,
        jaccard: bool = False,
        **options: Unpack[OverlapOptions],
    ) -> None:
        super().__init__(**options)
        self.jaccard = _checks.flag("jaccard", jaccard)

    def score(self, sums: DiceSums) -> Array:
        coefficient = formulas.jaccard if self.jaccard else formulas.dice
        return coefficient(sums, smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)


class TverskyLoss(OverlapLoss):
    """1 - (I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr) (Salehi et al., 2017).

    FP = P - I are the false positives, FN = T - I the false negatives. alpha = beta = 0.5 is Dice,
    and alpha = beta = 1 is Jaccard; beta > alpha favours recall, which helps with small lesions.
    With `gamma` it is the focal Tversky loss (1 - score)^gamma (Abraham & Khan, 2019; their
    exponent is 1 / gamma).

    Args:
      alpha: The weight of the false positives, as in MONAI and tensorflow-mri.
        (`keras.losses.Tversky` documents it so, but exchanges the two until Keras 3.15.)
      beta: The weight of the false negatives.
      gamma: The exponent. Above 1 it weakens the classes that are well segmented already.
      **options: They are those of `DiceLoss`, without `jaccard`.
    """

    _arguments: tuple[str, ...] = ("alpha", "beta", "gamma")

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        **options: Unpack[OverlapOptions],
    ) -> None:
        super().__init__(**options)
        self.alpha = _checks.at_least_0("alpha", alpha)
        self.beta = _checks.at_least_0("beta", beta)
        self.gamma = _checks.at_least_0("gamma", gamma)
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0, so that no error would count")
        if self.gamma == 0:
            raise ValueError("gamma is 0, so that every loss would be 1")
        if self.squared_pred:
            raise ValueError(
                "squared_pred=True would make FP = P - I negative, and reward it: use DiceLoss"
            )
        if self.gamma != 1 and self.transform != "linear":
            raise ValueError(
                f"gamma={self.gamma} and transform={self.transform!r} exclude each other"
            )

    def score(self, sums: DiceSums) -> Array:
        return formulas.tversky(
            sums,
            alpha=self.alpha,
            beta=self.beta,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
        )

    def loss_of_score(self, score: Array) -> Array:
        if self.gamma == 1:
            return super().loss_of_score(score)
        return formulas.focal_loss(score, self.gamma)


class MatthewsLoss(OverlapLoss):
    """1 - the Matthews correlation of prediction and label (Abhishek & Hamarneh, 2021).

    The correlation is (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)), with TP = I,
    FP = P - I, FN = T - I and TN = M - P - T + I, where M is the sum of the voxels' weights. Unlike
    Dice it also counts the voxels that rightly are not of the class. The loss is between 0 and 2.

    Args:
      smooth_nr: It is added to TP TN - FP FN.
      smooth_dr: It is added to the product under the root, as in MONAI.
      **options: They are those of `DiceLoss`, without `jaccard`.
    """

    def __init__(
        self,
        *,
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        **options: Unpack[UnsmoothedOptions],
    ) -> None:
        super().__init__(smooth_nr=smooth_nr, smooth_dr=smooth_dr, **options)
        if self.squared_pred:
            raise ValueError(
                "squared_pred=True would make FP = P - I and TN wrong, of which the correlation is "
                "made: use DiceLoss"
            )
        if self.transform == "log":
            raise ValueError('transform="log" has no value for a correlation below 0')

    def score(self, sums: DiceSums) -> Array:
        return formulas.matthews(sums, smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)


class GeneralizedDiceOptions(SumsOptions, total=False):
    """The options of `GeneralizedDiceLoss`, for the losses that hand them on."""

    weight_type: WeightType
    infinite_weight: InfiniteWeight
    smooth_nr: float
    smooth_dr: float


class GeneralizedDiceLoss(SumsLoss):
    """1 - (2 sum_c w I + smooth_nr) / (sum_c w (P + T) + smooth_dr) (Sudre et al., 2017).

    Each sample has one loss, in which the weight of a class falls with its volume.

    Args:
      weight_type: w: `"square"`, 1 / T^2; `"simple"`, 1 / T; `"uniform"`, 1.
      infinite_weight: The weight of a class with T = 0: `"largest"`, the largest finite one of the
        sample (as in MONAI); `"zero"`, so that the class does not count.
      smooth_nr, smooth_dr: They are added to numerator and denominator, which are near 1 / T for
        `"square"`. MONAI's 1e-5 is no longer small there for classes of 10,000 voxels, and hides
        the errors of those of 1,000,000. Where the denominator is 0, the loss is 0.
      **options: They are those of `SumsLoss`.
    """

    _arguments: tuple[str, ...] = ("weight_type", "infinite_weight", "smooth_nr", "smooth_dr")

    def __init__(
        self,
        *,
        weight_type: WeightType = "square",
        infinite_weight: InfiniteWeight = "largest",
        smooth_nr: float = 0.0,
        smooth_dr: float = 0.0,
        **options: Unpack[SumsOptions],
    ) -> None:
        super().__init__(**options)
        _checks.one_of("weight_type", weight_type, WeightType)
        _checks.one_of("infinite_weight", infinite_weight, InfiniteWeight)
        self.weight_type = weight_type
        self.infinite_weight = infinite_weight
        self.smooth_nr = _checks.at_least_0("smooth_nr", smooth_nr)
        self.smooth_dr = _checks.at_least_0("smooth_dr", smooth_dr)

    def from_sums(self, sums: DiceSums) -> Array:
        return 1 - formulas.generalized_dice(
            self.overlap_sums(sums),
            weight=self.weight_type,
            infinite_weight=self.infinite_weight,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
        )


class GeneralizedWassersteinDiceLoss(SumsLoss):
    """1 - (2 TP + smooth_nr) / (2 TP + E + smooth_dr) (Fidon et al., 2017).

    Not every mistake is equally bad: to take one part of a tumour for another is better than to
    miss it. The error of a voxel is the mean distance of the classes from its label's, weighted by
    their probabilities, and between 0 and 1. E is the sum of these errors, and TP the sum of 1 -
    error over the voxels of the foreground. Each sample has one loss. With two classes it is the
    Dice loss of the foreground.

    Args:
      dist_matrix: How far each class is from each other one, `[C, C]`; the row is the class of the
        label. It is divided by its largest distance. For background, edema and a tumour's core it
        may be `[[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]`.
      weighting_mode: `"default"`: the voxels of class 0, the background, are no true positives, and
        those of the other classes count 1; `"GDL"`: in TP and E, each voxel counts 1 / (T + 1),
        with the T of its label's class, and the background counts as well (Tilborghs et al., 2020).
        The names are MONAI's.
      smooth_nr, smooth_dr: They are added to numerator and denominator. Where the denominator is 0,
        the loss is 0.
      **options: They are those of `SumsLoss`, for class indices and `"softmax"` or `"none"`.
        `include_background`, `squared_pred`, `soft_label`, `regions` and `label_sets` have no
        meaning here.
    """

    _arguments: tuple[str, ...] = ("dist_matrix", "weighting_mode", "smooth_nr", "smooth_dr")

    def __init__(
        self,
        dist_matrix: DistMatrix,
        *,
        weighting_mode: WeightingMode = "default",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        **options: Unpack[SumsOptions],
    ) -> None:
        super().__init__(**options)
        _checks.one_of("weighting_mode", weighting_mode, WeightingMode)
        self.dist_matrix = _checks.distance_matrix(dist_matrix)
        self.weighting_mode = weighting_mode
        self.smooth_nr = _checks.at_least_0("smooth_nr", smooth_nr)
        self.smooth_dr = _checks.at_least_0("smooth_dr", smooth_dr)
        if self.activation == "sigmoid":
            raise ValueError(
                'activation="sigmoid" gives probabilities that do not add up to 1, so that their '
                'distance from a label has no meaning: use "softmax"'
            )
        if not self.include_background:
            raise ValueError(
                "include_background=False has no meaning here: voxels of the background are no "
                "true positives anyway, and what is wrong with them must count"
            )
        without = ("squared_pred", "soft_label", "regions", "label_sets")
        for option in (name for name in without if getattr(self, name)):
            raise ValueError(
                f"{option} has no meaning here: each voxel has one class, which has a distance "
                "from each other one"
            )

    def sum_options(self) -> dict[str, typing.Any]:
        return {"dist_matrix": self.dist_matrix}

    def from_sums(self, sums: DiceSums) -> Array:
        return 1 - formulas.generalized_wasserstein_dice(
            sums,
            weighting_mode=self.weighting_mode,
            smooth_nr=self.smooth_nr,
            smooth_dr=self.smooth_dr,
        )
