"""The Keras losses: values, gradients, training, saving, and errors about wrong arguments."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import losses
from dice_op.losses import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from helpers import reference
from helpers.reference import dice_losses, flat, mean_dice
from helpers.tape import value_and_gradient

SHAPE = (3, 6, 5, 4, 3)  # [N, D, H, W, C]
VOXELS = 6 * 5 * 4


def make(classes=3, dtype="float32", seed=0):
    """Logits and uint8 labels of a random volume. Its last class is absent from the last sample."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(*SHAPE[:-1], classes))
    y = rng.integers(0, max(classes, 2), size=SHAPE[:-1]).astype(np.uint8)
    y[-1][y[-1] == max(classes, 2) - 1] = 0
    return x.astype(dtype), y


def jaccard(i, p, t, nr=1e-5, dr=1e-5):
    return 1 - (2 * i + nr) / (2 * (p + t - i) + dr)


def over_classes(*sums):
    return [s.sum(1, keepdims=True) for s in sums]


def over_batch(*sums):
    return [s.sum(0, keepdims=True) for s in sums]


W = np.array([0.1, 2.0, 5.0])
# The arguments of a loss, and what people write for it in NumPy, over I, P, T of shape [N, C].
FORMS = {
    "multi-class": ({}, mean_dice),
    "class-weighted": (
        dict(class_weight=list(W)),
        lambda *s: (W * dice_losses(*s)).sum(1).mean(),
    ),
    "binary, jointly": (
        dict(activation="sigmoid", average="micro"),
        lambda *s: dice_losses(*over_classes(*s)).mean(),
    ),
    "binary, one tensor": (
        dict(activation="sigmoid", average="micro", batch=True),
        lambda *s: dice_losses(*over_batch(*over_classes(*s))).mean(),
    ),
    "no background": (
        dict(include_background=False),
        lambda *s: dice_losses(*s)[:, 1:].mean(),
    ),
    "no background, weighted": (
        dict(include_background=False, class_weight=[1, 3]),
        lambda *s: (np.array([1, 3]) * dice_losses(*s)[:, 1:]).sum(1).mean(),
    ),
    "weighted sums": (
        dict(average="micro", class_weight=list(W)),
        lambda *s: dice_losses(*over_classes(*(W * v for v in s))).mean(),
    ),
    "squared": (dict(squared_pred=True), mean_dice),
    "jaccard": (dict(jaccard=True), lambda *s: jaccard(*s).mean()),
    "batch": (dict(batch=True), lambda *s: dice_losses(*over_batch(*s)).mean()),
    "smoothing": (
        dict(smooth_nr=1.0, smooth_dr=3.0),
        lambda *s: dice_losses(*s, smooth_nr=1.0, smooth_dr=3.0).mean(),
    ),
    "probabilities": (dict(activation="none"), mean_dice),
}


