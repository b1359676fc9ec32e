"""Times the Dice loss with its gradient on a GPU, as others compute it and as dice_op does.

It is a step of build_tools/gpu_check.py, with one process for each framework. All contenders
compute the same loss, which is the mean over the classes of 1 - (2 I + 1e-5) / (P + T + 1e-5) on
softmax probabilities, from the same channels-last logits and uint8 labels. Value and gradient are
compared with float64 before a contender is timed.
"""

import argparse
import functools
import itertools
import math
import os
import sys
import time

import gpu_device
import gpu_timing
import numpy as np

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SMOOTH = gpu_timing.SMOOTH
# These are wide, because they only check that a contender computes the same loss.
TOLERANCE = {"float32": 1e-2, "bfloat16": 3e-2}
BATCH = 10  # calls in a sample, where only the processor's clock can be read


def short(error):
    """The type of an exception and the beginning of its message."""
    return f"{type(error).__name__}: {error}"[:400]


def errors(work, voxels, loss, rows):
    """The absolute error of the loss, and the relative error of the gradient.

    Only the first and last voxels of the gradient are compared. rows(start, count) returns a part
    of the gradient `[V, C]` as a NumPy array.
    """
    expected_loss, (d_intersection, d_pred_sum) = work.dice(voxels)
    expected = work.gradient((d_intersection, d_pred_sum, 0 * d_pred_sum))
    count = min(work.period, voxels)
    starts = (0, max(0, voxels // work.period - 1) * work.period)
    of_gradient = [
        work.reference.gradient_error(rows(start, count), expected[:count]) for start in starts
    ]
    result = {
        "loss_error": abs(float(loss) - expected_loss),
        "gradient_error": float(np.max(of_gradient)),
    }
    # NaN does not pass this comparison.
    result["passed"] = all(error <= TOLERANCE[work.dtype] for error in result.values())
    return result


def bytes_of_a_set(work, voxels):
    """The bytes of logits, gradient and labels together."""
    return 2 * voxels * work.classes * gpu_device.itemsize(work.dtype) + voxels


# --- PyTorch ------------------------------------------------------------------------------------


def dice_loss(intersection, pred_sum, label_sum):
    """Computes the loss from sums `[1, C]` in PyTorch or JAX."""
    return (1 - (2 * intersection + SMOOTH) / (pred_sum + label_sum + SMOOTH)).mean()


def monai_loss(torch, x, y):
    """monai.losses.DiceLoss(to_onehot_y=True, softmax=True): one-hot labels of the logits' size."""
    p = torch.softmax(x, -1, dtype=torch.float32)  # Autocast does this too.
    t = torch.zeros_like(p).scatter_(-1, y.long().unsqueeze(-1), 1)
    return dice_loss((t * p).sum(1), p.sum(1), t.sum(1))


def compilable_loss(torch, x, y):
    """The same loss without a scatter, which a compiler could not fuse."""
    p = torch.softmax(x, -1, dtype=torch.float32)
    t = (y.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)).float()
    return dice_loss((t * p).sum(1), p.sum(1), t.sum(1))


def nnunet_loss(torch, x, y):
    """nnunetv2's MemoryEfficientSoftDiceLoss: one-hot labels of a byte, summed without gradient."""
    p = torch.softmax(x, -1, dtype=torch.float32)
    with torch.no_grad():
        t = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
        t.scatter_(-1, y.long().unsqueeze(-1), 1)
        label_sum = t.sum(1)
    return dice_loss((p * t).sum(1), p.sum(1), label_sum)


def through_autograd(torch, loss_function, x, y, out=None):
    """Returns loss and gradient by PyTorch's autograd, which cannot use `out`."""
    x = x.detach().requires_grad_()
    loss = loss_function(x, y)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def by_dice_op(torch, core, x, y, out):
    """Calls the fused sums and gradient, with the formula in PyTorch between them."""
    stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
    sums = core.sums(x, y, stream=stream)
    intersection, pred_sum, label_sum = (
        torch.as_tensor(sums[name], device=x.device) for name in gpu_timing.SUMS[:3]
    )
    cardinality = pred_sum + label_sum + SMOOTH
    scale = 1 / (cardinality * x.shape[-1])
    dice = (2 * intersection + SMOOTH) / cardinality
    core.gradient(
        x, y, d_intersection=-2 * scale, d_pred_sum=dice * scale, out=out, stream=stream
    )  # fmt: skip
    return (1 - dice).mean(), out


# --- Triton -------------------------------------------------------------------------------------

if triton:

    def _configs():
        shapes = itertools.product((512, 1024, 2048, 4096), (4, 8))
        return [triton.Config({"elements": e}, num_warps=w) for e, w in shapes]

    @triton.jit
    def _softmax(
        logits,
        labels,
        block,
        voxels,
        classes: tl.constexpr,
        padded: tl.constexpr,
        block_voxels: tl.constexpr,
    ):
        start = block * tl.full((), block_voxels, tl.int64)  # There may be more than 2^31 elements.
        row = tl.arange(0, block_voxels)
        c = tl.arange(0, padded)
        inside = row < voxels - start
        at = start * classes + row[:, None] * classes + c[None, :]
        mask = inside[:, None] & (c < classes)[None, :]
        x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where((c < classes)[None, :], x, float("-inf"))
        label = tl.load(labels + start + row, mask=inside, other=0).to(tl.int32)
        e = tl.exp(x - tl.max(x, axis=1)[:, None])
        p = e / tl.sum(e, axis=1)[:, None]
        return at, mask, p, label[:, None] == c[None, :]

    @triton.autotune(configs=_configs(), key=["classes", "voxels"])
    @triton.jit
    def _sums_kernel(
        logits,
        labels,
        partials,
        voxels,
        classes: tl.constexpr,
        padded: tl.constexpr,
        elements: tl.constexpr,
    ):
        block_voxels: tl.constexpr = elements // padded
        intersection = tl.zeros((block_voxels, padded), tl.float32)
        pred_sum = tl.zeros((block_voxels, padded), tl.float32)
        label_sum = tl.zeros((block_voxels, padded), tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(voxels, block_voxels), tl.num_programs(0)):
            at, mask, p, t = _softmax(logits, labels, block, voxels, classes, padded, block_voxels)
            intersection += tl.where(mask & t, p, 0.0)
            pred_sum += tl.where(mask, p, 0.0)
            label_sum += tl.where(mask & t, 1.0, 0.0)
        to = partials + tl.program_id(0) * 3 * padded + tl.arange(0, padded)
        tl.store(to, tl.sum(intersection, axis=0))
        tl.store(to + padded, tl.sum(pred_sum, axis=0))
        tl.store(to + 2 * padded, tl.sum(label_sum, axis=0))

    @triton.jit
    def _formula_kernel(
        partials,
        programs,
        result,
        smooth,
        classes: tl.constexpr,
        padded: tl.constexpr,
        rows: tl.constexpr,
    ):
        c = tl.arange(0, padded)
        row = tl.arange(0, rows)
        at = partials + row[:, None] * 3 * padded + c[None, :]
        mask = (row < programs)[:, None] & (c < classes)[None, :]
        intersection = tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        pred_sum = tl.sum(tl.load(at + padded, mask=mask, other=0.0), axis=0)
        label_sum = tl.sum(tl.load(at + 2 * padded, mask=mask, other=0.0), axis=0)
        cardinality = pred_sum + label_sum + smooth
        dice = (2 * intersection + smooth) / cardinality
        tl.store(result + c, -2 / (cardinality * classes))
        tl.store(result + padded + c, dice / (cardinality * classes))
        tl.store(
            result + 2 * padded, tl.sum(tl.where(c < classes, 1 - dice, 0.0), axis=0) / classes
        )

    @triton.autotune(configs=_configs(), key=["classes", "voxels"])
    @triton.jit
    def _gradient_kernel(
        logits,
        labels,
        result,
        out,
        voxels,
        classes: tl.constexpr,
        padded: tl.constexpr,
        elements: tl.constexpr,
    ):
        block_voxels: tl.constexpr = elements // padded
        c = tl.arange(0, padded)
        a = tl.load(result + c)
        b = tl.load(result + padded + c)
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # The cache still holds the last blocks.
        at, mask, p, t = _softmax(logits, labels, block, voxels, classes, padded, block_voxels)
        g = tl.where(t, a[None, :], 0.0) + b[None, :]
        d = p * (g - tl.sum(tl.where(mask, g * p, 0.0), axis=1)[:, None])
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)


