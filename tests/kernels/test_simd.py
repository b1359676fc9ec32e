"""All of test_core.py passes with every instruction set that the processor has.

The objects that are compiled for each of them are looked at as well.
"""

import json
import re
import shlex
import sys

import pytest

from dice_op import core
from helpers.installed import has_level
from helpers.paths import BUILD, CSRC, TESTS
from helpers.processes import output_of, run

LEVELS = core.build_info()["simd_levels"]


def run_at(level, *arguments):
    # With MALLOC_PERTURB_, memory that is freed does not keep what it held.
    return run(sys.executable, *arguments, DICE_OP_SIMD=level, MALLOC_PERTURB_="165")


@pytest.mark.parametrize("level", LEVELS)
def test_the_kernels_are_right_at_each_level(level):
    if not has_level(level):
        pytest.skip(f"this processor has no {level}")
    if level == core.build_info()["simd_level"]:
        pytest.skip("test_core.py ran at this level already")
    result = run_at(level, "-m", "pytest", "-q", "-x", str(TESTS / "kernels" / "test_core.py"))
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_level_is_the_best_one_and_warns_once():
    code = "from dice_op import core; print(core.build_info()['simd_level'])"
    unknown, unset = run_at("sse9", "-c", code), run_at("", "-c", code)
    assert unknown.stdout == unset.stdout
    warning = f"DICE_OP_SIMD is 'sse9', but must be one of {', '.join(LEVELS)}"
    assert unknown.stderr.count(warning) == 1 and "DICE_OP_SIMD" not in unset.stderr
    for level in LEVELS:
        assert "DICE_OP_SIMD" not in run_at(level, "-c", code).stderr


@pytest.mark.parametrize("level", LEVELS)
def test_an_object_exports_its_table_and_nothing_else(level):
    """Inline functions with external linkage would be merged across levels by the linker, and the
    copy that is kept might need an instruction that the processor lacks."""
    target = f"dice_op_cpu_{level}".replace("-", "_")
    objects = list(BUILD.glob(f"CMakeFiles/{target}.dir/**/kernels.cc.o"))
    if not objects:
        pytest.skip("not built from this checkout")
    symbols = output_of("nm", "--demangle", "--defined-only", "--extern-only", objects[0])
    defined = [line.split(maxsplit=2)[1:] for line in symbols.splitlines()]
    # DW.ref.* is a pointer to the unwinder's entry, and the same in every object.
    defined = [(kind, name) for kind, name in defined if not name.startswith("DW.ref.")]
    assert len(defined) == 1, defined
    assert defined[0][1].startswith("dice_op::cpu::k")


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "portable"])
def test_the_processor_is_asked_for_every_instruction_set_that_the_compiler_may_use(level):
    if not (BUILD / "compile_commands.json").exists():
        pytest.skip("not built from this checkout")
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    (command,) = (c["command"] for c in commands if f'DICE_OP_LEVEL=\\"{level}\\"' in c["command"])
    flags = {w[2:] for w in shlex.split(command) if w.startswith("-m") and "=" not in w}
    source = (CSRC / "cpu" / "dice_op_cpu.cc").read_text()
    questions = {
        table: {
            name.lower() for name in re.findall(r'(?:__builtin_cpu_supports\("|\bHas)(\w+)', body)
        }
        for table, body in re.findall(r"if \(&kernels == &(\w+)\) \{(.*?);\n", source, re.DOTALL)
    }
    asked = questions["kX86V3"]
    if level == "x86-64-v4":
        asked = asked | questions["kX86V4"]  # whose answer begins with v3's
    assert asked == flags and len(flags) > 3
