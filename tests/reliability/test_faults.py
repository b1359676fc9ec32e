"""What fails around the library is said, and the next call is right.

Memory that is refused, threads that cannot start, CUDA's errors, interrupts, processes that fork,
several interpreters, disks that are full.
"""

import shutil
import sys

import pytest

from helpers import emulation
from helpers.installed import needs
from helpers.paths import BUILD, PACKAGE, ROOT, TESTS
from helpers.processes import output_of, run

# --- memory and threads ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_refusing(run_python, tmp_path_factory):
    """Runs code in a process where refuse.c stands before the C library."""
    source = TESTS / "reliability" / "refuse.c"
    library = tmp_path_factory.mktemp("refuse") / "refuse.so"
    flags = ["-O1", "-fPIC", "-shared", "-fexceptions"]
    output_of(emulation.CXX, "-x", "c", *flags, source, "-o", library, "-ldl")
    return lambda code, *arguments: run_python(
        REFUSE + code, f"{PACKAGE.resolve()}/", *arguments, LD_PRELOAD=str(library)
    )


# What the process runs first.
REFUSE = '''
import ctypes, gc, os, sys
import numpy as np
from dice_op import core

shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
shim.refuse_live.restype = shim.refuse_end.restype = ctypes.c_long
shim.refuse_from.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
FOLDER = sys.argv[1].encode()

def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")

def refuse(call, errors, says="", aligned_within=False, most=10_000):
    """Refuses the call each of its requests in turn, alone and with all that follow.

    Each time there is the right result, or one of the errors, which says that. Then the next call
    is right, and we hold as many blocks of memory as before.
    Returns how many calls were refused something, and how many of them gave an error.
    """
    for _ in range(3):
        wanted = call()
    gc.collect()
    live, refused, raised = shim.refuse_live(), 0, 0
    for all_after in (False, True):
        for number in range(1, most):
            shim.refuse_from(number, all_after, aligned_within)
            result = None
            try:
                result = call()
            except errors as error:
                message = str(error)
                shim.refuse_end()
                assert message and says in message, message
                raised += 1
            finally:
                was_refused = shim.refuse_end()
            if not was_refused:
                assert same(result, wanted)
                break
            refused += 1
            assert result is None or same(result, wanted), (number, all_after, result, wanted)
            del result
            assert same(call(), wanted), (number, all_after)
            if shim.refuse_live() != live:
                gc.collect()
            assert shim.refuse_live() == live, (number, all_after, shim.refuse_live() - live)
        else:
            raise AssertionError("there is no end of requests")
    return refused, raised

def volume(voxels=70_000, classes=4, samples=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, voxels, classes)).astype(np.float32)
    return x, rng.integers(0, classes, (samples, voxels)).astype(np.uint8)
'''

CORE_CALLS = """
x, y = volume()
maps = np.repeat(y, 40, 1)  # three tasks
some = x[:, :1000], y[:, :1000]
d = np.ones((1, 4), np.float32)
d64 = d.astype(float)

def bad_label():
    try:
        return core.sums(x, y + 1, threads=3)
    except ValueError as error:
        return str(error)

CALLS = {
    "sums": lambda: core.sums(x, y, threads=1),
    "sums on threads": lambda: core.sums(x, y, cross_entropy=True, threads=4),
    "sums in double": lambda: core.sums(x[:, :9000].astype(float), y[:, :9000], threads=4),
    "sums of lists": lambda: core.sums([[[0.5, 1.0]]], [[1]]),
    "sums with options": lambda: core.sums(
        *some, voxel_weight=np.ones((1, 1000)), ignore_label=3, cross_entropy=True,
        focal_gammas=[1, 2, 0.5, 0], label_sets={7: (0, 2)}),
    "sums with distances": lambda: core.sums(*some, dist_matrix=1 - np.eye(4)),
    "sums with regions": lambda: core.sums(
        *some, regions=[(1, 2, 3), (2, 3), (3,), (0,)], activation="sigmoid"),
    "a bad label": bad_label,
    "gradient": lambda: core.gradient(x, y, d_intersection=d, d_pred_sum=d, threads=1),
    "gradient on threads": lambda: core.gradient(
        x, y, d_intersection=d, d_pred_sum=d, d_cross_entropy=d, cross_entropy=True, threads=4),
    "gradient in double": lambda: core.gradient(
        x[:, :9000].astype(float), y[:, :9000], d_intersection=d64, d_pred_sum=d64, threads=2),
    "scores of logits": lambda: core.scores(x, y, threads=3),
    "scores of label maps": lambda: core.scores(maps, maps, classes=4, threads=4),
    "attributes": lambda: core.op_attributes(label_sets={7: (0, 2)}, focal_gammas=[1, 2]),
    "label kind": lambda: core.label_kind([None, None, 4], [None, None], "uint8"),
}
"""


