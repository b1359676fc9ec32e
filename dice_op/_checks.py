"""Checks of the options that losses and metrics are made with.

Each check raises an error that says what the argument must be. Most of them return the value in the
form in which it is kept and saved.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import typing
from collections.abc import Iterable, Mapping

import numpy as np

from dice_op import core
from dice_op._types import DataFormat

# People pass these arguments because losses of other libraries have them. The advice says what to
# do here.
_ADVICE = {
    "from_logits": 'y_pred are logits; for probabilities pass activation="none"',
    "axis": 'the axis of the classes is the last one, or with data_format="channels_first" axis 1',
    "num_classes": "the number of classes is that of y_pred's channels",
    "to_onehot_y": "labels stay class indices, nothing is to be converted",
    "softmax": 'the softmax is applied by default, activation="softmax"',
    "sigmoid": 'pass activation="sigmoid"',
}
_ADVICE_FOR_SCORES = _ADVICE | {
    "activation": "scores need none: pass from_logits=False where y_pred are probabilities",
    "softmax": 'scores need none: prediction="argmax" takes the largest logit',
    "sigmoid": 'pass prediction="threshold"',
}


def refuse_unknown(found: object, unknown: Mapping[str, object], is_score: bool = False) -> None:
    """Says that `found`, a loss or metric, has no arguments of these names, and what to do."""
    if not unknown:
        return
    name = next(iter(unknown))
    kinds: tuple[typing.Any, ...] = type(found).__mro__
    known = {
        parameter
        for kind in kinds
        for parameter, value in inspect.signature(kind.__init__).parameters.items()
        if value.kind is inspect.Parameter.KEYWORD_ONLY
    }
    advice = (_ADVICE_FOR_SCORES if is_score else _ADVICE).get(name)
    if advice is None:
        similar = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(sorted(known))}"
    raise TypeError(f"{type(found).__name__} has no argument {name!r}: {advice}")


def one_of(argument: str, value: object, names: typing.Any) -> None:
    """Checks that `value` is one of the names in a `typing.Literal`."""
    allowed = typing.get_args(names)
    if not isinstance(value, str) or value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{argument} is {value!r}, but must be one of {listed}")


def flag(argument: str, value: object) -> bool:
    if value not in (True, False):
        raise ValueError(f"{argument} is {value!r}, but must be True or False")
    return bool(value)


def number(argument: str, value: typing.Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{argument} is {value!r}, but must be a number") from None


def at_least_0(argument: str, value: typing.Any) -> float:
    result = number(argument, value)
    if not 0 <= result < float("inf"):
        raise ValueError(f"{argument} is {value}, but must be finite and at least 0")
    return result


def label(argument: str, value: typing.Any) -> int | None:
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise ValueError(f"{argument} is {value!r}, but must be an integer or None") from None


def regions_or_label_sets(regions: object, label_sets: object) -> None:
    if regions and label_sets:
        raise ValueError(
            "regions and label_sets cannot be combined: label_sets are for classes that do not "
            "overlap"
        )


def is_list(value: object) -> bool:
    """Whether `value` holds several values in an order.

    An array or tensor without an axis is a number, although it has an iterator.
    """
    if isinstance(value, (str, bytes, Mapping)):
        return False
    return isinstance(value, Iterable) and getattr(value, "ndim", None) != 0


def exponents(argument: str, value: typing.Any) -> float | list[float]:
    """One exponent, or a list of one for each class."""
    if isinstance(value, dict):
        raise ValueError(
            f"{argument} is {value!r}, but must be a number, or a list of one for each class, in "
            "order"
        )
    if not is_list(value):
        return at_least_0(argument, value)
    result = [at_least_0(argument, v) for v in value]
    if not result:
        raise ValueError(f"{argument} is empty, but must have one exponent for each class")
    return result


def weight_or_list(argument: str, value: typing.Any) -> float | list[float] | None:
    """One weight for all classes, or a list of one for each class."""
    if value is None or is_list(value):
        return weight_list(argument, value)
    return at_least_0(argument, value)


def weight_list(argument: str, weights: typing.Any) -> list[float] | None:
    """One weight per class, or for deep supervision one per output."""
    if weights is None:
        return None
    if not is_list(weights):
        raise ValueError(
            f"{argument} is {weights!r}, but must be a list of one weight per class, in order"
        )
    weights = [number(argument, w) for w in weights]
    if not weights or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(
            f"{argument} is {weights}, but must be one finite weight per class, at least 0 and "
            "not all 0"
        )
    return weights


def region_list(regions: typing.Any, include_background: bool) -> list[list[int]] | None:
    """The label values of each region, as lists, which a configuration can hold."""
    if regions is None:
        return None
    try:
        regions = [[operator.index(label) for label in region] for region in regions]
    except TypeError:
        raise ValueError(
            f"regions is {regions!r}, but must be lists of the label values of each class"
        ) from None
    if not regions:
        raise ValueError("regions is empty, but must have the label values of each class")
    core.op_attributes(regions=regions)  # raises an error where labels are out of range
    if not include_background:
        raise ValueError(
            "include_background=False would leave out the first of the regions: name those that "
            "count in regions"
        )
    return regions


def label_set_dict(label_sets: typing.Any) -> dict[int, list[int]] | None:
    """The classes of each label value, as a configuration can hold them.

    Configurations that were saved as JSON have strings as keys.
    """
    if label_sets is None:
        return None
    try:
        label_sets = {
            int(label) if isinstance(label, str) else operator.index(label): [
                operator.index(c) for c in classes
            ]
            for label, classes in label_sets.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"label_sets is {label_sets!r}, but must be a dict from label values to the classes "
            "that each may stand for, such as {200: (0, 2, 3)}"
        ) from None
    if not label_sets:
        raise ValueError("label_sets is empty, but must name the classes of a label value")
    core.op_attributes(label_sets=label_sets)  # raises an error where they are out of range
    return label_sets


def distance_matrix(dist_matrix: typing.Any) -> list[list[float]]:
    """Distances of the classes as lists, divided by the largest of them."""
    try:
        distances = np.asarray(dist_matrix, np.float64)
    except (TypeError, ValueError):
        distances = np.zeros(0)
    if distances.ndim != 2 or len(distances) < 2:
        raise ValueError(
            f"dist_matrix is {dist_matrix!r}, but must be a distance for each pair of classes, "
            "[C, C], such as [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]"
        )
    core.op_attributes(dist_matrix=distances.tolist())  # checks the distances
    if not distances.any():
        raise ValueError("dist_matrix holds only zeros, so that no error would count")
    rows: list[list[float]] = (distances / distances.max()).tolist()
    return rows


def data_format(value: DataFormat | None, default: str) -> DataFormat:
    """The layout that is asked for; None means the framework's own, `default`."""
    value = typing.cast(DataFormat, default) if value is None else value
    one_of("data_format", value, DataFormat)
    return value


def background(classes: int | None, include_background: bool) -> None:
    if classes == 1 and not include_background:
        raise ValueError("include_background=False leaves no class: y_pred has one, the foreground")
