"""Hard scores of NumPy volumes, by dice_op.core.scores, are compared with counts by NumPy."""

import itertools

import numpy as np
import pytest

from dice_op import core
from helpers.kernel_inputs import REGIONS, read_label_sets

# The voxels of a sample fit one chunk, exceed one, or exceed one task (of 2^20) and are no multiple
# of a chunk.
SIZES = {"one": (1,), "a chunk and one": (5, 5, 41), "two tasks": (2**20 + 333,)}


def maps(size, values, blobs, seed=0):
    """Two label maps `[2, spatial...]` that agree in part. They are noise, or runs of one value."""
    rng = np.random.default_rng(seed)
    shape = (2, *SIZES[size])
    labels = rng.integers(0, values, size=shape)
    if blobs:
        labels = np.sort(labels.reshape(2, -1), axis=1).reshape(shape)
    wrong = rng.random(size=shape) < 0.3
    return np.where(wrong, rng.integers(0, values, size=shape), labels), labels


def counted(prediction, labels, sets, valid=None):
    """Counts `[N, C]` of the classes that are these sets of label values."""
    p, t = (np.stack([np.isin(m, list(s)) for s in sets], -1) for m in (prediction, labels))
    valid = np.ones(labels.shape, bool) if valid is None else valid
    axes = tuple(range(1, labels.ndim))
    return {
        name: np.sum(mask & valid[..., None], axis=axes)
        for name, mask in (("intersection", p & t), ("pred_sum", p), ("label_sum", t))
    }


def check(actual, wanted):
    for name, count in wanted.items():
        np.testing.assert_array_equal(actual[name], count, err_msg=name)
        assert actual[name].dtype == np.int64
    i, p, t = wanted.values()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(actual["dice"], 2 * i / (p + t))
        np.testing.assert_array_equal(actual["jaccard"], i / (p + t - i))


