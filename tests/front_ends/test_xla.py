"""The ops give the same numbers in programs that XLA compiles, wherever the loss stands."""

import concurrent.futures
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import dice_op
from dice_op import core
from helpers import emulation, reference
from helpers.ffi_header import finder
from helpers.kernel_inputs import FORMATS
from helpers.paths import EXAMPLES
from helpers.processes import output_of, run
from helpers.tape import value_and_gradient


def compile_library(source, text):
    """Compiles a library that uses TensorFlow's XLA; it lies beside its source."""
    source.write_text(text)
    include = tf.sysconfig.get_include()
    folders = [include] + [
        f"{include}/external/{p}" for p in ("highwayhash", "farmhash_archive/src")
    ]
    compiler = ["c++", "-std=c++17", "-w", "-shared", "-fPIC", *(f"-I{f}" for f in folders)]
    compiler += ["-idirafter", finder.earliest()[1]]  # TensorFlow 2.19 lacks a header
    libraries = [f"-L{tf.sysconfig.get_lib()}", *tf.sysconfig.get_link_flags()[1:]]
    libraries += ["-l:libtensorflow_cc.so.2", "-o", source.with_suffix(".so")]
    output_of(*compiler, source, *libraries)


def jit(function, **options):
    return tf.function(function, jit_compile=True, **options)


def volume(shape=(2, 6, 5, 7), classes=4, dtype="float32", seed=0):
    """Logits and uint8 class indices."""
    rng = np.random.default_rng(seed)
    x = tf.constant(2 * rng.normal(size=(*shape, classes)), dtype)
    return x, tf.constant(rng.integers(0, classes, size=shape), tf.uint8)


