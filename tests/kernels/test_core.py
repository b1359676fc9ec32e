"""The CPU kernels through dice_op.core, on NumPy arrays: values, gradients, bits, errors.

test_simd.py runs this file once more for each instruction set that the processor has.
"""

import mmap
import pathlib
import re
import types

import ml_dtypes
import numpy as np
import pytest

from dice_op import core
from helpers import reference
from helpers.kernel_inputs import (
    FORMATS,
    NAMES,
    REGIONS,
    coefficients_by_name,
    distances_of,
    in_format,
    make,
    renamed,
    sure,
    with_label_sets,
)

# Shapes (N, V, C), each with the part of the CPU kernels that it reaches.
REGIMES = {
    "one voxel": (1, 1, 3),
    "one class": (2, 100, 1),
    "two classes in registers": (1, 1000, 2),
    "three, odd, in registers": (2, 333, 3),
    "four, the most whose sums stay in registers": (2, 512, 4),
    "one voxel over a tile": (1, 513, 4),
    "five, woven in registers, summed class by class": (1, 700, 5),
    "six, the most that are transposed in registers at once": (1, 257, 6),
    "seven, in squares that overlap": (2, 131, 7),
    "eight, in squares": (1, 129, 8),
    "fourteen": (2, 301, 14),
    "sixteen": (1, 64, 16),
    "seventeen": (3, 65, 17),
    "many": (1, 130, 104),
    "over one block": (2, 2**14 + 77, 4),
    "more classes than a tile's cache": (1, 9, 1100),
}


def check(
    x, y, t, *, data_format="channels_last", weight=None, unknown=None, tolerance=1e-6, **options
):
    """Compares the sums and the gradient of one call with the reference."""
    of_reference = renamed(options) | ({} if unknown is None else {"unknown": unknown})
    distances = "dist_matrix" in options
    expected = reference.sums(x, t, weight, **of_reference)
    x_, y_ = in_format(data_format, x, y)
    actual = core.sums(
        x_, y_, data_format=data_format, cross_entropy=True, voxel_weight=weight, **options
    )
    assert expected.keys() == actual.keys() - {"weight_sum"}
    for name, value in expected.items():
        assert reference.relative_error(actual[name], value) <= tolerance, name

    rng = np.random.default_rng(1)
    kind = actual["pred_sum"].dtype
    coefficients = [rng.normal(size=(x.shape[0], x.shape[2])).astype(kind) for _ in range(5)]
    given = coefficients_by_name(coefficients, options.get("activation", "softmax"), distances)
    gradient = core.gradient(
        x_, y_, data_format=data_format, voxel_weight=weight, **given, **options
    )
    assert gradient.dtype == x.dtype
    wanted = reference.gradient(x, t, coefficients, weight, **of_reference)
    if np.any(wanted):  # One class under softmax has no gradient.
        (gradient,) = in_format(data_format, gradient)
        if data_format == "channels_first":
            gradient = gradient.reshape(x_.shape).swapaxes(1, 2) if x.shape[2] == 1 else gradient
        reference.assert_gradient(gradient, wanted, max(tolerance * 10, 1e-5))
    else:
        assert not np.any(gradient)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_agrees_with_the_reference(regime, activation, data_format):
    x, y, t = make(REGIMES[regime], activation=activation)
    check(x, y, t, activation=activation, data_format=data_format)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    "label_kind",
    ["bool", "int8", "uint16", "int16", "int32", "int64", "soft"]
    # class indices in floats, as NIfTI readers give them
    + ["float16", "bfloat16", "float32", "float64"]
    + [
        f"dense {k}"
        for k in ("bool", "uint8", "int64", "float16", "bfloat16", "float32", "float64")
    ],
)
def test_every_kind_of_label_agrees_with_the_reference(label_kind, data_format):
    for classes in (1, 2, 5) if label_kind != "bool" else (1, 2):
        for activation in ("softmax", "sigmoid", "none"):
            x, y, t = make((2, 77, classes), label_kind, activation)
            check(x, y, t, activation=activation, data_format=data_format)


