"""What the bits of a result depend on, and what not: the promise of docs/reliability.md.

On a CPU the same call gives the same bits in every run, in every process, at any number of threads
and at any place in memory, from every front end. Other instruction sets give other bits, within a
bound. That the CUDA kernels give the same bits in every order of their threads is in
kernels/test_cuda.py; numbers of threads are in kernels/test_core.py and front_ends/test_ops.py.
"""

import hashlib
import json
import sys

import ml_dtypes
import numpy as np
import pytest

from dice_op import core
from helpers import reference, worst_cases
from helpers.installed import needs
from helpers.kernel_inputs import coefficients_by_name, in_format, make
from helpers.paths import TESTS
from helpers.processes import output_of

LEVELS = core.build_info()["simd_levels"]
SHAPES = [(4, 4999, 1), (3, 30_011, 4), (2, 3001, 14), (2, 701, 104)]
OPTIONS = {
    "softmax": {"activation": "softmax", "cross_entropy": True},
    "sigmoid": {"activation": "sigmoid", "cross_entropy": True, "focal_gamma": 2.0},
    "squares": {"activation": "softmax", "squared_pred": True},
    "smoothing": {"activation": "softmax", "cross_entropy": True, "label_smoothing": 0.1},
}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
DTYPES["float64"] = np.float64


def results(x, y, options, out=None, threads=0):
    """The sums and the gradient, of all that `core` gives."""
    planar = options.get("data_format") == "channels_first"
    shape = (len(x), x.shape[1 if planar else 2])
    # The derivatives of each sample are the same, wherever it is in a batch.
    numbers = np.random.default_rng(1).normal(size=(4, 1, shape[1]))
    kind = np.float64 if x.dtype == np.float64 else np.float32
    numbers = np.tile(numbers, (1, shape[0], 1)).astype(kind)
    given = coefficients_by_name(
        numbers if "cross_entropy" in options else numbers[:2], options["activation"]
    )
    sums = core.sums(x, y, threads=threads, **options)
    gradient = core.gradient(x, y, threads=threads, out=out, **given, **options)
    return {**sums, "gradient": gradient}


def assert_same_bits(results, wanted, samples=slice(None)):
    for name, value in wanted.items():
        assert results[name].tobytes() == value[samples].tobytes(), name


def calls():
    """Small calls of every sort: logits, labels and options."""
    for shape in SHAPES:
        for dtype, kind in DTYPES.items():
            for name, options in OPTIONS.items():
                if shape[2] > 1 or name == "sigmoid":
                    x, y, _ = make(shape)
                    yield x.astype(kind), y, options, f"{shape} {dtype} {name}"


def elsewhere(array, elements):
    """A copy that begins so many elements behind a multiple of 64 bytes."""
    size = array.itemsize
    memory = np.zeros(array.nbytes + 64 + elements * size, np.uint8)
    begin = -memory.ctypes.data % 64 + elements * size
    place = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    place[:] = array
    assert place.ctypes.data % 64 == elements * size % 64
    return place


def test_the_bits_do_not_depend_on_the_place_in_memory():
    for x, y, options, _ in calls():
        wanted = results(elsewhere(x, 0), elsewhere(y, 0), options, elsewhere(x, 0))
        for elements in (1, 3):
            moved = elsewhere(x, elements)
            found = results(moved, elsewhere(y, elements), options, elsewhere(x, elements))
            assert_same_bits(found, wanted)
            assert_same_bits(results(moved, y, options, out=moved), wanted)


def test_the_bits_of_a_sample_do_not_depend_on_the_others():
    """Neither on their order, nor on how a batch is split, nor on what they hold."""
    for x, y, options, _ in calls():
        wanted = results(x, y, options)
        order = np.random.default_rng(0).permutation(len(x))
        assert_same_bits(results(x[order], y[order], options), wanted, order)
        for n in range(len(x)):
            one = slice(n, n + 1)
            assert_same_bits(results(x[one], y[one], options), wanted, one)
        other = x.copy()
        other[1:] = np.nan
        assert_same_bits(
            {k: v[:1] for k, v in results(other, y, options).items()}, wanted, slice(0, 1)
        )


