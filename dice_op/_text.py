"""Options as text, for the ops of PyTorch and JAX, which take it as one constant."""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Sequence

from dice_op import _checks, core
from dice_op._sums import DiceSums
from dice_op._types import DataFormat

# The names of the options.
_KNOWN = {"cross_entropy", *core.op_attributes()} - {"with_cross_entropy"}


def written(options: typing.Mapping[str, typing.Any]) -> str:
    """The options of `dice_op.dice_sums` as text. Those that are None are left out."""
    given = {name: _plain(value) for name, value in options.items() if value is not None}
    if isinstance(given.get("focal_gamma"), list):
        given["focal_gammas"] = given.pop("focal_gamma")
    for name in given:
        if name not in _KNOWN:
            raise TypeError(
                f"dice_sums has no argument {name!r}: it has {', '.join(sorted(_KNOWN))}"
            )
    return json.dumps(given, sort_keys=True)


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
    options: dict[str, typing.Any] = json.loads(text)
    if isinstance(options.get("label_sets"), dict):  # JSON makes strings of the keys.
        options["label_sets"] = {int(k): v for k, v in options["label_sets"].items()}
    return options


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


@functools.lru_cache(maxsize=64)
def in_layout(text: str, data_format: DataFormat) -> str:
    """The same options, but for the layout."""
    return written({**read(text), "data_format": data_format})


def is_last(text: str) -> bool:
    """Whether the channels are the last axis."""
    return bool(attributes(text)["data_format"] == "channels_last")


def shapes(text: str, logits: Sequence[int]) -> list[tuple[int, ...]]:
    """Those of all the sums, from that of the logits. One that is not asked for has no classes."""
    n, c = logits[0], logits[-1 if is_last(text) else 1]
    of_all = {name: (n, c if name in asked(text) else 0) for name in DiceSums._fields}
    return list({**of_all, "weight_sum": (n,)}.values())


def counts(text: str) -> bool:
    """Whether the sums are counts, which are in double precision."""
    return attributes(text)["activation"] in ("argmax", "threshold")
