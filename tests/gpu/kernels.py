"""Checks the kernels on a GPU: values and gradients against float64, equal bits, and refusals.

    python -m gpu.kernels all    checks everything; `few` what a sanitizer has the time for

It is a step of build_tools/gpu_check.py, which builds what it needs and sets the path.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
import time

import numpy as np

from benchmarks.cases import Case, decode, encode, itemsize
from benchmarks.gpu import report
from benchmarks.gpu.device import Device
from benchmarks.gpu.kernels import GRADIENT_TOLERANCE, sums_tolerance
from benchmarks.gpu.volume import RepeatedVolume, gradient_error
from benchmarks.measuring import emit, say
from helpers import reference
from helpers.kernel_inputs import coefficients_by_name

DTYPES = ("float32", "float16", "bfloat16", "float64")
CLASSES = (1, 2, 3, 4, 5, 8, 13, 14, 16, 17, 32, 33, 64, 104, 105, 120, 256)
FORMATS = ("channels_last", "channels_first")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of sums and a call of gradient. The voxels of `Expected` are repeated in it."""

    voxels: int
    classes: int
    samples: int = 1
    dtype: str = "float32"
    activation: str = "softmax"
    data_format: str = "channels_last"
    labels: str = "uint8"  # or "dense float32" for soft labels of the logits' shape
    weight: str = ""  # the dtype of a weight, if there is one
    ignore_label: int | None = None
    squared_pred: bool = False
    cross_entropy: bool = True
    focal_gamma: float = 0.0
    in_place: bool = False
    misalign: int = 0  # how many bytes after an aligned address the logits start

    def __str__(self):
        fields = dataclasses.fields(self)
        changed = [f.name for f in fields[2:] if getattr(self, f.name) != f.default]
        return f"V={self.voxels} C={self.classes} " + " ".join(
            f"{name}={getattr(self, name)}" for name in changed
        )


class Expected:
    """Two samples of a few voxels, which calls repeat, and their results in float64."""

    def __init__(self, classes, dtype, activation, dense, weight, ignore, squared, gamma):
        self.period = 1009 if classes <= 16 else 127 if classes <= 64 else 61  # prime
        shape = (2, self.period, classes)
        rng = np.random.default_rng(classes)
        x = 3 * rng.normal(size=shape)
        if activation == "none":
            x = (
                np.exp(x) / np.exp(x).sum(-1, keepdims=True)
                if classes > 1
                else 1 / (1 + np.exp(-x))
            )
        storage = "float32" if dtype == "float64" else dtype  # float64 uses float32's.
        x = decode(encode(x, storage), storage)
        self.labels = rng.integers(0, max(classes, 2), shape[:2])
        mass = np.ones(shape[:2])
        if ignore is not None:
            self.labels[rng.random(shape[:2]) < 0.3] = ignore
            mass *= self.labels != ignore
        self.t = reference.one_hot(self.labels, classes)
        if dense:
            self.t = np.float32(rng.random(shape) * (rng.random(shape) < 0.7)).astype(float)
            self.labels = self.t
        self.weight = rng.integers(0, 3, shape[:2]) if weight else None
        if weight:
            mass = mass * self.weight
        x[mass == 0] = 0
        self.mass = mass
        self.logits = np.where(mass[..., None] == 0, np.nan, x) if weight else x
        options = {"activation": activation, "squared": squared, "gamma": gamma}
        terms = reference.voxel_terms(x, self.t, **options)
        self.terms = {name: mass[..., None] * term for name, term in terms.items()}
        self.terms["weight_sum"] = mass[..., None]
        self.coefficients = [np.float32(rng.normal(size=(2, classes))) for _ in range(3)]
        self.gradients = [  # The first is without cross-entropy, and the second has it.
            reference.gradient(x, self.t, (*self.coefficients[:2], c), mass, **options)
            for c in (0 * self.coefficients[2], self.coefficients[2])
        ]

    def sums(self, samples, voxels):
        """The sums of a call, `[N, C]` each, and the sum of the weights, `[N]`."""
        whole, rest = divmod(voxels, self.period)
        which = np.arange(samples) % 2
        sums = {
            name: (whole * s.sum(1) + s[:, :rest].sum(1))[which] for name, s in self.terms.items()
        }
        return sums | {"weight_sum": sums["weight_sum"][:, 0]}


def repeated(array, samples, voxels):
    """Repeats `[2, period, ...]` to `[N, V, ...]`."""
    return array[np.arange(samples) % 2][:, np.arange(voxels) % array.shape[1]]


