"""No input crashes the entry points for CPUs, reads beyond an array, or gives other bits when the
work is cut in another way. fuzz_entry_points.cc makes calls of bytes, under sanitizers."""

import os
import re

import pytest

from dice_op import core
from helpers import entry_points
from helpers.installed import has_level

LEVELS = core.build_info()["simd_levels"]
SECONDS = int(os.environ.get("DICE_OP_FUZZ_SECONDS", 600))


def level_or_skip(level):
    if not has_level(level):
        pytest.skip(f"this processor has no {level}")


@pytest.mark.parametrize(
    ("count", "seed"),
    [
        pytest.param(100_000, 1, marks=pytest.mark.full),
        pytest.param(2_000_000, 2, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_random_inputs_find_nothing(level, count, seed, seen):
    level_or_skip(level)
    program = entry_points.build(libfuzzer=False)
    fine, said = entry_points.run_program(program, level, count, seed)
    assert fine, said[-5000:]
    assert f"{count} inputs at {level}" in said
    seen("fuzzing", f"random inputs of the entry points, {level}", count)


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS)
def test_libfuzzer_finds_nothing(level, seen):
    level_or_skip(level)
    if not entry_points.has_libfuzzer():
        pytest.skip("there is no clang++ with libFuzzer (Debian, Ubuntu: apt install clang)")
    program = entry_points.build(libfuzzer=True)
    corpus = entry_points.FOLDER / "corpus"
    corpus.mkdir(exist_ok=True)
    options = ["-max_len=300", "-len_control=0", "-print_final_stats=1"]
    seconds = max(1, SECONDS // len(LEVELS))
    fine, said = entry_points.run_program(
        program, level, corpus, *options, f"-max_total_time={seconds}"
    )
    assert fine, said[-5000:]
    inputs = int(re.search(r"number_of_executed_units: (\d+)", said)[1])
    coverage = int(re.findall(r"cov: (\d+)", said)[-1])
    print(f"{inputs} inputs in {seconds} s at {level}, {coverage} edges of code reached")
    assert inputs > 0
    seen("fuzzing", f"inputs that libFuzzer made, {level}", inputs)
    seen("fuzzing", f"edges of code that libFuzzer reached, {level}", coverage)
