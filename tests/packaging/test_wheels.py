"""The wheels: the matrix, what this machine can build of it, and `make cuda12`."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest

from helpers.paths import BUILD_TOOLS, ROOT
from helpers.processes import output_of

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib


def test_the_matrix_lists_every_wheel():
    listed = output_of(sys.executable, BUILD_TOOLS / "wheels.py", "--list")
    for tensorflow in ("2.19", "2.20", "2.21"):
        for variant in ("cpu", "cu12", "cu13"):
            assert f"tf{tensorflow}.{variant}, Python 3.12" in listed
    assert "core.cpu, Python 3.13" in listed
    # 3 variants for each of 3 + 4 + 4 pairs of TensorFlow and Python, and 4 Pythons without it
    assert len(listed.splitlines()) == 45


def test_the_name_of_a_wheel_says_what_it_is_for(wheels):
    for what in (("2.21", "cu13", "3.12"), ("core", "cpu", "3.10")):
        of = wheels.local_version(*what[:2])
        name = f"dice_op-0.1.0+{of}-cp{what[2].replace('.', '')}-cp312-manylinux_2_17_x86_64.whl"
        assert wheels.parsed(name) == what
    assert wheels.parsed("dice_op-0.1.0-cp312-cp312-linux_x86_64.whl") is None


def test_ci_builds_the_whole_matrix():
    matrix = tomllib.loads((BUILD_TOOLS / "wheels.toml").read_text())
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    assert "python3 build_tools/wheels.py --jobs" in workflow
    jobs = json.loads(output_of(sys.executable, BUILD_TOOLS / "wheels.py", "--jobs"))["include"]
    pythons = set().union(*matrix["python"].values())
    wanted = sorted((variant, python) for variant in matrix["variants"] for python in pythons)
    assert sorted((job["variant"], job["python"]) for job in jobs) == wanted


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(BUILD_TOOLS)
    return importlib.import_module("wheels")


def build_wheels(wheels, monkeypatch, tmp_path, *arguments, fails=()):
    """The wheels that are built, and the exit status, where Python 3.13 and CUDA 12 are missing."""
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


def test_all_wheels_that_were_asked_for_are_built(wheels, monkeypatch, tmp_path, capsys):
    arguments = ("--variant", "cpu", "cu13", "--python", "3.11")
    built, status = build_wheels(wheels, monkeypatch, tmp_path, *arguments)
    assert len(built) == 8 and not status
    assert capsys.readouterr().out.endswith("Built 8 of 8 wheels.\n")


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
    programs = {  # pyenv's program stands for all its versions, and must be told which one.
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
def test_make_cuda12_says_what_the_machine_lacks(programs, message, tmp_path):
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