def sums_and_gradient(y, x, **options):
    """All sums, and the gradient of a scalar that depends on each of them."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        sums = [s for s in dice_op.dice_sums(y, x, **options) if s is not None]
        total = tf.add_n([(i + 1) * tf.reduce_sum(s) for i, s in enumerate(sums)])
    return *sums, tape.gradient(total, x)


def dice_and_gradient(x, y):
    return value_and_gradient(lambda x: dice_op.losses.DiceLoss()(y, x), x)


def assert_same_bits(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        np.testing.assert_array_equal(result, wanted)
    assert np.any(tf.cast(expected[-1], tf.float64) != 0)


def assert_close(results, expected, tolerance=1e-6):
    for result, wanted in zip(tf.nest.flatten(results), tf.nest.flatten(expected), strict=True):
        assert np.any(wanted != 0)
        assert reference.relative_error(result, wanted) <= tolerance


# --- values ---------------------------------------------------------------------------------------

OPTIONS = {
    "softmax": {},
    "squares, cross-entropy": {"squared_pred": True, "cross_entropy": True},
    "focal": {"cross_entropy": True, "focal_gamma": 1.75},
    "ignored class": {"ignore_label": 1},
    "sigmoid": {"activation": "sigmoid", "cross_entropy": True},
    "probabilities": {"activation": "none", "cross_entropy": True},
    "smoothing": {"cross_entropy": True, "label_smoothing": 0.25},
    "regions": {"activation": "sigmoid", "cross_entropy": True, "regions": [(1, 2), (2,), (0,)]},
    "label sets": {"cross_entropy": True, "label_sets": {1: (0, 1), 9: (2,)}},
    "binary label sets": {
        "activation": "sigmoid", "cross_entropy": True, "label_sets": {1: (0, 1), 9: (2,)},
    },
    "distances": {"dist_matrix": [[0, 1, 1], [1, 0, 0.5], [1, 0.25, 0]]},
    "exponents": {"cross_entropy": True, "focal_gamma": [0, 0.5, 1.75]},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS)
def test_xla_gives_the_same_bits_as_eager_execution(options, dtype):
    """The volume is several blocks of the CPU kernels, the last not full, shared by XLA's
    threads."""
    options = {"activation": "softmax", **OPTIONS[options]}
    x, y = volume((2, 50, 41, 23), 3, dtype)
    if options["activation"] == "none":
        x = tf.nn.softmax(x)
    inside = jit(lambda y, x: sums_and_gradient(y, x, **options))(y, x)
    assert_same_bits(inside, sums_and_gradient(y, x, **options))


def test_xla_gives_the_same_bits_for_soft_labels():
    x, _ = volume((2, 50, 41, 23), 3)
    y = tf.random.stateless_uniform(x.shape, [1, 2])
    options = {"activation": "softmax", "soft_label": True}
    inside = jit(lambda y, x: sums_and_gradient(y, x, **options))(y, x)
    assert_same_bits(inside, sums_and_gradient(y, x, **options))
    product = sums_and_gradient(y, x, activation="softmax")
    assert not np.array_equal(product[0], inside[0])


@pytest.mark.parametrize("activation", ["argmax", "threshold"])
def test_xla_gives_the_same_scores_as_eager_execution(activation):
    x, y = volume((2, 50, 41, 23), 3, "float16")

    def sums(y, x):
        return dice_op.dice_sums(y, x, activation=activation, threshold=0.5)[:3]

    assert_same_bits(jit(sums)(y, x), sums(y, x))


LABELS = ["uint8", "int8", "uint16", "int16", "int32", "int64", "float32", "bfloat16"]
DENSE = ["bool", "uint8", "float32", "float16"]


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("labels", [*LABELS, *(f"one-hot {d}" for d in DENSE), "soft"])
def test_every_kind_of_label_and_weight_gives_the_same_bits(labels, data_format):
    x, y = volume()
    weight = tf.constant(np.random.default_rng(1).integers(0, 3, size=y.shape))
    if labels == "soft":
        y = tf.nn.softmax(tf.random.stateless_normal(x.shape, [1, 2]))
    elif "one-hot" in labels:
        y = tf.one_hot(y, 4)
    dense = y.shape == x.shape
    if labels != "soft":
        y = tf.cast(y, labels.split()[-1])
    if data_format == "channels_first":
        x = tf.transpose(x, [0, 4, 1, 2, 3])
        y = tf.transpose(y, [0, 4, 1, 2, 3]) if dense else y
    for w in (None, tf.cast(weight, "float32"), tf.cast(weight, "uint8"), weight > 0):
        options = {"activation": "softmax", "data_format": data_format, "voxel_weight": w}
        inside = jit(lambda y, x, options=options: sums_and_gradient(y, x, **options))(y, x)
        assert_same_bits(inside, sums_and_gradient(y, x, **options))


@pytest.mark.parametrize("classes", [1, 2, 14, 120])
def test_loss_and_gradient_agree_with_float64(classes):
    x, y = volume((2, 9, 10, 11), classes)
    activation = "sigmoid" if classes == 1 else "softmax"
    loss = dice_op.losses.DiceLoss(activation=activation)
    value, gradient = jit(lambda x: value_and_gradient(lambda x: loss(y, x), x))(x)
    t = reference.one_hot(y, classes)
    wanted, wanted_gradient = reference.loss_and_gradient(
        reference.flat(x), reference.flat(t), reference.mean_dice, activation=activation
    )
    assert reference.relative_error(value, wanted) <= 1e-6
    reference.assert_gradient(reference.flat(gradient), wanted_gradient, 2e-6)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 1, 1, 3), (1, 3)])
def test_degenerate_shapes_give_the_same_numbers(shape):
    x, y = tf.ones(shape), tf.zeros(shape[:-1], tf.uint8)
    inside = jit(lambda: sums_and_gradient(y, x, activation="softmax"))()
    for result, wanted in zip(inside, sums_and_gradient(y, x, activation="softmax"), strict=True):
        np.testing.assert_array_equal(result, wanted)


# --- wherever the loss stands ---------------------------------------------------------------------


def test_one_trace_serves_changing_shapes():
    function = jit(
        dice_and_gradient,
        input_signature=[
            tf.TensorSpec([None, None, None, None, 4], tf.float32),
            tf.TensorSpec([None, None, None, None], tf.uint8),
        ],
    )
    for shape in [(1, 4, 5, 6), (3, 4, 5, 6), (3, 7, 5, 2), (1, 4, 5, 6)]:
        x, y = volume(shape)
        assert_close(function(x, y), dice_and_gradient(x, y))
    assert function.experimental_get_tracing_count() == 1


def test_losses_work_inside_control_flow():
    x, y = volume((4, 6, 5, 7))
    loss = dice_op.losses.DiceLoss()

    def in_cond(x):
        return tf.cond(tf.reduce_mean(x) > 100, lambda: 0.0, lambda: loss(y, x))

    def in_while_loop(x):
        def body(i, total):
            return i + 1, total + loss(y, x * total)

        start, bound = (0, 1.0), {"maximum_iterations": 3}  # Without a bound XLA has no gradient.
        return tf.while_loop(lambda i, _: i < 3, body, start, **bound)[1]

    def in_map_fn(x):
        def of_sample(sample):
            return loss(sample[0][tf.newaxis], sample[1][tf.newaxis])

        each = tf.map_fn(of_sample, (y, x), fn_output_signature=tf.float32)
        return tf.reduce_sum(each**2)

    def in_recompute_grad(x):
        return tf.recompute_grad(lambda x: loss(y, tf.tanh(x)))(x)

    inner = tf.function(loss)
    inner(y, x)  # It is traced before XLA asks for it.

    def in_an_inner_function(x):
        return inner(y, x)

    for program in (in_cond, in_while_loop, in_map_fn, in_recompute_grad, in_an_inner_function):

        def gradient(x, program=program):
            return value_and_gradient(program, x)

        assert_close(jit(gradient)(x), gradient(x))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_second_order_gradients_agree_with_eager_ones(activation):
    x, y = volume((2, 3, 2), 3, "float64")
    t = tf.one_hot(y, 3, dtype=tf.float64)  # Labels have a gradient as well.
    loss = dice_op.losses.DiceLoss(activation=activation)

    def function(x, t):
        with tf.GradientTape(persistent=True) as second:
            second.watch([x, t])
            with tf.GradientTape() as first:
                first.watch([x, t])
                value = loss(t, x)
            gradients = first.gradient(value, [x, t])
            norm = tf.reduce_sum(gradients[0] ** 2)
        return gradients, second.gradient(norm, [x, t])

    assert_close(jit(function)(x, t), function(x, t), 1e-10)


def test_several_threads_may_call_at_once():
    x, y = volume((1, 64, 64, 32))
    function = jit(dice_and_gradient)
    expected = dice_and_gradient(x, y)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for result in [pool.submit(function, x, y) for _ in range(8)]:
                assert_close(result.result(timeout=120), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_dice_op_may_be_imported_before_or_after_the_first_compiled_op(when, run_python):
    losses = run_python(
        """
        import sys
        import tensorflow as tf
        if sys.argv[1] == "before":
            import dice_op.losses
        first = tf.function(lambda: tf.reshape(tf.range(24.0) - 9, (2, 4, 3)), jit_compile=True)
        x = first()
        y = tf.constant([[0, 1, 2, 0]] * 2)
        import dice_op.losses
        loss = dice_op.losses.DiceLoss()
        print(float(loss(y, x)), float(tf.function(loss, jit_compile=True)(y, x)))
        """,
        when,
    ).split()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def test_auto_clustering_takes_our_ops(run_python):
    """XLA itself picks the operations to compile, and picks ours."""
    out = run_python(
        """
        import tensorflow as tf
        import dice_op
        v1 = tf.compat.v1
        with tf.Graph().as_default():
            x = tf.reshape(tf.sin(tf.range(96.0)), (2, 4, 4, 3))
            x *= v1.placeholder_with_default(2.0, [])
            loss = dice_op.losses.DiceLoss()(tf.argmax(tf.cos(x), -1), x)
            fetches = [loss, v1.gradients(loss, x)[0]]
            options = v1.RunOptions(output_partition_graphs=True)
            ran = v1.RunMetadata()
            with v1.Session() as session:
                result = session.run(fetches, options=options, run_metadata=ran)
            ops = {node.op for graph in ran.partition_graphs for node in graph.node}
        print("DiceSums" in ops or "DiceSumsGrad" in ops, "_XlaRun" in ops or "XlaLaunch" in ops)
        print(result[0], abs(result[1]).sum())
        """,
        TF_XLA_FLAGS="--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1",
    )
    left_outside, clustered, loss, gradient = out.split()
    assert (left_outside, clustered) == ("False", "True")
    x = 2 * np.sin(np.arange(96.0)).reshape(2, 16, 3)
    t = reference.one_hot(np.cos(x).argmax(-1), 3)
    wanted, wanted_gradient = reference.loss_and_gradient(
        x, t, reference.mean_dice, activation="softmax"
    )
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(gradient) == pytest.approx(np.abs(wanted_gradient).sum(), rel=1e-5)


def test_a_saved_model_runs_in_another_process(tmp_path, run_python):
    x, y = volume((2, 4, 4))
    module = tf.Module()
    signature = [tf.TensorSpec([None, None, None, 4]), tf.TensorSpec([None, None, None], tf.uint8)]
    module.step = jit(dice_and_gradient, input_signature=signature)
    tf.saved_model.save(module, str(tmp_path / "model"))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    run_python(
        """
        import sys
        import numpy as np
        import tensorflow as tf
        import dice_op.losses
        folder = sys.argv[1]
        x, y = (tf.constant(np.load(f"{folder}/{name}.npy")) for name in "xy")
        gradient = tf.saved_model.load(f"{folder}/model").step(x, y)[1]
        np.save(f"{folder}/gradient.npy", gradient)
        """,
        tmp_path,
    )
    gradient = np.load(tmp_path / "gradient.npy")
    assert_close([gradient], [dice_and_gradient(x, y)[1]])


# --- the compiled program -------------------------------------------------------------------------


STEP = """
import tensorflow as tf
import dice_op
loss = dice_op.losses.DiceLoss()

