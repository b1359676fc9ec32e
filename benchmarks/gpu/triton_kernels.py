"""Sums, formula and gradient as three Triton kernels, which is how one would write them by hand."""

import itertools

import triton
import triton.language as tl


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
    tl.store(result + 2 * padded, tl.sum(tl.where(c < classes, 1 - dice, 0.0), axis=0) / classes)


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


def loss_and_gradient(torch, smooth, programs, x, y, out):
    """Returns the loss of logits `[1, V, C]` and labels `[1, V]`, and the gradient in `out`.

    programs: how many programs the sums are divided among.
    """
    voxels, classes = x.shape[1:]
    padded = max(2, triton.next_power_of_2(classes))
    partials = torch.empty(programs * 3 * padded, device=x.device)
    result = torch.empty(2 * padded + 1, device=x.device)
    _sums_kernel[(programs,)](x, y, partials, voxels, classes=classes, padded=padded)
    _formula_kernel[(1,)](
        partials, programs, result, smooth, classes=classes, padded=padded,
        rows=triton.next_power_of_2(programs),
    )  # fmt: skip
    _gradient_kernel[lambda meta: (triton.cdiv(voxels, meta["elements"] // padded),)](
        x, y, result, out, voxels, classes=classes, padded=padded
    )
    return result[2 * padded], out
