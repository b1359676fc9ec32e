"""The Keras metrics give the hard scores that NumPy gives: over several batches, and in fit."""

import json

import keras
import numpy as np
import pytest

from dice_op import metrics
from dice_op.metrics import DiceScore, JaccardScore, Matthews
from helpers import reference
from helpers.any_backend import BACKEND, ONLY_TENSORFLOW, REFUSED
from helpers.kernel_inputs import read_label_sets

CLASSES = 4


def make(samples=7, seed=0):
    """Logits and labels. Some classes are absent from a sample's labels, and one from all
    labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 6, 5, CLASSES)).astype(np.float32)
    y = rng.integers(0, CLASSES - 1, size=x.shape[:-1]).astype(np.uint8)
    y[::2][y[::2] == 2] = 1
    y[0] = 0
    return x, y


def counts(p, t, weight=None):
    """I, P, T, `[N, C]` each, of masks `[N, spatial..., C]`."""
    weight = np.ones(p.shape[:-1]) if weight is None else weight
    axes = tuple(range(1, p.ndim - 1))
    return [(weight[..., None] * v).sum(axes) for v in (p * t, p, t)]


def scores_of(i, p, t, kind, absent):
    """The scores, with NaN where a class does not count."""
    numerator, denominator = (2 * i, p + t) if kind == "dice" else (i, p + t - i)
    scores = np.where(denominator > 0, numerator / np.maximum(denominator, 1), 1)
    return np.where((t > 0) | (absent == "keep"), scores, np.nan)


SCORES = {
    DiceScore: lambda i, p, t, m: 2 * i / (p + t),
    JaccardScore: lambda i, p, t, m: i / (p + t - i),
    metrics.TverskyScore: lambda i, p, t, m: i / (0.5 * p + 0.5 * t),
    metrics.Sensitivity: lambda i, p, t, m: i / t,
    metrics.Precision: lambda i, p, t, m: i / p,
    metrics.Specificity: lambda i, p, t, m: (m - p - t + i) / (m - t),
    metrics.Matthews: lambda i, p, t, m: np.diag(np.corrcoef(*masks_of(i, p, t, m))[:1, 1:])[0],
}


def masks_of(i, p, t, m):
    """Two masks of m voxels with these counts."""
    place = np.arange(m)
    return place < p, (place < i) | ((place >= p) & (place < p + t - i))


@pytest.mark.parametrize("label_sets", [{}, {200: (0, 2, 3), 201: (1, 2), 7: (3,)}], ids=str)
@pytest.mark.parametrize("average", ["macro", "weighted", "micro", "none"])
@pytest.mark.parametrize("over", ["samples", "dataset"])
@pytest.mark.parametrize("metric", SCORES, ids=lambda metric: metric.__name__)
def test_every_score_is_what_its_counts_say(metric, over, average, label_sets):
    """All classes are in all samples here, so that no score is undefined. A voxel whose label names
    a set counts for none of these classes, also not among the voxels that are not of a class."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 8, 9, CLASSES)).astype(np.float32)
    y = rng.choice([*range(CLASSES), *label_sets], size=x.shape[:-1]).astype(np.uint8)
    t, unknown = read_label_sets(label_sets, y, CLASSES)
    p = (1 - unknown) * reference.one_hot(x.argmax(-1), CLASSES)
    sums, m = counts(p, t), (1 - unknown).sum((1, 2))
    if average == "micro":
        sums, m = [s.sum(1, keepdims=True) for s in sums], m.sum(1, keepdims=True)
    if over == "dataset":
        sums, m = [s.sum(0, keepdims=True) for s in sums], m.sum(0, keepdims=True)
    scores = np.vectorize(SCORES[metric])(*sums, m)
    expected = {
        "none": lambda: scores.mean(0),
        "weighted": lambda: np.mean((scores * sums[2]).sum(1) / sums[2].sum(1)),
    }.get(average, lambda: scores.mean())()
    score = metric(over=over, average=average, label_sets=label_sets or None)
    score.update_state(y[:2], x[:2])
    score.update_state(y[2:], x[2:])
    np.testing.assert_allclose(score.result(), expected, rtol=1e-6)


