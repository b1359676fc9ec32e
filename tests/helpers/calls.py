"""Calls of `dice_sums` drawn at random by hypothesis: legal ones with the results that float64
gives, and wrong ones with the words that refuse them.

Hypothesis draws what sort of call it is, and one number as the seed of what is in the arrays.
"""

import copy
import dataclasses
import typing

import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from helpers import reference
from helpers.kernel_inputs import (
    coefficients_by_name,
    distances_of,
    in_format,
    read_label_sets,
    renamed,
)

INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
HARD = ("argmax", "threshold")
EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}
# The first whole number that a type cannot hold, where labels may be as large.
END = {"bool": 2, "uint8": 256, "int8": 128, "float16": 2049, "bfloat16": 257}
_TABLES = ("regions", "label_sets", "dist_matrix")


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclasses.dataclass
class Call:
    """A legal call, and the same as reference.py takes it."""

    logits: np.ndarray  # in the layout that the options say
    labels: np.ndarray
    weight: np.ndarray | None
    options: dict[str, typing.Any]  # as core.sums takes them
    x: np.ndarray  # [N, V, C]
    t: np.ndarray  # [N, V, C]
    m: np.ndarray  # [N, V], 0 where a voxel does not count
    unknown: np.ndarray | None  # [N, V, C], 1 for the classes that a voxel may belong to
    dense: bool  # the labels are one value per class, and no class indices
    coefficients: list[np.ndarray]  # the derivatives of the sums that may have one

    @property
    def arrays(self):
        return self.logits, self.labels, self.weight

    @property
    def activation(self):
        return self.options["activation"]

    @property
    def has_gradient(self):
        return self.activation not in HARD

    @property
    def derivatives(self):
        """Those of the sums that the call asks for, by the sums' names."""
        given = self.coefficients if self.options["cross_entropy"] else self.coefficients[:2]
        named = coefficients_by_name(given, self.activation)
        if "dist_matrix" in self.options:
            named["d_distance_sum"] = self.coefficients[4]
        return {name.removeprefix("d_"): value for name, value in named.items()}

    def __repr__(self):
        shapes = [None if a is None else f"{a.dtype}{list(a.shape)}" for a in self.arrays]
        return f"Call({', '.join(map(str, shapes))}, {self.options})"

    # --- what float64 gives ---------------------------------------------------

    def _of_reference(self):
        options = {k: v for k, v in self.options.items() if k not in ("data_format",)}
        del options["cross_entropy"]
        if self.logits.dtype != np.float64:
            options["threshold"] = np.float32(options["threshold"])
        if options["soft_label"]:
            # It is for labels that may be fractions, and squares come first.
            is_soft = self.dense and self.labels.dtype.name in FLOATS
            options["soft_label"] = is_soft and not options["squared_pred"]
        if self.unknown is not None:
            options["unknown"] = self.unknown
        return renamed(options)

    def _finite(self):
        """The logits without infinite ones, of which reference.py makes NaN."""
        return np.maximum(self.x, -1e5)

    def expected(self):
        """The sums by their names, and how far from each the result may be."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            sums = reference.sums(self._finite(), self.t, self.m, **self._of_reference())
        sums["weight_sum"] = self.m.sum(1)
        if not self.options["cross_entropy"]:
            sums = {k: v for k, v in sums.items() if "cross_entropy" not in k}
        counts = not self.has_gradient and np.all(self.t % 1 == 0)
        exact = self.logits.dtype == np.float64 or counts
        tolerance = 1e-12 if exact else 2e-6
        bounds = {}
        for name, value in sums.items():
            bounds[name] = tolerance * np.abs(value).max(initial=0)
            bounds[name] += (0 if exact else 2**-120) * self.m.sum(1).max(initial=0)
            if "cross_entropy" in name:
                # Where p is nearly 1, -log p has the error of p, whatever its own size is.
                gamma = np.max(self._gamma(), initial=0)
                bounds[name] += tolerance / 4 * (1 + gamma) * self.m.sum(1).max(initial=0)
        return sums, bounds

    def expected_gradient(self):
        """The gradient [N, V, C] of the sums times the coefficients, and how far from it the result
        may be, in the L2 norm."""
        a, b, e, n, w = np.abs(np.float64(self.coefficients))
        factors = [k.astype(np.float64) for k in self.coefficients]
        if not self.options["cross_entropy"]:
            factors[2] = factors[3] = 0 * factors[2]
            e = n = 0 * e
        if "dist_matrix" not in self.options:
            w = 0 * w
        x, options = self._finite(), self._of_reference()
        with np.errstate(all="ignore"):
            gradient = reference.gradient(x, self.t, factors, self.m, **options)
        exact = self.logits.dtype == np.float64
        tolerance = 1e-12 if exact else 2e-6

        # The error is that of terms which may cancel each other: what each class adds directly, and
        # what its cross-entropy adds. None of them cancels where p is nearly 0 or 1.
        x = np.where(self.m[..., None] == 0, 0, x)
        of_sums = np.max(a + 2 * b, initial=0) + np.max(w, initial=0)
        of_loss = np.max(np.maximum(e, n), initial=0)
        gamma = self._gamma()
        if self.activation == "none":
            slope = of_sums + of_loss * (1 + gamma.max(initial=0)) / np.maximum(x, 1e-7)
            direct = logarithm = slope / 2
        else:
            p, rest = _with_rest(x, self.activation)
            smoothing = self.options["label_smoothing"]
            t = (1 - smoothing) * self.t + smoothing
            t = t if self.unknown is None else np.maximum(t, self.unknown)
            direct = of_sums * p * rest
            logarithm = of_loss * (t * rest + (1 if self.unknown is None else 2) * p)
        scale = np.linalg.norm(self.m[..., None] * (direct + logarithm))
        volume = np.linalg.norm(np.broadcast_to(self.m[..., None], x.shape))
        bound = tolerance / 2 * scale + 2**-48 * (of_sums + of_loss) * volume
        if np.any(gamma):
            # A power of 1 - p has few digits where p is nearly 1.
            power = min(1, gamma[gamma > 0].min(initial=1))
            epsilon = EPSILON["float64" if exact else "float32"]
            bound += 4 * (1 + gamma.max()) * epsilon**power * of_loss * volume
        # A result is rounded to the type of the logits, whose least step may be large.
        kind = self.logits.dtype.name
        bound += (2 * EPSILON[kind] + tolerance) * np.linalg.norm(gradient)
        bound += {"float16": 2**-25, "float32": 2**-149}.get(kind, 0) * np.sqrt(gradient.size)
        return gradient, bound

    def _gamma(self):
        if not self.options["cross_entropy"]:
            return np.zeros(1)
        return np.atleast_1d(self.options.get("focal_gammas", self.options["focal_gamma"]))

    # --- comparisons ----------------------------------------------------------

    def check_sums(self, found):
        """found: an array for each of the sums that the call asks for, by its name."""
        sums, bounds = self.expected()
        assert {k for k, v in found.items() if v is not None} == set(sums), self
        for name, value in sums.items():
            result = np.asarray(found[name]).astype(np.float64)
            assert result.shape == value.shape, (self, name, result.shape)
            error = np.abs(result - value).max(initial=0)
            assert error <= bounds[name], (self, name, error, bounds[name])

    def check_gradient(self, found):
        """found: the gradient in the layout of the logits."""
        assert found.shape == self.logits.shape, self
        found = np.asarray(found).astype(np.float64)
        found = self.as_voxels(found)
        gradient, bound = self.expected_gradient()
        if self.logits.dtype == np.float16:  # It has no larger numbers.
            large = np.abs(gradient) > 60000
            assert np.all(np.abs(found[large]) >= 59000), self
            found, gradient = (np.where(large, 0, a) for a in (found, gradient))
        error = np.linalg.norm(found - gradient)
        assert error <= bound, (self, error, bound)

    def as_voxels(self, array):
        """An array in the layout of the logits as [N, V, C]."""
        n, v, c = self.x.shape
        if self.options["data_format"] == "channels_last":
            return array.reshape(n, v, c)
        return array.reshape(n, c, v).swapaxes(1, 2)


def _with_rest(x, activation):
    """p, and 1 - p with all its digits."""
    with np.errstate(over="ignore"):
        if activation == "sigmoid":
            return 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    p = reference.softmax(x)
    others = p.sum(-1, keepdims=True) - p
    return p, np.where(p < 0.5, 1 - p, others)


# --- legal calls ----------------------------------------------------------------------------------

_GAMMAS = (0.0, 0.5, 1.0, 1.75, 2.0, 5.0)
# How large the logits are.
_STYLES = ("normal", "normal", "small", "large", "sure", "equal", "half infinite")


@st.composite
def shapes(draw, most=12_000, least=0):
    """N, the spatial axes, and C, so that there are at most so many logits."""
    n = draw(st.integers(max(least, 0), 3))
    many = st.one_of(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 130, 260]))
    c = draw(many)
    sizes = st.one_of(st.integers(least, 9), st.integers(least, 40))
    spatial = draw(st.lists(sizes, max_size=3))
    while max(spatial, default=0) > 1 and n * c * np.prod(spatial) * max(1, c // 16) > most:
        largest = int(np.argmax(spatial))
        spatial[largest] = (spatial[largest] + 1) // 2
    return n, tuple(spatial), c


@st.composite
def legal(draw, most=12_000, least=0):
    """A legal call. most: of logits in all; least: of samples, and of voxels on an axis."""
    n, spatial, c = draw(shapes(most, least))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["index"] * 4 + ["one-hot", "soft"]))
    dtype = draw(st.sampled_from(FLOATS))
    activation = draw(st.sampled_from(["softmax", "softmax", "sigmoid", "none", *HARD]))
    options = {
        "activation": activation,
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
        "squared_pred": draw(st.booleans()),
        "soft_label": draw(st.booleans()),
        "cross_entropy": activation not in HARD and draw(st.booleans()),
        "focal_gamma": draw(st.sampled_from(_GAMMAS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.25, 1.0])),
        "threshold": draw(st.sampled_from([0.0, 0.5, -1.25, 0.1])),
    }
    if c <= 256 and draw(st.integers(0, 5)) == 1:
        options["focal_gammas"] = rng.choice(_GAMMAS, c).tolist()
    v = int(np.prod(spatial))
    style = draw(st.sampled_from(_STYLES))
    weight_dtype = draw(st.sampled_from([None, None, *INTEGERS, *FLOATS]))
    weight = None
    m = np.ones((n, v))
    if weight_dtype is not None:
        many = rng.integers(0, 3, (n, v)) if rng.random() < 0.5 else 2 * rng.random((n, v))
        weight = np.where(rng.random((n, v)) < 0.2, 0, many).astype(dtype_of(weight_dtype))
        m = weight.astype(np.float64)

    unknown = None
    if kind == "index":
        labels, t, m, unknown = draw(_indices(rng, (n, v, c), m, options))
    else:
        t = rng.random((n, v, c))
        label_dtype = draw(st.sampled_from(FLOATS if kind == "soft" else INTEGERS + FLOATS))
        t = np.where(t < 0.3, 0, t) if kind == "soft" else t < 0.5
        labels = t.astype(dtype_of(label_dtype))
        if c == 1 and label_dtype not in FLOATS and rng.random() < 0.5:
            labels = labels[..., 0]
        t = t * 1.0 if kind == "one-hot" else labels.astype(np.float64)

    x = _logits(rng, (n, v, c), style, options, t if unknown is None else np.maximum(t, unknown))
    x = x.astype(dtype_of(dtype))
    wide = x.astype(np.float64)
    without = np.where(m == 0, rng.choice([np.nan, np.inf, 0.0]), 0)[..., None]
    held = x if not np.any(m == 0) else np.where(m[..., None] == 0, without.astype(x.dtype), x)
    kept_format = options["data_format"]
    arrays = [
        None if a is None else _in_place(a, kept_format, (n, spatial, c), unit)
        for a, unit in ((held, False), (labels, draw(st.booleans())), (weight, draw(st.booleans())))
    ]
    numbers = np.float64 if dtype == "float64" else np.float32
    coefficients = [rng.normal(size=(n, c)).astype(numbers) for _ in range(5)]
    return Call(*arrays, options, wide, t, m, unknown, kind != "index", coefficients)


def _in_place(array, data_format, shape, unit):
    """[N, V, C] or [N, V] with its spatial axes in this layout; unit: with a class axis of one."""
    n, spatial, c = shape
    channels = (c,) if array.ndim == 3 else (1,) if unit else ()
    (array,) = in_format(data_format, array)
    last = data_format == "channels_last"
    shape = (n, *spatial, *channels) if last else (n, *channels, *spatial)
    return np.ascontiguousarray(array).reshape(shape)


def _logits(rng, shape, style, options, t):
    if options["activation"] == "none":
        x = rng.random(shape)
        if style != "normal":
            x = np.where(rng.random(shape) < 0.3, rng.choice([0.0, 1.0], shape), x)
        return np.where((x > 0) & (x < 0.02), 0.02, x)
    scale = {"small": 1e-3, "large": 30, "sure": 3, "equal": 0}.get(style, 3)
    x = scale * rng.normal(size=shape)
    if style == "large" and "label_sets" not in options:  # The reference takes the log of their q.
        x = np.where(rng.random(shape) < 0.2, rng.choice([1e4, -1e4, 88.0, -104.0], shape), x)
    if style == "sure" and shape[2]:
        winner = rng.integers(0, shape[2], shape[:2])[..., None] == np.arange(shape[2])
        x = x + rng.choice([10, 15, 40]) * winner
    if style == "half infinite" and options["activation"] in ("softmax", "sigmoid"):
        # A class that is not the label's costs nothing there. One class is left in any case.
        free = (t == 0) & (rng.random(shape) < 0.3)
        free &= options["label_smoothing"] == 0
        free[..., :1] = False
        x = np.where(free, -np.inf, x)
    if options["activation"] == "argmax":
        x = np.round(x)  # There are ties then.
    return x


@st.composite
def _indices(draw, rng, shape, m, options):
    """Labels [N, V] that are class indices, t [N, V, C], the weights with what is ignored, and the
    classes that a voxel may belong to. Adds what concerns the labels to the options."""
    n, v, c = shape
    activation = options["activation"]
    table = draw(st.sampled_from([None, None, None, *_TABLES, "ignore"]))
    ignore = table == "ignore" or draw(st.integers(0, 4)) == 1
    fits = {"regions": activation in ("sigmoid", "threshold"), "label_sets": c > 1}
    fits["dist_matrix"] = 1 < c <= 40 and activation in ("softmax", "none")
    table = table if fits.get(table) else None
    # Floats of one class would be a mask that may be soft.
    floats = FLOATS if c > 1 or ignore or table else ()
    dtype = draw(st.sampled_from(INTEGERS + floats))
    end = END.get(dtype, 2**31)
    unknown = None
    if table == "regions":
        values = np.arange(min(end, draw(st.integers(1, 12))))
        regions = [
            rng.choice(values, rng.integers(1, len(values) + 1), replace=False).tolist()
            for _ in range(c)
        ]
        options["regions"] = regions
        legal = np.arange(max(map(max, regions)) + 1)
    elif table == "label_sets":
        keys = rng.integers(0, min(end, 256), draw(st.integers(1, 4))).tolist()
        sets = {
            int(k): rng.choice(c, rng.integers(1, min(c, 6) + 1), replace=False).tolist()
            for k in keys
        }
        options["label_sets"] = sets
        legal = np.union1d(np.arange(c), list(sets))
    else:
        legal = np.arange(max(c, 2))
        if table == "dist_matrix":
            options["dist_matrix"] = distances_of(c, int(rng.integers(100)))
    legal = legal[legal < end]
    index = rng.choice(legal, (n, v))
    if ignore:
        value = draw(st.sampled_from([0, 1, 2, 200, 255, -1, 2**40, -(2**62)]))
        if value not in options.get("label_sets", {}):
            options["ignore_label"] = value
            if np.array(value).astype(np.float64) == _held(value, dtype):
                index = np.where(rng.random((n, v)) < 0.3, value, index)
                m = np.where(index == value, 0, m)
    labels = index.astype(dtype_of(dtype))
    if table == "regions":
        t = np.stack([np.isin(index, r) for r in regions], -1).astype(float)
    elif table == "label_sets":
        t, unknown = read_label_sets(options["label_sets"], index * (m != 0), c)
    else:
        t = reference.one_hot(index, c)
    return labels, t, m, unknown


def _held(value, dtype):
    """What a type makes of a whole number, or None if it cannot hold it."""
    if dtype in INTEGERS:
        limits = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return float(value) if limits[0] <= value <= limits[1] else None
    with np.errstate(over="ignore"):
        return float(np.float64(value).astype(dtype_of(dtype)))


# --- wrong calls ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Arguments:
    """What a wrong call is made with. A change makes it wrong."""

    logits: typing.Any  # [N, spatial..., C], with two classes or more and a few voxels
    labels: typing.Any  # class indices
    weight: typing.Any
    options: dict[str, typing.Any]
    rng: np.random.Generator
    voxel: list[int] = dataclasses.field(default_factory=list)  # which one a message names

    @property
    def classes(self):
        return np.shape(self.logits)[-1] if np.ndim(self.logits) else 1

    def one_hot(self, dtype="float32"):
        return reference.one_hot(np.asarray(self.labels), self.classes).astype(dtype)

    def put(self, name, value, dtype=None):
        """Puts a value into a voxel of labels or logits, and remembers which."""
        array = np.array(getattr(self, name))
        array = array if dtype is None else array.astype(dtype)
        spatial = array.ndim - (np.ndim(self.logits) == array.ndim)
        self.voxel = [int(self.rng.integers(size)) for size in array.shape[:spatial]]
        at = (*self.voxel, *(int(self.rng.integers(s)) for s in array.shape[spatial:]))
        array[at] = value
        setattr(self, name, array)


def _set(**options):
    def change(a):
        a.options.update(copy.deepcopy(options))

    return change


def _labels(make):
    def change(a):
        a.labels = make(a)

    return change


def _logits_are(make):
    def change(a):
        a.logits = make(a)

    return change


def _weight(make):
    def change(a):
        a.weight = make(a)

    return change


def _put(name, value, dtype=None, dense=False, **options):
    def change(a):
        if dense:
            a.labels = a.one_hot()
        a.options.update(options)
        a.put(name, value, dtype)

    return change


def _of_classes(name, make, **options):
    """Sets an option that depends on the number of classes."""

    def change(a):
        a.options.update(copy.deepcopy(options))
        a.options[name] = make(a.classes)

    return change


def _dense(**options):
    def change(a):
        a.labels = a.one_hot()
        for name, value in options.items():
            a.options[name] = value(a.classes) if callable(value) else copy.deepcopy(value)

    return change


def _each_alone(classes):
    return [(c,) for c in range(classes)]


def _with(value, at=(0, 1)):
    def make(classes):
        matrix = distances_of(classes)
        matrix[at] = value
        return matrix.tolist()

    return make


def _probabilities(a):
    a.logits = reference.softmax(np.float64(a.logits)).astype(np.float32)


def _no_probability(value):
    def change(a):
        _probabilities(a)
        a.options["activation"] = "none"
        a.put("logits", value)

    return change


_REGIONS = {"activation": "sigmoid"}
# Each way to be wrong, and words of the message. Where {voxel} is among them, it names the voxel.
WRONG = {
    "logits of integers": (_logits_are(lambda a: np.int32(a.logits)), "logits|y_pred"),
    "logits of complex numbers": (_logits_are(lambda a: a.logits * 1j), "logits|y_pred|dtype"),
    "logits of rank 1": (_logits_are(lambda a: np.zeros(3, np.float32)), "rank 2|shape"),
    "a number as logits": (_logits_are(lambda a: np.float32(1)), "rank 2|shape|axes"),
    "labels with a voxel more": (
        _labels(lambda a: np.concatenate([a.labels, a.labels[..., :1]], -1)), "labels|y_true",
    ),
    "labels with a sample more": (
        _labels(lambda a: np.concatenate([a.labels, a.labels[:1]])), "labels|y_true",
    ),
    "labels of another rank": (_labels(lambda a: a.labels[..., None, None]), "labels|y_true"),
    "a number as labels": (_labels(lambda a: np.uint8(0)), "labels|y_true"),
    "labels with a class more": (
        _labels(lambda a: np.zeros((*a.labels.shape, a.classes + 1), np.uint8)), "labels|y_true",
    ),
    "labels of complex numbers": (_labels(lambda a: a.labels * 1j), "labels|y_true|dtype"),
    "labels of a strange integer": (_labels(lambda a: np.uint32(a.labels)), "labels|y_true"),
    "a weight with a voxel more": (
        _weight(lambda a: np.ones((*a.labels.shape[:-1], a.labels.shape[-1] + 1), np.float32)),
        "weight",
    ),
    "a weight of each class": (_weight(lambda a: np.ones_like(a.logits)), "weight"),
    "a number as weight": (_weight(lambda a: np.float32(1)), "weight"),
    "a weight of complex numbers": (_weight(lambda a: a.labels * 1j), "weight|dtype"),
    "a strange activation": (_set(activation="tanh"), "tanh"),
    "a strange layout": (_set(data_format="NCHW"), "NCHW"),
    "a negative exponent": (_set(focal_gamma=-1.0), "focal_gamma"),
    "an exponent that is NaN": (_set(focal_gamma=float("nan")), "focal_gamma"),
    "an infinite exponent": (_set(focal_gamma=float("inf")), "focal_gamma"),
    "negative smoothing": (_set(label_smoothing=-0.125), "label_smoothing"),
    "too much smoothing": (_set(label_smoothing=1.125), "label_smoothing"),
    "smoothing that is NaN": (_set(label_smoothing=float("nan")), "label_smoothing"),
    "a threshold that is NaN": (
        _set(activation="threshold", threshold=float("nan")), "threshold",
    ),
    "one exponent too many": (
        _of_classes("focal_gammas", lambda c: [1.0] * (c + 1)), "focal_gamma",
    ),
    "an exponent that no float32 holds": (_set(focal_gamma=1e39), "focal_gamma"),
    "a negative exponent of a class": (
        _of_classes("focal_gammas", lambda c: [-0.5] + [1.0] * (c - 1)), "focal_gamma",
    ),
    "an exponent of a class that is NaN": (
        _of_classes("focal_gammas", lambda c: [1.0] * (c - 1) + [float("nan")]), "focal_gamma",
    ),
    "the cross-entropy of scores": (_set(activation="argmax", cross_entropy=True), "argmax"),
    "an ignored class of dense labels": (_dense(ignore_label=1), "ignore_label"),
    "regions of a softmax": (
        _of_classes("regions", _each_alone, activation="softmax"), "regions",
    ),
    "too few regions": (
        _of_classes("regions", lambda c: _each_alone(c - 1), **_REGIONS), "regions",
    ),
    "an empty region": (
        _of_classes("regions", lambda c: [*_each_alone(c - 1), ()], **_REGIONS), "regions",
    ),
    "a region of a negative label": (
        _of_classes("regions", lambda c: [*_each_alone(c - 1), (-1,)], **_REGIONS), "regions",
    ),
    "a region of a large label": (
        _of_classes("regions", lambda c: [*_each_alone(c - 1), (256,)], **_REGIONS), "regions",
    ),
    "regions of dense labels": (_dense(regions=_each_alone, **_REGIONS), "regions"),
    "regions that are a number": (_set(regions=3, **_REGIONS), "regions"),
    "regions and label sets": (
        _of_classes("regions", _each_alone, label_sets={9: (0, 1)}, **_REGIONS), "regions",
    ),
    "a set of a class that is none": (
        _of_classes("label_sets", lambda c: {9: (0, c)}), "label_sets",
    ),
    "a set of a negative class": (_set(label_sets={9: (0, -1)}), "label_sets"),
    "an empty set": (_set(label_sets={9: ()}), "label_sets"),
    "a set that names a class twice": (_set(label_sets={9: (1, 1)}), "label_sets"),
    "a set of a large label": (_set(label_sets={256: (0, 1)}), "label_sets"),
    "a set of a negative label": (_set(label_sets={-1: (0, 1)}), "label_sets"),
    "sets that are a list": (_set(label_sets=[(0, 1)]), "label_sets"),
    "an ignored set": (_set(label_sets={9: (0, 1)}, ignore_label=9), "ignore_label"),
    "sets of dense labels": (_dense(label_sets={9: (0, 1)}), "label_sets"),
    "distances of too few classes": (
        _of_classes("dist_matrix", lambda c: distances_of(c - 1).tolist()), "dist_matrix",
    ),
    "a distance from itself": (_of_classes("dist_matrix", _with(0.5, (0, 0))), "dist_matrix"),
    "a negative distance": (_of_classes("dist_matrix", _with(-1.0)), "dist_matrix"),
    "a distance that is NaN": (_of_classes("dist_matrix", _with(float("nan"))), "dist_matrix"),
    "an infinite distance": (_of_classes("dist_matrix", _with(float("inf"))), "dist_matrix"),
    "a row too few": (
        _of_classes("dist_matrix", lambda c: distances_of(c).tolist()[1:]), "dist_matrix",
    ),
    "distances of a sigmoid": (
        _of_classes("dist_matrix", lambda c: distances_of(c).tolist(), activation="sigmoid"),
        "dist_matrix",
    ),
    "distances of dense labels": (
        _dense(dist_matrix=lambda c: distances_of(c).tolist()), "dist_matrix",
    ),
    "distances and label sets": (
        _of_classes("dist_matrix", lambda c: distances_of(c).tolist(), label_sets={9: (0, 1)}),
        "dist_matrix",
    ),
    "a label that is no class": (_put("labels", 99), "{voxel}.*99"),
    "a negative label": (_put("labels", -1, "int16"), "{voxel}.*-1"),
    "a label that is a fraction": (_put("labels", 0.5, "float32"), "{voxel}.*0.5"),
    "a label that is NaN": (_put("labels", np.nan, "float64"), "{voxel}.*nan"),
    "an infinite label": (_put("labels", np.inf, "float32"), "{voxel}.*inf"),
    "a large label": (_put("labels", 2**40, "int64"), f"{{voxel}}.*{2**40}"),
    "a label of no set": (_put("labels", 99, label_sets={9: (0, 1)}), "{voxel}.*99"),
    "a soft label of 2": (_put("labels", 2.0, dense=True), "{voxel}"),
    "a soft label that is NaN": (_put("labels", np.nan, dense=True), "{voxel}"),
    "a soft label below 0": (_put("labels", -0.5, dense=True), "{voxel}"),
    "a one-hot label of 2": (_put("labels", 2, "uint8", dense=True), "{voxel}"),
    "a probability of 2": (_no_probability(2.0), "{voxel}.*2"),
    "a negative probability": (_no_probability(-0.5), "{voxel}.*-0.5"),
    "an infinite probability": (_no_probability(np.inf), "{voxel}.*inf"),
}  # fmt: skip


@st.composite
def wrong(draw, *names):
    """A call that is wrong in these ways, and the words that refuse it: those of one of them.

    Where there are no names, one or two are drawn.
    """
    if not names:
        names = draw(st.lists(st.sampled_from(sorted(WRONG)), min_size=1, max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spatial = draw(st.lists(st.integers(1, 30), min_size=1, max_size=2))
    shape = (draw(st.integers(1, 2)), *spatial)
    classes = draw(st.integers(2, 8))
    logits = rng.normal(size=(*shape, classes)).astype(np.float32)
    labels = rng.integers(0, classes, shape).astype(draw(st.sampled_from(["uint8", "int32"])))
    weight = draw(st.sampled_from([None, np.ones(shape, np.float32)]))
    arguments = Arguments(logits, labels, weight, {"activation": "softmax"}, rng)
    for name in names:
        try:
            WRONG[name][0](arguments)
        except (IndexError, TypeError, ValueError):
            pass  # Two changes do not always go together; the first has made it wrong.
    words = "|".join(f"({WRONG[name][1]})" for name in names)
    voxel = str(arguments.voxel).replace("[", r"\[").replace("]", r"\]")
    return arguments, names, words.replace("{voxel}", f"voxel {voxel}")


def refusal(call, errors):
    """The message of the error that the call must raise. It must be one of ours, in words."""
    with pytest.raises(errors) as raised:
        call()
    message = str(raised.value)
    assert len(message) > 20 and " " in message, message
    return message


def _misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    memory[:] = np.frombuffer(array.tobytes(), np.uint8)
    other = np.frombuffer(memory, array.dtype).reshape(array.shape)
    return other if array.itemsize > 1 else array.astype(">u4")


# Arrays that `dice_op.core` does not read, and words of the message.
MEMORY = {
    "not contiguous": (lambda a: np.stack([a, a], -1)[..., 0], "contiguous"),
    "of another byte order": (lambda a: a.astype(">f4"), "byte order"),
    "misaligned": (_misaligned, "multiple of its elements' size|byte order"),
    "masked": (np.ma.masked_array, "masked"),
    "of objects": (lambda a: a.astype(object), "dtype object"),
    "of text": (lambda a: a.astype(float).astype(str), "dtype"),
    "of dates": (lambda a: a.astype("int64").astype("M8[s]"), "dtype"),
}
