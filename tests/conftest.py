import os
import subprocess
import sys
import textwrap

import pytest

pytest.register_assert_rewrite("helpers")  # so that a failure in there shows the values

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")


@pytest.fixture(scope="session")
def run_python():
    """Runs code in a Python process of its own and returns what it prints; fails if it does."""

    def run(code, *arguments, **environment):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run