@pytest.mark.parametrize("labels", ["indices", "indices with a channel", "float", "one-hot"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_what_people_write_in_numpy(form, data_format, labels):
    arguments, of_sums = FORMS[form]
    x, y = make()
    if arguments.get("activation") == "none":
        x = np.asarray(tf.nn.softmax(x))
    t = reference.one_hot(y, SHAPE[-1])
    options = dict(
        activation=arguments.get("activation", "softmax"), squared="squared_pred" in arguments
    )
    expected, gradient = reference.loss_and_gradient(flat(x), flat(t), of_sums, **options)
    gradient = gradient.reshape(x.shape)

    y = {
        "indices": y,
        "indices with a channel": y[..., None],
        "float": y.astype(np.float64),
        "one-hot": t.astype(np.float32),
    }[labels]
    if data_format == "channels_first":
        x, gradient = np.moveaxis(x, -1, 1), np.moveaxis(gradient, -1, 1)
        y = np.moveaxis(y, -1, 1) if y.ndim == x.ndim else y
    x = tf.constant(x)
    loss = DiceLoss(**arguments, data_format=data_format)
    value, found = value_and_gradient(lambda x: loss(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient)

    @tf.function(input_signature=[tf.TensorSpec([None] * 5, x.dtype)])
    def compiled(x):
        return loss(y, x)

    np.testing.assert_allclose(compiled(x), value, rtol=1e-6)


SOFT = {
    "Dice": (DiceLoss(soft_label=True), mean_dice),
    "Jaccard": (DiceLoss(soft_label=True, jaccard=True), lambda *s: jaccard(*s).mean()),
    "Tversky": (
        losses.TverskyLoss(soft_label=True, alpha=0.3, beta=0.7),
        lambda *s: (1 - score(*s, 0.3, 0.7)).mean(),
    ),
    "generalized Dice": (
        losses.GeneralizedDiceLoss(soft_label=True),
        lambda *s: generalized(*s, 2).mean(),
    ),
}


@pytest.mark.parametrize("name", SOFT)
def test_losses_of_soft_labels_are_what_people_write_in_numpy(name):
    loss, of_sums = SOFT[name]
    x, _ = make()
    t = np.random.default_rng(1).dirichlet(np.ones(SHAPE[-1]), SHAPE[:-1]).astype(np.float32)
    options = {"activation": "softmax", "soft": True}
    expected, gradient = reference.loss_and_gradient(flat(x), flat(t), of_sums, **options)
    value, found = value_and_gradient(lambda x: loss(t, x), tf.constant(x))
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


@pytest.mark.parametrize("options", [{"soft_label": True}, {"squared_pred": True}], ids=str)
def test_the_loss_of_soft_labels_is_smallest_where_they_are_predicted(options):
    """With neither option it is not: labels of 0 and 1 are then better than the right ones."""
    t = np.random.default_rng(2).random((1, 50, 1)).astype(np.float32)
    rounded = np.round(t)

    def loss(p, **options):
        return float(DiceLoss(activation="none", **options)(t, p))

    assert (round(loss(t), 2), round(loss(rounded), 2)) == (0.36, 0.27)  # docs/mathematics.md
    assert loss(t, **options) <= 1e-6
    assert loss(rounded, **options) > 0.05


@pytest.mark.parametrize("given", ["", "soft_label=True", "squared_pred=True"])
def test_soft_labels_without_an_option_for_them_warn_once(given, run_python):
    said = run_python(
        """
        import os, sys
        os.dup2(1, 2)  # TensorFlow logs to the standard error.
        import numpy as np
        import tensorflow as tf
        from dice_op.losses import DiceLoss

        loss = eval(sys.argv[1])
        x = np.zeros((1, 8, 8, 8, 3), np.float32)
        for t in (np.eye(3, dtype=np.float32)[np.zeros((1, 8, 8, 8), int)], x + 1 / 3):
            print("labels", t.max(), flush=True)
            for call in (loss, tf.function(loss)):
                call(t, x)
        """,
        f"DiceLoss({given})",
        TF_CPP_MIN_LOG_LEVEL="0",
    )
    hard, soft = said.split("labels 0.33")
    assert "are fractions" not in hard
    assert soft.count("are fractions") == (0 if given else 1)


def score(i, p, t, alpha=0.5, beta=0.5):
    return (i + 1e-5) / (i + alpha * (p - i) + beta * (t - i) + 1e-5)


def matthews(i, p, t, voxels=VOXELS, nr=0.0, dr=1e-5):
    tp, fp, fn, tn = i, p - i, t - i, voxels - p - t + i
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + dr)
    return (tp * tn - fp * fn + nr) / root


def generalized(i, p, t, power, smooth=0.0):
    t_real = np.real(t)
    w = np.where(t_real > 0, 1.0 / np.maximum(t_real, 1e-30) ** power, 0)
    w = np.where(t_real > 0, w, w.max(1, keepdims=True))
    return 1 - (2 * (w * i).sum(1) + smooth) / ((w * (p + t)).sum(1) + smooth)


def of_present(losses, t, counted):
    """The mean over the classes that are present. counted: absent ones count as well, with loss
    0."""
    present = np.real(t) > 0
    classes = losses.shape[1] if counted else np.maximum(present.sum(1), 1)
    return (np.where(present, losses, 0).sum(1) / classes).mean()


# A loss, and the same in NumPy. test_conformance.py compares them with other libraries as well.
FAMILY = {
    "Tversky": (
        TverskyLoss(alpha=0.3, beta=0.7),
        lambda *s: (1 - score(*s, 0.3, 0.7)).mean(),
    ),
    "focal Tversky": (
        TverskyLoss(alpha=0.3, beta=0.7, gamma=0.75),
        lambda *s: ((1 - score(*s, 0.3, 0.7)) ** 0.75).mean(),
    ),
    "log Dice": (
        DiceLoss(transform="log", absent="skip"),
        lambda i, p, t: of_present(-np.log(1 - dice_losses(i, p, t)), t, False),
    ),
    "log-cosh Dice": (
        DiceLoss(transform="log_cosh"),
        lambda *s: np.log(np.cosh(dice_losses(*s))).mean(),
    ),
    "absent skipped": (
        DiceLoss(absent="skip"),
        lambda i, p, t: of_present(dice_losses(i, p, t), t, False),
    ),
    "absent scores one": (
        DiceLoss(absent="one"),
        lambda i, p, t: of_present(dice_losses(i, p, t), t, True),
    ),
    "a loss per class": (DiceLoss(average="none"), mean_dice),
    "weighted by support": (
        DiceLoss(average="weighted"),
        lambda i, p, t: ((t * dice_losses(i, p, t)).sum(1) / t.sum(1)).mean(),
    ),
    "Matthews": (losses.MatthewsLoss(), lambda *s: (1 - matthews(*s)).mean()),
    "Matthews of all classes": (
        losses.MatthewsLoss(average="micro"),
        lambda *s: (1 - matthews(*over_classes(*s), voxels=SHAPE[-1] * VOXELS)).mean(),
    ),
    "Matthews of the batch, smoothed": (
        losses.MatthewsLoss(batch=True, smooth_nr=2.0, smooth_dr=5.0),
        lambda *s: (1 - matthews(*over_batch(*s), SHAPE[0] * VOXELS, 2.0, 5.0)).mean(),
    ),
    "generalized": (GeneralizedDiceLoss(), lambda *s: generalized(*s, 2).mean()),
    "generalized, simple": (
        GeneralizedDiceLoss(weight_type="simple", smooth_nr=0.5, smooth_dr=0.5),
        lambda *s: generalized(*s, 1, 0.5).mean(),
    ),
    "generalized, uniform": (
        GeneralizedDiceLoss(weight_type="uniform"),
        lambda *s: generalized(*s, 0).mean(),
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_each_loss_of_the_family_is_what_people_write_in_numpy(name):
    loss, of_sums = FAMILY[name]
    x, y = make()
    t = reference.one_hot(y, SHAPE[-1])
    expected, gradient = reference.loss_and_gradient(
        flat(x), flat(t), of_sums, activation="softmax"
    )
    x = tf.constant(x)
    value, found = value_and_gradient(lambda x: loss(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


ALL = {
    "Dice": lambda: DiceLoss(class_weight=[1, 2, 3], absent="one"),
    "Tversky": lambda: TverskyLoss(alpha=0.3, beta=0.7, gamma=0.8),
    "generalized": lambda: GeneralizedDiceLoss(weight_type="simple", infinite_weight="zero"),
    "Dice + CE": lambda: losses.DiceCELoss(ce_class_weight=[1, 2, 3], label_smoothing=0.1),
    "Dice + focal": lambda: losses.DiceFocalLoss(batch=True, include_background=False),
    "generalized + focal": lambda: losses.GeneralizedDiceFocalLoss(lambda_ce=0.5),
    "Matthews": lambda: losses.MatthewsLoss(average="weighted"),
    "regions": lambda: losses.DiceCELoss(activation="sigmoid", regions=[(0,), (1, 2), (2,)]),
    "deep supervision": lambda: losses.DownsampledLabels(DiceLoss(transform="log")),
}


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", ALL)
def test_every_loss_trains(name, policy, jit_compile):
    model, images, labels = model_and_data(policy)
    model.compile(keras.optimizers.Adam(0.03), ALL[name](), jit_compile=jit_compile)
    history = model.fit(images, labels, batch_size=4, epochs=25, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < 0.75 * history[0]


@pytest.mark.parametrize("name", ALL)
def test_every_loss_is_saved(name, tmp_path):
    model, images, labels = model_and_data()
    model.compile("adam", ALL[name]())
    expected = model.evaluate(images, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.loss) is type(model.loss)
    assert again.loss.get_config() == model.loss.get_config()
    np.testing.assert_allclose(again.evaluate(images, labels, verbose=0), expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "none"])
@pytest.mark.parametrize("samples", [2, 3])
def test_weights_per_sample_apply_to_losses_per_class(samples, reduction):
    # There are three classes: once there are as many samples as classes.
    x, y = (v[:samples] for v in make())
    weight = np.float32([1, 0.5, 4][:samples])
    each = DiceLoss(average="none", reduction="none")(y, x).numpy()
    assert each.shape == (samples, 3)
    expected = each * weight[:, None]
    expected = {"none": expected, "sum": expected.sum(), "sum_over_batch_size": expected.mean()}
    loss = DiceLoss(average="none", reduction=reduction)
    np.testing.assert_allclose(loss(y, x, weight), expected[reduction], rtol=1e-6)
    np.testing.assert_allclose(loss(y, x, weight[:, None]), expected[reduction], rtol=1e-6)


@pytest.mark.parametrize("batch", [False, True])
def test_sample_weights_of_unknown_rank_count_as_those_of_known_rank(batch):
    """Keras traces a loss in this way after weights of both kinds."""
    x, y = make()
    for loss in (DiceLoss(batch=batch), losses.DiceCELoss(batch=batch)):
        traced = tf.function(lambda w, f=loss: f(y, x, w), input_signature=[tf.TensorSpec(None)])
        for shape in ((3,), (3, 1), y.shape, (*y.shape, 1)):
            weight = tf.constant(np.random.default_rng(1).random(shape), tf.float32)
            np.testing.assert_allclose(traced(weight), loss(y, x, weight), rtol=1e-6)


def test_ignored_voxels_count_for_nothing():
    x, y = make()
    y[np.random.default_rng(1).random(y.shape) < 0.4] = 255
    t = reference.one_hot(y, 3)
    counts = (y != 255).astype(float).reshape(3, -1)
    expected, gradient = reference.loss_and_gradient(
        flat(x), flat(t), mean_dice, counts, activation="softmax"
    )
    x = tf.constant(x)
    value, found = value_and_gradient(lambda x: DiceLoss(ignore_label=255)(y, x), x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(found, gradient.reshape(x.shape))


def test_dice_equals_that_of_keras():
    x, y = make()
    p = tf.nn.softmax(x)
    t = reference.one_hot(y, 3).astype(np.float32)
    theirs = keras.losses.Dice()(t, p)
    ours = DiceLoss(activation="none", average="micro", batch=True, smooth_nr=0, smooth_dr=1e-7)
    assert abs(float(ours(y, p)) - float(theirs)) <= 1e-6


def test_weights_apply_per_sample_and_per_voxel():
    x, y = make()
    loss, each = DiceLoss(), DiceLoss(reduction="none")(y, x).numpy()
    assert each.shape == (3,)
    weight = np.float32([1, 0, 4])
    for given in (weight, weight[:, None], tf.constant(weight, tf.float64)):
        np.testing.assert_allclose(loss(y, x, given), (each * weight).mean(), rtol=1e-6)
    weighted_mean = DiceLoss(reduction="mean_with_sample_weight")(y, x, weight)
    np.testing.assert_allclose(weighted_mean, (each * weight).sum() / 5, rtol=1e-6)

    rng = np.random.default_rng(2)
    voxels = rng.integers(0, 3, size=y.shape).astype(np.float32)
    t = reference.one_hot(y, 3)
    expected, gradient = reference.loss_and_gradient(
        flat(x),
        flat(t),
        mean_dice,
        voxels.reshape(3, -1),
        activation="softmax",
    )
    x = tf.constant(x)

    @tf.function(input_signature=[tf.TensorSpec(None)] * 2)
    def of_unknown_shapes(x, weight):
        return loss(y, x, weight)

    np.testing.assert_allclose(of_unknown_shapes(x, weight), loss(y, x, weight), rtol=1e-6)
    np.testing.assert_allclose(of_unknown_shapes(x, voxels), loss(y, x, voxels), rtol=1e-6)
    for given in (voxels, voxels[..., None], voxels.astype(np.uint8)):
        value, found = value_and_gradient(lambda x, given=given: loss(y, x, given), x)
        assert abs(float(value) - expected) <= 1e-6
        reference.assert_gradient(found, gradient.reshape(x.shape))


def test_weights_per_sample_enter_the_sums_of_a_batch():
    """The loss is as if each voxel had the weight of its sample."""
    x, y = make()
    weight = np.float32([1, 0, 4])
    expected, gradient = reference.loss_and_gradient(
        flat(x),
        flat(reference.one_hot(y, 3)),
        lambda *s: dice_losses(*over_batch(*s)).mean(),
        np.repeat(weight[:, None], y[0].size, axis=1),
        activation="softmax",
    )
    x = tf.constant(x)
    for given in (weight, weight[:, None]):
        value, found = value_and_gradient(
            lambda x, given=given: DiceLoss(batch=True)(y, x, given), x
        )
        assert abs(float(value) - expected) <= 1e-6
        reference.assert_gradient(found, gradient.reshape(x.shape))


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of labels and logits that reach the op."""
    dtypes = set()
    original = losses._base.dice_sums

    def spy(y_true, y_pred, **options):
        dtypes.add((y_true.dtype.name, y_pred.dtype.name))
        return original(y_true, y_pred, **options)

    monkeypatch.setattr(losses._base, "dice_sums", spy)
    return dtypes


def model_and_data(dtype=None, classes=3):
    """A network of two layers, and volumes whose labels are a function of the intensity."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 3, size=(8, 6, 6, 6, 1)).astype(np.float32)
    labels = np.minimum(images[..., 0], classes - 1).astype(np.uint8)
    model = keras.Sequential(
        [
            keras.Input((None, None, None, 1)),
            keras.layers.Conv3D(8, 1, activation="relu", dtype=dtype),
            keras.layers.Conv3D(classes, 1, dtype=dtype),
        ]
    )
    return model, images, labels


def test_a_model_is_compiled_trained_and_evaluated(seen):
    model, images, labels = model_and_data()
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss=DiceLoss())
    before = model.evaluate(images, labels, verbose=0)
    history = model.fit(images, labels, batch_size=3, epochs=30, verbose=0)
    after = model.evaluate(images, labels, verbose=0)
    assert after < 0.5 * before
    assert history.history["loss"][-1] < history.history["loss"][0]
    # For 8 samples in batches of 3 it is the mean over samples, not over batches.
    each = DiceLoss(reduction="none")(labels, model.predict(images, verbose=0)).numpy()
    np.testing.assert_allclose(after, each.mean(), rtol=1e-5)
    assert seen == {("uint8", "float32")}


def test_fit_takes_datasets_and_weights(seen):
    model, images, labels = model_and_data()
    model.compile(optimizer="adam", loss=DiceLoss(), weighted_metrics=[])
    per_sample = np.float32([1, 0, 2, 0, 1, 3, 1, 1])
    per_voxel = np.ones(labels.shape, np.float32)
    per_voxel[:, :3] = 0
    outputs = model.predict(images, verbose=0)
    for weight in (per_sample, per_voxel):
        data = tf.data.Dataset.from_tensor_slices((images, labels.astype(np.int32), weight))
        value = model.evaluate(data.batch(8), verbose=0)
        np.testing.assert_allclose(value, DiceLoss()(labels, outputs, weight), rtol=1e-5)
        model.fit(data.batch(4), epochs=1, verbose=0)
        outputs = model.predict(images, verbose=0)
    assert seen == {("int32", "float32"), ("uint8", "float32")}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_in_mixed_precision_with_loss_scaling_trains(policy, seen):
    model, images, labels = model_and_data(policy)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05))
    model.compile(optimizer=optimizer, loss=DiceLoss())
    history = model.fit(images, labels, batch_size=4, epochs=30, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < 0.5 * history[0]
    assert float(optimizer.dynamic_scale) > 1
    assert seen == {("uint8", policy[6:])}


def test_each_of_several_outputs_has_its_loss():
    model, images, labels = model_and_data()
    two = keras.Model(model.inputs, {"a": model.outputs[0], "b": -model.outputs[0]})
    loss = {"a": DiceLoss(), "b": DiceLoss(include_background=False)}
    two.compile(optimizer="adam", loss=loss, loss_weights={"a": 1.0, "b": 0.5})
    total = two.evaluate(images, {"a": labels, "b": labels}, verbose=0)
    x = model.predict(images, verbose=0)
    expected = float(loss["a"](labels, x)) + 0.5 * float(loss["b"](labels, -x))
    np.testing.assert_allclose(np.ravel(total)[0], expected, rtol=1e-5)


def arguments_of(cls):
    """The names of all arguments that a loss takes, by the signatures of its class and bases."""
    own = [c.__init__.__kwdefaults__ or {} for c in cls.__mro__ if issubclass(c, losses.SumsLoss)]
    return set().union(*own)


CONFIGURED = {
    losses.DiceLoss: dict(
        activation="sigmoid", include_background=False, class_weight=np.array([1, 2], np.float32),
        squared_pred=True, jaccard=True, smooth_nr=0, smooth_dr=1e-3, average="micro", batch=True,
        ignore_label=np.uint8(255), data_format="channels_first", reduction="sum", name="mine",
        dtype="float64",
    ),
    losses.TverskyLoss: dict(alpha=1, beta=2, gamma=0.5, absent="skip"),
    losses.MatthewsLoss: dict(smooth_nr=1, average="weighted", transform="log_cosh"),
    losses.GeneralizedDiceLoss: dict(weight_type="simple", soft_label=True, smooth_nr=2),
    losses.GeneralizedDiceFocalLoss: dict(infinite_weight="zero", focal_gamma=1, lambda_dice=3),
    losses.DiceCELoss: dict(
        lambda_dice=2, lambda_ce=3, ce_class_weight=[1, 2], label_smoothing=0.5, transform="log",
        activation="sigmoid", regions=((1, 2), {2}),
    ),
    losses.DiceFocalLoss: dict(focal_gamma=3),
}  # fmt: skip


@pytest.mark.parametrize("cls", CONFIGURED)
def test_a_configuration_brings_back_the_loss(cls):
    given = CONFIGURED[cls]
    loss = cls(**given)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is cls
    assert again.get_config() == loss.get_config()
    assert again.get_config() == cls.from_config(loss.get_config()).get_config()
    assert set(loss.get_config()) == arguments_of(cls)
    for name, value in given.items():
        value = {"regions": [[1, 2], [2]], "class_weight": [1, 2]}.get(name, value)
        assert again.get_config()[name] == value, name


def test_a_saved_keras_model_trains_in_another_process(tmp_path, run_python):
    model, images, labels = model_and_data()
    model.compile(optimizer="adam", loss=DiceLoss(class_weight=[1, 2, 3]))
    model.fit(images, labels, epochs=1, verbose=0)
    expected = model.evaluate(images, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    code = """
        import sys
        import dice_op.losses, keras, numpy as np
        model = keras.models.load_model(sys.argv[1] + "/model.keras")
        data = np.load(sys.argv[1] + "/data.npz")
        print(model.evaluate(data["images"], data["labels"], verbose=0))
        model.fit(data["images"], data["labels"], epochs=1, verbose=0)
    """
    np.testing.assert_allclose(float(run_python(code, tmp_path).split()[-1]), expected, rtol=1e-6)


def test_a_saved_model_runs_in_another_process(tmp_path, run_python):
    """The SavedModel is a training step: loss and gradient of a batch of any size."""
    loss = DiceLoss()

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, None, 3], tf.float32),
            tf.TensorSpec([None, None, None, None], tf.uint8),
        ]
    )
    def step(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x)
        return {"loss": value, "gradient": tape.gradient(value, x)}

    module = tf.Module()
    module.step = step
    tf.saved_model.save(module, str(tmp_path / "saved"))
    x, y = make()
    expected = step(x, y)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    code = """
        import sys
        import dice_op, numpy as np, tensorflow as tf
        dice_op.dice_sums  # loads the op
        step = tf.saved_model.load(sys.argv[1] + "/saved").step
        data = np.load(sys.argv[1] + "/data.npz")
        x, y = tf.constant(data["x"]), tf.constant(data["y"])
        result = step(x, y)
        with tf.GradientTape() as tape:  # differentiated here: the gradient's gradient
            tape.watch(x)
            norm = tf.reduce_sum(step(x, y)["gradient"] ** 2)
        assert tf.reduce_max(tf.abs(tape.gradient(norm, x))) > 0
        np.savez(sys.argv[1] + "/result.npz", **result)
    """
    run_python(code, tmp_path)
    result = np.load(tmp_path / "result.npz")
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(activation="relu"), "activation is 'relu'.*'softmax', 'sigmoid', 'none'"),
        (dict(data_format="NDHWC"), "data_format is 'NDHWC'.*'channels_last', 'channels_first'"),
        (dict(average="mean"), "average is 'mean'.*'macro', 'weighted', 'micro'"),
        (dict(smooth_nr=-1), "smooth_nr is -1.*at least 0"),
        (dict(smooth_dr=float("nan")), "smooth_dr is nan"),
        (dict(class_weight=[1, -2, 1]), "class_weight is .*at least 0"),
        (dict(class_weight=[0, 0]), "class_weight is .*not all 0"),
        (dict(class_weight=[]), "class_weight is .*one finite weight per class"),
        (dict(class_weight={0: 1, 1: 2}), "class_weight is {0: 1, 1: 2}.*a list of one weight"),
        (dict(class_weight="12"), "class_weight is '12'.*a list of one weight"),
        (dict(class_weight=2.0), "class_weight is 2.0.*a list of one weight"),
        (dict(class_weight=["a"]), "class_weight is 'a', but must be a number"),
        (dict(smooth_nr=None), "smooth_nr is None, but must be a number"),
        (dict(batch="no"), "batch is 'no', but must be True or False"),
        (dict(ignore_label=255.0), "ignore_label is 255.0, but must be an integer"),
        (dict(transform=["log"]), r"transform is \['log'\], but must be one of 'linear'"),
        (dict(absent="skip", average="micro"), "absent='skip' asks about each class"),
        (dict(absent="skip", average="none"), 'but average="none"'),
        (dict(regions=[(1,), (2,)]), 'activation="softmax" gives a voxel one class'),
        (dict(regions=[]), "regions is empty"),
        (dict(regions=3), "regions is 3, but must be lists"),
        (dict(regions=[(1, 40)]), "regions must be the label values of each class"),
        (
            dict(regions=[(1,), (2,)], activation="sigmoid", include_background=False),
            "would leave out the first of the regions",
        ),
    ],
)
def test_wrong_arguments_are_errors_in_words(arguments, says):
    with pytest.raises(ValueError, match=says):
        DiceLoss(**arguments)


