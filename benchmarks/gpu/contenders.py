"""Times the Dice loss with its gradient on a GPU, as others compute it and as dice_op does.

    python -m benchmarks.gpu.contenders torch|jax [--quick]

It is a step of build_tools/gpu_check.py, with one process for each framework. All contenders
compute the same loss, which is the mean over the classes of 1 - (2 I + 1e-5) / (P + T + 1e-5) on
softmax probabilities, from the same channels-last logits `[1, V, C]` and uint8 labels `[1, V]`.
Value and gradient are compared with float64 before a contender is timed.
"""

import argparse
import functools
import itertools
import math
import os
import time

from benchmarks.cases import SMOOTH, cube
from benchmarks.contenders import Contender, by_title
from benchmarks.gpu import installed, report
from benchmarks.gpu.device import Device
from benchmarks.gpu.frameworks import Jax, PyTorch
from benchmarks.gpu.volume import RepeatedVolume
from benchmarks.measuring import emit, follow, measure

FRAMEWORKS = {"torch": PyTorch, "jax": Jax}


def _dice_loss(intersection, pred_sum, label_sum):
    """Computes the loss from sums `[1, C]` in PyTorch or JAX."""
    return (1 - (2 * intersection + SMOOTH) / (pred_sum + label_sum + SMOOTH)).mean()


# --- PyTorch --------------------------------------------------------------------------------------


def _monai_loss(torch, x, y):
    """monai.losses.DiceLoss(to_onehot_y=True, softmax=True): one-hot labels of the logits' size."""
    p = torch.softmax(x, -1, dtype=torch.float32)  # Autocast does this too.
    t = torch.zeros_like(p).scatter_(-1, y.long().unsqueeze(-1), 1)
    return _dice_loss((t * p).sum(1), p.sum(1), t.sum(1))


def _compilable_loss(torch, x, y):
    """The same loss without a scatter, which a compiler could not fuse."""
    p = torch.softmax(x, -1, dtype=torch.float32)
    t = (y.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)).float()
    return _dice_loss((t * p).sum(1), p.sum(1), t.sum(1))


def _nnunet_loss(torch, x, y):
    """nnunetv2's MemoryEfficientSoftDiceLoss: one-hot labels of a byte, summed without gradient."""
    p = torch.softmax(x, -1, dtype=torch.float32)
    with torch.no_grad():
        t = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
        t.scatter_(-1, y.long().unsqueeze(-1), 1)
        label_sum = t.sum(1)
    return _dice_loss((p * t).sum(1), p.sum(1), label_sum)


def _by_autograd(loss):
    """Loss and gradient by PyTorch's autograd, which cannot use the memory for a gradient."""
    import torch

    def step(x, y, out):
        x = x.detach().requires_grad_()
        value = loss(x, y)
        return value.detach(), torch.autograd.grad(value, x)[0]

    return step


def _in_torch(loss_function, compiled=False):
    """A contender that computes a loss with PyTorch's own operations."""

    def make_step(case):
        import torch

        function = functools.partial(loss_function, torch)
        if compiled:
            # PyTorch compiles a function for eight shapes, and then runs it as it is. It counts
            # anew after this.
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
        return _by_autograd(function)

    return make_step


def _dice_op_in_torch(case):
    from dice_op.torch import DiceLoss

    return _by_autograd(DiceLoss(data_format="channels_last"))


def _triton(case):
    import torch

    from benchmarks.gpu import triton_kernels

    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    return functools.partial(triton_kernels.loss_and_gradient, torch, SMOOTH, programs)


# --- JAX ------------------------------------------------------------------------------------------


def _jax_loss(x, y):
    """The loss as people write it in JAX, where XLA fuses the operations."""
    import jax

    p = jax.nn.softmax(x.astype(jax.numpy.float32), -1)
    t = jax.nn.one_hot(y, x.shape[-1], dtype=jax.numpy.float32)
    return _dice_loss((t * p).sum(1), p.sum(1), t.sum(1))


def _in_jax(loss_function):
    import jax

    return jax.jit(jax.value_and_grad(loss_function))


def _jax(case):
    return _in_jax(_jax_loss)


def _dice_op_in_jax(case):
    from dice_op.jax import DiceLoss

    return _in_jax(DiceLoss())


# --- the step -------------------------------------------------------------------------------------

# The most important come first, because time may run out.
CONTENDERS = by_title(
    Contender("dice_op", _dice_op_in_torch, framework="torch", ours=True),
    Contender("Triton kernels", _triton, framework="torch", needs=("triton",), most_classes=16),
    Contender("PyTorch eager, nnU-Net's form", _in_torch(_nnunet_loss), framework="torch"),
    Contender("PyTorch eager, MONAI's form", _in_torch(_monai_loss), framework="torch"),
    Contender(
        "torch.compile, MONAI's form",
        _in_torch(_compilable_loss, compiled=True),
        framework="torch",
        later=3,
    ),
    Contender("dice_op in JAX's jit", _dice_op_in_jax, framework="jax", ours=True),
    Contender("JAX, jit", _jax, framework="jax"),
)


def plan(framework, quick):
    """Lists contenders with their cases, the most important first."""
    edges, classes = ((256, 128), (4, 14)) if quick else ((256, 192, 128, 512), (4, 14, 2, 104))
    cases = [
        cube(edge, count, dtype=dtype)
        for edge, count, dtype in itertools.product(edges, classes, ("float32", "bfloat16"))
    ]

    def rank(case):
        return (
            {256: 0, 192: 1, 128: 2, 512: 4}[case.shape[0]]
            + {4: 0, 14: 1, 2: 3, 104: 4}[case.classes]
            + {"float32": 0, "bfloat16": 0.5}[case.dtype]
        )

    parts = [
        (number + contender.later, contender, case)
        for number, case in enumerate(sorted(cases, key=rank))
        for contender in CONTENDERS.values()
        if contender.framework == framework and contender.applies(case)
    ]
    return [part[1:] for part in sorted(parts, key=lambda part: part[0])]


def facts(part):
    """What a result says besides what is measured."""
    contender, case = part
    return {"kind": "contender", **contender.facts(), **case.facts()}


def measure_part(framework, part):
    """Measures a contender on a case, or says why it cannot be measured."""
    contender, case = part
    if reason := contender.why_not(case):
        return {"failed": reason}
    try:
        return measure(framework, contender, case, RepeatedVolume(case))
    finally:
        framework.forget()


def main():
    """Emits a result for each contender and case, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--quick", action="store_true", help="measure two volumes")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no measurement after this time"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    # Otherwise JAX would take nearly all memory at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if why := installed.why_not(arguments.framework):
        emit({"kind": "contenders", "framework": arguments.framework, "skipped": why})
        return
    framework = FRAMEWORKS[arguments.framework](Device())
    parts = plan(arguments.framework, arguments.quick)
    measure_one = functools.partial(measure_part, framework)
    follow(parts, deadline, "contenders", facts, measure_one, report.line)


if __name__ == "__main__":
    main()
