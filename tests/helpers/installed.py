"""What a test needs that may not be here: a package, or an instruction set."""

import importlib.util
import sys

import pytest

from helpers.processes import output_of


def has(module):
    return importlib.util.find_spec(module) is not None


def needs(*modules):
    """A mark that skips a test where one of the modules is not installed."""
    lacking = [module for module in modules if not has(module)]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {lacking}; make test-full")


def has_level(level):
    """Whether this processor has the instruction set of a SIMD level."""
    code = "from dice_op import core; print(core.build_info()['simd_level'])"
    return output_of(sys.executable, "-c", code, DICE_OP_SIMD=level).strip() == level
