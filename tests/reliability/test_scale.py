"""Volumes of more than 2^31 elements, against double precision.

A volume is one block of voxels again and again, and from element 2^31 on another block with other
frequencies and logits. So the reference needs each block once, and an index that wraps reads other
voxels: the length of a block is a prime number, and no power of two is a multiple of it. Test by
test these need up to 12 GB of memory, and JAX up to 18.
"""

import json
import resource
import sys

import ml_dtypes
import numpy as np
import pytest

from dice_op import core
from helpers import reference
from helpers.kernel_inputs import coefficients_by_name, make
from helpers.paths import TESTS
from helpers.processes import output_of

pytestmark = pytest.mark.long

EPSILON = {"float16": 2**-11, "bfloat16": 2**-8}
# The number of classes, and the sides of a volume of a few percent more than 2^31 elements.
SIDES = {1: (1301, 1301, 1301), 2: (1031, 1031, 1031), 4: (821, 821, 821), 104: (277, 277, 277)}
BLOCK = {1: 1_048_573, 2: 524_287, 4: 262_139, 104: 16_381}  # voxels


class Vast:
    """Logits `x`, [1, spatial..., C] or channels first, labels `y`, and what they must give."""

    def __init__(self, classes, dtype, data_format="channels_last"):
        self.sides = SIDES[classes]
        self.voxels, self.classes, self.dtype = int(np.prod(self.sides)), classes, dtype
        self.planar = data_format == "channels_first"
        self.activation = "sigmoid" if classes == 1 else "softmax"
        self.options = {
            "activation": self.activation, "data_format": data_format, "cross_entropy": True,
        }  # fmt: skip
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        assert self.voxels * classes > 2**31 and self.voxels * classes * 2 > 2**32
        self.flat_shape = (classes, self.voxels) if self.planar else (self.voxels, classes)
        self.flat = np.empty(self.flat_shape, kind)
        labels = np.empty(self.voxels, np.uint8)
        self.wanted = {}
        border, block = 2**31 // classes, BLOCK[classes]
        for part, (begin, end) in enumerate([(0, border), (border, self.voxels)]):
            x, y, _ = make((1, block, classes), "uint8", self.activation, seed=part)
            x, y = x[0], y[0]
            if part:  # Other frequencies, so that the sums show which voxels were read.
                x[:, 0] += 2
                y[::3] = 0
            x = x.astype(kind)
            for at in range(begin, end, block):
                count = min(block, end - at)
                self.put(at, x[:count])
                labels[at : at + count] = y[:count]
            for times, count in (((end - begin) // block, block), (1, (end - begin) % block)):
                t = reference.one_hot(y[None, :count], classes)
                sums = reference.sums(x[None, :count], t, activation=self.activation)
                for name, value in sums.items():
                    self.wanted[name] = self.wanted.get(name, 0) + times * value
        self.wanted["weight_sum"] = np.float64([self.voxels])
        self.y = labels.reshape(1, *self.sides)
        shape = (classes, *self.sides) if self.planar else (*self.sides, classes)
        self.x = self.flat.reshape(1, *shape)
        self.shape = self.x.shape
        self.coefficients = np.random.default_rng(9).normal(size=(4, 1, classes)).astype(np.float32)

    def put(self, at, x):
        if self.planar:
            self.flat[:, at : at + len(x)] = x.T
        else:
            self.flat[at : at + len(x)] = x

    def windows(self):
        """Slices of voxels: around element and byte 2^31 and 2^32, the ends, and some between."""
        borders = {2**31 // self.classes, 2**32 // self.classes // 2, 2**31 // self.classes // 2}
        borders |= {0, self.voxels, 2**31, *range(0, self.voxels, self.voxels // 19)}
        for at in sorted(borders):
            window = slice(max(0, at - 1500), min(at + 1500, self.voxels))
            if window.start < window.stop:
                yield window

    def of(self, array, window):
        """[1, V, C] of a window of voxels."""
        array = np.reshape(array, self.flat_shape)
        return (array[:, window].T if self.planar else array[window])[None].astype(np.float64)

    def check_sums(self, sums):
        for name, wanted in self.wanted.items():
            error = reference.relative_error(sums[name], wanted)
            assert error <= 1e-6, (name, error)

    def gradients(self):
        """What the windows' gradients must be. Call it before the logits are overwritten."""
        labels = self.y.reshape(-1)
        return [
            reference.gradient(
                self.of(self.flat, window),
                reference.one_hot(labels[None, window], self.classes),
                self.coefficients,
                activation=self.activation,
            )
            for window in self.windows()
        ]

    def check_gradient(self, gradient, wanted):
        bound = 2 * EPSILON[self.dtype] + 5e-6
        for window, value in zip(self.windows(), wanted, strict=True):
            error = reference.gradient_error(self.of(gradient, window), value)
            assert error <= bound, (window, error)


def of_core(vast):
    """The sums, and the gradient in the memory of the logits."""
    sums = core.sums(vast.x, vast.y, **vast.options)
    given = coefficients_by_name(vast.coefficients, vast.activation)
    return sums, core.gradient(vast.x, vast.y, **given, **vast.options, out=vast.x)


def total(sums, coefficients):
    """The loss whose derivatives with respect to the sums are the coefficients."""
    names = ("intersection", "pred_sum", "cross_entropy", "negative_cross_entropy")
    terms = [(getattr(sums, name), a) for name, a in zip(names, coefficients, strict=True)]
    return sum((value * a).sum() for value, a in terms if value is not None)


def of_tensorflow(vast, jit=False):
    import tensorflow as tf

    import dice_op

    def tensor(array):  # without a copy
        if array.dtype == ml_dtypes.bfloat16:
            capsule = array.view(np.int16).__dlpack__()
            return tf.bitcast(tf.experimental.dlpack.from_dlpack(capsule), tf.bfloat16)
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())

    @tf.function(jit_compile=jit)
    def run(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            sums = dice_op.dice_sums(y, x, **vast.options)
            names = ("intersection", "pred_sum", "cross_entropy", "negative_cross_entropy")
            loss = tf.add_n(
                [
                    tf.reduce_sum(getattr(sums, name) * a)
                    for name, a in zip(names, vast.coefficients, strict=True)
                    if getattr(sums, name) is not None
                ]
            )
        found = {name: value for name, value in sums._asdict().items() if value is not None}
        return found, tape.gradient(loss, x)

    sums, gradient = run(tensor(vast.x), tensor(vast.y))
    return {name: value.numpy() for name, value in sums.items()}, np.asarray(gradient)


def of_jit(vast):
    return of_tensorflow(vast, jit=True)


def of_torch(vast):
    import torch

    import dice_op.torch

    x = torch.from_numpy(vast.flat.view(np.int16)).view(getattr(torch, vast.dtype))
    x = x.reshape(vast.x.shape).requires_grad_()
    sums = dice_op.torch.dice_sums(x, torch.from_numpy(vast.y), **vast.options)
    total(sums, torch.from_numpy(vast.coefficients)).backward()
    found = {name: v.detach().numpy() for name, v in sums._asdict().items() if v is not None}
    return found, x.grad.view(torch.int16).numpy().view(vast.flat.dtype)


def of_jax(vast):
    import jax
    import jax.numpy as jnp

    import dice_op.jax

    def loss(x, y):
        sums = dice_op.jax.dice_sums(x, y, **vast.options)
        return total(sums, vast.coefficients), sums._asdict()

    # The gradient takes the memory of the logits, of which XLA would make a copy otherwise.
    x, y = jnp.array(vast.x), jnp.asarray(vast.y)
    vast.x = vast.flat = None
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), donate_argnums=0)
    (_, sums), gradient = run(x, y)
    found = {name: np.asarray(value) for name, value in sums.items() if value is not None}
    return found, np.asarray(gradient)


# The front end, the classes, the dtype and the layout. The labels of one class alone have more
# than 2^31 elements too.
CASES = {
    "core, sigmoid": (of_core, 1, "float16"),
    "core, softmax": (of_core, 4, "bfloat16"),
    "core, channels first": (of_core, 2, "float16", "channels_first"),
    "core, 104 classes": (of_core, 104, "bfloat16"),
    "core, 104 classes, channels first": (of_core, 104, "float16", "channels_first"),
    "TensorFlow": (of_tensorflow, 4, "float16"),
    "TensorFlow, sigmoid": (of_tensorflow, 1, "bfloat16"),
    "TensorFlow, jit_compile": (of_jit, 4, "float16"),
    "PyTorch": (of_torch, 2, "bfloat16"),
    "PyTorch, channels first": (of_torch, 4, "float16", "channels_first"),
    "JAX": (of_jax, 2, "float16"),
    "JAX, sigmoid": (of_jax, 1, "bfloat16"),
}


def measure(case):
    """Checks a case, and says what it saw."""
    run, *what = CASES[case]
    vast = Vast(*what)
    wanted = vast.gradients()
    sums, gradient = run(vast)
    vast.check_sums(sums)
    vast.check_gradient(gradient, wanted)
    errors = [reference.relative_error(sums[name], value) for name, value in vast.wanted.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "shape": " x ".join(map(str, vast.shape)), "dtype": vast.dtype,
        "largest error of a sum": float(f"{max(errors):.3g}"),
        "peak of memory, GB": peak // 10**8 / 10,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_more_than_2_to_31_elements_are_right(case, seen):
    """Each in a process of its own, which gives its memory back even if it fails."""
    from benchmarks.machine import available_memory  # not on the path of that process

    if CASES[case][0] is of_jax and available_memory() < 18e9:
        pytest.skip("JAX takes up to 18 GB")
    printed = output_of(sys.executable, __file__, case, PYTHONPATH=str(TESTS))
    seen("scale", case, json.loads(printed.splitlines()[-1]))


def test_a_bad_label_beyond_2_to_31_voxels_is_named():
    vast = Vast(1, "float16")
    depth, height, width = vast.sides
    vast.y[0, depth - 1, height - 2, width - 3] = 7
    message = rf"voxel \[0, {depth - 1}, {height - 2}, {width - 3}\].* the value 7,"
    with pytest.raises(ValueError, match=message):
        core.sums(vast.x, vast.y, **vast.options)
    with pytest.raises(ValueError, match=message):
        core.scores(vast.y, vast.y, classes=2)


def test_counts_of_more_than_2_to_31_voxels_are_exact():
    vast = Vast(1, "float16")
    labelled = vast.wanted["label_sum"][0, 0]
    prediction = vast.y.copy()
    at = slice(vast.voxels - 10**6, vast.voxels)
    flipped = prediction.reshape(-1)[at]
    of_ones = int(flipped.sum())
    np.subtract(1, flipped, out=flipped)  # The last million voxels are all wrong.
    counts = core.scores(prediction, vast.y, classes=2)
    hits = labelled - of_ones
    background = vast.voxels - labelled - (10**6 - of_ones)
    assert counts["intersection"].tolist() == [[background, hits]]
    assert counts["label_sum"].tolist() == [[vast.voxels - labelled, labelled]]
    predicted = labelled - of_ones + (10**6 - of_ones)
    assert counts["pred_sum"].tolist() == [[vast.voxels - predicted, predicted]]


@pytest.mark.parametrize("samples", [1, 3])
def test_more_than_2_to_32_voxels_are_right(samples, seen):
    """All logits and labels are zeros, but for a few windows. The gradient goes into the memory of
    the logits, where it takes 9 GB."""
    voxels = (2**32 + 3_000_018) // samples
    # Zeros take no memory until somebody writes there.
    x, y = np.zeros((samples, voxels, 1), np.float16), np.zeros((samples, voxels), np.uint8)
    assert x.size > 2**32
    count = 100_003
    starts = {0, voxels // 2, voxels - count}
    if samples == 1:
        starts |= {2**31 - 50_000, 2**32 - 50_000}
    windows = [(n, start) for n in range(samples) for start in sorted(starts)]
    given, wanted = [], {}
    for seed, (n, start) in enumerate(windows):
        logits, labels, t = make((1, count, 1), "uint8", "sigmoid", seed)
        logits = (logits + seed).astype(np.float16)
        x[n, start : start + count], y[n, start : start + count] = logits[0], labels[0]
        given.append((logits, t))
        for name, value in reference.sums(logits, t, activation="sigmoid").items():
            wanted.setdefault(name, np.zeros((samples, 1)))[n] += value[0]
    rest = voxels - len(starts) * count
    wanted["pred_sum"] += rest / 2
    wanted["negative_cross_entropy"] += rest * np.log(2)
    sums = core.sums(x, y, activation="sigmoid", cross_entropy=True)
    for name, value in wanted.items():
        assert reference.relative_error(sums[name], value) <= 1e-6, name
    coefficients = np.random.default_rng(0).normal(size=(4, samples, 1)).astype(np.float32)
    options = {"activation": "sigmoid", "cross_entropy": True}
    derivatives = coefficients_by_name(coefficients, "sigmoid")
    core.gradient(x, y, **derivatives, **options, out=x)
    for (n, start), (logits, t) in zip(windows, given, strict=True):
        value = reference.gradient(logits, t, coefficients[:, n : n + 1], activation="sigmoid")
        found = x[n : n + 1, start : start + count].astype(np.float64)
        assert reference.gradient_error(found, value) <= 2 * EPSILON["float16"] + 5e-6, (n, start)
    seen("scale", f"core, sigmoid, voxels in a batch of {samples}", voxels * samples)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