@pytest.mark.parametrize("label_kind", ["uint8", "soft"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("focal_gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("squared_pred", [False, True])
def test_options_agree_with_the_reference(squared_pred, focal_gamma, activation, label_kind):
    for classes in (3, 7):
        x, y, t = make((2, 100, classes), label_kind, activation)
        check(x, y, t, activation=activation, squared_pred=squared_pred, focal_gamma=focal_gamma)


@pytest.mark.parametrize("label_kind", ["uint8", "dense uint8", "dense float32", "soft"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 14])
def test_soft_labels_intersect_by_the_smaller_of_both(classes, activation, label_kind):
    x, y, t = make((2, 100, classes), label_kind, activation)
    check(x, y, t, activation=activation, soft_label=True)
    check(x, y, t, activation=activation, soft_label=True, focal_gamma=2.0)
    weight = np.random.default_rng(1).integers(0, 3, (2, 100)).astype(np.float32)
    check(x, y, t, activation=activation, soft_label=True, weight=weight)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("label_kind", ["uint8", "dense float32", "soft"])
@pytest.mark.parametrize("classes", [2, 3, 4, 14, 40, 104])
def test_the_gradient_is_exact_where_the_softmax_is_sure(classes, label_kind, data_format):
    """Below a gap of 20 the reference is exact itself: its own p (1 - p) loses digits later."""
    for gap in (5, 10, 15, 18):
        x, y, t = make((2, 100, classes), label_kind)
        check(sure(x, gap), y, t, activation="softmax", data_format=data_format)


def gradient_of_sure_voxels(x, t, a, b):
    """Of sum a p t + b p in float64, without a difference of numbers that are nearly equal: with
    the probabilities q of the other classes than the largest, k, it is p (g - g_k - sum q (g -
    g_k))."""
    p = reference.softmax(x.astype(np.float64))
    g = a[:, None] * t + b[:, None]
    g = g - np.take_along_axis(g, p.argmax(-1)[..., None], -1)
    return p * (g - (p * g).sum(-1, keepdims=True))


@pytest.mark.parametrize("gap", [15, 20, 30, 50, 70])
@pytest.mark.parametrize("classes", [2, 4, 14])
def test_the_gradient_is_exact_however_sure_the_softmax_is(classes, gap):
    x, y, t = make((2, 100, classes))
    x = sure(x, gap)
    a, b = np.random.default_rng(1).normal(size=(2, 2, classes)).astype(np.float32)
    gradient = core.gradient(x, y, d_intersection=a, d_pred_sum=b)
    wanted = gradient_of_sure_voxels(x, t, a, b)
    reference.assert_gradient(gradient, wanted, 5e-6)


@pytest.mark.parametrize(("gap", "error"), [(15, 0.08), (18, 0.8)])
def test_the_textbook_gradient_is_off_where_the_softmax_is_sure(gap, error):
    """As docs/mathematics.md says of the formula in single precision."""
    x, _, t = make((2, 1000, 4))
    x, t = sure(x, gap), t.astype(np.float32)
    a, b = np.random.default_rng(1).normal(size=(2, 2, 4)).astype(np.float32)
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    g = a[:, None] * t + b[:, None]
    plain = p * (g - (p * g).sum(-1, keepdims=True))
    assert plain.dtype == np.float32
    found = reference.gradient_error(plain, gradient_of_sure_voxels(x, t, a, b))
    assert error / 2 < found < error * 2


def test_squares_need_no_smaller_of_both():
    x, y, t = make((2, 100, 3), "soft", "softmax")
    options = {"activation": "softmax", "squared_pred": True}
    product, least = core.sums(x, y, **options), core.sums(x, y, soft_label=True, **options)
    assert all(np.array_equal(product[name], least[name]) for name in product)


def test_where_prediction_and_soft_label_are_equal_the_derivative_is_one_half():
    p = np.float32([[[0.25, 0.5, 0.75, 0.0, 1.0]]])
    t = np.float32([[[0.25, 0.6, 0.70, 0.0, 1.0]]])
    one, zero = np.ones((1, 5), np.float32), np.zeros((1, 5), np.float32)
    options = {"activation": "none", "soft_label": True}
    assert np.array_equal(core.sums(p, t, **options)["intersection"], np.minimum(p, t)[0])
    gradient = core.gradient(p, t, d_intersection=one, d_pred_sum=zero, **options)
    assert gradient.tolist() == [[[0.5, 1, 0, 0.5, 0.5]]]
    hard = core.gradient(p, t == 1, d_intersection=one, d_pred_sum=zero, **options)
    assert hard.tolist() == [[[0, 0, 0, 0, 1]]]  # For labels of 0 and 1 in an integer type it is t.


@pytest.mark.parametrize("label_kind", ["uint8", "soft"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("label_smoothing", [0.125, 1.0])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 14])
def test_label_smoothing_agrees_with_the_reference(
    classes, label_smoothing, activation, label_kind
):
    x, y, t = make((2, 150, classes), label_kind, activation)
    for focal_gamma in (0.0, 2.0):
        options = {"label_smoothing": label_smoothing, "focal_gamma": focal_gamma}
        check(x, y, t, activation=activation, **options)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("regime", REGIMES)
def test_scores_are_counted_exactly(regime, dtype, data_format):
    """A tie goes to the first class."""
    for label_kind in ("uint8", "soft"):
        x, y, t = make(REGIMES[regime], label_kind)
        x = np.round(x).astype(dtype)
        x_, y_ = in_format(data_format, x, y)
        for activation, threshold in (("argmax", 0), ("threshold", 0), ("threshold", 1.5)):
            options = {"activation": activation, "threshold": threshold}
            actual = core.sums(x_, y_, data_format=data_format, **options)
            wanted = reference.sums(x, t, **options)
            for name in NAMES[:3]:
                value = wanted[name]
                tolerance = 1e-6 if label_kind == "soft" else 0
                assert reference.relative_error(actual[name], value) <= tolerance, (name, options)


def test_argmax_takes_millions_of_classes():
    x = np.zeros((1, 1, 2**20 + 10), np.float32)
    x[0, 0, -2] = 1
    pred_sum = core.sums(x, np.zeros((1, 1), np.int32), activation="argmax")["pred_sum"]
    assert pred_sum.nonzero()[1].tolist() == [x.shape[2] - 2]


def test_nan_makes_scores_nan():
    """argmax makes all classes of the voxel NaN, as a softmax does; threshold only the class
    itself."""
    nan = np.nan
    for place in range(5):
        x = np.array([[[5, 2, 3, 1, 4], [1, 2, 3, 2, 1]]], np.float32)
        x[0, 0, place] = nan
        y = np.zeros((1, 2), np.uint8)
        pred_sum = core.sums(x, y, activation="argmax")["pred_sum"]
        np.testing.assert_array_equal(pred_sum, np.full((1, 5), nan))
        pred_sum = core.sums(x, y, activation="threshold", threshold=1.5)["pred_sum"]
        wanted = np.array([[1, 2, 2, 1, 1]]) + np.where(np.arange(5) == place, nan, 0)
        np.testing.assert_array_equal(pred_sum, wanted)
    infinite = np.full((1, 2, 3), -np.inf, np.float32)
    assert core.sums(infinite, y, activation="argmax")["pred_sum"].tolist() == [[2, 0, 0]]
    with pytest.raises(ValueError, match="have no cross-entropy"):
        core.sums(x, y, activation="argmax", cross_entropy=True)
    ones = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="has no gradient"):
        core.gradient(x, y, activation="argmax", d_intersection=ones, d_pred_sum=ones)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["sigmoid", "none", "threshold"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32"])
def test_regions_give_what_masks_of_them_give(dtype, activation, data_format):
    rng = np.random.default_rng(0)
    for classes in (1, 3, 4):
        x = rng.random(size=(2, 700, classes)).astype(np.float32)
        regions = REGIONS[:classes]
        most = max(max(r) for r in regions)
        y = rng.integers(0, most + 1, size=(2, 700)).astype(dtype)
        t = np.stack([np.isin(y, r) for r in regions], -1).astype(np.uint8)
        x_, t_ = in_format(data_format, x, t)
        options = {"activation": activation, "data_format": data_format, "threshold": 0.5}
        loss = {"cross_entropy": activation != "threshold", "label_smoothing": 0.1}
        actual = core.sums(x_, y, regions=regions, **options, **loss)
        for name, value in core.sums(x_, t_, **options, **loss).items():
            np.testing.assert_array_equal(actual[name], value)
        if activation != "threshold":
            del options["threshold"]
            d = rng.normal(size=(4, 2, classes)).astype(np.float32)
            d = coefficients_by_name(d, activation)
            actual = core.gradient(x_, y, regions=regions, **d, **options)
            np.testing.assert_array_equal(actual, core.gradient(x_, t_, **d, **options))
        weight = rng.integers(0, 3, size=y.shape).astype(np.float32)
        ignored = y.copy()
        ignored[weight == 0] = 99
        actual = core.sums(x_, ignored, regions=regions, ignore_label=99, **options)
        wanted = core.sums(x_, t_, voxel_weight=(weight > 0).astype(np.uint8), **options)
        weighted = core.sums(x_, y, regions=regions, voxel_weight=weight, **options)
        for name, value in core.sums(x_, t_, voxel_weight=weight, **options).items():
            np.testing.assert_array_equal(actual[name], wanted[name])
            np.testing.assert_array_equal(weighted[name], value)
        y[1, 5] = most + 1
        with pytest.raises(ValueError, match=rf"\[1, 5\] have the value {most + 1}"):
            core.sums(x_, y, regions=regions, activation="sigmoid", data_format=data_format)


def test_infinite_logits_that_are_right_cost_nothing():
    x = np.array([[[np.inf, -np.inf]]], np.float32)
    options = {"activation": "sigmoid", "cross_entropy": True}
    by_region = core.sums(x, np.uint8([[1]]), regions=[(1,), (0,)], **options)
    by_mask = core.sums(x, np.uint8([[[1, 0]]]), **options)
    for sums in (by_region, by_mask):
        np.testing.assert_array_equal(sums["cross_entropy"], [[0, 0]])
        np.testing.assert_array_equal(sums["negative_cross_entropy"], [[0, 0]])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
def test_every_dtype_agrees_with_the_reference(dtype, data_format):
    for classes in (2, 4, 6):
        x, y, t = make((2, 203, classes))
        x = x.astype(dtype)
        # A gradient in half keeps 11 bits, one in bfloat16 keeps 8.
        tolerance = {2: 1e-3 if x.dtype == np.float16 else 1e-2, 4: 1e-6, 8: 1e-12}[x.itemsize]
        expected = reference.sums(x, t, activation="softmax")
        x_, y_ = in_format(data_format, x, y)
        actual = core.sums(x_, y_, data_format=data_format, cross_entropy=True)
        for name, value in expected.items():
            assert actual[name].dtype == (np.float64 if x.itemsize == 8 else np.float32)
            assert reference.relative_error(actual[name], value) <= (
                1e-6 if x.itemsize < 8 else 1e-12
            )
        a, b = (
            np.random.default_rng(2).normal(size=(2, 2, classes)).astype(actual["pred_sum"].dtype)
        )
        gradient = core.gradient(x_, y_, d_intersection=a, d_pred_sum=b, data_format=data_format)
        wanted = reference.gradient(x, t, (a, b, 0 * a), activation="softmax")
        if data_format == "channels_first":
            gradient = gradient.swapaxes(1, 2)
        assert reference.gradient_error(gradient.astype(np.float64), wanted) <= tolerance


def test_half_and_bfloat16_are_read_and_written_exactly():
    """Patterns of the whole range are read. What is written is rounded up, down, to even, to
    infinity."""
    bits = np.arange(2**16, dtype=np.uint16)
    floats = np.concatenate([np.float32(2.0) ** np.arange(-30, 20), np.linspace(-1e5, 1e5, 4001)])
    floats = np.concatenate([floats, floats * (1 + 2**-11), floats * (1 + 2**-9)]).astype(
        np.float32
    )
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = bits.view(dtype)
        x = x[np.isfinite(x.astype(np.float32))].reshape(1, -1, 1)
        ones = np.ones((1, 1), np.float32)
        # The gradient of sum p^2 / 2 with respect to p is p: read, and written as it was.
        read = core.gradient(
            x, np.ones(x.shape[:2], np.uint8), activation="none", squared_pred=True,
            d_intersection=0 * ones, d_pred_sum=ones / 2,
        )  # fmt: skip
        np.testing.assert_array_equal(read.astype(np.float32), x.astype(np.float32))
        # The intersection with one voxel is the voxel's probability.
        inside = x[(x >= 0) & (x <= 1)].reshape(1, -1, 1)
        for at in np.linspace(0, inside.size - 1, 50).astype(int):
            y = np.zeros(inside.shape[:2], np.uint8)
            y[0, at] = 1
            got = core.sums(inside, y, activation="none")["intersection"][0, 0]
            assert got == np.float32(inside[0, at, 0])
        # The gradient is the coefficient, written in the logits' type.
        zeros = np.zeros((1, 16, 1), dtype)
        label = np.ones((1, 16), np.uint8)
        for value in floats[:: max(1, floats.size // 400)]:
            got = core.gradient(
                zeros, label, activation="none", d_intersection=ones * value, d_pred_sum=0 * ones
            )
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(
                    got, np.full_like(got, np.float32(value).astype(dtype))
                )


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "bool"])
def test_voxel_weights_agree_with_the_reference(dtype, data_format):
    for classes in (1, 3, 9):
        x, y, t = make((2, 213, classes), activation="sigmoid")
        weight = (
            np.random.default_rng(3)
            .integers(0, 2 if dtype == "bool" else 4, (2, 213))
            .astype(dtype)
        )
        x[weight == 0] = np.nan  # A voxel without weight may hold anything.
        check(x, y, t, activation="sigmoid", weight=weight, data_format=data_format)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "int64", "float32"])
@pytest.mark.parametrize("ignore", [1, 100, -1])
def test_ignored_voxels_count_for_nothing(ignore, dtype):
    if ignore < 0 and dtype.startswith("u"):
        pytest.skip("unsigned labels are never negative")
    x, y, t = make((2, 213, 4), dtype)
    y = y.copy()
    y[np.random.default_rng(4).random(y.shape) < 0.3] = ignore
    weight = (y != ignore).astype(np.float32)
    expected = reference.sums(x, reference.one_hot(y, 4), weight, activation="softmax")
    actual = core.sums(x, y, ignore_label=ignore, cross_entropy=True)
    for name, value in expected.items():
        assert reference.relative_error(actual[name], value) <= 1e-6
    np.testing.assert_array_equal(actual["weight_sum"], weight.sum(1))
    ones = np.ones((2, 4), np.float32)
    gradient = core.gradient(x, y, d_intersection=ones, d_pred_sum=-ones, ignore_label=ignore)
    assert not gradient[weight == 0].any()
    assert gradient[weight == 1].any()


def test_labels_of_masked_voxels_may_be_anything_finite():
    x, _, t = make((2, 213, 3))
    weight = np.random.default_rng(3).integers(0, 2, (2, 213)).astype(np.float32)
    for dtype, other in (("float32", -1000), ("uint8", 255)):
        y = t.astype(dtype)
        y[weight == 0] = other
        check(x, y, t, activation="softmax", weight=weight)


def test_an_ignored_label_out_of_the_dtypes_range_matches_nothing():
    x, y, _ = make((1, 50, 3))
    np.testing.assert_equal(core.sums(x, y, ignore_label=-1), core.sums(x, y))
    np.testing.assert_equal(core.sums(x, y, ignore_label=2**40), core.sums(x, y))


@pytest.mark.parametrize("shape", [(2, 40000, 4), (3, 7001, 14), (1, 3001, 104)])
def test_the_bits_are_the_same_at_any_number_of_threads(shape):
    x, y, _ = make(shape)
    ones = np.ones((shape[0], shape[2]), np.float32)

    def run(threads):
        sums = core.sums(x, y, cross_entropy=True, threads=threads)
        gradient = core.gradient(x, y, d_intersection=ones, d_pred_sum=-ones, threads=threads)
        return [v.tobytes() for v in (*sums.values(), gradient)]

    first = run(1)
    for threads in (2, 3, 8, 8):
        assert run(threads) == first


def test_probabilities_are_exact_to_the_last_digits():
    """The probability of the smaller of two classes is tested for every size of the logit. The
    exponential's error is stated as 2 units in the last place down to e^-20 and as 5 below; the
    division and the sums add 1.5."""
    z = -np.concatenate([np.geomspace(1e-6, 1, 3000), np.linspace(1, 87, 9000)]).astype(np.float32)
    x = np.stack([z, np.zeros_like(z)], -1)[:, np.newaxis]  # Each sample has one voxel.
    p = core.sums(x, np.zeros((len(z), 1), np.uint8))["pred_sum"][:, 0]
    wanted = 1 / (1 + np.exp(-z.astype(np.float64)))
    error = np.abs(p - wanted) / wanted * 2**24
    unit = 2  # in units of 2^-24: the last place of the largest mantissa
    assert error[z > -20].max() < unit * (2 + 1.5)
    assert error.max() < unit * (5 + 1.5)
    zero = core.sums(np.float32([[[-np.inf, 0]], [[-1e30, 0]]]), np.zeros((2, 1), np.uint8))
    assert np.all(zero["pred_sum"] == [[0, 1], [0, 1]])


def test_sums_of_extreme_logits_are_right():
    x = np.array([[[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [-np.inf, 3, 3]]], np.float32)
    y = np.array([[0, 1, 1]], np.uint8)
    t = reference.one_hot(y, 3)
    for activation in ("softmax", "sigmoid"):
        finite = np.where(np.isinf(x), -1e30, x)
        sums = core.sums(finite if activation == "sigmoid" else x, y, activation=activation)
        expected = reference.sums(np.maximum(x, -1e4), t, activation=activation)
        for name in NAMES[:3]:
            np.testing.assert_allclose(sums[name], expected[name], rtol=1e-6, atol=1e-30)
    x = np.float32([[[1e4, -1e4, 0], [-1e4, 1e4, 1e4]]])
    y = np.array([[1, 0]], np.uint8)  # Both voxels are wrong by 20000.
    sums = core.sums(x, y, cross_entropy=True)
    np.testing.assert_allclose(sums["cross_entropy"], [[2e4 + np.log(2), 2e4, 0]], rtol=1e-6)
    focal = core.sums(x, y, cross_entropy=True, focal_gamma=2.0)
    np.testing.assert_allclose(focal["cross_entropy"], [[2e4 + np.log(2), 2e4, 0]], rtol=1e-6)


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_gradient_of_extreme_logits_is_right(activation, focal_gamma):
    for classes in (2, 4, 5):
        x, y, t = make((2, 100, classes))
        x = np.random.default_rng(6).choice(np.float32([1e4, -1e4, 88, -88, 3]), size=x.shape)
        check(x, y, t, activation=activation, focal_gamma=focal_gamma)


@pytest.mark.parametrize("data_format", FORMATS)
def test_confident_false_positives_keep_their_gradient(data_format):
    """Where a sigmoid p rounds to 1, p (1 - p) does not vanish. Neither does the gradient of the
    cross-entropy of a confident true positive. Each element is compared by itself."""
    x = np.linspace(-30, 30, 601, dtype=np.float32).reshape(1, -1, 1)
    for classes in (1, 3, 5):
        logits = np.repeat(x, classes, axis=2)
        t = reference.one_hot(np.full(x.shape[:2], classes - 1 if classes > 1 else 1), classes)
        for a, b, e in ((0, 1, 0), (0, 0, 1)):
            coefficients = [np.full((1, classes), k, np.float32) for k in (a, b, e)]
            wanted = reference.gradient(logits, t, coefficients, activation="sigmoid")
            x_, t_ = in_format(data_format, logits, t.astype(np.float32))
            gradient = core.gradient(
                x_,
                t_,
                activation="sigmoid",
                data_format=data_format,
                **coefficients_by_name(coefficients, "sigmoid"),
            )
            (gradient,) = in_format(data_format, gradient)  # The conversion is its own inverse.
            np.testing.assert_allclose(gradient.reshape(wanted.shape), wanted, rtol=2e-6)


def test_nan_is_seen_not_hidden():
    x, y, _ = make((2, 100, 4))
    x[1, 50, 2] = np.nan
    sums = core.sums(x, y)
    assert np.isfinite(sums["pred_sum"][0]).all()
    assert np.isnan(sums["pred_sum"][1]).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_volumes_of_size_zero_give_zeros(shape):
    x = np.zeros(shape, np.float32)
    y = np.zeros(shape, np.float32)
    sums = core.sums(x, y, cross_entropy=True)
    for name in NAMES:
        np.testing.assert_array_equal(sums[name], np.zeros((shape[0], shape[2])))
    np.testing.assert_array_equal(sums["weight_sum"], np.full(shape[0], float(shape[1])))
    ones = np.ones((shape[0], shape[2]), np.float32)
    assert core.gradient(x, y, d_intersection=ones, d_pred_sum=ones).shape == shape


def test_long_sums_keep_their_precision():
    """Over 10^7 equal voxels a running sum in float32 would be wrong by far more."""
    x = np.zeros((1, 10**7, 3), np.float32)
    x[..., 0] = 1.0
    y = np.zeros((1, 10**7), np.uint8)
    y[0, 123] = 2  # There is a lesion of one voxel as well.
    p = np.exp([1.0, 0, 0]) / np.exp([1.0, 0, 0]).sum()
    sums = core.sums(x, y)
    np.testing.assert_allclose(sums["pred_sum"][0], 1e7 * p, rtol=1e-6)
    np.testing.assert_allclose(sums["intersection"][0], [(1e7 - 1) * p[0], 0, p[2]], rtol=1e-6)
    np.testing.assert_array_equal(sums["label_sum"][0], [1e7 - 1, 0, 1])


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("classes", [1, 3, 4, 6, 7, 14])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_large_gradients_are_the_same_though_stored_past_the_caches(dtype, classes, data_format):
    """From 8 MB on the gradient is stored past the caches, except where it overwrites the
    logits; the bits are the same. With an odd number of voxels and an odd address no piece of it
    is aligned."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    voxels = (8 << 20) // (classes * dtype.itemsize) + 77
    shape = (1, voxels, classes) if data_format == "channels_last" else (1, classes, voxels)
    rng = np.random.default_rng(classes)
    x = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    y = rng.integers(0, max(2, classes), (1, voxels), dtype=np.uint8)
    r = np.float64 if dtype == np.float64 else np.float32
    a, b = (rng.normal(size=(1, classes)).astype(r) for _ in range(2))
    options = {
        "d_intersection": a,
        "d_pred_sum": b,
        "data_format": data_format,
        "activation": "softmax" if classes > 1 else "sigmoid",
    }
    in_place = x.copy()
    core.gradient(in_place, y, **options, out=in_place)
    assert np.all(in_place != 0) or dtype.itemsize == 2
    for first in (0, 1):
        streamed = np.zeros(x.size + 1, dtype)[first:][: x.size].reshape(shape)
        core.gradient(x, y, **options, out=streamed)
        assert np.array_equal(in_place, streamed)


@pytest.mark.parametrize("megabytes, asks", [(1, False), (16, True)])
def test_large_gradients_ask_for_huge_pages(megabytes, asks):
    if not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no huge pages")
    out = np.frombuffer(mmap.mmap(-1, megabytes << 20), np.float32).reshape(1, -1, 4)
    x, y = np.zeros_like(out), np.zeros(out.shape[:-1], np.uint8)
    a, b = np.full((2, 1, 4), 1e-6, np.float32)
    core.gradient(x, y, d_intersection=a, d_pred_sum=b, out=out)
    # What the operating system was asked for, about the memory in the middle of the gradient.
    address, flags = out.ctypes.data + out.nbytes // 2, None
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            holds = int(found[1], 16) <= address < int(found[2], 16)
        elif holds and line.startswith("VmFlags:"):
            flags = line.split()
    assert ("hg" in flags) == asks


def test_the_gradient_may_overwrite_the_logits():
    for data_format in FORMATS:
        x, y, _ = make((2, 20001, 5))
        x, y = in_format(data_format, x, y)
        ones = np.ones((2, 5), np.float32)
        given = dict(d_intersection=ones, d_pred_sum=-ones, data_format=data_format)
        expected = core.gradient(x, y, **given)
        assert core.gradient(x, y, **given, out=x) is x
        np.testing.assert_array_equal(x, expected)


X = np.zeros((2, 4, 5, 3), np.float32)
Y = np.zeros((2, 4, 5), np.uint8)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(logits=X.astype(np.int32)), ValueError, r"logits.*int32.*must be half"),
        (dict(logits=X[0, 0, 0]), ValueError, r"logits.*\[3\].*rank 2"),
        (dict(logits=X[:, ::2]), ValueError, r"logits is not contiguous"),
        (dict(labels=Y[:, :3].copy()), ValueError, r"labels.*\[2, 3, 5\].*\[2, 4, 5\]"),
        (
            dict(labels=Y + 0.5),
            ValueError,
            r"value 0.5, but must be whole numbers in \[0, 3\).*soft",
        ),
        (dict(logits=X.astype(">f4")), ValueError, r"logits is not in this machine's byte order"),
        (
            dict(regions=[(1,), (2,)], activation="sigmoid"),
            ValueError,
            r"2 regions, but.*3 classes",
        ),
        (dict(regions=[(1,), (2,), (0,)]), ValueError, r"is 'softmax'.*regions overlap: use 'sigm"),
        (dict(labels=Y + np.float16("nan")), ValueError, r"value nan, but must be whole"),
        (dict(labels=Y + 3e9), ValueError, r"value 3000000000, but must be in \[0, 3\)"),
        (dict(labels=Y.astype(np.uint32)), TypeError, r"labels.*uint32.*must be"),
        (dict(labels=Y + 3), ValueError, r"voxel \[0, 0, 0\].*value 3.*\[0, 3\)"),
        (dict(labels=Y.astype(np.int64) - 2**40), ValueError, r"value -1099511627776"),
        (dict(labels=np.full(X.shape, 255, np.uint8)), ValueError, r"one-hot.*0 or 1.*255 is"),
        (dict(labels=X + 255), ValueError, r"voxel \[0, 0, 0\]: soft.*float32 must be in \[0, 1\]"),
        (dict(labels=X - np.float16(0.1)), ValueError, r"soft labels"),
        (dict(labels=X + np.nan), ValueError, r"soft labels"),
        (
            dict(logits=X[..., :1].copy(), labels=Y + 255),
            ValueError,
            r"mask; scale it \(255 is com",
        ),
        (dict(labels=X, ignore_label=1), ValueError, r"ignore_label is 1.*voxel_weight"),
        (dict(voxel_weight=Y[0]), ValueError, r"voxel_weight.*\[4, 5\].*\[2, 4, 5\]"),
        (
            dict(activation="tanh"),
            ValueError,
            r"activation is 'tanh'.*'softmax', 'sigmoid', 'none'",
        ),
        (dict(data_format="NCHW"), ValueError, r"data_format is 'NCHW'"),
        (dict(focal_gamma=-1.0), ValueError, r"focal_gamma is -1"),
        (dict(focal_gamma=1e39), ValueError, r"focal_gamma is \d.*from 0 to 3.4e38"),
    ],
)
def test_errors_say_what_is_wrong(change, error, says):
    with pytest.raises(error, match=says):
        core.sums(**{"logits": X, "labels": Y, **change})


def misaligned(array):
    """The same array, one byte behind where its elements should lie."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    memory[:] = np.frombuffer(array.tobytes(), np.uint8)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


@pytest.mark.parametrize("name", ["logits", "labels", "voxel_weight"])
def test_arrays_that_are_not_aligned_are_refused(name):
    arrays = {"logits": X, "labels": Y.astype(np.int32), "voxel_weight": np.ones(Y.shape)}
    right, arrays[name] = arrays[name], misaligned(arrays[name])
    with pytest.raises(ValueError, match=f"{name} does not lie at a multiple of its elements'"):
        core.sums(**arrays)
    core.sums(**{key: array[:0] for key, array in arrays.items()})  # There are no elements.
    about = {**right.__array_interface__, "data": (arrays[name].ctypes.data, False)}
    arrays[name] = types.SimpleNamespace(__cuda_array_interface__=about)
    with pytest.raises(ValueError, match=f"{name} does not lie at a multiple of its elements'"):
        core.sums(**arrays)


def test_scores_of_label_maps_that_are_not_aligned_are_right():
    labels = np.random.default_rng(0).integers(0, 3, (2, 4, 5))
    wanted = core.scores(labels, labels[::-1].copy(), classes=3)
    found = core.scores(misaligned(labels), misaligned(labels[::-1].copy()), classes=3)
    np.testing.assert_array_equal(found["intersection"], wanted["intersection"])


def test_the_first_bad_label_is_named_by_its_coordinates():
    x = np.zeros((2, 30, 40, 50, 4), np.float32)
    y = np.zeros(x.shape[:-1], np.int16)
    y[1, 29, 38, 7] = y[1, 20, 3, 49] = 17
    with pytest.raises(ValueError, match=r"voxel \[1, 20, 3, 49\] have the value 17"):
        core.sums(x, y)
    y[1, 20, 3, 49] = -1
    with pytest.raises(ValueError, match=r"voxel \[1, 29, 38, 7\].*17.*or the ignore_label -1"):
        core.sums(x, y, ignore_label=-1)
    with pytest.raises(ValueError, match=r"value 255.*foreground mask"):
        core.sums(x[..., :1].copy(), np.full(x.shape[:-1], 255, np.uint8), activation="sigmoid")


def test_errors_of_the_gradient_say_what_is_wrong():
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"d_pred_sum must be of dtype float32 and shape \[2, 3\]"):
        core.gradient(X, Y, d_intersection=ones, d_pred_sum=ones[:1])
    with pytest.raises(ValueError, match="out must have"):
        core.gradient(X, Y, d_intersection=ones, d_pred_sum=ones, out=X[0])
    given = {"d_intersection": ones, "d_pred_sum": ones}
    with pytest.raises(ValueError, match="cross_entropy=True needs d_cross_entropy"):
        core.gradient(X, Y, **given, cross_entropy=True)
    with pytest.raises(ValueError, match="binary cross-entropy needs d_cross_entropy and d_neg"):
        core.gradient(X, Y, **given, activation="sigmoid", d_cross_entropy=ones)
    with pytest.raises(ValueError, match="d_negative_cross_entropy is only for activation='sig"):
        core.gradient(X, Y, **given, d_cross_entropy=ones, d_negative_cross_entropy=ones)


# --- what is no array, or none that is read where it is -------------------------------------------


class Holder:
    """It has `__array__` alone, as arrays of pandas and xarray do; each call makes a copy."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array.copy()


# Each makes something that NumPy converts into a temporary, which nobody else holds.
TEMPORARIES = {
    "a list of arrays": list,
    "nested lists": lambda a: a.tolist(),
    "a tuple": tuple,
    "an object with __array__": Holder,
    "a list of objects with __array__": lambda a: [Holder(part) for part in a],
}


def overwrite_freed_memory(size):
    """Takes memory of this size from where the allocator keeps what was freed, and writes to it."""
    return [np.full(size, 0xA5, np.uint8) for _ in range(8)]


@pytest.mark.parametrize("kind", TEMPORARIES)
def test_scores_of_temporaries_are_right(kind):
    rng = np.random.default_rng(0)
    shape = (2, 12, 12, 12) if "nested" in kind else (1, 96, 96, 96)
    labels = rng.integers(0, 3, shape).astype("uint8")
    prediction = np.zeros_like(labels)
    wanted = core.scores(prediction, labels, classes=3)["dice"]
    make_temporary = TEMPORARIES[kind]
    for _ in range(3):
        found = core.scores(make_temporary(prediction), make_temporary(labels), classes=3)["dice"]
        overwrite_freed_memory(labels.nbytes)
        np.testing.assert_array_equal(found, wanted)


def test_scores_of_a_list_are_those_of_its_volume():
    gt = np.random.default_rng(0).integers(0, 3, (96,) * 3).astype("uint8")
    pred = np.zeros_like(gt)
    found = core.scores([pred], [gt], classes=3)["dice"]
    zeros = (gt == 0).sum()
    np.testing.assert_allclose(found, [[2 * zeros / (zeros + gt.size), 0, 0]], rtol=1e-12)


@pytest.mark.parametrize("kind", TEMPORARIES)
def test_sums_and_gradients_of_temporaries_are_right(kind):
    """Every argument that holds numbers is something that must be converted; floats are double."""
    make_temporary = TEMPORARIES[kind]
    x, y, _ = make((2, 700, 3))
    x = x.astype(np.float64)
    rng = np.random.default_rng(1)
    weight = rng.random((2, 700))
    coefficients = {
        f"d_{name}": rng.normal(size=(2, 3))
        for name in ("intersection", "pred_sum", "cross_entropy")
    }
    wanted = core.sums(x, y, voxel_weight=weight, cross_entropy=True)
    wanted_gradient = core.gradient(x, y, voxel_weight=weight, **coefficients)
    for _ in range(3):
        temporaries = [make_temporary(a) for a in (x, y, weight)]
        found = core.sums(*temporaries[:2], voxel_weight=temporaries[2], cross_entropy=True)
        gradient = core.gradient(
            *temporaries[:2],
            voxel_weight=temporaries[2],
            **{name: make_temporary(value) for name, value in coefficients.items()},
        )
        overwrite_freed_memory(x.nbytes)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(gradient, wanted_gradient)


def test_what_cannot_be_written_to_or_converted_is_refused_in_words():
    ones = np.ones((2, 3), np.float32)
    given = {"d_intersection": ones, "d_pred_sum": ones}
    with pytest.raises(TypeError, match=r"out is a list, but must be an array that can be written"):
        core.gradient(X, Y, **given, out=X.tolist())
    fixed = np.zeros_like(X)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        core.gradient(X, Y, **given, out=fixed)
    with pytest.raises(TypeError, match="logits is a list, which cannot be made an array"):
        core.sums([[1.0], [1.0, 2.0]], Y)
    with pytest.raises(TypeError, match="labels has dtype object"):
        core.sums(X, object())
    with pytest.raises(TypeError, match="labels has dtype object"):
        core.sums(X, None)
    masked = np.ma.masked_array(X, X > 0)
    for call in (
        lambda: core.sums(masked, Y),
        lambda: core.scores(np.ma.masked_array(Y, Y > 0), Y, classes=2),
        lambda: core.scores([np.ma.masked_array(Y[0], Y[0] > 0)] * 2, Y, classes=2),
        lambda: core.gradient(X, Y, **given, out=masked),
    ):
        with pytest.raises(
            TypeError, match=r"is a masked array.*ignore_label or as a voxel_weight"
        ):
            call()


class Dlpack:
    """It shares an array's memory by DLPack alone, as tensors of PyTorch do."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_that_come_by_dlpack_are_used_where_they_are():
    x, y, _ = make((2, 700, 3))
    wanted = core.sums(x, y)
    for name, value in core.sums(Dlpack(x), Dlpack(y)).items():
        np.testing.assert_array_equal(value, wanted[name])
    ones = np.ones((2, 3), np.float32)
    given = {"d_intersection": ones, "d_pred_sum": -ones}
    out = np.zeros_like(x)
    core.gradient(Dlpack(x), Dlpack(y), **given, out=Dlpack(out))
    assert np.any(out != 0)
    np.testing.assert_array_equal(out, core.gradient(x, y, **given))
    with pytest.raises(ValueError, match="logits is not contiguous in C order"):
        core.sums(Dlpack(X[:, ::2]), Y[:, ::2].copy())
    with pytest.raises(TypeError, match="labels.*uint32"):
        core.sums(X, Dlpack(Y.astype(np.uint32)))


def test_arrays_on_a_device_are_not_taken_for_those_of_the_host():
    def on_device(array, strides=None):
        about = {**array.__array_interface__, "strides": strides}
        return types.SimpleNamespace(__cuda_array_interface__=about)

    with pytest.raises(ValueError, match="labels is on a CUDA device, but logits are in host mem"):
        core.sums(X, on_device(Y))
    with pytest.raises(ValueError, match="labels is not contiguous in C order"):
        core.sums(X, on_device(Y, (400, 100, 8)))
    with pytest.raises(ValueError, match="must be in host memory: scores are counted there"):
        core.scores(on_device(Y), Y, classes=3)
    if core.build_info()["cuda"] is None:
        with pytest.raises(ValueError, match="on a CUDA device, but this build.*no CUDA kernels"):
            core.sums(on_device(X), on_device(Y))


# --- predictions that are no probabilities --------------------------------------------------------


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 700, 3), (1, 40000, 4), (3, 65, 17), (2, 100, 1)])
@pytest.mark.parametrize("value", [12.625, -0.25, 1.0625, np.inf])
def test_a_prediction_that_is_no_probability_is_named(value, shape, dtype, data_format):
    x, y, _ = make(shape, "int32", "none")
    x = x.astype(dtype)
    sample, voxel = shape[0] - 1, shape[1] - 3
    x[sample, voxel, -1] = x[sample, voxel + 1, 0] = value
    x, y = in_format(data_format, x, y)
    text = rf"y_pred\) at voxel \[{sample}, {voxel}\] hold the value {value:g}\d*, but activation="
    for threads in (1, 3):
        with pytest.raises(ValueError, match=text):
            core.sums(x, y, activation="none", data_format=data_format, threads=threads)


