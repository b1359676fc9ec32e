"""Volumes where rounding errors may add up, of any size, and by how much each sum is off there.

A volume is a block of voxels, of which the reference knows the sums in double precision, again and
again (typical), or with each voxel repeated (sorted, constant): then all additions of a thread
round in the same direction.

Started as a program, it measures the kernels of this process, and prints lines of JSON.
"""

import functools
import json
import sys

import ml_dtypes
import numpy as np

from dice_op import core
from helpers import reference
from helpers.kernel_inputs import (
    coefficients_by_name,
    distances_of,
    read_label_sets,
    renamed,
    sure,
)

DTYPES = ("float16", "bfloat16", "float32", "float64")
# The relative error of one rounding, in the arithmetic and in storage.
UNIT = {"float16": 2**-24, "bfloat16": 2**-24, "float32": 2**-24, "float64": 2**-53}
STORED = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}
SETS = {3: (0, 1)}
CALLS = {  # The number of classes, and the options.
    "softmax": (2, {"activation": "softmax", "cross_entropy": True}),
    "sigmoid": (1, {"activation": "sigmoid", "cross_entropy": True}),
    "label sets": (3, {"activation": "softmax", "cross_entropy": True, "label_sets": SETS}),
    "distances": (3, {"activation": "softmax", "dist_matrix": distances_of(3)}),
}
CASES = ("typical", "constant", "sorted", "sure", "soft labels", "large weights")
LARGE, USUAL = 500_000_000, 10_000_000  # voxels
IN_LARGE = {  # What is tried with that many.
    ("softmax", "typical", "float32"),
    ("softmax", "constant", "float32"),
    ("softmax", "constant", "float16"),
    ("softmax", "sorted", "float32"),
    ("softmax", "sure", "bfloat16"),
    ("sigmoid", "constant", "float32"),
}


def bound_of(name, dtype, classes, voxels, wanted, label_sum):
    """How far a sum may be off. A thread or a SIMD lane adds 64 numbers and their sums are added
    in at most 5 steps before a double takes over, which makes 68 roundings, and the result is
    rounded. An exponential is off by 4 units, the total by that and one for each class, and the
    quotient and two products round. The logarithm of a total near 1 has an absolute error. The
    doubles round once for each flush, at most 2^10 times in a block, and once for each block."""
    unit = UNIT[dtype]
    doubles = (2**10 + voxels * classes / 2**15) * 2**-53
    absolute = (8 + classes) * unit * label_sum if name == "cross_entropy" else 0
    return ((84 + classes) * unit + doubles) * np.abs(wanted) + absolute


