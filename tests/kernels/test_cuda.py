"""The CUDA kernels are executed on the CPU: values, gradients, bits, errors, sanitizers.

The emulator runs the very sources that nvcc compiles. What it does not cover, which is the rounding
of fast instructions and the hardware itself, build_tools/gpu_check.py checks on a GPU.
"""

import functools

import ml_dtypes
import numpy as np
import pytest

from helpers import emulation, reference
from helpers.cuda_cases import REGIONS, Cases, bits, few_cases
from helpers.kernel_inputs import FORMATS, NAMES, distances_of, in_format, make

# Numbers of classes, each with the regime that float32 logits in channels_last and class indices
# reach.
REGIMES = {
    1: "direct (sigmoid); softmax of one class: general",
    2: "direct, two voxels in a word",
    3: "rows, sums in registers; two voxels at a time in half",
    4: "direct, a voxel in a word",
    5: "rows, odd; two voxels at a time in half",
    8: "rows of whole words, padded in float",
    13: "a thread for a voxel of any odd number of classes",
    14: "rows of even length, two rounds in float",
    16: "rows, padded; the most classes that one thread takes",
    17: "two lanes to a voxel, the first",
    32: "two lanes, padded rows",
    33: "four lanes",
    64: "four lanes, padded rows",
    104: "eight lanes, all but all items",
    105: "eight lanes, odd rows",
    120: "eight lanes, most items",
    129: "sixteen lanes",
    256: "sixteen lanes, the most classes",
}


def voxel_counts(classes):
    """Numbers of voxels: one; a whole number of tiles and words; several tiles, and no multiple
    of anything."""
    return (1, 64, 77) if classes > 64 else (1, 256, 333) if classes > 16 else (1, 512, 1003)


@functools.cache
def regime_cases(dtype, data_format, brief=False):
    """Calls in every regime. brief: only those of two samples and several tiles, the last not
    full."""
    cases = Cases()
    for c in REGIMES:
        for v in voxel_counts(c)[2 if brief else 0 :]:
            for n in (2,) if brief else (1, 2):
                activations = ("softmax", "sigmoid", "none") if c <= 5 or v == 1 else ("softmax",)
                for activation in activations:
                    # The gradient of log p is 1 / p, which is too large for half.
                    too_large = dtype == "float16" and activation == "none"
                    cases.add(
                        (n, v, c), ["uint8", "int16", "int32", "int64"][(c + v) % 4], dtype,
                        activation=activation, data_format=data_format, name=REGIMES[c],
                        cross_entropy=((c + n) % 2 == 1 or v == 1) and not too_large,
                        in_place=(v + n) % 2 == 1,
                    )  # fmt: skip
    cases.add((8, 100, 4), dtype=dtype, data_format=data_format, name="eight samples")
    cases.add((3, 77, 2), dtype=dtype, data_format=data_format, name="samples that are not aligned")
    cases.add((1, 300, 4), dtype=dtype, data_format=data_format, name="not aligned", misalign=8)
    # direct, rows, and with several lanes for a voxel; half would round these gradients to 0, and
    # float64's reference is not exact either
    for c in (2, 3, 4, 14, 104) if dtype in ("float32", "bfloat16") else ():
        loss = dtype == "float32" and c == 4
        cases.add(
            (2, 100, c), "uint8", dtype, data_format=data_format, name="a sure network", gap=12,
            cross_entropy=loss,
        )  # fmt: skip
    return cases


def is_specialised(x, planar, activation):
    """Whether a call with class indices and without options has a kernel of its own."""
    n, v, c = (x.shape[0], x.shape[2], x.shape[1]) if planar else x.shape
    if x.dtype == np.float64 or (c == 1 and activation == "softmax"):
        return False
    if activation == "none" and x.itemsize == 2:
        return False
    if planar and c > 1:
        return activation == "softmax" and c <= 4 and v * x.itemsize % 16 == 0
    most = {"softmax": 256, "sigmoid": 1, "none": 4}[activation]
    return c <= most and (n == 1 or v * c * x.itemsize % 16 == 0)


