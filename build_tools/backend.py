"""setuptools' build backend, which here also asks pip for what pyproject.toml lists for a build.

pip builds in an environment of its own, which holds only what the backend asks for. A build fits
one minor version of TensorFlow. The environment variable DICE_OP_TENSORFLOW chooses it: a version
("2.20"), a requirement ("tensorflow==2.21.0"), or "none" for a build that serves PyTorch, JAX and
NumPy alone. Without it, the TensorFlow that is installed counts, or that there is none. If CUDA
kernels are wanted (DICE_OP_CUDA=on) and the machine has no nvcc, pip installs one.
"""

import os
import shutil

import find_nvcc
import requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def _requirements():
    wanted = os.environ.get("DICE_OP_TENSORFLOW") or requirements.tensorflow_beside()
    needed = requirements.GROUPS["build"] + requirements.of_tensorflow(wanted)
    if os.environ.get("DICE_OP_CUDA") == "on" and not find_nvcc.of_machine():
        needed += requirements.GROUPS["cuda"]
    return needed


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # Files that an earlier build left behind would end up in this wheel.
    shutil.rmtree("build/wheel", ignore_errors=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
