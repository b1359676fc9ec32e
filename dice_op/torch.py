"""The fused sums and losses for PyTorch: `torch.nn.Module`s over the same kernels.

>>> loss = dice_op.torch.DiceCELoss()
>>> loss(logits, labels).backward()

`torch.compile` takes them without a break, and they can be differentiated twice. Tensors are read
where they are, on the host or on a CUDA device, on PyTorch's current stream.
"""

from __future__ import annotations

import contextlib
import typing

import torch
from torch import library

from dice_op import _checks, _family, _text, composite, core, formulas
from dice_op._sums import DiceSums
from dice_op._types import DataFormat

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


# --- the ops --------------------------------------------------------------------------------------
#
# Their options are one text, which stands for the arguments of core.sums.


def _call(
    function: typing.Callable[..., typing.Any], logits: torch.Tensor, *others: torch.Tensor | None
) -> typing.Any:
    """Calls one of core's functions with tensors as it wants them."""
    given = [None if t is None else t.detach().contiguous() for t in (logits, *others)]
    if not logits.is_cuda:
        return function(*given, threads=torch.get_num_threads())
    with torch.cuda.device(logits.device):
        return function(*given, stream=torch.cuda.current_stream().cuda_stream)


@library.custom_op(
    "dice_op::sums",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? weight, str options, bool overwrite)"
    " -> Tensor[]",
)
def _sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    options: str,
    overwrite: bool,
) -> list[torch.Tensor]:
    def run(x: typing.Any, y: typing.Any, w: typing.Any, **where: typing.Any) -> typing.Any:
        return core.sums(x, y, voxel_weight=w, **_text.read(options), **where)

    found = _call(run, logits, labels, weight)
    outputs = _results(logits, options)
    for name, output in zip(DiceSums._fields, outputs, strict=True):
        if name in found:
            output.copy_(torch.as_tensor(found[name], device=output.device))
    return outputs


def _results(logits: torch.Tensor, options: str) -> list[torch.Tensor]:
    """Memory for all the sums."""
    wide = logits.dtype == torch.float64 or _text.counts(options)
    dtype = torch.float64 if wide else torch.float32
    return [logits.new_empty(shape, dtype=dtype) for shape in _text.shapes(options, logits.shape)]


@_sums.register_fake
def _(
    logits: torch.Tensor, labels: typing.Any, weight: typing.Any, options: str, *_: typing.Any
) -> list[torch.Tensor]:
    return _results(logits, options)


@library.custom_op(
    "dice_op::sums_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? weight, Tensor[] d_sums, str options) -> Tensor",
)
def _gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    d_sums: list[torch.Tensor],
    options: str,
) -> torch.Tensor:
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(d_logits, logits, labels, weight, d_sums, options)
    return d_logits


def _write_gradient(
    out: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    d_sums: list[torch.Tensor],
    options: str,
) -> None:
    names = [f"d_{name}" for name, has_gradient in _text.asked(options).items() if has_gradient]

    def run(
        x: typing.Any, y: typing.Any, w: typing.Any, *d: typing.Any, **where: typing.Any
    ) -> None:
        given = dict(zip(names, d, strict=True))
        core.gradient(x, y, voxel_weight=w, out=out, **_text.read(options), **given, **where)

    _call(run, logits, labels, weight, *d_sums)


@library.custom_op(
    "dice_op::sums_gradient_",
    mutates_args=("logits",),
    schema="(Tensor(a!) logits, Tensor labels, Tensor? weight, Tensor[] d_sums, str options) -> ()",
)
def _gradient_in_place(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    d_sums: list[torch.Tensor],
    options: str,
) -> None:
    out = logits.detach()
    if out.is_contiguous():
        _write_gradient(out, out, labels, weight, d_sums, options)
    else:
        out.copy_(_gradient(out, labels, weight, d_sums, options))


@_gradient.register_fake
def _(logits: torch.Tensor, *_: typing.Any) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _with_gradient(sums: list[torch.Tensor], options: str) -> list[torch.Tensor]:
    asked = _text.asked(options)
    return [s for name, s in zip(DiceSums._fields, sums, strict=True) if asked.get(name)]


