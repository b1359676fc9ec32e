"""Measures a contender's time and memory on a case, and the limits of the machine.

    python -m benchmarks.measuring '{"contender": ..., "case": ..., "seconds": ..., "labels": ...}'

measures in a process that does nothing else, and prints one line of JSON.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_SHAPES = ((8, 8, 8), (16, 16, 16))
TOO_SLOW = 2.0  # seconds; a call that takes longer is made only three times
# Sums over millions of voxels in single precision are not exact. But the loss is near 1, and an
# error above this means that the contender computes another loss.
MAX_ERROR = 1e-2
# Other programs may use the processors too. A measurement is repeated if the processors ran below
# this share of the highest speed in this run, before it or after it.
UNDISTURBED = 0.93
CALIBRATION = 3.0  # seconds
ATTEMPTS = 4
PATIENCE = 5.0  # how many seconds each attempt waits for a quiet moment


# --- memory ---------------------------------------------------------------------------------------


def memory(field):
    """Returns a field of /proc/self/status in bytes: VmRSS, resident memory, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak():
    """Resets the peak of the resident memory. Returns False if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_free_memory():
    """Gives free memory back to the system.

    Otherwise, later allocations could reuse it, and the peak would not show them.
    """
    with contextlib.suppress(OSError, AttributeError):  # Only glibc has malloc_trim.
        ctypes.CDLL(None).malloc_trim(0)


# --- one contender --------------------------------------------------------------------------------


def tensors(contender, x, y):
    """Converts logits and labels to the type that the contender takes."""
    if contender.arrays == "torch":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        x = torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1))).requires_grad_()
        return x, torch.tensor(y[:, None])
    if contender.arrays == "numpy":
        return x, y
    import tensorflow as tf

    return tf.constant(x), tf.constant(y)


def measure(contender, case, seconds, labels=None):
    """Returns the loss, the peak of extra memory in the first call, and the times of later calls.

    labels: the labels to use in place of the case's own, `[batch, spatial...]`.
    """
    contender = CONTENDERS[contender]
    if level := contender.simd_level:
        from dice_op import core

        if core.build_info()["simd_level"] != level:
            raise RuntimeError(f"this processor, or this build, has no {level}")
    step = contender.make_step(case)
    # Small volumes come first. Tracing, compiling and starting threads take memory that does not
    # belong to the loss. There are two shapes because the second may cause a second compilation.
    small = [dataclasses.replace(case, shape=shape) for shape in WARM_UP_SHAPES]
    for volume in small:
        step(*tensors(contender, *volume.make()))
    logits, labels = tensors(contender, *case.make(labels))
    step(*tensors(contender, *small[0].make()))  # TensorFlow frees NumPy's arrays one call late.

    # Only the first call shows the peak, because the allocator keeps its memory for later calls.
    give_back_free_memory()
    resident = memory("VmRSS")
    can_measure = reset_peak()
    loss = float(step(logits, labels)[0])
    extra = memory("VmHWM") - resident if can_measure else None

    step(logits, labels)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        float(step(logits, labels)[0])
        times.append(time.perf_counter() - start)
        if times[0] > TOO_SLOW and len(times) == 3:
            break
    quartiles = statistics.quantiles(times, n=4)
    return {
        "loss": loss,
        "seconds": statistics.median(times),
        "quartiles": [quartiles[0], quartiles[2]],
        "repeats": len(times),
        "extra_bytes": extra,
        "logits_bytes": case.logits_bytes,
    }


def in_new_process(module, *arguments, **variables):
    """Runs a module in a new process. Returns the JSON that it prints, or its error as a text."""
    command = [sys.executable, "-m", module, *arguments]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**quiet, **os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


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


def compare(case, contenders, seconds=2.0, labels=None, machine=None):
    """Measures each contender in a new process, and yields a dict for each.

    A dict has `contender`, `name` and `case`. After a failure it has `failed`, the reason.
    Otherwise it has what `measure` returns, `error`, the difference from the loss in double
    precision, and `wrong`, which says whether the contender computes another loss.

    With a `Machine`, `undisturbed` repeats the measurement. Then there are also `pace`; `limits`,
    the mean of the limits before and after; and `of_limit`, the time divided by the least time that
    these limits allow.
    """
    expected = case.loss(labels)
    with tempfile.TemporaryDirectory() as folder:
        file = None
        if labels is not None:
            file = Path(folder) / "labels.npy"
            np.save(file, labels)
        for contender in contenders:
            job = {"contender": contender, "case": dataclasses.asdict(case), "seconds": seconds}
            job["labels"] = file and str(file)
            about = CONTENDERS[contender]
            level = {"DICE_OP_SIMD": about.simd_level} if about.simd_level else {}

            def measurement(job=job, level=level):
                before = machine.limits() if machine else None
                result = in_new_process("benchmarks.measuring", json.dumps(job), **level)
                if isinstance(result, str):
                    return {"failed": result}
                if machine:
                    both = before, machine.limits()
                    result["limits"] = {k: statistics.mean(m[k] for m in both) for k in before}
                    result["of_limit"] = result["seconds"] / bound_of(case, result["limits"])
                return result

            result = undisturbed(machine, measurement) if machine else measurement()
            if "failed" not in result:
                result["error"] = abs(result["loss"] - expected)
                result["wrong"] = about.same_loss and not result["error"] <= MAX_ERROR
            yield result | {
                "contender": contender,
                "case": dataclasses.asdict(case),
                "name": str(case),
            }


# --- the machine ----------------------------------------------------------------------------------


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


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    volume = np.load(wanted["labels"]) if wanted["labels"] else None
    wanted_case = Case.from_json(wanted["case"])
    print(json.dumps(measure(wanted["contender"], wanted_case, wanted["seconds"], volume)))