def test_predictions_that_count_for_nothing_may_be_anything():
    x, y, _ = make((1, 600, 3), "uint8", "none")
    wanted = core.sums(x, y, activation="none", voxel_weight=(np.arange(600) != 5)[None])
    x[0, 5] = 7, -3, np.nan
    found = core.sums(x, y, activation="none", voxel_weight=(np.arange(600) != 5)[None])
    y[0, 5] = 9
    ignored = core.sums(x, y, activation="none", ignore_label=9)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(ignored[name], value)


def test_predictions_may_overshoot_as_labels_may_and_need_not_add_up_to_one():
    x = np.full((1, 50, 3), 1.0009, np.float32)
    x[0, ::2] = -0.0009
    core.sums(x, np.zeros((1, 50), np.uint8), activation="none")
    x[0, 7] = np.nan  # NaN is seen, not hidden.
    sums = core.sums(x, np.zeros((1, 50), np.uint8), activation="none")
    assert np.isnan(sums["pred_sum"]).all()


def test_a_wrong_label_is_named_before_a_wrong_prediction_of_its_tile():
    x, y, _ = make((1, 100, 3), "uint8", "none")
    x[0, 3], y[0, 50] = 2, 77
    with pytest.raises(ValueError, match=r"labels \(y_true\) at voxel \[0, 50\] have the value 77"):
        core.sums(x, y, activation="none")