@pytest.mark.parametrize(
    ("loss", "arguments", "says"),
    [
        (TverskyLoss, dict(alpha=0, beta=0), "no error would count"),
        (TverskyLoss, dict(alpha=[0.3, 0.7]), r"alpha is \[0.3, 0.7\], but must be a number"),
        (TverskyLoss, dict(gamma=0), "gamma is 0"),
        (TverskyLoss, dict(gamma=2, transform="log"), "exclude each other"),
        (TverskyLoss, dict(squared_pred=True), "would make FP = P - I negative"),
        (losses.MatthewsLoss, dict(squared_pred=True), "would make FP = P - I and TN wrong"),
        (losses.MatthewsLoss, dict(transform="log"), "no value for a correlation below 0"),
        (DiceLoss, dict(average="weighted", class_weight=[1, 2]), "weights from the labels"),
        (losses.GeneralizedDiceFocalLoss, dict(lambda_dice=0, lambda_ce=0), "both 0"),
        (GeneralizedDiceLoss, dict(weight_type="cube"), "weight_type is 'cube'"),
        (GeneralizedDiceLoss, dict(infinite_weight="one"), "infinite_weight is 'one'"),
        (losses.DiceCELoss, dict(lambda_dice=0, lambda_ce=0), "both 0"),
        (losses.DiceCELoss, dict(average="none"), "but the cross-entropy has one"),
        (losses.DiceCELoss, dict(label_smoothing=1.5), "label_smoothing is 1.5"),
        (losses.DiceCELoss, dict(activation="none", regions=[(1,)]), "binary cross-entropy"),
        (losses.DiceFocalLoss, dict(focal_gamma=-1), "focal_gamma is -1"),
    ],
)
def test_wrong_arguments_of_the_family_are_errors_in_words(loss, arguments, says):
    with pytest.raises(ValueError, match=says):
        loss(**arguments)


