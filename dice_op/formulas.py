"""The losses as formulas over the sums of `dice_op.dice_sums`: small tensors, readable mathematics.

I, P, T: intersection, prediction and label cardinality, `[N, C]`; M: the sum of weights, `[N]`.
"""

import tensorflow as tf

LOG_FLOOR = 1e-30  # smallest score that a logarithm is taken of: where it holds, nothing is learnt


# --- scores, of each sample and class: 1 is perfect -----------------------------------------------


def ratio(numerator, denominator):
    """numerator / denominator, and 1 where the denominator is 0: nothing to find, nothing found."""
    empty = tf.equal(denominator, 0)
    safe = tf.where(empty, tf.ones_like(denominator), denominator)
    return tf.where(empty, tf.ones_like(numerator), numerator / safe)


def dice(sums, *, smooth_nr=0.0, smooth_dr=0.0):
    """(2 I + smooth_nr) / (P + T + smooth_dr): soft Dice (Milletari et al., 2016)."""
    return ratio(2 * sums.intersection + smooth_nr, sums.pred_sum + sums.label_sum + smooth_dr)


def jaccard(sums, *, smooth_nr=0.0, smooth_dr=0.0):
    """(2 I + smooth_nr) / (2 (P + T - I) + smooth_dr): soft Jaccard (Rahman & Wang, 2016).

    That is intersection over union. The factor 2 keeps the smoothing comparable with `dice`, as
    MONAI has it.
    """
    union = sums.pred_sum + sums.label_sum - sums.intersection
    return ratio(2 * sums.intersection + smooth_nr, 2 * union + smooth_dr)


def tversky(sums, *, alpha, beta, smooth_nr=0.0, smooth_dr=0.0):
    """(I + smooth_nr) / (I + alpha FP + beta FN + smooth_dr) (Salehi et al., 2017).

    FP = P - I, false positives; FN = T - I, false negatives.
    """
    false_positives = sums.pred_sum - sums.intersection
    false_negatives = sums.label_sum - sums.intersection
    errors = alpha * false_positives + beta * false_negatives
    return ratio(sums.intersection + smooth_nr, sums.intersection + errors + smooth_dr)


def generalized_dice(
    sums, *, weight="square", infinite_weight="largest", smooth_nr=0.0, smooth_dr=0.0
):
    """(2 sum_c w I + smooth_nr) / (sum_c w (P + T) + smooth_dr), `[N]` (Sudre et al., 2017).

    w = 1 / T^2 ("square"), 1 / T ("simple") or 1 ("uniform"). A class with T = 0 has the sample's
    largest finite weight ("largest", as in MONAI), or none ("zero").
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


# --- from scores to losses ------------------------------------------------------------------------


def log_loss(score):
    """-log(score): log Dice. Scores below 1e-30 count as that."""
    return -tf.math.log(tf.maximum(score, LOG_FLOOR))


def log_cosh_loss(score):
    """log(cosh(1 - score)): log-cosh Dice (Jadon, 2020)."""
    return tf.math.log(tf.cosh(1 - score))


def focal_loss(score, gamma):
    """(1 - score)^gamma: focal Tversky (Abraham & Khan, 2019, whose exponent is 1 / gamma)."""
    error = 1 - score
    wrong = error > 0  # the power's derivative at 0 is infinite for gamma < 1
    return tf.where(wrong, tf.pow(tf.where(wrong, error, tf.ones_like(error)), gamma), 0.0)


# --- cross-entropy --------------------------------------------------------------------------------


def cross_entropy(sums, class_weight=None):
    """Mean cross-entropy of the voxels, `[N]`, categorical: sum_c w CE / sum_c w T.

    Without `class_weight` `[C]` that is sum_c CE / M. PyTorch's `CrossEntropyLoss(weight)`.
    """
    if class_weight is None:
        return _mean(tf.reduce_sum(sums.cross_entropy, 1), sums.weight_sum)
    total = tf.reduce_sum(class_weight * sums.cross_entropy, 1)
    return _mean(total, tf.reduce_sum(class_weight * sums.label_sum, 1))


def binary_cross_entropy(sums, class_weight=None):
    """Mean binary cross-entropy of voxels and classes, `[N]`: sum_c w CE / (M sum_c w)."""
    if class_weight is None:
        class_weight = tf.ones_like(sums.cross_entropy[:1])
    total = tf.reduce_sum(class_weight * sums.cross_entropy, 1)
    return _mean(total, sums.weight_sum * tf.reduce_sum(class_weight))


def _mean(total, weight):
    """total / weight, and 0 where there is nothing."""
    return tf.math.divide_no_nan(total, weight)


# --- sums of other things than a sample and a class -----------------------------------------------


def weighted(sums, sample_weight):
    """The sums of samples whose voxels all have the weight `sample_weight` `[N]` more."""
    weight = tf.cast(sample_weight, sums.intersection.dtype)
    sums = _per_class(lambda s: s * weight[:, tf.newaxis], sums)
    return sums._replace(weight_sum=sums.weight_sum * weight)


def added(parts):
    """The sums of a volume from those of its patches, a list of `DiceSums`."""
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if s[0] is None else tf.add_n(s) for s in columns))


def over_batch(sums):
    """Sums of the whole batch as those of one sample: `[1, C]`."""
    totals = [None if s is None else tf.reduce_sum(s, 0, keepdims=True) for s in sums]
    return type(sums)(*totals)


def over_replicas(sums):
    """Sums of one replica as those of all replicas of a distribution strategy; differentiable."""
    if (
        tf.distribute.get_strategy().num_replicas_in_sync == 1
        or tf.distribute.in_cross_replica_context()
    ):
        return sums
    context = tf.distribute.get_replica_context()
    totals = context.all_reduce(tf.distribute.ReduceOp.SUM, [s for s in sums if s is not None])
    totals = iter(totals)
    return type(sums)(*(None if s is None else next(totals) for s in sums))


def select_classes(sums, first):
    """The sums without the classes below `first`."""
    return _per_class(lambda s: s[:, first:], sums)


def over_classes(sums, class_weight=None):
    """Sums over all classes as those of one, `[N, 1]`; with `class_weight` `[C]`, weighted."""

    def total(s):
        return tf.reduce_sum(s if class_weight is None else s * class_weight, 1, keepdims=True)

    return _per_class(total, sums)


def _per_class(function, sums):
    """The sums with `function` applied to those that are `[N, C]`."""
    *per_class, weight_sum = sums
    return type(sums)(*(None if s is None else function(s) for s in per_class), weight_sum)


def mean_over_classes(losses, class_weight=None, counted=None):
    """`[N, C]` to `[N]`: the mean; with `class_weight` `[C]` the weighted sum, not normalised.

    counted: booleans `[N, C]`; the mean, or the weighted sum, is over these alone, and where there
    are none it is 0.
    """
    if counted is not None:
        losses = tf.where(counted, losses, tf.zeros_like(losses))
    if class_weight is not None:
        return tf.reduce_sum(losses * class_weight, 1)
    if counted is None:
        return tf.reduce_mean(losses, 1)
    return _mean(tf.reduce_sum(losses, 1), tf.reduce_sum(tf.cast(counted, losses.dtype), 1))