def test_the_bits_do_not_depend_on_the_layout():
    for x, y, options, _ in calls():
        wanted = results(x, y, options)
        (planes,) = in_format("channels_first", x)
        found = results(planes, y, {**options, "data_format": "channels_first"})
        found["gradient"] = np.ascontiguousarray(found["gradient"].swapaxes(1, 2))
        assert_same_bits(found, wanted)


def test_the_bits_are_the_same_in_every_run():
    x, y, _ = make((2, 40_009, 4))
    wanted = results(x, y, OPTIONS["softmax"])
    for run in range(100):
        assert_same_bits(results(x, y, OPTIONS["softmax"], threads=run % 5), wanted)


# --- processes and instruction sets ---------------------------------------------------------------


def digest():
    """Returns one hash of the bits that all calls give."""
    found = hashlib.sha256()
    for x, y, options, _ in calls():
        for value in results(x, y, options).values():
            found.update(value.tobytes())
    return found.hexdigest()


def write(file):
    """All results, for another process to compare."""
    values = {
        f"{i} {name}": value.astype(np.float64)
        for i, (x, y, options, _) in enumerate(calls())
        for name, value in results(x, y, options).items()
    }
    np.savez(file, **values)


def in_a_process(*arguments, **environment):
    return output_of(sys.executable, __file__, *arguments, PYTHONPATH=str(TESTS), **environment)


def test_the_bits_are_the_same_in_every_process():
    wanted = digest()
    assert in_a_process("digest", MALLOC_PERTURB_="165").strip() == wanted


@pytest.fixture(scope="module")
def by_level(tmp_path_factory):
    """What each instruction set that the processor has gives."""
    folder, found = tmp_path_factory.mktemp("levels"), {}
    for level in LEVELS:
        file = folder / f"{level}.npz"
        if in_a_process("write", file, DICE_OP_SIMD=level).strip() == level:
            found[level] = np.load(file)
    return found


def test_instruction_sets_differ_by_rounding_alone(by_level, seen):
    """Each is within its bound of the exact result (test_precision.py), so that two of them are
    within twice that."""
    if len(by_level) < 2:
        pytest.skip("this processor has one of them alone")
    names = list(by_level)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            largest = {"sums": 0.0, "gradient": 0.0, "sums of float64": 0.0}
            for number, (x, _, _, what) in enumerate(calls()):
                dtype, classes = x.dtype.name, x.shape[2]
                for key in by_level[one]:
                    if key.split()[0] != str(number):
                        continue
                    a, b = by_level[one][key], by_level[other][key]
                    if key.endswith("gradient"):
                        error = reference.gradient_error(a, b)
                        bound = 2e-13 if dtype == "float64" else 1e-5
                        bound += worst_cases.STORED[dtype]
                        kind = "gradient"
                    else:
                        error = reference.relative_error(a, b)
                        bound = 2 * (84 + classes) * worst_cases.UNIT[dtype] + 2**-41
                        kind = "sums of float64" if dtype == "float64" else "sums"
                    assert error <= bound, (one, other, what, key, error)
                    if key.endswith("gradient") and dtype in ("float16", "bfloat16", "float64"):
                        continue
                    largest[kind] = max(largest[kind], error)
            seen("determinism", f"largest difference, {one} and {other}", largest)


# --- front ends -----------------------------------------------------------------------------------

