"""The losses as formulas over the sums of `dice_op.dice_sums`: small tensors, readable mathematics.

I, P and T are the intersection and the cardinalities of prediction and label, `[N, C]`. M is the
sum of the weights, `[N]`, or `[N, C]` without the voxels that say nothing about the class.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import tensorflow as tf

from dice_op._types import InfiniteWeight, WeightingMode, WeightType

if typing.TYPE_CHECKING:
    from dice_op.ops import DiceSums

LOG_FLOOR = 1e-30  # Scores below it have no gradient in `log_loss`.


# --- scores of each sample and class: 1 is perfect ------------------------------------------------


def ratio(numerator: tf.Tensor, denominator: tf.Tensor) -> tf.Tensor:
    """numerator / denominator, and 1 where the denominator is 0.

    There, nothing was to be found, and nothing was found.
    """
    empty = tf.equal(denominator, 0)
    safe = tf.where(empty, tf.ones_like(denominator), denominator)
    return tf.where(empty, tf.ones_like(numerator), numerator / safe)


def dice(sums: DiceSums, *, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> tf.Tensor:
    """(2 I + smooth_nr) / (P + T + smooth_dr): soft Dice (Milletari et al., 2016)."""
    return ratio(2 * sums.intersection + smooth_nr, sums.pred_sum + sums.label_sum + smooth_dr)


def jaccard(sums: DiceSums, *, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> tf.Tensor:
    """(2 I + smooth_nr) / (2 (P + T - I) + smooth_dr): soft Jaccard (Rahman & Wang, 2016).

    This is intersection over union. The factor 2 makes the smoothing comparable with that of
    `dice`; MONAI does the same.
    """
    union = sums.pred_sum + sums.label_sum - sums.intersection
    return ratio(2 * sums.intersection + smooth_nr, 2 * union + smooth_dr)


def tversky(
    sums: DiceSums, *, alpha: float, beta: float, smooth_nr: float = 0.0, smooth_dr: float = 0.0
) -> tf.Tensor:
    """(I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr) (Salehi et al., 2017).

    FP = P - I are the false positives, FN = T - I the false negatives.
    """
    false_positives = sums.pred_sum - sums.intersection
    false_negatives = sums.label_sum - sums.intersection
    errors = alpha * false_positives + beta * false_negatives
    return ratio(sums.intersection + smooth_nr, sums.intersection + errors + smooth_dr)


def sensitivity(sums: DiceSums) -> tf.Tensor:
    """I / T: recall. Where T = 0, it is 1 if P = 0, else 0."""
    return _share(sums.label_sum, sums.intersection, sums.pred_sum)


def precision(sums: DiceSums) -> tf.Tensor:
    """I / P. Where P = 0, it is 1 if T = 0, else 0."""
    return _share(sums.pred_sum, sums.intersection, sums.label_sum)


def specificity(sums: DiceSums) -> tf.Tensor:
    """TN / (M - T) with TN = M - P - T + I. Where T = M there are no negatives, and it is 1."""
    negatives = _known_weight(sums) - sums.label_sum
    return ratio(negatives - sums.pred_sum + sums.intersection, negatives)


def _known_weight(sums: DiceSums) -> tf.Tensor:
    """M of each class, `[N, C]`, without the voxels that say nothing about it."""
    m = sums.weight_sum[:, tf.newaxis]
    if sums.unknown_sum is None:
        return m * tf.ones_like(sums.label_sum)
    return m - sums.unknown_sum


def _share(whole: tf.Tensor, part: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    neither = tf.cast(tf.equal(other, 0), part.dtype)
    return tf.where(tf.equal(whole, 0), neither, ratio(part, whole))


def matthews(sums: DiceSums, *, smooth_nr: float = 0.0, smooth_dr: float = 0.0) -> tf.Tensor:
    """(M I - P T + smooth_nr) / sqrt(P T (M - P) (M - T) + smooth_dr): the Matthews correlation of
    prediction and label, between -1 and 1 (Abhishek & Hamarneh, 2021).

    It is (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)) with TP = I, FP = P - I,
    FN = T - I and TN = M - P - T + I. It is 1 where nothing is wrong, also where a class is
    nowhere or everywhere, and otherwise 0 where the root is 0.
    """
    m = _known_weight(sums)
    i, p, t = sums.intersection, sums.pred_sum, sums.label_sum
    square = p * t * (m - p) * (m - t) + smooth_dr
    undefined = square <= 0
    root = tf.sqrt(tf.where(undefined, tf.ones_like(square), square))
    score = tf.where(undefined, tf.zeros_like(i), (m * i - p * t + smooth_nr) / root)
    nothing_wrong = tf.logical_and(tf.equal(p, i), tf.equal(t, i))
    return tf.where(nothing_wrong, tf.ones_like(i), score)


def generalized_dice(
    sums: DiceSums,
    *,
    weight: WeightType = "square",
    infinite_weight: InfiniteWeight = "largest",
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
) -> tf.Tensor:
    """(2 sum_c w I + smooth_nr) / (sum_c w (P + T) + smooth_dr), `[N]` (Sudre et al., 2017).

    The weight w is 1 / T^2 ("square"), 1 / T ("simple") or 1 ("uniform"). A class with T = 0 has
    the largest finite weight of its sample ("largest", as in MONAI), or the weight 0 ("zero").
    """
    t = sums.label_sum
    absent = tf.equal(t, 0)
    present = tf.where(absent, tf.ones_like(t), t)
    w = {"square": 1 / tf.square(present), "simple": 1 / present, "uniform": tf.ones_like(t)}[
        weight
    ]
    if weight != "uniform":
        w = tf.where(absent, tf.zeros_like(w), w)
        if infinite_weight == "largest":
            w = tf.where(absent, tf.reduce_max(w, 1, keepdims=True), w)
    w = tf.stop_gradient(w)
    numerator = 2 * tf.reduce_sum(w * sums.intersection, 1) + smooth_nr
    return ratio(numerator, tf.reduce_sum(w * (sums.pred_sum + t), 1) + smooth_dr)


def generalized_wasserstein_dice(
    sums: DiceSums,
    *,
    weighting_mode: WeightingMode = "default",
    smooth_nr: float = 0.0,
    smooth_dr: float = 0.0,
) -> tf.Tensor:
    """(2 TP + smooth_nr) / (2 TP + E + smooth_dr), `[N]` (Fidon et al., 2017).

    With D = `distance_sum`, TP = sum_c w (T - D) are the true positives. In the mode "default" the
    weight w is 0 for class 0, the background, and 1 for the others, and E = sum_c D is the error.
    In the mode "GDL" w = 1 / (T + 1), and E = sum_c w D (Tilborghs et al., 2020).
    """
    t, d = sums.label_sum, sums.distance_sum
    if weighting_mode == "GDL":
        w = tf.stop_gradient(1 / (t + 1))
        error = w * d
    else:
        w = tf.concat([tf.zeros_like(t[:, :1]), tf.ones_like(t[:, 1:])], 1)
        error = d
    true_positives = 2 * tf.reduce_sum(w * (t - d), 1)
    return ratio(true_positives + smooth_nr, true_positives + tf.reduce_sum(error, 1) + smooth_dr)


# --- from scores to losses ------------------------------------------------------------------------


def log_loss(score: tf.Tensor) -> tf.Tensor:
    """-log(score): log Dice. Scores below 1e-30 count as 1e-30."""
    return -tf.math.log(tf.maximum(score, LOG_FLOOR))


def log_cosh_loss(score: tf.Tensor) -> tf.Tensor:
    """log(cosh(1 - score)): log-cosh Dice (Jadon, 2020)."""
    return tf.math.log(tf.cosh(1 - score))


def focal_loss(score: tf.Tensor, gamma: float | tf.Tensor) -> tf.Tensor:
    """(1 - score)^gamma: focal Tversky (Abraham & Khan, 2019, whose exponent is 1 / gamma).

    gamma: one exponent, or `[C]`.
    """
    error = 1 - score
    wrong = error > 0  # For gamma < 1 the derivative of the power is infinite at 0.
    return tf.where(wrong, tf.pow(tf.where(wrong, error, tf.ones_like(error)), gamma), 0.0)


def mean_over_classes(
    losses: tf.Tensor, class_weight: tf.Tensor | None = None, counted: tf.Tensor | None = None
) -> tf.Tensor:
    """`[N, C]` to `[N]`: the mean, or with `class_weight` `[C]` the weighted sum, not normalised.

    counted: booleans `[N, C]`. The mean, or the weighted sum, is taken over those classes only, and
      where there are none it is 0.
    """
    if counted is not None:
        losses = tf.where(counted, losses, tf.zeros_like(losses))
    if class_weight is not None:
        return tf.reduce_sum(losses * class_weight, 1)
    if counted is None:
        return tf.reduce_mean(losses, 1)
    return _mean(tf.reduce_sum(losses, 1), tf.reduce_sum(tf.cast(counted, losses.dtype), 1))


def mean_by_support(losses: tf.Tensor, sums: DiceSums) -> tf.Tensor:
    """`[N, C]` to `[N]`: the mean over the classes, each weighted by its T, its voxels."""
    return _mean(tf.reduce_sum(losses * sums.label_sum, 1), tf.reduce_sum(sums.label_sum, 1))


# --- cross-entropy --------------------------------------------------------------------------------


def cross_entropy(sums: DiceSums, class_weight: tf.Tensor | None = None) -> tf.Tensor:
    """Mean categorical cross-entropy of the voxels, `[N]`: sum_c w CE / sum_c w T.

    Without `class_weight` `[C]` it is sum_c CE / M. The same in PyTorch is
    `CrossEntropyLoss(weight)`.
    """
    if class_weight is None:
        return _mean(tf.reduce_sum(sums.cross_entropy, 1), sums.weight_sum)
    total = tf.reduce_sum(class_weight * sums.cross_entropy, 1)
    return _mean(total, tf.reduce_sum(class_weight * sums.label_sum, 1))


def binary_cross_entropy(
    sums: DiceSums,
    class_weight: tf.Tensor | None = None,
    positive: tf.Tensor | float = 1.0,
    negative: tf.Tensor | float = 1.0,
) -> tf.Tensor:
    """Mean binary cross-entropy of voxels and classes, `[N]`: sum_c w (a CE + b CE-) / sum_c w M.

    CE is that of the label 1 and CE- that of the label 0; a is `positive`, and b `negative`, each a
    number or `[C]`. The same in PyTorch is `BCEWithLogitsLoss(pos_weight=a)` with b = 1.
    """
    if class_weight is None:
        class_weight = tf.ones_like(sums.intersection[:1])
    both = tf.multiply(sums.cross_entropy, positive)
    both += tf.multiply(sums.negative_cross_entropy, negative)
    total = tf.reduce_sum(class_weight * both, 1)
    return _mean(total, tf.reduce_sum(class_weight * _known_weight(sums), 1))


def _mean(total: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """total / weight, and 0 where the weight is 0."""
    return tf.math.divide_no_nan(total, weight)


# --- sums over samples, classes, patches and replicas ---------------------------------------------


def weighted(sums: DiceSums, sample_weight: tf.Tensor) -> DiceSums:
    """The sums as they are where every voxel of a sample counts `sample_weight` `[N]` times."""
    weight = tf.cast(sample_weight, sums.intersection.dtype)
    sums = _map_per_class(lambda s: s * weight[:, tf.newaxis], sums)
    return sums._replace(weight_sum=sums.weight_sum * weight)


def added(parts: Sequence[DiceSums]) -> DiceSums:
    """The sums of a volume from those of its patches, a list of `DiceSums`."""
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if s[0] is None else tf.add_n(s) for s in columns))


def over_batch(sums: DiceSums) -> DiceSums:
    """The sums of the whole batch, as those of one sample: `[1, C]`."""
    return _map(lambda s: tf.reduce_sum(s, 0, keepdims=True), sums)


def over_replicas(sums: DiceSums) -> DiceSums:
    """The sums over all replicas of a distribution strategy. This is differentiable."""
    if (
        tf.distribute.get_strategy().num_replicas_in_sync == 1
        or tf.distribute.in_cross_replica_context()
    ):
        return sums
    context = tf.distribute.get_replica_context()
    totals = context.all_reduce(tf.distribute.ReduceOp.SUM, [s for s in sums if s is not None])
    totals = iter(totals)
    return _map(lambda _: next(totals), sums)


def select_classes(sums: DiceSums, first: int) -> DiceSums:
    """The sums without the classes below `first`."""
    return _map_per_class(lambda s: s[:, first:], sums)


def over_classes(sums: DiceSums, class_weight: tf.Tensor | None = None) -> DiceSums:
    """The sums over all classes, as those of one class, `[N, 1]`.

    With `class_weight` `[C]` each class is weighted. Each voxel counts once for each class.
    """

    def total(s: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(s if class_weight is None else s * class_weight, 1, keepdims=True)

    added = _map_per_class(total, sums)
    if sums.weight_sum is None:
        return added
    if class_weight is None:
        class_weight = tf.ones_like(sums.intersection[0])
    return added._replace(weight_sum=sums.weight_sum * tf.reduce_sum(class_weight))


def _map(function: Callable[[tf.Tensor], tf.Tensor], sums: DiceSums) -> DiceSums:
    """Applies `function` to each of the sums. Those that are None stay so."""
    return type(sums)(*(None if s is None else function(s) for s in sums))


def _map_per_class(function: Callable[[tf.Tensor], tf.Tensor], sums: DiceSums) -> DiceSums:
    """Applies `function` to the sums that are `[N, C]`, all but `weight_sum`."""
    return _map(function, sums._replace(weight_sum=None))._replace(weight_sum=sums.weight_sum)
