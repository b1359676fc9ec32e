"""The losses as formulas over the sums of `dice_op.dice_sums`: small tensors, readable mathematics.

I, P, T: intersection, prediction and label cardinality, `[N, C]`.
"""

import tensorflow as tf


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


def weighted(sums, sample_weight):
    """The sums of samples whose voxels all have the weight `sample_weight` `[N]` more."""
    weight = tf.cast(sample_weight, sums.intersection.dtype)
    sums = _per_class(lambda s: s * weight[:, tf.newaxis], sums)
    return sums._replace(weight_sum=sums.weight_sum * weight)


def over_batch(sums):
    """Sums of the whole batch as those of one sample: `[1, C]`."""
    totals = [None if s is None else tf.reduce_sum(s, 0, keepdims=True) for s in sums]
    return type(sums)(*totals)


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


def mean_over_classes(losses, class_weight=None):
    """`[N, C]` to `[N]`: the mean; with `class_weight` `[C]` the weighted sum, not normalised."""
    if class_weight is None:
        return tf.reduce_mean(losses, 1)
    return tf.reduce_sum(losses * class_weight, 1)
