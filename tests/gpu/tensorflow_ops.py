"""Compares TensorFlow's ops on the GPU with those on the CPU.

    python -m gpu.tensorflow_ops tensorflow

It is a step of build_tools/gpu_check.py. It tries the package in this repository's folder, as `make
build` made it, and skips what cannot be tried here.
"""

import functools
import itertools
import math
import os
import sys

import numpy as np

from benchmarks.gpu import installed
from benchmarks.gpu.kernels import GRADIENT_TOLERANCE
from benchmarks.measuring import emit, say
from gpu.kernels import Outcomes, until
from helpers import reference


def compare(outcomes, place, classes, dtype):
    """Compares the sums and the gradient of one volume."""
    import tensorflow as tf

    import dice_op

    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(size=(2, 16, 16, 15, classes)), dtype)
    y = tf.constant(rng.integers(0, classes, x.shape[:-1]), tf.uint8)

    def results(device):
        with tf.device(f"/{device}:0"), tf.GradientTape() as tape:
            tape.watch(x)
            sums = dice_op.dice_sums(y, x, activation="softmax", cross_entropy=True)
            total = sum(tf.reduce_sum(s * s) for s in sums[:4]) * 1e-6
        found = {name: s for name, s in sums._asdict().items() if s is not None}
        found["gradient"] = tape.gradient(total, x)
        return {name: tf.cast(value, tf.float64).numpy() for name, value in found.items()}

    wanted = results("cpu")
    for name, got in results(place).items():
        tolerance = GRADIENT_TOLERANCE[dtype] if name == "gradient" else 4e-6
        error = reference.gradient_error(got, wanted[name])  # the relative distance
        outcomes.within(f"C={classes} {dtype}", name, error, tolerance)


def check(place="gpu", deadline=math.inf):
    """Compares several volumes, and returns the result for the record."""
    outcomes = Outcomes()
    cases = itertools.product((2, 4, 14, 104), ("float32", "bfloat16", "float16"))
    parts = [functools.partial(compare, outcomes, place, *case) for case in cases]
    left_out = until(deadline, parts)
    return {**outcomes.facts(), "left_out": left_out}


def main():
    """Emits the result, and returns the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    arguments = installed.parse_arguments(__doc__, ["tensorflow"])
    if why := installed.why_not("tensorflow", arguments.place):
        emit({"kind": "tensorflow", "skipped": why})
        return 0
    result = check(arguments.place, arguments.deadline)
    emit({"kind": "tensorflow", **result})
    say(f"{result['count']} checks, {len(result['failures'])} failed")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