@functools.cache
def block(call, case, dtype):
    """A block: logits [B, C], labels, t [B, C], weights or None, and the classes unknown or
    None."""
    classes, options = CALLS[call]
    count = {"typical": 99_991, "sorted": 9_973}.get(case, 1)
    rng = np.random.default_rng(0)
    index = rng.integers(0, max(classes, 2), count) if case == "typical" else np.ones(count, int)
    x = np.tile([0.3, -0.2, 0.1][:classes], (count, 1))
    weight = None
    if case == "typical":
        x = 3 * rng.normal(size=x.shape)
    elif case == "sorted":
        x[:, 0] = np.linspace(-8, 8, count)
        index[: count // 2] = 0
    elif case == "sure":
        x = sure(x[None], 15)[0] if classes > 1 else x + 15
    elif case == "large weights":
        weight = np.full(count, 1234567, np.float32)
    x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    y, t, unknown = index.astype(np.uint8), reference.one_hot(index, classes), None
    if "label_sets" in options:
        y[index == 1] = 3
        t, unknown = read_label_sets(SETS, y, classes)
    if case == "soft labels":
        y = np.tile(np.float32([0.3, 0.7, 0.1][:classes]), (count, 1))
        t = y.astype(float)
    return x, y, t, weight, unknown


def fits(call, case):
    """Label sets and distances are for class indices."""
    return case != "soft labels" or call in ("softmax", "sigmoid")


def grown(array, case, times):
    """The array of a block's voxels as that of a volume, [1, V, ...]."""
    if array is None:
        return None
    typical = case == "typical"
    shape = (times, *array.shape) if typical else (len(array), times, *array.shape[1:])
    result = np.empty(shape, array.dtype)
    result[:] = array if typical else array[:, None]
    return result.reshape(1, -1, *array.shape[1:])


def given_to_reference(call, unknown):
    options = renamed({k: v for k, v in CALLS[call][1].items() if k != "cross_entropy"})
    return options if unknown is None else {**options, "unknown": unknown[None]}


def volume(call, case, dtype, voxels):
    """The arguments of `core.sums`, and the sums in double precision."""
    x, y, t, weight, unknown = block(call, case, dtype)
    times = max(1, voxels // len(x))
    given = given_to_reference(call, unknown)
    of_block = None if weight is None else weight[None]
    wanted = reference.sums(x[None], t[None], of_block, **given)
    wanted["weight_sum"] = np.float64([len(x) if weight is None else weight.sum(dtype=float)])
    arrays = [grown(array, case, times) for array in (x, y, weight)]
    return arrays, {name: times * value for name, value in wanted.items()}


def size_of(call, case, dtype):
    return LARGE if (call, case, dtype) in IN_LARGE else USUAL


def entries(call, case, dtype, sums, wanted, voxels):
    """One for each sum: how far it is off and may be, relative to what it must be."""
    for name, value in wanted.items():
        if name not in sums:
            continue
        got = np.asarray(sums[name], np.float64).reshape(value.shape)
        assert np.all(got[value == 0] == 0), (call, case, dtype, name)
        there = value != 0
        if not there.any():
            continue
        of_labels = wanted["label_sum"] + wanted.get("unknown_sum", 0) if value.ndim == 2 else 0
        bounds = bound_of(name, dtype, CALLS[call][0], voxels, value, of_labels)
        errors = np.abs(got - value)[there] / np.abs(value[there])
        bounds = bounds[there] / np.abs(value[there])
        worst = np.argmax(errors / bounds)
        yield {
            "what": name, "call": call, "case": case, "dtype": dtype, "voxels": voxels,
            "error": errors[worst], "bound": bounds[worst],
        }  # fmt: skip


def gradient_case(call, case, dtype):
    """A small volume with the derivatives of a loss, and its gradient in double precision. The
    derivatives are large, as loss scaling makes them, so that half has no subnormal numbers."""
    (x, y, weight), _ = volume(call, case, dtype, 20_000)
    _, _, t, _, unknown = block(call, case, dtype)
    classes, _ = CALLS[call]
    rng = np.random.default_rng(3)
    coefficients = rng.normal(size=(5, 1, classes)) * (1e-3 if weight is not None else 1e3)
    coefficients = coefficients.astype("float64" if dtype == "float64" else "float32")
    if "cross_entropy" not in CALLS[call][1]:
        coefficients[2:4] = 0
    times = x.shape[1] // len(t)
    t, unknown = grown(t, case, times), grown(unknown, case, times)
    given = given_to_reference(call, None if unknown is None else unknown[0])
    wanted = reference.gradient(x, t, coefficients, weight, **given)
    return (x, y, weight), coefficients, wanted


def gradient_entry(call, case, dtype, got, wanted):
    # In double precision the reference rounds too, by e^15 times as much if a voxel is sure.
    in_double = 1e-9 if case == "sure" else 1e-13
    bound = in_double if dtype == "float64" else 5e-6
    return {
        "what": "gradient", "call": call, "case": case, "dtype": dtype, "voxels": got.shape[1],
        "error": reference.gradient_error(got.reshape(wanted.shape), wanted),
        "bound": bound + STORED[dtype],
    }  # fmt: skip


def each():
    for call in CALLS:
        for case in CASES:
            for dtype in DTYPES:
                if fits(call, case):
                    yield call, case, dtype


def on_cpu(size=size_of):
    for call, case, dtype in each():
        options = CALLS[call][1]
        (x, y, weight), wanted = volume(call, case, dtype, size(call, case, dtype))
        sums = core.sums(x, y, voxel_weight=weight, **options)
        yield from entries(call, case, dtype, sums, wanted, x.shape[1])
        del x, y, weight
        (x, y, weight), coefficients, wanted = gradient_case(call, case, dtype)
        asked = "cross_entropy" in options
        derivatives = coefficients_by_name(
            coefficients if asked else coefficients[:2], options["activation"]
        )
        if "dist_matrix" in options:
            derivatives["d_distance_sum"] = coefficients[4]
        got = core.gradient(x, y, voxel_weight=weight, **derivatives, **options)
        yield gradient_entry(call, case, dtype, got, wanted)


if __name__ == "__main__":
    divisor = int(sys.argv[1])
    print(json.dumps(core.build_info()["simd_level"]))
    for entry in on_cpu(lambda *what: size_of(*what) // divisor):
        print(json.dumps(entry), flush=True)