def only_second_is_nan(sums):
    """Whether the sums of the second of three samples are NaN, and those of the others are not."""
    return all(np.isnan(s[1]).all() and np.isfinite(s[::2]).all() for s in sums.values())


class Outcomes:
    """Keeps what checks find."""

    def __init__(self):
        self.count, self.failures, self.worst = 0, [], {}

    def record(self, what, passed, detail=""):
        """Keeps the outcome of a check, and prints a failure at once."""
        self.count += 1
        if not passed:
            self.failures.append(f"{what}: {detail}")
            say(f"FAILED {self.failures[-1]}")

    def within(self, what, kind, error, tolerance):
        """Checks an error against its bound, and keeps the worst error of each kind."""
        error = float(error)
        if not error <= self.worst.get(kind, {"error": -1})["error"]:
            self.worst[kind] = {"error": error, "tolerance": tolerance, "case": str(what)}
        self.record(what, error <= tolerance, f"{kind}: error {error:.2e}, allowed {tolerance:.2e}")

    def facts(self):
        """What a record says of them."""
        return {"count": self.count, "failures": self.failures, "worst": self.worst}


def until(deadline, parts):
    """Calls the parts in turn, while there is time. Returns what was left out, and why.

    A part returns why it was left out, if it was.
    """
    left_out = []
    for i, part in enumerate(parts):
        if time.monotonic() > deadline:
            left_out.append(f"{len(parts) - i} of {len(parts)} parts: no time left")
            break
        left_out += [reason] if (reason := part()) else []
    return left_out


