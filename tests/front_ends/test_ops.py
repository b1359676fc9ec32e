"""The TensorFlow ops: gradients to second order, half types, memory, graphs, errors, exact
numbers."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

import dice_op.ops  # TensorFlow knows the ops from here on.
from dice_op import composite, core
from helpers import reference
from helpers.kernel_inputs import FORMATS, distances_of, read_label_sets
from helpers.tape import value_and_gradient

ACTIVATIONS = ("softmax", "sigmoid", "none")
LABELS = ("index uint8", "index int64", "index float", "one-hot bool", "one-hot float", "soft")


def make(labels, activation, data_format, dtype, spatial=(3, 2), batch=2, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, *spatial, classes)
    x = rng.normal(size=shape)
    if activation == "none":
        x = 1 / (1 + np.exp(-x))
    index = rng.integers(0, max(2, classes), size=shape[:-1])
    kind, _, name = labels.partition(" ")
    y = {
        "index": index,
        "one-hot": reference.one_hot(index, classes),
        "soft": rng.random(size=shape),
    }[kind].astype({"": dtype, "float": dtype}.get(name, name))
    if data_format == "channels_first":
        x = np.moveaxis(x, -1, 1)
        y = np.moveaxis(y, -1, 1) if kind != "index" else y
    return tf.constant(x, dtype), tf.constant(y)


def volume(shape, seed=0):
    """Logits `[N, spatial..., 3]` and class indices."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*shape, 3)).astype(np.float32)
    return x, rng.integers(0, 3, shape).astype(np.uint8)


def weighted_total(sums, seed=5):
    """A scalar that depends on every sum, on each with another coefficient."""
    rng = np.random.default_rng(seed)
    parts = [s for s in sums if s is not None]
    return tf.add_n(
        [tf.reduce_sum(tf.constant(rng.normal(size=p.shape), p.dtype) * p) for p in parts]
    )


def assert_jacobians(function, arguments, tolerance):
    """tf.test.compute_gradient's symbolic and numeric derivatives agree, relative to the largest
    entry."""
    delta = 1e-5 if arguments[0].dtype == tf.float64 else 1 / 1024
    symbolic, numeric = tf.test.compute_gradient(function, arguments, delta)
    for s, n in zip(symbolic, numeric, strict=True):
        scale = np.abs(n).max()
        assert scale > 0
        assert np.abs(s - n).max() <= tolerance * scale


def default_of(attribute):
    """The default of an op's attribute, or None where the caller has to choose."""
    value = attribute.default_value
    kind = value.WhichOneof("value")
    if kind == "list":
        return [*value.list.i, *value.list.f]
    return kind and (value.s.decode() if kind == "s" else getattr(value, kind))