def by_triton(torch, programs, x, y, out):
    """Computes sums, formula and gradient in three kernels."""
    voxels, classes = x.shape[1:]
    padded = max(2, triton.next_power_of_2(classes))
    partials = torch.empty(programs * 3 * padded, device=x.device)
    result = torch.empty(2 * padded + 1, device=x.device)
    _sums_kernel[(programs,)](x, y, partials, voxels, classes=classes, padded=padded)
    _formula_kernel[(1,)](
        partials, programs, result, SMOOTH, classes=classes, padded=padded,
        rows=triton.next_power_of_2(programs),
    )  # fmt: skip
    _gradient_kernel[lambda meta: (triton.cdiv(voxels, meta["elements"] // padded),)](
        x, y, result, out, voxels, classes=classes, padded=padded
    )
    return result[2 * padded], out


# --- in PyTorch's process -----------------------------------------------------------------------


def torch_contenders(torch, core, multiprocessors):
    """Maps names to functions of logits, labels and memory for a gradient.

    If there is no function, a text says why.
    """
    eager = {"monai": monai_loss, "nnunet": nnunet_loss}
    contenders = {
        name: functools.partial(through_autograd, torch, functools.partial(function, torch))
        for name, function in eager.items()
    }
    contenders["dice_op"] = functools.partial(by_dice_op, torch, core)
    if triton:
        contenders["triton"] = functools.partial(by_triton, torch, 8 * multiprocessors)
    else:
        contenders["triton"] = "Triton is not installed"
    compiled = torch.compile(
        functools.partial(compilable_loss, torch), dynamic=False, mode="max-autotune-no-cudagraphs"
    )
    contenders["compiled"] = functools.partial(through_autograd, torch, compiled)
    return contenders


def torch_volume(torch, work, voxels, device):
    """Makes logits `[1, V, C]` and labels `[1, V]`."""

    def repeated(stored, dtype):
        tile = torch.from_numpy(stored.copy()).to(device)
        if dtype == "bfloat16":  # NumPy has no bfloat16, and stores its bits.
            tile = tile.view(torch.int16).view(torch.bfloat16)
        index = torch.arange(voxels, device=device) % len(stored)
        return tile.index_select(0, index)[None]

    return repeated(work.stored, work.dtype), repeated(work.labels, "uint8")


def time_torch(torch, runs):
    """Times calls that are launched one by one, with events between them."""
    for run in runs[:3]:
        run()
    torch.cuda.synchronize()

    def samples(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        for i in range(repeats):
            events[i].record()
            runs[i % len(runs)]()
        events[repeats].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]

    once = sum(samples(5)) / 5e3
    return gpu_device.summary(samples(gpu_device.repeats_of(once)))


def time_torch_graph(torch, runs):
    """Times calls in one CUDA graph, which uses the buffer sets in turn."""
    calls = max(4, min(len(runs), 16))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs[:3]:
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            runs[i % len(runs)]()
    result = time_torch(torch, [graph.replay])
    for key in ("median_ms", "p10_ms", "p90_ms"):
        result[key] /= calls
    return {**result, "calls_per_sample": calls}


def measure_in_torch(torch, device, function, work, voxels):
    """Measures errors, times and memory of one contender on one volume."""
    sets = []
    for _ in range(min(16, device.rotation(bytes_of_a_set(work, voxels)))):
        x, y = torch_volume(torch, work, voxels, "cuda")
        sets.append((x, y, torch.empty_like(x)))
    x, y, out = sets[0]
    function(x, y, out)  # The first call compiles and tunes.
    out.view(torch.uint8).fill_(0xFF)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    device.pool_peak(reset=True)
    before = torch.cuda.memory_allocated()
    loss, gradient = function(x, y, out)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before + device.pool_peak()
    if gradient is out:  # Its memory was allocated before the measurement.
        extra += out.numel() * out.element_size()

    def rows(at, count):
        return gradient[0, at : at + count].double().cpu().numpy()

    record = errors(work, voxels, loss, rows)
    record["peak_extra_bytes"] = extra
    gradient = None  # This frees its memory.
    if not record["passed"]:
        return record
    runs = [functools.partial(function, *buffers) for buffers in sets]
    record["launches"] = time_torch(torch, runs)
    try:
        record["graph"] = time_torch_graph(torch, runs)
    except Exception as error:  # Some contenders do not work in a graph.
        record["graph"] = {"error": short(error)}
    return record


# --- JAX ----------------------------------------------------------------------------------------


def jax_loss(jax, x, y):
    """The loss as people write it in JAX, where XLA fuses the operations."""
    p = jax.nn.softmax(x.astype(jax.numpy.float32), -1)
    t = jax.nn.one_hot(y, x.shape[-1], dtype=jax.numpy.float32)
    return dice_loss((t * p).sum(1), p.sum(1), t.sum(1))


def jax_contenders(jax):
    """Maps names to losses of logits and labels. If there is no loss, a text says why."""
    sys.path.append(str(gpu_timing.ROOT / "examples"))
    losses = {"jax": functools.partial(jax_loss, jax)}
    try:
        import jax_dice

        losses["dice_op_jax"] = jax_dice.dice_loss
    except Exception as error:  # The other contender can still be measured.
        losses["dice_op_jax"] = short(error)
    return losses


def measure_in_jax(jax, device, loss_function, work, voxels):
    """Measures errors, times and memory of a loss with its gradient under JAX's jit."""
    jnp = jax.numpy

    @jax.jit
    def repeated(tile):
        return jnp.take(tile, jnp.arange(voxels) % work.period, axis=0)[None]

    tile, labels = jnp.asarray(work.stored), jnp.asarray(work.labels)
    if work.dtype == "bfloat16":  # NumPy has no bfloat16, and stores its bits.
        tile = jax.lax.bitcast_convert_type(tile, jnp.bfloat16)
    rotation = min(16, device.rotation(bytes_of_a_set(work, voxels)))
    sets = [(repeated(tile), repeated(labels)) for _ in range(rotation)]
    step = jax.jit(jax.value_and_grad(loss_function))
    step = step.lower(*sets[0]).compile()
    loss, gradient = step(*sets[0])

    def rows(at, count):
        return np.asarray(gradient[0, at : at + count], np.float64)

    record = errors(work, voxels, loss, rows)
    memory = step.memory_analysis()
    record["peak_extra_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    gradient = None  # This frees its memory.
    if not record["passed"]:
        return record

    def sample():
        start = time.perf_counter()
        for i in range(BATCH):
            result = step(*sets[i % len(sets)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / BATCH * 1e3

    once = sample() / 1e3
    repeats = gpu_device.repeats_of(once * BATCH)
    record["launches"] = gpu_device.summary([sample() for _ in range(repeats)])
    record["launches"] |= {"calls_per_sample": BATCH, "clock": "the processor's"}
    return record


# --- the step -----------------------------------------------------------------------------------


def plan(names, quick):
    """Lists (name, edge, classes, dtype), the most important first.

    torch.compile comes later, because it takes long.
    """
    edges, classes = ((256, 128), (4, 14)) if quick else ((256, 192, 128, 512), (4, 14, 2, 104))
    volumes = itertools.product(edges, classes, ("float32", "bfloat16"))
    rank = {
        256: 0,
        192: 1,
        128: 2,
        512: 4,
        4: 0,
        14: 1,
        2: 3,
        104: 4,
        "float32": 0,
        "bfloat16": 0.5,
    }
    volumes = sorted(volumes, key=lambda volume: sum(rank[part] for part in volume))
    tasks = [
        (i + 3 * (name == "compiled"), name, *v) for i, v in enumerate(volumes) for name in names
    ]
    return [task[1:] for task in sorted(tasks, key=lambda task: task[0])]


def main():
    """Prints a record for each contender and volume, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=("torch", "jax"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no measurement after this time"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    core, reference, device = gpu_timing.load()
    if arguments.framework == "torch":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no GPU")
        functions = torch_contenders(torch, core, device.multiprocessors)
        versions = {"torch": torch.__version__, "triton": triton and triton.__version__}
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if jax.default_backend() != "gpu":
            raise SystemExit("JAX sees no GPU")
        functions, versions = jax_contenders(jax), {"jax": jax.__version__}
    gpu_timing.emit({"kind": "versions", **versions})

    left = plan(functions, arguments.quick)
    while left:
        if time.monotonic() > deadline:
            gpu_timing.emit({"kind": "left_out", "step": "contenders", "what": left})
            break
        name, edge, classes, dtype = left.pop(0)
        record = {
            "kind": "contender",
            "name": name,
            "edge": edge,
            "classes": classes,
            "dtype": dtype,
        }
        start = time.monotonic()
        work = gpu_timing.workload(reference, classes, dtype)
        try:
            if isinstance(functions[name], str):
                record["error"] = functions[name]
            elif arguments.framework == "jax":
                record |= measure_in_jax(jax, device, functions[name], work, edge**3)
            elif name == "triton" and classes > 16:
                record["error"] = "written for at most 16 classes"
            else:
                record |= measure_in_torch(torch, device, functions[name], work, edge**3)
                torch.cuda.empty_cache()
        except Exception as error:  # The record has it, and the next contender is measured.
            record["error"] = short(error)
        record["seconds_spent"] = round(time.monotonic() - start, 1)
        gpu_timing.emit(record)


if __name__ == "__main__":
    main()
