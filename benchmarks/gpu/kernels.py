"""Times the kernels on a GPU: sums, gradient, and both. It is a step of build_tools/gpu_check.py.

    python -m benchmarks.gpu.kernels [--quick]

Every call is checked against float64 before it is timed. The calls use buffers in turn that have
four times the size of the L2 cache.
"""

import argparse
import functools
import itertools
import math
import time

import numpy as np

from benchmarks.cases import cube
from benchmarks.gpu import report
from benchmarks.gpu.device import Device, DeviceError
from benchmarks.gpu.volume import RepeatedVolume, gradient_error
from benchmarks.measuring import emit, follow, times
from helpers import reference  # tests/helpers/reference.py

COEFFICIENTS = ("d_intersection", "d_pred_sum", "d_cross_entropy", "d_negative_cross_entropy")
PARTS = ("forward", "backward", "pair")
# sums_tolerance says what holds for the others, which compute in float32 with a fast exponential.
SUMS_TOLERANCE = {"float64": 1e-12}
GRADIENT_TOLERANCE = {"float32": 5e-6, "float16": 2**-10, "bfloat16": 2**-7, "float64": 1e-12}
EDGES = (64, 96, 128, 192, 256, 384, 512)
CLASSES = (1, 2, 3, 4, 5, 14, 104)
DTYPES = ("float32", "float16", "bfloat16")


def sums_tolerance(dtype):
    """The largest relative error that a sum may have."""
    return SUMS_TOLERANCE.get(dtype, 2e-6)


def plan(quick):
    """Lists the cases, the most important first."""
    if quick:
        return [
            cube(edge, classes, dtype=dtype)
            for edge in (256, 128)
            for classes in (4, 14, 2)
            for dtype in ("float32", "bfloat16")
        ]

    def rank(case):
        return (
            {192: 0, 256: 0, 128: 1, 512: 2, 96: 2, 384: 3, 64: 3}[case.shape[0]]
            + {4: 0, 14: 0, 2: 2, 104: 2}.get(case.classes, 3)
            + {"float32": 0, "bfloat16": 0, "float16": 3}[case.dtype]
            + 2 * case.cross_entropy
        )

    every = itertools.product(EDGES, CLASSES, DTYPES, (False, True))
    cases = [
        cube(edge, classes, dtype=dtype, cross_entropy=cross_entropy)
        for edge, classes, dtype, cross_entropy in every
        if not cross_entropy or classes in (4, 14)
    ]
    return sorted(cases, key=rank)


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


def bytes_of(case):
    """The bytes that each part must read and write at least."""
    forward = case.logits_bytes + case.labels_bytes
    backward = forward + case.logits_bytes
    return {"forward": forward, "backward": backward, "pair": forward + backward}


# This is no `measure` of a contender, because sums and gradient are also timed apart, and they are
# checked apart, against narrow bounds.
def measure(core, device, yardsticks, case):
    """Checks the kernels on one case, then times them, and returns what a record says of it."""
    voxels, classes, dtype = case.voxels, case.classes, case.dtype
    moved = bytes_of(case)
    record = {"bytes": moved, "logits_bytes": case.logits_bytes}
    if moved["backward"] + (1 << 28) > device.memory()[0]:
        return {**record, "skipped": "the GPU has too little memory for logits and gradient"}
    volume = RepeatedVolume(case)
    sets = []
    for _ in range(device.sets_of(case)):
        logits = device.periodic(volume.stored, voxels, dtype)
        labels = device.periodic(volume.labels, voxels, "uint8")
        out = device.empty((1, voxels, classes), dtype)
        sets.append((logits.reshape(1, voxels, classes), labels.reshape(1, voxels), out))
    options = {"activation": volume.activation, "stream": device.stream}
    rng = np.random.default_rng(1)
    numbers = [rng.normal(size=(1, classes)).astype(np.float32) for _ in COEFFICIENTS]
    wanted = 2 if not case.cross_entropy else 4 if volume.activation == "sigmoid" else 3
    given = {
        name: device.array(number, "float32")
        for name, number in zip(COEFFICIENTS[:wanted], numbers, strict=False)
    }

    def forward(logits, labels, _):
        return core.sums(logits, labels, cross_entropy=case.cross_entropy, **options)

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
        for name, value in volume.sums().items()
        if name in sums
    ]
    del sums
    out.fill(0xFF)
    backward(*sets[0])
    numbers[2:] = [number * case.cross_entropy for number in numbers[2:]]
    record["sums_error"] = float(np.max(errors))  # Python's max() could lose a NaN.
    record["gradient_error"] = gradient_error(device, out, volume.gradient(numbers))
    record["wrong"] = not (
        record["sums_error"] <= sums_tolerance(dtype)
        and record["gradient_error"] <= GRADIENT_TOLERANCE[dtype]
    )
    record["forward_extra_bytes"] = device.pool_peak()
    record["pair_extra_bytes"] = {
        "own gradient": device.pool_peak() + case.logits_bytes,
        "in place": device.pool_peak(),
    }
    if record["wrong"]:
        return record  # The time of a wrong result means nothing.
    for name, function in zip(PARTS, (forward, backward, pair), strict=True):
        runs = [functools.partial(function, *buffers) for buffers in sets]
        result = record[name] = times(device, runs)
        result["host_us"] = host_microseconds(runs[0], device, synchronised=False)
        result["synchronised_us"] = host_microseconds(runs[0], device, synchronised=True)
        for timed in (result, result["graph"]):
            if "seconds" in timed:
                rate = moved[name] / timed["seconds"]
                timed["bytes_per_second"] = rate
                timed["of_copy"] = rate / yardsticks["copy"]["bytes_per_second"]
                timed["of_read"] = rate / yardsticks["read"]["bytes_per_second"]
    return record


def facts(case):
    """What a result says besides what is measured."""
    return {"kind": "kernels", **case.facts()}


def main():
    """Emits a result for each case, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="measure two volumes with three class counts"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no measurement after this time"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    from dice_op import core

    device = Device()

    def measure_yardsticks(kind):
        result = {"kind": kind, **device.yardsticks()}
        emit(result, report.line(result))
        return result

    yardsticks = measure_yardsticks("yardsticks")
    measure_case = functools.partial(measure, core, device, yardsticks)
    cases = plan(arguments.quick)
    follow(cases, deadline, "measure", facts, measure_case, report.line, catching=DeviceError)
    measure_yardsticks("yardsticks_again")


if __name__ == "__main__":
    main()