# --- what to do about labels that are no classes --------------------------------------------------


@pytest.mark.parametrize(
    ("values", "classes", "advises", "never"),
    [
        ((0, 85, 170, 255), 4, r"map the values to 0..3 \(85, 170, 255 are no classes\)", "ignore"),
        ((1, 2, 3, 4), 4, "map the values to 0..3, or give the model more than 4 cl", "ignore"),
        ((0, 1, 2, 3, 4), 4, "map the values to 0..3, or give the model more", "ignore"),
        ((0, 255), 2, "map the values to 0..1", "ignore"),
        ((0, 255), 4, "map the values to 0..3, or, to leave such voxels out, pass ig", "no class"),
        ((0, 1, 2, 255), 4, "to leave such voxels out, pass ignore_label=255", "map"),
        ((0, 1, -1), 4, "to leave such voxels out, pass ignore_label=-1", "map"),
        ((0, 1, 2, 200, 255), 4, r"map the values to 0..3 \(200, 255 are no classes\)", "ignore"),
    ],
)
@pytest.mark.parametrize("dtype", ["int16", "int64", "float32"])
def test_an_error_advises_what_to_do_about_wrong_labels(dtype, values, classes, advises, never):
    y = np.resize(np.array(values, dtype), (2, 50))
    with pytest.raises(ValueError, match=advises) as error:
        core.sums(np.zeros((2, 50, classes), np.float32), y)
    assert never not in str(error.value)


