"""Measures the fixed cost of an eager call: loss and gradient of a tiny volume, and their parts.

    python -m benchmarks.overhead

prints one line of JSON with times in seconds.
"""

import statistics
import time

from benchmarks.measuring import emit

SHAPE = (1, 8, 8, 8, 4)


def measure(repeats=300):
    """Returns for each part the median seconds of (forward, with gradient)."""
    import keras
    import numpy as np
    import tensorflow as tf

    import dice_op

    rng = np.random.default_rng(0)
    logits = tf.constant(rng.standard_normal(SHAPE, dtype=np.float32))
    labels = tf.constant(rng.integers(0, SHAPE[-1], SHAPE[:-1], dtype=np.uint8))
    one_hot = tf.one_hot(labels, SHAPE[-1])
    loss = dice_op.losses.DiceLoss()
    keras_dice = keras.losses.Dice(axis=(1, 2, 3))
    in_function = tf.function(lambda: loss(labels, logits))
    identity = tf.function(lambda x: tf.reduce_sum(x))
    parts = {
        "one operation of TensorFlow": lambda: tf.nn.relu(logits),
        "one tf.function of one operation": lambda: identity(logits),
        "`dice_sums`": lambda: dice_op.dice_sums(labels, logits, activation="softmax").intersection,
        "`DiceLoss`": lambda: loss(labels, logits),
        "`DiceLoss`, operation by operation": lambda: tf.reduce_mean(loss.call(labels, logits)),
        "`DiceLoss` in a tf.function": in_function,
        "keras.losses.MeanSquaredError": lambda: keras.losses.MeanSquaredError()(one_hot, logits),
        "keras.losses.Dice": lambda: keras_dice(one_hot, tf.nn.softmax(logits)),
    }

    def with_gradient(function):
        def step():
            with tf.GradientTape() as tape:
                tape.watch(logits)
                value = function()
            return tape.gradient(value, logits)

        return step

    def median(function):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times[repeats // 10 :])

    return {name: (median(f), median(with_gradient(f))) for name, f in parts.items()}


if __name__ == "__main__":
    emit(measure())