@pytest.mark.parametrize("name", ["DiceSums", "DiceSumsGrad"])
def test_the_ops_have_the_options_and_the_sums_of_the_kernels(name):
    op = op_def_registry.get(name)
    defaults = {a.name: default_of(a) for a in op.attr if not a.name.startswith("T")}
    options = {k: list(v) if np.ndim(v) else v for k, v in core.op_attributes().items()}
    assert defaults.pop("remainders") == []  # What the numbers among the options lack as floats.
    assert defaults.pop("activation") is None and options.pop("activation") == "softmax"
    assert defaults == options

    everything = {"activation": "sigmoid", "cross_entropy": True, "label_sets": {5: (0, 1)}}
    x, y = np.zeros((1, 1, 2), np.float32), [[0]]
    sums = list(core.sums(x, y, **everything))
    *_, distance_sum, last = core.sums(x, y, dist_matrix=[[0, 1], [1, 0]])  # not with label_sets
    sums = [*sums[:-1], distance_sum, last]
    assert list(dice_op.DiceSums._fields) == sums
    if name == "DiceSums":
        assert [o.name for o in op.output_arg] == sums
    else:
        with_gradient = [s for s in sums if s not in ("label_sum", "unknown_sum", "weight_sum")]
        assert [i.name for i in op.input_arg][3:] == [f"d_{s}" for s in with_gradient]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_order_gradients_agree_with_numeric_ones(
    activation, labels, data_format, dtype
):
    """All sums are tested at once. The tolerance is the error of the numeric derivative."""
    x, y = make(labels, activation, data_format, dtype)
    tolerance = 5e-3 if dtype == "float32" else 1e-6

    def total(x):
        sums = dice_op.dice_sums(
            y,
            x,
            activation=activation,
            data_format=data_format,
            squared_pred=True,
            cross_entropy=True,
            focal_gamma=2.0,
        )
        return weighted_total(sums)

    assert_jacobians(total, [x], tolerance)
    assert_jacobians(lambda x: value_and_gradient(total, x)[1], [x], tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_soft_labels_agree_with_numeric_ones(activation, dtype):
    x, t = make("soft", activation, "channels_last", dtype)

    def total(x, t):
        options = {"activation": activation, "soft_label": True, "cross_entropy": True}
        return weighted_total(dice_op.dice_sums(t, x, **options))

    tolerance = 5e-3 if dtype == "float32" else 1e-6
    assert_jacobians(total, [x, t], tolerance)
    assert_jacobians(lambda x: value_and_gradient(lambda x: total(x, t), x)[1], [x], tolerance)


SETS = {5: (0, 2), 6: (0, 1, 2), 7: (1,)}


def labelled_by_sets(activation, data_format, dtype, shape=(2, 3, 2)):
    """Logits, labels of which each names a class or a set of them, and what the labels say."""
    x, _ = make("index uint8", activation, data_format, dtype, shape[1:], shape[0])
    labels = np.random.default_rng(3).choice([0, 1, 2, *SETS], shape).astype(np.uint8)
    return x, labels, *read_label_sets(SETS, labels, 3)


@pytest.mark.parametrize(
    ("dtype", "data_format"), [("float32", "channels_first"), ("float64", "channels_last")]
)
@pytest.mark.parametrize("focal_gamma", [0.0, [0, 1.5, 2]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_label_sets_agree_with_numeric_ones(
    activation, focal_gamma, dtype, data_format
):
    """To second order, and with respect to the weights of the voxels."""
    tolerance = 5e-3 if dtype == "float32" else 1e-6
    weight = tf.constant(np.random.default_rng(1).random((2, 3, 2)) + 0.5, dtype)
    x, y, *_ = labelled_by_sets(activation, data_format, dtype)

    def total(x, weight):
        sums = dice_op.dice_sums(
            y,
            x,
            activation=activation,
            data_format=data_format,
            voxel_weight=weight,
            label_sets=SETS,
            cross_entropy=True,
            focal_gamma=focal_gamma,
            label_smoothing=0.25,
        )
        return weighted_total(sums)

    def gradient(x):
        return value_and_gradient(lambda x: total(x, weight), x)[1]

    assert_jacobians(total, [x, weight], tolerance)
    assert_jacobians(gradient, [x], tolerance)


DISTANCES = [[0, 1, 0.75], [1, 0, 0.5], [0.25, 0.5, 0]]


@pytest.mark.parametrize(
    ("dtype", "data_format"), [("float32", "channels_first"), ("float64", "channels_last")]
)
@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_gradients_of_distances_agree_with_numeric_ones(activation, dtype, data_format):
    """To second order, and with respect to the weights of the voxels."""
    tolerance = 5e-3 if dtype == "float32" else 1e-6
    x, y = make("index uint8", activation, data_format, dtype)
    weight = tf.constant(np.random.default_rng(1).random(y.shape) + 0.5, dtype)

    def total(x, weight):
        options = {"activation": activation, "data_format": data_format}
        return weighted_total(
            dice_op.dice_sums(y, x, voxel_weight=weight, dist_matrix=DISTANCES, **options)
        )

    def gradient(x):
        return value_and_gradient(lambda x: total(x, weight) ** 2, x)[1]

    assert_jacobians(total, [x, weight], tolerance)
    assert_jacobians(gradient, [x], tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_sums_and_gradients_of_distances_agree_with_float64(activation, dtype):
    """The tolerance of a half gradient is its rounding: half of the step from 1 to the next
    number."""
    x, y = make("index int64", activation, "channels_last", dtype, (40, 25))
    coefficients = np.random.default_rng(0).normal(size=(5, 2, 3))
    coefficients[2:4] = 0
    options = {"activation": activation, "dist_matrix": DISTANCES}

    def total(x):
        sums = dice_op.dice_sums(y, x, **options)
        parts = zip((sums.intersection, sums.pred_sum, sums.distance_sum), (0, 1, 4), strict=True)
        return tf.add_n([tf.reduce_sum(p * tf.cast(coefficients[i], p.dtype)) for p, i in parts])

    x64 = reference.flat(tf.cast(x, tf.float64).numpy())
    t = reference.flat(reference.one_hot(y, 3))
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2e-6, "float64": 1e-13}[dtype]
    sums = dice_op.dice_sums(y, x, **options)
    wanted = reference.sums(x64, t, **options)["distance_sum"]
    assert reference.relative_error(sums.distance_sum, wanted) <= min(rounding, 2e-6)
    found = value_and_gradient(total, x)[1]
    assert found.dtype == dtype
    wanted = reference.gradient(x64, t, coefficients, **options)
    found = reference.flat(tf.cast(found, tf.float64).numpy())
    assert reference.gradient_error(found, wanted) <= rounding


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("focal_gamma", [0.0, 0.5, 1.0, [0, 1.5, 2]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_order_gradients_are_finite_where_a_prediction_is_sure(
    activation, focal_gamma, dtype
):
    """Its p is 1, and 1 - p is 0, of which negative powers are infinite. Voxels do not interact, so
    that the other ones have the derivatives that they have alone."""
    x, y, *_ = labelled_by_sets(activation, "channels_last", dtype)
    sure = np.eye(3)[[[0, 1]] * 2] * (1 if activation == "none" else 100)
    x = tf.concat([x[:, 0], sure.astype(dtype), -sure.astype(dtype)], 1)
    y = np.concatenate([y[:, 0], [[0, 2], [5, 6]], [[1, 7], [6, 5]]], 1)
    if activation == "none":
        x = tf.abs(x)

    def second(x, y):
        def total(x):
            options = {"label_sets": SETS, "cross_entropy": True, "focal_gamma": focal_gamma}
            return weighted_total(dice_op.dice_sums(y, x, activation=activation, **options))

        def square(x):
            return tf.reduce_sum(value_and_gradient(total, x)[1] ** 2)

        return value_and_gradient(square, x)[1].numpy()

    found = second(x, y)
    assert np.isfinite(found).all()
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    reference.assert_gradient(found[:, :2], second(x[:, :2], y[:, :2]), tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("focal_gamma", [0.0, [0, 1.5, 2]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_and_gradients_of_label_sets_agree_with_float64(activation, focal_gamma, dtype):
    """The tolerance of a half gradient is its rounding: half of the step from 1 to the next
    number."""
    x, y, t, unknown = labelled_by_sets(activation, "channels_last", dtype, (2, 40, 25))
    options = {"activation": activation, "label_sets": SETS, "focal_gamma": focal_gamma}
    coefficients = np.random.default_rng(0).normal(size=(4, 2, 3))

    def total(x):
        sums = dice_op.dice_sums(y, x, cross_entropy=True, **options)
        parts = [sums.intersection, sums.pred_sum, sums.cross_entropy, sums.negative_cross_entropy]
        given = zip(parts, coefficients, strict=True)
        return tf.add_n([tf.reduce_sum(p * tf.cast(c, p.dtype)) for p, c in given if p is not None])

    given = {"activation": activation, "gamma": focal_gamma, "unknown": reference.flat(unknown)}
    x64, t = (reference.flat(tf.cast(v, tf.float64).numpy()) for v in (x, t))
    sums = dice_op.dice_sums(y, x, cross_entropy=True, **options)._asdict()
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2e-6, "float64": 1e-13}[dtype]
    for name, wanted in reference.sums(x64, t, **given).items():
        assert reference.relative_error(sums[name], wanted) <= min(rounding, 2e-6), name
    found = value_and_gradient(total, x)[1]
    assert found.dtype == dtype
    wanted = reference.gradient(x64, t, coefficients, **given)
    found = reference.flat(tf.cast(found, tf.float64).numpy())
    assert reference.gradient_error(found, wanted) <= rounding


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("data_format", FORMATS)
def test_gradients_of_dense_labels_and_weights_agree_with_numeric_ones(activation, data_format):
    x, t = make("soft", activation, data_format, "float64")
    weight = tf.constant(np.random.default_rng(1).random((2, 3, 2)) + 0.5)

    def total(t, weight):
        return weighted_total(
            dice_op.dice_sums(
                t,
                x,
                activation=activation,
                data_format=data_format,
                voxel_weight=weight,
                squared_pred=True,
                cross_entropy=True,
            )
        )

    assert_jacobians(total, [t, weight], 1e-6)


def test_weights_have_a_gradient_where_the_channels_of_one_hot_labels_are_unknown():
    x, y = volume((2, 4, 4))

    @tf.function(input_signature=[tf.TensorSpec([None] * 4), tf.TensorSpec([None] * 3)])
    def gradient(labels, weight):
        def total(weight):
            sums = dice_op.dice_sums(
                labels, tf.constant(x), activation="softmax", voxel_weight=weight
            )
            return tf.reduce_sum(sums.intersection)

        return value_and_gradient(total, weight)[1]

    p = reference.softmax(x.astype(np.float64))
    found = gradient(np.eye(3, dtype=np.float32)[y], tf.ones([2, 4, 4]))
    wanted = np.take_along_axis(p, y[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_composite_computes_what_the_kernels_compute(classes, labels, activation):
    """composite.py computes the rare derivatives, so that it must be the same function as the
    kernels."""
    same = {"with_cross_entropy": True, "focal_gamma": 0.0, "label_smoothing": 0.0}
    same |= {"squared_pred": False, "soft_label": False, "ignore_label": []}
    tables = ("regions", "label_sets", "focal_gammas", "dist_matrix")

    def assert_same(x, y, data_format, **changes):
        attributes = {**same, "activation": activation, "data_format": data_format, **changes}
        arguments = {**attributes, "cross_entropy": attributes["with_cross_entropy"]}
        del arguments["with_cross_entropy"]
        arguments["ignore_label"] = next(iter(attributes["ignore_label"]), None)
        if "focal_gammas" in arguments:
            arguments["focal_gamma"] = arguments.pop("focal_gammas")
        fused = dice_op.dice_sums(y, x, **arguments)
        given = core.op_attributes(**{k: attributes.get(k) for k in tables})
        attributes |= {k: given[k].tolist() for k in tables}
        for a, b in zip(fused, composite.sums(x, y, [], **attributes), strict=True):
            if a is not None:
                assert reference.relative_error(a, b) <= 1e-12

    for data_format in FORMATS:
        x, y = make(labels, activation, data_format, "float64", classes=classes)
        for gamma, smoothing in ((0.0, 0.0), (0.5, 0.25), (2.0, 0.0)):
            assert_same(x, y, data_format, focal_gamma=gamma, label_smoothing=smoothing)
        assert_same(x, y, data_format, soft_label=True)
        if labels.startswith("index") and activation != "softmax":
            regions = [(0, 1), (1,), (1, 2), (3, 1)][:classes]
            assert_same(x, y, data_format, regions=regions)
        gammas = [0, 0.5, 2, 1][:classes]
        assert_same(x, y, data_format, focal_gammas=gammas, label_smoothing=0.25)
        if labels.startswith("index") and classes > 1:
            sets = {1: (0, classes - 1), 2: range(classes), 200: (0, 1)}
            assert_same(x, y, data_format, label_sets=sets)
            both = {"label_sets": sets, "focal_gammas": gammas}
            assert_same(x, y, data_format, **both, label_smoothing=0.25, squared_pred=True)
            assert_same(x, y, data_format, **both, soft_label=True, with_cross_entropy=False)
            assert_same(x, y, data_format, label_sets={0: (0, 1)}, ignore_label=[1])
            if activation != "sigmoid":
                distances = {"dist_matrix": distances_of(classes)}
                assert_same(x, y, data_format, **distances)
                assert_same(x, y, data_format, **distances, ignore_label=[1], squared_pred=True)
    if labels.startswith("index") and classes > 1:
        assert_same(x, y, data_format, ignore_label=[1], with_cross_entropy=False)


def test_forward_mode_persistent_tapes_and_jacobians_work():
    x, y = make("index uint8", "softmax", "channels_last", "float64")

    def pred_sum(x):
        return dice_op.dice_sums(y, x, activation="softmax").pred_sum

    tangent = tf.constant(np.random.default_rng(2).normal(size=x.shape))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        sums = pred_sum(x)
    jacobian = tape.jacobian(sums, x, experimental_use_pfor=False)
    assert tape.gradient(sums, x) is not None and tape.gradient(sums, x) is not None
    with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
        sums = pred_sum(x)
    expected = tf.tensordot(jacobian, tangent, [[2, 3, 4, 5], [0, 1, 2, 3]])
    assert reference.relative_error(accumulator.jvp(sums), expected) <= 1e-12


def textbook_loss(x, y, dtype):
    """The loss as people write it, in the logits' own type."""
    p = tf.nn.softmax(x)
    t = tf.one_hot(y, x.shape[-1], dtype=dtype)
    axes = list(range(1, x.shape.rank - 1))
    i, p, t = (tf.reduce_sum(v, axes) for v in (p * t, p, t))
    return tf.reduce_mean(1 - (2 * i + 1e-5) / (p + t + 1e-5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loss_and_gradient_are_as_exact_as_their_type_allows(dtype):
    """In float32 the errors are at most 1e-6 and 1e-5. In half types they are at most twice the
    error that TensorFlow's own operations make in the same type, which bounds the rounding of the
    logits' gradient and of the sums."""
    rng = np.random.default_rng(0)
    x = tf.constant(2 * rng.normal(size=(2, 12, 12, 12, 4)), dtype)
    y = tf.constant(rng.integers(0, 4, size=(2, 12, 12, 12)), tf.uint8)
    x64 = reference.flat(tf.cast(x, tf.float64).numpy())
    t64 = reference.flat(reference.one_hot(y, 4))
    loss, gradient = reference.loss_and_gradient(
        x64, t64, reference.mean_dice, activation="softmax"
    )
    gradient = gradient.reshape(x.shape)

    ours, our_gradient = value_and_gradient(lambda x: dice_op.losses.DiceLoss()(y, x), x)
    if dtype == "float32":
        assert abs(ours.numpy() - loss) <= 1e-6
        reference.assert_gradient(our_gradient, gradient)
        return
    theirs, their_gradient = value_and_gradient(lambda x: textbook_loss(x, y, dtype), x)
    assert our_gradient.dtype == dtype
    assert abs(float(ours) - loss) <= 2 * abs(float(theirs) - loss)
    assert reference.gradient_error(tf.cast(our_gradient, tf.float64), gradient) <= (
        2 * reference.gradient_error(tf.cast(their_gradient, tf.float64), gradient)
    )


def test_half_logits_work_where_sums_pass_65504():
    """Over 160^3 voxels a sum in half would be infinite. The loss scale is Keras' initial one."""
    rng = np.random.default_rng(0)
    shape = (1, 160, 160, 160)
    y = rng.integers(0, 2, size=shape).astype(np.uint8)
    x = rng.normal(size=(*shape, 2)).astype(np.float16)
    x[..., 1] += 2 * y
    scale = 2.0**15
    loss = dice_op.losses.DiceLoss()
    value, gradient = value_and_gradient(lambda x: loss(y, x) * scale, tf.constant(x))
    expected, wanted = reference.loss_and_gradient(
        reference.flat(x),
        reference.flat(reference.one_hot(y, 2)),
        reference.mean_dice,
        activation="softmax",
    )
    assert abs(float(value) / scale - expected) <= 1e-3 * expected
    gradient = reference.flat(gradient.numpy().astype(np.float64)) / scale
    assert np.isfinite(gradient).all()
    assert reference.gradient_error(gradient, wanted) <= 1e-3
    # The textbook's loss fails here, which shows what this test is about.
    assert not np.isfinite(float(textbook_loss(tf.constant(x), y, "float16"))) or (
        abs(float(textbook_loss(tf.constant(x), y, "float16")) - expected) > 0.1
    )


def test_a_lesion_of_one_voxel_in_ten_million_has_the_right_gradient():
    """The gradient at the lesion is not lost among that of all other voxels."""
    shape = (1, 216, 216, 216)
    y = np.zeros(shape, np.uint8)
    y[0, 100, 50, 7] = 1
    x = np.zeros((*shape, 2), np.float32)
    x[..., 0] = 8.0
    loss = dice_op.losses.DiceLoss(include_background=False)
    value, gradient = value_and_gradient(lambda x: loss(y, x), tf.constant(x))
    p = 1 / (1 + np.exp(8.0))
    total = p * y.size + 1
    dice = (2 * p + 1e-5) / (total + 1e-5)
    assert abs(float(value) - (1 - dice)) <= 1e-6
    expected = -(2 - dice) / (total + 1e-5) * p * (1 - p)
    np.testing.assert_allclose(gradient[0, 100, 50, 7, 1].numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        gradient[0, 0, 0, 0, 1].numpy(), dice / (total + 1e-5) * p * (1 - p), rtol=1e-4
    )


def test_empty_masks_give_finite_losses_and_gradients():
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 6, 1)) - 30, tf.float32)
    empty = tf.zeros((2, 6, 6), tf.uint8)
    for smooth in (0.0, 1e-5):
        loss = dice_op.losses.DiceLoss(activation="sigmoid", smooth_nr=smooth, smooth_dr=smooth)
        value, gradient = value_and_gradient(lambda x, loss=loss: loss(empty, x), x)
        assert np.isfinite(float(value)) and np.isfinite(gradient).all()
    assert float(value) < 1e-5  # There is nothing to find, and nothing is found.
    exactly = dice_op.losses.DiceLoss(activation="none", smooth_nr=0, smooth_dr=0)
    value, gradient = value_and_gradient(lambda x: exactly(empty, x), tf.zeros((2, 6, 6, 1)))
    assert float(value) == 0 and not gradient.numpy().any()


def test_a_batch_of_no_samples_has_loss_0():
    x = tf.zeros((0, 4, 4, 4, 3))
    y = tf.zeros((0, 4, 4, 4), tf.uint8)
    value, gradient = value_and_gradient(
        lambda x: dice_op.losses.DiceLoss(reduction="sum")(y, x), x
    )
    assert gradient.shape == x.shape
    assert tf.reduce_sum(value) == 0


def test_the_bits_are_the_same_at_any_number_of_threads(run_python):
    """The threads are those of TensorFlow's pool; each number of threads has a process of its
    own."""
    code = """
        import hashlib, sys
        import numpy as np, tensorflow as tf
        tf.config.threading.set_intra_op_parallelism_threads({threads})
        import dice_op
        rng = np.random.default_rng(0)
        digest = hashlib.sha256()
        for shape in ((2, 48, 48, 48, 4), (1, 40, 40, 40, 14)):
            x = tf.constant(rng.normal(size=shape), tf.float32)
            y = tf.constant(rng.integers(0, shape[-1], size=shape[:-1]), tf.uint8)
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = dice_op.losses.DiceLoss()(y, x)
            digest.update(value.numpy().tobytes() + tape.gradient(value, x).numpy().tobytes())
        print(digest.hexdigest())
    """
    digests = {run_python(code.format(threads=threads)) for threads in (1, 2, 3, 8)}
    assert len(digests) == 1


MEMORY = """
    import numpy as np, tensorflow as tf
    import dice_op

    def status(key):
        for line in open("/proc/self/status"):
            if line.startswith(key):
                return int(line.split()[1]) * 1024

    loss = dice_op.losses.DiceLoss()

    @tf.function
    def given(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x)
        return tape.gradient(value, x)

    @tf.function
    def made_inside(x, y):
        return tf.reduce_max(given(tf.negative(x), y))

    def measure(function, side):
        x = tf.constant(np.ones((1, side, side, side, 4), np.float32))
        y = tf.constant(np.ones((1, side, side, side), np.uint8))
        before = status("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")
        result = function(x, y)
        return (status("VmHWM") - before) / (side**3 * 16)

    for side in (40, 64):  # traces, starts the threads
        measure({function}, side)
    # TensorFlow's pool reserves a power of two, and 1/32 of it for its own table: 128 MB just fit
    print(measure({function}, 200))
"""


@pytest.mark.parametrize("function", ["given", "made_inside"])
def test_the_gradient_is_the_only_extra_memory(function, run_python):
    """Beyond logits and labels, the gradient takes memory and nothing else does. Where the logits
    are made inside the function and nobody else holds them, the gradient takes their memory: logits
    and gradient together need one buffer."""
    try:
        open("/proc/self/clear_refs", "w").write("5")
    except OSError:
        pytest.skip("this system cannot reset the peak resident size")
    assert 0.9 <= float(run_python(MEMORY.replace("{function}", function))) <= 1.05


def test_tables_of_labels_are_made_once(monkeypatch):
    """Also where they come in other containers; wrong ones are an error in every call."""
    made = []
    original = core.op_attributes
    monkeypatch.setattr(core, "op_attributes", lambda **a: made.append(a) or original(**a))
    x, y = np.zeros((1, 4, 2), np.float32), np.array([[0, 1, 5, 9]])
    for regions in ([(0, 9), (9,)], [[0, 9], np.array([9])], ({0, 9}, {9})):
        sums = dice_op.dice_sums(y, x, activation="sigmoid", regions=regions)
        np.testing.assert_array_equal(sums.label_sum, [[2, 1]])
    assert len(made) == 1
    for sets in (
        {5: (1,), 9: (0, 1)},
        {5: [1], 9: {0, 1}},
        {np.uint8(5): np.array([1]), 9: (0, 1)},
    ):
        sums = dice_op.dice_sums(y, x, activation="sigmoid", label_sets=sets)
        np.testing.assert_array_equal(sums.label_sum, [[1, 2]])
    assert len(made) == 2
    pairs = dice_op.dice_sums(y, x, activation="sigmoid", label_sets=[(5, (1,)), (9, (0, 1))])
    np.testing.assert_array_equal(pairs.label_sum, [[1, 2]])
    for _ in range(2):
        with pytest.raises(TypeError, match="regions must be a list of the label values"):
            dice_op.dice_sums(y, x, activation="sigmoid", regions=[(0.0, 9.0), (9,)])
        with pytest.raises(TypeError, match="label_sets must be a dict"):
            dice_op.dice_sums(y, x, activation="sigmoid", label_sets={5: (1.0,)})


def test_graphs_work_with_unknown_shapes():
    @tf.function(
        input_signature=[
            tf.TensorSpec(None, tf.float32),
            tf.TensorSpec(None, tf.uint8),
        ]
    )
    def function(x, y):
        return dice_op.dice_sums(y, x, activation="softmax").pred_sum

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, 3], tf.float32),
            tf.TensorSpec([None, None, None], tf.uint8),
        ]
    )
    def partly(x, y):
        sums = dice_op.dice_sums(y, x, activation="softmax")
        assert sums.pred_sum.shape.as_list() == [None, 3]
        assert sums.weight_sum.shape.as_list() == [None]
        return sums.pred_sum

    x, y = make("index uint8", "softmax", "channels_last", "float32")
    eager = dice_op.dice_sums(y, x, activation="softmax").pred_sum
    np.testing.assert_array_equal(function(x, y), eager)
    np.testing.assert_array_equal(partly(x, y), eager)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"labels \(y_true\) have shape \[2, 2\]"
    ):
        function(x, y[:, 0])


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((2, 4), tf.uint8, r"labels \(y_true\) have shape \[2, 4\].*\[2, 4, 5, 3\].*\[2, 4, 5\]"),
        ((2, 4, 5, 2), tf.uint8, r"labels \(y_true\) have shape \[2, 4, 5, 2\]"),
        ((3, 4, 5), tf.uint8, r"labels \(y_true\) have shape \[3, 4, 5\]"),
    ],
)
def test_wrong_shapes_are_errors_before_anything_runs(shape, dtype, says, graph):
    def function():
        return dice_op.dice_sums(
            tf.zeros(shape, dtype), tf.zeros((2, 4, 5, 3)), activation="softmax"
        )

    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=says):
        (tf.function(function) if graph else function)()


