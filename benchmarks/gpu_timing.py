"""Times the kernels on a GPU: sums, gradient, and both. It is a step of build_tools/gpu_check.py.

Every call is checked against float64 before it is timed. Volumes repeat a few thousand random
voxels, so that only these need a reference. Their number is prime, so that voxels lie at every
offset in a word of memory. The calls use buffers in turn that have four times the size of the L2
cache.
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import gpu_device
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
sys.path += [str(BUILD / "install"), str(ROOT / "tests")]

SMOOTH = 1e-5
SUMS = ("intersection", "pred_sum", "label_sum", "cross_entropy")
COEFFICIENTS = ("d_intersection", "d_pred_sum", "d_cross_entropy")
# sums_tolerance says what holds for the others, which compute in float32 with a fast exponential.
SUMS_TOLERANCE = {"float64": 1e-12}
GRADIENT_TOLERANCE = {"float32": 5e-6, "float16": 2**-10, "bfloat16": 2**-7, "float64": 1e-12}
EDGES = (64, 96, 128, 192, 256, 384, 512)
CLASSES = (1, 2, 3, 4, 5, 14, 104)


def load():
    """Returns the module under test, the reference and the GPU."""
    core = importlib.import_module("dice_op.core")
    reference = importlib.import_module("reference")
    return core, reference, gpu_device.Device(BUILD / "libgpu_device.so")


def emit(record):
    """Prints a result for gpu_check.py, which reads the standard output."""
    print("RECORD " + json.dumps(record), flush=True)


def sums_tolerance(dtype):
    """The largest relative error that a sum may have."""
    return SUMS_TOLERANCE.get(dtype, 2e-6)


class Workload:
    """The voxels that are repeated, and the correct results of a volume of them."""

    def __init__(self, reference, classes, dtype):
        self.reference, self.classes, self.dtype = reference, classes, dtype
        self.activation = "softmax" if classes > 1 else "sigmoid"
        self.period = 4099 if classes <= 16 else 509
        rng = np.random.default_rng(classes)
        self.stored = gpu_device.encode(3 * rng.normal(size=(self.period, classes)), dtype)
        # Neighbours have the same label, as along a line through an organ.
        runs = rng.integers(0, max(classes, 2), self.period // 16 + 1)
        self.labels = np.repeat(runs, 16)[: self.period].astype(np.uint8)
        self.x = gpu_device.decode(self.stored, dtype)[None]
        self.t = reference.one_hot(self.labels, classes)[None]
        self.terms = [
            term[0] for term in reference.voxel_terms(self.x, self.t, activation=self.activation)
        ]

    def sums(self, voxels):
        """The intersection, pred_sum, label_sum and cross_entropy of a volume, `[1, C]` each."""
        whole, rest = divmod(voxels, self.period)
        return [whole * s.sum(0)[None] + s[:rest].sum(0)[None] for s in self.terms]

    def dice(self, voxels):
        """The Dice loss of a volume, and its derivatives by intersection and pred_sum."""
        i, p, t, _ = self.sums(voxels)
        loss = self.reference.dice_losses(i, p, t, SMOOTH, SMOOTH).mean()
        cardinality = p + t + SMOOTH
        d_pred_sum = (2 * i + SMOOTH) / cardinality**2 / self.classes
        return float(loss), (-2 / cardinality / self.classes, d_pred_sum)

    def gradient(self, coefficients):
        """The gradient of the repeated voxels, `[period, C]`."""
        return self.reference.gradient(self.x, self.t, coefficients, activation=self.activation)[0]


def gradient_error(device, array, expected, reference):
    """The error of a gradient `[1, V, C]` that must repeat `expected`.

    The first voxels are compared with `expected` by relative L2, and the others with the first,
    byte by byte. If bytes differ, even by a rounding, all are copied to the host and compared
    element by element.
    """
    period, voxels = min(len(expected), array.shape[1]), array.shape[1]
    rows = array.reshape(*array.shape[1:])
    first = gpu_device.decode(rows.numpy(0, period), array.dtype)
    worst = reference.gradient_error(first, expected[:period])
    if voxels > period and device.mismatches(rows, period):
        step = max(1, (1 << 26) // expected.shape[1] // period) * period
        for start in range(0, voxels, step):
            count = min(step, voxels - start)
            got = gpu_device.decode(rows.numpy(start, count), array.dtype)
            wanted = np.resize(expected, got.shape)
            worst = max(worst, reference.relative_error(got, wanted))  # the error of one element
    return float(worst)


def plan(quick):
    """Lists (edge, classes, dtype, cross_entropy), the most important first."""
    if quick:
        return [
            (e, c, d, False)
            for e in (256, 128)
            for c in (4, 14, 2)
            for d in ("float32", "bfloat16")
        ]

    def rank(config):
        edge, classes, dtype, cross_entropy = config
        return (
            {192: 0, 256: 0, 128: 1, 512: 2, 96: 2, 384: 3, 64: 3}[edge]
            + {4: 0, 14: 0, 2: 2, 104: 2}.get(classes, 3)
            + {"float32": 0, "bfloat16": 0, "float16": 3}[dtype]
            + 2 * cross_entropy
        )

    every = itertools.product(EDGES, CLASSES, GRADIENT_TOLERANCE, (False, True))
    return sorted(
        (c for c in every if c[2] != "float64" and (not c[3] or c[1] in (4, 14))), key=rank
    )


@functools.lru_cache(2)
def workload(reference, classes, dtype):
    """Makes a workload, or returns the one of the last volume with the same voxels."""
    return Workload(reference, classes, dtype)


def host_microseconds(call, device, synchronised):
    """Measures the time that a call takes on the processor that launches it."""
    device.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        call()
        if synchronised:
            device.synchronize()
    spent = time.perf_counter() - start
    device.synchronize()
    return round(spent / 20 * 1e6, 1)


def measure(core, reference, device, yardsticks, config):
    """Checks one volume, then times it, and returns a record."""
    edge, classes, dtype, cross_entropy = config
    voxels = edge**3
    logits_bytes = voxels * classes * gpu_device.itemsize(dtype)
    moved = {"forward": logits_bytes + voxels, "backward": 2 * logits_bytes + voxels}
    moved["pair"] = sum(moved.values())
    record = {
        "kind": "kernels", "edge": edge, "classes": classes, "dtype": dtype,
        "cross_entropy": cross_entropy, "bytes": moved, "logits_bytes": logits_bytes,
    }  # fmt: skip
    if 2 * logits_bytes + voxels + (1 << 28) > device.memory()[0]:
        return {**record, "skipped": "the GPU has too little memory for logits and gradient"}
    work = workload(reference, classes, dtype)
    sets = []
    for _ in range(device.rotation(moved["backward"])):
        logits = device.periodic(work.stored, voxels, dtype)
        labels = device.periodic(work.labels, voxels, "uint8")
        out = device.empty((1, voxels, classes), dtype)
        sets.append((logits.reshape(1, voxels, classes), labels.reshape(1, voxels), out))
    options = {"activation": work.activation, "stream": device.stream}
    rng = np.random.default_rng(1)
    numbers = [rng.normal(size=(1, classes)).astype(np.float32) for _ in COEFFICIENTS]
    wanted = 3 if cross_entropy else 2
    given = {
        name: device.array(number, "float32")
        for name, number in list(zip(COEFFICIENTS, numbers, strict=True))[:wanted]
    }

    def forward(logits, labels, _):
        return core.sums(logits, labels, cross_entropy=cross_entropy, **options)

    def backward(logits, labels, out):
        core.gradient(logits, labels, out=out, **given, **options)

    def pair(logits, labels, out):
        forward(logits, labels, out)
        backward(logits, labels, out)

    logits, labels, out = sets[0]
    device.synchronize()
    device.pool_peak(reset=True)
    sums = forward(*sets[0])
    errors = [
        reference.relative_error(sums[name].numpy(), value)
        for name, value in zip(SUMS, work.sums(voxels), strict=True)
        if name in sums
    ]
    del sums
    out.fill(0xFF)
    backward(*sets[0])
    numbers[2] = numbers[2] * cross_entropy
    expected = work.gradient(numbers)
    record["sums_error"] = float(np.max(errors))  # Python's max() could lose a NaN.
    record["gradient_error"] = gradient_error(device, out, expected, reference)
    record["passed"] = bool(
        record["sums_error"] <= sums_tolerance(dtype)
        and record["gradient_error"] <= GRADIENT_TOLERANCE[dtype]
    )
    record["forward_extra_bytes"] = device.pool_peak()
    record["pair_extra_bytes"] = {
        "own gradient": device.pool_peak() + logits_bytes,
        "in place": device.pool_peak(),
    }
    if not record["passed"]:
        return record  # The time of a wrong result means nothing.
    for name, function in (("forward", forward), ("backward", backward), ("pair", pair)):
        runs = [functools.partial(function, *buffers) for buffers in sets]
        result = record[name] = {"launches": device.time(runs)}
        try:
            result["graph"] = device.time_graph(runs)
        except (gpu_device.DeviceError, RuntimeError) as error:
            result["graph"] = {"error": str(error)}
        result["host_us"] = host_microseconds(runs[0], device, synchronised=False)
        result["synchronised_us"] = host_microseconds(runs[0], device, synchronised=True)
        for timed in (result["launches"], result["graph"]):
            if "median_ms" in timed:
                rate = moved[name] / timed["median_ms"] * 1e3
                timed["bytes_per_second"] = rate
                timed["of_copy"] = rate / yardsticks["copy"]["bytes_per_second"]
                timed["of_read"] = rate / yardsticks["read"]["bytes_per_second"]
    return record


def main():
    """Prints a record for each volume, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="measure two volumes with three class counts"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no measurement after this time"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    core, reference, device = load()
    yardsticks = device.yardsticks()
    emit({"kind": "yardsticks", **yardsticks})
    left = plan(arguments.quick)
    while left:
        if time.monotonic() > deadline:
            emit({"kind": "left_out", "step": "measure", "what": left})
            break
        config = left.pop(0)
        try:
            emit(measure(core, reference, device, yardsticks, config))
        except gpu_device.DeviceError as error:
            emit({"kind": "kernels", "config": config, "error": str(error)})
    emit({"kind": "yardsticks_again", **device.yardsticks()})


if __name__ == "__main__":
    main()