def test_memory_and_threads_that_are_refused_leave_the_module_working(run_refusing, seen):
    """Refused to each call of dice_op.core in turn: every block of memory and every thread."""
    out = run_refusing(
        CORE_CALLS
        + """
assert shim.refuse_watch(FOLDER) > 0
for name, call in CALLS.items():
    print(name, *refuse(call, MemoryError), sep=",")
"""
    )
    counts = {name: (int(a), int(b)) for name, a, b in (row.split(",") for row in out.splitlines())}
    assert len(counts) == 15
    for name, (refused, raised) in counts.items():
        assert refused >= 10, (name, refused)
        # Some are borne: where no thread can start, or none more, fewer work.
        assert raised < refused if "threads" in name else raised > 0, (name, refused, raised)
        seen("faults", f"requests refused: core, {name}", refused)
    # As refuse() asserts:
    seen("faults", "blocks of memory that refused calls of core have left", 0)


@pytest.mark.full
def test_memory_may_be_refused_to_the_first_call_of_a_process(run_refusing, seen):
    """What is set up once is then set up by the next call."""
    out = run_refusing(
        CORE_CALLS
        + """
assert shim.refuse_watch(FOLDER) > 0
for name in ("sums on threads", "gradient on threads", "scores of label maps"):
    call, pid, number = CALLS[name], 0, 0
    while True:
        number += 1
        pid = os.fork()  # as no call has been made here yet
        if not pid:
            shim.refuse_from(number, number % 2, False)
            result = None
            try:
                result = call()
            except MemoryError:
                pass
            finally:
                was_refused = shim.refuse_end()
            wanted = call()
            assert result is None or same(result, wanted)
            os._exit(0 if was_refused else 77)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 77:
            break
        assert status == 0, (name, number, status)
    print(number - 1)
"""
    )
    refused = list(map(int, out.split()))
    assert len(refused) == 3 and min(refused) >= 10
    seen("faults", "requests refused: core, first calls of a process", sum(refused))


def test_a_gradient_that_does_not_fit_in_memory_is_a_memory_error(run_python):
    run_python(
        """
        import resource
        import numpy as np
        from dice_op import core

        x = np.zeros((1, 1 << 22, 4), np.float32)  # 64 MB
        y = np.zeros((1, 1 << 22), np.uint8)
        d = np.ones((1, 4), np.float32)
        wanted = core.gradient(x, y, d_intersection=d, d_pred_sum=d)
        expected = wanted.copy()
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), -1))
        for threads in (1, 4, 64):
            try:
                core.gradient(x, y, d_intersection=d, d_pred_sum=d, threads=threads)
            except MemoryError:
                pass
            else:
                raise AssertionError("there was memory")
            core.gradient(x, y, d_intersection=d, d_pred_sum=d, threads=1, out=wanted)
            assert np.array_equal(wanted, expected)
        """
    )


def test_what_is_no_fault_of_an_argument_is_not_blamed_on_it(run_python):
    """An interrupt, or that there is no memory, while Python reads an option."""
    run_python(
        """
        import numpy as np
        from dice_op import core

        class Raises:
            def __init__(self, error):
                self.error = error
            def __iter__(self):
                raise self.error
            def __array__(self, *args, **kwargs):
                raise self.error
            def items(self):
                raise self.error

        x, y = np.zeros((1, 5, 3), np.float32), np.zeros((1, 5), np.uint8)
        for error, wanted in (
            (MemoryError(), MemoryError),
            (KeyboardInterrupt(), KeyboardInterrupt),
            (RuntimeError(), TypeError),
        ):
            for call in (
                lambda: core.sums(x, y, regions=Raises(error), activation="sigmoid"),
                lambda: core.sums(x, y, label_sets={7: Raises(error)}),
                lambda: core.sums(Raises(error), y),
            ):
                try:
                    call()
                except wanted:
                    continue
                raise AssertionError((error, wanted))
        """
    )


