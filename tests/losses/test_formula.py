"""The formula of a loss as programs that XLA compiles, which on a GPU are a few launches.

There is no GPU here: the tests say that there is one, and XLA compiles for the CPU.
"""

import importlib.util
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from dice_op import losses
from dice_op._backends import tensorflow as backend
from helpers import reference
from helpers.each_loss import EACH
from helpers.kernel_inputs import distances_of

# Each class of losses, with its defaults and with options whose formulas are others.
CLASSES = {
    "DiceLoss": ("DiceLoss", {}),
    "DiceLoss, batch": ("DiceLoss", dict(batch=True)),
    "TverskyLoss": ("TverskyLoss", dict(gamma=0.8)),
    "MatthewsLoss": ("MatthewsLoss", {}),
    "GeneralizedDiceLoss": ("GeneralizedDiceLoss", {}),
    "Wasserstein": ("GeneralizedWassersteinDiceLoss", dict(dist_matrix=distances_of(4))),
    "DiceCELoss": ("DiceCELoss", {}),
    "DiceCELoss, batch": ("DiceCELoss", dict(batch=True)),
    "DiceCELoss, binary": ("DiceCELoss", dict(activation="sigmoid")),
    "DiceFocalLoss": ("DiceFocalLoss", {}),
    "GeneralizedDiceFocalLoss": ("GeneralizedDiceFocalLoss", {}),
    "UnifiedFocalLoss": ("UnifiedFocalLoss", {}),
}
ALL = {**CLASSES, **{name: loss for name, loss in EACH.items() if name not in ("Dice", "Matthews")}}
QUICK = ["DiceLoss", "DiceCELoss", "DiceCELoss, batch", "Wasserstein", "UnifiedFocalLoss"]
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in ALL if name not in QUICK)]


def made(name):
    kind, options = ALL[name]
    return getattr(losses, kind)(**options)


def data(samples=3):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(samples, 6, 5, 4)), tf.float32)
    y = tf.constant(rng.integers(0, 4, x.shape[:-1]), tf.uint8)
    return y, x, tf.constant(rng.random(samples), tf.float32)


@pytest.fixture
def choose(monkeypatch):
    """Says whether there is a GPU."""
    backend._formula.cache_clear()
    return lambda gpu: monkeypatch.setattr(backend, "_on_gpu", lambda tensor: gpu)


def gradients(loss, y, x, weight):
    """The loss, and its gradient with respect to logits and weights."""
    with tf.GradientTape() as tape:
        tape.watch([x, *([] if weight is None else [weight])])
        value = loss(y, x, weight)
    return value, tape.gradient(value, [x, *([] if weight is None else [weight])])


def assert_close(results, expected, tolerance=1e-6):
    for result, wanted in zip(tf.nest.flatten(results), tf.nest.flatten(expected), strict=True):
        assert np.any(wanted != 0)
        assert reference.relative_error(result, wanted) <= tolerance


# --- values ---------------------------------------------------------------------------------------


def programs_of(loss):
    return backend._formula(type(loss), json.dumps(loss.get_config()))._programs


