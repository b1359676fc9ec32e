"""`DiceSums`, what the losses are made of, with arrays of any library."""

from __future__ import annotations

import typing

from dice_op._arrays import Array


class DiceSums(typing.NamedTuple):
    """Sums over the voxels of each sample and class.

    They are float32, or float64 for float64 logits. Those of scores (`"argmax"`, `"threshold"`) are
    counts, and float64, if JAX has that. There are N samples and C classes. A voxel has the weight
    m, the probability p and the label t.
    """

    intersection: Array
    """[N, C]: sum m p t, or sum m min(p, t) (`soft_label`)."""
    pred_sum: Array
    """[N, C]: sum m p, or sum m p^2 (`squared_pred`)."""
    label_sum: Array
    """[N, C]: sum m t, or sum m t^2 (`squared_pred`)."""
    cross_entropy: Array | None
    """[N, C]: sum m t (1 - p)^focal_gamma (-log p); None unless it is asked for."""
    negative_cross_entropy: Array | None
    """[N, C]: sum m (1 - t) p^focal_gamma (-log(1 - p)), the other half of a binary cross-entropy;
    None unless a cross-entropy is asked for and the activation is `"sigmoid"`."""
    unknown_sum: Array | None
    """[N, C]: sum m of the voxels that may belong to the class; None without `label_sets`."""
    distance_sum: Array | None
    """[N, C]: the sum over the voxels of the class of m times how far their predictions are from
    it, which is the sum over all classes of p times the class's distance; None without
    `dist_matrix`."""
    weight_sum: Array
    """[N]: sum m."""