@pytest.fixture(scope="session")
def program():
    return functools.cache(emulation.build)


@pytest.fixture(scope="session")
def few():
    """The same program, but with one kernel of each sort, which is compiled in seconds."""
    return functools.cache(lambda kind: emulation.build(kind, few=True))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_regime_agrees_with_the_reference(dtype, data_format, program, tmp_path):
    cases = regime_cases(dtype, data_format)
    results = emulation.run(program("plain"), cases.calls, tmp_path)
    cases.check(results)
    for (label, *_), call, result in zip(cases.expected, cases.calls, results, strict=True):
        if "misalign" in label:
            expected = False
        else:
            activation = emulation.ACTIVATIONS[call["activation"]]
            expected = is_specialised(call["like"], data_format == "channels_first", activation)
        assert result["specialised"] == (expected, expected), label


@functools.cache
def masked_cases(dtype, brief=False):
    """Weights in float, and ignored labels. They have kernels of their own for a softmax of
    2 to 16 classes."""
    cases = Cases()
    kinds = (("uint8", 255), ("int8", -1), ("int16", -100), ("int32", 2**31 - 1), ("int64", 2**30))
    for i, c in enumerate((2, 3, 4, 5, 8, 9, 13, 16)):
        for n, v in ((2, 1000),) if brief else ((1, 1), (1, 256), (2, 1000), (1, 1003)):
            kind, ignore = kinds[(i + v) % len(kinds)]
            both = {"weight": "float32", "ignore": ignore}
            for option in (both,) if brief else (both, {"weight": "float32"}, {"ignore": ignore}):
                cases.add((n, v, c), kind, dtype, in_place=v % 2 == 1, name="masked",
                          cross_entropy=(c + n) % 2 == 1, **option)  # fmt: skip
    return cases


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_and_ignored_labels_take_kernels_of_their_own(dtype, program, tmp_path):
    cases = masked_cases(dtype)
    results = emulation.run(program("plain"), cases.calls, tmp_path)
    cases.check(results)
    assert {result["specialised"] for result in results} == {(True, True)}


def test_other_weights_and_ignored_labels_take_the_general_kernels(program, tmp_path):
    cases = Cases()
    cases.add((2, 1000, 4), weight="uint8")
    cases.add((2, 1000, 4), "int64", ignore=-100)  # The kernels see 32 bits of a label.
    cases.add((2, 1000, 4), ignore=255, activation="none")
    cases.add((2, 1000, 4), weight="float32", data_format="channels_first")
    cases.add((2, 77, 17), weight="float32")
    results = emulation.run(program("plain"), cases.calls, tmp_path)
    cases.check(results)
    assert {result["specialised"] for result in results} == {(False, False)}


def test_an_ignored_label_that_no_label_can_be_ignores_none(program, tmp_path):
    cases = Cases()
    for kind, ignore in (("uint8", 258), ("int8", 130), ("int32", 2**32 + 2)):
        cases.add((1, 1000, 4), kind, ignore_none=ignore)
        cases.add((1, 1000, 6), kind, ignore_none=ignore)
    cases.check(emulation.run(program("plain"), cases.calls, tmp_path))