def test_an_error_advises_what_to_do_about_a_value_of_no_region():
    y = np.array([[0, 1, 2, 4]], np.uint8)  # The labels of BraTS have these values.
    with pytest.raises(
        ValueError, match="value 4, .*; name the value in the regions that it belongs"
    ):
        core.sums(
            np.zeros((1, 4, 2), np.float32), y, activation="sigmoid", regions=[(1, 2, 3), (3,)]
        )


# --- what labels are taken for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "labels", "dtype", "options", "kind"),
    [
        ((2, 4, 5, 3), (2, 4, 5), "uint8", {}, "indices"),
        ((2, 4, 5, 3), (2, 4, 5, 1), "float32", {}, "indices"),
        ((2, 4, 5, 3), (2, 4, 5, 3), "uint8", {}, "per class"),
        ((2, 3, 4, 5), (2, 1, 4, 5), "float16", {"data_format": "channels_first"}, "indices"),
        ((2, 4, 5, 1), (2, 4, 5), "float64", {}, "mask"),
        ((2, 4, 5, 1), (2, 4, 5, 1), "bfloat16", {}, "mask"),
        ((2, 4, 5, 1), (2, 4, 5, 1), "int32", {}, "indices"),
        ((2, 4, 5, 1), (2, 4, 5), "float32", {"ignore_label": 7}, "indices"),
        ((2, 4, 5, 2), (2, 4, 5), "float32", {"regions": [(1, 2), (2,)]}, "indices"),
        ((None, None, None, 3), (None, None, None), "float32", {}, "indices"),
        ((None, None, None, None), (None, None, None), "float32", {}, "mask"),
        ((None, None, None, 3), (None, None, None, None), "float32", {}, "per class"),
        ((None, None, None, None), (None, None, None, None), "float32", {}, "per class"),
        ((None, None, None, 1), (None, None, None, None), "float32", {}, "mask"),
    ],
)
def test_labels_are_taken_for_what_their_shape_and_dtype_say(logits, labels, dtype, options, kind):
    assert core.label_kind(logits, labels, dtype, **options) == kind


