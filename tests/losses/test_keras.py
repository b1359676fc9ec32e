"""What Keras does around a loss and a metric: masks, weights of both kinds, settings, callbacks,
subclasses.

And what is said about shapes and arguments that may be meant otherwise.
"""

import keras
import numpy as np
import pytest
from keras import ops

from dice_op import losses, metrics
from dice_op.losses import DiceCELoss, DiceLoss
from helpers import reference
from helpers.any_backend import JIT, ONLY_TENSORFLOW, REFUSED, program, with_mask
from helpers.kernel_inputs import NAMES

CLASSES = 3
SHAPES = {"a signal": (4, 7), "an image": (4, 6, 5), "a volume": (4, 3, 4, 5)}  # [N, spatial...]


def make(shape, seed=0):
    """Logits `[N, spatial..., C]` and class indices."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*shape, CLASSES)).astype(np.float32)
    return x, rng.integers(0, CLASSES, shape).astype(np.uint8)


def expected_losses(x, y, weight=None, lambda_dice=1.0, lambda_ce=1.0):
    """The weighted sum of Dice and cross-entropy of each sample, in float64."""
    t = reference.one_hot(y.reshape(len(y), -1), CLASSES)
    m = np.ones(t.shape[:2]) if weight is None else np.asarray(weight, float).reshape(len(y), -1)
    sums = reference.sums(reference.flat(x), t, m, activation="softmax")
    i, p, t_sum, ce = (sums[name] for name in NAMES)
    total = m.sum(1)
    ce = np.divide(ce.sum(1), total, out=np.zeros(len(y)), where=total > 0)
    return lambda_dice * reference.dice_losses(i, p, t_sum).mean(1) + lambda_ce * ce


def assert_close(actual, expected):
    assert abs(float(actual) - expected) <= 1e-6 * abs(expected)


# --- masks ----------------------------------------------------------------------------------------

# How many of the seven steps of each sample are left.
LENGTHS = {"equal": [4, 4, 4, 4], "different": [7, 3, 1, 5], "nothing left of one": [7, 3, 0, 5]}


def masked_series(lengths):
    x, y = make((4, 7))
    steps = np.arange(7) < np.array(LENGTHS[lengths])[:, None]
    x[~steps] = 0  # keras.layers.Masking leaves these steps out.
    return x, y, steps


def masking_model(loss, jit_compile=False, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((7, CLASSES))
    logits = keras.layers.Dense(CLASSES)(keras.layers.Masking()(inputs))
    model = keras.Model(inputs, logits)
    model.compile(keras.optimizers.SGD(0.1), loss=loss, jit_compile=jit_compile, **options)
    return model


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_cross_entropy_of_masked_steps_is_that_of_keras(lengths, batch, jit_compile):
    x, y, steps = masked_series(lengths)
    ours = masking_model(DiceCELoss(lambda_dice=0, batch=batch), jit_compile)
    theirs = masking_model(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logits = ours.predict_on_batch(x)
    log_p = reference.log_softmax(logits.astype(np.float64))
    by_hand = -np.take_along_axis(log_p, y[..., None], -1)[steps].mean()
    for model in (ours, theirs):
        assert_close(model.evaluate(x, y, verbose=0), by_hand)
        model.train_on_batch(x, y)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
def test_masks_and_weights_per_sample_count_as_in_keras(reduction):
    x, y, _ = masked_series("nothing left of one")
    weight = np.array([[1.0], [2.0], [0.5], [3.0]], np.float32)
    ours = masking_model(DiceCELoss(lambda_dice=0, reduction=reduction))
    theirs = masking_model(
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    )
    steps = 7 if reduction == "sum" else 1  # Keras adds up the steps, ours the samples.
    of_steps = np.repeat(weight, 7, 1)  # With [N, 1] Keras fails on PyTorch.
    expected = theirs.evaluate(x, y, sample_weight=of_steps, verbose=0) / steps
    assert_close(ours.evaluate(x, y, sample_weight=weight, verbose=0), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"ignore_label": 2}, {"data_format": "channels_first"}])
def test_a_mask_leaves_voxels_out_as_weights_of_0_do(options, shape):
    """The mask has two axes, that of the samples and the one that follows."""
    x, y = make(SHAPES[shape])
    rng = np.random.default_rng(1)
    mask = rng.random(SHAPES[shape][:2]) < 0.6
    mask[:, 0] = True
    voxel_weight = rng.random(SHAPES[shape]).astype(np.float32)
    counts = np.broadcast_to(mask.reshape(mask.shape + (1,) * (y.ndim - 2)), y.shape)
    weight = voxel_weight * counts * (y != options.get("ignore_label", -1))
    share = counts.reshape(len(y), -1).mean(1)
    wanted = (expected_losses(x, y, weight) * share).sum() / share.sum()
    logits = np.moveaxis(x, -1, 1) if "data_format" in options else x
    assert_close(DiceCELoss(**options)(y, with_mask(logits, mask), voxel_weight), wanted)


def test_a_mask_counts_where_a_batch_is_one_volume():
    x, y, steps = masked_series("different")
    model = masking_model(DiceLoss(batch=True))
    logits = model.predict_on_batch(x)
    one = steps.reshape(1, -1)
    wanted = expected_losses(logits.reshape(1, 28, CLASSES), y.reshape(1, 28), one, lambda_ce=0)[0]
    assert_close(model.evaluate(x, y, verbose=0), wanted)


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("over", ["samples", "dataset"])
def test_a_metric_leaves_masked_steps_out(over, jit_compile):
    x, y, steps = masked_series("nothing left of one")
    score = metrics.DiceScore(over=over, absent="keep")
    model = masking_model("mse", jit_compile, metrics=[score])
    labels = np.eye(CLASSES, dtype=np.float32)[y]
    found = model.evaluate(x, labels, verbose=0, return_dict=True)["dice_score"]
    hard = model.predict_on_batch(x).argmax(-1)
    p, t = (steps[..., None] * reference.one_hot(a, CLASSES) for a in (hard, y))
    i, p, t = (a.sum(1) for a in (p * t, p, t))
    if over == "dataset":
        i, p, t = (a.sum(0, keepdims=True) for a in (i, p, t))
    else:  # The sample of which nothing is left counts for nothing.
        i, p, t = (a[steps.any(1)] for a in (i, p, t))
    empty = p + t == 0
    wanted = np.where(empty, 1, 2 * i / np.where(empty, 1, p + t)).mean()
    assert_close(found, wanted)


# --- weights --------------------------------------------------------------------------------------


def weights_in_turn(shape):
    """Weights per voxel and weights per sample, one after the other, in the shapes that users
    have."""
    rng = np.random.default_rng(2)
    per_voxel = rng.random(shape).astype(np.float32)
    per_sample = rng.random(shape[0]).astype(np.float32)
    whole = rng.integers(0, 3, shape)
    return [per_voxel, per_sample, per_voxel[..., None], per_sample[:, None], whole, per_voxel]


def weighted_loss(x, y, weight):
    if weight.size == len(y):
        return (expected_losses(x, y) * weight.reshape(-1)).mean()
    return expected_losses(x, y, weight).mean()


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_both_kinds_may_come_in_turn(shape, jit_compile):
    """After weights of two kinds Keras traces a function that does not know their rank."""
    x, y = make(SHAPES[shape])
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.0), loss=DiceCELoss(), jit_compile=jit_compile)
    logits = model.predict_on_batch(x)
    for weight in weights_in_turn(SHAPES[shape]):
        found = model.train_on_batch(x, y, sample_weight=weight)
        assert_close(found, weighted_loss(logits, y, weight))


@ONLY_TENSORFLOW
@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_weights_may_have_an_unknown_rank(data_format, jit_compile):
    import tensorflow as tf

    x, y = make((4, 6, 5))
    loss = DiceCELoss(data_format=data_format)
    logits = x if data_format == "channels_last" else np.moveaxis(x, -1, 1).copy()

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)], jit_compile=jit_compile)
    def of_weights(weight):
        return loss(y, tf.constant(logits), weight)

    for weight in weights_in_turn((4, 6, 5)):
        if data_format == "channels_last" or weight.ndim != 4:
            assert_close(of_weights(tf.cast(weight, tf.float32)), weighted_loss(x, y, weight))


@pytest.mark.parametrize("jit_compile", JIT)
def test_weights_of_both_kinds_may_come_in_turn_for_signals(jit_compile):
    """Both kinds have two axes. After batches of several sizes Keras knows the length of
    neither."""
    x, y = make((5, 7))
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.0), loss=DiceCELoss(), jit_compile=jit_compile)
    logits = model.predict_on_batch(x)
    rng = np.random.default_rng(3)
    for n, columns in ((4, 1), (4, 7), (3, 1), (3, 7), (5, 7), (2, 1)):
        weight = rng.random((n, columns)).astype(np.float32)
        found = model.train_on_batch(x[:n], y[:n], sample_weight=weight)
        assert_close(found, weighted_loss(logits[:n], y[:n], weight))


@pytest.mark.parametrize("jit_compile", JIT)
def test_weights_of_both_kinds_may_come_in_turn_at_several_resolutions(jit_compile):
    x, y = make((4, 8, 6))
    inputs = keras.Input((8, 6, CLASSES))
    outputs = [keras.layers.Conv2D(CLASSES, 1, strides=s)(inputs) for s in (1, 2)]
    model = keras.Model(inputs, outputs)
    compiled = losses.deep_supervision(DiceCELoss(), 2, weights=[1.0, 0.5])
    model.compile(keras.optimizers.SGD(0.0), **compiled, jit_compile=jit_compile)
    fine, coarse = model.predict_on_batch(x)
    for weight in weights_in_turn((4, 8, 6)):
        found = model.train_on_batch(x, [y, y], sample_weight=[weight, weight])[0]
        small = weight[:, 1::2, 1::2] if weight.ndim > 2 else weight
        wanted = weighted_loss(fine, y, weight)
        wanted += 0.5 * weighted_loss(coarse, y[:, 1::2, 1::2], small)
        assert_close(found, wanted)


@ONLY_TENSORFLOW
@pytest.mark.parametrize("jit_compile", JIT)
def test_a_weight_of_unknown_rank_that_fits_nothing_is_an_error(jit_compile):
    import tensorflow as tf

    x, y = make((4, 6, 5))
    loss = DiceLoss()

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)], jit_compile=jit_compile)
    def of_weights(weight):
        return loss(y, tf.constant(x), weight)

    with pytest.raises(REFUSED):
        of_weights(tf.ones([4, 6, 1]))


# --- Keras' settings and callbacks ----------------------------------------------------------------


@pytest.fixture
def channels_first():
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format(before)


@pytest.mark.parametrize("labels", ["indices", "one-hot"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_the_one_that_keras_is_set_to(shape, labels, channels_first):
    x, y = make(SHAPES[shape])
    first = np.moveaxis(x, -1, 1).copy()
    given = y if labels == "indices" else np.moveaxis(np.eye(CLASSES, dtype=np.float32)[y], -1, 1)
    loss, score = DiceCELoss(), metrics.DiceScore()
    assert_close(loss(given, first), expected_losses(x, y).mean())
    score.update_state(given, first)
    last = metrics.DiceScore(data_format="channels_last")
    last.update_state(y, x)
    assert_close(score.result(), float(last.result()))


@pytest.mark.parametrize("cls", [DiceLoss, losses.TverskyLoss, metrics.DiceScore])
def test_the_layout_is_saved_as_it_was_found(cls, channels_first):
    made = cls()
    keras.config.set_image_data_format("channels_last")
    assert made.data_format == "channels_first"
    assert cls.from_config(made.get_config()).data_format == "channels_first"
    assert cls().data_format == "channels_last"


def test_labels_that_fit_the_other_layout_are_an_error_that_says_so():
    x, y = make((4, 6, 5))
    with pytest.raises(REFUSED, match="channels_first'"):
        DiceLoss()(y, np.moveaxis(x, -1, 1))
    with pytest.raises(REFUSED, match="channels_last'"):
        DiceLoss(data_format="channels_first")(y, x)


@pytest.mark.parametrize("score", [metrics.DiceScore, metrics.JaccardScore])
@pytest.mark.parametrize(
    "callback",
    [
        lambda monitor, path: keras.callbacks.EarlyStopping(monitor, restore_best_weights=True),
        lambda monitor, path: keras.callbacks.ReduceLROnPlateau(monitor, patience=1),
        lambda monitor, path: keras.callbacks.ModelCheckpoint(
            path / "best.weights.h5", monitor, save_best_only=True, save_weights_only=True
        ),
    ],
    ids=["EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint"],
)
def test_callbacks_know_that_more_is_better(callback, score, tmp_path):
    x, y = make((4, 6, 5))
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(CLASSES)])
    metric = score()
    model.compile("sgd", loss=DiceLoss(), metrics=[metric])
    watching = callback(f"val_{metric.name}", tmp_path)
    history = model.fit(
        x, y, validation_data=(x, y), epochs=2, verbose=0, callbacks=[watching]
    ).history
    assert watching.monitor_op(2.0, 1.0) and not watching.monitor_op(1.0, 2.0)
    assert_close(watching.best, max(history[f"val_{metric.name}"]))


# --- subclasses and arguments ---------------------------------------------------------------------


class AsInKeras(DiceCELoss):
    """Its `call` has the form that Keras documents."""

    def call(self, y_true, y_pred):
        return 2 * super().call(y_true, y_pred)


class WithWeights(DiceCELoss):
    def call(self, y_true, y_pred, voxel_weight=None, sample_weight=None):
        return 2 * super().call(y_true, y_pred, voxel_weight, sample_weight)


@pytest.mark.parametrize("jit_compile", JIT)
@pytest.mark.parametrize("cls", [AsInKeras, WithWeights])
def test_a_subclass_may_override_call(cls, jit_compile):
    x, y = make((4, 6, 5))
    per_sample = np.arange(4.0, dtype=np.float32)
    assert_close(cls()(y, x), 2 * expected_losses(x, y).mean())
    assert_close(cls()(y, x, per_sample), 2 * (expected_losses(x, y) * per_sample).mean())
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Activation("linear")])
    model.compile(loss=cls(), jit_compile=jit_compile)
    assert_close(model.evaluate(x, y, verbose=0), 2 * expected_losses(x, y).mean())


class MeanSquaredError(losses.SumsLoss):
    """People write it for `keras.losses.Loss`. It counts on labels in the dtype of the loss."""

    def call(self, y_true, y_pred):
        one_hot = ops.one_hot(ops.cast(y_true, "int32"), 3)
        return ops.mean((one_hot - y_pred) ** 2, (1, 2, 3))


class Constant(losses.SumsLoss):
    def call(self, y_true, y_pred):
        return [2 * float(keras.backend.standardize_dtype(y_true.dtype) == "float32")] * 4


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_a_subclass_gets_labels_and_predictions_as_keras_has_them(dtype):
    x, y = make((4, 6, 5))
    wanted = ((reference.one_hot(y, CLASSES) - x) ** 2).mean((1, 2, 3))
    weight = np.arange(4.0)
    assert_close(MeanSquaredError()(y.astype(dtype), x, weight), (wanted * weight).mean())
    assert_close(MeanSquaredError()(y.astype(dtype), ops.cast(x, "float64")), wanted.mean())
    assert_close(Constant()(y.astype(dtype), x, weight), 2 * weight.mean())


def test_a_subclass_that_takes_no_weights_refuses_those_that_enter_the_sums():
    x, y = make((4, 6, 5))
    masked = with_mask(x, np.ones((4, 6), bool))
    for call in (
        lambda: AsInKeras()(y, x, np.ones((4, 6, 5))),
        lambda: AsInKeras(batch=True)(y, x, np.ones(4)),
        lambda: AsInKeras()(y, masked),
    ):
        with pytest.raises(ValueError, match=r"AsInKeras.call takes y_true and y_pred alone"):
            call()
    weight = np.random.default_rng(0).random((4, 6, 5))
    assert_close(WithWeights()(y, x, weight), 2 * expected_losses(x, y, weight).mean())


@pytest.mark.parametrize(
    ("cls", "argument", "says"),
    [
        (DiceLoss, "from_logits", r"DiceLoss has no argument 'from_logits': y_pred are logits"),
        (DiceCELoss, "axis", r"DiceCELoss .*'axis'.*data_format"),
        (losses.TverskyLoss, "num_classes", r"TverskyLoss .*'num_classes'.*channels"),
        (losses.GeneralizedDiceLoss, "to_onehot_y", r"GeneralizedDiceLoss .*class indices"),
        (losses.DiceFocalLoss, "softmax", r"DiceFocalLoss .*applied by default"),
        (DiceLoss, "sigmoid", r"activation=\"sigmoid\""),
        (DiceLoss, "smooth", r"did you mean smooth_[nd]r\?"),
        (DiceLoss, "include_backgroud", r"did you mean include_background\?"),
        (AsInKeras, "quux", r"AsInKeras has no argument 'quux': it has absent, activation, aver"),
        (metrics.DiceScore, "num_classes", r"DiceScore has no argument 'num_classes'"),
        (metrics.DiceScore, "activation", r"from_logits=False"),
        (metrics.JaccardScore, "softmax", r"JaccardScore .*argmax"),
        (metrics.JaccardScore, "sigmoid", r"threshold"),
    ],
)
def test_an_unknown_argument_is_an_error_that_advises(cls, argument, says):
    with pytest.raises(TypeError, match=says):
        cls(**{argument: True})


# --- shapes that stand for something else ---------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "data_format", "advice"),
    [
        ((2, 96, 96), "channels_last", r"y_pred\[..., None\]"),
        ((3, 80, 100), "channels_last", r"last axis is taken for 100 classes"),
        ((1, 8, 96, 96), "channels_last", r"y_pred\[..., None\]"),
        ((1, 3, 8, 96, 96), "channels_last", r"data_format='channels_first'"),
        ((2, 96, 96), "channels_first", r"y_pred\[:, None\]"),
        ((2, 96, 96, 3), "channels_first", r"data_format='channels_last'"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_spatial_axis_in_the_place_of_the_classes_warns(dtype, shape, data_format, advice):
    mask = (np.random.default_rng(0).random(shape) < 0.3).astype(dtype)
    logits = np.zeros(shape, np.float32)
    loss = DiceLoss(activation="sigmoid", data_format=data_format)
    for call in (
        loss,
        program(loss),
        DiceLoss(data_format=data_format),
        metrics.DiceScore(data_format=data_format).update_state,
    ):
        with pytest.warns(UserWarning, match=advice):
            call(mask, logits)


@pytest.mark.parametrize(
    ("labels", "logits"),
    [
        ((2, 96, 96), (2, 96, 96, 1)),  # a mask, with its axis of channels
        ((2, 96, 96, 1), (2, 96, 96, 1)),
        ((2, 50, 60, 104), (2, 50, 60, 104)),  # one-hot labels of many classes
        ((1, 4, 5, 6, 104), (1, 4, 5, 6, 104)),
        ((2, 32, 32), (2, 32, 32)),  # a signal of 32 classes
        ((2, 50, 100), (2, 50, 100)),  # a signal of 100 classes, one-hot
        ((2, 96, 96, 96), (2, 96, 96, 96)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_shapes_that_are_meant_so_do_not_warn(labels, logits):
    y = np.zeros(labels, np.float32)
    y[..., 0] = 1
    DiceLoss(activation="sigmoid")(y, np.zeros(logits, np.float32))


def test_rows_that_may_be_voxels_warn():
    x, y = make((4, 6))
    rows, labels = x.reshape(-1, CLASSES), y.reshape(-1)
    for call in (
        lambda: DiceLoss()(labels, rows),
        lambda: program(DiceCELoss())(labels, rows),
        lambda: metrics.DiceScore().update_state(labels, rows),
    ):
        with pytest.warns(UserWarning, match="each row counts as a sample of one voxel"):
            call()


@pytest.mark.filterwarnings("error")
def test_rows_that_are_added_up_do_not_warn():
    x, y = make((4, 6))
    rows, labels = x.reshape(-1, CLASSES), y.reshape(-1)
    wanted = expected_losses(rows[None], labels[None], lambda_ce=0)[0]
    assert_close(DiceLoss(batch=True)(labels, rows), wanted)
    DiceCELoss(lambda_dice=0)(labels, rows)  # It is a mean over the rows either way.
    metrics.DiceScore(over="dataset").update_state(labels, rows)


@ONLY_TENSORFLOW
def test_ragged_and_sparse_tensors_are_refused_in_words():
    import tensorflow as tf

    x, y = make((4, 6))
    ragged = tf.RaggedTensor.from_tensor(tf.constant(y))
    logits = tf.RaggedTensor.from_tensor(tf.constant(x))
    sparse = tf.sparse.from_dense(y)
    for arguments, name in (
        ((ragged, x), "y_true is a RaggedTensor"),
        ((y, logits), "y_pred is a RaggedTensor"),
        ((y, x, ragged), "sample_weight is a RaggedTensor"),
        ((sparse, x), "y_true is a SparseTensor"),
    ):
        for call in (DiceLoss(), metrics.DiceScore().update_state):
            with pytest.raises(TypeError, match=rf"{name}.*to_tensor"):
                call(*arguments)


# --- what labels are ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
@pytest.mark.parametrize("layout", ["a channel axis of 1", "none", "channels first"])
def test_class_indices_in_floats_are_not_soft_labels(layout, dtype):
    """With squared_pred, class weights of the cross-entropy are refused for soft labels only."""
    x, y = make((1, 4, 4))
    options = {"squared_pred": True, "ce_class_weight": [1.0, 2.0, 3.0]}
    wanted = float(DiceCELoss(**options)(y, x))
    labels = y.astype(dtype)
    if layout == "channels first":
        options["data_format"] = "channels_first"
        x, labels = np.moveaxis(x, -1, 1), labels[:, None]
    elif layout != "none":
        labels = labels[..., None]
    for loss in (DiceCELoss(**options), program(DiceCELoss(**options))):
        assert_close(loss(labels, x), wanted)


@ONLY_TENSORFLOW
def test_labels_of_unknown_channels_that_may_be_soft_are_refused():
    import tensorflow as tf

    spec = [tf.TensorSpec([None] * 4), tf.TensorSpec([None, None, None, 3])]
    loss = DiceCELoss(squared_pred=True, ce_class_weight=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="squares"):
        tf.function(loss, input_signature=spec).get_concrete_function()


def test_labels_that_may_be_soft_are_refused():
    x, y = make((1, 4, 4))
    one_hot = np.eye(CLASSES, dtype=np.float32)[y]
    options = {"squared_pred": True, "ce_class_weight": [1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match="squares"):
        DiceCELoss(**options)(one_hot, x)
    options["ce_class_weight"] = [2.0]
    with pytest.raises(ValueError, match="squares"):  # This is a mask of floats.
        DiceCELoss(activation="sigmoid", **options)(one_hot[..., :1], x[..., :1])
    DiceCELoss(activation="sigmoid", **options)(y == 1, x[..., :1])


@pytest.mark.parametrize("weight", [None, "uint8", "int32", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_1_change_nothing_at_the_threshold(dtype, weight):
    """0.3 as a float32 is larger than 0.3 as a double."""
    x = np.array([0.3, 0.3, 0.3, 0.9], dtype).reshape(1, 4, 1)
    ones = None if weight is None else np.ones((1, 4), weight)
    score = metrics.DiceScore(prediction="threshold", threshold=0.3, from_logits=False)
    score.update_state(np.array([[1, 1, 0, 1]]), x, ones)
    assert_close(score.result(), 0.5)


# --- predictions that are no probabilities --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("way", ["eager", "function", "XLA", "fit"])
def test_logits_that_are_taken_for_probabilities_are_an_error(way, dtype):
    x, y = make((2, 6, 5))
    x = np.clip(x, 0, 1).astype(dtype)
    x[1, 2, 3, 0] = 12.625
    loss = DiceCELoss(activation="none")
    says = r"voxel \[1, 2, 3\] hold the value 12.625, but activation='none' takes probabilities"
    with pytest.raises(REFUSED, match=says):
        if way == "fit":
            model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Flatten()])
            model.add(keras.layers.Reshape(x.shape[1:]))
            model.compile("sgd", loss=loss, jit_compile=False)
            model.evaluate(x, y, verbose=0)
        else:
            call = loss if way == "eager" else program(loss, compiled=way == "XLA")
            call(y, ops.convert_to_tensor(x))
