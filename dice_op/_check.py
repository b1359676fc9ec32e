"""`python -m dice_op check` compares what this machine computes with double precision.

Each front end runs in a process of its own, so that one which breaks is a line of the table.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dice_op import core

Row = dict[str, typing.Any]  # a line of the table
Sums = dict[str, typing.Any]

# The largest relative error of the sums, and of the gradient in the direction of a random vector of
# -1 and 1. Half precision rounds the gradient, but no sum.
_TOLERANCES = {
    "float64": (1e-12, 1e-11),
    "float32": (2e-6, 1e-5),
    "float16": (2e-6, 2.0**-10),
    "bfloat16": (2e-6, 2.0**-7),
}
_STEP = 1e-30  # f(x + ih) = f(x) + ih f'(x) to the last digit


class Case(typing.NamedTuple):
    name: str
    classes: int = 4
    dtype: str = "float32"
    dense: bool = False  # whether the labels are fractions for each class
    weighted: bool = False
    options: Sums = {}


CASES = [
    *(Case(f"softmax, {dtype}", dtype=dtype) for dtype in _TOLERANCES),
    *(Case(f"softmax, {classes} classes", classes) for classes in (2, 14, 40)),
    Case("cross-entropy", options={"cross_entropy": True}),
    Case(
        "focal cross-entropy, smoothed",
        options={"cross_entropy": True, "focal_gamma": 2.0, "label_smoothing": 0.1},
    ),
    Case("sigmoid", options={"activation": "sigmoid", "cross_entropy": True}),
    Case("sigmoid of one class", 1, options={"activation": "sigmoid", "cross_entropy": True}),
    Case("probabilities", options={"activation": "none", "cross_entropy": True}),
    Case("squares, soft labels", dense=True, options={"squared_pred": True}),
    Case("min(p, t), soft labels", dense=True, options={"soft_label": True}),
    Case("an ignored label", options={"ignore_label": 255}),
    Case("weights of voxels", weighted=True, options={"cross_entropy": True}),
    Case("channels first", options={"data_format": "channels_first"}),
]


# --- the reference --------------------------------------------------------------------------------


def reference(case: Case, x: typing.Any, y: typing.Any, weight: typing.Any) -> Sums:
    """The sums of `dice_op.dice_sums` as in a textbook, `[N, C]` each.

    x: `[N, V, C]`, real or complex; y: `[N, V]` or `[N, V, C]`; weight: `[N, V]`.
    """
    options: Sums = {"activation": "softmax", "focal_gamma": 0.0, "label_smoothing": 0.0}
    options |= case.options
    t, m = labels_per_class(case, y), weight[..., None]
    if "ignore_label" in options:
        m = m * (y != options["ignore_label"])[..., None]
    binary = options["activation"] == "sigmoid"
    if binary:
        p = 1 / (1 + np.exp(-x))
    elif options["activation"] == "softmax":
        e = np.exp(x - x.real.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
    else:
        p = x
    power = 2 if options.get("squared_pred") else 1
    least = np.where(p.real < t, p, t) if options.get("soft_label") else p * t
    terms = {"intersection": least, "pred_sum": p**power, "label_sum": t**power}
    if options.get("cross_entropy"):
        gamma, share = options["focal_gamma"], options["label_smoothing"]
        smoothed = (1 - share) * t + share / (2 if binary else case.classes)
        terms["cross_entropy"] = -smoothed * (1 - p) ** gamma * np.log(p)
        if binary:
            terms["negative_cross_entropy"] = -(1 - smoothed) * p**gamma * np.log(1 - p)
    return {name: (m * term).sum(1) for name, term in terms.items()}


def labels_per_class(case: Case, y: typing.Any) -> typing.Any:
    if case.dense:
        return y.astype(float)
    first = 1 if case.classes == 1 else 0
    return (y[..., None] == np.arange(first, first + case.classes)).astype(float)


def volume(case: Case) -> tuple[typing.Any, typing.Any, typing.Any]:
    """Logits, labels and weights that every type holds exactly: `[2, 13, 12, 11, ...]`."""
    rng = np.random.default_rng(0)
    shape = (2, 13, 12, 11)
    if case.options.get("activation") == "none":
        x = rng.integers(1, 16, (*shape, case.classes)) / 16
    else:
        x = rng.integers(-64, 65, (*shape, case.classes)) / 16
    y: typing.Any = rng.integers(0, max(2, case.classes), shape).astype(np.uint8)
    if "ignore_label" in case.options:
        y[rng.random(shape) < 0.25] = case.options["ignore_label"]
    if case.dense:
        y = rng.integers(1, 8, (*shape, case.classes)).astype(np.float32) / 8
    weight = rng.integers(0, 5, shape) / 4 if case.weighted else np.ones(shape)
    return x, y, weight.astype(np.float32)


# --- the front ends -------------------------------------------------------------------------------
#
# Each yields its devices: a name, and a function from a case, logits, labels, weights (or None) and
# the derivatives of the sums, to the sums and the gradient. The logits have the case's layout.

Compute = Callable[..., tuple[Sums, typing.Any]]


def _numpy() -> Iterator[tuple[str, Compute]]:
    def compute(
        case: Case, x: typing.Any, y: typing.Any, weight: typing.Any, d: Sums
    ) -> typing.Any:
        if case.dtype == "bfloat16":
            dtype = importlib.import_module("ml_dtypes").bfloat16
        else:
            dtype = np.dtype(case.dtype)
        wide = np.float64 if case.dtype == "float64" else np.float32
        x, options = x.astype(dtype), {**case.options, "voxel_weight": weight}
        derivatives = {f"d_{n}": v.astype(wide) for n, v in d.items() if n != "label_sum"}
        return core.sums(x, y, **options), core.gradient(x, y, **options, **derivatives)

    yield "CPU", compute


def _tensorflow() -> Iterator[tuple[str, Compute]]:
    import tensorflow as tf

    from dice_op import dice_sums

    def compute(
        case: Case, x: typing.Any, y: typing.Any, weight: typing.Any, d: Sums,
        *, device: str, xla: bool,
    ) -> typing.Any:  # fmt: skip
        def step(x: typing.Any) -> typing.Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                options = {"activation": "softmax", "voxel_weight": weight} | case.options
                sums = dice_sums(y, x, **options)._asdict()
                parts = (tf.reduce_sum(sums[n] * tf.cast(v, sums[n].dtype)) for n, v in d.items())
                total = tf.add_n(list(parts))
            return {n: sums[n] for n in d}, tape.gradient(total, x)

        with tf.device(device):
            sums, gradient = tf.function(step, jit_compile=xla)(tf.cast(tf.constant(x), case.dtype))
        return sums, tf.cast(gradient, "float64")

    for kind in ("CPU", "GPU"):
        for number, _ in enumerate(tf.config.list_physical_devices(kind)):
            for xla in (False, True):
                name = f"{kind} {number}{', XLA' if xla else ''}"
                yield name, functools.partial(compute, device=f"/{kind}:{number}", xla=xla)


def _torch() -> Iterator[tuple[str, Compute]]:
    import torch

    from dice_op.torch import dice_sums

    def compute(
        case: Case, x: typing.Any, y: typing.Any, weight: typing.Any, d: Sums, *, device: str
    ) -> typing.Any:
        def tensor(array: typing.Any) -> typing.Any:
            return None if array is None else torch.tensor(array, device=device)

        logits = tensor(x).to(getattr(torch, case.dtype)).requires_grad_()
        options = {"data_format": "channels_last", "voxel_weight": tensor(weight)} | case.options
        sums = dice_sums(logits, tensor(y), **options)._asdict()
        sum((sums[n] * tensor(v).to(sums[n])).sum() for n, v in d.items()).backward()
        found = {n: sums[n].detach().cpu() for n in d}
        return found, logits.grad.double().cpu()

    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        yield device, functools.partial(compute, device=device)


def _jax() -> Iterator[tuple[str, Compute]]:
    import jax

    from dice_op.jax import dice_sums

    jax.config.update("jax_enable_x64", True)

    def compute(
        case: Case, x: typing.Any, y: typing.Any, weight: typing.Any, d: Sums, *, device: typing.Any
    ) -> typing.Any:
        def total(x: typing.Any) -> typing.Any:
            sums = dice_sums(x, y, voxel_weight=weight, **case.options)._asdict()
            return sum((sums[n] * v).sum() for n, v in d.items()), {n: sums[n] for n in d}

        with jax.default_device(device):
            step = jax.jit(jax.grad(total, has_aux=True))
            gradient, sums = step(jax.numpy.asarray(x, case.dtype))
        return sums, gradient.astype("float64")

    for device in dict.fromkeys((*jax.devices(), *jax.devices("cpu")[:1])):
        yield str(device), functools.partial(compute, device=device)


# The module that each needs, and its devices.
FRONT_ENDS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, Compute]]]]] = {
    "NumPy": ("numpy", _numpy),
    "TensorFlow": ("tensorflow", _tensorflow),
    "PyTorch": ("torch", _torch),
    "JAX": ("jax", _jax),
}


# --- the comparison -------------------------------------------------------------------------------


def compare(case: Case, compute: Compute) -> tuple[float, float]:
    """The relative errors of the sums and of the gradient of one case."""
    x, y, weight = volume(case)
    flat = [a.reshape(2, -1, *a.shape[4:]) for a in (x, y, weight)]
    exact = reference(case, *flat)
    rng = np.random.default_rng(1)
    d = {name: rng.integers(1, 5, value.shape) / 4 for name, value in exact.items()}
    d["label_sum"] *= 0  # It does not depend on the logits.
    direction = rng.choice([-1.0, 1.0], flat[0].shape)
    stepped = reference(case, flat[0] + 1j * _STEP * direction, *flat[1:])
    slope = sum((d[n] * stepped[n].imag).sum() for n in d) / _STEP

    first = case.options.get("data_format") == "channels_first"
    given = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if first else x
    sums, gradient = compute(case, given, y, weight if case.weighted else None, d)
    gradient = np.asarray(gradient, np.float64)
    gradient = np.moveaxis(gradient, 1, -1) if first else gradient
    of_sums = max(
        float(np.max(np.abs(np.asarray(sums[n], np.float64) - exact[n]) / np.abs(exact[n])))
        for n in exact
    )
    along = (gradient.reshape(direction.shape) * direction).sum()
    return of_sums, float(abs(along - slope) / np.linalg.norm(gradient))


def check_front_end(name: str) -> list[Row]:
    """A line for each device of a front end."""
    module, devices = FRONT_ENDS[name]
    if not importlib.util.find_spec(module):
        return [{"front_end": name, "not_here": f"{module} is not installed"}]
    rows: list[Row] = []
    title = f"{name} {importlib.import_module(module).__version__}"
    try:
        for device, compute in devices():
            rows.append({"front_end": title, "device": device, **_check_device(compute)})
    except ImportError as error:
        rows.append({"front_end": title, "not_here": str(error)})
    return rows


def _check_device(compute: Compute) -> Row:
    start, failures, worst = time.perf_counter(), [], [0.0, 0.0]
    skipped = []
    for case in CASES:
        try:
            errors = compare(case, compute)
        except ModuleNotFoundError as error:
            skipped.append(f"{case.name}: {error}")
            continue
        except Exception as error:  # whatever it is, it belongs into the table
            failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        for i, (what, allowed) in enumerate(
            zip(("sums", "gradient"), _TOLERANCES[case.dtype], strict=True)
        ):
            worst[i] = max(worst[i], errors[i] / allowed)
            if not errors[i] <= allowed:
                failures.append(
                    f"{case.name}: {what} off by {errors[i]:.1e}, allowed {allowed:.1e}"
                )
    return {
        "passed": len(CASES) - len(skipped) - len({f.split(":")[0] for f in failures}),
        "cases": len(CASES),
        "failures": failures,
        "skipped": skipped,
        "worst_of_allowed": {"sums": worst[0], "gradient": worst[1]},
        "seconds": round(time.perf_counter() - start, 1),
    }


def check(names: Sequence[str]) -> Iterator[Row]:
    """The lines of all front ends, each from a process of its own."""
    variables = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # Otherwise the first would take the whole GPU.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    for name in names:
        command = [sys.executable, "-m", "dice_op", "check", "--front-end", name, "--json"]
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True
        )
        try:
            yield from json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            last = (done.stderr.strip().splitlines() or [""])[-1]
            reason = f"its process ended with status {done.returncode}: {last[:300]}"
            yield {"front_end": name, "passed": 0, "failures": [reason], "cases": len(CASES)}


def line(row: Row) -> str:
    """A line of the table, and the failures below it."""
    if "not_here" in row:
        return f"{row['front_end']:<20} not here: {row['not_here']}"
    text = f"{row['front_end']:<20} {row.get('device', ''):<12} "
    text += f"{row['passed']} of {row['cases']} passed"
    if "seconds" in row:
        worst = max(row["worst_of_allowed"].values())
        text += f", largest error {worst:.0%} of what is allowed, {row['seconds']} s"
    below = [*row["failures"], *(f"left out: {s}" for s in row.get("skipped", ()))]
    return "\n".join([text, *(f"    {f}" for f in below)])