def test_the_cross_entropy_of_probabilities_is_categorical():
    """For a sigmoid's probabilities it would miss the background, which is an error where it can
    be seen."""
    loss = losses.DiceCELoss(activation="none")
    x, y = make(1)
    with pytest.raises(ValueError, match='cross-entropy of activation="none" is categorical'):
        loss(y, tf.sigmoid(x))
    model, images, labels = model_and_data()
    ended = keras.Sequential([model, keras.layers.Activation("sigmoid")])
    ended.compile("adam", loss)
    with pytest.raises(ValueError, match="the output of a sigmoid, but the cross-entropy"):
        ended.fit(images, labels, verbose=0)
    ended.compile("adam", losses.DiceCELoss(activation="sigmoid"))
    with pytest.raises(ValueError, match="remove the model's last activation") as error:
        ended.fit(images, labels, verbose=0)
    assert 'pass activation="none"' not in str(error.value)


def test_class_weights_that_squares_would_spoil_are_refused():
    x, y = make()
    t = reference.one_hot(y, SHAPE[-1])
    loss = losses.DiceCELoss(squared_pred=True, ce_class_weight=[1, 2, 3])
    np.testing.assert_allclose(loss(t.astype(np.uint8), x), loss(y, x), rtol=1e-6)
    with pytest.raises(ValueError, match="which squared_pred=True squares"):
        loss(t.astype(np.float32), x)


