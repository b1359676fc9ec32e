"""`python -m dice_op info`: what it says of a build, and of a machine where something is broken."""

import importlib.util
import json
import re
import shutil
import sys
from importlib import metadata

import pytest

from dice_op import core
from helpers.paths import PACKAGE
from helpers.processes import output_of, run

DICE_OP = (sys.executable, "-m", "dice_op")


def test_info_tells_of_the_build():
    report = json.loads(output_of(*DICE_OP, "info", "--json"))
    info = core.build_info()
    assert report["version"] == info["version"]
    assert report["tensorflow"] == report["build_tensorflow"] == info["tensorflow"]
    assert report["op"].startswith("loaded from ")
    assert report["xla"] == f"loaded from {PACKAGE / 'dice_op_xla.so'}"
    assert report["simd_level"] == info["simd_level"]
    assert re.fullmatch(r"\d+\.\d+", info["ffi"]) and report["build_ffi"] == info["ffi"]
    for framework in ("torch", "jax"):
        installed = importlib.util.find_spec(framework)
        wanted = metadata.version(framework) if installed else "None"
        # PyTorch's CUDA builds add +cu130 to their version, and to that of their package not.
        assert str(report[framework]).partition("+")[0] == wanted.partition("+")[0]
    text = output_of(*DICE_OP, "info")
    for key in report:
        assert re.search(rf"^{key} +\S", text, re.MULTILINE), key
    assert run(*DICE_OP).returncode == 2  # Without a command it says how it is used.


def test_info_works_without_tensorflow(run_python):
    out = run_python(
        """
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "tensorflow" else real(name, *a)
        from dice_op.__main__ import main
        main(["info"])
        """
    )
    assert re.search(r"^op +not loaded: TensorFlow is not installed", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"KERAS_BACKEND": "bogus"}, r"losses +not loaded: ValueError: .*bogus"),
        ({"KERAS_BACKEND": "numpy"}, r"(losses|keras) +not loaded: "),
        ({"TF_USE_LEGACY_KERAS": "1"}, r"losses +not loaded: ImportError: .*TF_USE_LEGACY_KERAS"),
    ],
)
def test_info_tells_what_does_not_work(environment, says):
    done = run(*DICE_OP, "info", **environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(says, done.stdout), done.stdout


@pytest.mark.parametrize(
    ("broken", "error"),
    [("tensorflow", "ImportError('no symbol')"), ("keras", "RuntimeError('other numpy')")],
)
def test_info_works_where_a_package_cannot_be_imported(broken, error, tmp_path):
    (tmp_path / f"{broken}.py").write_text(f"raise {error}")
    done = run(*DICE_OP, "info", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    reason = error.partition("'")[2][:-2]
    assert re.search(rf"^{broken} +not loaded: .*{reason}", done.stdout, re.MULTILINE)


def test_info_says_that_the_compiled_module_is_missing(tmp_path):
    (tmp_path / "dice_op").mkdir()
    for module in PACKAGE.glob("*.py"):
        shutil.copy(module, tmp_path / "dice_op")
    done = run(*DICE_OP, "info", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "compiled module cannot be loaded" in done.stderr