FRONT_ENDS = """
    import json, sys
    import numpy as np
    front_end, threads = sys.argv[1], int(sys.argv[2])
    rng = np.random.default_rng(0)
    digests = set()
    x = rng.normal(size=(2, 30, 31, 32, 4)).astype(np.float32)
    y = rng.integers(0, 4, x.shape[:-1]).astype(np.uint8)
    names = ("intersection", "pred_sum", "cross_entropy")

    def total(sums):
        return sum(getattr(sums, name).sum() for name in names)

    def tensorflow(jit=False):
        import tensorflow as tf, dice_op
        tf.config.threading.set_intra_op_parallelism_threads(threads)

        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                sums = dice_op.dice_sums(y, x, activation="softmax", cross_entropy=True)
                value = tf.add_n([tf.reduce_sum(getattr(sums, name)) for name in names])
            return [getattr(sums, name) for name in names], tape.gradient(value, x)

        run = tf.function(run, jit_compile=True) if jit else run
        sums, gradient = run(tf.constant(x))
        return [*sums, gradient]

    def jit():
        return tensorflow(True)

    def torch():
        import torch, dice_op.torch
        torch.set_num_threads(threads)
        logits = torch.from_numpy(x).requires_grad_()
        sums = dice_op.torch.dice_sums(
            logits, torch.from_numpy(y), data_format="channels_last", cross_entropy=True
        )
        total(sums).backward()
        return [*(getattr(sums, name).detach() for name in names), logits.grad]

    def jax():
        import jax, dice_op.jax

        def loss(x):
            sums = dice_op.jax.dice_sums(x, y, cross_entropy=True)
            return total(sums), [getattr(sums, name) for name in names]

        (_, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
        return [*sums, gradient]

    def core():
        from dice_op import core
        ones = np.ones((2, 4), np.float32)
        given = {f"d_{name}": ones for name in names}
        sums = core.sums(x, y, cross_entropy=True, threads=threads)
        gradient = core.gradient(x, y, cross_entropy=True, threads=threads, **given)
        return [*(sums[name] for name in names), gradient]

    import hashlib
    for run in range(5):
        digest = hashlib.sha256()
        for value in globals()[front_end]():
            digest.update(np.asarray(value).tobytes())
        digests.add(digest.hexdigest())
    print(json.dumps(sorted(digests)))
"""


def of_front_end(run_python, name, threads, **environment):
    """The digests of several runs in a process."""
    printed = run_python(FRONT_ENDS, name, str(threads), JAX_PLATFORMS="cpu", **environment)
    return json.loads(printed.splitlines()[-1])


def test_eager_and_compiled_tensorflow_give_the_bits_of_core(run_python):
    (wanted,) = of_front_end(run_python, "core", 2)
    assert of_front_end(run_python, "tensorflow", 1) == [wanted]
    assert of_front_end(run_python, "jit", 2) == [wanted]


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["tensorflow", "jit", *(pytest.param(n, marks=needs(n)) for n in ("torch", "jax"))]
)
def test_every_front_end_gives_the_bits_of_core_at_any_number_of_threads(name, run_python):
    (wanted,) = of_front_end(run_python, "core", 1)
    for threads in (1, 3):
        one = "--xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
        assert of_front_end(run_python, name, threads, XLA_FLAGS=one) == [wanted]


FIT = """
    import hashlib
    import numpy as np
    import keras, tensorflow as tf
    from dice_op import losses, metrics

    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 16, 16, 1)).astype(np.float32)
    y = rng.integers(0, 3, x.shape[:-1]).astype(np.uint8)
    for loss in (
        losses.DiceCELoss(), losses.GeneralizedDiceFocalLoss(), losses.TverskyLoss(batch=True),
        losses.DiceCELoss(label_sets={2: (1, 2)}),
    ):
        digests = set()
        for run in range(2):
            keras.utils.set_random_seed(1)
            layers = [keras.Input((16, 16, 1)), keras.layers.Conv2D(8, 3, padding="same"),
                      keras.layers.Dropout(0.2), keras.layers.Conv2D(3, 3, padding="same")]
            model = keras.Sequential(layers)
            model.compile("adam", loss, metrics=[metrics.DiceScore(), metrics.JaccardScore()],
                          jit_compile=JIT)
            history = model.fit(x, y, batch_size=4, epochs=3, verbose=0).history
            digest = hashlib.sha256(repr(history).encode())
            for weight in model.get_weights():
                digest.update(weight.tobytes())
            digests.add(digest.hexdigest())
        assert len(digests) == 1, loss
        assert all(np.isfinite(v).all() for v in history.values())
    print("same")
"""


@pytest.mark.full
@pytest.mark.parametrize("jit", [False, True])
def test_with_op_determinism_two_trainings_give_the_same_weights(jit, run_python):
    """TensorFlow then refuses every op that it knows to be otherwise. Losses and metrics work, and
    the weights and the history are the same bit for bit."""
    assert "same" in run_python(FIT.replace("JIT", str(jit)), KERAS_BACKEND="tensorflow")


if __name__ == "__main__":
    if sys.argv[1] == "digest":
        print(digest())
    else:
        write(sys.argv[2])
        print(core.build_info()["simd_level"])