def _composite(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: str
) -> list[torch.Tensor]:
    given = [] if weight is None else [weight]
    return composite.sums(logits, labels, given, **_text.for_composite(options))


def _save(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
    logits, labels, weight, *others = inputs
    if isinstance(others[0], str):
        ctx.options, ctx.overwrite = others
        ctx.save_for_backward(logits, labels, weight)
    else:
        ctx.options = others[1]
        ctx.save_for_backward(logits, labels, weight, *others[0])


def _cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers, but of no interest is how they came about: derivatives end here."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _gradients_of_sums(ctx: typing.Any, d_sums: list[torch.Tensor]) -> tuple[typing.Any, ...]:
    logits, labels, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    gradients: list[torch.Tensor | None] = [None, None, None]
    if _text.counts(ctx.options):  # They have no gradient.
        return *gradients, None, None
    # Few programs differentiate with respect to dense labels or weights.
    if needed[1] or needed[2]:
        again = torch.is_grad_enabled()  # whether somebody wants the next derivative, too
        with torch.enable_grad():
            inputs = [_cut(t) for t in (logits, labels, weight)]
            sums = _composite(inputs[0], inputs[1], inputs[2], ctx.options)
        places = [i for i in (1, 2) if needed[i]]
        pairs = [(s, d) for s, d in zip(sums, d_sums, strict=True) if s.requires_grad]
        outputs, given = zip(*pairs, strict=True)
        sources = [inputs[i] for i in places]
        found = torch.autograd.grad(outputs, sources, given, create_graph=again, allow_unused=True)
        for i, gradient in zip(places, found, strict=True):
            gradients[i] = gradient
    if needed[0]:
        d = _with_gradient(d_sums, ctx.options)
        if ctx.overwrite:
            gradients[0] = logits.detach()
            _gradient_in_place(gradients[0], labels, weight, d, ctx.options)
        else:
            gradients[0] = _gradient(logits, labels, weight, d, ctx.options)
    return *gradients, None, None


def _gradients_of_gradient(ctx: typing.Any, d_d_logits: torch.Tensor) -> tuple[typing.Any, ...]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [_cut(t) for t in ctx.saved_tensors]
        logits, labels, weight, *d = inputs
        sums = _with_gradient(_composite(logits, labels, weight, ctx.options), ctx.options)
        (d_logits,) = torch.autograd.grad(sums, logits, d, create_graph=True)
    places = [i for i, t in enumerate(inputs) if t is not None and t.is_floating_point()]
    sources = [inputs[i] for i in places]
    found = torch.autograd.grad(
        d_logits, sources, d_d_logits, create_graph=again, allow_unused=True
    )
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(places, found, strict=True):
        gradients[i] = gradient
    return *gradients[:3], gradients[3:], None


_sums.register_autograd(_gradients_of_sums, setup_context=_save)
_gradient.register_autograd(_gradients_of_gradient, setup_context=_save)


# Adds a tensor over all processes. The derivatives are added as well, so that loss and gradients
# are those of one process.
@library.custom_op("dice_op::over_processes", mutates_args=(), schema="(Tensor part) -> Tensor")
def _over_processes(part: torch.Tensor) -> torch.Tensor:
    total = part.clone()
    torch.distributed.all_reduce(total)
    return total


_over_processes.register_fake(torch.empty_like)
_over_processes.register_autograd(lambda ctx, d_total: _over_processes(d_total))


# --- sums and losses ------------------------------------------------------------------------------


def dice_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    voxel_weight: torch.Tensor | None = None,
    data_format: DataFormat = "channels_first",
    overwrite_logits: bool = False,
    **options: typing.Any,
) -> DiceSums:
    """`dice_op.dice_sums` for PyTorch: the sums that every loss of the family is made of.

    Args:
      logits: `[N, C, spatial...]`, or channels last, as float16, bfloat16, float32 or float64. A
        tensor whose memory has the other layout (`torch.channels_last_3d`) is read as it is.
      labels: Class indices `[N, spatial...]` or `[N, 1, spatial...]`, or one-hot or soft labels of
        the shape of `logits`.
      voxel_weight: `[N, spatial...]`. A voxel of weight 0 does not count, whatever its logits are.
      data_format: `"channels_first"` or `"channels_last"`.
      overwrite_logits: Whether the gradient takes the memory of the logits, so that the loss needs
        no other of the volume's size. Nothing may then use the logits after the backward pass has
        begun, and there is no second derivative.
      **options: The other arguments of `dice_op.dice_sums`, with the same meaning.

    Returns:
      A `DiceSums` of tensors. Those that are not asked for are None.

    Raises:
      ValueError: The shapes do not fit, a label is not a class, or a prediction is not a
        probability although `activation` is `"none"`. On a GPU such a value makes the sums of its
        sample NaN instead.
      TypeError: An argument has a wrong type.
    """
    values = (tuple(v.items()) if isinstance(v, dict) else v for v in options.values())
    text = _written(tuple(options), tuple(values))
    return _sums_of(logits, labels, voxel_weight, data_format, overwrite_logits, text)


