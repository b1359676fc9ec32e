"""What nvcc made of the CUDA kernels, as the toolkit's programs read it from a library."""

import os
import pathlib
import re
import shutil
import sys

import pytest

from dice_op import core
from helpers.paths import PACKAGE
from helpers.processes import output_of

LIBRARY = PACKAGE / "dice_op_kernels.so"
ARCHS = [arch.removesuffix("+PTX") for arch in core.build_info()["cuda_archs"]]
needs_cuda = pytest.mark.skipif(
    not ARCHS, reason="built without CUDA kernels: DICE_OP_CUDA=on asks for them"
)


def tool(name):
    """A program of the toolkit, or of the packages in pyproject.toml's test group."""
    for folder in sys.path:
        for found in sorted(pathlib.Path(folder).glob(f"nvidia/cu*/bin/{name}")):
            return found
    return shutil.which(name) or pytest.fail(f"{name} is missing: pip install nvidia-cuda-{name}")


def dump(*arguments):
    """cuobjdump's output, split by architecture and function: {(arch, function): text}."""
    path = f"{pathlib.Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"
    text = output_of(tool("cuobjdump"), *arguments, PATH=path)
    functions, arch, function = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch, function = match[1], None
        elif match := re.match(r"\s*Function\s*:?\s*(\w+)", line):
            function = match[1]
            functions[arch, function] = ""
        elif function:
            functions[arch, function] += line + "\n"
    return functions


def budget(function):
    """How many registers a thread may have, as each access to voxels in csrc/cuda states."""
    if match := re.search(r"DirectI.*?Li\d+ELb([01])E", function):
        planar = match[1] == "1"
        return (80 if planar else 64) if "DirectIf" in function else (128 if planar else 80)
    if match := re.search(r"(?:Rows|Staged)I.*?Li(\d+)E", function):
        return 128 if int(match[1]) > 8 else 96
    return 255 if "GeneralId" in function else 168 if "GeneralIfLb1ELi8E" in function else 128