class Checker(Outcomes):
    """Makes calls, and keeps what is wrong with their results."""

    def __init__(self, core, device):
        super().__init__()
        self.core, self.device = core, device
        self.expected = functools.lru_cache(64)(Expected)

    def expected_of(self, call):
        """Returns the reference of a call. Calls that share one get the same object."""
        return self.expected(
            call.classes, call.dtype, call.activation, call.labels.startswith("dense"),
            bool(call.weight), call.ignore_label, call.squared_pred, call.focal_gamma,
        )  # fmt: skip

    def arrays(self, call, expected):
        """Makes logits, labels and weight on the GPU."""

        def array(values, dtype, **options):
            values = repeated(values, call.samples, call.voxels)
            return self.array(call, values, dtype, **options)

        return (
            array(expected.logits, call.dtype, misalign=call.misalign),
            array(expected.labels, call.labels.removeprefix("dense ")),
            array(expected.weight, call.weight) if call.weight else None,
        )

    def array(self, call, values, dtype, **options):
        """Makes an array on the GPU of values `[N, V, ...]`, in the layout of the call."""
        if values.ndim == 3 and call.data_format == "channels_first":
            values = values.swapaxes(1, 2)
        return self.device.array(encode(values, dtype), dtype, **options)

    def run(self, call, logits, labels, weight, coefficients):
        """Returns sums as NumPy arrays and the gradient as a GPU array, which held NaN before."""
        options = {
            "activation": call.activation, "data_format": call.data_format, "voxel_weight": weight,
            "ignore_label": call.ignore_label, "squared_pred": call.squared_pred,
            "focal_gamma": call.focal_gamma, "stream": self.device.stream,
        }  # fmt: skip
        sums = self.core.sums(logits, labels, cross_entropy=call.cross_entropy, **options)
        sums = {name: value.numpy() for name, value in sums.items()}
        out = logits
        if not call.in_place:
            out = self.device.empty(logits.shape, call.dtype)
            out.fill(0xFF)
        number = "float64" if call.dtype == "float64" else "float32"
        given = {
            name: self.device.array(encode(value, number), number)
            for name, value in coefficients_by_name(coefficients, call.activation).items()
        }
        self.core.gradient(logits, labels, out=out, **given, **options)
        return sums, out

    def check(self, call):
        """Checks one call against its reference."""
        expected = self.expected_of(call)
        arrays = self.arrays(call, expected)
        which = np.arange(call.samples) % 2
        used = expected.coefficients[: 3 if call.cross_entropy else 2]
        try:
            sums, out = self.run(call, *arrays, [k[which] for k in used])
        except (RuntimeError, ValueError, TypeError) as error:
            self.record(call, False, error)
            return
        wanted = expected.sums(call.samples, call.voxels)
        for name, value in sums.items():
            error = reference.relative_error(value, wanted[name])
            tolerance = sums_tolerance(call.dtype)
            self.within(call, f"sums, {call.dtype}", error, tolerance)
        got = decode(out.numpy(), call.dtype)
        if call.data_format == "channels_first":
            got = got.swapaxes(1, 2)
        gradient = expected.gradients[call.cross_entropy]
        gradient = repeated(gradient, call.samples, call.voxels)
        if gradient.any():
            error = reference.gradient_error(got, gradient)
            tolerance = GRADIENT_TOLERANCE[call.dtype]
            self.within(call, f"gradient, {call.dtype}", error, tolerance)
        else:  # One class under softmax has no gradient.
            self.record(call, not got.any(), "a gradient where there is none")

    def same_bits(self, runs=10):
        """Checks that many runs of the same call give the same bits."""
        for call in (
            Call(500_001, 4, 2), Call(150_001, 14), Call(20_011, 104, dtype="bfloat16"),
            Call(100_003, 3, 2, weight="float32"), Call(100_003, 5, data_format="channels_first"),
        ):  # fmt: skip
            expected = self.expected_of(call)
            arrays = self.arrays(call, expected)
            which = np.arange(call.samples) % 2
            digests = set()
            for _ in range(runs):
                sums, out = self.run(call, *arrays, [k[which] for k in expected.coefficients])
                bits = b"".join(v.tobytes() for v in sums.values()) + out.numpy().tobytes()
                digests.add(hashlib.sha256(bits).hexdigest())
            self.record(
                f"same bits, {call}", len(digests) == 1, f"{len(digests)} results of {runs} runs"
            )

    def bad_labels(self):
        """Checks that a label that is no class makes the sums of its sample NaN, and no others."""
        for classes in (1, 2, 3, 4, 14, 104):
            for labels in ("uint8", "int32"):
                call = Call(10_000, classes, 3, labels=labels, activation="sigmoid")
                if classes > 1:
                    call = dataclasses.replace(call, activation="softmax")
                expected = self.expected_of(call)
                logits, _, _ = self.arrays(call, expected)
                index = repeated(expected.labels, 3, call.voxels).copy()
                index[1, 7001] = -1 if labels == "int32" else classes + 1
                sums = self.sums_of(call, expected, logits, self.array(call, index, labels))
                self.record(f"a label that is no class, {call}", only_second_is_nan(sums), sums)

    def bad_predictions(self):
        """Checks what a prediction that is no probability does if there is no activation.

        It makes the sums of its sample NaN, and no others. A NaN is no mistake of the caller's, but
        it shows in the sum of the predictions.
        """
        for classes in (1, 2, 3, 4, 5, 14, 104):
            for dtype, data_format in itertools.product(("float32", "bfloat16"), FORMATS):
                call = Call(
                    3_001, classes, 3, dtype=dtype, data_format=data_format, activation="none"
                )
                expected = self.expected_of(call)
                _, labels, _ = self.arrays(call, expected)
                for value in (12.625, -0.25, math.inf, math.nan):
                    x = repeated(expected.logits, 3, call.voxels).copy()
                    x[1, 2001, slice(None) if math.isnan(value) else -1] = value
                    logits = self.array(call, x, dtype)
                    sums = self.sums_of(call, expected, logits, labels)
                    fine = only_second_is_nan(
                        {"pred_sum": sums["pred_sum"]} if math.isnan(value) else sums
                    )
                    self.record(f"a prediction of {value}, {call}", fine, sums)

    def sums_of(self, call, expected, logits, labels):
        """Returns the sums of a call, which is followed by one of the gradient."""
        which = np.arange(call.samples) % 2
        return self.run(call, logits, labels, None, [k[which] for k in expected.coefficients])[0]

    def refusals(self):
        """Checks that wrong arguments are refused with an error message."""
        many = self.device.array(np.zeros((1, 5, 257), np.float32), "float32")
        few = self.device.array(np.zeros((1, 5, 3), np.float32), "float32")
        labels = self.device.array(np.zeros((1, 5), np.uint8), "uint8")
        for what, arguments, words in (
            ("257 classes", (many, labels), "at most 256"),
            ("labels on the host", (few, np.zeros((1, 5), np.uint8)), "host memory"),
        ):
            try:
                self.core.sums(*arguments, stream=self.device.stream)
                self.record(what, False, "no error")
            except (RuntimeError, ValueError) as error:
                self.record(what, words in str(error), error)

    def huge(self, classes, elements=2**31):
        """Checks more than so many elements, with the gradient in place.

        Returns why it was left out, if it was.
        """
        voxels = elements // classes + 100_003
        what = f"{voxels * classes / 2**31:.3f} x 2^31 elements, C={classes}, float16, in place"
        if voxels * (2 * classes + 1) + (1 << 30) > self.device.memory()[0]:
            return f"{what}: the GPU has too little memory"
        volume = RepeatedVolume(Case((voxels,), classes, dtype="float16"))
        logits = self.device.periodic(volume.stored, voxels, "float16").reshape(1, voxels, classes)
        labels = self.device.periodic(volume.labels, voxels, "uint8").reshape(1, voxels)
        call = Call(voxels, classes, dtype="float16", in_place=True)
        coefficients = [
            np.float32(np.random.default_rng(i).normal(size=(1, classes))) for i in range(3)
        ]
        sums, out = self.run(call, logits, labels, None, coefficients)
        for name, value in volume.sums().items():
            self.within(what, "sums, huge", reference.relative_error(sums[name], value), 2e-6)
        error = gradient_error(self.device, out, volume.gradient(coefficients))
        self.within(what, "gradient, huge", error, GRADIENT_TOLERANCE["float16"])
        return None


