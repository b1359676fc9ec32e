"""What each CUDA kernel can reach at most, as its machine code says, does not fall.

benchmarks/gpu/bounds.py counts the instructions, and `make bounds` writes the record.
"""

import functools
import json
import re

import pytest

from benchmarks.gpu import bounds
from helpers import emulation, launches
from helpers.launches import DEVICES, room, usages
from helpers.machine_code import ARCHS, needs_cuda

RECORD = json.loads(bounds.RECORD.read_text())


@functools.cache
def codes():
    """The machine code of every kernel for the GPUs of the record: {(arch, symbol): text}."""
    archs = {gpu.arch for gpu in bounds.GPUS.values()} & set(ARCHS)
    if not archs:
        pytest.skip("no code for the GPUs of the record: DICE_OP_CUDA_ARCHS=80,90 asks for it")
    return launches.codes(archs)


def flat(tables):
    """The bounds by what they are of: {(table, GPU, dtype, classes, part): fraction}."""
    return {
        (table, gpu, dtype, int(classes), part): fraction
        for table in ("gpus", "channels_first")
        for gpu, dtypes in tables[table].items()
        for dtype, rows in dtypes.items()
        for classes, row in rows.items()
        for part, fraction in row.items()
    }


def fallen(tables):
    """What is lower than in the record, by more than another version of nvcc makes of it."""
    recorded = flat(RECORD)
    return {what: bound for what, bound in flat(tables).items() if bound < recorded[what] - 0.02}


@needs_cuda
def test_no_bound_is_below_the_record():
    found = bounds.calculate(codes(), emulation.plans(), usages(), DEVICES, room)
    assert fallen(found) == {}
    compiled = {name for name, gpu in bounds.GPUS.items() if gpu.arch in ARCHS}
    assert set(flat(found)) == {what for what in flat(RECORD) if what[1] in compiled}


# Percent of the memory's rate, without cross-entropy. One kernel serves the odd numbers of classes
# from 9 to 15, and reaches less.
@pytest.mark.parametrize(
    ("gpu", "dtypes", "classes", "least"),
    [
        ("H100", ["bfloat16", "float16"], [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32, 104], 95),
        ("H200", ["bfloat16", "float16"], [1, 2, 4, 8, 14, 16], 90),
        ("H200", ["bfloat16", "float16"], [3, 5, 32, 104], 80),
        ("H200", ["float32"], [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32, 104], 95),
    ],
)
def test_the_record_holds_what_is_promised(gpu, dtypes, classes, least):
    recorded = flat(RECORD)
    for dtype in dtypes:
        for count in classes:
            for part in ("sums", "gradient"):
                bound = recorded["gpus", gpu, dtype, count, part]
                assert 100 * bound >= least, (dtype, count, part)


def test_the_tables_are_those_of_the_record():
    for dtypes in RECORD["gpus"].values():
        assert dtypes["bfloat16"] == dtypes["float16"]  # They share a table.
    assert bounds.RECORD.with_suffix(".md").read_text() == bounds.as_markdown(RECORD)


# --- these checks can fail ------------------------------------------------------------------------


def kernel_of(pattern):
    ((arch, symbol), *_) = (key for key in codes() if re.search(pattern, key[1]))
    return bounds.Kernel.of(symbol), codes()[arch, symbol]


@needs_cuda
@pytest.mark.parametrize(
    ("pattern", "classes"),
    [
        (r"SumsKernel.*DirectI\w+AnyFloat16ELi4ELb0E.*ModeE0", 4),
        (r"GradKernel.*RowsI\w+AnyFloat16ELi14ELb0E", 14),
        (r"SumsKernel.*StagedI\w+AnyFloat16ELi14ELi8E", 104),
    ],
)
def test_a_loop_that_takes_more_instructions_has_a_lower_bound(pattern, classes):
    kernel, code = kernel_of(pattern)
    more = re.sub(r"^(\s+/\*[0-9a-f]+\*/\s+FFMA .*)$", r"\1\n\1\n\1", code, flags=re.MULTILINE)
    costs = [bounds.cost_of_tile(text, kernel, classes) for text in (code, more)]
    reached = [bounds.reach(kernel, classes, cost, bounds.GPUS["H200"], 16) for cost in costs]
    assert costs[1]["FMA"] > 1.3 * costs[0]["FMA"]
    assert costs[1]["issue"] > costs[0]["issue"] and reached[1]["issue"] <= reached[0]["issue"]
    assert costs[1]["MUFU"] == costs[0]["MUFU"]


@needs_cuda
def test_a_loop_that_does_not_do_the_work_is_refused():
    kernel, code = kernel_of(r"SumsKernel.*DirectI\w+AnyFloat16ELi4ELb0E.*ModeE0")
    with pytest.raises(ValueError, match="not the one of a tile"):
        bounds.cost_of_tile(code.replace("MUFU.EX2", "MUFU.SQRT"), kernel, 4)


def test_a_bound_that_has_fallen_is_named():
    lower = json.loads(json.dumps(RECORD))
    lower["gpus"]["H200"]["bfloat16"]["4"]["sums"] -= 0.03
    assert list(fallen(lower)) == [("gpus", "H200", "bfloat16", 4, "sums")]


def test_few_bytes_on_their_way_bind():
    kernel = bounds.Kernel("sums", "Direct", ("float32",), (4, 0), "Softmax", 0)
    cost = dict.fromkeys(("issue", "ALU", "FMA", "IMAD", "MUFU", "L1"), 1)
    few, many = (bounds.reach(kernel, 4, cost, bounds.GPUS["H200"], warps) for warps in (2, 32))
    assert min(few, key=few.get) == "latency" and few["latency"] < 1 == many["latency"]