def test_wrong_arguments_are_errors_that_name_them():
    x, y = tf.zeros((2, 4, 5, 3)), tf.zeros((2, 4, 5), tf.int32)
    options = dict(activation="softmax")
    with pytest.raises(TypeError, match="y_pred has dtype int32, but must be one of: float16"):
        dice_op.dice_sums(y, tf.cast(x, tf.int32), **options)
    with pytest.raises(TypeError, match="y_true has dtype uint32"):
        dice_op.dice_sums(tf.cast(y, tf.uint32), x, **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"voxel \[0, 0, 0\] have the value 3"):
        dice_op.dice_sums(y + 3, x, **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"voxel_weight.* has shape \[2, 4\]"):
        dice_op.dice_sums(y, x, voxel_weight=tf.ones((2, 4)), **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match="rank 2"):
        dice_op.dice_sums(y[0, 0], x[0, 0, 0], **options)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="tanh"):
        dice_op.dice_sums(y, x, activation="tanh")
    ones, none = tf.ones((2, 3)), tf.ones((2, 0))
    with pytest.raises(tf.errors.InvalidArgumentError, match="d_pred_sum has shape"):
        raw, ones, none = dice_op.ops._ops.dice_sums_grad, tf.ones((2, 3)), tf.ones((2, 0))
        raw(x, y, [], ones, tf.ones((2, 2)), none, none, none, activation="softmax")