@functools.cache
def option_cases(data_format):
    cases = Cases()
    kinds = ["uint8", "int64", "float32", "bfloat16", "soft"]
    kinds += [f"dense {k}" for k in ("bool", "uint8", "int64", "float16", "float32", "float64")]
    for c in (1, 3, 6, 20, 70):
        shape = (2, 77 if c < 20 else 21, c)
        for activation in ("softmax", "sigmoid", "none"):
            common = {"activation": activation, "data_format": data_format}
            for i, kind in enumerate(kinds):
                dtype = ("float32", "bfloat16", "float32", "float64")[(i + c) % 4]
                cases.add(shape, kind, dtype, **common)
                cases.add(shape, kind, squared_pred=True, cross_entropy=False, **common)
                if kind in ("soft", "dense float16", "dense int64"):
                    cases.add(shape, kind, soft_label=True, cross_entropy=c == 3, **common)
                cases.add(
                    shape, kind, weight=("float32", "uint8", "float16")[i % 3],
                    focal_gamma=(2.0, 0.5, 0.0)[(i + c) % 3], squared_pred=c == 6, **common,
                )  # fmt: skip
            for kind, ignore in (("uint8", 200), ("int16", -1), ("float32", 0), ("int64", 2**40)):
                if kind == "int64":
                    cases.add(shape, kind, ignore=None, ignore_none=ignore, **common)
                else:
                    cases.add(shape, kind, ignore=ignore, **common)
            cases.add(shape, weight="float32", ignore=250, **common)
        common = {"data_format": data_format}
        if c in REGIONS:
            regions = {"activation": "sigmoid", "regions": REGIONS[c], **common}
            cases.add(shape, ignore=200, **regions)
            cases.add(shape, "int16", "bfloat16", weight="float32", **regions)
        if 1 < c <= 20:
            for i, dtype in enumerate(("float32", "bfloat16", "float64")):
                cases.add(
                    shape, ("uint8", "int64", "float32")[i], dtype, dist_matrix=distances_of(c),
                    activation=("softmax", "none")[(i + c) % 2], weight=(None, "uint8")[i % 2],
                    cross_entropy=c != 3, **common,
                )  # fmt: skip
        for i, kind in enumerate(("uint8", "soft")):
            for activation in ("softmax", "sigmoid", "none"):
                options = {"activation": activation, "focal_gamma": 2.0 * i}
                cases.add(shape, kind, label_smoothing=0.125, **options, **common)
            for activation in ("argmax", "threshold"):
                options = {"activation": activation, "threshold": 0.5, "cross_entropy": False}
                for dtype in ("float32", "float16", "float64"):
                    cases.add(shape, kind, dtype, **options, **common)
    return cases


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("activation", ["sigmoid", "threshold"])
def test_regions_give_what_masks_of_them_give(activation, data_format, program, tmp_path):
    """Class indices in overlapping regions give the same bits as a mask for each region."""
    rng = np.random.default_rng(0)
    options = {"activation": activation, "data_format": data_format}
    options["cross_entropy"] = activation == "sigmoid"
    calls = []
    for dtype in ("float32", "bfloat16", "float64"):
        for regions in ([(1,)], [(1, 2, 3), (2, 3), (3,)], [(0, 4), (1,), (2,), (3,), (1, 2, 4)]):
            most, classes = max(map(max, regions)), len(regions)
            x = rng.normal(size=(2, 333, classes))
            x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            y = rng.integers(0, most + 1, size=(2, 333)).astype(np.uint8)
            t = np.stack([np.isin(y, r) for r in regions], -1).astype(np.uint8)
            x, y, t = in_format(data_format, x, y, t)
            d = rng.normal(size=(3, 2, classes))
            calls.append(emulation.case(x, y, coefficients=d, regions=regions, **options))
            calls.append(emulation.case(x, t, coefficients=d, **options))
    results = emulation.run(program("plain"), calls, tmp_path)
    for by_index, by_mask in zip(results[::2], results[1::2], strict=True):
        assert by_index["bad_label"] == by_mask["bad_label"] == ""
        if activation == "threshold":
            del by_mask["gradient"]  # Scores have no gradient.
        for name, value in by_mask.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(by_index[name], value)


@pytest.mark.parametrize("data_format", FORMATS)
def test_options_agree_with_the_reference(data_format, program, tmp_path):
    cases = option_cases(data_format)
    cases.check(emulation.run(program("plain"), cases.calls, tmp_path))


def simple_case(x, y, **options):
    n, c = x.shape[0], x.shape[2]
    return emulation.case(x, y, coefficients=np.ones((5, n, c)), **options)


