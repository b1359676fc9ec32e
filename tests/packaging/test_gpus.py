"""Which GPUs a build has code for, and what is said of one that it has no code for."""

import json
import re
import sys
import textwrap

import pytest

from dice_op import _gpu
from helpers.processes import output_of, run


@pytest.mark.parametrize(
    ("archs", "capability", "portable", "covered"),
    [
        ("75,80,90", (7, 5), True, True),
        ("75,80,90", (8, 9), False, True),  # 8.9 is a later minor of 8.0.
        ("75,80,90+PTX", (7, 0), True, False),
        ("75,80,90+PTX", (12, 0), True, True),
        ("75,80,90+PTX", (12, 0), False, False),
        ("75,80,90", (12, 0), True, False),
        ("75,80+PTX,90", (12, 0), True, True),
        ("80,90", (7, 5), True, False),
        ("86", (8, 0), True, False),
        ("75,100,120", (9, 0), True, False),
        ("75,80,90,100,120", (10, 3), False, True),
        ("90a", (9, 0), False, True),
        ("90a", (10, 0), True, False),
        ("100f", (10, 3), True, True),
        ("100f", (12, 0), True, False),
    ],
)
def test_code_runs_on_the_gpus_that_its_architectures_cover(archs, capability, portable, covered):
    assert _gpu.covers(archs.split(","), capability, portable) == covered


B200, H200, A100, V100 = (
    _gpu.Gpu(n, c)
    for n, c in (("B200", (10, 0)), ("H200", (9, 0)), ("A100", (8, 0)), ("V100", (7, 0)))
)


@pytest.mark.parametrize(
    ("cuda", "archs", "driver", "gpus", "says"),
    [
        ("13.0", "80,90", (13, 0), [H200], None),
        ("13.0", "80,90", (0, 0), [], None),
        (None, "", (13, 0), [], None),
        (None, "", (13, 0), [H200], r"H200 .*no kernels for GPUs.*\.cu12 or \.cu13"),
        (
            "13.0",
            "90",
            (12, 2),
            [H200],
            r"driver 1.2 of .* up to 12.2, .*\(580 or .*\) or .*\.cu12$",
        ),
        ("12.4", "90", (11, 4), [H200], r"\(525 or later\)$"),
        (
            "12.4",
            "80,90",
            (13, 0),
            [V100, A100],
            r"7.5 and later, not for V100",
        ),
        ("12.4", "90", (13, 0), [A100, H200], r"not for A100 .*\.cu13, or build from source"),
        ("12.4", "90", (12, 4), [A100, H200], r"not for A100 .*\.cu12, or build from source"),
        # The wheel of CUDA 12 has no code for Blackwell.
        (
            "12.4",
            "75,80,90",
            (12, 8),
            [B200],
            r"not for B200 .*\.cu13 \(with driver 580 or later\)",
        ),
        ("13.0", "120+PTX", (12, 8), [B200], r"newer driver \(580 or later\)$"),
    ],
)
def test_a_build_says_what_keeps_it_from_using_the_gpus(
    cuda, archs, driver, gpus, says, monkeypatch
):
    def problem():
        found = _gpu.Machine("1.2", driver, tuple(gpus))
        return _gpu.problem(cuda, archs.split(",") if archs else [], found)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert problem() is None if says is None else re.search(says, problem()), problem()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # Of two GPUs it may be the one that has code.
    assert (problem() is None) == (says is None or len(gpus) > 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert problem() is None


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char* to, unsigned n) { strncpy(to, "535.183.01", n); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 13010; return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** to) {
  *to = (void*)(long)(i + 1);
  return i == 1;
}
int nvmlDeviceGetName(void* d, char* to, unsigned n) {
  strncpy(to, d == (void*)1 ? "A" : "B", n);
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void* d, int* major, int* minor) {
  *major = d == (void*)1 ? 7 : 9;
  *minor = 0;
  return 0;
}
"""


def test_a_gpu_without_code_is_named_by_info_and_by_the_loader(tmp_path, monkeypatch):
    """A library stands in for the driver's. `info` names the GPU each time, the loader once."""
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    output_of("cc", "-shared", "-fPIC", tmp_path / "nvml.c", "-o", library)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report = json.loads(output_of(sys.executable, "-m", "dice_op", "info", "--json"))
    assert report["driver"] == "535.183.01 (CUDA 13.1)"
    assert report["gpus"] == ["A (compute capability 7.0)", "B (compute capability 9.0)"]
    reason = "no kernels for GPUs" if report["build_cuda"] is None else "7.5 and later, not for A"
    assert reason in report["gpu_kernels"]

    def warnings_where(tensorflow_is_built_with_cuda):
        code = f"""
            import tensorflow as tf
            tf.test.is_built_with_cuda = lambda: {tensorflow_is_built_with_cuda}
            import dice_op.losses, dice_op.metrics
        """
        done = run(sys.executable, "-c", textwrap.dedent(code))
        assert done.returncode == 0, done.stderr
        return done.stderr

    warned = warnings_where(True)
    assert warned.count("RuntimeWarning") == 1 and report["gpu_kernels"] in warned
    # A TensorFlow without GPUs leaves them idle anyway.
    assert "RuntimeWarning" not in warnings_where(False)
