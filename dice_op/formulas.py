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
    """(2 I + smooth_nr) / (P + T + smooth_dr): the soft Dice coefficient (Milletari et al., 2016)."""
    return ratio(2 * sums.intersection + smooth_nr, sums.pred_sum + sums.label_sum + smooth_dr)


def jaccard(sums, *, smooth_nr=0.0, smooth_dr=0.0):
    """(2 I + smooth_nr) / (2 (P + T - I) + smooth_dr): intersection over union (Rahman & Wang, 2016).

    The factor 2 keeps the smoothing comparable with `dice`, as MONAI has it.
    """
    union = sums.pred_sum + sums.label_sum - sums.intersection
    return ratio(2 * sums.intersection + smooth_nr, 2 * union + smooth_dr)


def over_batch(sums):
    """Sums of the whole batch as those of one sample: `[1, C]`."""
    return tf.nest.map_structure(lambda s: tf.reduce_sum(s, 0, keepdims=True), sums)


def select_classes(sums, first):
    """The sums without the classes below `first`."""
    return sums._replace(
        **{k: v[:, first:] for k, v in sums._asdict().items() if k != "weight_sum" and v is not None}
    )


def over_classes(sums, class_weight=None):
    """Sums over all classes as those of one: `[N, 1]`; each class weighted by `class_weight` `[C]`."""

    def total(s):
        return tf.reduce_sum(s if class_weight is None else s * class_weight, 1, keepdims=True)

    return sums._replace(
        **{k: total(v) for k, v in sums._asdict().items() if k != "weight_sum" and v is not None}
    )


def mean_over_classes(losses, class_weight=None):
    """`[N, C]` to `[N]`: the mean, or with `class_weight` `[C]` the weighted sum, not normalised."""
    if class_weight is None:
        return tf.reduce_mean(losses, 1)
    return tf.reduce_sum(losses * class_weight, 1)
