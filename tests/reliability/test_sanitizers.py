"""The library under sanitizers of addresses, of undefined behaviour and of threads.

Python itself is an ordinary one.
The sanitizer of addresses sees every read and write of memory that is freed or lies beyond an
array's end: as when an array was converted for a call and is gone before the call has ended. That
of threads sees two threads at the same memory where nothing says who is first.
"""

import pathlib
import re
import shutil
import sys
import textwrap

import pytest

from helpers import emulation
from helpers.paths import BUILD, ROOT, TESTS
from helpers.processes import alone_in, output_of, run

FLAGS = {
    # Checks are calls instead of code at each place, and locals have none: compiling takes a tenth
    # of the time.
    "address": (
        "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all "
        "--param asan-instrumentation-with-call-threshold=0 --param asan-stack=0"
    ),
    "thread": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
REPORT = re.compile("AddressSanitizer|runtime error:|ThreadSanitizer")


def compiled(name, targets, flags=""):
    """Compiles targets without CUDA into a folder of the build, and returns it."""
    import ninja

    folder = BUILD / "sanitized" / name
    cmake = [sys.executable, "-m", "cmake"]
    options = [
        "-DDICE_OP_CUDA=off",
        f"-DCMAKE_BUILD_TYPE={'None' if flags else 'Release'}",
        f"-DCMAKE_CXX_FLAGS={flags}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={pathlib.Path(ninja.BIN_DIR, 'ninja')}",
    ]
    with alone_in(folder):  # The first process compiles it for all.
        output_of(*cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
        output_of(*cmake, "--build", folder, "--target", *targets)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Gives a folder that holds a dice_op that is compiled with the sanitizers of one kind."""
    folders = {}

    def build(kind):
        if kind in folders:
            return folders[kind]
        built = compiled(kind, ["core"], FLAGS[kind])
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        shutil.copytree(ROOT / "dice_op", folder / "dice_op", ignore=shutil.ignore_patterns("*.so"))
        for library in built.glob("*.so"):
            shutil.copy(library, folder / "dice_op")
        return folder

    return build


def sanitized(kind, package, *arguments, **environment):
    runtime = [
        output_of(emulation.CXX, f"-print-file-name={name}").strip() for name in RUNTIMES[kind]
    ]
    done = run(
        sys.executable,
        "-P",
        *arguments,
        LD_PRELOAD=" ".join(runtime),
        PYTHONPATH=str(package(kind)),
        PYTHONMALLOC="malloc",  # The sanitizer then sees each of Python's objects.
        OPENBLAS_NUM_THREADS="1",
        **{**OPTIONS, **environment},
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel places memory where the compiler's sanitizer cannot bear it")
    return done


def pytest_in(kind, package, file, *options):
    """Runs tests under a sanitizer. Returns how many have passed."""
    # The sanitizer's report is then shown.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--capture=sys", *options]
    done = sanitized(kind, package, "-m", "pytest", *options, TESTS / file)
    report = done.stderr + done.stdout
    assert not REPORT.search(report), report[-5000:]
    assert done.returncode == 0, done.stdout[-5000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


# --- addresses and undefined behaviour ------------------------------------------------------------


@pytest.mark.full
def test_the_sanitizer_of_addresses_is_at_work(package):
    """The sanitizer stops a read of an array whose memory is freed."""
    code = """
        import types, numpy as np
        from dice_op import core
        labels = np.zeros((1, 1 << 20), np.uint8)
        about = labels.copy().__array_interface__
        dangling = np.asarray(types.SimpleNamespace(__array_interface__=about))
        core.scores(labels, dangling, classes=2)
    """
    done = sanitized("address", package, "-c", textwrap.dedent(code))
    assert "AddressSanitizer: heap-use-after-free" in done.stderr, done.stderr[-3000:]


@pytest.mark.full
@pytest.mark.parametrize("file", ["test_core.py", "test_scores.py"])
def test_nothing_is_read_or_written_that_is_not_there(file, package, seen):
    passed = pytest_in("address", package, f"kernels/{file}")
    seen("sanitizers", f"tests of {file} under address and undefined, no report", passed)


@pytest.mark.long
def test_the_tensorflow_op_reads_and_writes_nothing_that_is_not_there(package, seen):
    """The kernels and the pool under it are compiled with the sanitizers, the op and TensorFlow are
    not. The memory is TensorFlow's, and each of our kernels' reads and writes is checked."""
    # With checks for undefined behaviour, GCC cannot compile TensorFlow's headers. So the libraries
    # of the op are ordinary ones, which find the kernels beside them.
    names = ["dice_op", "dice_op_xla"]
    op = compiled("op", names)
    for name in names:
        shutil.copy(op / f"{name}.so", package("address") / "dice_op")
    passed = pytest_in("address", package, "front_ends/test_ops.py")
    seen("sanitizers", "tests of TensorFlow's op under address and undefined, no report", passed)


# --- threads --------------------------------------------------------------------------------------

CALLS_ON_THREADS = """
import itertools, threading
import numpy as np
from dice_op import core

rng = np.random.default_rng(0)
volumes = []
for voxels, classes, dtype in ((1, 2, "f4"), (3000, 40, "f4"), (70_000, 4, "f4"), (40_000, 3, "f8"),
                               (70_000, 4, "f2")):
    x = rng.normal(size=(2, voxels, classes)).astype(dtype)
    volumes.append((x, rng.integers(0, classes, (2, voxels)).astype(np.uint8)))
maps = rng.integers(0, 4, (1, (1 << 20) + 1000)).astype(np.uint8)  # two tasks

def call(volume, threads):
    x, y = volume
    given = np.ones((2, x.shape[-1]), "f8" if x.dtype == "f8" else "f4")
    sums = core.sums(x, y, cross_entropy=True, threads=threads)
    gradient = core.gradient(x, y, d_intersection=given, d_pred_sum=given, threads=threads)
    scores = core.scores(x, y, threads=threads)
    if threads == 2:
        assert (core.scores(maps, maps, classes=4, threads=2)["dice"] == 1).all()
    try:
        core.sums(x, y + 200, threads=threads)
    except ValueError as error:
        message = str(error)
    arrays = [*sums.values(), gradient, *scores.values()]
    return b"".join(a.tobytes() for a in arrays) + message.encode()

results = {}
def work(mine):
    for at, threads in mine:
        results.setdefault(at, set()).add(call(volumes[at], threads))

cases = list(itertools.product(range(len(volumes)), (1, 2, 5)))
callers = [threading.Thread(target=work, args=(cases[i:] + cases[:i],)) for i in range(0, 15, 4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert len(results) == len(volumes) and all(len(found) == 1 for found in results.values())
print(len(callers) * (4 * len(cases) + len(volumes)))
"""


@pytest.mark.full
def test_the_sanitizer_of_threads_is_at_work(package):
    """The sanitizer reports two calls that write to the same array."""
    code = """
        import threading
        import numpy as np
        from dice_op import core
        x, y = np.zeros((1, 1 << 16, 4), np.float32), np.zeros((1, 1 << 16), np.uint8)
        d, out = np.ones((1, 4), np.float32), np.zeros_like(x)
        call = lambda: [core.gradient(x, y, d_intersection=d, d_pred_sum=d, out=out, threads=1)
                        for _ in range(20)]
        threads = [threading.Thread(target=call) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    """
    done = sanitized("thread", package, "-c", textwrap.dedent(code))
    assert "ThreadSanitizer: data race" in done.stderr, done.stderr[-3000:]


@pytest.mark.full
def test_no_two_threads_meet_in_the_kernels(package, seen):
    """Calls from several threads at a time, each with threads of its own, the first ones too."""
    done = sanitized("thread", package, "-c", CALLS_ON_THREADS)
    assert not REPORT.search(done.stderr), done.stderr[:5000]
    assert done.returncode == 0, done.stderr[-3000:]
    seen("sanitizers", "calls on several threads under thread, no report", int(done.stdout))


@pytest.mark.full
@pytest.mark.parametrize("pool", ["inline", "threads", "late", "staggered"])
def test_no_two_threads_meet_in_xlas_handlers(pool, seen):
    """Those of a pool may start while the call runs or after it, and end before it does."""
    program = emulation.build_handlers("thread")
    rounds = 1 if pool == "inline" else 50
    done = run(program, "host", pool, rounds, timeout=300, **OPTIONS)
    assert not REPORT.search(done.stderr), done.stderr[:5000]
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["2 1 1", "0 1 1"] * rounds
    seen("sanitizers", f"calls of handlers under thread, pool {pool}, no report", 2 * rounds)
