"""Programs that run in a process of their own."""

import contextlib
import fcntl
import os
import subprocess
import sys

from helpers.paths import ROOT


def run(*command, cwd=None, timeout=None, **environment):
    """Waits for a program. Its result has returncode, stdout and stderr; failing is no error here.

    Args:
      environment: variables that it has besides those of this process.
    """
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(*command, timeout=None, **environment):
    """What a program prints. The test fails if the program fails."""
    done = run(*command, timeout=timeout, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def configure(build, *options, **environment):
    """Runs CMake on this repository, and builds nothing. Returns its status and its messages as
    a line."""
    cmake = [sys.executable, "-m", "cmake", "-S", ROOT, "-B", build]
    done = run(*cmake, *options, f"-DPython_EXECUTABLE={sys.executable}", **environment)
    return done.returncode, " ".join(done.stderr.split())


@contextlib.contextmanager
def alone_in(folder):
    """Makes the folder, and lets one process at a time work there; the others wait.

    Tests run in several processes, and what takes long to compile they share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
