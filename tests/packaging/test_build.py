"""The package around the kernels: layers, loading, what the binaries hold, `python -m dice_op`."""

import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from dice_op import _gpu, core
from helpers.paths import BUILD, BUILD_TOOLS, CSRC, PACKAGE, ROOT

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

# What each folder of csrc/ may include besides the standard library.
MAY_INCLUDE = {
    "core": r'"core/[a-z_]+\.h"',
    "cpu": r'"(core|cpu)/[a-z_]+\.h"',
    "cuda": r'"(core|cuda)/[a-z_]+\.h"|"cuda_emulator\.h"|<cuda_[a-z0-9_]+\.h>',
    "tf": r'"core/(dice_op|problem)\.h"|"tf/[a-z_]+\.h"|"tensorflow/.*"|"xla/.*"',
    "xla": r'"core/(dice_op|problem)\.h"|"xla/ffi/api/ffi\.h"',  # XLA's, and it stands alone
    "pybind": r'"core/(dice_op|problem)\.h"|"pybind/[a-z_]+\.h"|<pybind11/.*>',
}
SYSTEM_HEADER = r"<(sys/)?[a-z_]+(\.h)?>"


@pytest.mark.parametrize("layer", [p.name for p in sorted((CSRC).iterdir())])
def test_layers(layer):
    sources = list((CSRC / layer).iterdir())
    assert sources
    # or "xla/..." would be ambiguous
    assert layer != "xla" or not [s for s in sources if s.suffix == ".h"]
    for source in sources:
        for header in re.findall(r"^#\s*include (\S+)", source.read_text(), re.MULTILINE):
            allowed = rf"({MAY_INCLUDE[layer]}|{SYSTEM_HEADER})"
            assert re.fullmatch(allowed, header), f"{source.name} includes {header}"


def test_only_the_op_is_compiled_with_tensorflow():
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    with_tensorflow = {
        pathlib.Path(c["file"]).parent.name
        for c in commands
        if "tensorflow" in c["command"].lower()
    }
    # core's module is told TensorFlow's version, for build_info(), and nothing more
    includes = {
        pathlib.Path(c["file"]).parent.name
        for c in commands
        if re.search(r"-(I|isystem) ?\S*tensorflow", c["command"])
    }
    assert includes == {"tf", "xla"}
    assert with_tensorflow == {"tf", "xla", "pybind"}


def test_configures_where_there_is_no_tensorflow(tmp_path):
    blocked = tmp_path / "path" / "tensorflow"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('no TensorFlow here')")

    def configure(*options):
        command = [sys.executable, "-m", "cmake", "-S", ROOT, "-B", tmp_path / "build", *options]
        return subprocess.run(
            [*command, f"-DPython_EXECUTABLE={sys.executable}"],
            env={**os.environ, "PYTHONPATH": str(blocked.parent)},
            capture_output=True,
            text=True,
        )

    without = configure("-DDICE_OP_WITH_TENSORFLOW=OFF")
    assert without.returncode == 0, without.stderr
    asked_for = configure("-DDICE_OP_WITH_TENSORFLOW=ON")
    assert asked_for.returncode != 0
    message = " ".join(asked_for.stderr.split())
    assert "pip install tensorflow-cpu" in message
    assert "-DDICE_OP_WITH_TENSORFLOW=OFF" in message


def test_binaries_hold_no_path_of_the_machine_that_built_them():
    for library in PACKAGE.glob("*.so"):
        assert os.fsencode(ROOT) not in library.read_bytes(), library.name


