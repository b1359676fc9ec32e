"""A volume that repeats a few voxels, and its results in float64.

Only the few voxels need a reference, however large the volume is, and a GPU fills its memory with
them faster than a host could send random numbers. Their number is prime, so that voxels lie at
every offset in a word of memory.
"""

import numpy as np

from benchmarks.cases import SMOOTH, decode, encode
from helpers import reference  # tests/helpers/reference.py

# These are wide, because they only check that a contender computes the same loss.
MAX_ERROR = {"float32": 1e-2, "bfloat16": 3e-2}


class RepeatedVolume:
    """The voxels that are repeated, and the correct results of the volume `[1, V, C]` of them."""

    def __init__(self, case):
        self.case, classes = case, case.classes
        self.activation = "softmax" if classes > 1 else "sigmoid"
        self.period = 4099 if classes <= 16 else 509
        rng = np.random.default_rng(classes)
        self.stored = encode(3 * rng.normal(size=(self.period, classes)), case.dtype)
        # Neighbours have the same label, as along a line through an organ.
        runs = rng.integers(0, max(classes, 2), self.period // 16 + 1)
        self.labels = np.repeat(runs, 16)[: self.period].astype(np.uint8)
        self.x = decode(self.stored, case.dtype)[None]
        self.t = reference.one_hot(self.labels, classes)[None]
        terms = reference.voxel_terms(self.x, self.t, activation=self.activation)
        self.terms = {name: term[0] for name, term in terms.items()}

    def sums(self):
        """The sums by their names, `[1, C]` each."""
        whole, rest = divmod(self.case.voxels, self.period)
        return {
            name: whole * s.sum(0)[None] + s[:rest].sum(0)[None] for name, s in self.terms.items()
        }

    def dice(self):
        """The Dice loss, and its derivatives by intersection and pred_sum."""
        sums = self.sums()
        i, p, t = (sums[name] for name in ("intersection", "pred_sum", "label_sum"))
        cardinality = p + t + SMOOTH
        d_intersection = -2 / cardinality / self.case.classes
        d_pred_sum = (2 * i + SMOOTH) / cardinality**2 / self.case.classes
        return float(reference.mean_dice(i, p, t)), (d_intersection, d_pred_sum)

    def gradient(self, coefficients):
        """The gradient of the repeated voxels, `[period, C]`."""
        return reference.gradient(self.x, self.t, coefficients, activation=self.activation)[0]

    def errors(self, loss, rows):
        """The absolute error of a loss, and the relative error of its gradient.

        Only the first and last voxels of the gradient are compared. rows(start, count) returns a
        part of the gradient `[V, C]` as a NumPy array.
        """
        expected_loss, (d_intersection, d_pred_sum) = self.dice()
        expected = self.gradient((d_intersection, d_pred_sum, 0 * d_pred_sum))
        voxels = self.case.voxels
        count = min(self.period, voxels)
        starts = (0, max(0, voxels // self.period - 1) * self.period)
        of_gradient = [
            reference.gradient_error(rows(start, count), expected[:count]) for start in starts
        ]
        errors = {
            "error": abs(loss - expected_loss),
            "gradient_error": float(np.max(of_gradient)),  # Python's max() could lose a NaN.
        }
        allowed = MAX_ERROR[self.case.dtype]
        return errors | {"wrong": not all(error <= allowed for error in errors.values())}


def gradient_error(device, array, expected):
    """The error of a gradient `[1, V, C]` that must repeat `expected`.

    The first voxels are compared with `expected` by relative L2, and the others with the first,
    byte by byte. If bytes differ, even by a rounding, all are copied to the host and compared
    element by element.
    """
    period, voxels = min(len(expected), array.shape[1]), array.shape[1]
    rows = array.reshape(*array.shape[1:])
    first = decode(rows.numpy(0, period), array.dtype)
    worst = reference.gradient_error(first, expected[:period])
    if voxels > period and device.mismatches(rows, period):
        step = max(1, (1 << 26) // expected.shape[1] // period) * period
        for start in range(0, voxels, step):
            count = min(step, voxels - start)
            got = decode(rows.numpy(start, count), array.dtype)
            wanted = np.resize(expected, got.shape)
            worst = max(worst, reference.relative_error(got, wanted))  # the error of one element
    return float(worst)
