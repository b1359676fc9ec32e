"""Thousands of steps take no more memory than a few, and threads do not disturb each other."""

import json
import threading

import numpy as np
import pytest

from dice_op import core
from helpers.installed import needs
from helpers.kernel_inputs import make

# --- memory ---------------------------------------------------------------------------------------

# Each step has one of a few shapes.
INPUTS = """
    import gc, json, os, sys
    import numpy as np

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rng = np.random.default_rng(0)
    shapes = [(1, 5, 6, 7, 4), (2, 6, 6, 6, 4), (3, 4, 4, 9, 4), (2, 5, 5, 5, 4)]
    X = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    Y = [rng.integers(0, 4, shape[:-1]).astype(np.uint8) for shape in shapes]
"""
MEASURE = """
    def after(count):
        for i in range(count):
            step(i % len(X))
        gc.collect()
        return resident(), len(gc.get_objects())

    steps, warm, windows = map(int, sys.argv[1:])
    print(json.dumps([after(steps) for _ in range(warm + windows)][warm - 1 :]))
"""
CORE = """
    from dice_op import core

    def step(i):
        ones = np.ones((len(X[i]), 4), np.float32)
        core.sums(X[i], Y[i], cross_entropy=True)
        core.gradient(X[i], Y[i], d_intersection=ones, d_pred_sum=-ones)
        core.scores(X[i], Y[i])
        try:
            core.sums(X[i], Y[i] + 4)
        except ValueError:
            pass
"""
TENSORFLOW = """
    import tensorflow as tf, dice_op
    loss = dice_op.losses.DiceCELoss()
    signature = [tf.TensorSpec([None] * 5), tf.TensorSpec([None] * 4, tf.uint8)]

    @tf.function(input_signature=signature)
    def run(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x)
        return value, tape.gradient(value, x)

    def step(i):
        run(X[i], Y[i])
"""
EAGER = """
    import tensorflow as tf, dice_op

    def step(i):
        x = tf.constant(X[i])
        with tf.GradientTape() as tape:
            tape.watch(x)
            sums = dice_op.dice_sums(Y[i], x, activation="softmax")
            value = tf.reduce_sum(sums.intersection / sums.pred_sum)
        tape.gradient(value, x)
"""
JIT = TENSORFLOW.replace("input_signature=signature", "jit_compile=True")
TORCH = """
    import torch, dice_op.torch
    loss = dice_op.torch.DiceCELoss()

    def step(i):
        x = torch.from_numpy(X[i]).movedim(-1, 1).contiguous().requires_grad_()
        loss(x, torch.from_numpy(Y[i])).backward()
"""
JAX = """
    import jax, dice_op.jax
    loss = dice_op.jax.DiceCELoss()
    run = jax.jit(jax.value_and_grad(lambda x, y: loss(x, y).sum()))

    def step(i):
        run(X[i], Y[i])
"""
FIT = """
    import keras
    from dice_op import losses, metrics

    model = keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Conv2D(3, 1)])
    model.compile("sgd", losses.DiceCELoss(), metrics=[metrics.DiceScore()])
    steps, warm, windows = map(int, sys.argv[1:])
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            gc.collect()
            seen.append((resident(), len(gc.get_objects())))

    x = rng.normal(size=(steps, 6, 6, 1)).astype(np.float32)
    y = rng.integers(0, 3, (steps, 6, 6)).astype(np.uint8)
    model.fit(x, y, batch_size=1, epochs=warm + windows, verbose=0, callbacks=[Watch()])
    print(json.dumps(seen[warm - 1 :]))
"""
# The code, and the package that it needs, which is also the backend of Keras.
FRONT_ENDS = {
    "core": (CORE + MEASURE, "tensorflow"),
    "TensorFlow, tf.function": (TENSORFLOW + MEASURE, "tensorflow"),
    "TensorFlow, eager": (EAGER + MEASURE, "tensorflow"),
    "TensorFlow, jit_compile": (JIT + MEASURE, "tensorflow"),
    "PyTorch": (TORCH + MEASURE, "torch"),
    "JAX": (JAX + MEASURE, "jax"),
    "Keras on TensorFlow": (FIT, "tensorflow"),
    "Keras on JAX": (FIT, "jax"),
    "Keras on PyTorch": (FIT, "torch"),
}
EACH = [pytest.param(name, marks=needs(package)) for name, (_, package) in FRONT_ENDS.items()]
MOST_GROWTH = 2 << 20  # bytes