def test_sums_are_none_where_nobody_asked_for_them():
    """A softmax has no cross-entropy of the label 0."""
    x, y = make("index uint8", "softmax", "channels_last", "float32")
    asked_for = ("cross_entropy", "negative_cross_entropy", "unknown_sum", "distance_sum")
    for options, absent in (
        ({}, asked_for),
        ({"cross_entropy": True, "label_sets": {9: (0, 1)}}, asked_for[1::2]),
        ({"activation": "sigmoid", "cross_entropy": True}, asked_for[2:]),
        ({"dist_matrix": DISTANCES}, asked_for[:3]),
    ):
        sums = dice_op.dice_sums(y, x, **{"activation": "softmax", **options})
        assert [n for n, s in sums._asdict().items() if s is None] == list(absent)


# --- numbers in double precision ------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("way", ["eager", "function", "XLA"])
def test_options_keep_the_digits_of_a_double(way, activation):
    """An attribute of an op is a float, in which 0.1 would be wrong by 1.5e-9."""
    x, y = volume((4, 50))
    x = x.astype(np.float64)
    if activation == "none":
        x = reference.softmax(x)
        x[0, 0] = 0, 0.5, 0.5  # One is at the smallest probability of the cross-entropy.
    options = {"label_smoothing": 0.1, "focal_gamma": 1.7}
    coefficients = np.random.default_rng(0).normal(size=(4, 4, 3))

    def of_logits(logits):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(logits)
            with tf.GradientTape() as inner:
                inner.watch(logits)
                sums = dice_op.dice_sums(
                    y, logits, activation=activation, cross_entropy=True, **options
                )
                chosen = [sums.intersection, sums.pred_sum, sums.cross_entropy]
                chosen += [] if activation != "sigmoid" else [sums.negative_cross_entropy]
                total = tf.add_n(
                    [tf.reduce_sum(a * b) for a, b in zip(chosen, coefficients, strict=False)]
                )
            gradient = inner.gradient(total, logits)
            square = tf.reduce_sum(gradient**2)
        named = {k: v for k, v in sums._asdict().items() if v is not None}
        return named, gradient, tape.gradient(square, logits)

    if way != "eager":
        of_logits = tf.function(of_logits, jit_compile=way == "XLA")
    sums, gradient, second = of_logits(tf.constant(x))
    t = reference.one_hot(y, 3)
    given = {"activation": activation, "smoothing": 0.1, "gamma": 1.7}
    for name, value in reference.sums(x, t, **given).items():
        assert reference.relative_error(sums[name], value) <= 1e-14
    wanted = reference.gradient(x, t, coefficients, **given)
    assert reference.gradient_error(gradient, wanted) <= 1e-13
    # The change of |gradient|^2 along the gradient, by central differences of the reference's.
    step = 1e-6 * wanted / np.linalg.norm(wanted)
    ahead, behind = (reference.gradient(x + s, t, coefficients, **given) for s in (step, -step))
    along = (np.sum(ahead**2) - np.sum(behind**2)) / 2
    if activation != "none":  # At the smallest probability there is no derivative.
        assert abs(np.sum(second * step) - along) <= 1e-6 * abs(along)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("prediction", ["argmax", "threshold"])