# --- options that are tables ----------------------------------------------------------------------

DISTANCES = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]
SETS = {200: (0, 2), 255: (0, 1, 2), 3: (1, 2), 9: (1,)}


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none", "argmax", "threshold"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_label_sets_agree_with_the_reference(dtype, activation, data_format):
    """Values of several classes, of one class, and one that is a class too (3), on volumes of few
    classes, of more than a word of 32, and of more than 256; also where only a set of one class is
    beyond the first word."""
    for classes, sets in (
        (3, SETS),
        (6, SETS),
        (40, {200: (0, 1), 201: (33,)}),
        (70, {200: (0, 1), 201: (2, 3), 202: (69,)}),
        (70, {0: (0, 33, 69), 200: range(40)}),
        (300, SETS),
    ):
        x, y, _ = make((2, 700 if classes < 10 else 37, classes), "int64", activation)
        y, t, unknown = with_label_sets(sets, y, classes)
        given = {"label_sets": sets, "activation": activation}
        if activation in ("argmax", "threshold"):
            x_, y_ = in_format(data_format, x, y)
            actual = core.sums(x_, y_, data_format=data_format, **given)
            wanted = reference.sums(x, t, activation=activation, unknown=unknown)
            for name in ("intersection", "pred_sum", "label_sum", "unknown_sum"):
                np.testing.assert_array_equal(actual[name], wanted[name])
            continue
        weight = np.random.default_rng(3).integers(0, 3, y.shape).astype(np.float32)
        tolerance = 1e-12 if dtype == "float64" else 1e-6
        every_option = [
            {},
            {"focal_gamma": 2.0, "label_smoothing": 0.25},
            {"squared_pred": True, "weight": weight},
        ]
        if classes <= 256:  # Above that, there is one exponent for all.
            every_option.append({"focal_gammas": np.resize([2.0, 0.0, 0.5], classes)})
        for options in every_option:
            check(
                x.astype(dtype), y, t, data_format=data_format, tolerance=tolerance,
                unknown=unknown, **given, **options,
            )  # fmt: skip


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["softmax", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distances_agree_with_the_reference(dtype, activation, data_format):
    """Volumes of few classes and of more than a GPU takes, with more than one tile; voxels without
    weight or label; and together with each option that changes a voxel."""
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    for classes in (2, 3, 4, 17, 70):
        x, y, t = make((2, 700 if classes < 10 else 77, classes), "uint8", activation)
        weight = np.random.default_rng(3).integers(0, 3, y.shape).astype(np.float32)
        given = {"dist_matrix": distances_of(classes), "activation": activation}
        for options in (
            {},
            {"focal_gamma": 2.0, "label_smoothing": 0.25},
            {"squared_pred": True, "weight": weight},
            {"focal_gammas": np.resize([2.0, 0.0, 0.5], classes)},
        ):
            check(
                x.astype(dtype), y, t, data_format=data_format, tolerance=tolerance,
                **given, **options,
            )  # fmt: skip
        marked = np.where(weight == 0, 255, y).astype(np.uint8)
        counts = np.float32(weight != 0)
        expected = core.sums(x, y, voxel_weight=counts, **given)
        found = core.sums(x, marked, ignore_label=255, **given)
        assert np.any(found["distance_sum"] != core.sums(x, y, **given)["distance_sum"])
        np.testing.assert_equal(found, expected)


def test_the_gradient_of_a_label_set_is_exact_where_the_network_is_sure():
    """Each element by itself: that of the classes of the set is nearly 0 where they have it all."""
    rng = np.random.default_rng(0)
    for gap in (0, 8, 20, 40):
        x = (3 * rng.normal(size=(1, 500, 4))).astype(np.float32)
        x[..., :2] += np.float32(gap) * np.where(rng.random((1, 500, 1)) < 0.5, 1, -1)
        y = np.full((1, 500), 200, np.uint8)
        unknown = np.broadcast_to([1.0, 1.0, 0.0, 0.0], x.shape)
        e = np.ones((1, 4), np.float32)
        wanted = reference.gradient(
            x, 0 * x, (0 * e, 0 * e, e), activation="softmax", unknown=unknown
        )
        given = {"label_sets": {200: (0, 1)}, "d_intersection": 0 * e, "d_pred_sum": 0 * e}
        found = core.gradient(x, y, d_cross_entropy=e, **given)
        # The textbook's own q - 1 is exact to 1e-16, and where it is larger than that.
        large = np.abs(wanted) > 1e-11
        assert large.mean() > 0.25
        np.testing.assert_allclose(found[large], wanted[large], rtol=1e-5)


def test_a_set_without_probability_has_an_infinite_loss():
    """The loss is infinite, as it is for a class without probability. The gradient is 0, because
    nothing tells which class of the set is the right one."""
    x = np.array([[[-np.inf, -np.inf, 1, 1]]], np.float32)
    given = {"label_sets": {200: (0, 1)}, "cross_entropy": True}
    assert core.sums(x, np.uint8([[200]]), **given)["cross_entropy"][0, 0] == np.inf
    d = np.ones((1, 4), np.float32)
    gradient = core.gradient(
        x, np.uint8([[200]]), d_intersection=0 * d, d_pred_sum=0 * d, d_cross_entropy=d, **given
    )
    np.testing.assert_array_equal(gradient, [[[0, 0, 0, 0]]])


def test_regions_may_be_many():
    """117 classes of a whole body, each a region, and ten groups of them; labels up to 255."""
    rng = np.random.default_rng(0)
    body = [(c,) for c in range(1, 118)] + [range(a, a + 12) for a in range(1, 105, 11)]
    for regions in (body, [(0, 255), (255,), (31, 32, 33)], [(v,) for v in range(64, 128)]):
        classes = len(regions)
        x = rng.normal(size=(2, 333, classes)).astype(np.float32)
        y = rng.integers(0, max(map(max, regions)) + 1, (2, 333)).astype(np.uint8)
        t = np.stack([np.isin(y, r) for r in regions], -1).astype(np.uint8)
        options = {"activation": "sigmoid", "cross_entropy": True}
        actual = core.sums(x, y, regions=regions, **options)
        for name, value in core.sums(x, t, **options).items():
            np.testing.assert_array_equal(actual[name], value)
        scores = core.scores((x > 0).any(-1) * y, y, regions=regions)
        np.testing.assert_array_equal(scores["label_sum"], t.sum(1))


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"label_sets": {256: (0, 1)}},
            "label value 256, but their label values must be from 0 to",
        ),
        ({"label_sets": {7: ()}}, r"label_sets\[7\] must be the classes"),
        ({"label_sets": {7: (1, 1)}}, "at least one, and each once"),
        ({"label_sets": {7: (0, 3)}}, "label_sets name class 3, but logits .* have 3 classes"),
        ({"label_sets": {7: (0, 1)}, "ignore_label": 7}, "ignore_label 7 is also in label_sets"),
        ({"label_sets": [7, (0, 1)]}, "label_sets must be a dict from label values to the classes"),
        (
            {"label_sets": {7: (0, 1)}, "regions": [(0,), (1,), (2,)], "activation": "sigmoid"},
            "regions and label_sets cannot be combined",
        ),
        (
            {"label_sets": {7: (0, 1)}},
            r"value 5, but must be in \[0, 3\), or one of label_sets \(7\)",
        ),
        ({"focal_gammas": [1, 2]}, "focal_gamma has 2 exponents, but logits .* have 3 classes"),
        ({"focal_gammas": [1, 2, -1]}, "every focal_gamma must be finite and at least 0"),
        ({"focal_gammas": [1, 2, np.inf]}, "every focal_gamma must be finite and at least 0"),
        ({"regions": [(0,), (256,)]}, "at least one, from 0 to 255"),
        ({"dist_matrix": [[0, 1], [1, 0]]}, "dist_matrix has 2 rows, but logits .* have 3 classes"),
        ({"dist_matrix": [[0, 1], [1]]}, "has 2 rows, but row 1 has 1 distances"),
        ({"dist_matrix": [[0, -1], [1, 0]]}, r"dist_matrix\[0\]\[1\] is -1.* at least 0"),
        ({"dist_matrix": [[0, np.nan], [1, 0]]}, r"dist_matrix\[0\]\[1\] is nan.* must be finite"),
        ({"dist_matrix": [[0, 1], [1, 2]]}, r"\[1\]\[1\] is 2.* from itself must be 0"),
        (
            {"dist_matrix": DISTANCES, "activation": "sigmoid"},
            "add up to 1: use 'softmax' or 'none'",
        ),
        (
            {"dist_matrix": DISTANCES, "activation": "argmax"},
            "add up to 1: use 'softmax' or 'none'",
        ),
        ({"dist_matrix": DISTANCES, "label_sets": SETS}, "dist_matrix and label_sets cannot be"),
    ],
)
def test_errors_of_tables_say_what_to_do(options, words):
    y = np.array([[0, 7, 5, 1]]) if "value 5" in words else np.array([[0, 1]])
    with pytest.raises((ValueError, TypeError), match=words):
        core.sums(np.zeros((*y.shape, 3), np.float32), y, **options)


