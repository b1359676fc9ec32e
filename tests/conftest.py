import os
import pathlib
import sys
import textwrap

import pytest

# An assertion in there then shows its values when it fails.
pytest.register_assert_rewrite("helpers")
from helpers import record  # noqa: E402
from helpers.paths import BUILD  # noqa: E402
from helpers.processes import output_of  # noqa: E402

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(BUILD / "hypothesis"))


def pytest_addoption(parser):
    parser.addoption("--record", type=pathlib.Path, help="a JSON file for what the tests have seen")


@pytest.fixture
def seen(request):
    """Writes a number that a test has seen into the file of --record, for docs/reliability.md.

    Without that option it does nothing, so a test must assert what it needs before it calls this.
    """
    file = request.config.getoption("--record")

    def write(part, what, value):
        if file is not None:
            record.write(file, part, what, value, request.node.nodeid.partition("[")[0])

    return write


@pytest.fixture(scope="session")
def run_python():
    """Runs code in a Python process of its own. Returns what it prints; fails if the code fails."""

    def run_code(code, *arguments, **environment):
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        return output_of(*command, **environment)

    return run_code


@pytest.fixture
def operation_by_operation():
    """Losses run operation by operation: compiling takes longer than the one call that a test
    makes."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
