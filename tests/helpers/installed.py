"""What a test needs that may not be here: a package, or an instruction set."""

import importlib.util
import sys

import pytest

from helpers.processes import output_of


def has(module):
    return importlib.util.find_spec(module) is not None


def needs(module):
    """A mark that skips a test where the module is not installed."""
    reason = f"{module} is not installed: make test-full"
    return pytest.mark.skipif(not has(module), reason=reason)


def has_level(level):
    """Whether this processor has the instruction set of a SIMD level."""
    code = "from dice_op import core; print(core.build_info()['simd_level'])"
    return output_of(sys.executable, "-c", code, DICE_OP_SIMD=level).strip() == level
