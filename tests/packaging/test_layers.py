"""The layers of csrc/: what each folder includes, and what it is compiled with."""

import json
import pathlib
import re
import subprocess

import pytest

from helpers.emulation import CXX, EMULATOR
from helpers.paths import BUILD, CSRC

# What each folder of csrc/ may include besides the standard library.
MAY_INCLUDE = {
    "core": r'"core/[a-z_]+\.h"',
    "cpu": r'"(core|cpu)/[a-z_]+\.h"',
    "cuda": r'"(core|cuda)/[a-z_]+\.h"|"cuda_emulator\.h"|<cuda_[a-z0-9_]+\.h>',
    "tf": r'"core/(dice_op|problem)\.h"|"tf/[a-z_]+\.h"|"tensorflow/.*"|"xla/.*"',
    # This header of XLA's needs no other.
    "xla": r'"core/(dice_op|problem)\.h"|"xla/ffi/api/ffi\.h"',
    "pybind": r'"core/(dice_op|problem)\.h"|"pybind/[a-z_]+\.h"|<pybind11/.*>',
}


SYSTEM_HEADER = r"<(sys/)?[a-z_]+(\.h)?>"


@pytest.mark.parametrize("layer", [p.name for p in sorted(CSRC.iterdir())])
def test_each_layer_includes_only_what_it_may(layer):
    sources = list((CSRC / layer).iterdir())
    assert sources
    # A header in csrc/xla/ would make "xla/..." ambiguous.
    assert layer != "xla" or not [s for s in sources if s.suffix == ".h"]
    for source in sources:
        for header in re.findall(r"^#\s*include (\S+)", source.read_text(), re.MULTILINE):
            allowed = rf"({MAY_INCLUDE[layer]}|{SYSTEM_HEADER})"
            assert re.fullmatch(allowed, header), f"{source.name} includes {header}"
            assert not header.startswith("<cuda") or source.name == "device.h"


@pytest.mark.parametrize("layer", ["core", "cpu", "cuda"])
def test_each_header_can_be_included_alone(layer, tmp_path):
    for header in CSRC.glob(f"{layer}/*.h"):
        source = tmp_path / "alone.cc"
        source.write_text(f'#include "{layer}/{header.name}"\n')
        folders = [f"-I{CSRC}", f"-I{EMULATOR}"]  # The emulator takes the place of CUDA's headers.
        subprocess.run([CXX, "-std=c++17", "-fsyntax-only", *folders, source], check=True)


def test_only_the_op_is_compiled_with_tensorflow():
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    with_tensorflow = {
        pathlib.Path(c["file"]).parent.name
        for c in commands
        if "tensorflow" in c["command"].lower()
    }
    # The core module is told TensorFlow's version, for build_info(), and nothing more.
    # The header of XLA's interface may be jaxlib's.
    includes = {
        pathlib.Path(c["file"]).parent.name
        for c in commands
        if re.search(r"-(I|isystem) ?\S*(tensorflow|jaxlib)", c["command"])
    }
    assert includes == {"tf", "xla"}
    assert with_tensorflow - {"xla"} == {"tf", "pybind"}