def test_weights_that_are_fractions_are_counted_in_double(prediction, dtype):
    x, y = volume((2, 4000))
    x = x.astype(dtype)
    weight = np.random.default_rng(0).random((2, 4000))
    sums = dice_op.dice_sums(y, x, activation=prediction, voxel_weight=weight, threshold=0.1)
    t = reference.one_hot(y, 3)
    given = {"activation": prediction, "threshold": 0.1}
    wanted = reference.sums(x, t, weight, **given)
    for name in ("intersection", "pred_sum", "label_sum"):
        assert reference.relative_error(getattr(sums, name), wanted[name]) <= 1e-14
    assert reference.relative_error(sums.weight_sum, weight.sum(1)) <= 1e-14


def test_a_threshold_is_not_rounded():
    """Voxels whose float64 prediction is the threshold itself are not above it."""
    x = np.array([0.1, np.nextafter(0.1, 1), np.nextafter(0.1, 0)]).reshape(1, 3, 1)
    sums = dice_op.dice_sums(np.ones((1, 3), np.uint8), x, activation="threshold", threshold=0.1)
    assert float(sums.pred_sum[0, 0]) == 1


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_large_weights_are_counted_exactly(dtype):
    x, y = volume((2, 4000))
    weight = np.random.default_rng(0).integers(2**20, 2**30, (2, 4000)).astype(dtype)
    sums = dice_op.dice_sums(y, x, activation="argmax", voxel_weight=weight)
    np.testing.assert_array_equal(sums.weight_sum, weight.sum(1))


