"""Runs a worker of build_tools/gpu_check.py where there is no GPU, with little to do.

    python -m gpu.rehearsal gpu.kernels all --seconds 60

It is for `gpu_check.py --rehearse`. `dice_op.core` is built with the CUDA kernels on the emulator,
and so is the library behind `Device`. PyTorch, JAX and TensorFlow compute on the CPU; PyTorch's
tensors are passed to the emulated kernels as if they were on a GPU. Nothing may fail that is only a
remark in the record of a GPU, and what is timed means nothing.
"""

import functools
import os
import sys

from benchmarks import measuring
from benchmarks.cases import cube
from benchmarks.gpu import contenders, device, installed, kernels
from gpu import front_ends, keras_training, tensorflow_ops
from gpu import kernels as checks
from helpers import host_device

WORKERS = {
    module.__name__: module
    for module in (checks, kernels, contenders, front_ends, keras_training, tensorflow_ops)
}
LIBRARY = measuring.ROOT / "build" / "rehearsal" / "libgpu_device.so"


# --- small sizes ----------------------------------------------------------------------------------


def every(number, calls, most_voxels=2000):
    """Each so many of the calls that are not large."""
    return [call for call in calls if call.voxels <= most_voxels][::number]


def make_small():
    """Gives every worker few and small volumes, and few repeats."""
    framework = measuring.Framework
    framework.least, framework.most, framework.longest = 2, 3, 0.2
    framework.calls_to_warm_up = 1
    host_device.PyTorchOnHost.most = host_device.JaxOnHost.most = 3

    of_options, of_regimes = checks.option_calls, checks.regime_calls
    checks.option_calls = lambda: every(10, of_options())
    checks.regime_calls = lambda: every(10, of_regimes())
    checks.Checker.same_bits = functools.partialmethod(checks.Checker.same_bits, 2)
    checks.Checker.huge = functools.partialmethod(checks.Checker.huge, elements=1000)

    both = ("float32", "bfloat16")
    kernels.plan = lambda quick: [
        cube(8, classes, dtype=dtype, cross_entropy=classes == 14)
        for classes in (2, 4, 14, 104)
        for dtype in both
    ]
    contenders.plan = lambda framework, quick: [
        (contender, cube(8, classes, dtype=dtype))
        for classes, dtype in zip((4, 14), both, strict=True)
        for contender in contenders.CONTENDERS.values()
        if contender.framework == framework
    ]
    shapes = ((2, 6, 10, 4), front_ends.DTYPES), ((1, 35), ("float32",))
    front_ends.SHAPES = dict(shapes)
    keras_training.train = functools.partial(keras_training.train, edge=8, epochs=12)


# --- stand-ins ------------------------------------------------------------------------------------


class EmulatedCore:
    """dice_op.core as dice_op.torch calls it, with tensors of the CPU as arrays of a GPU.

    Those in double precision are what the others are compared with. The CPU's kernels compute them.
    """

    def __init__(self, core):
        self.core = core

    def __getattr__(self, name):
        return getattr(self.core, name)

    def sums(self, logits, labels, *, voxel_weight=None, threads=0, **options):
        if str(logits.dtype) == "torch.float64":
            return self.core.sums(logits, labels, voxel_weight=voxel_weight, **options)
        given = map(self.on_gpu, (logits, labels))
        sums = self.core.sums(*given, voxel_weight=self.on_gpu(voxel_weight), **options)
        return {name: value.numpy() for name, value in sums.items()}

    def gradient(self, logits, labels, *, threads=0, **options):
        if str(logits.dtype) == "torch.float64":
            return self.core.gradient(logits, labels, **options)
        given = {n: self.on_gpu(v) if hasattr(v, "data_ptr") else v for n, v in options.items()}
        return self.core.gradient(self.on_gpu(logits), self.on_gpu(labels), **given)

    @staticmethod
    def on_gpu(tensor):
        """The tensor as an array of `Device`."""
        if tensor is None:
            return None
        dtype = str(tensor.dtype).removeprefix("torch.")
        # An array that shares memory asks its device only for what the class holds. So the class
        # stands for the device, and none is opened.
        return device.Array(device.Device, tensor.shape, dtype, tensor.data_ptr(), owner=tensor)


def on_the_emulator(make):
    """A function that makes the same, after which dice_op.torch calls the emulated kernels."""

    def made(*arguments):
        import dice_op.torch

        dice_op.torch.core = EmulatedCore(dice_op.torch.core)
        return make(*arguments)

    return made


def stand_in():
    """Puts what is here in the place of what is on a machine with a GPU."""
    device.LIBRARY = LIBRARY
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    checked = on_the_emulator(lambda place: front_ends.PyTorch(place, host_device.HostCuda()))
    front_ends.FRONT_ENDS = {**front_ends.FRONT_ENDS, "torch": checked}
    measured = on_the_emulator(host_device.PyTorchOnHost)
    contenders.FRAMEWORKS = {"torch": measured, "jax": host_device.JaxOnHost}
    why_not = installed.why_not
    installed.why_not = lambda framework, place="cpu": why_not(framework, "cpu")


def let_nothing_pass():
    """Lets errors end the worker that would be remarks in the record of a GPU."""
    follow = functools.partial(measuring.follow, catching=())
    contenders.follow = follow
    kernels.follow = lambda *arguments, catching: follow(*arguments)

    def times(framework, runs):
        result = measuring.time_calls(framework, runs)
        if framework.has_graphs:
            result["graph"] = measuring.time_graph(framework, runs)
        return result

    measuring.times = kernels.times = times


def main():
    """Runs the worker that the command line names, and returns its exit status."""
    name, *arguments = sys.argv[1:]
    worker = WORKERS[name]
    if worker in (front_ends, keras_training, tensorflow_ops):
        arguments += ["--place", "cpu"]
    sys.argv = [name, *arguments]
    make_small()
    stand_in()
    let_nothing_pass()
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