def test_distances_refuse_labels_per_class_and_one_class():
    x = np.zeros((1, 2, 3), np.float32)
    with pytest.raises(ValueError, match="takes class indices, but labels .* as tf.argmax gives"):
        core.sums(x, x, dist_matrix=DISTANCES)
    with pytest.raises(ValueError, match="must have two classes or more"):
        core.sums(x[..., :1].copy(), np.zeros((1, 2)), dist_matrix=[[0]])
    d = np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match="d_distance_sum must be given both or neither"):
        core.gradient(x, np.zeros((1, 2)), d_intersection=d, d_pred_sum=d, dist_matrix=DISTANCES)
    with pytest.raises(ValueError, match="d_distance_sum must be given both or neither"):
        core.gradient(x, np.zeros((1, 2)), d_intersection=d, d_pred_sum=d, d_distance_sum=d)


def test_label_sets_refuse_labels_per_class_and_one_class():
    x = np.zeros((1, 2, 3), np.float32)
    with pytest.raises(ValueError, match="label_sets are for class indices, but labels"):
        core.sums(x, x, label_sets={7: (0, 1)})
    with pytest.raises(ValueError, match="label_sets need two classes or more"):
        core.sums(x[..., :1].copy(), np.zeros((1, 2)), label_sets={7: (0,)}, activation="sigmoid")


def test_attributes_of_label_sets_hold_what_was_given():
    sets = {9: (33,), 200: (0, 1), 201: (2, 40), 255: (20_000,)}
    found = core.op_attributes(label_sets=sets)["label_sets"].tolist()
    assert found == [9, 1, 33, 200, 2, 0, 1, 201, 2, 2, 40, 255, 1, 20_000]


def test_too_many_different_sets_are_refused():
    """The tables have room for 512 words of 32 classes."""
    x, y = np.zeros((1, 2, 200), np.float32), np.zeros((1, 2))
    core.sums(x, y, label_sets={v: (v, 199) for v in range(72)})
    with pytest.raises(ValueError, match="73 different sets of 200 classes, but at most 72"):
        core.sums(x, y, label_sets={v: (v, 199) for v in range(73)})
    with pytest.raises(ValueError, match="1 different sets of 20001 classes, but at most 0"):
        core.sums(x, y, label_sets={200: (0, 20_000)})
