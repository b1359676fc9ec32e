"""setuptools' build backend, and TensorFlow and CUDA's compiler among the requirements.

pip builds in an environment of its own that holds nothing but what is asked for here. A build fits
one minor version of TensorFlow, so which one is a choice, by the environment variable
DICE_OP_TENSORFLOW: a version ("2.20") or a requirement ("tensorflow==2.21.0"). Without it:
pyproject.toml's default. Where CUDA kernels are asked for (DICE_OP_CUDA=on) and no nvcc is there,
pip's is used.
"""

import os
import shutil
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib


PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]


def tensorflow_requirements(wanted):
    """What a build for a TensorFlow needs: a version, a requirement, or None for the default."""
    requirements = list(GROUPS["tensorflow"])
    if wanted:
        requirements = [f"tensorflow-cpu=={wanted}.*" if wanted[0].isdigit() else wanted]
    if any("2.19" in requirement for requirement in requirements):
        requirements += GROUPS["tensorflow_2_19"]
    return requirements


def _requirements():
    requirements = tensorflow_requirements(os.environ.get("DICE_OP_TENSORFLOW"))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin")
    if os.environ.get("DICE_OP_CUDA") == "on" and not nvcc:
        requirements += GROUPS["cuda"]
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # What an earlier build left would end up in this wheel.
    shutil.rmtree("build/wheel", ignore_errors=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