TENSORFLOW_CALLS = """
import tensorflow as tf
from dice_op.ops import dice_sums

tf.config.threading.set_inter_op_parallelism_threads(1)
x, y = volume()
x, y = tf.constant(x), tf.constant(y)

def loss_and_gradient():
    with tf.GradientTape() as tape:
        tape.watch(x)
        sums = dice_sums(y, x, activation="softmax", cross_entropy=True)
        loss = tf.reduce_sum(sums.intersection) + tf.reduce_sum(sums.cross_entropy)
    return loss, tape.gradient(loss, x)

def step():
    return [part.numpy() for part in loss_and_gradient()]
"""


def requests_refused(run_refusing, code, arguments, least):
    """Refuses each request of `step`, which the code defines, in turn. Returns how many there are.

    Args:
      arguments: those of `refuse` that follow the call.
      least: how many requests there must be.
    """
    out = run_refusing(
        code
        + f"""
step()
assert shim.refuse_watch(FOLDER) > 0
print(*refuse(step, {arguments}), sep=",")
"""
    )
    refused, raised = map(int, out.splitlines()[-1].split(","))
    assert refused >= least and raised > 0
    return refused


EXHAUSTED = "tf.errors.ResourceExhaustedError"


@pytest.mark.full
def test_memory_that_is_refused_to_the_tensorflow_op_is_exhausted(run_refusing, seen):
    arguments = f"{EXHAUSTED}, 'no memory'"
    refused = requests_refused(run_refusing, TENSORFLOW_CALLS, arguments, 20)
    seen("faults", "requests refused: the TensorFlow op", refused)


@pytest.mark.full
def test_tensorflows_own_allocator_may_refuse(run_refusing, seen):
    """Where the op asks it for its outputs and its scratch memory."""
    arguments = f"{EXHAUSTED}, aligned_within=True"
    refused = requests_refused(run_refusing, TENSORFLOW_CALLS, arguments, 10)
    seen("faults", "requests refused: TensorFlow's allocator around the op", refused)


@pytest.mark.full
def test_memory_that_is_refused_to_xlas_handlers_is_exhausted(run_refusing, seen):
    compiled = "loss_and_gradient = tf.function(loss_and_gradient, jit_compile=True)"
    code, arguments = TENSORFLOW_CALLS + compiled, f"{EXHAUSTED}, 'no memory'"
    refused = requests_refused(run_refusing, code, arguments, 20)
    seen("faults", "requests refused: XLA's handlers in TensorFlow", refused)


JAX_CALLS = """
import jax
import dice_op.jax as dice

x, y = volume()
loss = dice.DiceCELoss()
both = jax.jit(jax.value_and_grad(lambda x: loss(x, y)))

def step():
    value, gradient = both(x)
    return [np.asarray(value), np.asarray(gradient)]
"""


@pytest.mark.full
@needs("jax")
def test_memory_that_is_refused_to_jax_is_exhausted(run_refusing, seen):
    arguments = "(jax.errors.JaxRuntimeError, ValueError), 'RESOURCE_EXHAUSTED'"
    refused = requests_refused(run_refusing, JAX_CALLS, arguments, 20)
    seen("faults", "requests refused: XLA's handlers in JAX", refused)


@pytest.mark.full
def test_threads_of_a_program_that_end_leave_nothing(run_refusing, seen):
    rounds = 1000
    out = run_refusing(
        CORE_CALLS
        + """
import threading, time
assert shim.refuse_watch(FOLDER) > 0
x, y, maps = x[:, :40_000], y[:, :40_000], maps[:, :1_100_000]  # two or three tasks

def work(results):
    results.append((core.sums(x, y, threads=2), core.scores(maps, maps, classes=4, threads=2)))

def in_a_thread():
    results = []
    thread = threading.Thread(target=work, args=(results,))
    thread.start()
    thread.join()
    return results

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def threads():  # those that have been joined may still be ending
    time.sleep(0.5)
    return len(os.listdir("/proc/self/task"))

for _ in range(50):
    wanted = in_a_thread()
gc.collect()
there = threads()
live, resident = shim.refuse_live(), memory()
for _ in range(int(sys.argv[2])):
    assert same(in_a_thread(), wanted)
gc.collect()
assert threads() == there
assert shim.refuse_live() == live
print(memory() - resident)
""",
        rounds,
    )
    assert int(out) < 4 << 20
    seen("faults", "bytes that 1000 threads which ended have left", int(out))