def regime_calls():
    """All class counts, dtypes and layouts: one voxel, whole tiles, odd sizes, many tiles."""
    for dtype in DTYPES:
        for data_format in FORMATS:
            for c in CLASSES:
                common = {"dtype": dtype, "data_format": data_format}
                kinds = ("uint8", "int16", "int32", "int64") if c <= 128 else ("int16", "int64")
                for i, (voxels, samples) in enumerate(((1, 2), (512, 1), (1003, 2), (77, 8))):
                    labels = kinds[(c + i) % len(kinds)]
                    loss, place = (c + i) % 2 == 0, i % 2 == 1
                    yield Call(
                        voxels,
                        c,
                        samples,
                        labels=labels,
                        cross_entropy=loss,
                        in_place=place,
                        **common,
                    )
                for activation in ("sigmoid", "none") if c in (1, 2, 3, 4, 5, 17) else ():
                    # The gradient of log p is 1 / p, which may be too large for half.
                    loss = (dtype, activation) != ("float16", "none")
                    yield Call(1003, c, activation=activation, cross_entropy=loss, **common)
                if data_format == "channels_last" and dtype in ("float32", "bfloat16") or c <= 5:
                    yield Call(2_000_003 // c, c, cross_entropy=c % 2 == 0, **common)
    for dtype in DTYPES:
        for c in (2, 4, 14, 104):
            yield Call(1003, c, dtype=dtype, misalign=itemsize(dtype))


def option_calls(classes=(1, 3, 6, 20, 70)):
    """Cases with the options that only the general kernels have."""
    for c in classes:
        for data_format in FORMATS:
            for activation in ("softmax", "sigmoid", "none"):
                common = {"activation": activation, "data_format": data_format}
                yield Call(777, c, 2, labels="dense float32", **common)
                yield Call(777, c, 2, dtype="bfloat16", labels="dense float32", **common)
                yield Call(777, c, 2, squared_pred=True, cross_entropy=False, **common)
                yield Call(777, c, 2, weight="float32", focal_gamma=2.0, in_place=True, **common)
                yield Call(777, c, 2, weight="uint8", ignore_label=250, focal_gamma=0.5, **common)
                yield Call(777, c, 2, ignore_label=200, **common)
                yield Call(777, c, 2, labels="int16", ignore_label=-1, **common)


def few_calls():
    """A small call of each kind of kernel, because the sanitizers are a hundred times slower."""
    for c in (1, 2, 3, 4, 5, 14, 17, 64, 104):
        for dtype in ("float32", "bfloat16"):
            activation = "softmax" if c > 1 else "sigmoid"
            yield Call(20_011 // c, c, 2, dtype=dtype, activation=activation, in_place=c % 2 == 0)
    yield Call(5003, 4, data_format="channels_first")
    yield Call(1024, 2, 2, data_format="channels_first")
    yield Call(1003, 4, misalign=4)
    yield from (Call(1003, 6, dtype=d, weight="float32", focal_gamma=2.0) for d in DTYPES)
    yield Call(301, 20, 2, labels="dense float32", data_format="channels_first")


def check(checker, deadline, few):
    """Makes all calls or a few, and returns the result for the record."""
    calls = [*few_calls()] if few else [*option_calls(), *regime_calls()]
    parts = [functools.partial(checker.check, call) for call in calls]
    if not few:
        first = (checker.same_bits, checker.bad_labels, checker.bad_predictions, checker.refusals)
        parts = [*first, *parts, *(functools.partial(checker.huge, c) for c in (4, 14))]
    left_out = until(deadline, parts)
    about = {"left_out": left_out, "build_info": checker.core.build_info()}
    return {"kind": "few_checks" if few else "checks", **checker.facts(), **about}


def main():
    """Checks, emits the result for gpu_check.py, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("all", "few"))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no check after this time"
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    from dice_op import core

    result = check(Checker(core, Device()), deadline, arguments.what == "few")
    emit(result, report.line(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
