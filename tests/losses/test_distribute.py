"""Several replicas, processes or patches compute what one device computes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import dice_op
from dice_op import formulas
from helpers import reference
from helpers.tape import value_and_gradient

# Trains under a strategy and prints losses, the metric and the trained weights. One half of each
# batch lacks a class: the batch's Dice is not the mean of the halves'.
TRAIN = """
import os, sys
import numpy as np
import tensorflow as tf
if sys.argv[1] == "mirrored":
    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, halves)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
else:
    strategy = tf.distribute.get_strategy()
import keras
from dice_op.losses import *
from dice_op.metrics import DiceScore

rng = np.random.default_rng(0)
x = rng.normal(size=(8, 6, 6, 3)).astype("float32")
y = rng.integers(0, 3, size=x.shape[:-1]).astype("uint8")
for half in (y[:2], y[4:6]):
    half[half == 2] = 0
weight = np.array([1, 2, 0.5, 1, 1, 3, 1, 0], "float32")
for loss in sys.argv[2:]:
    with strategy.scope():
        keras.utils.set_random_seed(1)
        layers = [keras.Input(x.shape[1:]), keras.layers.Conv2D(3, 3, padding="same")]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(1.0), eval(loss), weighted_metrics=[DiceScore()])
    data = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4)
    history = model.fit(data, epochs=2, verbose=0).history
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    print(*history["loss"], *history["dice_score"], *weights)
"""
LOSSES = [
    "DiceLoss()",
    "DiceLoss(batch=True)",
    "DiceCELoss(batch=True, ce_class_weight=[1, 2, 3], absent='skip')",
    "DiceFocalLoss(activation='sigmoid')",
    "TverskyLoss(batch=True, beta=0.7, alpha=0.3)",
    "GeneralizedDiceLoss(batch=True)",
    "UnifiedFocalLoss(batch=True)",
    "GeneralizedWassersteinDiceLoss([[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]], batch=True)",
    "DiceCELoss(batch=True, activation='sigmoid', pos_weight=[1, 2, 3], label_sets={1: (0, 1)})",
]
# The classes of losses, with `batch` and without, that are not among these.
OTHERS = [
    *("DiceCELoss()", "DiceFocalLoss(batch=True)", "TverskyLoss()", "GeneralizedDiceLoss()"),
    *("MatthewsLoss()", "MatthewsLoss(batch=True)", "UnifiedFocalLoss()"),
    *("GeneralizedDiceFocalLoss()", "GeneralizedDiceFocalLoss(batch=True)"),
    "GeneralizedWassersteinDiceLoss([[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]])",
]


def numbers(text):
    lines = [line for line in text.splitlines() if line and line[0] in "-.0123456789"]
    assert len(lines) == len(LOSSES)
    return [np.array(line.split(), np.float64) for line in lines]


def test_two_replicas_train_as_one_device(run_python):
    """Under a strategy Keras also builds the loss once with float labels, whatever the data."""
    one_device, two_replicas = (
        numbers(run_python(TRAIN, strategy, *LOSSES)) for strategy in ("one", "mirrored")
    )
    for one, two in zip(one_device, two_replicas, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_keras_masks_under_a_strategy_are_those_of_keras_own_loss(run_python):
    """The number of steps that are left is another one on each replica."""
    strategy = TRAIN.partition("import keras")[0]
    out = run_python(
        strategy
        + """
import keras
from dice_op.losses import DiceCELoss

rng = np.random.default_rng(0)
x = rng.normal(size=(8, 7, 3)).astype("float32")
y = rng.integers(0, 3, size=(8, 7))
for sample, steps in enumerate([7, 3, 1, 5, 2, 7, 0, 4]):
    x[sample, steps:] = 0
keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
for loss in (DiceCELoss(lambda_dice=0), keras_loss):
    with strategy.scope():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((7, 3))
        logits = keras.layers.Dense(3)(keras.layers.Masking()(inputs))
        model = keras.Model(inputs, logits)
        model.compile(keras.optimizers.SGD(0.5), loss)
    history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    print(*history["loss"], *np.concatenate([w.ravel() for w in model.get_weights()]))
""",
        "mirrored",
    )
    ours, theirs = (np.array(line.split(), float) for line in out.splitlines() if line)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


# Prints how far the losses and gradients of the replicas are from those of plain operations, where
# XLA compiles the formula, as it does on a GPU. The last batch is smaller: the replicas have 2
# samples each, then 2 and 1.
COMPILED = """
import json
from dice_op._backends import tensorflow as backend
from dice_op.losses import *

rng = np.random.default_rng(0)
x = rng.normal(size=(7, 6, 6, 3)).astype("float32")
y = rng.integers(0, 3, size=x.shape[:-1]).astype("uint8")
weight = np.array([1, 2, 0.5, 1, 1, 3, 1], "float32")
batches = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(4)
batches = strategy.experimental_distribute_dataset(batches)

