"""What all processors of this machine can do at the moment, and whether others use them."""

import ctypes
import functools
import os
import re
import statistics
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

# Other programs may use the processors too. A measurement is repeated if the processors ran below
# this share of the highest speed in this run, before it or after it.
UNDISTURBED = 0.93
CALIBRATION = 3.0  # seconds
ATTEMPTS = 4
PATIENCE = 5.0  # how many seconds each attempt waits for a quiet moment


def available_memory():
    """Bytes that programs can take before the system has to end one."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1])


@functools.cache
def _limits_library():
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    command = [compiler, "-O3", "-march=native", "-Wno-psabi", "-std=c++17", "-shared", "-fPIC"]
    source = Path(__file__).with_name("limits.cc")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "limits.so"
        subprocess.run([*command, "-pthread", source, "-o", file], check=True)
        library = ctypes.CDLL(str(file))
    library.Seconds.restype = library.ComputeSeconds.restype = ctypes.c_double
    library.Seconds.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


class Machine:
    """Measures what all processors of this process together can do at the moment."""

    def __init__(self):
        self.threads = len(os.sched_getaffinity(0))
        self.fastest = float("inf")
        end = time.perf_counter() + CALIBRATION
        while time.perf_counter() < end:
            self.pace()

    def pace(self, repeats=9):
        """Measures how many seconds a fixed piece of arithmetic takes."""
        compute = _limits_library().ComputeSeconds
        seconds = statistics.median(compute(self.threads) for _ in range(repeats))
        self.fastest = min(self.fastest, seconds)
        return seconds

    def near_its_fastest(self, pace):
        return not disturbed(pace, self.fastest)

    def limits(self, megabytes=256, repeats=9):
        """Measures the bytes per second of reading, and of reading and writing equal amounts."""
        seconds = _limits_library().Seconds
        size = megabytes << 20
        arrays = [np.ones(size + 64, np.uint8) for _ in range(2)]
        source, target = (a.ctypes.data + -a.ctypes.data % 64 for a in arrays)

        def median(to, moved):
            times = (seconds(source, to, size, self.threads) for _ in range(repeats))
            return moved / statistics.median(times)

        return {
            "threads": self.threads,
            "read": median(None, size),
            "copy": median(target, 2 * size),
        }


def bound_of(case, limits):
    """The least seconds for one read for the sums, and one read and one write for the gradient."""
    read = case.logits_bytes + case.labels_bytes
    return read / limits["read"] + (read + case.logits_bytes) / limits["copy"]


def disturbed(pace, fastest):
    """Whether other programs used the processors.

    The same arithmetic took `pace` seconds now, and `fastest` seconds when the machine was quiet.
    """
    return fastest < UNDISTURBED * pace


def undisturbed(machine, measurement):
    """Repeats a measurement until the machine is quiet before it and after it.

    Returns what the measurement returned, with `pace`, the slower of the `Machine`'s paces before
    and after it. If the machine is never quiet, this is the attempt with the fastest pace of the
    machine, whatever its own time. A failure is not repeated.
    """
    best = None
    for _ in range(ATTEMPTS):
        end = time.perf_counter() + PATIENCE
        while not machine.near_its_fastest(before := machine.pace()) and time.perf_counter() < end:
            time.sleep(0.25)
        result = measurement()
        if "failed" in result:
            return best or result
        result["pace"] = max(before, machine.pace())
        if best is None or result["pace"] < best["pace"]:
            best = result
        if machine.near_its_fastest(result["pace"]):
            break
    return best
