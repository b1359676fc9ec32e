"""The TensorFlow ops: gradients to second order, half types, memory, graphs, errors."""

import numpy as np
import pytest
import reference
import tensorflow as tf

import dice_op
from dice_op import composite

ACTIVATIONS = ("softmax", "sigmoid", "none")
FORMATS = ("channels_last", "channels_first")
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


def weighted_total(sums, seed=5):
    """A scalar that depends on every sum with another coefficient."""
    rng = np.random.default_rng(seed)
    parts = [sums.intersection, sums.pred_sum, sums.label_sum, sums.cross_entropy]
    return tf.add_n(
        [tf.reduce_sum(tf.constant(rng.normal(size=p.shape), p.dtype) * p) for p in parts]
    )


def assert_jacobians(function, arguments, tolerance):
    """tf.test.compute_gradient, symbolic against numeric, relative to the largest entry."""
    delta = 1e-5 if arguments[0].dtype == tf.float64 else 1 / 1024
    symbolic, numeric = tf.test.compute_gradient(function, arguments, delta)
    for s, n in zip(symbolic, numeric, strict=True):
        scale = np.abs(n).max()
        assert scale > 0
        assert np.abs(s - n).max() <= tolerance * scale


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compute_gradient(activation, labels, data_format, dtype):
    """First and second order, of all sums at once. The tolerance is the numeric derivative's."""
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

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = total(x)
        return tape.gradient(value, x)

    assert_jacobians(total, [x], tolerance)
    assert_jacobians(gradient, [x], tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("data_format", FORMATS)
def test_gradients_of_dense_labels_and_weights(activation, data_format):
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_composite_is_the_same_function(classes, labels, activation):
    """composite.py backs the rare derivatives: it must be the function that the kernels compute."""
    same = {"with_cross_entropy": True, "focal_gamma": 0.0, "label_smoothing": 0.0}
    same = {**same, "squared_pred": False, "ignore_label": [], "regions": []}

    def assert_same(x, y, data_format, **changes):
        attributes = {**same, "activation": activation, "data_format": data_format, **changes}
        arguments = {**attributes, "cross_entropy": attributes["with_cross_entropy"]}
        del arguments["with_cross_entropy"]
        arguments["ignore_label"] = next(iter(attributes["ignore_label"]), None)
        fused = dice_op.dice_sums(y, x, **arguments)
        if attributes["regions"]:
            attributes["regions"] = dice_op.core.region_masks(attributes["regions"])
        for a, b in zip(fused, composite.sums(x, y, [], **attributes), strict=True):
            if a is not None:
                assert reference.relative_error(a, b) <= 1e-12

    for data_format in FORMATS:
        x, y = make(labels, activation, data_format, "float64", classes=classes)
        for gamma, smoothing in ((0.0, 0.0), (0.5, 0.25), (2.0, 0.0)):
            assert_same(x, y, data_format, focal_gamma=gamma, label_smoothing=smoothing)
        if labels.startswith("index") and activation != "softmax":
            regions = [(0, 1), (1,), (1, 2), (3, 1)][:classes]
            assert_same(x, y, data_format, regions=regions)
    if labels.startswith("index") and classes > 1:
        assert_same(x, y, data_format, ignore_label=[1], with_cross_entropy=False)


def test_forward_mode_persistent_tapes_and_jacobian():
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


def mean_dice(i, p, t):
    return np.mean(reference.dice_losses(i, p, t))


def textbook_loss(x, y, dtype):
    """What people write, in the logits' own type."""
    p = tf.nn.softmax(x)
    t = tf.one_hot(y, x.shape[-1], dtype=dtype)
    axes = list(range(1, x.shape.rank - 1))
    i, p, t = (tf.reduce_sum(v, axes) for v in (p * t, p, t))
    return tf.reduce_mean(1 - (2 * i + 1e-5) / (p + t + 1e-5))


def value_and_gradient(loss, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(x)
    return value, tape.gradient(value, x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loss_against_float64(dtype):
    """float32: 1e-6 and 1e-5. Half types: at most twice the error that TensorFlow's own operations
    make in the same type, which bounds both rounding of the logits' gradient and of the sums."""
    rng = np.random.default_rng(0)
    x = tf.constant(2 * rng.normal(size=(2, 12, 12, 12, 4)), dtype)
    y = tf.constant(rng.integers(0, 4, size=(2, 12, 12, 12)), tf.uint8)
    x64 = tf.cast(x, tf.float64).numpy().reshape(2, -1, 4)
    t64 = reference.one_hot(y.numpy().reshape(2, -1), 4)
    loss, gradient = reference.loss_and_gradient(x64, t64, mean_dice, activation="softmax")
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


def test_half_logits_where_sums_pass_65504():
    """160^3 voxels: a sum in half would be infinite. The loss scale is Keras' initial one."""
    rng = np.random.default_rng(0)
    shape = (1, 160, 160, 160)
    y = rng.integers(0, 2, size=shape).astype(np.uint8)
    x = rng.normal(size=(*shape, 2)).astype(np.float16)
    x[..., 1] += 2 * y
    scale = 2.0**15
    loss = dice_op.losses.DiceLoss()
    value, gradient = value_and_gradient(lambda x: loss(y, x) * scale, tf.constant(x))
    expected, wanted = reference.loss_and_gradient(
        x.reshape(1, -1, 2), reference.one_hot(y.reshape(1, -1), 2), mean_dice, activation="softmax"
    )
    assert abs(float(value) / scale - expected) <= 1e-3 * expected
    gradient = gradient.numpy().astype(np.float64).reshape(1, -1, 2) / scale
    assert np.isfinite(gradient).all()
    assert reference.gradient_error(gradient, wanted) <= 1e-3
    # the textbook's way, to show what this test is about
    assert not np.isfinite(float(textbook_loss(tf.constant(x), y, "float16"))) or (
        abs(float(textbook_loss(tf.constant(x), y, "float16")) - expected) > 0.1
    )


def test_one_voxel_object_in_ten_million():
    """The lesion's own gradient is there, and the right one."""
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


def test_empty_masks():
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 6, 1)) - 30, tf.float32)
    empty = tf.zeros((2, 6, 6), tf.uint8)
    for smooth in (0.0, 1e-5):
        loss = dice_op.losses.DiceLoss(activation="sigmoid", smooth_nr=smooth, smooth_dr=smooth)
        value, gradient = value_and_gradient(lambda x, loss=loss: loss(empty, x), x)
        assert np.isfinite(float(value)) and np.isfinite(gradient).all()
    assert float(value) < 1e-5  # nothing to find, nothing found
    exactly = dice_op.losses.DiceLoss(activation="none", smooth_nr=0, smooth_dr=0)
    value, gradient = value_and_gradient(lambda x: exactly(empty, x), tf.zeros((2, 6, 6, 1)))
    assert float(value) == 0 and not gradient.numpy().any()