def results(loss, weighted, gpu, graph):
    backend._on_gpu = lambda tensor: gpu

    def of_replica(x, y, weight):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x, weight if weighted else None)
        return value, tape.gradient(value, x)

    def step(*batch):
        return strategy.run(of_replica, batch)

    function = tf.function(step, input_signature=batches.element_spec)
    found = [(function if graph else step)(*batch) for batch in batches]
    assert function.experimental_get_tracing_count() == graph
    return [a for v in tf.nest.flatten(found) for a in strategy.experimental_local_results(v)]

for text in sys.argv[2:]:
    for weighted in (True, False):
        loss = eval(text)
        plain = results(loss, weighted, gpu=False, graph=True)
        errors = []
        for graph in (True, False):
            found = results(loss, weighted, gpu=True, graph=graph)
            assert len(found) == len(plain) == 8
            for a, b in zip(found, plain):
                assert a.shape == b.shape and np.any(b != 0)
                errors.append(float(np.max(np.abs(a - b)) / np.max(np.abs(b))))
        formula = backend._formula(type(loss), json.dumps(loss.get_config()))
        print(max(errors), len(formula._programs))
"""


@pytest.mark.parametrize(
    "cases",
    [
        ["DiceCELoss(batch=True)"],
        pytest.param([*LOSSES, *OTHERS], marks=pytest.mark.full),
    ],
    ids=["one loss", "all losses"],
)
def test_a_compiled_formula_serves_replicas_and_all_sizes_of_a_batch(cases, run_python):
    out = run_python(TRAIN.partition("import keras")[0] + COMPILED, "mirrored", *cases)
    found = [line.split() for line in out.splitlines() if line]
    assert len(found) == 2 * len(cases)
    for number, (error, programs) in enumerate(found):
        assert float(error) <= 1e-6
        # Each is traced once: with weights, without, and what follows where replicas add up.
        traced = 1 + number % 2 + ("batch=True" in cases[number // 2])
        assert int(programs) == traced, cases[number // 2]


# The same as a loop of one's own, for Keras' fit does not know several processes. The weights are
# plain tensors: each process takes the step of the gradient that all replicas have together.
LOOP = """
import sys
import numpy as np
import tensorflow as tf
strategy = tf.distribute.get_strategy()
if sys.argv[1] == "workers":
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
from dice_op.losses import *

replicas = strategy.num_replicas_in_sync
rng = np.random.default_rng(0)
x = rng.normal(size=(4, 6, 6, 3)).astype("float32")
y = rng.integers(0, 3, size=x.shape[:-1]).astype("uint8")
y[:2][y[:2] == 2] = 0
start = rng.normal(size=(3, 3, 3, 3)).astype("float32")

def share(values):
    def of_replica(context):
        return tf.constant(np.split(values, replicas)[context.replica_id_in_sync_group])
    return strategy.experimental_distribute_values_from_function(of_replica)

for text in sys.argv[2:]:
    loss, weights, losses = eval(text), tf.constant(start), []

    @tf.function
    def step(x, y, weights):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = loss(y, tf.nn.conv2d(x, weights, 1, "SAME"))
        gradient = tape.gradient(value, weights)
        return tf.distribute.get_replica_context().all_reduce("sum", [value, gradient])

    for _ in range(3):
        value, gradient = strategy.run(step, (share(x), share(y), weights))
        value, gradient = (strategy.experimental_local_results(v)[0] for v in (value, gradient))
        weights, losses = weights - 2 * gradient, [*losses, float(value)]
    print(*losses, *np.ravel(weights))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one(run_python):
    workers = [f"localhost:{free_port()}" for _ in range(2)]
    processes = []
    for index in range(2):
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", LOOP, "workers", *LOSSES]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        expected = numbers(run_python(LOOP, "one", *LOSSES))
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
        for one, two in zip(expected, numbers(out), strict=True):
            assert np.ptp(one[:3]) > 1e-3
            np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_sums_of_patches_add_up(axis):
    """A volume may be too large for one device: its sums and its gradient are computed in
    patches."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 12, 10, 8, 3)), tf.float32)
    y = tf.constant(rng.integers(0, 3, size=x.shape[:-1]), tf.uint8)
    loss = dice_op.losses.DiceLoss()
    whole, gradient = value_and_gradient(lambda x: loss(y, x), x)

    parts = [
        (tf.gather(x, at, axis=axis), tf.gather(y, at, axis=axis)) for at in ([0, 1, 2], [5, 4])
    ]
    rest = [i for i in range(x.shape[axis]) if i not in (0, 1, 2, 5, 4)]
    parts.append((tf.gather(x, rest, axis=axis), tf.gather(y, rest, axis=axis)))

    def of_patches(logits):
        each = zip(logits, [labels for _, labels in parts], strict=True)
        sums = [dice_op.dice_sums(q, p, activation="softmax") for p, q in each]
        return tf.reduce_mean(loss.from_sums(formulas.added(sums)))

    value, gradients = value_and_gradient(of_patches, [logits for logits, _ in parts])
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    for got, at in zip(gradients, ([0, 1, 2], [5, 4], rest), strict=True):
        reference.assert_gradient(got, tf.gather(gradient, at, axis=axis), 1e-6)
