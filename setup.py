"""Builds the extension with CMake. Everything else about the package is in pyproject.toml."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
import find_ffi_header  # noqa: E402

LITTLE_SPACE = 100  # MB: if a build fails with less than this left, it has filled the disk
PACKAGES = ("tensorflow-cpu", "tensorflow")  # the same TensorFlow: either will do
NIGHTLIES = ("tf-nightly-cpu", "tf-nightly")  # that of one night, under other names
# What `make wheels` adds to a wheel's version, such as +tf2.21.cpu.
LOCAL_VERSION = os.environ.get("DICE_OP_LOCAL_VERSION", "")


def say(what):
    print(f"dice_op: {what}", file=sys.stderr)


def stop(why):
    sys.exit(f"dice_op: {why}")


def with_tensorflow():
    """Whether this build has the TensorFlow op: if TensorFlow is there, and nobody objects."""
    if os.environ.get("DICE_OP_TENSORFLOW") == "none":
        return False
    return importlib.util.find_spec("tensorflow") is not None


def version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tensorflow_version():
    """The version of the TensorFlow that is installed here, or None."""
    return next(filter(None, map(version_of, PACKAGES + NIGHTLIES)), None)


def is_wanted(found, wanted):
    """Whether a TensorFlow is the one of DICE_OP_TENSORFLOW, a version or a requirement."""
    return found.startswith(f"{wanted}.") or not wanted[:1].isdigit()


def check_requirements():
    """Stops if something is missing without which the build would fail later, and less clearly."""
    if subprocess.run(["sh", ROOT / "build_tools" / "check_compiler.sh"]).returncode:
        sys.exit(1)  # the script has said why
    needs = ("cmake", "ninja", "pybind11")
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    if missing:
        stop(
            f"a build without isolation needs {' and '.join(missing)} in this environment: "
            f"{sys.executable} -m pip install {' '.join(missing)}"
        )
    wanted = os.environ.get("DICE_OP_TENSORFLOW") or "none"
    found = tensorflow_version() if with_tensorflow() else None
    if wanted != "none" and not (found and is_wanted(found, wanted)):
        stop(
            f"DICE_OP_TENSORFLOW is {wanted}, but a build without isolation is for the TensorFlow "
            f"of its environment, and here is {f'TensorFlow {found}' if found else 'none'}: "
            f"{sys.executable} -m pip install tensorflow (or tensorflow-cpu) in another version"
        )
    if not with_tensorflow():
        if importlib.util.find_spec("jaxlib"):
            say("a build without the TensorFlow op: it serves PyTorch, JAX and NumPy")
        else:
            say(
                "a build without the TensorFlow op, and without handlers for JAX, because their "
                "header is that of jaxlib, which is not here: it serves PyTorch and NumPy"
            )


def existing(folder):
    """The folder, or else the one that it will be made in."""
    return next(f for f in (folder, *folder.parents) if os.path.exists(f))


class CMakeBuild(build_ext):
    """Builds with CMake, and installs into the wheel; for an editable install, into dice_op/."""

    def run(self):
        check_requirements()
        import ninja

        in_place = self.inplace or self.editable_mode
        # A build in place keeps its folder, so that the next one is incremental. DICE_OP_BUILD
        # names another folder, which is kept as well.
        build = ROOT / "build" if in_place else Path(self.build_temp).resolve()
        build = Path(os.environ.get("DICE_OP_BUILD", build))
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        for folder in (build, prefix / "dice_op"):
            if not os.access(existing(folder), os.W_OK):
                stop(
                    f"{folder} cannot be written to: copy the source folder, or, for the files of "
                    "the build alone, name another folder in DICE_OP_BUILD"
                )
        cmake = [sys.executable, "-m", "cmake"]  # this environment's, whatever is on PATH
        configure = [
            *("-S", ROOT, "-B", build, "-G", "Ninja", "--log-level=WARNING"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDICE_OP_LOCAL_VERSION={LOCAL_VERSION}",
            f"-DDICE_OP_WITH_TENSORFLOW={'ON' if with_tensorflow() else 'OFF'}",
            f"-DDICE_OP_CUDA={os.environ.get('DICE_OP_CUDA') or 'auto'}",
            f"-DDICE_OP_CUDA_ARCHS={os.environ.get('DICE_OP_CUDA_ARCHS', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        try:
            subprocess.run([*cmake, *configure], check=True)
            subprocess.run([*cmake, "--build", build], check=True)
            subprocess.run(
                [*cmake, "--install", build, "--prefix", prefix],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        except subprocess.CalledProcessError:
            for folder in (build, prefix):
                free = shutil.disk_usage(existing(folder)).free >> 20
                if free < LITTLE_SPACE:
                    stop(f"the build failed as the disk is full: {free} MB are left at {folder}")
            stop("the C++ build failed; its first error is above.")


def tensorflow_extras():
    """A build fits one minor version of TensorFlow: the one in the environment that builds it."""
    version = tensorflow_version() if with_tensorflow() else None
    if not version:
        return {}
    major, minor = map(int, version.split(".")[:2])
    fits = f">={major}.{minor},<{major}.{minor + 1}"
    return {name: [name + fits] for name in PACKAGES}


def other_extras():
    """What dice_op.torch and dice_op.jax need. Any later version will do.

    XLA's handlers need a JAX that is not older than the header they are compiled with. JAX's own
    Pythons begin with 3.11.
    """
    packages = find_ffi_header.PACKAGES if with_tensorflow() else ["jaxlib"]
    oldest = find_ffi_header.oldest_jax(packages)
    jax = {"jax": [f"jax>={oldest}; python_version >= '3.11'"]} if oldest else {}
    return {"torch": ["torch>=2.6"], **jax}


options = {"build": {"build_base": "build/wheel"}}  # CMake has build/ to itself
if LOCAL_VERSION:
    options["egg_info"] = {"tag_build": LOCAL_VERSION}

setup(
    # This makes the wheel one for this Python and platform. CMake knows the sources.
    ext_modules=[Extension("dice_op.core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    extras_require=tensorflow_extras() | other_extras(),
    options=options,
)