@tf.function(jit_compile=True)
def step(x, y):
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(y, x)
    return value, tape.gradient(value, x)

"""


def test_the_program_holds_our_calls_and_no_volume_but_the_gradient(tmp_path, run_python):
    run_python(
        STEP + "step(tf.ones((2, 32, 32, 32, 4)), tf.zeros((2, 32, 32, 32), tf.uint8))",
        XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    )

    def dumped(name):
        (path,) = [p for p in tmp_path.iterdir() if "step" in p.name and p.name.endswith(name)]
        return path.read_text()

    program = dumped("cpu_after_optimizations.txt")
    assert re.findall(r'custom_call_target="([^"]*)"', program) == [
        "dice_op_sums",
        "dice_op_sums_grad",
    ]
    logits = 4 * 2 * 32**3 * 4
    allocations = re.findall(
        r"^allocation \d+: size (\d+), (?:page \d+, )?(.*):$",  # TensorFlow 2.22 has pages
        dumped("buffer-assignment.txt"),
        re.MULTILINE,
    )
    large = sorted(kind.split(",")[0] for size, kind in allocations if int(size) >= logits // 100)
    assert large == ["maybe-live-out", "parameter 0", "parameter 1"]  # the gradient, logits, labels
    assert max(int(size) for size, _ in allocations) == logits


GPU_BACKEND = """
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
namespace tensorflow {
REGISTER_XLA_BACKEND(DEVICE_GPU_XLA_JIT, kGpuAllTypes, [](KernelDef*) { return true; });
}
"""
LOAD_BACKEND = """
import ctypes, sys
import tensorflow as tf
if not tf.sysconfig.get_build_info()["is_cuda_build"]:
    ctypes.CDLL(sys.argv[1])
