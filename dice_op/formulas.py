"""The losses as formulas over the sums of `dice_op.dice_sums`: small arrays, readable mathematics.

The arrays may be those of TensorFlow, PyTorch, JAX or NumPy.

I, P and T are the intersection and the cardinalities of prediction and label, `[N, C]`. M is the
sum of the weights, `[N]`, or `[N, C]` without the voxels that say nothing about the class.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence

from dice_op._arrays import Array, cast, namespace, stop_gradient
from dice_op._sums import DiceSums
from dice_op._types import InfiniteWeight, WeightingMode, WeightType

LOG_FLOOR = 1e-30  # Scores below it have no gradient in `log_loss`.


# --- scores of each sample and class: 1 is perfect ------------------------------------------------


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 1 where the denominator is 0.

    There, nothing was to be found, and nothing was found.
    """
    xp = namespace(denominator)
    empty = denominator == 0
    safe = xp.where(empty, xp.ones_like(denominator), denominator)
    return xp.where(empty, xp.ones_like(numerator), numerator / safe)


def dice(sums: DiceSums, *, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Array:
    """(2 I + smooth_nr) / (P + T + smooth_dr): soft Dice (Milletari et al., 2016)."""
    return ratio(2 * sums.intersection + smooth_nr, sums.pred_sum + sums.label_sum + smooth_dr)


def jaccard(sums: DiceSums, *, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Array:
    """(2 I + smooth_nr) / (2 (P + T - I) + smooth_dr): soft Jaccard (Rahman & Wang, 2016).

    This is intersection over union. The factor 2 makes the smoothing comparable with that of
    `dice`; MONAI does the same.
    """
    union = sums.pred_sum + sums.label_sum - sums.intersection
    return ratio(2 * sums.intersection + smooth_nr, 2 * union + smooth_dr)


def tversky(
    sums: DiceSums, *, alpha: float, beta: float, smooth_nr: float = 0.0, smooth_dr: float = 0.0
) -> Array:
    """(I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr) (Salehi et al., 2017).

    FP = P - I are the false positives, FN = T - I the false negatives.
    """
    false_positives = sums.pred_sum - sums.intersection
    false_negatives = sums.label_sum - sums.intersection
    errors = alpha * false_positives + beta * false_negatives
    return ratio(sums.intersection + smooth_nr, sums.intersection + errors + smooth_dr)


def sensitivity(sums: DiceSums) -> Array:
    """I / T: recall. Where T = 0, it is 1 if P = 0, else 0."""
    return _share(sums.label_sum, sums.intersection, sums.pred_sum)


def precision(sums: DiceSums) -> Array:
    """I / P. Where P = 0, it is 1 if T = 0, else 0."""
    return _share(sums.pred_sum, sums.intersection, sums.label_sum)


def specificity(sums: DiceSums) -> Array:
    """TN / (M - T) with TN = M - P - T + I. Where T = M there are no negatives, and it is 1."""
    negatives = _known_weight(sums) - sums.label_sum
    return ratio(negatives - sums.pred_sum + sums.intersection, negatives)


def _known_weight(sums: DiceSums) -> Array:
    """M of each class, `[N, C]`, without the voxels that say nothing about it."""
    m = sums.weight_sum[:, None]
    if sums.unknown_sum is None:
        return m * namespace(m).ones_like(sums.label_sum)
    return m - sums.unknown_sum


def _share(whole: Array, part: Array, other: Array) -> Array:
    xp = namespace(part)
    neither = xp.where(other == 0, xp.ones_like(part), xp.zeros_like(part))
    return xp.where(whole == 0, neither, ratio(part, whole))


def matthews(sums: DiceSums, *, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> Array:
    """(M I - P T + smooth_nr) / sqrt(P T (M - P) (M - T) + smooth_dr): the Matthews correlation of
    prediction and label, between -1 and 1 (Abhishek & Hamarneh, 2021).

    It is (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)) with TP = I, FP = P - I,
    FN = T - I and TN = M - P - T + I. It is 1 where nothing is wrong, also where a class is
    nowhere or everywhere, and otherwise 0 where the root is 0.
    """
    xp = namespace(sums.intersection)
    m = _known_weight(sums)
    i, p, t = sums.intersection, sums.pred_sum, sums.label_sum
    square = p * t * (m - p) * (m - t) + smooth_dr
    undefined = square <= 0
    root = xp.sqrt(xp.where(undefined, xp.ones_like(square), square))
    # This form of M I - P T is exactly 0 for a class that is nowhere or everywhere.
    numerator = i * (m - t) - t * (p - i) + smooth_nr
    score = xp.where(undefined, xp.zeros_like(i), numerator / root)
    nothing_wrong = (p == i) & (t == i)
    return xp.where(nothing_wrong, xp.ones_like(i), score)


def generalized_dice(
    sums: DiceSums,
    *,
    weight: WeightType = "square",
    infinite_weight: InfiniteWeight = "largest",
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
) -> Array:
    """(2 sum_c w I + smooth_nr) / (sum_c w (P + T) + smooth_dr), `[N]` (Sudre et al., 2017).

    The weight w is 1 / T^2 ("square"), 1 / T ("simple") or 1 ("uniform"). A class with T = 0 has
    the largest finite weight of its sample ("largest", as in MONAI), or the weight 0 ("zero").
    """
    t = sums.label_sum
    xp = namespace(t)
    absent = t == 0
    present = xp.where(absent, xp.ones_like(t), t)
    w = 1 / (present * present) if weight == "square" else 1 / present
    w = xp.where(absent, xp.zeros_like(w), w)
    if infinite_weight == "largest":
        w = xp.where(absent, xp.amax(w, 1, keepdims=True), w)
    w = xp.ones_like(t) if weight == "uniform" else stop_gradient(w)
    numerator = 2 * xp.sum(w * sums.intersection, 1) + smooth_nr
    return ratio(numerator, xp.sum(w * (sums.pred_sum + t), 1) + smooth_dr)


def generalized_wasserstein_dice(
    sums: DiceSums,
    *,
    weighting_mode: WeightingMode = "default",
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
) -> Array:
    """(2 TP + smooth_nr) / (2 TP + E + smooth_dr), `[N]` (Fidon et al., 2017).

    With D = `distance_sum`, TP = sum_c w (T - D) are the true positives. In the mode "default" the
    weight w is 0 for class 0, the background, and 1 for the others, and E = sum_c D is the error.
    In the mode "GDL" w = 1 / (T + 1), and E = sum_c w D (Tilborghs et al., 2020).
    """
    t, d = sums.label_sum, _asked_for(sums, "distance_sum")
    xp = namespace(t)
    if weighting_mode == "GDL":
        w = stop_gradient(1 / (t + 1))
        t, d = w * t, w * d
        error = d
    else:
        error, t, d = d, t[:, 1:], d[:, 1:]
    right = 2 * xp.sum(t - d, 1)
    return ratio(right + smooth_nr, right + xp.sum(error, 1) + smooth_dr)


# --- from scores to losses ------------------------------------------------------------------------


def log_loss(score: Array) -> Array:
    """-log(score): log Dice. Scores below 1e-30 count as 1e-30."""
    xp = namespace(score)
    return -xp.log(xp.where(score < LOG_FLOOR, xp.zeros_like(score) + LOG_FLOOR, score))


def log_cosh_loss(score: Array) -> Array:
    """log(cosh(1 - score)): log-cosh Dice (Jadon, 2020)."""
    xp = namespace(score)
    return xp.log(xp.cosh(1 - score))


def focal_loss(score: Array, gamma: float | Array) -> Array:
    """(1 - score)^gamma: focal Tversky (Abraham & Khan, 2019, whose exponent is 1 / gamma).

    gamma: one exponent, or `[C]`.
    """
    xp = namespace(score)
    error = 1 - score
    wrong = error > 0  # For gamma < 1 the derivative of the power is infinite at 0.
    power = xp.where(wrong, error, xp.ones_like(error)) ** gamma
    return xp.where(wrong, power, xp.zeros_like(power))


def mean_over_classes(
    losses: Array, class_weight: Array | None = None, counted: Array | None = None
) -> Array:
    """`[N, C]` to `[N]`: the mean, or with `class_weight` `[C]` the weighted sum, not normalised.

    counted: booleans `[N, C]`. The mean, or the weighted sum, is taken over those classes only, and
      where there are none it is 0.
    """
    xp = namespace(losses)
    if counted is not None:
        losses = xp.where(counted, losses, xp.zeros_like(losses))
    if class_weight is not None:
        return xp.sum(losses * class_weight, 1)
    if counted is None:
        return xp.mean(losses, 1)
    ones = xp.where(counted, xp.ones_like(losses), xp.zeros_like(losses))
    return _mean(xp.sum(losses, 1), xp.sum(ones, 1))


def mean_by_support(losses: Array, sums: DiceSums) -> Array:
    """`[N, C]` to `[N]`: the mean over the classes, each weighted by its T, its voxels."""
    xp = namespace(losses)
    return _mean(xp.sum(losses * sums.label_sum, 1), xp.sum(sums.label_sum, 1))


# --- cross-entropy --------------------------------------------------------------------------------


def cross_entropy(sums: DiceSums, class_weight: Array | None = None) -> Array:
    """Mean categorical cross-entropy of the voxels, `[N]`: sum_c w CE / sum_c w T.

    Without `class_weight` `[C]` it is sum_c CE / M. The same in PyTorch is
    `CrossEntropyLoss(weight)`.
    """
    ce = _asked_for(sums, "cross_entropy")
    xp = namespace(ce)
    if class_weight is None:
        return _mean(xp.sum(ce, 1), sums.weight_sum)
    total = xp.sum(class_weight * ce, 1)
    return _mean(total, xp.sum(class_weight * sums.label_sum, 1))


def binary_cross_entropy(
    sums: DiceSums,
    class_weight: Array | None = None,
    positive: Array | float = 1.0,
    negative: Array | float = 1.0,
) -> Array:
    """Mean binary cross-entropy of voxels and classes, `[N]`: sum_c w (a CE + b CE-) / sum_c w M.

    CE is that of the label 1 and CE- that of the label 0; a is `positive`, and b `negative`, each a
    number or `[C]`. The same in PyTorch is `BCEWithLogitsLoss(pos_weight=a)` with b = 1.
    """
    xp = namespace(sums.intersection)
    both = _asked_for(sums, "cross_entropy") * positive
    both = both + _asked_for(sums, "negative_cross_entropy") * negative
    weight = _known_weight(sums)
    if class_weight is not None:
        both, weight = class_weight * both, class_weight * weight
    return _mean(xp.sum(both, 1), xp.sum(weight, 1))


_ASKED_BY = {
    "cross_entropy": "cross_entropy=True",
    "negative_cross_entropy": 'cross_entropy=True and activation="sigmoid"',
    "distance_sum": "dist_matrix",
}


def _asked_for(sums: DiceSums, name: str) -> Array:
    """The sum of this name, which is there only if `dice_sums` was asked for it."""
    found = getattr(sums, name)
    if found is None:
        raise ValueError(f"the sums hold no {name}: dice_sums computes it with {_ASKED_BY[name]}")
    return found


def _mean(total: Array, weight: Array) -> Array:
    """total / weight, and 0 where the weight is 0."""
    xp = namespace(total)
    nothing = weight == 0
    mean = total / xp.where(nothing, xp.ones_like(weight), weight)
    return xp.where(nothing, xp.zeros_like(mean), mean)


# --- sums over samples, classes, patches and replicas ---------------------------------------------


def weighted(sums: DiceSums, sample_weight: Array) -> DiceSums:
    """The sums as they are where every voxel of a sample counts `sample_weight` `[N]` times."""
    weight = cast(sample_weight, sums.intersection)
    sums = _map_per_class(lambda s: s * weight[:, None], sums)
    return sums._replace(weight_sum=sums.weight_sum * weight)


def added(parts: Sequence[DiceSums]) -> DiceSums:
    """The sums of a volume from those of its patches, a list of `DiceSums`."""
    columns = zip(*parts, strict=True)
    return DiceSums(*(None if s[0] is None else functools.reduce(operator.add, s) for s in columns))


def over_batch(sums: DiceSums) -> DiceSums:
    """The sums of the whole batch, as those of one sample: `[1, C]`."""
    return map_sums(lambda s: namespace(s).sum(s, 0, keepdims=True), sums)


def select_classes(sums: DiceSums, first: int) -> DiceSums:
    """The sums without the classes below `first`."""
    return _map_per_class(lambda s: s[:, first:], sums)


def over_classes(sums: DiceSums, class_weight: Array | None = None) -> DiceSums:
    """The sums over all classes, as those of one class, `[N, 1]`.

    With `class_weight` `[C]` each class is weighted. Each voxel counts once for each class.
    """
    xp = namespace(sums.intersection)

    # Stacked, all are added up in one operation, which on a GPU is one launch.
    stacked = xp.stack([s for s in sums._replace(weight_sum=None) if s is not None])
    if class_weight is not None:
        stacked = stacked * class_weight
    totals = xp.sum(stacked, 2, keepdims=True)
    numbers = itertools.count()
    added = _map_per_class(lambda _: totals[next(numbers)], sums)
    if sums.weight_sum is None:
        return added
    if class_weight is None:
        class_weight = xp.ones_like(sums.intersection[:1])
    return added._replace(weight_sum=sums.weight_sum * xp.sum(class_weight))


def map_sums(function: Callable[[Array], Array], sums: DiceSums) -> DiceSums:
    """Applies `function` to each of the sums. Those that are None stay so."""
    return DiceSums(*(None if s is None else function(s) for s in sums))


def _map_per_class(function: Callable[[Array], Array], sums: DiceSums) -> DiceSums:
    """Applies `function` to the sums that are `[N, C]`, all but `weight_sum`."""
    return map_sums(function, sums._replace(weight_sum=None))._replace(weight_sum=sums.weight_sum)