def _sums_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    data_format: DataFormat,
    overwrite_logits: bool,
    text: str,
) -> DiceSums:
    """`dice_sums` with the other options as text."""
    given = {"logits": logits, "labels": labels, "voxel_weight": voxel_weight}
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name != "voxel_weight"):
            raise TypeError(f"{name} is a {type(tensor).__name__}, but must be a torch.Tensor")
    logits, labels, voxel_weight = map(_as_plain, (logits, labels, voxel_weight))
    if logits.dtype not in _DTYPES:
        raise TypeError(
            f"logits have dtype {logits.dtype}, but must be float16, bfloat16, float32 or float64"
        )
    if logits.ndim > 2 and not logits.is_contiguous():
        # The memory may be that of the other layout, which the kernels take as well.
        here, there = (1, -1) if data_format == "channels_first" else (-1, 1)
        moved = logits.movedim(here, there)
        if moved.is_contiguous():
            if labels.ndim == logits.ndim:
                labels = labels.movedim(here, there)
            if voxel_weight is not None and voxel_weight.ndim == logits.ndim:
                voxel_weight = voxel_weight.movedim(here, there)
            logits = moved
            data_format = "channels_last" if here == 1 else "channels_first"
    text, asked = _constants(text, data_format)
    sums = _sums(logits, labels, voxel_weight, text, overwrite_logits)
    return DiceSums(*(s if wanted else None for s, wanted in zip(sums, asked, strict=True)))


def _as_plain(tensor: typing.Any) -> typing.Any:
    """A tensor as torch.Tensor, from which other libraries derive, as MONAI its MetaTensor."""
    if isinstance(tensor, torch.Tensor) and not torch.compiler.is_compiling():
        return tensor.as_subclass(torch.Tensor)
    return tensor


def _written(names: tuple[str, ...], values: tuple[typing.Any, ...]) -> str:
    """The options as text.

    torch.compile takes no dict for a constant, so that they come as names and values, and
    `label_sets` as pairs.
    """
    options = dict(zip(names, values, strict=True))
    if options.get("label_sets"):
        options["label_sets"] = dict(options["label_sets"])
    return _text.written(options)


def _constants(text: str, data_format: DataFormat) -> tuple[str, list[bool]]:
    """The options with this layout, and whether they ask for each of the sums."""
    text = _text.in_layout(text, data_format)
    return text, [name in _text.asked(text) for name in DiceSums._fields]


# torch.compiler.assume_constant_result does this, and imports the compiler, which takes seconds.
setattr(_written, "_dynamo_marked_constant", True)  # noqa: B010
setattr(_constants, "_dynamo_marked_constant", True)  # noqa: B010


