"""Trains a small network in Keras with a loss and a score of dice_op, with and without compilation.

    python -m gpu.keras_training tensorflow|jax|torch

It is a step of build_tools/gpu_check.py. On TensorFlow it tries the package in this repository's
folder, as `make build` made it.
"""

import functools
import math
import os
import sys
import time

import numpy as np

from benchmarks.gpu import installed
from benchmarks.measuring import emit

# The most that the last loss may be of the first, and how far the score must rise.
MOST_LOSS, LEAST_RISE = 0.7, 0.2
# The first epoch computes the same with compilation as without. Convolutions may do so in another
# precision, and the epochs after it carry that on.
SAME = 1e-2


def why_not(backend, place="gpu"):
    """Why nothing can be tried with a backend of Keras, or None."""
    return installed.why_not(backend, place) or installed.why_not("keras", "cpu")


@functools.cache
def volumes(edge, count=16):
    """Noise, and labels that are three ranges of the same noise after smoothing."""
    noise = np.random.default_rng(0).normal(size=(count, edge, edge, edge)).astype(np.float32)
    shifts = (np.subtract(shift, 1) for shift in np.ndindex(3, 3, 3))
    smooth = sum(np.roll(noise, shift, (1, 2, 3)) for shift in shifts) / 27**0.5
    return noise[..., None], np.uint8(smooth > 0.3) + np.uint8(smooth > 1)


def train(compiled, edge=24, epochs=25):
    """Trains a new network. Returns the loss and the score of each epoch."""
    import keras

    from dice_op import losses, metrics

    images, labels = volumes(edge)
    keras.utils.set_random_seed(0)
    conv = functools.partial(keras.layers.Conv3D, data_format="channels_last")
    model = keras.Sequential([keras.Input(images.shape[1:])])
    for _ in range(2):
        model.add(conv(8, 3, padding="same", activation="relu"))
    model.add(conv(3, 1))
    model.compile(
        keras.optimizers.Adam(0.01),
        losses.DiceCELoss(data_format="channels_last"),
        metrics=[metrics.DiceScore(data_format="channels_last", name="score")],
        jit_compile=compiled,
    )
    history = model.fit(images, labels, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return {"losses": history.history["loss"], "scores": history.history["score"]}


def failures(found, without=None):
    """What is wrong with a training, beside the one without compilation."""
    losses, scores = found["losses"], found["scores"]
    wrong = []
    if not losses[-1] <= MOST_LOSS * losses[0]:
        wrong.append(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    if not scores[-1] >= scores[0] + LEAST_RISE:
        wrong.append(f"the score went from {scores[0]:.4f} to {scores[-1]:.4f}")
    if without and not math.isclose(losses[0], without["losses"][0], rel_tol=SAME):
        first = without["losses"][0]
        wrong.append(f"the first loss is {losses[0]:.4f}, but {first:.4f} without compilation")
    return wrong


def check(backend, place="gpu", deadline=math.inf, ways=(False, True), **options):
    """Trains in each way, and emits the results. Returns whether all are right.

    ways: values of Keras' jit_compile.
    options: arguments of `train`.
    """
    without, right = None, True
    for compiled in ways:
        name = f"Keras on {backend}, {'with' if compiled else 'without'} compilation"
        facts = {"kind": "keras", "backend": backend, "compiled": compiled}
        why = installed.why_not_compiled(backend, place) if compiled else None
        start = time.monotonic()
        if why is None and start > deadline:
            why = "no time left"
        if why:
            emit({**facts, "skipped": f"{name}: {why}"})
            continue
        found = train(compiled, **options)
        wrong = failures(found, without)
        right &= not wrong
        ends = (f"{which} {v[0]:.3f} to {v[-1]:.3f}" for which, v in found.items())
        spent = round(time.monotonic() - start, 1)
        result = {**facts, **found, "seconds_spent": spent, "failures": wrong}
        emit(result, f"{name}: {'; '.join(wrong) or ', '.join(ends)}")
        without = found
    return right


def main():
    """Emits a result for each training, and returns the exit status."""
    arguments = installed.parse_arguments(__doc__, ["tensorflow", "jax", "torch"])
    backend = os.environ["KERAS_BACKEND"] = arguments.framework
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if why := why_not(backend, arguments.place):
        emit({"kind": "keras", "backend": backend, "skipped": why})
        return 0
    return 0 if check(backend, arguments.place, arguments.deadline) else 1


if __name__ == "__main__":
    sys.exit(main())