@pytest.mark.parametrize("blobs", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 5, 120])
@pytest.mark.parametrize("size", SIZES)
def test_label_maps_are_counted_as_numpy_counts_them(size, classes, blobs):
    prediction, labels = maps(size, max(classes, 2), blobs)
    first = 1 if classes == 1 else 0  # One class is the foreground.
    wanted = counted(prediction, labels, [(c,) for c in range(first, first + classes)])
    for threads in (1, 3):
        check(core.scores(prediction, labels, classes=classes, threads=threads), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_a_voxel_does_not_count_for_the_classes_that_it_may_belong_to(size):
    label_sets = {200: (0, 2), 77: (1, 2, 3), 6: (3,)}
    rng = np.random.default_rng(0)
    prediction, truth = maps(size, 4, True)
    names = rng.choice([-1, *label_sets], size=truth.shape, p=[0.4, 0.2, 0.2, 0.2])
    labels = np.where(names < 0, truth, names)
    t, unknown = read_label_sets(label_sets, labels, 4)
    p = (prediction[..., None] == range(4)) & (unknown == 0)
    axes = tuple(range(1, labels.ndim))
    sums = (np.sum(p * t, axis=axes), np.sum(p, axis=axes), np.sum(t, axis=axes))
    wanted = dict(zip(("intersection", "pred_sum", "label_sum"), sums, strict=True))
    check(core.scores(prediction, labels, classes=4, label_sets=label_sets), wanted)


@pytest.mark.parametrize("wrong", [201, 5, -1])
def test_a_label_that_names_no_class_and_no_set_is_an_error(wrong):
    labels = np.full((1, 2, 3), 200)
    labels[0, 1, 2] = wrong
    with pytest.raises(ValueError, match=rf"at voxel \[0, 1, 2\] have the value {wrong}"):
        core.scores(np.zeros((1, 2, 3), int), labels, classes=4, label_sets={200: (0, 2)})


DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64")


@pytest.mark.parametrize("ignore_label", [None, 0, 3, 100])
def test_labels_of_every_type_are_counted_but_for_ignored_voxels(ignore_label):
    prediction, labels = maps("a chunk and one", 4, True)
    # Nobody asks about the prediction of ignored voxels.
    prediction[0, 0, 0, :2] = 100 if ignore_label == 100 else 0
    labels[0, 0, 0, :2] = 3 if ignore_label is None else ignore_label
    wanted = counted(prediction, labels, [(c,) for c in range(4)], labels != ignore_label)
    options = {"classes": 4, "ignore_label": ignore_label}
    for one, other in itertools.product(DTYPES, DTYPES):
        check(core.scores(prediction.astype(one), labels.astype(other), **options), wanted)
    wanted = counted(prediction > 0, labels > 0, [(1,)])
    check(core.scores(prediction > 0, labels > 0, classes=1), wanted)
    check(core.scores((prediction > 0).astype("float32"), labels > 0, classes=1), wanted)


@pytest.mark.parametrize("ignore_label", [None, 2, 200])
def test_regions_are_counted_as_numpy_counts_them(ignore_label):
    prediction, labels = maps("a chunk and one", 5, False)
    if ignore_label == 200:
        labels[1, 2] = 200
    wanted = counted(prediction, labels, REGIONS, labels != ignore_label)
    check(core.scores(prediction, labels, regions=REGIONS, ignore_label=ignore_label), wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_logits_are_counted_as_numpy_counts_them(data_format, dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 9, 8, 7, 5)).astype(dtype)
    labels = rng.integers(0, 5, size=(2, 9, 8, 7)).astype(np.uint8)

    def scores(logits, labels, **options):
        if data_format == "channels_first":
            logits = np.ascontiguousarray(np.moveaxis(logits, -1, 1))
        return core.scores(logits, labels, data_format=data_format, **options)

    classes = [(c,) for c in range(5)]
    check(scores(logits, labels), counted(logits.argmax(-1), labels, classes))
    first = np.ascontiguousarray(logits[..., :1])
    mask = labels > 2
    for threshold in (0.0, 0.5):
        wanted = counted(first[..., 0] > threshold, mask, [(1,)])
        check(scores(first, mask, threshold=threshold), wanted)
    regions = scores(np.ascontiguousarray(logits[..., :4]), labels, regions=REGIONS)
    truth = counted(labels, labels, REGIONS)["label_sum"]
    np.testing.assert_array_equal(regions["label_sum"], truth)
    np.testing.assert_array_equal(regions["pred_sum"], (logits[..., :4] > 0).sum((1, 2, 3)))


def test_more_than_2_to_24_voxels_are_counted_exactly():
    voxels = 2**24 + 3
    scores = core.scores(np.ones((1, voxels, 1), np.float16), np.ones((1, voxels), np.uint8))
    for name in ("intersection", "pred_sum", "label_sum"):
        assert scores[name].tolist() == [[voxels]]


def test_absent_classes_are_nan():
    empty = np.zeros((1, 3, 3), np.uint8)
    scores = core.scores(empty, empty, classes=3)
    np.testing.assert_array_equal(scores["dice"], [[1, np.nan, np.nan]])
    np.testing.assert_array_equal(scores["jaccard"], [[1, np.nan, np.nan]])
    for shape in ((0, 4, 4), (2, 0)):
        scores = core.scores(np.zeros(shape, int), np.zeros(shape, int), classes=2)
        assert scores["dice"].shape == (shape[0], 2) and np.isnan(scores["dice"]).all()


P, T = maps("a chunk and one", 3, False)
SEVEN = np.zeros_like(P)
SEVEN[1, 2, 3, 4] = 7
NAN = np.zeros((*P.shape, 3), np.float32)
NAN[0, 0, 0, 0, 1] = np.nan


@pytest.mark.parametrize(
    "prediction, labels, options, says",
    [
        (P, T, {}, "classes, the number of classes, is needed"),
        (P, T, {"classes": 0}, "classes is 0"),
        (P, T, {"classes": 3, "data_format": "last"}, "data_format is 'last'"),
        (P, T, {"regions": [(1.5,)]}, "regions must be a list of the label values of each class"),
        (P[..., None] / 1.0, T, {"classes": 2}, "classes is 2, but there are 1"),
        (P[..., None] / 1.0, T / 3.0, {}, "have the value 0.66.*, but must be whole numbers"),
        (P[..., None] / 1.0, T[..., None], {}, "classes, the number of classes, is needed"),
        (NAN, T, {}, "prediction holds NaN"),
        (P, T, {"classes": 2}, r"labels \(y_true\) at voxel \[0, 0, 0, \d+\] have the value 2"),
        (SEVEN, T, {"classes": 3}, r"y_pred\) at voxel \[1, 2, 3, 4\] have the value 7"),
        (-SEVEN, T, {"classes": 3}, r"\[1, 2, 3, 4\] have the value -7, but must be in \[0, 3\)"),
        (P + 0.5, T, {"classes": 4}, "value .*5, but must be whole numbers"),
        (P[:1], T, {"classes": 3}, r"prediction has shape \[1, 5, 5, 41\], but labels \[2, 5, 5"),
        (P[:1] / 1.0, T, {}, r"labels .* \[2, 5, 5, 41\], but for logits .* \[1, 5, 5, 41\]"),
        (P, T, {"regions": [(1, 256)]}, "regions must be the label values of each class"),
        (P, T, {"regions": [(1,), ()]}, "regions must be the label values of each class"),
        (P, T, {"regions": [(1, 2), (2,)], "classes": 3}, "classes is 3, but there are 2"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(prediction, labels, options, says):
    with pytest.raises((ValueError, TypeError), match=says):
        core.scores(prediction, labels, **options)


@pytest.mark.parametrize("dtype", ["uint32", "uint64", ">u2", ">i2", ">i4", ">u8", ">f4", ">f8"])
def test_other_types_and_byte_orders_are_converted(dtype):
    wanted = core.scores(P, T, classes=3)
    for prediction, labels in (
        (P.astype(dtype), T),
        (P, T.astype(dtype)),
        (list(P.astype(dtype)), tuple(T.astype(dtype))),
    ):
        found = core.scores(prediction, labels, classes=3)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    logits = np.eye(3, dtype=np.float32)[P]
    found = core.scores(logits.astype(dtype) if "f" in dtype else logits, T.astype(dtype))
    np.testing.assert_array_equal(found["dice"], wanted["dice"])


def test_a_number_beyond_every_signed_type_is_no_class():
    labels = T.astype(np.uint64)
    labels[0, 0, 0, 0] = 2**64 - 1
    with pytest.raises(ValueError, match=r"\[0, 0, 0, 0\] have the value 9223372036854775807"):
        core.scores(P, labels, classes=3)


def test_the_first_wrong_voxel_is_named_whichever_thread_finds_it():
    labels = np.zeros((2, 3 << 20), np.uint8)
    for place in ((1, 2**21 + 5), (0, 2**20 + 1), (0, 1023)):
        labels[place] = 9
        with pytest.raises(ValueError, match=rf"\[{place[0]}, {place[1]}\] have the value 9"):
            core.scores(np.zeros_like(labels), labels, classes=3, threads=4)
