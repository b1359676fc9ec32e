"""test_core.py and test_scores.py pass as a whole under the address sanitizer.

The sanitizer sees every read and write of memory that is freed or lies beyond an array's end: as
when an array was converted for a call and is gone before the call has ended.
"""

import os
import pathlib
import shutil
import sys
import textwrap

import pytest

from helpers.paths import BUILD, ROOT, TESTS
from helpers.processes import alone_in, output_of, run

BUILT = BUILD / "sanitized"
# Checks are calls instead of code at each place, and locals have none: compiling takes a tenth of
# the time.
FLAGS = (
    "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address "
    "--param asan-instrumentation-with-call-threshold=0 --param asan-stack=0"
)

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder that holds a dice_op without TensorFlow, compiled with the sanitizer."""
    import ninja

    folder = tmp_path_factory.mktemp("sanitized")
    cmake = [sys.executable, "-m", "cmake"]
    options = [
        "-DDICE_OP_WITH_TENSORFLOW=OFF",
        "-DDICE_OP_CUDA=off",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={FLAGS}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={pathlib.Path(ninja.BIN_DIR, 'ninja')}",
    ]
    with alone_in(BUILT):  # The first process compiles it for all.
        for command in (
            [*cmake, "-S", ROOT, "-B", BUILT, "-G", "Ninja", *options],
            [*cmake, "--build", BUILT],
            [*cmake, "--install", BUILT, "--prefix", folder],
        ):
            output_of(*command)
    for module in (ROOT / "dice_op").glob("*.py"):
        shutil.copy(module, folder / "dice_op")
    return folder


def sanitized(package, *arguments):
    compiler = os.environ.get("CXX", "c++")
    runtime = [
        output_of(compiler, f"-print-file-name={name}").strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return run(
        sys.executable,
        "-P",
        *arguments,
        LD_PRELOAD=" ".join(runtime),
        PYTHONPATH=str(package),
        PYTHONMALLOC="malloc",  # The sanitizer then sees each of Python's objects.
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
    )


def test_the_sanitizer_is_at_work(package):
    """The sanitizer stops a read of an array whose memory is freed."""
    code = """
        import types, numpy as np
        from dice_op import core
        labels = np.zeros((1, 1 << 20), np.uint8)
        about = labels.copy().__array_interface__
        dangling = np.asarray(types.SimpleNamespace(__array_interface__=about))
        core.scores(labels, dangling, classes=2)
    """
    done = sanitized(package, "-c", textwrap.dedent(code))
    assert "AddressSanitizer: heap-use-after-free" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("file", ["test_core.py", "test_scores.py"])
def test_nothing_is_read_or_written_that_is_not_there(file, package):
    # The sanitizer's report is then shown.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--capture=sys"]
    done = sanitized(package, "-m", "pytest", *options, TESTS / "kernels" / file)
    assert "AddressSanitizer" not in done.stderr + done.stdout, done.stderr[-5000:]
    assert done.returncode == 0, done.stdout[-5000:]
