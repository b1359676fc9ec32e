"""Building from source, and what is said where something is missing."""

import importlib
import json
import re
import shutil
import sys

import pytest

from dice_op import core
from helpers.paths import BUILD_TOOLS, ROOT
from helpers.processes import configure, run


def test_cmake_needs_tensorflow_only_where_it_is_asked_for(tmp_path):
    blocked = tmp_path / "path" / "tensorflow"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('no TensorFlow here')")

    build, path = tmp_path / "build", {"PYTHONPATH": str(blocked.parent)}
    status, message = configure(build, "-DDICE_OP_WITH_TENSORFLOW=OFF", **path)
    assert status == 0, message
    status, message = configure(build, "-DDICE_OP_WITH_TENSORFLOW=ON", **path)
    assert status != 0
    assert "pip install tensorflow-cpu" in message
    assert "-DDICE_OP_WITH_TENSORFLOW=OFF" in message


@pytest.mark.parametrize(
    ("of_tensorflow", "of_jax", "chosen"),
    [
        ("0.2", "0.1", "jaxlib"),
        ("0.2", "0.3", "tensorflow"),
        ("0.2", None, "tensorflow"),
        ("0.1, without ffi.h", "0.1", "jaxlib"),  # as TensorFlow 2.19
        ("0.1, without ffi.h", "0.3", None),
        ("0.1, without ffi.h", None, None),
    ],
)
def test_xlas_earliest_header_is_taken(of_tensorflow, of_jax, chosen, tmp_path):
    """A runtime refuses handlers that a later header than its own was compiled into."""
    folders = {"tensorflow": tmp_path / "tensorflow", "jaxlib": tmp_path / "jaxlib"}
    for folder, version in zip(folders.values(), (of_tensorflow, of_jax), strict=True):
        headers = folder / "include" / "xla" / "ffi" / "api"
        headers.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        if version:
            major, minor = version[:3].split(".")
            define = "#define XLA_FFI_API_MAJOR {}\n\n#define XLA_FFI_API_MINOR {}\n"
            (headers / "c_api.h").write_text(define.format(major, minor))
        if version and "without" not in version:
            (headers / "ffi.h").write_text("")
    folder = folders["tensorflow"]
    (folder / "__init__.py").write_text(
        f"""
__version__ = "2.99.0"
class sysconfig:
    get_compile_flags = list
    get_include = lambda: "{folder / "include"}"
    get_lib = lambda: "{folder}"
    get_link_flags = lambda: ["-l:libtensorflow_framework.so.2"]
"""
    )
    build, path = tmp_path / "build", {"PYTHONPATH": str(tmp_path)}
    status, message = configure(build, "-DDICE_OP_WITH_PYTHON=OFF", "-DDICE_OP_CUDA=off", **path)
    if chosen is None:
        assert status != 0 and "TensorFlow 2.99.0" in message
        assert "pip install 'jaxlib==" in message
        assert not of_jax or ("version 0.1" in message and "has version 0.3" in message)
        return
    assert status == 0, message
    commands = json.loads((build / "compile_commands.json").read_text())
    (command,) = [c["command"] for c in commands if c["file"].endswith("handlers.cc")]
    assert re.findall(r"-isystem (\S+)", command) == [str(folders[chosen] / "include")]


def said_by_setup(*before, **variables):
    """The lines that `setup.py build_ext` says where it ends before it compiles."""
    code = "; ".join((*before, "import runpy, sys", "sys.argv[1:] = ['--quiet', 'build_ext']"))
    code += "; runpy.run_path('setup.py', run_name='__main__')"
    done = run(sys.executable, "-c", code, cwd=ROOT, **variables)
    assert done.returncode == 1
    return [line for line in done.stderr.splitlines() if "dice_op:" in line]


def setup(*before, **variables):
    """The one line that it says."""
    (line,) = said_by_setup(*before, **variables)
    return line


def without(*modules):
    return (
        "import importlib.util as u; real = u.find_spec; "
        f"u.find_spec = lambda name, *a: None if name in {modules!r} else real(name, *a)"
    )


def test_a_build_names_what_is_missing():
    assert "compiler CXX=/no/compiler does not exist" in setup(CXX="/no/compiler")
    assert "pip install cmake ninja" in setup(without("cmake", "ninja"))
    asked_for = setup(without("tensorflow"), DICE_OP_TENSORFLOW="2.21")
    assert "DICE_OP_TENSORFLOW is 2.21" in asked_for and "pip install tensorflow" in asked_for


def test_a_build_without_tensorflow_says_what_it_serves(tmp_path):
    ends = {"DICE_OP_TENSORFLOW": "none", "DICE_OP_BUILD": "/proc/none"}
    without_jax, _ = said_by_setup(without("jaxlib"), **ends)
    assert "jaxlib, which is not here" in without_jax
    assert without_jax.endswith("it serves PyTorch and NumPy")
    (tmp_path / "jaxlib").mkdir()
    (tmp_path / "jaxlib" / "__init__.py").touch()
    with_jax, _ = said_by_setup(PYTHONPATH=str(tmp_path), **ends)
    assert with_jax.endswith("it serves PyTorch, JAX and NumPy")


def test_the_tensorflow_of_this_environment_is_found(monkeypatch):
    monkeypatch.syspath_prepend(BUILD_TOOLS)
    requirements = importlib.import_module("requirements")
    beside = requirements.tensorflow_beside().rpartition("==")[2]  # of a nightly build, all of it
    built = core.build_info()["tensorflow"].replace("-dev", ".dev")
    assert f"{built}.".startswith(f"{beside}.")


def test_another_tensorflow_than_was_asked_for_is_named():
    line = setup(DICE_OP_TENSORFLOW="1.15")
    assert "DICE_OP_TENSORFLOW is 1.15" in line and "TensorFlow 2." in line


@pytest.mark.parametrize(
    ("name", "version", "beside", "needed"),
    [
        # Its own package writes the name so.
        ("tensorflow_cpu", "2.20.1", "2.20", "tensorflow-cpu==2.20.*"),
        ("tf_nightly", "2.23.0.dev1", "tf-nightly==2.23.0.dev1", "tf-nightly==2.23.0.dev1"),
        ("numpy", "2.0.0", "none", "jaxlib=="),
    ],
)
def test_a_build_is_for_the_tensorflow_that_is_installed(
    name, version, beside, needed, monkeypatch, tmp_path
):
    """This holds in isolation too, where pip hides the packages of the environment."""
    monkeypatch.syspath_prepend(BUILD_TOOLS)
    requirements = importlib.import_module("requirements")
    package = tmp_path / f"{name}-{version}.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda kind: str(tmp_path))
    monkeypatch.setattr(requirements.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    assert requirements.tensorflow_beside() == beside
    (found,) = requirements.of_tensorflow(beside)
    assert found.startswith(needed)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            "echo Cuda compilation tools, release 11.8, V11.8.89",
            "is of CUDA 11.8, but dice_op needs 12",
        ),
        ("exit 1", "nvcc does not run"),
    ],
)
def test_a_cuda_that_cannot_be_used_is_named(says, message, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{says}\n")
    nvcc.chmod(0o755)
    options = ["-DDICE_OP_WITH_TENSORFLOW=OFF", "-DDICE_OP_CUDA=on"]
    status, said = configure(tmp_path / "build", *options, CUDACXX=str(nvcc))
    assert status != 0
    assert message in said


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_the_gpu_check_says_what_is_missing():
    result = run(sys.executable, BUILD_TOOLS / "gpu_check.py")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "GPU" in result.stderr