@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_formula_gives_the_values_of_a_plain_one(name, weighted, choose):
    loss = made(name)
    y, x, weight = data()
    steps = []
    for gpu in (False, True):
        choose(gpu)

        @tf.function(input_signature=[tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in data()])
        def step(y, x, weight):
            return gradients(loss, y, x, weight if weighted else None)

        steps.append(step.get_concrete_function())
    plain, compiled = steps
    for samples in (3, 2):  # The last batch is smaller.
        batch = [t[:samples] for t in (y, x, weight)]
        assert_close(compiled(*batch), plain(*batch))
    found = gradients(loss, y, x, weight if weighted else None)  # step by step
    assert_close(found, plain(y, x, weight))
    assert len(programs_of(loss)) == 1  # It was traced once for all of this.


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "mean_with_sample_weight"},
        {"reduction": None},
        {"reduction": None, "batch": True},
        {"reduction": None, "average": "none"},
        {"average": "none", "dtype": "float16"},
    ],
    ids=str,
)
def test_every_reduction_is_compiled(options, choose):
    loss = losses.DiceLoss(**options)
    results = []
    for gpu in (False, True):
        choose(gpu)
        results.append(gradients(loss, *data()))
    assert_close(results[1], results[0], 1e-3 if "dtype" in options else 1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        "second order",
        *(
            pytest.param(k, marks=pytest.mark.full)
            for k in ("forward", "jacobian", "graph", "loop")
        ),
    ],
)
def test_derivatives_of_every_kind_are_those_of_a_plain_formula(kind, choose):
    """The labels are fractions, which have gradients as well."""
    y, x, weight = data()
    y, x = tf.nn.softmax(-x[:, :3, :2]), tf.cast(x[:, :3, :2], tf.float64)
    loss = losses.DiceLoss()

    def of_second_order():
        with tf.GradientTape() as second:
            second.watch([x, y, weight])
            with tf.GradientTape(persistent=True) as first:
                first.watch([x, y, weight])
                value = loss(y, x, weight)
            found = [first.gradient(value, [x, y, weight]), first.gradient(value, x)]
            norm = tf.reduce_sum(found[1] ** 2)
        return found, second.gradient(norm, [x, y, weight])

    def forward():
        with tf.autodiff.ForwardAccumulator(x, tf.cos(x)) as accumulator:
            value = loss(y, x, weight)
        return accumulator.jvp(value)

    def jacobian():
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = losses.DiceLoss(reduction=None)(y, x)
        return tape.jacobian(values, x)

    def in_a_loop():
        def body(i, total):
            return i + 1, total + gradients(loss, y, tf.cast(total, x.dtype) * x, weight)[0]

        return tf.while_loop(lambda i, _: i < 3, body, (0, 1.0))[1]

    function = {
        "second order": of_second_order,
        "forward": forward,
        "jacobian": jacobian,
        "graph": tf.function(of_second_order),
        "loop": tf.function(in_a_loop),
    }[kind]
    choose(False)
    plain = getattr(function, "python_function", function)()
    choose(True)
    assert_close(function(), plain)


