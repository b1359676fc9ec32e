"""Checks every loss of a front end on a GPU, its value and its gradient.

    python -m gpu.front_ends torch|jax

It is a step of build_tools/gpu_check.py. What the GPU computes is compared with what the same loss
computes on the CPU in double precision, which the test-suite holds to an independent reference. The
logits are multiples of 1/16 that every type holds exactly, so that one reference serves them all.
"""

import functools
import math
import sys

import numpy as np

from benchmarks.gpu import installed
from benchmarks.gpu.kernels import GRADIENT_TOLERANCE
from benchmarks.measuring import emit, say, short
from gpu.kernels import Outcomes, until
from helpers import reference
from helpers.each_loss import EACH

DTYPES = ("float32", "bfloat16", "float16")
# The most important come first, because time may run out. If the channels are first, each class of
# the first volume begins at an aligned address, and of the second only the first class.
SHAPES = {(2, 41, 40, 39): DTYPES, (2, 17, 15, 13): ("float32",)}
CLASSES = 4
VALUE_TOLERANCE = 1e-5  # relative to the value, or to 0.1 if that is larger
# Relative to the gradient's largest element. In float32 the formula between the kernels adds its
# own rounding to theirs.
TOLERANCE = {**GRADIENT_TOLERANCE, "float32": 1e-5}