def test_zero_sized_batch():
    x = tf.zeros((0, 4, 4, 4, 3))
    y = tf.zeros((0, 4, 4, 4), tf.uint8)
    value, gradient = value_and_gradient(
        lambda x: dice_op.losses.DiceLoss(reduction="sum")(y, x), x
    )
    assert gradient.shape == x.shape
    assert tf.reduce_sum(value) == 0


def test_the_same_bits_at_any_number_of_threads(run_python):
    """Through TensorFlow's pool: one process per thread count."""
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
def test_peak_extra_memory(function, run_python):
    """Beyond logits and labels: the gradient and nothing else. Where the logits are made inside the
    function and nobody else holds them, the gradient takes their memory: logits and gradient
    together need one buffer."""
    try:
        open("/proc/self/clear_refs", "w").write("5")
    except OSError:
        pytest.skip("this system cannot reset the peak resident size")
    assert 0.9 <= float(run_python(MEMORY.replace("{function}", function))) <= 1.05


def test_masks_of_regions_are_made_once(monkeypatch):
    """Also where the regions come as other containers; wrong ones are an error in every call."""
    made = []
    original = dice_op.core.region_masks
    monkeypatch.setattr(dice_op.core, "region_masks", lambda r: made.append(r) or original(r))
    x, y = np.zeros((1, 4, 2), np.float32), np.array([[0, 1, 5, 9]])
    for regions in ([(0, 9), (9,)], [[0, 9], np.array([9])], ({0, 9}, {9})):
        sums = dice_op.dice_sums(y, x, activation="sigmoid", regions=regions)
        np.testing.assert_array_equal(sums.label_sum, [[2, 1]])
    assert len(made) == 1
    for _ in range(2):
        with pytest.raises(TypeError, match="regions must be a list of the label values"):
            dice_op.dice_sums(y, x, activation="sigmoid", regions=[(0.0, 9.0), (9,)])


def test_graph_with_unknown_shapes():
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
def test_errors_before_anything_runs(shape, dtype, says, graph):
    def function():
        return dice_op.dice_sums(
            tf.zeros(shape, dtype), tf.zeros((2, 4, 5, 3)), activation="softmax"
        )

    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=says):
        (tf.function(function) if graph else function)()


def test_other_errors():
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
    with pytest.raises(tf.errors.InvalidArgumentError, match="d_pred_sum has shape"):
        raw = dice_op.ops._ops.dice_sums_grad
        raw(x, y, [], tf.ones((2, 3)), tf.ones((2, 2)), tf.ones((2, 0)), activation="softmax")


def test_results_without_cross_entropy_have_none():
    x, y = make("index uint8", "softmax", "channels_last", "float32")
    assert dice_op.dice_sums(y, x, activation="softmax").cross_entropy is None
