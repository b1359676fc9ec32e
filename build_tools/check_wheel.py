"""Tries wheels in new environments, as a user would.

    make check-wheels                    tries all wheels in dist/
    python build_tools/check_wheel.py dist/dice_op-0.1.0+tf2.21.cpu-*.whl

First, it checks the file: its size, contents, tag and licences, and what its libraries need and
export. Second, it installs the wheel with its TensorFlow, and nothing else, into a new virtual
environment. A wheel with CUDA gets two environments: one with tensorflow, one with tensorflow-cpu.
A wheel without TensorFlow gets one with torch alone. Every wheel gets one with the newest jax, and
one with the oldest that it serves, both with keras and without TensorFlow. There, in an empty
folder, it measures how long the import takes, compares values and gradients with double
precision, trains a Keras model with and without XLA, and runs `python -m dice_op info`. Third, it
installs the wheels for other versions of TensorFlow, and checks that their error messages name both
versions.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import typing
import zipfile
from pathlib import Path

from wheels import EXCLUDED, MATRIX, PIP, PLATFORM, ROOT, WORK, interpreter, parsed

MOST_BYTES = 5_000_000
MOST_IMPORT_SECONDS = 0.05
KERNELS = "dice_op_kernels.so"
LIBRARIES = ["dice_op.so", KERNELS, "dice_op_xla.so"]  # a wheel without TensorFlow has the kernels
# Every Linux has these libraries. manylinux allows a few more, but dice_op should not need them.
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s)\.so\.\d+|ld-linux-x86-64\.so\.2")
# Symbols of Python, TensorFlow and dice_op, which are defined in other libraries of the process.
THEIRS = re.compile(r"_?Py|_Z\w*(dice_op|tensorflow|tsl|xla|absl|Eigen|stream_executor)")
# What each library may export: the kernels their API, the others what Python or TensorFlow loads.
EXPORTS = {
    "dice_op.so": r"(?!)",
    KERNELS: r"(vtable for |typeinfo (name )?for )?dice_op::.*",
    "dice_op_xla.so": r"dice_op_xla_refusal",
    "core": r"PyInit_core",
}

# A user adds three of these lines to a Keras script. The rest makes a model and data.
TRAIN = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras
import numpy as np
rng = np.random.default_rng(0)
labels = rng.integers(0, 3, (4, 8, 8, 8)).astype("uint8")
images = np.eye(3)[labels] + 0.3 * rng.standard_normal((4, 8, 8, 8, 3))
for jit_compile in (False, True):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Conv3D(3, 1)])
    import dice_op
    loss = dice_op.losses.DiceLoss()
    model.compile(keras.optimizers.Adam(0.2), loss=loss, jit_compile=jit_compile)
    losses = model.fit(images, labels, epochs=30, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < 0.2 < 0.4 < losses[0], losses
    print(losses[0], losses[-1])
"""

# `of` computes DiceLoss and its gradient. What follows it holds them to double precision.
IN_TENSORFLOW = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
import dice_op

def of(x, y, **options):
    logits = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = dice_op.losses.DiceLoss(**options)(y, logits)
    return float(value), tape.gradient(value, logits).numpy()
"""

IN_TORCH = """
import numpy as np
import torch
import dice_op.torch

def of(x, y, **options):
    logits = torch.tensor(x, requires_grad=True)
    loss = dice_op.torch.DiceLoss(data_format="channels_last", **options)
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, torch.tensor(y))
    value.backward()
    return value.item(), logits.grad.numpy()
"""

IN_JAX = """
import jax
import numpy as np
import dice_op.jax

def of(x, y, **options):
    loss = jax.value_and_grad(dice_op.jax.DiceLoss(**options))
    value, gradient = jax.jit(loss)(x, y)
    values, gradients = jax.vmap(loss)(np.stack([x, x[::-1]]), np.stack([y, y[::-1]]))
    np.testing.assert_allclose(values, value, rtol=1e-6)
    assert np.abs(gradients[1] - gradient[::-1]).max() < 1e-6 * np.abs(gradient).max()
    return float(value), np.asarray(gradient)
