"""The compiled libraries: what they hold, what they export, and what they say of their build."""

import ast
import os
import re
import sys

import pytest

from dice_op import core
from helpers.paths import CSRC, PACKAGE, ROOT
from helpers.processes import output_of


def test_binaries_hold_no_path_of_the_machine_that_built_them():
    for library in PACKAGE.glob("*.so"):
        assert os.fsencode(ROOT) not in library.read_bytes(), library.name


def exported(library):
    symbols = output_of("nm", "-D", "--demangle", "--defined-only", PACKAGE / library)
    return {line.split(maxsplit=2)[2] for line in symbols.splitlines()}


@pytest.mark.parametrize(
    ("library", "exports"),
    [
        ("dice_op.so", set()),
        ("dice_op_xla.so", {"dice_op_xla_refusal"}),
    ],
)
def test_the_libraries_export_nothing_else(library, exports):
    """Their symbols must not meet those of another library in the same process."""
    assert {name.partition("(")[0] for name in exported(library)} == exports


HEADERS = ("dice_op.h", "options.h", "problem.h")  # Front ends include them.


def test_the_kernels_export_what_the_headers_declare():
    names = exported("dice_op_kernels.so")
    declared = "".join((CSRC / "core" / f).read_text() for f in HEADERS)
    for name in names:
        last = re.search(r"(\w+)(\[abi:cxx11\])?(\(|$)", name)[1]
        assert "dice_op::" in name and re.search(rf"\b{last}\b", declared), name
    assert len(names) > 20


def test_build_info_tells_how_the_library_was_built():
    info = core.build_info()
    import tensorflow as tf

    assert (
        f'version = "{info["version"].partition("+")[0]}"' in (ROOT / "pyproject.toml").read_text()
    )
    assert set(info) == {
        "version", "tensorflow", "cuda", "cuda_archs", "ffi", "simd_levels", "simd_level",
        "compiler",
    }  # fmt: skip
    assert info["tensorflow"] == tf.__version__
    assert info["simd_level"] in info["simd_levels"]
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert info["compiler"]


def test_the_library_loads_on_its_own(run_python):
    """People load dice_op.so without the package; what it computes is the same."""
    out = run_python(
        """
        import sys
        import tensorflow as tf
        ops = tf.load_op_library(sys.argv[1])
        x, y = tf.zeros((1, 7, 2)), tf.ones((1, 7), tf.uint8)
        print(*ops.dice_sums(x, y, [], activation="softmax", Tsums=tf.float32)[0].numpy()[0])
        """,
        PACKAGE / "dice_op.so",
    )
    assert [float(v) for v in out.split()] == [0, 3.5]


def signatures(stub):
    """The names, arguments and defaults in a stub, without the types, which depend on pybind11's
    version."""
    found = {}
    for node in ast.walk(ast.parse(stub)):
        if isinstance(node, ast.ClassDef):
            found[node.name] = "class"
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            defaults = [*node.args.defaults, *node.args.kw_defaults]
            found[node.name] = (
                [argument.arg for argument in arguments],
                [default and ast.unparse(default) for default in defaults],
            )
    return found


@pytest.mark.skipif(core.build_info()["cuda"] is None, reason="built without CUDA kernels")
def test_the_stub_of_core_is_what_make_stub_writes(tmp_path):
    output_of(sys.executable, "-m", "pybind11_stubgen", "dice_op.core", "--output-dir", tmp_path)
    made = signatures((tmp_path / "dice_op" / "core.pyi").read_text())
    assert {"sums", "gradient", "scores", "DeviceArray", "numpy"} <= set(made)
    assert signatures((PACKAGE / "core.pyi").read_text()) == made
