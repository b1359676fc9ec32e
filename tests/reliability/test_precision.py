"""No sum and no gradient is further off than docs/mathematics.md says, even in the worst case."""

import collections
import json
import sys

import pytest

from dice_op import core
from helpers import emulation, worst_cases
from helpers.paths import TESTS
from helpers.processes import output_of

LEVELS = core.build_info()["simd_levels"]


def check(entries, platform, seen):
    """Every entry is within its bound. Writes down the worst of each sum and dtype."""
    found = collections.defaultdict(list)
    for entry in entries:
        found[entry["what"], entry["dtype"]].append(entry)
    wrong = [e for several in found.values() for e in several if not e["error"] <= e["bound"]]
    assert wrong == [], platform
    assert len(found) == 9 * len(worst_cases.DTYPES)
    for (what, dtype), several in found.items():
        worst = max(several, key=lambda entry: entry["error"])
        nearest = max(several, key=lambda entry: entry["error"] / entry["bound"])
        seen(
            "errors",
            f"{what}, {dtype}, {platform}",
            {
                "largest": float(f"{worst['error']:.3g}"),
                "bound": float(f"{worst['bound']:.3g}"),
                "where": f"{worst['call']}, {worst['case']}, {worst['voxels']} voxels",
                "part of the bound, largest": round(nearest["error"] / nearest["bound"], 3),
            },
        )


def on_cpu(level, divisor):
    program = TESTS / "helpers" / "worst_cases.py"
    at, *lines = output_of(
        sys.executable, program, divisor, DICE_OP_SIMD=level, PYTHONPATH=str(TESTS)
    ).splitlines()
    if json.loads(at) != level:
        pytest.skip(f"this processor has no {level}")
    return map(json.loads, lines)


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS)
def test_errors_are_bounded_up_to_5e8_voxels(level, seen):
    check(on_cpu(level, 1), f"CPU {level}", seen)


@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS)
def test_errors_are_bounded_at_each_level(level):
    check(on_cpu(level, 1000), level, lambda *_: None)


def on_emulator(folder, voxels):
    """The same volumes, and the gradient of small ones, in a call of the kernels for each."""
    program = emulation.build("plain")
    for call, case, dtype in worst_cases.each():
        options = worst_cases.CALLS[call][1]
        options = {"cross_entropy": False, **options}
        arrays, wanted = worst_cases.volume(call, case, dtype, voxels)
        small, coefficients, gradient = worst_cases.gradient_case(call, case, dtype)
        cases = [
            emulation.case(x, y, weight=weight, coefficients=coefficients, **options)
            for x, y, weight in (arrays, small)
        ]
        of_sums, of_gradient = emulation.run(program, cases, folder)
        count = arrays[0].shape[1]
        yield from worst_cases.entries(call, case, dtype, of_sums, wanted, count)
        got = of_gradient["gradient"].astype(float)
        yield worst_cases.gradient_entry(call, case, dtype, got, gradient)


@pytest.mark.long
def test_errors_of_the_cuda_kernels_are_bounded(tmp_path, seen):
    check(on_emulator(tmp_path, 10**5), "CUDA, emulated", seen)


@pytest.mark.full
def test_errors_of_the_cuda_kernels_are_bounded_in_small_volumes(tmp_path):
    check(on_emulator(tmp_path, 10**4), "CUDA, emulated", lambda *_: None)
