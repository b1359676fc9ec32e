"""dice_op.losses.deep_supervision: losses at several resolutions, of labels at the finest."""

import keras
import numpy as np
import pytest

from dice_op.losses import DiceCELoss, DiceLoss, DownsampledLabels, deep_supervision
from helpers.any_backend import JIT, ONLY_TENSORFLOW, REFUSED

# The labels' shape. The second size is no multiple of that of the coarse predictions.
SHAPE = (2, 12, 9, 8)
COARSE = (2, 6, 4, 2)


def make(channels_first=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*COARSE, 3)).astype(np.float32)
    y = rng.integers(0, 3, size=SHAPE).astype(np.uint8)
    return np.moveaxis(x, -1, 1) if channels_first else x, y


def coarse(volume, first=1):
    """The fine voxels at the centres of the coarse ones, by NumPy."""
    for axis, (old, new) in enumerate(zip(SHAPE[1:], COARSE[1:], strict=True), first):
        centres = np.floor((np.arange(new) + 0.5) * old / new).astype(int)
        volume = np.take(volume, centres, axis)
    return volume


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_labels_and_weights_are_taken_at_the_centres(data_format):
    first = data_format == "channels_first"
    x, y = make(first)
    loss = DiceLoss(data_format=data_format)
    downsampled = DownsampledLabels(loss)
    assert 0.1 < float(loss(coarse(y), x)) < 0.9
    np.testing.assert_array_equal(downsampled(y, x), loss(coarse(y), x))
    axis = 1 if first else -1
    one_hot = np.stack([y == c for c in range(3)], axis)
    np.testing.assert_array_equal(downsampled(one_hot, x), loss(coarse(y), x))
    with_channel = np.expand_dims(y, axis)
    np.testing.assert_array_equal(downsampled(with_channel, x), loss(coarse(y), x))
    mask = (np.random.default_rng(1).random(SHAPE) < 0.5).astype(np.float32)
    np.testing.assert_array_equal(downsampled(y, x, mask), loss(coarse(y), x, coarse(mask)))
    weight = np.float32([1, 3])
    np.testing.assert_array_equal(downsampled(y, x, weight), loss(coarse(y), x, weight))


def model_of(resolutions, names=None):
    """A network that predicts at several resolutions, the finest first."""
    inputs = keras.Input((16, 16, 1))
    outputs, features = [], keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    for _ in range(resolutions):
        outputs.append(keras.layers.Conv2D(3, 1)(features))
        features = keras.layers.Conv2D(8, 3, 2, padding="same", activation="relu")(features)
    return keras.Model(inputs, dict(zip(names, outputs, strict=True)) if names else outputs)


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("names", [None, ["main", "half", "quarter"]])
def test_a_network_of_several_resolutions_trains(names, jit_compile):
    """Keras sorts the outputs of a dict, but each keeps the weight of its name."""
    keras.utils.set_random_seed(0)
    model = model_of(3, names)
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 1)).astype(np.float32)
    y = (x[..., 0] > 0).astype(np.uint8) + (x[..., 0] > 1)
    loss = DiceCELoss()
    plan = deep_supervision(loss, names or 3)
    model.compile(keras.optimizers.Adam(0.02), **plan, jit_compile=jit_compile)
    targets = dict.fromkeys(names, y) if names else [y] * 3
    total = np.ravel(model.evaluate(x, targets, verbose=0))[0]
    predictions = model.predict(x, verbose=0)
    if names:
        predictions = [predictions[name] for name in names]
    # At 8 x 8 voxels the centres are the voxels with odd numbers, at 4 x 4 every fourth voxel.
    each = [
        float(loss(labels, p))
        for labels, p in zip((y, y[:, 1::2, 1::2], y[:, 2::4, 2::4]), predictions, strict=True)
    ]
    np.testing.assert_allclose(total, 2 / 3 * each[0] + 1 / 3 * each[1], rtol=1e-5)
    history = model.fit(x, targets, epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [(1, [1]), (2, [1, 0]), (3, [2 / 3, 1 / 3, 0]), (4, [4 / 7, 2 / 7, 1 / 7, 0])],
)
def test_the_default_weights_are_those_of_nnunet(outputs, expected):
    np.testing.assert_allclose(deep_supervision(DiceLoss(), outputs)["loss_weights"], expected)


def test_the_weights_that_are_given_are_taken():
    plan = deep_supervision(DiceLoss(), ["a", "b"], weights=np.array([3, 1]))
    assert plan["loss_weights"] == {"a": 3, "b": 1} and set(plan["loss"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(loss="dice", outputs=2), "loss is 'dice', but must be a loss of dice_op.losses"),
        (dict(outputs=0), "outputs is 0"),
        (dict(outputs="main"), "outputs is 'main', but must be a number or a list of names"),
        (dict(outputs=2, weights="nnUNet"), "weights is 'nnUNet', but must be one of 'nnunet'"),
        (dict(outputs=2, weights=None), "weights is None, but there are 2 outputs"),
        (dict(outputs=3, weights=[1, 0.5]), r"weights is \[1.0, 0.5\], but there are 3 outputs"),
        (dict(outputs=2, weights=[1, -1]), "weights is .* at least 0"),
    ],
)
def test_wrong_arguments_are_errors_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        deep_supervision(**{"loss": DiceLoss(), **arguments})


def test_volumes_that_do_not_fit_are_errors():
    x, y = make()
    loss = DownsampledLabels(DiceLoss())
    with pytest.raises(ValueError, match=r"y_true has shape \(2, 12, 9\), and y_pred \(2, 6, 4, 2"):
        loss(y[..., 0], x)
    with pytest.raises(ValueError, match="y_true is smaller than y_pred.* sizes are 3 and 6"):
        loss(y[:, :3], x)


@ONLY_TENSORFLOW
def test_volumes_of_unknown_size_are_checked_by_the_running_program():
    import tensorflow as tf

    x, y = make()
    loss = DownsampledLabels(DiceLoss())

    @tf.function(input_signature=[tf.TensorSpec([None] * 4, tf.uint8)])
    def of_unknown_size(y):
        return loss(y, x)

    np.testing.assert_allclose(of_unknown_size(y), loss(y, x), rtol=1e-6)
    with pytest.raises(REFUSED, match="y_true is smaller than y_pred"):
        of_unknown_size(y[:, :3])
    unknown = tf.function(lambda w: loss(y, x, w), input_signature=[tf.TensorSpec(None)])
    for weight in (np.random.default_rng(0).random(SHAPE), np.arange(1.0, 1.0 + SHAPE[0])):
        weight = tf.constant(weight, tf.float32)
        np.testing.assert_allclose(unknown(weight), loss(y, x, weight), rtol=1e-6)


class TenTimes(DiceLoss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return 10 * super().__call__(y_true, y_pred, sample_weight)


def test_a_loss_that_overrides_its_call_is_called():
    x, y = make()
    for weight in (None, np.arange(1.0, 1.0 + SHAPE[0]), np.random.default_rng(0).random(SHAPE)):
        plain = DownsampledLabels(DiceLoss())(y, x, weight)
        np.testing.assert_allclose(DownsampledLabels(TenTimes())(y, x, weight), 10 * plain, 1e-6)