# --- where it is compiled -------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["graph", "run_eagerly", "run_functions_eagerly"])
def test_a_model_trains_as_with_a_plain_formula(way, choose):
    """It has two resolutions, mixed precision, and a last batch that is smaller."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 8, 8, 1)).astype(np.float32)
    y = (x[..., 0] > 0).astype(np.uint8)
    inputs = keras.Input((8, 8, 1))
    outputs = [keras.layers.Conv2D(2, 3, n, "same", dtype="mixed_bfloat16")(inputs) for n in (1, 2)]
    model = keras.Model(inputs, outputs)
    start, found = model.get_weights(), []
    for gpu in (False, True):
        choose(gpu)
        model.set_weights(start)
        plan = losses.deep_supervision(losses.DiceCELoss(), 2, weights=[1, 0.5])
        model.compile(keras.optimizers.SGD(0.1), **plan, run_eagerly=way == "run_eagerly")
        tf.config.run_functions_eagerly(way == "run_functions_eagerly")
        try:
            fitted = model.fit(x, [y, y], batch_size=2, epochs=2, shuffle=False, verbose=0)
        finally:
            tf.config.run_functions_eagerly(False)
        found.append(fitted.history["loss"])
        programs = programs_of(losses.DiceCELoss())
        assert any(key[1] for key in programs) == (gpu and way != "run_functions_eagerly")
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_saved_step_is_loaded(choose, tmp_path):
    choose(True)
    loss, module = losses.DiceCELoss(), tf.Module()
    specs = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in data()]
    module.step = tf.function(lambda *batch: gradients(loss, *batch), input_signature=specs)
    tf.saved_model.save(module, tmp_path)
    assert_close(tf.saved_model.load(tmp_path).step(*data()), gradients(loss, *data()))


class Derived(losses.DiceLoss):
    pass


def test_what_xla_compiles_anyway_and_what_users_derive_is_not_compiled_apart(choose):
    choose(True)
    loss = losses.DiceLoss()
    expected = Derived()(*data())
    assert backend.BACKEND.formula(Derived()) is None
    assert_close(tf.function(loss, jit_compile=True)(*data()), expected)
    unknown = [tf.TensorSpec([None] * 4, tf.float32), tf.TensorSpec([None] * 3, tf.uint8)]
    of_any_classes = tf.function(lambda x, y: loss(y, x), input_signature=unknown)
    assert_close(of_any_classes(data()[1], data()[0]), loss(*data()[:2]))
    assert len(programs_of(loss)) == 1  # that of the last call


@pytest.mark.parametrize(
    ("capabilities", "cuda", "compiled"),
    [
        ([], "13.0", False),
        ([(9, 0)], "13.0", True),
        ([(8, 6), (10, 3)], "12.4", True),
        ([(9, 0)], None, False),  # a build whose sums are computed on the CPU
        ([(12, 0)], "13.0", False),
        ([(9, 0), (12, 1)], "13.0", False),
    ],
)
def test_xla_is_asked_for_gpus_that_it_knows(capabilities, cuda, compiled, monkeypatch):
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: capabilities)
    details = lambda capability: {"compute_capability": capability}  # noqa: E731
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details)
    monkeypatch.setattr(backend.core, "build_info", lambda: {"cuda": cuda})
    monkeypatch.setenv("DICE_OP_XLA", "0")
    assert not backend._xla_takes_the_gpus.__wrapped__()
    monkeypatch.delenv("DICE_OP_XLA")
    takes = backend._xla_takes_the_gpus.__wrapped__()
    assert takes == compiled
    monkeypatch.setattr(backend, "_xla_takes_the_gpus", lambda: takes)
    with tf.Graph().as_default():
        assert backend._on_gpu(tf.zeros(1)) == compiled
        with tf.device("CPU"):
            assert not backend._on_gpu(tf.zeros(1))


# --- launches -------------------------------------------------------------------------------------

# Takes a step with each loss, twice, and prints the operations of the graph that TensorFlow runs
# and the functions in it that XLA compiles. XLA writes what it compiles into a folder.
STEPS = """
import json, sys
import numpy as np
import tensorflow as tf
from dice_op import losses
from dice_op._backends import tensorflow as backend

v1 = tf.compat.v1
rng = np.random.default_rng(0)
for gpu, weighted, (kind, options) in json.loads(sys.argv[1]):
    backend._on_gpu = lambda tensor: gpu
    backend._formula.cache_clear()  # A session has programs of its own.
    loss = getattr(losses, kind)(**options)

    @tf.function
    def step(y, x, weight):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x, weight if weighted else None)
        return value, tape.gradient(value, x)

    with tf.Graph().as_default(), v1.Session() as session:
        shapes = [("uint8", [None, 8, 8]), ("float32", [None, 8, 8, 4]), ("float32", [None])]
        inputs = [v1.placeholder(*of) for of in shapes]
        results, ran = step(*inputs), v1.RunMetadata()
        for _ in range(2):
            values = rng.integers(0, 4, (3, 8, 8)), rng.normal(size=(3, 8, 8, 4)), rng.random(3)
            how = v1.RunOptions(output_partition_graphs=True)
            session.run(results, dict(zip(inputs, values)), how, ran)
    nodes = [node for graph in ran.partition_graphs for node in graph.node]
    calls = [node.attr["f"].func.name for node in nodes if node.op == "PartitionedCall"]
    # Whole numbers are sizes, which the host computes.
    whole = (tf.int32.as_datatype_enum, tf.int64.as_datatype_enum)
    print(json.dumps([[n.op for n in nodes if n.attr["T"].type not in whole], calls]))