def test_options_may_be_numbers_of_numpy_and_stay_as_they_are():
    x, y = volume((2, 50))
    smoothing = np.array(0.1)
    given = {"activation": "softmax", "cross_entropy": True}
    found = dice_op.dice_sums(y, x, label_smoothing=smoothing, focal_gamma=np.float32(2), **given)
    wanted = dice_op.dice_sums(y, x, label_smoothing=0.1, focal_gamma=2, **given)
    np.testing.assert_array_equal(found.cross_entropy, wanted.cross_entropy)
    assert smoothing == 0.1
    for gamma in (np.array(2.0), tf.constant(2.0)):  # They have an iterator, but are no list.
        found = dice_op.dice_sums(y, x, label_smoothing=0.1, focal_gamma=gamma, **given)
        np.testing.assert_array_equal(found.cross_entropy, wanted.cross_entropy)
    for gammas in ([2, 2, 2], (2.0, 2.0, 2.0), np.full(3, 2)):
        found = dice_op.dice_sums(y, x, label_smoothing=0.1, focal_gamma=gammas, **given)
        np.testing.assert_allclose(found.cross_entropy, wanted.cross_entropy, rtol=1e-6)


@pytest.mark.parametrize(
    ("gammas", "says"),
    [
        ([], "focal_gamma is empty"),
        ([1, -1, 0], "every focal_gamma must be finite and at least 0"),
        ([1, float("nan"), 0], "every focal_gamma must be finite"),
        ([1, 2], "focal_gamma has 2 exponents, but logits .* have 3 classes"),
    ],
)
def test_exponents_that_do_not_fit_are_errors(gammas, says):
    x, y = volume((2, 50))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=says):
        dice_op.dice_sums(y, x, activation="softmax", cross_entropy=True, focal_gamma=gammas)


