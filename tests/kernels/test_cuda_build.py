"""The machine code that nvcc made of each CUDA kernel, for every architecture."""

import concurrent.futures
import os
import re
import shutil

import pytest

from dice_op import core
from helpers.machine_code import ARCHS, LIBRARY, budget, dump, needs_cuda
from helpers.paths import BUILD
from helpers.processes import configure, output_of, run

pytestmark = needs_cuda


def complaints(usages):
    """What is wrong with functions, according to cuobjdump's -res-usage."""
    found = []
    for (arch, function), usage in usages.items():
        numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        if numbers["REG"] > budget(function):
            found.append(f"{arch} {function}: {numbers['REG']} registers")
        if numbers["STACK"] or numbers["LOCAL"]:
            found.append(f"{arch} {function}: memory of its own, {usage.strip()}")
    return found


def test_no_spills_and_registers_within_budget():
    usages = dump("-res-usage", LIBRARY)
    archs = {arch for arch, _ in usages}
    assert archs == {f"sm_{arch}" for arch in ARCHS}
    kernels = [function for arch, function in usages if arch == min(archs)]
    for sort in (
        "SumsKernel",
        "GradKernel",
        "Direct",
        "Rows",
        "Staged",
        "General",
        "CombineKernel",
    ):
        assert sum(sort in k for k in kernels) > 0, sort
    assert len(usages) == len(kernels) * len(archs)
    assert complaints(usages) == []


SPILLS = """
__global__ void __launch_bounds__(1024, 2) Spills(float* x, const int* at) {
  float many[64];
  for (int i = 0; i < 64; ++i) many[i] = x[i * 1024 + threadIdx.x];
  for (int i = 0; i < 64; ++i) many[at[i] & 63] += many[i];
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = many[i];
}
"""


def compiler():
    cache = (BUILD / "CMakeCache.txt").read_text()
    return re.search(r"^(DICE_OP_NVCC|CMAKE_CUDA_COMPILER):\w+=(.+)$", cache, re.MULTILINE)[2]


def test_a_planted_spill_is_noticed(tmp_path):
    (tmp_path / "spills.cu").write_text(SPILLS)
    arch = f"-arch=sm_{ARCHS[-1]}"
    output = tmp_path / "spills.cubin"
    output_of(compiler(), arch, "-cubin", tmp_path / "spills.cu", "-o", output)
    assert complaints(dump("-res-usage", output))


def wanting(arch):
    """The kernels that lack 16-byte accesses which the design has, one line for each."""
    (found,) = BUILD.glob("CMakeFiles/dice_op_cuda.dir/**/kernels.cu.o")
    found_wanting = []
    for (_, function), code in dump("-sass", "-arch", f"sm_{arch}", found).items():
        has = {
            "load": re.search(r"\bLDG\.E(\.\w+)*\.128\b", code),
            "copy": re.search(r"\bLDGSTS\.E(\.\w+)*\.128\b", code),
            "store": re.search(r"\bSTG\.E(\.\w+)*\.128\b", code),
            "local": not re.search(r"\b(STL|LDL)\b", code),
        }
        needs = {"local"}
        if "Rows" in function or "Staged" in function:
            needs |= {"copy" if int(arch) >= 80 else "load"}
        if "Direct" in function:
            needs |= {"load"}
        if "GradKernel" in function and "General" not in function:
            needs |= {"store"}
        found_wanting += [f"{arch} {function}: {need}" for need in needs if not has[need]]
    return found_wanting


def test_memory_is_read_and_written_in_words_of_16_bytes():
    if not BUILD.exists():
        pytest.skip("not built from this checkout")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        assert sum(pool.map(wanting, ARCHS), []) == []


def test_an_architecture_of_another_form_is_named(tmp_path):
    wishes = ["DICE_OP_CUDA=on", "DICE_OP_CUDA_ARCHS=80,sm_90", f"CMAKE_CUDA_COMPILER={compiler()}"]
    parts = ["DICE_OP_WITH_TENSORFLOW=OFF", "DICE_OP_WITH_PYTHON=OFF"]
    status, said = configure(tmp_path, *(f"-D{option}" for option in (*wishes, *parts)))
    assert status != 0
    assert "DICE_OP_CUDA_ARCHS has 'sm_90', but must list" in said


def test_the_libraries_need_no_cuda_library():
    """TensorFlow's GPU package exports the CUDA runtime's symbols, in another version; its CPU
    package exports none of them. A machine without a driver has no libcuda."""
    for library in LIBRARY.parent.glob("*.so"):
        symbols = output_of("nm", "-D", "--undefined-only", library)
        assert not re.findall(r"\b_*cuda\w+", symbols), library.name
        assert "cuda" not in run("ldd", library).stdout


def test_both_ops_have_gpu_kernels():
    import tensorflow as tf
    from tensorflow.python.framework import kernels

    tf.load_op_library(str(LIBRARY.with_name("dice_op.so")))
    for op in ("DiceSums", "DiceSumsGrad"):
        devices = {k.device_type for k in kernels.get_registered_kernels_for_op(op).kernel}
        assert {"CPU", "GPU"} <= devices
        for kernel in kernels.get_registered_kernels_for_op(op).kernel:
            assert not kernel.host_memory_arg  # Labels stay on the device.


def test_the_library_is_small():
    assert LIBRARY.stat().st_size < 10 << 20


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_a_missing_device_is_an_error_that_says_so():
    class OnDevice:
        __cuda_array_interface__ = {
            "shape": (1, 8, 4),
            "typestr": "<f4",
            "data": (1 << 20, False),
            "version": 3,
        }

    with pytest.raises(RuntimeError, match="CUDA"):
        core.sums(OnDevice(), OnDevice())
