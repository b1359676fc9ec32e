"""Compares TensorFlow's ops on the GPU with those on the CPU, and trains for ten steps.

    python -m gpu.tensorflow_ops

It is a step of build_tools/gpu_check.py. It tries the package in this repository's folder, as `make
build` made it, and skips what cannot be tried here.
"""

import os
import sys

import numpy as np

from benchmarks.gpu.kernels import GRADIENT_TOLERANCE
from benchmarks.measuring import emit


def check():
    """Returns what failed, or why nothing was tried."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError as error:
        return {"skipped": f"TensorFlow cannot be imported: {error}"}
    if not tf.config.list_physical_devices("GPU"):
        return {"skipped": f"TensorFlow {tf.__version__} sees no GPU"}
    try:
        import dice_op

        built_for = dice_op.core.build_info()["cuda"]
        losses = dice_op.losses
    except (ImportError, RuntimeError, OSError) as error:
        return {"skipped": f"dice_op cannot be imported: {error}"}
    if not built_for:
        return {"skipped": "dice_op is built here without CUDA"}
    failures = []
    rng = np.random.default_rng(0)
    for c in (2, 4, 14, 104):
        for dtype in ("float32", "bfloat16", "float16"):
            x = tf.cast(rng.normal(size=(2, 16, 16, 15, c)), dtype)
            y = tf.constant(rng.integers(0, c, x.shape[:-1]), tf.uint8)
            results = {}
            for place in ("CPU", "GPU"):
                with tf.device(f"/{place}:0"), tf.GradientTape() as tape:
                    tape.watch(x)
                    sums = dice_op.dice_sums(y, x, activation="softmax", cross_entropy=True)
                    total = sum(tf.reduce_sum(s * s) for s in sums[:4]) * 1e-6
                results[place] = [*(s for s in sums if s is not None), tape.gradient(total, x)]
            for i, (got, wanted) in enumerate(zip(results["GPU"], results["CPU"], strict=True)):
                got, wanted = (tf.cast(v, tf.float64).numpy() for v in (got, wanted))
                error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
                if not error <= (GRADIENT_TOLERANCE[dtype] if i == 5 else 4e-6):
                    failures.append(f"C={c} {dtype}: output {i} is off by {error:.2e}")
    import keras

    image = rng.normal(size=(4, 16, 16, 16, 1)).astype(np.float32)
    truth = np.uint8(image[..., 0] > 0) + np.uint8(image[..., 0] > 1)
    histories = {}
    for jit_compile in ("auto", False):  # Keras' default is XLA where there is a GPU.
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((16, 16, 16, 1)),
                keras.layers.Conv3D(8, 3, padding="same", activation="relu"),
                keras.layers.Conv3D(3, 1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1), losses.DiceLoss(), jit_compile=jit_compile)
        name = "with XLA" if model.jit_compile else "without XLA"
        history = [float(model.train_on_batch(image, truth)) for _ in range(10)]
        histories[name] = history
        if not (np.isfinite(history).all() and history[-1] < history[0]):
            failures.append(f"the training's losses {name}: {history}")
    # cuDNN may use TF32 in only one of them, or other kernels, so the tolerance is wide.
    if set(histories) != {"with XLA", "without XLA"}:
        failures.append("Keras' default did not choose XLA")
    elif not np.allclose(*histories.values(), rtol=1e-3):
        failures.append(f"XLA trains otherwise: {histories}")
    return {"version": tf.__version__, "failures": failures, "training": histories}


def main():
    """Emits the result, and returns the exit status."""
    result = check()
    emit({"kind": "tensorflow", **result}, ", ".join(result.get("failures", ())))
    return 1 if result.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
