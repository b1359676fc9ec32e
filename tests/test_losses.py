"""The Keras losses: values and gradients, and everything Keras does with a loss."""

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import dice_op
from dice_op.losses import DiceLoss

SHAPE = (3, 6, 5, 4, 3)  # [N, D, H, W, C]


def make(classes=3, dtype="float32", seed=0):
    """Logits and uint8 labels; a random volume with its last class absent from the last sample."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(*SHAPE[:-1], classes))
    y = rng.integers(0, max(classes, 2), size=SHAPE[:-1]).astype(np.uint8)
    y[-1][y[-1] == max(classes, 2) - 1] = 0
    return x.astype(dtype), y


def flat(a):
    return a.reshape(a.shape[0], -1, a.shape[-1])


def per_class(i, p, t, nr=1e-5, dr=1e-5):
    return 1 - (2 * i + nr) / (p + t + dr)


def jaccard(i, p, t, nr=1e-5, dr=1e-5):
    return 1 - (2 * i + nr) / (2 * (p + t - i) + dr)


def over_classes(*sums):
    return [s.sum(1, keepdims=True) for s in sums]


def over_batch(*sums):
    return [s.sum(0, keepdims=True) for s in sums]


W = np.array([0.1, 2.0, 5.0])
# What people write in NumPy, next to the arguments that ask for it. I, P, T: [N, C].
FORMS = {
    "multi-class": ({}, lambda *s: per_class(*s).mean()),
    "class-weighted": (
        dict(class_weight=list(W)),
        lambda *s: (W * per_class(*s)).sum(1).mean(),
    ),
    "binary, jointly": (
        dict(activation="sigmoid", average="micro"),
        lambda *s: per_class(*over_classes(*s)).mean(),
    ),
    "binary, one tensor": (
        dict(activation="sigmoid", average="micro", batch=True),
        lambda *s: per_class(*over_batch(*over_classes(*s))).mean(),
    ),
    "no background": (
        dict(include_background=False),
        lambda *s: per_class(*s)[:, 1:].mean(),
    ),
    "no background, weighted": (
        dict(include_background=False, class_weight=[1, 3]),
        lambda *s: (np.array([1, 3]) * per_class(*s)[:, 1:]).sum(1).mean(),
    ),
    "weighted sums": (
        dict(average="micro", class_weight=list(W)),
        lambda *s: per_class(*over_classes(*(W * v for v in s))).mean(),
    ),
    "squared": (dict(squared_pred=True), lambda *s: per_class(*s).mean()),
    "jaccard": (dict(jaccard=True), lambda *s: jaccard(*s).mean()),
    "batch": (dict(batch=True), lambda *s: per_class(*over_batch(*s)).mean()),
    "smoothing": (
        dict(smooth_nr=1.0, smooth_dr=3.0),
        lambda *s: per_class(*s, nr=1.0, dr=3.0).mean(),
    ),
    "probabilities": (dict(activation="none"), lambda *s: per_class(*s).mean()),
}


@pytest.mark.parametrize("labels", ["indices", "indices with a channel", "float", "one-hot"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, data_format, labels):
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
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(y, x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(tape.gradient(value, x), gradient)

    @tf.function(input_signature=[tf.TensorSpec([None] * 5, x.dtype)])
    def compiled(x):
        return loss(y, x)

    np.testing.assert_allclose(compiled(x), value, rtol=1e-6)


def test_ignore_label():
    x, y = make()
    y[np.random.default_rng(1).random(y.shape) < 0.4] = 255
    t = reference.one_hot(y, 3)
    counts = (y != 255).astype(float).reshape(3, -1)
    expected, gradient = reference.loss_and_gradient(
        flat(x), flat(t), lambda *s: per_class(*s).mean(), counts, activation="softmax"
    )
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = DiceLoss(ignore_label=255)(y, x)
    assert abs(float(value) - expected) <= 1e-6
    reference.assert_gradient(tape.gradient(value, x), gradient.reshape(x.shape))


def test_equals_keras_dice():
    x, y = make()
    p = tf.nn.softmax(x)
    t = reference.one_hot(y, 3).astype(np.float32)
    theirs = keras.losses.Dice()(t, p)
    ours = DiceLoss(activation="none", average="micro", batch=True, smooth_nr=0, smooth_dr=1e-7)
    assert abs(float(ours(y, p)) - float(theirs)) <= 1e-6


def test_sample_weight():
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
        lambda *s: per_class(*s).mean(),
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
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x, given)
        assert abs(float(value) - expected) <= 1e-6
        reference.assert_gradient(tape.gradient(value, x), gradient.reshape(x.shape))


def test_sample_weight_with_batch():
    """Weights per sample enter the batch's sums: as if each voxel had its sample's weight."""
    x, y = make()
    weight = np.float32([1, 0, 4])
    expected, gradient = reference.loss_and_gradient(
        flat(x),
        flat(reference.one_hot(y, 3)),
        lambda *s: per_class(*over_batch(*s)).mean(),
        np.repeat(weight[:, None], y[0].size, axis=1),
        activation="softmax",
    )
    x = tf.constant(x)
    for given in (weight, weight[:, None]):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = DiceLoss(batch=True)(y, x, given)
        assert abs(float(value) - expected) <= 1e-6
        reference.assert_gradient(tape.gradient(value, x), gradient.reshape(x.shape))


@pytest.fixture
def seen(monkeypatch):
    """The dtypes that reach the op."""
    dtypes = set()
    original = dice_op.losses.dice_sums

    def spy(y_true, y_pred, **options):
        dtypes.add((y_true.dtype.name, y_pred.dtype.name))
        return original(y_true, y_pred, **options)

    monkeypatch.setattr(dice_op.losses, "dice_sums", spy)
    return dtypes


def model_and_data(dtype=None, classes=3):
    """A network of two layers, and volumes whose label is a function of the intensity."""
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


def test_compile_fit_evaluate(seen):
    model, images, labels = model_and_data()
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss=DiceLoss())
    before = model.evaluate(images, labels, verbose=0)
    history = model.fit(images, labels, batch_size=3, epochs=30, verbose=0)
    after = model.evaluate(images, labels, verbose=0)
    assert after < 0.5 * before
    assert history.history["loss"][-1] < history.history["loss"][0]
    # 8 samples in batches of 3: the mean over samples, not over batches
    each = DiceLoss(reduction="none")(labels, model.predict(images, verbose=0)).numpy()
    np.testing.assert_allclose(after, each.mean(), rtol=1e-5)
    assert seen == {("uint8", "float32")}


def test_fit_with_datasets_and_weights(seen):
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
def test_mixed_precision_with_loss_scaling(policy, seen):
    model, images, labels = model_and_data(policy)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05))
    model.compile(optimizer=optimizer, loss=DiceLoss())
    history = model.fit(images, labels, batch_size=4, epochs=30, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < 0.5 * history[0]
    assert float(optimizer.dynamic_scale) > 1
    assert seen == {("uint8", policy[6:])}


def test_two_replicas_train_as_one_device(run_python):
    """Same batch, same weights after it: each replica's share of the loss is scaled by Keras. Under
    a strategy Keras also builds the loss once with float labels, whatever the data."""
    weights = run_python(
        """
        import numpy as np, tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, halves)
        import keras
        import dice_op
        rng = np.random.default_rng(0)
        x = rng.normal(size=(4, 6, 6, 6, 1)).astype("float32")
        y = rng.integers(0, 3, size=(4, 6, 6, 6)).astype("uint8")
        for strategy in (
            tf.distribute.get_strategy(),
            tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
        ):
            with strategy.scope():
                keras.utils.set_random_seed(1)
                model = keras.Sequential([keras.Input((6, 6, 6, 1)), keras.layers.Conv3D(3, 3)])
                model.add(keras.layers.ZeroPadding3D(1))
                model.compile(keras.optimizers.SGD(10.0), loss=dice_op.losses.DiceLoss())
            model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
            print(*np.concatenate([w.ravel() for w in model.get_weights()]))
        """
    )
    one, two = (np.array(line.split(), np.float64) for line in weights.strip().splitlines())
    assert np.abs(one[-3:]).min() > 1e-3  # the biases, which start at zero
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_several_outputs_and_losses():
    model, images, labels = model_and_data()
    two = keras.Model(model.inputs, {"a": model.outputs[0], "b": -model.outputs[0]})
    loss = {"a": DiceLoss(), "b": DiceLoss(include_background=False)}
    two.compile(optimizer="adam", loss=loss, loss_weights={"a": 1.0, "b": 0.5})
    total = two.evaluate(images, {"a": labels, "b": labels}, verbose=0)
    x = model.predict(images, verbose=0)
    expected = float(loss["a"](labels, x)) + 0.5 * float(loss["b"](labels, -x))
    np.testing.assert_allclose(np.ravel(total)[0], expected, rtol=1e-5)


def test_config():
    loss = DiceLoss(
        activation="sigmoid",
        include_background=False,
        class_weight=np.array([1, 2], np.float32),
        squared_pred=True,
        jaccard=True,
        smooth_nr=0,
        smooth_dr=1e-3,
        average="micro",
        batch=True,
        ignore_label=np.uint8(255),
        data_format="channels_first",
        reduction="sum",
        name="mine",
        dtype="float64",
    )
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is DiceLoss
    assert (
        again.get_config()
        == loss.get_config()
        == DiceLoss.from_config(loss.get_config()).get_config()
    )
    signature = set(DiceLoss.__init__.__kwdefaults__)
    assert set(loss.get_config()) == signature
    assert again.class_weight == [1, 2] and again.ignore_label == 255 and again.name == "mine"
    assert again.dtype == "float64"


def test_saved_keras_model_in_another_process(tmp_path, run_python):
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


def test_saved_model_in_another_process(tmp_path, run_python):
    """A training step as a SavedModel: loss and gradient, of any batch size."""
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
        (dict(average="weighted"), "average is 'weighted'.*'macro', 'micro'"),
        (dict(smooth_nr=-1), "smooth_nr is -1.*at least 0"),
        (dict(smooth_dr=float("nan")), "smooth_dr is nan"),
        (dict(class_weight=[1, -2, 1]), "class_weight is .*at least 0"),
        (dict(class_weight=[0, 0]), "class_weight is .*not all 0"),
        (dict(class_weight=[]), "class_weight is .*one finite weight per class"),
        (dict(class_weight={0: 1, 1: 2}), "class_weight is {0: 1, 1: 2}.*a list of one weight"),
        (dict(class_weight="12"), "class_weight is '12'.*a list of one weight"),
        (dict(class_weight=2.0), "class_weight is 2.0.*a list of one weight"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        DiceLoss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "classes", "says"),
    [
        ({}, 1, 'y_pred has one class.*use activation="sigmoid"'),
        (dict(activation="sigmoid", include_background=False), 1, "leaves no class"),
        (dict(class_weight=[1, 2]), 3, "class_weight has 2 entries, but 3 classes count"),
        (dict(class_weight=[1, 2, 3], include_background=False), 3, "but 2 classes count"),
    ],
)
def test_arguments_that_do_not_fit_the_logits(arguments, classes, says):
    x, y = make(classes)
    with pytest.raises(ValueError, match=says):
        DiceLoss(**arguments)(y, x)


@pytest.mark.parametrize("last", [[], [keras.layers.Activation("linear", dtype="float32")]])
@pytest.mark.parametrize("end", ["softmax", "sigmoid"])
def test_a_model_that_ends_in_an_activation(end, last):
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


def test_unknown_shapes():
    """Checks that need the number of classes happen when it is known: when running."""
    x, y = make()

    def compiled(loss):
        signature = [tf.TensorSpec(None, tf.float32), tf.TensorSpec(None, tf.uint8)]
        return tf.function(lambda x, y: loss(y, x), input_signature=signature)

    for loss in (DiceLoss(), DiceLoss(class_weight=[1, 2, 3])):
        np.testing.assert_allclose(compiled(loss)(x, y), loss(y, x), rtol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        compiled(DiceLoss(class_weight=[1]))(x, y)


def test_wrong_sample_weight():
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