# --- CUDA -----------------------------------------------------------------------------------------


def test_each_call_of_cuda_may_fail(seen):
    """An error names the call and CUDA's reason, nobody else sees it, and the next call is right.

    A block of device memory whose release has failed is the one thing that stays.
    """
    out = output_of(emulation.build_faults(), ASAN_OPTIONS="detect_leaks=1", CUDA_EMULATOR_SMS="3")
    calls = {}
    for line in out.splitlines():
        call, number, kind, last, blocks, right, message = line.split(" ", 6)
        device = 3  # ErrorKind::kDevice
        assert (int(kind), int(last), int(right)) == (device, 0, 1), line
        assert int(blocks) == (call == "release"), line
        assert call == "device" or message.endswith(": out of memory"), line
        calls.setdefault(call, []).append(message.partition(":")[0])
        assert len(calls[call]) == int(number)
    find = ["cudaMemsetAsync", "the launch of the kernel that checks labels and predictions"]
    copy = ["cudaMemcpyAsync", "cudaStreamSynchronize"]
    plan = ["cudaGetDevice", "cudaDeviceGetAttribute", "the preparation of a kernel"]
    sums = ["the launch of the sums' kernel", "the launch of the combining kernel"]
    gradient = ["the launch of the gradient's kernel"]
    assert calls == {
        "sums": plan + sums,
        "gradient": plan + gradient,
        "find": find + copy,
        "describe": find + copy + copy,
        "copy": copy,
        "allocate": ["cudaMallocAsync"],
        "release": ["cudaFreeAsync"],
        "device": ["no device"],
        "sums_staged": plan + plan[-1:] + sums,
        "gradient_staged": plan + plan[-1:] + gradient,
    }
    seen("faults", "failing calls of CUDA, on the emulator", len(out.splitlines()))


# --- interrupts -----------------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_end_of_a_call(run_python):
    """It comes while the call runs, for the call leaves Python to other threads."""
    run_python(
        """
        import os, signal, sys, threading
        import numpy as np
        from dice_op import core

        rng = np.random.default_rng(0)
        x = rng.normal(size=(1, 1 << 20, 4)).astype(np.float32)
        y = rng.integers(0, 4, (1, 1 << 20)).astype(np.uint8)
        maps = np.repeat(y, 8, 1)
        d = np.ones((1, 4), np.float32)
        calls = (
            lambda threads: core.sums(x, y, threads=threads),
            lambda threads: core.gradient(x, y, d_intersection=d, d_pred_sum=d, threads=threads),
            lambda threads: core.scores(maps, maps, classes=4, threads=threads),
        )
        handled = []
        # A shell may have had it ignored, as for what it runs in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, lambda *_: handled.append(threading.current_thread()))
        wanted = [call(1) for call in calls]
        # Python now takes the turn from no thread that does not give it up.
        sys.setswitchinterval(1000)

        def interrupted(call, threads, sort):
            gate, sent = threading.Lock(), []
            gate.acquire()

            def send():
                gate.acquire()
                sent.append(True)
                os.kill(os.getpid(), sort)

            thread = threading.Thread(target=send)
            thread.start()
            before = len(sent)
            gate.release()
            try:
                call(threads)
                during = len(sent)
            except KeyboardInterrupt:
                during = len(sent)
            thread.join()
            return before == 0 and during == 1

        for call, right in zip(calls, wanted, strict=True):
            for threads in (1, 4):
                for sort in (signal.SIGINT, signal.SIGUSR1):
                    for _ in range(100):
                        try:
                            during = interrupted(call, threads, sort)
                        except KeyboardInterrupt:  # after the call
                            continue
                        if during:
                            break
                    else:
                        raise AssertionError("no other thread had a turn during the call")
                    again = call(threads)
                    for name in again if isinstance(again, dict) else ():
                        np.testing.assert_array_equal(again[name], right[name])
                    if not isinstance(again, dict):
                        np.testing.assert_array_equal(again, right)
        assert handled and set(handled) == {threading.main_thread()}
        """
    )