def exported(library):
    symbols = subprocess.run(
        ["nm", "-D", "--demangle", "--defined-only", PACKAGE / library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {line.split(maxsplit=2)[2] for line in symbols.splitlines()}


@pytest.mark.parametrize(
    ("library", "exports"),
    [
        ("dice_op.so", set()),
        ("dice_op_xla.so", {"dice_op_xla_refusal"}),
    ],
)
def test_the_libraries_export_nothing_else(library, exports):
    """Their symbols must not meet those of another library in the same process."""
    assert {name.partition("(")[0] for name in exported(library)} == exports


def test_the_kernels_export_what_the_headers_declare():
    names = exported("dice_op_kernels.so")
    declared = "".join((CSRC / "core" / f).read_text() for f in ("dice_op.h", "problem.h"))
    for name in names:
        last = re.search(r"(\w+)(\[abi:cxx11\])?(\(|$)", name)[1]
        assert "dice_op::" in name and re.search(rf"\b{last}\b", declared), name
    assert len(names) > 20


def test_build_info():
    info = core.build_info()
    import tensorflow as tf

    assert (
        f'version = "{info["version"].partition("+")[0]}"' in (ROOT / "pyproject.toml").read_text()
    )
    assert info["tensorflow"] == tf.__version__
    assert info["simd_level"] in info["simd_levels"]
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert info["compiler"]


def test_importing_the_package_imports_no_tensorflow(run_python):
    loaded = run_python(
        """
        import sys
        import numpy as np
        import dice_op
        dice_op.core.sums(np.zeros((1, 5, 3), np.float32), np.zeros((1, 5), np.uint8))
        print("tensorflow" in sys.modules, "keras" in sys.modules)
        """
    )
    assert loaded.split() == ["False", "False"]


def test_the_library_loads_on_its_own(run_python):
    """People load dice_op.so without the package; what it computes is the same."""
    out = run_python(
        """
        import sys
        import tensorflow as tf
        ops = tf.load_op_library(sys.argv[1])
        x, y = tf.zeros((1, 7, 2)), tf.ones((1, 7), tf.uint8)
        print(*ops.dice_sums(x, y, [], activation="softmax", Tsums=tf.float32)[0].numpy()[0])
        """,
        PACKAGE / "dice_op.so",
    )
    assert [float(v) for v in out.split()] == [0, 3.5]


@pytest.mark.parametrize("built", ["2.20.0", "3.0.1", ""])
def test_another_tensorflow_is_named(built, run_python):
    """Both versions and the command that mends it. The build is made to look like another one's."""
    out = run_python(
        f"""
        from dice_op import core
        info = {{**core.build_info(), "tensorflow": {built or None!r}}}
        core.build_info = lambda: info
        import tensorflow as tf
        try:
            import dice_op.losses
        except ImportError as error:
            print(tf.__version__, error)
        """
    )
    running, _, message = out.partition(" ")
    if not built:
        assert "has no TensorFlow op" in message and "pip install" in message
        return
    assert f"built with {built}" in message and f"TensorFlow {running} is running" in message
    assert re.search(rf'pip install "tensorflow(-cpu)?=={built.rpartition(".")[0]}\.\*"', message)
    assert f"DICE_OP_TENSORFLOW={running.rpartition('.')[0]} pip install" in message


def test_a_source_folder_that_is_not_built(tmp_path, run_python):
    folder = tmp_path / "dice_op"
    folder.mkdir()
    (folder / "__init__.py").write_text((PACKAGE / "__init__.py").read_text())
    out = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        try:
            import dice_op
        except ImportError as error:
            print(error)
        """,
        tmp_path,
    )
    assert str(folder) in out and "run `make build`" in out


def run_info(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dice_op", *arguments], capture_output=True, text=True
    )


def test_info():
    report = json.loads(run_info("info", "--json").stdout)
    info = core.build_info()
    assert report["version"] == info["version"]
    assert report["tensorflow"] == report["build_tensorflow"] == info["tensorflow"]
    assert report["op"].startswith("loaded from ")
    assert report["xla"] == f"loaded from {PACKAGE / 'dice_op_xla.so'}"
    assert report["simd_level"] == info["simd_level"]
    text = run_info("info").stdout
    for key in report:
        assert re.search(rf"^{key} +\S", text, re.MULTILINE), key
    assert run_info().returncode == 2  # no command: usage


def test_info_without_tensorflow(run_python):
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


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_the_gpu_check_says_what_is_missing():
    check = [sys.executable, BUILD_TOOLS / "gpu_check.py"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "GPU" in result.stderr


# --- building from source, and what is missing then -----------------------------------------------


def setup(*before, **variables):
    """What `setup.py build_ext` says, in one line, where it cannot even begin."""
    code = "; ".join((*before, "import runpy, sys", "sys.argv[1:] = ['--quiet', 'build_ext']"))
    done = subprocess.run(
        [sys.executable, "-c", code + "; runpy.run_path('setup.py', run_name='__main__')"],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "dice_op:" in line]
    return line


def without(*modules):
    return (
        "import importlib.util as u; real = u.find_spec; "
        f"u.find_spec = lambda name, *a: None if name in {modules!r} else real(name, *a)"
    )


def test_a_build_names_what_is_missing():
    assert "compiler CXX=/no/compiler does not exist" in setup(CXX="/no/compiler")
    assert "pip install cmake ninja" in setup(without("cmake", "ninja"))
    assert "pip install tensorflow" in setup(without("tensorflow"))


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
def test_a_cuda_that_does_not_do_is_named(says, message, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{says}\n")
    nvcc.chmod(0o755)
    command = [sys.executable, "-m", "cmake", "-S", ROOT, "-B", tmp_path / "build"]
    options = ["-DDICE_OP_WITH_TENSORFLOW=OFF", "-DDICE_OP_CUDA=on"]
    done = subprocess.run(
        [*command, *options, f"-DPython_EXECUTABLE={sys.executable}"],
        env={**os.environ, "CUDACXX": str(nvcc)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_the_matrix_of_wheels():
    listed = subprocess.run(
        [sys.executable, BUILD_TOOLS / "wheels.py", "--list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for tensorflow in ("2.19", "2.20", "2.21"):
        for variant in ("cpu", "cu12", "cu13"):
            assert f"tf{tensorflow}.{variant}, Python 3.12" in listed
    assert len(listed.splitlines()) == 33  # 3 variants of 3 + 4 + 4


def test_ci_builds_the_whole_matrix():
    matrix = tomllib.loads((BUILD_TOOLS / "wheels.toml").read_text())
    job = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    pythons, variants = (
        re.search(rf"^ +{axis}: \[(.*)\]$", job, re.MULTILINE)[1].split(", ")
        for axis in ("python", "variant")
    )
    assert set(variants) == set(matrix["variants"])
    assert {python.strip('"') for python in pythons} == set().union(*matrix["python"].values())


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(BUILD_TOOLS)
    return importlib.import_module("wheels")


def build_wheels(wheels, monkeypatch, tmp_path, *arguments, fails=()):
    """What is built, and the exit status, where Python 3.13 and CUDA 12 are missing."""
    built = []

    def build(tensorflow, variant, python, to):
        if (tensorflow, variant, python) in fails:
            raise wheels.BuildError("no space left")
        built.append((tensorflow, variant, python))
        wheel = to / "a.whl"
        wheel.touch()
        return wheel

    monkeypatch.setattr(wheels, "build", build)
    monkeypatch.setattr(wheels, "interpreter", lambda python: python != "3.13")
    monkeypatch.setattr(wheels, "nvcc", lambda version: version != "12")
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--to", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        wheels.main()
    return built, end.value.code


def test_wheels_that_cannot_be_built_do_not_stop_the_others(wheels, monkeypatch, tmp_path, capsys):
    built, status = build_wheels(
        wheels,
        monkeypatch,
        tmp_path,
        *("--tensorflow", "2.20", "2.21", "--python", "3.12", "3.13"),
        fails=[("2.20", "cpu", "3.12")],
    )
    words = capsys.readouterr().out
    assert built == [("2.21", "cpu", "3.12"), ("2.20", "cu13", "3.12"), ("2.21", "cu13", "3.12")]
    assert status == 1
    for wheel, lacks in (
        ("tf2.20.cpu, Python 3.13", "no Python 3.13"),
        ("tf2.20.cu12, Python 3.12", "no nvcc of CUDA 12"),
        ("tf2.21.cu12, Python 3.13", "no Python 3.13 and no nvcc of CUDA 12"),
    ):
        assert f"{wheel}: left out, this machine has {lacks}\n" in words
    assert "no space left\ntf2.20.cpu, Python 3.12: failed" in words
    summary = words[words.index("Built 3 of 12 wheels.") :]
    assert re.search(r"Left out 6, .* no Python 3\.13\. .* uv python install 3\.13", summary)
    assert re.search(r"Left out 4, .* no nvcc of CUDA 12\. .* make cuda12, or CUDACXX_12=", summary)
    assert summary.endswith("\nFailed: tf2.20.cpu, Python 3.12\n")


def test_all_wheels_that_were_asked_for(wheels, monkeypatch, tmp_path, capsys):
    arguments = ("--variant", "cpu", "cu13", "--python", "3.11")
    built, status = build_wheels(wheels, monkeypatch, tmp_path, *arguments)
    assert len(built) == 6 and not status
    assert capsys.readouterr().out.endswith("Built 6 of 6 wheels.\n")


def program(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


def test_the_nvcc_of_make_cuda12_is_found(wheels, monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(program(tmp_path / "nvcc", "echo release 13.0").parent))
    for name in ("CUDACXX_12", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert wheels.nvcc("12") is None
    made = program(tmp_path / "build" / "cuda12" / "bin" / "nvcc", "echo release 12.4")
    assert wheels.nvcc("12") == made
    named = program(tmp_path / "named", "echo release 12.9")
    monkeypatch.setenv("CUDACXX_12", str(named))
    assert wheels.nvcc("12") == str(named)


@pytest.mark.parametrize("name", ["python3.99", "uv", None])
def test_a_python_of_pyenv_or_uv_is_found(name, wheels, monkeypatch, tmp_path):
    found = program(tmp_path / "found", "echo 3.99 $0")
    programs = {  # pyenv's stands for all its versions, and wants to be told which
        "python3.99": f'[ "$PYENV_VERSION" = 3.99 ] && exec {found}',
        "uv": f'[ "$1 $2 $4" = "python find 3.99" ] && echo {found}',
    }
    if name:
        program(tmp_path / "path" / name, programs[name])
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert wheels.interpreter.__wrapped__("3.99") == (str(found) if name else None)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ((), "this is no Debian: apt-get and dpkg-deb"),
        (("apt-get", "dpkg-deb"), "apt cannot fetch Debian trixie's nvidia-cuda-toolkit"),
    ],
)
def test_a_machine_that_make_cuda12_cannot_help(programs, message, tmp_path):
    script = tmp_path / "build_tools" / "cuda12.sh"
    script.parent.mkdir()
    shutil.copy(BUILD_TOOLS / "cuda12.sh", script)
    path = tmp_path / "path"
    path.mkdir()
    for name in ("cat", "dirname", "mkdir", "rm", "sed", "sort"):
        (path / name).symlink_to(shutil.which(name))
    for name in programs:
        program(path / name, "exit 100")
    done = subprocess.run(
        [shutil.which("sh"), script], env={"PATH": str(path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line and "CUDACXX_12=" in line
    assert not list(tmp_path.glob("build/cuda12*/"))


# --- GPUs, and whether a build has code for them --------------------------------------------------


@pytest.mark.parametrize(
    ("archs", "capability", "portable", "covered"),
    [
        ("75,80,90", (7, 5), True, True),
        ("75,80,90", (8, 9), False, True),  # a later minor of 8.0
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
def test_which_gpus_code_runs_on(archs, capability, portable, covered):
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
        # Blackwell: the wheel of CUDA 12 has no code for it
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
def test_what_a_build_says_about_the_gpus(cuda, archs, driver, gpus, says, monkeypatch):
    def problem():
        found = _gpu.Machine("1.2", driver, tuple(gpus))
        return _gpu.problem(cuda, archs.split(",") if archs else [], found)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert problem() is None if says is None else re.search(says, problem()), problem()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of two, perhaps the one that is covered
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


def test_a_gpu_that_the_build_has_no_code_for(tmp_path):
    """With a library in the driver's place: `info` says so, and so does the loader, once."""
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "nvml.c", "-o", library], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, check=True
        )

    report = json.loads(run("-m", "dice_op", "info", "--json").stdout)
    assert report["driver"] == "535.183.01 (CUDA 13.1)"
    assert report["gpus"] == ["A (compute capability 7.0)", "B (compute capability 9.0)"]
    reason = "no kernels for GPUs" if report["build_cuda"] is None else "7.5 and later, not for A"
    assert reason in report["gpu_kernels"]
    code = """
        import tensorflow as tf
        tf.test.is_built_with_cuda = lambda: {}
        import dice_op.losses, dice_op.metrics
    """
    warned = run("-c", textwrap.dedent(code).format(True)).stderr
    assert warned.count("RuntimeWarning") == 1 and report["gpu_kernels"] in warned
    # a TensorFlow without GPUs leaves them idle anyway
    assert "RuntimeWarning" not in run("-c", textwrap.dedent(code).format(False)).stderr
