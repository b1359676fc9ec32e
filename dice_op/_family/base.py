"""`SumsLoss`, the base of the losses: what a loss is, without a framework."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable

from dice_op import _checks, formulas
from dice_op._arrays import Array, cast, channel_axis, is_floating, namespace
from dice_op._sums import DiceSums
from dice_op._types import Activation, DataFormat, LabelSets, Reduction, Regions


class SumsOptions(typing.TypedDict, total=False):
    """The options of `SumsLoss`, for the losses that hand them on."""

    activation: Activation
    include_background: bool
    squared_pred: bool
    soft_label: bool
    batch: bool
    ignore_label: int | None
    regions: Regions | None
    label_sets: LabelSets | None
    data_format: DataFormat | None
    reduction: Reduction | None
    name: str | None
    dtype: typing.Any


class SumsLoss:
    """Base of the losses that are a formula over `dice_op.dice_sums`; derive your own from it.

    A subclass implements `from_sums`, and lists the names of its own arguments in `_arguments`, so
    that they are saved.

    Every loss here has these arguments.

    Args:
      activation: What turns `y_pred` into probabilities: `"softmax"`, `"sigmoid"` (also for
        overlapping regions), or `"none"` where the model ends in one already. A softmax on top of a
        softmax is an error where the loss can see it, as the last operation of the model.
      include_background: Whether class 0 counts. In a cross-entropy it always does.
      squared_pred: Whether p and t are squared in P and T (Milletari et al., "V-Net", 2016).
      soft_label: Whether I is the sum of min(p, t), not of p t, for labels that are fractions (Wang
        et al., "Dice Semimetric Losses", 2023). Without it the loss is not smallest where p = t,
        unless `squared_pred` is given. It makes no difference for class indices, and for labels of
        0 and 1.
      batch: Whether the sums are taken over the whole batch and not per sample, as nnU-Net's
        `batch_dice`, and over all replicas of a distribution strategy. Weights per sample then
        enter these sums. Each sample has the loss of the batch, so that the reduction should be a
        mean.
      ignore_label: Voxels with this integer label do not count.
      regions: The label values of each class, for overlapping regions, such as
        `[(1, 2, 3), (2, 3), (3,)]`; with `activation="sigmoid"`.
      label_sets: The classes that a label value may stand for, such as `{200: (0, 2, 3)}`, for data
        in which not every class is annotated (marginal loss; Shi et al., 2021).
        `dice_op.dice_sums` says what such a voxel adds. A class that no voxel of a sample is known
        to belong to is absent from it, so that `absent="skip"` is often wanted as well.
      data_format: `"channels_last"` or `"channels_first"`. None means Keras' setting,
        `keras.config.image_data_format()`, at the time when the loss is made; in PyTorch channels
        first, and in JAX channels last.
      reduction, name, dtype: They are those of every Keras loss. `dtype` is the type of the loss,
        never that of the logits. PyTorch and JAX have `reduction` alone: `"mean"`, `"sum"` or
        `"none"`.

    Call:
      y_true: Class indices `[N, spatial...]`, or labels of the shape of `y_pred`. With one class it
        is the mask, `[N, spatial...]` or `[N, spatial..., 1]`, of 0 and 1. `dice_op.dice_sums`
        lists the types.
      y_pred: Logits `[N, spatial..., C]` (or channels first) of any float type.
      sample_weight: `[N]`, or one weight per voxel, `[N, spatial...]`, which enters the sums.

    Keras casts labels and logits to float32 before `call`. Here both reach the op as they are:
    integer labels stay integers, and half-precision logits stay so.

    Keras' layers may attach a mask to `y_pred` (`keras.layers.Masking`, `Embedding`). The voxels
    that it leaves out then have the weight 0, and each sample is weighted by the share of its
    voxels that are left, so that a mean is taken over these voxels, as in Keras' own losses.

    Raises:
      ValueError: An argument has a wrong value, or does not go with another one.
    """

    _arguments: tuple[str, ...] = (
        "activation",
        "include_background",
        "squared_pred",
        "soft_label",
        "batch",
        "ignore_label",
        "regions",
        "label_sets",
        "data_format",
    )

    def __init__(
        self,
        *,
        activation: Activation = "softmax",
        include_background: bool = True,
        squared_pred: bool = False,
        soft_label: bool = False,
        batch: bool = False,
        ignore_label: int | None = None,
        regions: Regions | None = None,
        label_sets: LabelSets | None = None,
        data_format: DataFormat | None = None,
        **unknown: typing.Any,
    ) -> None:
        _checks.refuse_unknown(self, unknown)
        _checks.one_of("activation", activation, Activation)
        self.activation: Activation = activation
        self.include_background = _checks.flag("include_background", include_background)
        self.squared_pred = _checks.flag("squared_pred", squared_pred)
        self.soft_label = _checks.flag("soft_label", soft_label)
        self.batch = _checks.flag("batch", batch)
        self.ignore_label = _checks.label("ignore_label", ignore_label)
        self.regions = _checks.region_list(regions, include_background)
        if self.regions and activation == "softmax":
            raise ValueError(
                'regions overlap, but activation="softmax" gives a voxel one class: use "sigmoid"'
            )
        self.label_sets = _checks.label_set_dict(label_sets)
        _checks.regions_or_label_sets(self.regions, self.label_sets)
        self.data_format = _checks.data_format(data_format, self.default_data_format())

    def from_sums(self, sums: DiceSums) -> Array:
        """The loss of each sample, `[N]` or `[N, classes]`, from a `DiceSums`.

        With `batch` the sums are those of the whole batch, `[1, C]`, and so is the loss.
        """
        raise NotImplementedError

    def sum_options(self) -> dict[str, typing.Any]:
        """Further arguments for `dice_sums`: `cross_entropy`, `focal_gamma`, `label_smoothing`."""
        return {}

    def options_of_sums(
        self, classes: int | None, are_soft: Callable[[], bool]
    ) -> dict[str, typing.Any]:
        """All options of `dice_sums` for logits of so many classes.

        A loss that cannot take labels which are fractions asks `are_soft`, and raises an error.
        """
        return {
            "activation": self.activation,
            "squared_pred": self.squared_pred,
            "soft_label": self.soft_label,
            "ignore_label": self.ignore_label,
            "regions": self.regions,
            "label_sets": self.label_sets,
            "data_format": self.data_format,
            **self.sum_options(),
        }

    def overlap_sums(self, sums: DiceSums) -> DiceSums:
        """The sums of the classes that count in an overlap."""
        classes = sums.intersection.shape[1]
        if classes == 1 and self.activation == "softmax":
            raise ValueError(
                "y_pred has one class, whose softmax is 1 everywhere, so that nothing can be "
                'learnt: use activation="sigmoid" (or two classes, background and foreground)'
            )
        _checks.background(classes, self.include_background)
        return sums if self.include_background else formulas.select_classes(sums, 1)

    def losses_of(self, sums: DiceSums, sample_weight: Array | None = None) -> Array:
        """The loss of each sample, `[N]` or `[N, classes]`. The weights, `[N]`, enter the sums."""
        totals = self._totals(sums, sample_weight)
        if self.batch:
            totals = self.over_replicas(totals)
        return self._losses_of_totals(totals, sums.weight_sum)

    def _totals(self, sums: DiceSums, sample_weight: Array | None = None) -> DiceSums:
        """The sums with their weights: of each sample, or with `batch` of all samples, `[1, C]`."""
        if sample_weight is not None:
            sums = formulas.weighted(sums, sample_weight)
        return formulas.over_batch(sums) if self.batch else sums

    def _losses_of_totals(self, totals: DiceSums, samples: Array) -> Array:
        """The loss of each sample. `samples` is any array of their number, `[N]`."""
        losses = self.from_sums(totals)
        if not self.batch:
            return losses
        zeros = namespace(losses).zeros_like(samples)
        return losses + (zeros if len(losses.shape) == 1 else zeros[:, None])

    def each_sample_counts(self) -> bool:
        """Whether every sample has an overlap of its own."""
        return not self.batch

    def options(self) -> dict[str, typing.Any]:
        """The arguments that the loss was made with, by their names."""
        names = [n for c in type(self).__mro__ for n in c.__dict__.get("_arguments", ())]
        return {name: getattr(self, name) for name in names}

    # --- what a framework says ------------------------------------------------

    def default_data_format(self) -> DataFormat:
        return "channels_last"

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        """The sums over all devices that share in the batch. This is differentiable."""
        return sums


class LogitsFirst(SumsLoss):
    """How the losses of PyTorch and JAX are called: `loss(logits, labels, weight)`.

    reduction: `"mean"` or `"sum"` over the samples, or `"none"`.
    """

    _Reduction = typing.Literal["mean", "sum", "none"]

    def __init__(self, *, reduction: _Reduction = "mean", **options: typing.Any) -> None:
        super().__init__(**options)
        _checks.one_of("reduction", reduction, self._Reduction)
        self.reduction = reduction

    def value(
        self,
        dice_sums: Callable[..., DiceSums],
        logits: Array,
        labels: Array,
        weight: Array | None,
    ) -> Array:
        """The reduced loss. `weight` is `[N]`, or one weight per voxel."""
        axis = channel_axis(self.data_format)
        rank = len(logits.shape)

        def are_soft() -> bool:
            per_class = len(labels.shape) == rank and labels.shape[axis] == logits.shape[axis]
            return is_floating(labels) and per_class

        voxel_weight, of_samples = weight, None
        if weight is not None:
            shape = tuple(getattr(weight, "shape", ()))
            if shape[:1] != tuple(logits.shape[:1]):
                raise ValueError(
                    f"weight has shape {list(shape)}, but logits {list(logits.shape)}: it must be "
                    "[N], a weight per sample, or [N, spatial...], a weight per voxel"
                )
            if math.prod(shape) == shape[0]:
                voxel_weight, of_samples = None, weight.reshape(-1)
        options = self.options_of_sums(logits.shape[axis], are_soft)
        sums = dice_sums(logits, labels, voxel_weight=voxel_weight, **options)
        if of_samples is None or self.batch:
            losses = self.losses_of(sums, of_samples)
        else:
            losses = self.losses_of(sums)
            of_samples = cast(of_samples, losses)
            losses = losses * (of_samples if len(losses.shape) == 1 else of_samples[:, None])
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()
