"""Lets CMake build the extension. Everything else about the package is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds with CMake and installs into the wheel, or for an editable install into dice_op/."""

    def run(self):
        import ninja

        in_place = self.inplace or self.editable_mode
        # In place: kept, so that the next build is incremental.
        build = ROOT / "build" if in_place else Path(self.build_temp).resolve()
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        cmake = [sys.executable, "-m", "cmake"]  # those of this environment, whatever PATH says
        configure = [
            *("-S", ROOT, "-B", build, "-G", "Ninja", "--log-level=WARNING"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
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
            sys.exit("dice_op: the C++ build failed; its first error is above.")


def tensorflow_extras():
    """A build fits one minor version of TensorFlow: that of the environment it is built in."""
    for name in ("tensorflow-cpu", "tensorflow"):
        try:
            major, minor = map(int, metadata.version(name).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
        fits = f">={major}.{minor},<{major}.{minor + 1}"
        return {extra: [extra + fits] for extra in ("tensorflow", "tensorflow-cpu")}
    return {}


setup(
    # Named only so that the wheel is one for this Python and platform: CMake knows the sources.
    ext_modules=[Extension("dice_op.core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    extras_require=tensorflow_extras(),
    options={"build": {"build_base": "build/wheel"}},  # out of the way of CMake's build/
)
