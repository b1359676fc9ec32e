"""Measures contenders on a CPU, each in a process of its own.

python -m benchmarks.cpu JOB    measures in a process that does nothing else; JOB is JSON
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS
from benchmarks.machine import bound_of, undisturbed
from benchmarks.measuring import Framework, emit, in_new_process, measure

WARM_UP_SHAPES = ((8, 8, 8), (16, 16, 16))
# Sums over millions of voxels in single precision are not exact. But the loss is near 1, and an
# error above this means that the contender computes another loss.
MAX_ERROR = 1e-2


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


# --- frameworks -----------------------------------------------------------------------------------


class RandomVolume:
    """A volume in which no voxel repeats another, and its loss in float64.

    A GPU gets another volume, which repeats a few voxels (`benchmarks.gpu.volume`). Here caches
    and page tables would notice, and the float64 loss of the largest volume takes only seconds.
    """

    def __init__(self, case, labels=None, expected=None):
        self.case, self.labels, self.expected = case, labels, expected

    def errors(self, loss, rows):
        error = abs(loss - self.expected)
        return {"error": error, "wrong": not error <= MAX_ERROR}  # NaN is wrong, too.


class Host(Framework):
    """A framework whose arrays are in the memory of the host."""

    least, most = 3, 200
    calls_to_warm_up = 1
    times_wrong_results = True  # The tables show what a loss costs that half precision spoils.

    def __init__(self, seconds):
        self.longest = seconds

    def convert(self, x, y):
        """Converts logits and labels of NumPy to arrays of the framework."""
        return x, y

    def arguments(self, volume):
        return self.convert(*volume.case.make(volume.labels))

    def ready(self, step, case, arguments):
        # Tracing, compiling and starting threads take memory that does not belong to the loss, and
        # TensorFlow frees NumPy's arrays one call late. There are two shapes because the second may
        # cause a second compilation.
        for shape in WARM_UP_SHAPES:
            step(*self.convert(*dataclasses.replace(case, shape=shape).make()))
        return step

    def peak(self, step, arguments):
        # Only the first call shows the peak, because the allocator keeps its memory for later ones.
        give_back_free_memory()
        resident = memory("VmRSS")
        can_measure = reset_peak()
        loss, gradient = step(*arguments)
        result = float(loss), gradient  # TensorFlow may still compute until here.
        return result, memory("VmHWM") - resident if can_measure else None

    def samples(self, runs, repeats):
        samples = []
        for i in range(repeats):
            start = time.perf_counter()
            float(runs[i % len(runs)]()[0])
            samples.append(time.perf_counter() - start)
        return samples


class TensorFlow(Host):
    def convert(self, x, y):
        import tensorflow as tf

        return tf.constant(x), tf.constant(y)


class PyTorch(Host):
    def convert(self, x, y):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        x = torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1))).requires_grad_()
        return x, torch.tensor(y[:, None])


class Jax(Host):
    def convert(self, x, y):
        import jax

        return jax.numpy.asarray(x), jax.numpy.asarray(y)


FRAMEWORKS = {"numpy": Host, "tensorflow": TensorFlow, "torch": PyTorch, "jax": Jax}


# --- processes ------------------------------------------------------------------------------------


def compare(case, contenders, seconds=2.0, labels=None, machine=None):
    """Measures each contender in a new process, and yields a dict for each.

    labels: the labels to use in place of the case's own, `[batch, spatial...]`.

    A dict says what the contender and the case are. After a failure it has `failed`, the reason.
    Otherwise it has what `measure` returns.

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
        for title in contenders:
            contender = CONTENDERS[title]
            job = {"contender": title, "case": dataclasses.asdict(case), "seconds": seconds}
            job |= {"labels": file and str(file), "expected": expected}

            def measurement(job=job, contender=contender):
                before = machine.limits() if machine else None
                result = in_new_process(
                    "benchmarks.cpu", json.dumps(job), **contender.environment()
                )
                if isinstance(result, str):
                    return {"failed": result}
                if machine:
                    both = before, machine.limits()
                    result["limits"] = {k: statistics.mean(m[k] for m in both) for k in before}
                    result["of_limit"] = result["seconds"] / bound_of(case, result["limits"])
                return result

            result = undisturbed(machine, measurement) if machine else measurement()
            yield result | contender.facts() | case.facts()


def main():
    job = json.loads(sys.argv[1])
    contender, case = CONTENDERS[job["contender"]], Case.from_json(job["case"])
    labels = np.load(job["labels"]) if job["labels"] else None
    volume = RandomVolume(case, labels, job["expected"])
    emit(measure(FRAMEWORKS[contender.framework](job["seconds"]), contender, case, volume))


if __name__ == "__main__":
    main()
