"""Options as text, for the ops of PyTorch and JAX, which take it as one constant."""

from __future__ import annotations

import ast
import functools
import typing

from dice_op import _checks, core
from dice_op._sums import DiceSums


def written(options: typing.Mapping[str, typing.Any]) -> str:
    """The options of `dice_op.dice_sums` as text. Those that are None are left out."""
    given = {name: _plain(value) for name, value in options.items() if value is not None}
    if isinstance(given.get("focal_gamma"), list):
        given["focal_gammas"] = given.pop("focal_gamma")
    return repr(dict(sorted(given.items())))


def _plain(value: typing.Any) -> typing.Any:
    """Numbers, strings, lists and dicts, whose text can be read again."""
    if isinstance(value, typing.Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(v) for v in value] if _checks.is_list(value) else value


@functools.lru_cache(maxsize=64)
def read(text: str) -> dict[str, typing.Any]:
    """The arguments of `core.sums` that the text stands for."""
    return typing.cast(dict[str, typing.Any], ast.literal_eval(text))


@functools.lru_cache(maxsize=64)
def asked(text: str) -> dict[str, bool]:
    """The sums that these options ask for, and whether each has a gradient."""
    return core.asked_sums(**read(text))


@functools.lru_cache(maxsize=64)
def attributes(text: str) -> dict[str, typing.Any]:
    """The options as attributes of XLA's handlers, and, with lists, of `composite.sums`."""
    return core.op_attributes(**read(text))


def for_composite(text: str) -> dict[str, typing.Any]:
    given = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in attributes(text).items()}
    del given["threshold"]  # that of an activation without a gradient
    return given


def is_last(text: str) -> bool:
    """Whether the channels are the last axis."""
    return bool(attributes(text)["data_format"] == "channels_last")


def counts(text: str) -> bool:
    """Whether the sums are counts, which are in double precision."""
    return attributes(text)["activation"] in ("argmax", "threshold")


def named(sums: typing.Sequence[typing.Any], text: str) -> DiceSums:
    """A `DiceSums` of all the sums, in order, with None for those that are not asked for."""
    pairs = zip(DiceSums._fields, sums, strict=True)
    return DiceSums(**{name: s if name in asked(text) else None for name, s in pairs})