def test_long_sums_keep_their_precision(program, tmp_path):
    """A sum to which one value is added at a time in float32 is wrong by 1e-4 after so many
    voxels."""
    x = np.zeros((1, 3_000_000, 2), np.float32)
    x[..., 0] = 0.3
    y = np.zeros(x.shape[:2], np.uint8)
    (result,) = emulation.run(
        program("plain"), [simple_case(x, y)], tmp_path, CUDA_EMULATOR_SMS="1"
    )
    p = 1 / (1 + np.exp(-np.float64(np.float32(0.3))))
    expected = x.shape[1] * np.array([p, 1 - p])
    np.testing.assert_allclose(result["pred_sum"][0], expected, rtol=5e-7)
    np.testing.assert_allclose(result["cross_entropy"][0, 0], -np.log(p) * x.shape[1], rtol=5e-7)
    np.testing.assert_array_equal(result["label_sum"][0], [x.shape[1], 0])


def test_sums_of_extreme_logits_are_right(program, tmp_path):
    x = np.array([[[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [-np.inf, 3, 3], [1e4, 0, 0]]], np.float32)
    y = np.array([[0, 1, 1, 1]], np.uint8)
    (result,) = emulation.run(program("plain"), [simple_case(x, y)], tmp_path)
    np.testing.assert_allclose(result["pred_sum"], [[2, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(result["intersection"], [[1, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        result["cross_entropy"], [[0, 1e4 + 2 * np.log(2), 0]], rtol=1e-6, atol=1e-7
    )
    assert np.isfinite(result["gradient"]).all()


def test_nan_is_seen_not_hidden(program, tmp_path):
    for c in (4, 14, 104):
        x, y, _ = make((2, 100, c))
        x[1, 50, 2] = np.nan
        (result,) = emulation.run(program("plain"), [simple_case(x, y)], tmp_path)
        assert np.isfinite(result["pred_sum"][0]).all()
        assert np.isnan(result["pred_sum"][1]).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_volumes_of_size_zero_give_zeros(shape, program, tmp_path):
    x, y = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    (result,) = emulation.run(program("plain"), [simple_case(x, y)], tmp_path)
    for name in NAMES:
        np.testing.assert_array_equal(result[name], np.zeros((shape[0], shape[2])))
    np.testing.assert_array_equal(result["weight_sum"], np.full(shape[0], float(shape[1])))


def test_more_classes_than_the_gpu_takes_are_an_error(program, tmp_path):
    x, y, _ = make((1, 3, 257), "int32")
    (result,) = emulation.run(program("plain"), [simple_case(x, y)], tmp_path)
    assert "257 classes" in result and "at most 256" in result and "CPU" in result
    x, y, _ = make((1, 3, 26))
    call = simple_case(x, y, dist_matrix=distances_of(26))
    (result,) = emulation.run(program("plain"), [call], tmp_path)
    assert "26 classes" in result and "at most 25 with dist_matrix" in result and "CPU" in result
    x, y, _ = make((1, 3, 25))
    call = simple_case(x, y, dist_matrix=distances_of(25))
    (result,) = emulation.run(program("plain"), [call], tmp_path)
    assert result["distance_sum"].any()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "float32"])
def test_a_label_that_is_no_class_makes_its_sample_nan(dtype, program, tmp_path):
    """The sample gets NaN, the others do not. Who asks is told which voxel it is, and its value."""
    cases, wanted = [], []
    for c in (1, 2, 3, 4, 14, 104)[dtype == "float32" :]:  # One channel of floats is a soft mask.
        for value in (c + 1, 120, -1, 0.5, np.nan):
            if dtype.startswith("u") and value == -1 or dtype != "float32" and value % 1:
                continue
            x, y, _ = make((3, 100, c), dtype)
            y = y.copy()
            y[1, 37] = y[2, 99] = value
            cases.append(simple_case(x, y, activation="sigmoid" if c == 1 else "softmax"))
            wanted.append(f"[1, 37] have the value {value:g}")
    for result, text in zip(emulation.run(program("plain"), cases, tmp_path), wanted, strict=True):
        assert text in result["bad_label"]
        for name in (*NAMES, "weight_sum"):
            assert np.isfinite(result[name][0]).all()
            assert np.isnan(result[name][1:]).all()


@pytest.mark.parametrize("masked", [{}, {"ignore_label": 250}, {"weight": "float32"}])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_label_that_is_no_class_is_noticed_at_every_place_of_a_tile(
    dtype, masked, program, tmp_path
):
    """The volumes have several tiles. Labels are compared in bytes, and an ignored label of more
    bytes takes the place of 254."""
    cases = []
    for c in (2, 3, 4, 5, 7, 8, 16, *(() if masked else (32,))):
        for kind, value in (("uint8", c), ("int16", 254), ("int32", 255), ("int64", 2**40)):
            for voxel in (0, 1, 33, 130, 255, 999):
                x, y, _ = make((2, 1000, c), kind)
                y, x = y.copy(), x.astype(dtype)
                y[1, 500:510] = masked.get("ignore_label", 0)
                y[1, voxel] = value
                options = dict(masked)
                if "weight" in masked:
                    options["weight"] = np.ones((2, 1000), np.float32)
                cases.append(simple_case(x, y, **options))
    for result in emulation.run(program("plain"), cases, tmp_path):
        assert result["specialised"][0]
        assert np.isfinite(result["pred_sum"][0]).all()
        assert np.isnan(result["pred_sum"][1]).all() and np.isnan(result["weight_sum"][1])


def test_where_the_environment_asks_for_it_a_wrong_label_is_an_error_of_the_call(few, tmp_path):
    """It is an error of cuda::DiceSums itself, and so of every front end that calls it."""
    x, y, _ = make((2, 100, 3), "int32")
    wrong = y.copy()
    wrong[1, 37] = 9
    calls = [simple_case(x, wrong), simple_case(x, y)]
    error, result = emulation.run(few("plain"), calls, tmp_path, DICE_OP_CHECK_LABELS="1")
    assert "labels (y_true) at voxel [1, 37] have the value 9, but must be in [0, 3)" in error
    assert np.isfinite(result["pred_sum"]).all()
    result, _ = emulation.run(few("plain"), calls, tmp_path, DICE_OP_CHECK_LABELS="0")
    assert np.isnan(result["pred_sum"][1]).all()


def test_dense_labels_that_are_no_labels_make_their_sample_nan(program, tmp_path):
    cases = []
    for c in (3, 20):
        for dtype, value in (("uint8", 255), ("float32", 1.01), ("float32", np.nan), ("int32", -1)):
            x, _, t = make((2, 40, c))
            t = t.astype(dtype)
            t[1, 7, 2] = value
            cases.append(simple_case(x, t))
    for result in emulation.run(program("plain"), cases, tmp_path):
        assert "[1, 7]" in result["bad_label"]
        assert np.isfinite(result["pred_sum"][0]).all() and np.isnan(result["pred_sum"][1]).all()


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_prediction_that_is_no_probability_makes_its_sample_nan(
    dtype, data_format, program, tmp_path
):
    """The sample gets NaN, the others do not. Who asks is told which voxel it is, and its value.

    1 to 4 classes of float32 have kernels of their own; all others take the general ones.
    """
    cases, wanted = [], []
    for c in (1, 2, 3, 4, 5, 14, 104):
        for value in (12.625, -0.25):
            x, y, _ = make((3, 100, c), "int32", "none")
            x = x.astype(dtype)
            x[1, 37, c - 1] = x[1, 38, 0] = x[2, 99, c // 2] = value
            options = {"activation": "none", "data_format": data_format}
            options["coefficients"] = np.ones((3, 3, c))
            cases.append(emulation.case(*in_format(data_format, x, y), **options))
            wanted.append(f"y_pred) at voxel [1, 37] hold the value {value}, but activation='none'")
    for result, text in zip(emulation.run(program("plain"), cases, tmp_path), wanted, strict=True):
        assert text in result["bad_label"]
        for name in (*NAMES, "weight_sum"):
            assert np.isfinite(result[name][0]).all()
            assert np.isnan(result[name][1:]).all()


def test_predictions_that_count_for_nothing_may_be_anything(program, tmp_path):
    cases = []
    for c in (2, 3, 14, 104):
        x, y, _ = make((1, 100, c), "int32", "none")
        weight = np.ones((1, 100), np.float32)
        x[0, 5], weight[0, 5] = -3, 0
        cases.append(simple_case(x, y, activation="none", weight=weight))
        y = y.copy()
        y[0, 5] = 1000
        cases.append(simple_case(x, y, activation="none", ignore_label=1000))
        x = x.copy()
        x[0, 5] = 1.0009  # It overshoots 1 as a soft label may.
        cases.append(simple_case(x, np.where(y == 1000, 1, y), activation="none"))
    for result in emulation.run(program("plain"), cases, tmp_path):
        assert result["bad_label"] == ""
        assert np.isfinite(result["pred_sum"]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("activation", ["argmax", "threshold"])
def test_weights_that_are_fractions_are_counted_in_double(activation, dtype, program, tmp_path):
    cases, wanted = [], []
    for shape in ((2, 1000, 3), (1, 500, 17)):
        x, y, t = make(shape)
        x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        weight = np.random.default_rng(0).random(shape[:2])
        given = {"activation": activation, "threshold": 0.1}
        x[0, :5] = np.asarray(0.1, x.dtype)  # In its precision it is as large as the threshold.
        cases.append(simple_case(x, y, weight=weight, cross_entropy=False, **given))
        given["threshold"] = 0.1 if dtype == "float64" else np.float32(0.1)
        wanted.append(reference.sums(x.astype(np.float64), t, weight, **given))
    results = emulation.run(program("plain"), cases, tmp_path)
    for result, values in zip(results, wanted, strict=True):
        for name in NAMES[:3]:
            assert reference.relative_error(result[name], values[name]) <= 1e-14


# --- the same bits in every order, and no sanitizer's report --------------------------------------


ORDERS = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2), ("random", 3)]


def test_the_bits_are_the_same_in_every_order_of_threads(few, tmp_path):
    cases = few_cases()
    first = None
    for order, seed in ORDERS:
        results = emulation.run(few("plain"), cases.calls, tmp_path, order, seed)
        first = first or bits(results)
        assert bits(results) == first, (order, seed)
    cases.check(results)


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(kind, order, few, tmp_path):
    cases = few_cases(small=True)
    emulation.run(few(kind), cases.calls, tmp_path, order, CUDA_EMULATOR_SMS="1")


@pytest.mark.full
# The kinds take turns, so that both programs are compiled at the same time.
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_sanitizers_find_nothing_in_any_kernel(kind, dtype, program, tmp_path):
    # The thread sanitizer takes most of a second for a call.
    for data_format in FORMATS:
        calls = regime_cases(dtype, data_format, brief=kind == "thread").calls
        if dtype != "float64" and data_format == "channels_last":
            calls = calls + masked_cases(dtype, brief=kind == "thread").calls
        emulation.run(program(kind), calls, tmp_path, "random", CUDA_EMULATOR_SMS="1")
        if dtype == "float32" and kind == "address":
            emulation.run(program(kind), option_cases(data_format).calls, tmp_path, "random")


def test_a_gpu_that_has_no_machine_code_takes_the_portable_kernels(few, tmp_path):
    """Every call is refused by the first kernel, as on a GPU that is later than the build."""
    cases = few_cases(small=True)
    cases.check(emulation.run(few("plain"), cases.calls, tmp_path, CUDA_EMULATOR_NEW_GPU="1"))