"""

VALUES = """
rng = np.random.default_rng(0)
for classes in (2, 3, 14, 104):
    x = 3 * rng.standard_normal((2, 9, 10, 11, classes))
    y = rng.integers(0, classes, x.shape[:-1])

    # The formula of MONAI's documentation, in double precision. A complex x gives a derivative.
    def loss(x):
        e = np.exp(x - x.real.max(-1, keepdims=True))
        p, t = e / e.sum(-1, keepdims=True), np.eye(classes)[y]
        sums = [v.sum((1, 2, 3)) for v in (p * t, p, t)]
        return np.mean(1 - (2 * sums[0] + 1e-5) / (sums[1] + sums[2] + 1e-5))

    smooth = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
    value, gradient = of(x.astype("float32"), y.astype("uint8"), **smooth)
    direction = rng.standard_normal(x.shape)
    along = np.sum(direction * gradient.astype(float))
    wanted = loss(x + 1e-30j * direction).imag / 1e-30
    assert abs(value - loss(x)) < 1e-6 * loss(x), (classes, value, loss(x))
    assert abs(along - wanted) < 1e-4 * abs(wanted), (classes, along, wanted)
"""

NUMERIC = """
for classes in (2, 3, 14, 104):
    small = dice_op.losses.DiceLoss(dtype="float64")
    few, their = tf.constant(rng.standard_normal((1, 1, 2, 2, classes))), np.uint8([[[[0, 1]] * 2]])
    theory, numeric = tf.test.compute_gradient(lambda z: small(their, z), [few], 1e-5)
    off = np.abs(theory[0] - numeric[0]).max() / np.abs(numeric[0]).max()
    assert off < 1e-6, (classes, off)
"""

# How long it takes to import what is ours, where the frameworks are loaded already.
IMPORT_TIME = """
import importlib, os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
ours, *frameworks = sys.argv[1:]
for name in frameworks:
    importlib.import_module(name)
start = time.perf_counter()
importlib.import_module(ours)
print(time.perf_counter() - start)
"""

MISMATCH = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow
try:
    import dice_op.losses
except ImportError as error:
    print(error)
"""


class Trial(typing.NamedTuple):
    """An environment that a wheel is tried in."""

    programs: tuple[str, ...]  # the code that must run there
    imports: tuple[str, ...]  # what of ours is imported, and the frameworks before it
    packages: tuple[str, ...] = ()  # what is installed besides
    environment: dict[str, str] = {}
    extra: str | None = None  # what installs the framework, if it has another name than the trial


IN_KERAS = Trial(
    (IN_TENSORFLOW + VALUES + NUMERIC, TRAIN), ("dice_op.losses", "tensorflow", "keras")
)
IN_JAX_ALONE = Trial(
    (IN_JAX + VALUES, TRAIN), ("dice_op.jax", "jax"), ("keras",), {"KERAS_BACKEND": "jax"}, "jax"
)
# XLA's handlers need a runtime that is not older than the header that they were compiled with.
OLDEST_JAX = "0.7.0"
TRIALS = {  # by the extra that installs the framework
    "tensorflow": IN_KERAS,
    "tensorflow-cpu": IN_KERAS,
    "torch": Trial((IN_TORCH + VALUES,), ("dice_op.torch", "torch")),
    "jax": IN_JAX_ALONE,
    f"jax {OLDEST_JAX}": IN_JAX_ALONE._replace(
        packages=("keras", f"jax=={OLDEST_JAX}", f"jaxlib=={OLDEST_JAX}")
    ),
}


def trials(tensorflow, variant, python):
    """The names of a wheel's trials."""
    if tensorflow == "core":
        first = ("torch",)
    else:
        # A CUDA build must run with both: tensorflow exports symbols of CUDA, tensorflow-cpu none.
        first = ("tensorflow-cpu",) if variant == "cpu" else ("tensorflow", "tensorflow-cpu")
    with_jax = python != "3.10"  # which JAX 0.7 has left behind
    return (*first, *(name for name in TRIALS if with_jax and name.startswith("jax")))


class WheelError(Exception):
    """Something is wrong with a wheel; the message says what."""


def require(condition, what):
    if not condition:
        raise WheelError(what)


