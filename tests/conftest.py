import os
import sys
import textwrap

import pytest

# An assertion in there then shows its values when it fails.
pytest.register_assert_rewrite("helpers")
from helpers.processes import output_of  # noqa: E402

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")


@pytest.fixture(scope="session")
def run_python():
    """Runs code in a Python process of its own. Returns what it prints; fails if the code fails."""

    def run(code, *arguments, **environment):
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        return output_of(*command, **environment)

    return run


@pytest.fixture
def operation_by_operation():
    """Losses run operation by operation: compiling takes longer than the one call that a test
    makes."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