def test_generalized_dice_shows_the_errors_of_a_large_volume():
    """Its sums are near 1 / T, so that the smoothing of the other losses would hide the errors."""
    y = np.zeros((1, 100, 100, 100), np.uint8)
    y[:, :50] = 1
    x = np.zeros((*y.shape, 2), np.float32)
    x[..., 1] = np.where(y == 1, -9, 9)  # All voxels are wrong.
    assert float(GeneralizedDiceLoss()(y, x)) > 0.999


def test_log_dice_of_a_class_that_is_absent_keeps_its_gradient():
    x = tf.zeros((1, 60, 60, 60, 2))
    y = np.zeros((1, 60, 60, 60), np.uint8)
    loss = DiceLoss(transform="log", average="none")
    value, gradient = value_and_gradient(lambda x: loss(y, x), x)
    assert np.isfinite(value) and (gradient.numpy()[..., 1] > 1e-7).all()


@pytest.mark.parametrize(
    ("arguments", "classes", "says"),
    [
        ({}, 1, 'y_pred has one class.*use activation="sigmoid"'),
        (dict(activation="sigmoid", include_background=False), 1, "leaves no class"),
        (dict(class_weight=[1, 2]), 3, "class_weight has 2 entries, but 3 classes count"),
        (dict(class_weight=[1, 2, 3], include_background=False), 3, "but 2 classes count"),
    ],
)
def test_arguments_that_do_not_fit_the_logits_are_errors(arguments, classes, says):
    x, y = make(classes)
    with pytest.raises(ValueError, match=says):
        DiceLoss(**arguments)(y, x)