def run(command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    require(done.returncode == 0, f"{command[:4]} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_file(wheel, tensorflow, variant):
    """Checks the file without running any of its code."""
    require(
        wheel.stat().st_size < MOST_BYTES, f"{wheel.stat().st_size} bytes, at most {MOST_BYTES}"
    )
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        archive.extractall(folder)
        package = {n.removeprefix("dice_op/") for n in names if n.startswith("dice_op/")}
        binaries = {n for n in package if n.endswith(".so")}
        core = next((n for n in binaries if n.startswith("core.")), "core.*.so")
        libraries = [KERNELS] if tensorflow == "core" else LIBRARIES
        require(binaries == {core, *libraries}, f"its libraries are {sorted(binaries)}")
        source = ROOT / "dice_op"
        sources = {str(p.relative_to(source)) for p in source.rglob("*.py")}
        sources |= {"py.typed", "core.pyi"}
        require(package - binaries == sources, f"its files are {sorted(package)}")
        others = [n for n in names if not n.startswith("dice_op/") and ".dist-info/" not in n]
        require(not others, f"it holds {others}")
        for notice in ("LICENSE", "NOTICE"):
            require(any(n.endswith(f"licenses/{notice}") for n in names), f"{notice} is missing")
        (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        for name in ("tensorflow", "tensorflow-cpu"):
            if tensorflow == "core":
                require(f'extra == "{name}"' not in text, f"{name} in its metadata")
                continue
            minor = int(tensorflow.split(".")[1])
            fits = rf'Requires-Dist: {name}<2.{minor + 1},>={tensorflow}; extra == "{name}"'
            require(fits in text, f"no {fits!r} in its metadata")
        for name in binaries:
            check_library(Path(folder, "dice_op", name), variant)
    platform = wheel.stem.rpartition("-")[2].split(".")
    require(PLATFORM in platform, f"its tag is {platform}, not {PLATFORM}")


def check_library(library, variant):
    dynamic = run(["readelf", "-d", library])
    for needed in re.findall(r"NEEDED.*\[(.*)\]", dynamic):
        known = SYSTEM.fullmatch(needed) or needed in EXCLUDED or needed == KERNELS
        require(known, f"{library.name} needs {needed}")
    paths = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", dynamic)
    require(all(path == "$ORIGIN" for path in paths), f"{library.name} looks in {paths}")
    exports = EXPORTS["core" if library.name.startswith("core.") else library.name]
    symbols = run(["nm", "-D", "--demangle", "--defined-only", library]).splitlines()
    for symbol in (line.split(maxsplit=2)[2] for line in symbols):
        require(re.fullmatch(exports, symbol), f"{library.name} exports {symbol}")
    versions = re.findall(r"GLIBC_(2\.\d+)", run(["objdump", "-T", library]))
    newest = max((int(v.split(".")[1]) for v in versions), default=0)
    require(newest <= int(MATRIX["glibc"].split(".")[1]), f"{library.name} needs glibc 2.{newest}")
    # A library may need symbols of the system, which have a version, and those that THEIRS matches.
    for line in run(["nm", "-D", "--undefined-only", library]).splitlines():
        kind, _, symbol = line.strip().partition(" ")
        known = re.search(r"@(GLIBC|GCC)_", symbol) or THEIRS.match(symbol) or kind in "wv"
        require(known, f"{library.name} needs {symbol}")
    content = library.read_bytes()
    require(f"{ROOT}/".encode() not in content, f"{library.name} names {ROOT}")
    if library.name == KERNELS:
        has = b"nv_fatbin" in content
        require(has == (variant != "cpu"), f"{library.name} has CUDA kernels: {has}")


def check_installed(wheel, name, tensorflow, variant, python, folder):
    """Makes one of TRIALS with the wheel, in a new environment.

    Returns the first words of an install command of its pip, a function that runs code there, the
    framework with its version, and the seconds that an import takes.
    """
    require(interpreter(python), f"this machine has no Python {python} to try it with")
    run([interpreter(python), "-m", "venv", folder / "venv"])
    inside = folder / "venv" / "bin" / "python"
    pip = [inside, *PIP, "install"]
    trial = TRIALS[name]
    extra = trial.extra or name
    run([*pip, f"dice-op[{extra}] @ {wheel.resolve().as_uri()}", *trial.packages])
    empty = folder / "empty"
    empty.mkdir()

    def ask(code, *arguments):
        variables = {**os.environ, **trial.environment}
        return run([inside, "-c", code, *arguments], cwd=empty, env=variables)

    report = json.loads(run([inside, "-m", "dice_op", "info", "--json"], cwd=empty))
    require(report["build_ffi"] == "0.1", f"info: {report}")  # of the group xla_header
    if extra in ("torch", "jax"):
        require(report["tensorflow"] is None, f"info: {report}")
        wanted = name.removeprefix(extra).strip()  # or any version
        require(re.match(wanted or r"\d", report[extra]), f"{extra} is {report[extra]}")
    else:
        require(report["op"].startswith("loaded"), f"the op is {report['op']}")
        require(report["xla"].startswith("loaded"), f"the op in XLA is {report['xla']}")
        require(report["tensorflow"].startswith(tensorflow + "."), f"info: {report}")
    wanted = MATRIX["variants"][variant]
    archs = wanted["archs"].split(",") if "archs" in wanted else []
    require(report["build_cuda_archs"] == archs, f"info: {report}")
    cuda = report["build_cuda"] and report["build_cuda"].split(".")[0]
    require(cuda == wanted.get("cuda"), f"info: {report}")
    for program in trial.programs:
        ask(program)
    seconds = [float(ask(IMPORT_TIME, *trial.imports)) for _ in range(5)]
    version = report[extra.removesuffix("-cpu")]
    return pip, ask, f"{extra} {version}", statistics.median(seconds)


def check_mismatch(others, pip, ask, tensorflow):
    """Installs wheels for other versions of TensorFlow.

    Their error messages must name both versions and say what to install.
    """
    for wheel, built_for in others:
        run([*pip, "--no-deps", "--force-reinstall", wheel])
        words = ask(MISMATCH)
        expected_words = ("has no TensorFlow op",)
        if built_for != "core":
            expected_words = (f"is for TensorFlow {built_for}", f"TensorFlow {tensorflow}.")
        for expected in (*expected_words, "pip install"):
            require(expected in words, f"with {wheel.name}: no {expected!r} in {words!r}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("wheels", nargs="*", type=Path, help="wheels to try (default: dist/*.whl)")
    options = parser.parse_args()
    wheels = options.wheels or sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        sys.exit("check_wheel.py: there is no wheel in dist/; make wheels builds them")
    known = {wheel: parsed(wheel.name) for wheel in wheels}
    for wheel, of in known.items():
        if not of:
            sys.exit(f"check_wheel.py: {wheel} is not named as make wheels names them")
    WORK.mkdir(parents=True, exist_ok=True)
    failed = 0
    for wheel, (tensorflow, variant, python) in known.items():
        others = [
            (other, of)
            for other, (of, its, its_python) in known.items()
            if "core" != tensorflow != of and (its, its_python) == (variant, python)
        ]
        packages = trials(tensorflow, variant, python)
        try:
            check_file(wheel, tensorflow, variant)
            imports, frameworks = [], []
            for package in packages:
                with tempfile.TemporaryDirectory(dir=WORK) as folder:
                    pip, ask, framework, seconds = check_installed(
                        wheel, package, tensorflow, variant, python, Path(folder)
                    )
                    frameworks.append(framework)
                    imports.append(f"{1000 * seconds:.0f} ms")
                    require(seconds < MOST_IMPORT_SECONDS, f"its import takes {imports[-1]}")
                    if package == packages[0]:
                        check_mismatch(others, pip, ask, tensorflow)
        except WheelError as failure:
            failed += 1
            print(f"{wheel.name}: {failure}", flush=True)
            continue
        print(
            f"{wheel.name}: good with {', '.join(frameworks)}; "
            f"{wheel.stat().st_size / 1e6:.2f} MB, import {', '.join(imports)}; "
            f"refused by {len(others)} other TensorFlow version(s)",
            flush=True,
        )
    sys.exit(f"{failed} of {len(wheels)} wheels failed" if failed else 0)


if __name__ == "__main__":
    main()