"""
LOWER = """
lower = step.experimental_get_compiler_ir(tf.ones((2, 8, 8, 3)), tf.ones((2, 8, 8), tf.uint8))
try:
    print(lower(stage="hlo", platform_name="GPU"))
except ValueError as error:
    print(error)
"""


def test_lowering_for_a_gpu_emits_our_calls_or_says_why_not(tmp_path, run_python):
    """XLA's front end for GPUs makes the program. Where TensorFlow has none, the test registers
    one."""
    compile_library(tmp_path / "backend.cc", GPU_BACKEND)
    out = run_python(LOAD_BACKEND + STEP + LOWER, tmp_path / "backend.so")
    if core.build_info()["cuda"] is None:
        assert "no kernels for XLA's platform CUDA" in out and "jit_compile=False" in out
    else:
        calls = re.findall(r'custom_call_target="([^"]*)"', out)
        assert calls == ["dice_op_sums", "dice_op_sums_grad"]
        assert out.count("api_version=API_VERSION_TYPED_FFI") == 2
        workspace = core.ffi_workspace("CUDA", batch=2, voxels=64, classes=3)
        assert f"u8[{workspace}]" in out


@pytest.fixture(scope="module")
def run_handlers():
    """Runs cuda_emulator/run_handlers.cc under the address sanitizer; returns the lines it
    prints."""
    program = emulation.build_handlers()

    def run(*arguments, **environment):
        environment = {"ASAN_OPTIONS": "detect_leaks=0", **environment}
        return output_of(program, *arguments, timeout=60, **environment).splitlines()

    return run


def test_the_handlers_for_a_gpu_agree_with_the_cpu(run_handlers):
    i = np.arange(2 * 1003 * 4).reshape(2, 1003, 4)
    x = ((i * 7919 % 1000 - 500) / 128).astype(np.float32)
    y = (np.arange(2 * 1003).reshape(2, 1003) * 31 % 7 % 4).astype(np.uint8)
    results = [np.array(line.split(), np.float32) for line in run_handlers("cuda", -1)]
    wanted = core.sums(x, y, cross_entropy=True)
    names = ["intersection", "pred_sum", "label_sum", "cross_entropy", "weight_sum"]
    for name, result in zip(names, results[:5], strict=True):
        result = result.reshape(wanted[name].shape)
        assert reference.relative_error(result, wanted[name]) <= 1e-6
    d = dict(zip(("d_intersection", "d_pred_sum", "d_cross_entropy"), (0, 1, 3), strict=True))
    gradient = core.gradient(x, y, **{k: results[at].reshape(2, 4) for k, at in d.items()})
    reference.assert_gradient(results[5].reshape(x.shape), gradient, 2e-6)

    bad = 1003 + 7
    sums = [np.array(line.split(), np.float32).reshape(2, -1) for line in run_handlers("cuda", bad)]
    assert all(np.isfinite(s[0]).all() and np.isnan(s[1]).all() for s in sums[:5])
    (error,) = run_handlers("cuda", bad, DICE_OP_CHECK_LABELS="1")
    assert "labels (y_true) at voxel [1, 7] have the value 9" in error
    assert len(run_handlers("cuda", -1, DICE_OP_CHECK_LABELS="1")) == 6


def test_cuda_graphs_may_hold_our_calls_unless_they_check_labels(run_handlers):
    """A call that waits for the check of the labels cannot be replayed."""
    replayed = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
    for checks, traits in (("0", replayed), ("1", 0)):
        assert run_handlers("traits", DICE_OP_CHECK_LABELS=checks) == [
            "Host dice_op_sums 0 0",
            "Host dice_op_sums_grad 0 0",
            f"CUDA dice_op_sums {traits} {traits}",
            f"CUDA dice_op_sums_grad {traits} {traits}",
        ]


@pytest.mark.parametrize("pool", ["inline", "threads", "staggered", "late"])
def test_the_pool_is_used_and_not_waited_for(pool, run_handlers):
    """Each block is done once. A task that starts late finds nothing to do, and nobody waits for
    it.

    A pool of three threads gets two tasks, for the caller takes part. Work of 100 ns gets none.
    """
    assert run_handlers("host", pool) == ["2 1 1", "0 1 1"]


# --- Keras ----------------------------------------------------------------------------------------


class CountedLoss(dice_op.losses.DiceLoss):
    """A loss that counts how often it is traced."""

    traces = 0

    def call(self, *args, **kwargs):
        self.traces += 1
        return super().call(*args, **kwargs)


def demo_network():
    """The network that examples/brain_segmentation.py trains, and data to learn from."""
    from brain_segmentation import build_unet

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(6, 16, 16, 16, 1)).astype(np.float32)
    return build_unet(), x, (x[..., 0] > 0.5).astype(np.uint8) + (x[..., 0] > 1)


def test_fit_gives_the_same_losses_with_and_without_xla(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    histories = {}
    for jit_compile in (False, True):
        model, x, y = demo_network()
        loss = CountedLoss()
        # Adam would make whole steps of rounding errors where a gradient is nearly zero.
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
        fitted = model.fit(x, y, batch_size=2, epochs=3, shuffle=False, verbose=0)
        assert loss.traces == 1
        histories[jit_compile] = [*fitted.history["loss"], model.evaluate(x, y, verbose=0)]
    np.testing.assert_allclose(histories[True], histories[False], rtol=1e-5)
    assert histories[True][2] < histories[True][0]


def test_a_model_trains_where_compile_chooses_xla_for_a_gpu(monkeypatch):
    """Keras' compile() chooses XLA if TensorFlow claims to have a GPU; here it is made to claim
    so."""
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    devices = [*tf.config.list_physical_devices(), gpu]
    with monkeypatch.context() as patch:
        patch.setattr(
            tf.config,
            "list_physical_devices",
            lambda kind=None: [d for d in devices if kind in (None, d.device_type)],
        )
        patch.syspath_prepend(str(EXAMPLES))
        model, x, y = demo_network()
        model.compile(keras.optimizers.SGD(0.1), dice_op.losses.DiceLoss())
        assert model.jit_compile is True
    history = model.fit(x, y, batch_size=2, epochs=2, verbose=0).history["loss"]
    assert history[1] < history[0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_in_mixed_precision_trains(policy):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    y = (x[..., 0] > 0).astype(np.uint8)
    layer = keras.layers.Conv2D(2, 3, padding="same", dtype=policy)
    model = keras.Sequential([keras.Input((8, 8, 1)), layer])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    model.compile(optimizer, dice_op.losses.DiceLoss(), jit_compile=True)
    losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_label_that_is_no_class_is_an_error():
    x, y = volume((2, 4, 4))
    y = tf.tensor_scatter_nd_update(y, [[1, 2, 3]], tf.constant([9], tf.uint8))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[1, 2, 3\] have the value 9"):
        jit(dice_and_gradient)(x, y)
    # It goes on working.
    assert_close(jit(dice_and_gradient)(x, y % 4), dice_and_gradient(x, y % 4))


def test_shapes_that_do_not_fit_are_an_error():
    x, y = volume((2, 4, 4))
    unknown = [tf.TensorSpec(None, tf.float32), tf.TensorSpec(None, tf.uint8)]
    function = jit(
        lambda x, y: dice_op.dice_sums(y, x, activation="softmax")[0], input_signature=unknown
    )
    assert_close(function(x, y), dice_op.dice_sums(y, x, activation="softmax")[0])
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"labels \(y_true\) have shape \[2, 4\]"
    ):
        function(x, y[..., 0])


def test_shapes_that_only_the_data_tells_are_an_error_that_advises():
    x, y = volume((8, 6))
    assert 0 < np.count_nonzero(y[:, 0]) < 8
    loss = dice_op.losses.DiceLoss(reduction="sum")

    def of_some_samples(x, y):
        chosen = y[:, 0] > 0
        return loss(tf.boolean_mask(y, chosen), tf.boolean_mask(x, chosen))

    with pytest.raises(tf.errors.UnimplementedError, match="sample_weight.*jit_compile=False"):
        jit(of_some_samples)(x, y)

    def as_advised(x, y):
        return loss(y, x, sample_weight=tf.cast(y[:, 0] > 0, tf.float32))

    assert_close([jit(as_advised)(x, y)], [of_some_samples(x, y)])


def test_workspace_sizes_are_checked():
    assert core.ffi_workspace("cpu", 1, 10**10, 120) > 0
    for sizes in [(-1, 2, 3), (1, -2, 3), (1, 2, -3), (1, 2**62, 2**40)]:
        with pytest.raises(ValueError, match="at least 0"):
            core.ffi_workspace("cpu", *sizes)
    with pytest.raises(NotImplementedError, match="no kernels for XLA's platform TPU"):
        core.ffi_workspace("TPU", 1, 2, 3)


def test_a_locale_with_a_decimal_comma_changes_nothing(tmp_path, run_python):
    """Numbers reach XLA as text, which must not depend on the locale."""
    if shutil.which("localedef"):
        run("localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8")
    if not (tmp_path / "de_DE.UTF-8" / "LC_NUMERIC").exists():
        pytest.skip("no German locale can be made here")
    out = run_python(
        """
        import locale
        import tensorflow as tf
        import dice_op
        locale.setlocale(locale.LC_ALL, "")
        x, y = tf.reshape(tf.range(24.0), (2, 4, 3)) % 5, tf.zeros((2, 4), tf.uint8)

        def focal(x):
            options = {"cross_entropy": True, "focal_gamma": 1.5}
            return dice_op.dice_sums(y, x, activation="softmax", **options).cross_entropy

        same = tf.reduce_all(tf.function(focal, jit_compile=True)(x) == focal(x))
        print(locale.str(1.5), bool(same))
        """,
        LOCPATH=str(tmp_path),
        LC_ALL="de_DE.UTF-8",
    )
    assert out.split() == ["1,5", "True"]


OCCUPY = """
#include "xla/ffi/api/ffi.h"
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
XLA_FFI_DEFINE_HANDLER(other, []() { return Error::Success(); }, Ffi::Bind());
XLA_FFI_REGISTER_HANDLER(GetXlaFfiApi(), "dice_op_sums", "Host", other);
}  // namespace xla::ffi
"""
USE = """
    import ctypes, pathlib, sys, warnings
    import tensorflow as tf
    if len(sys.argv) > 1:
        ctypes.CDLL(sys.argv[1])
    else:
        from dice_op import _loader
        _loader.XLA_LIBRARY = pathlib.Path("/nowhere/dice_op_xla.so")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import dice_op.losses
    print(*[w.message for w in said if w.category is RuntimeWarning], sep="|")
    loss, x, y = dice_op.losses.DiceLoss(), tf.zeros((1, 4, 2)), tf.zeros((1, 4), tf.uint8)
    print(float(loss(y, x)))
    try:
        tf.function(loss, jit_compile=True)(y, x)
    except tf.errors.OpError as error:
        print(error.message.replace("\\n", " "))