@pytest.mark.parametrize("last", [[], [keras.layers.Activation("linear", dtype="float32")]])
@pytest.mark.parametrize("end", ["softmax", "sigmoid"])
def test_a_model_that_ends_in_an_activation_needs_a_loss_of_probabilities(end, last):
    model, images, labels = model_and_data()
    dtype = "mixed_float16" if last else None
    probabilities = keras.Sequential([model, keras.layers.Activation(end, dtype=dtype), *last])
    says = "y_pred are probabilities.*remove the model's last activation.*activation=.none."
    for compiled in (True, False) if not last else (True,):
        probabilities.compile("adam", loss=DiceLoss(activation=end), run_eagerly=not compiled)
        with pytest.raises(ValueError, match=says):
            probabilities.fit(images, labels, verbose=0)
        probabilities.compile("adam", loss=DiceLoss(activation="none"), run_eagerly=not compiled)
        expected = DiceLoss(activation=end)(labels, model.predict(images, verbose=0))
        value = probabilities.evaluate(images, labels, verbose=0)
        np.testing.assert_allclose(value, expected, rtol=1e-3 if last else 1e-5)


def test_unknown_shapes_are_checked_when_they_are_known():
    """Checks that need the number of classes are made when it is known, which is while running."""
    x, y = make()

    def compiled(loss):
        signature = [tf.TensorSpec(None, tf.float32), tf.TensorSpec(None, tf.uint8)]
        return tf.function(lambda x, y: loss(y, x), input_signature=signature)

    for loss in (DiceLoss(), DiceLoss(class_weight=[1, 2, 3])):
        np.testing.assert_allclose(compiled(loss)(x, y), loss(y, x), rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        compiled(DiceLoss(class_weight=[1]))(x, y)


def test_a_weight_of_another_shape_is_an_error():
    x, y = make()
    with pytest.raises(ValueError, match=r"sample_weight has shape \(4,\), but y_pred \(3, 6"):
        DiceLoss()(y, x, np.ones(4, np.float32))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"sample_weight\) has shape \[3, 6\]"):
        DiceLoss()(y, x, np.ones((3, 6), np.float32))


def test_wrong_labels_in_fit_are_named():
    model, images, labels = model_and_data()
    model.compile(optimizer="adam", loss=DiceLoss())
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"voxel \[0, .*have the value 7"):
        model.fit(images, np.where(labels == 2, 7, labels), verbose=0)
    with pytest.raises(Exception, match=r"labels \(y_true\) have shape \[.*6, 6\]"):
        model.fit(images, labels[:, 0], verbose=0)