@pytest.mark.full
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_training_can_be_interrupted_and_go_on(jit_compile, run_python):
    run_python(
        """
        import os, signal, sys, threading, time
        import numpy as np
        import keras
        import dice_op

        # A shell may have had it ignored, as for what it runs in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        keras.utils.set_random_seed(0)
        x = np.random.default_rng(0).normal(size=(64, 48, 48, 1)).astype("float32")
        y = (x[..., 0] > 0).astype("uint8")
        layers = [keras.Input((48, 48, 1)), keras.layers.Conv2D(2, 3, padding="same")]
        model = keras.Sequential(layers)
        model.compile("sgd", loss=dice_op.losses.DiceCELoss(), jit_compile=sys.argv[1] == "True")
        model.fit(x, y, batch_size=8, verbose=0)
        interrupts = 0
        for delay in (0.05, 0.1, 0.2, 0.4):
            for _ in range(5):  # Python drops an interrupt that comes while an object ends.
                timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
                try:
                    timer.start()
                    model.fit(x, y, batch_size=8, epochs=300, verbose=0)
                except KeyboardInterrupt:
                    interrupts += 1
                    break
                finally:
                    timer.join()
            (loss,) = model.fit(x, y, batch_size=8, verbose=0).history["loss"]
            assert np.isfinite(loss)
        assert interrupts == 4
        wanted = dice_op.core.sums(x, y)
        got = dice_op.dice_sums(y, x, activation="softmax")
        np.testing.assert_allclose(got.intersection, wanted["intersection"], rtol=1e-6)
        """,
        jit_compile,
    )


# --- processes, threads, interpreters -------------------------------------------------------------

VOLUME = """
import multiprocessing, os, sys, threading
import numpy as np
from dice_op import core

rng = np.random.default_rng(0)
x = rng.normal(size=(1, 70_000, 4)).astype(np.float32)
y = rng.integers(0, 4, (1, 70_000)).astype(np.uint8)

def result(_=None):
    sums, scores = core.sums(x, y, threads=4), core.scores(x, y, threads=4)
    return [array.tobytes() for array in (*sums.values(), *scores.values())]
"""


def test_a_process_may_fork_at_any_time(run_python, seen):
    """Before the first call, after it, and while other threads are within a call."""
    out = run_python(
        VOLUME
        + """
def in_a_child():
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, b"".join(result()))
        os._exit(0)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    with os.fdopen(read, "rb") as file:
        return file.read()

first = in_a_child()
assert first == b"".join(result())
assert in_a_child() == first
stop, forks = threading.Event(), 0
def work():
    while not stop.is_set():
        result()
others = [threading.Thread(target=work) for _ in range(2)]
for thread in others:
    thread.start()
for forks in range(1, 51):
    assert in_a_child() == first
stop.set()
for thread in others:
    thread.join()
print(forks)
"""
    )
    seen("faults", "forks during calls of other threads", int(out))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_of_processes_computes_the_same(method, tmp_path):
    (tmp_path / "pool.py").write_text(
        VOLUME
        + """
if __name__ == "__main__":
    wanted = result()
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(result, range(8)) == [wanted] * 8
"""
    )
    output_of(sys.executable, tmp_path / "pool.py", method, timeout=300)


@pytest.mark.full
@needs("torch")
def test_the_workers_of_a_data_loader_score(tmp_path):
    (tmp_path / "loader.py").write_text(
        VOLUME
        + """
import torch
import dice_op.torch

class Scores(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, at):
        loss = dice_op.torch.DiceLoss(data_format="channels_last")
        return core.scores(x, y)["dice"], loss(torch.from_numpy(x), torch.from_numpy(y))

if __name__ == "__main__":
    wanted, loss = Scores()[0]
    for method in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            Scores(), batch_size=2, num_workers=2, multiprocessing_context=method)
        batches = list(loader)
        assert len(batches) == 4
        for scores, losses in batches:
            assert (scores.numpy() == wanted).all() and (losses == loss).all()
"""
    )
    output_of(sys.executable, tmp_path / "loader.py", timeout=300)


def test_a_thread_may_import_the_package_first(run_python):
    run_python(
        """
        import threading
        import numpy as np
        results = []

        def work():
            from dice_op import core
            results.append(core.sums(np.zeros((1, 5, 3), np.float32), np.zeros((1, 5), np.uint8)))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work()
        assert len(results) == 9
        assert all((r["pred_sum"] == results[0]["pred_sum"]).all() for r in results)
        """
    )