@pytest.mark.parametrize("over", ["samples", "dataset"])
@pytest.mark.parametrize("metric", [metrics.Specificity, metrics.Matthews])
def test_weights_of_voxels_whose_label_names_a_set_do_not_count(metric, over):
    """With weights that are whole numbers it is as if each voxel were there that many times, and
    for two classes, of which both are unknown, as if it were not there."""
    x, y = make()
    x, y = x[..., :2], (y > 0).astype(np.uint8)
    rng = np.random.default_rng(1)
    weight = rng.integers(1, 4, y.shape)
    unknown = rng.random(y.shape) < 0.3
    options = {"over": over, "include_background": False}
    found, expected = metric(label_sets={200: (0, 1)}, **options), metric(**options)
    per_sample = np.arange(1.0, 8.0)
    for of_voxels in (weight, None):
        found.update_state(np.where(unknown, 200, y), x, of_voxels)
        expected.update_state(y, x, ~unknown if of_voxels is None else ~unknown * of_voxels)
    np.testing.assert_allclose(found.result(), expected.result(), rtol=1e-6)
    found.reset_state()
    found.update_state(np.where(unknown, 200, y), x, per_sample)
    if over == "dataset":
        expected.reset_state()
        expected.update_state(y, x, ~unknown * per_sample[:, None, None])
        wanted = expected.result()
    else:
        wanted, present = 0.0, per_sample * (y == 1).any((1, 2))
        for n in np.flatnonzero(present):
            alone = metric(**options)
            alone.update_state(y[n : n + 1], x[n : n + 1], ~unknown[n : n + 1])
            wanted += present[n] / present.sum() * float(alone.result())
    np.testing.assert_allclose(found.result(), wanted, rtol=1e-6)


@pytest.mark.parametrize("over", ["samples", "dataset"])
def test_a_class_that_is_predicted_but_not_labelled_may_count(over):
    x, y = make()
    p, t = (reference.one_hot(v, CLASSES) for v in (x.argmax(-1), y))
    x[..., 3] -= 2 * np.abs(x).max() * (np.arange(7) < 6)[:, None, None]  # predicted only once
    p = reference.one_hot(x.argmax(-1), CLASSES)
    i, p, t = counts(p, t)
    if over == "dataset":
        i, p, t = (s.sum(0, keepdims=True) for s in (i, p, t))
    counted = (p > 0) | (t > 0)
    scores = np.where(counted, 2 * i / np.maximum(p + t, 1), 0)
    score = DiceScore(over=over, average="none", absent="predicted")
    score.update_state(y, x)
    np.testing.assert_allclose(score.result(), scores.sum(0) / counted.sum(0), rtol=1e-6)
    assert score.result()[3] == 0


@pytest.mark.parametrize(
    ("metric", "missed", "invented", "neither"),
    [
        (metrics.Sensitivity, 0, 0, 1),
        (metrics.Precision, 0, 0, 1),
        (metrics.Specificity, 1, 0.5, 1),
        (metrics.Matthews, 0, 0, 1),
    ],
)
def test_scores_of_classes_on_one_side_only(metric, missed, invented, neither):
    for label, prediction, expected in ((1, 0, missed), (0, 1, invented), (0, 0, neither)):
        y, p = np.zeros((2, 1, 4, 1), np.float32)
        y[0, :2], p[0, :2] = label, prediction
        score = metric(prediction="threshold", from_logits=False, absent="keep")
        score.update_state(y, p)
        assert float(score.result()) == expected, (label, prediction)


def expected_of(sums, kind, over, average, absent, weight):
    if average == "micro":
        sums = [s.sum(1, keepdims=True) for s in sums]
    if over == "dataset":
        sums = [(weight[:, None] * s).sum(0, keepdims=True) for s in sums]
        weight = np.ones(1)
    scores = scores_of(*sums, kind, absent)
    counted = weight[:, None] * ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        per_class = np.nansum(weight[:, None] * scores, 0) / counted.sum(0)
    return per_class if average == "none" else np.nanmean(per_class)