@pytest.mark.parametrize(
    ("dist_matrix", "says"),
    [
        ([], r"dist_matrix is \[\], but must be a distance for each pair of classes"),
        (1.0, "dist_matrix is 1.0, but must be a distance for each pair"),
        ("far", "dist_matrix is 'far', but must be a distance for each pair"),
        ([[0, 1], [1]], "but must be a distance for each pair of classes"),
        ([[0, 1]], "has 1 rows, but row 0 has 2 distances"),
        ([[0, 1], [1, 0]], "dist_matrix has 2 rows, but logits .* have 3 classes"),
    ],
    ids=str,
)
def test_distances_that_do_not_fit_are_errors(dist_matrix, says):
    x, y = make("index uint8", "softmax", "channels_last", "float32")
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=says):
        dice_op.dice_sums(y, x, activation="softmax", dist_matrix=dist_matrix)


def test_distances_may_come_in_any_kind_of_array():
    x, y = make("index uint8", "softmax", "channels_last", "float32")
    wanted = dice_op.dice_sums(y, x, activation="softmax", dist_matrix=DISTANCES)
    for distances in (np.float32(DISTANCES), tuple(map(tuple, DISTANCES)), tf.constant(DISTANCES)):
        found = dice_op.dice_sums(y, x, activation="softmax", dist_matrix=distances)
        np.testing.assert_array_equal(found.distance_sum, wanted.distance_sum)