"""

# Operations of which each is no kernel, or another number of kernels than one. The sums have a
# second kernel, which combines those of the blocks.
KERNELS = {"DiceSums": 2, "PartitionedCall": 0} | dict.fromkeys(
    ("Const", "Identity", "IdentityN", "Reshape", "ExpandDims", "Shape", "_Arg", "_Retval"), 0
)
NO_KERNEL = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def steps(run_python, folder, cases):
    """For each case of (whether there is a GPU, whether samples have weights, the loss): the
    launches of a step without those of XLA's programs, and these programs as they are before and
    after XLA's compiler for CPUs has optimised them, `[(before, after), ...]`."""
    cases = [(gpu, weighted, ALL[name]) for gpu, weighted, name in cases]
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    out = run_python(STEPS, json.dumps(cases, default=np.ndarray.tolist), XLA_FLAGS=flags)
    for ops, calls in map(json.loads, out.splitlines()):
        programs = []
        for call in calls:
            # There is one file of each: the second step, with other values, compiles nothing.
            (before,) = folder.glob(f"*.a{call[1:]}__*.before_optimizations.txt")
            (after,) = folder.glob(f"*.a{call[1:]}__*_after_optimizations.txt")
            programs.append((before.read_text(), after.read_text()))
        yield sum(KERNELS.get(op, 1) for op in ops), programs


def kernels(program):
    """How many kernels an optimised program of XLA has."""
    instructions = program.partition("\nENTRY")[2].splitlines()[1:]
    found = [re.search(r" = .*? ([a-z-]+)\(", line) for line in instructions]
    return sum(match[1] not in NO_KERNEL for match in found if match)


# XLA's compiler for CPUs stands in for the one for GPUs. It makes a kernel of each result, and of
# what two results have in common, where the one for GPUs puts several of them into a kernel.
MOST = {"DiceLoss": 8, "DiceCELoss": 8}
MOST_OF_OTHERS = 16 if tf.__version__.startswith("2.19.") else 12  # that XLA joins fewer


@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_step_is_a_few_launches(weighted, tmp_path, run_python):
    plain = [(False, weighted, "DiceCELoss")]
    cases = [*((True, weighted, name) for name in CLASSES), *plain]
    *compiled, (launches, programs) = steps(run_python, tmp_path, cases)
    assert launches > 30 and not programs
    for name, (others, programs) in zip(CLASSES, compiled, strict=True):
        assert others == 3 and len(programs) == 2  # the sums, their gradient; the formula, its one
        count = others + sum(kernels(after) for _, after in programs)
        assert count <= MOST.get(name, MOST_OF_OTHERS), name


# XLA's compiler for GPUs, which JAX brings, needs to be told about a GPU, but needs none.
FOR_A_GPU = """
import json, pathlib, sys
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies
from jaxlib import _hlo, _jax
import numpy as np

topology = topologies.get_topology_desc(
    platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=sys.argv[1]
)
options = xla_client.CompileOptions()
options.executable_build_options.device_assignment = xla_client.DeviceAssignment.create(
    np.zeros((1, 1), np.int32)
)
optimised = []
for program in json.loads(pathlib.Path(sys.argv[2]).read_text()):
    module = _hlo.hlo_module_from_text(program).as_serialized_hlo_module_proto()
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(module))
    client, devices = topology.devices[0].client, xla_client.DeviceList(tuple(topology.devices))
    (compiled,) = client.compile(module, devices, options).hlo_modules()
    optimised.append(compiled.to_string())
print(json.dumps(optimised))
"""
AN_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs XLA's compiler for GPUs: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt",
)
@pytest.mark.parametrize("weighted", [False, True])
def test_xla_makes_few_launches_for_a_gpu(weighted, tmp_path, run_python):
    found = list(steps(run_python, tmp_path, [(True, weighted, name) for name in ALL]))
    (tmp_path / "programs").write_text(json.dumps([p for _, of in found for p, _ in of]))
    out = run_python(FOR_A_GPU, AN_H100, tmp_path / "programs", JAX_PLATFORMS="cpu")
    optimised = iter(json.loads(out.splitlines()[-1]))
    for name, (others, programs) in zip(ALL, found, strict=True):
        count = others + sum(kernels(next(optimised)) for _ in programs)
        assert count <= MOST.get(name, 9), name  # 9 where a binary or focal part is added
