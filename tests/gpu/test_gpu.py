"""On a machine with a GPU: build_tools/gpu_check.py builds for it, and every check passes."""

import json
import sys

import pytest

from helpers.paths import BUILD_TOOLS
from helpers.processes import run


@pytest.mark.full
def test_the_kernels_and_what_calls_them_are_right_on_this_gpu(tmp_path):
    steps = ["--steps", "build,check,front_ends,keras", "--time-limit", "1200", "--out", tmp_path]
    done = run(sys.executable, BUILD_TOOLS / "gpu_check.py", *steps)
    if done.returncode == 2 and "there is no" in done.stderr:  # no GPU, or no nvcc
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    status = {name: step["status"] for name, step in record["steps"].items()}
    assert status["build"] == status["check"] == "passed"
    assert {status["front_ends"], status["keras"]} <= {"passed", "skipped"}
    (checks,) = (result for result in record["results"] if result["kind"] == "checks")
    assert checks["count"] > 1000 and not checks["failures"]