@pytest.mark.parametrize("absent", ["skip", "keep"])
@pytest.mark.parametrize("average", ["macro", "micro", "none"])
@pytest.mark.parametrize("over", ["samples", "dataset"])
@pytest.mark.parametrize("metric", [DiceScore, JaccardScore])
def test_scores_of_several_batches_are_those_of_numpy(metric, over, average, absent):
    x, y = make()
    kind = "dice" if metric is DiceScore else "jaccard"
    p, t = (reference.one_hot(v, CLASSES) for v in (x.argmax(-1), y))
    weight = np.array([1, 2, 0.5, 1, 0, 3, 1])
    for w in (None, weight):
        score = metric(over=over, average=average, absent=absent)
        for at in (slice(0, 3), slice(3, 6), slice(6, 7)):
            score.update_state(y[at], x[at], None if w is None else w[at])
        given = np.ones(7) if w is None else w
        expected = expected_of(counts(p, t), kind, over, average, absent, given)
        np.testing.assert_allclose(score.result(), expected, rtol=1e-6)
        score.reset_state()
        score.update_state(y[:3], x[:3], None if w is None else w[:3])
        expected = expected_of(counts(p[:3], t[:3]), kind, over, average, absent, given[:3])
        np.testing.assert_allclose(score.result(), expected, rtol=1e-6)


def test_thresholds_and_regions_give_the_scores_of_numpy():
    x, y = make()
    regions = [(1, 2), (2,), (0,), (3,)]
    t = np.stack([np.isin(y, r) for r in regions], -1).astype(float)
    for threshold, from_logits in ((0.5, True), (0.8, True), (0.3, False)):
        cut = np.log(threshold / (1 - threshold)) if from_logits else threshold
        score = DiceScore(
            prediction="threshold", threshold=threshold, from_logits=from_logits, regions=regions
        )
        score.update_state(y, x)
        expected = expected_of(counts(x > cut, t), "dice", "samples", "macro", "skip", np.ones(7))
        np.testing.assert_allclose(score.result(), expected, rtol=1e-6)


def test_ignored_and_weighted_voxels_give_the_scores_of_numpy():
    x, y = make()
    ignored = np.random.default_rng(1).random(y.shape) < 0.3
    p, t = (reference.one_hot(v, CLASSES)[..., 1:] for v in (x.argmax(-1), y))
    expected = expected_of(counts(p, t, ~ignored), "dice", "samples", "macro", "skip", np.ones(7))
    for labels, weight, options in (
        (np.where(ignored, 255, y), None, {"ignore_label": 255}),
        (y, ~ignored, {}),
        (y, (~ignored).astype(np.float32)[..., None], {}),
    ):
        score = DiceScore(include_background=False, **options)
        score.update_state(labels, x, weight)
        np.testing.assert_allclose(score.result(), expected, rtol=1e-6)


def test_channels_first_and_one_hot_labels_give_the_same_score():
    x, y = make()
    score = DiceScore()
    score.update_state(y, x)
    for labels in (y[:, None], np.moveaxis(reference.one_hot(y, CLASSES), -1, 1)):
        other = DiceScore(data_format="channels_first")
        other.update_state(labels, np.moveaxis(x, -1, 1))
        assert float(other.result()) == float(score.result())


def test_no_voxel_is_lost():
    """The counts pass 2^24, where float32 would stand still."""
    score = DiceScore(over="dataset", average="none")
    x = np.zeros((1, 2_500_000, 2), np.float16)
    x[..., 1] = 1
    y = np.ones(x.shape[:2], np.uint8)
    for _ in range(8):
        score.update_state(y, x)
    y[0, :100] = 0
    score.update_state(y, x)
    total = 9 * x.shape[1]
    expected = 2 * (total - 100) / (2 * total - 100)
    assert abs(float(score.result()[1]) - expected) <= 1e-7
    assert score.variables[0].numpy().tolist() == [0, total - 100]


