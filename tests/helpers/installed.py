"""What a test needs that `make test` does not install."""

import importlib.util

import pytest


def needs(module):
    """A mark that skips a test where the module is not installed."""
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: make test-full")