"""


# From then on TensorFlow's XLA says that it has an earlier version, and refuses all handlers.
OLDER = """
#include <sys/mman.h>
#include <string>
#include "xla/ffi/api/c_api.h"
namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();
XLA_FFI_Error* Refuse(XLA_FFI_Handler_Register_Args* args) {
  XLA_FFI_Metadata metadata = {XLA_FFI_Metadata_STRUCT_SIZE};
  XLA_FFI_Metadata_Extension extension = {};
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &extension.extension_base;
  args->bundle.execute(&frame);
  const XLA_FFI_Api_Version& its = metadata.api_version;
  const std::string text = std::string(args->name.ptr, args->name.len) + " has version " +
                           std::to_string(its.major_version) + "." +
                           std::to_string(its.minor_version);
  XLA_FFI_Error_Create_Args error = {XLA_FFI_Error_Create_Args_STRUCT_SIZE};
  error.message = text.c_str();
  error.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  return GetXlaFfiApi()->XLA_FFI_Error_Create(&error);
}
const bool is_older = [] {
  auto* const api = const_cast<XLA_FFI_Api*>(GetXlaFfiApi());
  const auto page = reinterpret_cast<size_t>(api) / 4096 * 4096;
  mprotect(reinterpret_cast<void*>(page), 2 * 4096, PROT_READ | PROT_WRITE);
  api->api_version.minor_version = 0;
  api->XLA_FFI_Handler_Register = Refuse;
  return true;
}();
}  // namespace xla::ffi
"""


def test_handlers_that_xla_refuses_cause_a_warning_and_an_error(tmp_path, run_python):
    compile_library(tmp_path / "occupy.cc", OCCUPY)
    warning, value, error = run_python(USE, tmp_path / "occupy.so").splitlines()
    assert "pass jit_compile=False" in warning and "dice_op_sums" in warning
    assert float(value) == pytest.approx(2 / 3, rel=1e-4)
    assert "does not take dice_op's handlers" in error and "jit_compile=False" in error


def test_the_refusal_of_an_older_xla_names_both_versions(tmp_path, run_python):
    """It would be a TensorFlow that is older than the header that the handlers were compiled
    with."""
    compile_library(tmp_path / "older.cc", OLDER)
    warning, value, error = run_python(USE, tmp_path / "older.so").splitlines()
    assert float(value) == pytest.approx(2 / 3, rel=1e-4)
    built = core.build_info()["ffi"]
    for said in (warning, error):
        assert f"compiled with version {built} of its foreign function interface" in said
        assert "it has version 0.0" in said and "jit_compile=False" in said
        # What XLA has asked the handlers is what build_info() says of them.
        assert f"dice_op_sums has version {built}" in said
    assert "build dice_op again for this TensorFlow" in error


def test_the_handlers_are_no_later_than_the_header_of_this_tensorflow():
    header = pathlib.Path(tf.sysconfig.get_include(), "xla", "ffi", "api", "c_api.h").read_text()
    has = re.findall(r"#define XLA_FFI_API_M(?:AJ|IN)OR (\d+)", header)
    built = core.build_info()["ffi"].split(".")
    assert [int(n) for n in built] <= [int(n) for n in has]


def test_a_missing_library_causes_a_warning(run_python):
    warning, value, _ = run_python(USE).splitlines()
    assert "pass jit_compile=False" in warning and "/nowhere/dice_op_xla.so is missing" in warning
    assert float(value) == pytest.approx(2 / 3, rel=1e-4)