def test_a_score_is_nan_before_any_batch_and_of_classes_never_seen():
    assert np.isnan(DiceScore().result())
    x, y = make()
    score = DiceScore(average="none")
    score.update_state(y, x)
    np.testing.assert_array_equal(np.isnan(score.result()), [False, False, False, True])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_metrics_work_in_fit_and_evaluate(jit_compile):
    keras.utils.set_random_seed(0)
    x, y = make(8)
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Conv2D(CLASSES, 1)])
    metrics = [DiceScore(), JaccardScore(over="dataset"), DiceScore(average="none", name="each")]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=metrics, jit_compile=jit_compile)
    history = model.fit(x, y, batch_size=3, epochs=2, verbose=0).history
    assert set(history) == {"loss", "dice_score", "jaccard_score", "each"}
    logs = model.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)
    p = reference.one_hot(model.predict(x, verbose=0).argmax(-1), CLASSES)
    sums = counts(p, reference.one_hot(y, CLASSES))
    for name, kind, over in (
        ("dice_score", "dice", "samples"),
        ("jaccard_score", "jaccard", "dataset"),
    ):
        expected = expected_of(sums, kind, over, "macro", "skip", np.ones(8))
        np.testing.assert_allclose(logs[name], expected, rtol=1e-6)
    expected = expected_of(sums, "dice", "samples", "none", "skip", np.ones(8))
    np.testing.assert_allclose(logs["each"], expected, rtol=1e-6)


def test_a_configuration_brings_back_the_metric():
    metric = JaccardScore(
        prediction="threshold",
        threshold=0.25,
        over="dataset",
        average="none",
        absent="keep",
        ignore_label=9,
        regions=[(1, 2), (2,)],
        data_format="channels_first",
        name="mine",
    )
    text = json.dumps(keras.metrics.serialize(metric))  # JSON makes strings of the keys of a dict.
    again = keras.metrics.deserialize(json.loads(text))
    assert type(again) is JaccardScore
    assert again.get_config() == metric.get_config()
    assert again.threshold == 0.25 and again.regions == [[1, 2], [2]] and again.name == "mine"
    tversky = metrics.TverskyScore(
        alpha=0.3, beta=0.7, absent="predicted", label_sets={np.uint8(200): {0, 2}, 7: (1,)}
    )
    again = keras.metrics.deserialize(json.loads(json.dumps(keras.metrics.serialize(tversky))))
    assert again.get_config() == tversky.get_config() and again.alpha == 0.3
    assert again.label_sets == {200: [0, 2], 7: [1]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(prediction="softmax"), "prediction is 'softmax'.*'argmax', 'threshold'"),
        (dict(over="batches"), "over is 'batches'"),
        (dict(average="mean"), "average is 'mean'"),
        (dict(absent="zero"), "absent is 'zero'"),
        (dict(threshold=1.5, prediction="threshold"), "threshold is 1.5"),
        (dict(threshold="a"), "threshold is 'a', but must be a number"),
        (dict(threshold=0.7), 'prediction="argmax" has none: use "threshold"'),
        (dict(ignore_label=2.5), "ignore_label is 2.5, but must be an integer"),
        (
            dict(regions=[(1,)], prediction="threshold", include_background=False),
            "would leave out the first of the regions",
        ),
        (dict(regions=[(1,), (2,)]), 'use "threshold"'),
        (dict(regions=[(1,), ()], prediction="threshold"), "regions must be"),
        (dict(label_sets={}), "label_sets is empty"),
        (dict(label_sets=[(200, (0, 1))]), "label_sets is .*, but must be a dict"),
        (
            dict(regions=[(1,)], prediction="threshold", label_sets={200: (0, 1)}),
            "regions and label_sets cannot be combined",
        ),
    ],
)
def test_wrong_arguments_are_errors_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        DiceScore(**arguments)


def test_a_tversky_score_that_would_count_no_error_is_refused():
    with pytest.raises(ValueError, match="alpha and beta are both 0"):
        metrics.TverskyScore(alpha=0, beta=0)