@functools.cache
def volume(shape):
    """Logits `[N, spatial..., C]`, and class indices that agree with many of them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, shape)
    x = 2 * rng.normal(size=(*shape, CLASSES)) + 2 * reference.one_hot(labels, CLASSES)
    return np.round(16 * x).clip(-255, 255) / 16, labels


# --- the front ends -------------------------------------------------------------------------------
#
# Their gradients are times the number of voxels in a sample. Otherwise they would be too small for
# float16, for which people scale a loss as well.


class PyTorch:
    """dice_op.torch, whose channels come first.

    cuda: what stands for torch.cuda where there is no GPU.
    """

    def __init__(self, place="gpu", cuda=None):
        import torch

        import dice_op.torch

        self.torch, self.losses = torch, dice_op.torch
        self.on_gpu = place == "gpu"
        self.place = "cuda" if self.on_gpu else place
        self.cuda = torch.cuda if self.on_gpu else cuda

    def result(self, loss, x, y, dtype, place=None):
        """Value and gradient as NumPy has them, with the channels last."""
        torch, place = self.torch, place or self.place
        x = torch.tensor(x, dtype=getattr(torch, dtype), device=place)
        x = x.movedim(-1, 1).contiguous().requires_grad_()
        # A loss that overwrites the logits may not have the tensor that a user keeps.
        value = loss(x * 1, torch.tensor(y, dtype=torch.uint8, device=place))
        (value * y[0].size).backward()
        return float(value.detach()), x.grad.movedim(1, -1).double().cpu().numpy()

    def ways(self, kind, options):
        """Other ways to compute a loss, by their names: how to get (value, gradient), or why not.

        Each is called with logits, labels and dtype.
        """
        loss = getattr(self.losses, kind)(**options)
        in_place = getattr(self.losses, kind)(overwrite_logits=True, **options)
        # PyTorch's default compiler would take half a minute on a CPU.
        backend = "inductor" if self.on_gpu else "aot_eager"
        compiled = self.torch.compile(loss, fullgraph=True, backend=backend)
        why = installed.why_not_compiled("torch", "gpu" if self.on_gpu else "cpu")
        late = functools.partial(self.result, self.on_another_stream(loss))
        return {
            "the gradient in place": functools.partial(self.result, self.in_place(in_place)),
            "on another stream": late if self.cuda else "there is no GPU",
            "torch.compile": why or functools.partial(self.result, compiled),
        }

    def in_place(self, loss):
        """A call that fails if the gradient is not where the logits were."""

        def call(logits, labels):
            address = logits.data_ptr()

            def look(gradient):
                if gradient.data_ptr() != address:
                    raise RuntimeError("the gradient has other memory than the logits")

            logits.register_hook(look)
            return loss(logits, labels)

        return call

    def on_another_stream(self, loss):
        """A call on a stream that makes the logits late, so that another stream would miss them."""
        edge = 8192 if self.on_gpu else 8

        def call(logits, labels):
            here, other = self.cuda.current_stream(), self.cuda.Stream()
            other.wait_stream(here)
            with self.cuda.stream(other):
                busy = self.torch.ones(edge, edge, device=self.place)
                late = logits + 0 * (busy @ busy)[0, 0].to(logits)
                value = loss(late, labels)
            here.wait_stream(other)
            return value

        return call


class Jax:
    """dice_op.jax, whose channels come last. All runs under `jit`."""

    def __init__(self, place="gpu"):
        import jax

        import dice_op.jax

        self.jax, self.losses, self.place = jax, dice_op.jax, place

    def result(self, loss, x, y, dtype, place=None):
        """Value and gradient as NumPy has them. A place is a platform, or a sharding."""
        jax = self.jax
        if place is None or isinstance(place, str):
            place = jax.devices(place or self.place)[0]
        with jax.enable_x64(dtype == "float64"):
            step = jax.jit(jax.value_and_grad(lambda x, y: loss(x, y) * y[0].size))
            x, y = jax.numpy.asarray(x, dtype), jax.numpy.asarray(y, "uint8")
            value, gradient = step(jax.device_put(x, place), jax.device_put(y, place))
        return float(value) / y[0].size, np.asarray(gradient, np.float64)

    def ways(self, kind, options):
        """Other ways to compute a loss, by their names: how to get (value, gradient), or why not.

        Each is called with logits, labels and dtype.
        """
        sharding = self.jax.sharding
        devices = self.jax.devices(self.place)[:2]
        name = "sharded over two devices"
        if len(devices) == 1:
            return {name: "there is one"}
        mesh = sharding.Mesh(np.array(devices), ("space",))
        place = sharding.NamedSharding(mesh, sharding.PartitionSpec(None, None, "space"))
        loss = getattr(self.losses, kind)(**options)
        return {name: functools.partial(self.result, loss, place=place)}


FRONT_ENDS = {"torch": PyTorch, "jax": Jax}


# --- the checks -----------------------------------------------------------------------------------


def compare(outcomes, what, dtype, result, wanted):
    """Checks a value and a gradient. An exception is a failure too."""
    try:
        value, gradient = result()
    except Exception as error:
        outcomes.record(what, False, short(error))
        return
    error = abs(value - wanted[0]) / max(abs(wanted[0]), 0.1)
    outcomes.within(what, f"value, {dtype}", error, VALUE_TOLERANCE)
    error = reference.relative_error(gradient, wanted[1])
    outcomes.within(what, f"gradient, {dtype}", error, TOLERANCE[dtype])


def check(front_end, deadline=math.inf):
    """Checks all losses, and returns the result for the record."""
    outcomes = Outcomes()

    def of_loss(shape, title):
        kind, options = EACH[title]
        loss = getattr(front_end.losses, kind)(**options)
        wanted = front_end.result(loss, *volume(shape), "float64", "cpu")
        for dtype in SHAPES[shape]:
            result = functools.partial(front_end.result, loss, *volume(shape), dtype)
            compare(outcomes, f"{title}, {shape}", dtype, result, wanted)

    def of_ways(title):
        kind, options = EACH[title]
        given = volume(next(iter(SHAPES)))
        loss = getattr(front_end.losses, kind)(**options)
        wanted = front_end.result(loss, *given, "float64", "cpu")
        left_out = []
        for name, way in front_end.ways(kind, options).items():
            if isinstance(way, str):
                left_out.append(f"{name}: {way}")
                continue
            result = functools.partial(way, *given, "float32")
            compare(outcomes, f"{title}, {name}", "float32", result, wanted)
        return "; ".join(left_out)

    first, *others = (
        [functools.partial(of_loss, shape, title) for title in EACH] for shape in SHAPES
    )
    parts = [*first, functools.partial(of_ways, "Dice + focal"), *sum(others, [])]
    left_out = until(deadline, parts)
    return {**outcomes.facts(), "left_out": left_out}


def main():
    """Checks, emits the result for gpu_check.py, and returns the exit status."""
    arguments = installed.parse_arguments(__doc__, FRONT_ENDS)
    facts = {"kind": "front_ends", "framework": arguments.framework}
    if why := installed.why_not(arguments.framework, arguments.place):
        emit({**facts, "skipped": why})
        return 0
    result = check(FRONT_ENDS[arguments.framework](arguments.place), arguments.deadline)
    emit({**facts, **result})
    say(f"{arguments.framework}: {result['count']} checks, {len(result['failures'])} failed")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