def over_processes(sums: DiceSums) -> DiceSums:
    """The sums over all processes of `torch.distributed`, where it is used. This is
    differentiable."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return sums
    parts = [s for s in sums if s is not None]
    total = _over_processes(torch.cat([p.reshape(-1) for p in parts]))
    totals = iter(total.split([p.numel() for p in parts]))
    return formulas.map_sums(lambda s: next(totals).reshape(s.shape), sums)


class SumsLoss(_family.LogitsFirst, torch.nn.Module):
    """Base of the losses that are a formula over `dice_sums`; derive your own from it.

    The arguments are those of `dice_op.losses.SumsLoss`, but for these.

    Args:
      data_format: `"channels_first"` by default.
      reduction: `"mean"` or `"sum"` over the samples, or `"none"`.
      overwrite_logits: Whether the gradient takes the memory of the logits, see `dice_sums`.

    Call:
      logits: `[N, C, spatial...]` of any float type, also under autocast.
      labels: Class indices `[N, spatial...]` or `[N, 1, spatial...]` of any integer type, or labels
        of the shape of the logits.
      weight: `[N]`, or one weight per voxel, `[N, spatial...]` or `[N, 1, spatial...]`.

    With `batch=True` the sums are taken over all processes of `torch.distributed`, so that under
    DistributedDataParallel loss and gradients are those of the whole batch in one process.
    """

    def __init__(self, *, overwrite_logits: bool = False, **options: typing.Any) -> None:
        torch.nn.Module.__init__(self)
        super().__init__(**options)
        self.overwrite_logits = _checks.flag("overwrite_logits", overwrite_logits)

    def __setattr__(self, name: str, value: typing.Any) -> None:
        super().__setattr__(name, value)
        # torch.compile makes a variable of a number that differs between two losses. A text stays a
        # constant. There is none before all options are there, or if they depend on the classes.
        self.__dict__["_options"] = None
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            options = self.options_of_sums(None, lambda: False)
            self.__dict__["_options"] = _text.written(options)

    def default_data_format(self) -> DataFormat:
        return "channels_first"

    def over_replicas(self, sums: DiceSums) -> DiceSums:
        return over_processes(sums)

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        def sums(logits: torch.Tensor, labels: torch.Tensor, **options: typing.Any) -> DiceSums:
            if self._options is None or not torch.compiler.is_compiling():
                return dice_sums(logits, labels, overwrite_logits=self.overwrite_logits, **options)
            given = options["voxel_weight"], self.data_format, self.overwrite_logits
            return _sums_of(logits, labels, *given, self._options)

        given = map(_as_plain, (logits, labels, weight))
        return typing.cast(torch.Tensor, self.value(sums, *given))

    def extra_repr(self) -> str:
        own = {"reduction": self.reduction, "overwrite_logits": self.overwrite_logits}
        return ", ".join(f"{name}={value!r}" for name, value in {**self.options(), **own}.items())


class OverlapLoss(_family.OverlapLoss, SumsLoss):
    __doc__ = _family.OverlapLoss.__doc__


class DiceLoss(_family.DiceLoss, OverlapLoss):
    __doc__ = _family.DiceLoss.__doc__


class TverskyLoss(_family.TverskyLoss, OverlapLoss):
    __doc__ = _family.TverskyLoss.__doc__


class MatthewsLoss(_family.MatthewsLoss, OverlapLoss):
    __doc__ = _family.MatthewsLoss.__doc__


class GeneralizedDiceLoss(_family.GeneralizedDiceLoss, SumsLoss):
    __doc__ = _family.GeneralizedDiceLoss.__doc__


class GeneralizedWassersteinDiceLoss(_family.GeneralizedWassersteinDiceLoss, SumsLoss):
    __doc__ = _family.GeneralizedWassersteinDiceLoss.__doc__


class DiceCELoss(_family.DiceCELoss, DiceLoss):
    __doc__ = _family.DiceCELoss.__doc__


class DiceFocalLoss(_family.DiceFocalLoss, DiceCELoss):
    __doc__ = _family.DiceFocalLoss.__doc__


class GeneralizedDiceFocalLoss(_family.GeneralizedDiceFocalLoss, GeneralizedDiceLoss):
    __doc__ = _family.GeneralizedDiceFocalLoss.__doc__


class UnifiedFocalLoss(_family.UnifiedFocalLoss, SumsLoss):
    __doc__ = _family.UnifiedFocalLoss.__doc__