def test_a_second_interpreter_of_a_process_is_refused_in_words(run_python):
    """And the first goes on working. NumPy has no support for them either."""
    out = run_python(
        """
        import sys
        if sys.version_info >= (3, 13):
            import _interpreters as interpreters
        else:
            import _xxsubinterpreters as interpreters
        code = '''if True:
            try:
                import dice_op
            except ImportError as error:
                print(error)
        '''
        number = interpreters.create()
        interpreters.run_string(number, code)
        interpreters.destroy(number)
        import numpy as np
        from dice_op import core
        core.sums(np.zeros((1, 5, 3), np.float32), np.zeros((1, 5), np.uint8))
        number = interpreters.create()
        interpreters.run_string(number, code)
        interpreters.destroy(number)
        core.sums(np.zeros((1, 5, 3), np.float32), np.zeros((1, 5), np.uint8))
        """,
        timeout=60,
    )
    lines = out.splitlines()
    assert len(lines) == 2 and all("interpreter" in line for line in lines), out


# --- installing -----------------------------------------------------------------------------------

MOUNTS = ("unshare", "--map-root-user", "--mount")
NEEDS_MOUNTS = pytest.mark.skipif(
    not shutil.which("unshare") or run(*MOUNTS, "true").returncode != 0,
    reason="needs the right to mount",
)
# $1 is the folder to mount at, $2 is Python, and the build's options follow.
BUILD_THERE = 'folder=$1 python=$2; shift 2; exec "$python" setup.py --quiet build_ext "$@"'
# In place of CMake, with a build that is done.
NO_CMAKE = """
import os, runpy, subprocess, sys
real = subprocess.run
def run(command, **options):
    if "cmake" not in command:
        return real(command, **options)
    if "--install" in command:
        raise subprocess.CalledProcessError(1, command)
subprocess.run = run
sys.argv[1:] = ["--quiet", "build_ext", "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


def build_fails(*command, **environment):
    """The one line in which setup.py says why."""
    environment = {"DICE_OP_TENSORFLOW": "none", "DICE_OP_CUDA": "off", **environment}
    done = run(*command, cwd=ROOT, timeout=300, **environment)
    assert done.returncode == 1, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("dice_op: ")]
    (line,) = (line for line in lines if "a build without" not in line)
    assert done.stderr.splitlines()[-1] == line
    return line


def mounted(mount, folder, *options, **environment):
    command = (*MOUNTS, "sh", "-ec", f"{mount}; {BUILD_THERE}", "sh", folder, sys.executable)
    return build_fails(*command, *options, **environment)


@NEEDS_MOUNTS
def test_a_build_on_a_full_disk_says_so(tmp_path):
    line = mounted(
        "mount -t tmpfs -o size=100k none $1", tmp_path, DICE_OP_BUILD=f"{tmp_path}/build"
    )
    assert f"the disk is full: 0 MB are left at {tmp_path}/build" in line


@NEEDS_MOUNTS
def test_an_installation_to_a_full_disk_says_so(tmp_path):
    mount = "mount -t tmpfs -o size=100k none $1"
    code = f'{mount}; exec "$2" -c "$3" "$1"'
    line = build_fails(*MOUNTS, "sh", "-ec", code, "sh", tmp_path, sys.executable, NO_CMAKE)
    assert f"the disk is full: 0 MB are left at {tmp_path}" in line


@NEEDS_MOUNTS
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    """The folder of the build, the one that is installed to, and the source folder."""
    mount = "mount -t tmpfs -o ro none $1"
    line = mounted(mount, tmp_path, DICE_OP_BUILD=f"{tmp_path}/build")
    assert f"{tmp_path}/build cannot be written to" in line and "DICE_OP_BUILD" in line
    line = mounted(mount, tmp_path, "--build-lib", tmp_path, DICE_OP_BUILD=f"{BUILD}/nowhere")
    assert f"{tmp_path}/dice_op cannot be written to" in line
    source = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; cd "$1"'
    line = mounted(source, ROOT, "--inplace")
    assert f"{BUILD} cannot be written to" in line and "copy the source folder" in line