def sizes(front_end, steps, warm, windows, run_python):
    """Bytes of memory and Python's objects after the warm-up, and then after each window.

    Args:
      steps: the number of steps in a window.
      warm: the number of windows that are for warming up.
    """
    code, backend = FRONT_ENDS[front_end]
    # One arena, so that the threads' shares of it do not count as growth.
    environment = {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
    printed = run_python(INPUTS + code, *map(str, (steps, warm, windows)), **environment)
    return np.array(json.loads(printed.splitlines()[-1]))


@pytest.mark.long
@pytest.mark.parametrize("front_end", EACH)
def test_10000_steps_take_no_memory_after_a_warm_up(front_end, run_python, seen):
    first, *_, last = sizes(front_end, 1000, 4, 10, run_python)
    memory, objects = last - first
    assert memory <= MOST_GROWTH and objects <= 200, (memory, objects)
    seen("long runs", f"{front_end}: bytes that 10000 steps have left", int(memory))


@pytest.mark.full
@pytest.mark.parametrize("front_end", EACH)
def test_no_front_end_leaks_in_each_step(front_end, run_python):
    """A framework may take memory in some steps that it uses later, but not in all 500 and 500."""
    grown = np.diff(sizes(front_end, 500, 2, 3, run_python), axis=0)
    memory, objects = grown.min(0)
    assert memory <= MOST_GROWTH / 4 and objects <= 50, grown


def test_2000_calls_of_core_take_no_more_memory_than_500(run_python):
    first, *_, last = sizes("core", 500, 1, 4, run_python)
    memory, objects = last - first
    assert memory <= MOST_GROWTH and objects <= 20, (memory, objects)


LEAK = """
    kept = []

    def step(i, clean=step):
        clean(i)
        kept.append(np.ones(300))
"""


def test_a_leak_of_two_kilobytes_a_step_is_noticed(run_python):
    code = INPUTS + CORE + LEAK + MEASURE
    grown = np.diff(json.loads(run_python(code, "500", "1", "3")), axis=0)
    assert grown.min(0)[0] > MOST_GROWTH / 4
    assert grown.sum(0)[0] > MOST_GROWTH


# --- threads --------------------------------------------------------------------------------------


def of_core(x, y):
    ones = np.ones((len(x), x.shape[-1]), np.float32)
    sums = core.sums(x, y)
    return sums["intersection"], core.gradient(x, y, d_intersection=ones, d_pred_sum=-ones)


def of_tensorflow(x, y):
    import tensorflow as tf

    import dice_op

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        sums = dice_op.dice_sums(y, x, activation="softmax")
        value = tf.reduce_sum(sums.intersection) - tf.reduce_sum(sums.pred_sum)
    return sums.intersection.numpy(), tape.gradient(value, x).numpy()


def of_torch(x, y):
    import torch

    import dice_op.torch

    x = torch.from_numpy(x).requires_grad_()
    sums = dice_op.torch.dice_sums(x, torch.from_numpy(y), data_format="channels_last")
    (sums.intersection.sum() - sums.pred_sum.sum()).backward()
    return sums.intersection.detach().numpy(), x.grad.numpy()


def of_jax(x, y):
    import jax

    import dice_op.jax

    def loss(x):
        sums = dice_op.jax.dice_sums(x, y)
        return sums.intersection.sum() - sums.pred_sum.sum(), sums.intersection

    (_, intersection), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    return np.asarray(intersection), np.asarray(gradient)


def call_at_once(front_ends, threads, calls):
    """What went wrong where threads call at the same time, each with data of its own. All front
    ends give the bits of `core`."""
    data, wrong = [], []
    for thread in range(threads):
        x, y, _ = make((1 + thread % 3, 2000 + 977 * thread, 2 + thread % 4), seed=thread)
        data.append((x, y, of_core(x, y)))
    # The first call of a framework parses Python code, and Python 3.11 fails if threads do that at
    # the same time ("AST constructor recursion depth mismatch").
    for run in front_ends:
        run(*data[0][:2])
    start = threading.Barrier(threads)

    def work(thread):
        x, y, wanted = data[thread]
        run = front_ends[thread % len(front_ends)]
        start.wait()
        try:
            for _ in range(calls):
                for got, value in zip(run(x, y), wanted, strict=True):
                    np.testing.assert_array_equal(got, value)
        except Exception as error:  # noqa: BLE001  The thread's failure is that of the test.
            wrong.append((run.__name__, error))

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def test_16_threads_call_core_and_the_op_at_once():
    assert call_at_once([of_core, of_tensorflow], 16, 10) == []


@pytest.mark.full
def test_16_threads_call_every_front_end_at_once(seen):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    calls = 100
    assert call_at_once([of_core, of_tensorflow, of_torch, of_jax], 16, calls) == []
    seen("long runs", "calls of 16 threads at once, four front ends", 16 * calls)


MODELS = """
    import sys, threading
    import keras
    import numpy as np
    from dice_op import losses, metrics

    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 10, 9, 1)).astype(np.float32)
    y = rng.integers(0, 3, x.shape[:-1]).astype(np.uint8)

    def model(seed):
        keras.utils.set_random_seed(seed)
        layers = [keras.Input((10, 9, 1)), keras.layers.Conv2D(3, 3, padding="same")]
        made = keras.Sequential(layers)
        made.compile("sgd", losses.DiceCELoss(), metrics=[metrics.DiceScore()])
        return made

    def train(made):
        made.fit(x, y, batch_size=4, epochs=10, shuffle=False, verbose=0)
        return [w.tobytes() for w in made.get_weights()]

    def evaluate(made):
        return {repr(made.evaluate(x, y, batch_size=4, verbose=0)) for _ in range(10)}

    def together(*tasks):
        results = [None] * len(tasks)
        def work(i, task, made):
            results[i] = task(made)
        threads = [threading.Thread(target=work, args=(i, *task)) for i, task in enumerate(tasks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    alone = [train(model(0)), train(model(1)), evaluate(model(2))]
    assert len(alone[2]) == 1 and alone[0] != alone[1]
    assert together((train, model(0)), (train, model(1))) == alone[:2]
    assert together((train, model(1)), (evaluate, model(2))) == alone[1:]
"""


@pytest.mark.full
def test_models_train_and_are_evaluated_in_two_threads(run_python):
    """Both give the bits that they give one after the other."""
    run_python(MODELS, KERAS_BACKEND="tensorflow")