def test_one_class_needs_a_threshold():
    x, y = make()
    with pytest.raises(ValueError, match='has one class.*use prediction="threshold"'):
        DiceScore().update_state(y > 0, x[..., :1])
    with pytest.raises(ValueError, match="include_background=False leaves no class"):
        DiceScore(prediction="threshold", include_background=False).update_state(y > 0, x[..., :1])


def test_probabilities_that_are_taken_for_logits_are_an_error():
    model = keras.Sequential([keras.Input((6, 5, 4)), keras.layers.Conv2D(1, 1)])
    model.add(keras.layers.Activation("sigmoid"))
    x, y = make()
    model.compile(metrics=[DiceScore(prediction="threshold")], loss="mse")
    if BACKEND == "jax":  # A traced array does not tell what it comes from.
        return
    with pytest.raises(ValueError, match="y_pred are probabilities.*from_logits=False"):
        model.evaluate(x, (y > 0).astype("float32")[..., None], verbose=0)
    model.compile(metrics=[DiceScore(prediction="threshold", from_logits=False)], loss="mse")
    assert np.isfinite(model.evaluate(x, (y > 0).astype("float32")[..., None], verbose=0)).all()


@pytest.mark.parametrize("over", ["samples", "dataset"])
@pytest.mark.parametrize("average", ["macro", "micro", "none"])
def test_a_score_of_nothing_is_nan(average, over):
    """0 would mean a failure. Only absent="keep" calls an empty prediction right."""
    x = np.zeros((2, 6, 5, 3), np.float32)
    x[..., 0] = 1
    y = np.zeros((2, 6, 5), np.uint8)
    options = dict(average=average, over=over, include_background=False)
    metric = DiceScore(**options)
    metric.update_state(y, x)
    assert np.isnan(np.asarray(metric.result())).all()
    metric = DiceScore(absent="keep", **options)
    metric.update_state(y, x)
    assert np.all(np.asarray(metric.result()) == 1)


def test_a_small_batch_counts_after_many_large_ones():
    """A float32 cannot tell 2^25 from 2^25 + 1."""
    x, y = np.zeros((1, 4, 2), np.float32), np.zeros((1, 4), np.uint8)
    x[..., 0] = 1
    score = DiceScore(over="dataset", average="none")
    score.update_state(y, x, np.float32([2**25]))
    for _ in range(64):
        score.update_state(y + 1, x, np.float32([1]))
    errors = 64 * 4
    wanted = 2 * 4 * 2**25 / (2 * 4 * 2**25 + errors)
    assert abs(float(score.result()[0]) - wanted) <= 0.1 * (1 - wanted)


def test_a_correlation_of_ten_billion_voxels_is_finite():
    x = np.zeros((1, 4, 2), np.float32)
    x[0, [0, 1, 2, 3], [0, 0, 1, 1]] = 1
    score = Matthews(over="dataset", average="none")
    score.update_state(np.uint8([[0, 0, 1, 0]]), x, np.float32([2.5e9]))
    np.testing.assert_allclose(np.asarray(score.result()), [3**-0.5] * 2, rtol=1e-6)


@ONLY_TENSORFLOW
def test_weights_of_both_kinds_may_come_in_turn():
    """Keras then traces the metric again, for weights of unknown rank."""
    import tensorflow as tf

    x, y = make(4)
    each = [np.float32([1, 0.5, 2, 1]), (y > 1).astype(np.float32)]
    metric = DiceScore()
    for weight in each:
        metric.update_state(y, x, weight)
    expected = metric.result()
    unknown = DiceScore()
    unknown._totals = unknown._make_totals(CLASSES)
    update = tf.function(
        lambda w: unknown.update_state(y, x, w), input_signature=[tf.TensorSpec(None)]
    )
    for weight in each:
        update(tf.constant(weight))
    np.testing.assert_allclose(unknown.result(), expected, rtol=1e-6)


def test_wrong_labels_are_errors():
    x, y = make()
    with pytest.raises(REFUSED, match="have the value 4"):
        DiceScore().update_state(y + 4, x)
    with pytest.raises(REFUSED, match="labels .* have shape"):
        DiceScore().update_state(y[:, :3], x)
