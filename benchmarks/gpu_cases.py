"""Checks the kernels on a GPU: values and gradients against float64, equal bits, and refusals.

It also checks TensorFlow's ops. It is a step of build_tools/gpu_check.py. `few` runs the cases that
a sanitizer has the time for.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import os
import sys
import time

import gpu_device
import gpu_timing
import numpy as np

DTYPES = ("float32", "float16", "bfloat16", "float64")
CLASSES = (1, 2, 3, 4, 5, 8, 13, 14, 16, 17, 32, 33, 64, 104, 105, 120, 256)
FORMATS = ("channels_last", "channels_first")


@dataclasses.dataclass(frozen=True)
class Case:
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
    """Two samples of a few voxels, which cases repeat, and their results in float64."""

    def __init__(
        self, reference, classes, dtype, activation, dense, weight, ignore, squared, gamma
    ):
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
        x = gpu_device.decode(gpu_device.encode(x, storage), storage)
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
        self.terms = [mass[..., None] * term for term in terms] + [mass[..., None]]
        self.coefficients = [np.float32(rng.normal(size=(2, classes))) for _ in range(3)]
        self.gradients = [  # The first is without cross-entropy, and the second has it.
            reference.gradient(x, self.t, (*self.coefficients[:2], c), mass, **options)
            for c in (0 * self.coefficients[2], self.coefficients[2])
        ]

    def sums(self, samples, voxels):
        """The sums of a case, `[N, C]` each, and the sum of the weights, `[N]`."""
        whole, rest = divmod(voxels, self.period)
        which = np.arange(samples) % 2
        sums = [(whole * s.sum(1) + s[:, :rest].sum(1))[which] for s in self.terms]
        return dict(zip((*gpu_timing.SUMS, "weight_sum"), (*sums[:4], sums[4][:, 0]), strict=True))


def repeated(array, samples, voxels):
    """Repeats `[2, period, ...]` to `[N, V, ...]`."""
    return array[np.arange(samples) % 2][:, np.arange(voxels) % array.shape[1]]


class Checker:
    """Runs cases and keeps their results."""

    def __init__(self):
        self.core, self.reference, self.device = gpu_timing.load()
        self.count, self.failures, self.worst = 0, [], {}
        self.expected = functools.lru_cache(64)(functools.partial(Expected, self.reference))

    def record(self, what, passed, detail=""):
        """Keeps the outcome of a check, and prints a failure at once."""
        self.count += 1
        if not passed:
            self.failures.append(f"{what}: {detail}")
            print(f"  FAILED {self.failures[-1]}", flush=True)

    def within(self, what, kind, error, tolerance):
        """Checks an error against its bound, and keeps the worst error of each kind."""
        error = float(error)
        if not error <= self.worst.get(kind, {"error": -1})["error"]:
            self.worst[kind] = {"error": error, "tolerance": tolerance, "case": str(what)}
        self.record(what, error <= tolerance, f"{kind}: error {error:.2e}, allowed {tolerance:.2e}")

    def expected_of(self, case):
        """Returns the reference of a case. Cases that share one get the same object."""
        return self.expected(
            case.classes, case.dtype, case.activation, case.labels.startswith("dense"),
            bool(case.weight), case.ignore_label, case.squared_pred, case.focal_gamma,
        )  # fmt: skip

    def arrays(self, case, expected):
        """Makes logits, labels and weight on the GPU."""

        def laid_out(values, dtype, **options):
            values = repeated(values, case.samples, case.voxels)
            if values.ndim == 3 and case.data_format == "channels_first":
                values = values.swapaxes(1, 2)
            return self.device.array(gpu_device.encode(values, dtype), dtype, **options)

        return (
            laid_out(expected.logits, case.dtype, misalign=case.misalign),
            laid_out(expected.labels, case.labels.removeprefix("dense ")),
            laid_out(expected.weight, case.weight) if case.weight else None,
        )

    def call(self, case, logits, labels, weight, coefficients):
        """Returns sums as NumPy arrays and the gradient as a GPU array, which held NaN before."""
        options = {
            "activation": case.activation, "data_format": case.data_format, "voxel_weight": weight,
            "ignore_label": case.ignore_label, "squared_pred": case.squared_pred,
            "focal_gamma": case.focal_gamma, "stream": self.device.stream,
        }  # fmt: skip
        sums = self.core.sums(logits, labels, cross_entropy=case.cross_entropy, **options)
        sums = {name: value.numpy() for name, value in sums.items()}
        out = logits
        if not case.in_place:
            out = self.device.empty(logits.shape, case.dtype)
            out.fill(0xFF)
        number = "float64" if case.dtype == "float64" else "float32"
        given = {
            name: self.device.array(gpu_device.encode(value, number), number)
            for name, value in zip(gpu_timing.COEFFICIENTS, coefficients, strict=False)
        }
        self.core.gradient(logits, labels, out=out, **given, **options)
        return sums, out

    def check(self, case):
        """Checks one case against its reference."""
        expected = self.expected_of(case)
        arrays = self.arrays(case, expected)
        which = np.arange(case.samples) % 2
        used = expected.coefficients[: 3 if case.cross_entropy else 2]
        try:
            sums, out = self.call(case, *arrays, [k[which] for k in used])
        except (RuntimeError, ValueError, TypeError) as error:
            self.record(case, False, error)
            return
        wanted = expected.sums(case.samples, case.voxels)
        for name, value in sums.items():
            error = self.reference.relative_error(value, wanted[name])
            tolerance = gpu_timing.sums_tolerance(case.dtype)
            self.within(case, f"sums, {case.dtype}", error, tolerance)
        got = gpu_device.decode(out.numpy(), case.dtype)
        if case.data_format == "channels_first":
            got = got.swapaxes(1, 2)
        gradient = expected.gradients[case.cross_entropy]
        gradient = repeated(gradient, case.samples, case.voxels)
        if gradient.any():
            error = self.reference.gradient_error(got, gradient)
            tolerance = gpu_timing.GRADIENT_TOLERANCE[case.dtype]
            self.within(case, f"gradient, {case.dtype}", error, tolerance)
        else:  # One class under softmax has no gradient.
            self.record(case, not got.any(), "a gradient where there is none")

    def same_bits(self):
        """Checks that ten runs of the same call give the same bits."""
        for case in (
            Case(500_001, 4, 2), Case(150_001, 14), Case(20_011, 104, dtype="bfloat16"),
            Case(100_003, 3, 2, weight="float32"), Case(100_003, 5, data_format="channels_first"),
        ):  # fmt: skip
            expected = self.expected_of(case)
            arrays = self.arrays(case, expected)
            which = np.arange(case.samples) % 2
            digests = set()
            for _ in range(10):
                sums, out = self.call(case, *arrays, [k[which] for k in expected.coefficients])
                bits = b"".join(v.tobytes() for v in sums.values()) + out.numpy().tobytes()
                digests.add(hashlib.sha256(bits).hexdigest())
            self.record(
                f"same bits, {case}", len(digests) == 1, f"{len(digests)} results of 10 runs"
            )

    def bad_labels(self):
        """Checks that a label that is no class makes the sums of its sample NaN, and no others."""
        for classes in (1, 2, 3, 4, 14, 104):
            for labels in ("uint8", "int32"):
                case = Case(10_007, classes, 3, labels=labels, activation="sigmoid")
                if classes > 1:
                    case = dataclasses.replace(case, activation="softmax")
                expected = self.expected_of(case)
                logits, _, _ = self.arrays(case, expected)
                index = repeated(expected.labels, 3, case.voxels).copy()
                index[1, 7001] = -1 if labels == "int32" else classes + 1
                bad = self.device.array(gpu_device.encode(index, labels), labels)
                which = np.arange(3) % 2
                sums, _ = self.call(
                    case, logits, bad, None, [k[which] for k in expected.coefficients]
                )
                fine = all(
                    np.isnan(s[1]).all() and np.isfinite(s[::2]).all() for s in sums.values()
                )
                self.record(f"a label that is no class, {case}", fine, sums)

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

    def huge(self, classes):
        """Checks more than 2^31 elements, with the gradient in place.

        Returns why it was left out, if it was.
        """
        voxels = 2**31 // classes + 100_003
        what = f"{voxels * classes / 2**31:.3f} x 2^31 elements, C={classes}, float16, in place"
        if voxels * (2 * classes + 1) + (1 << 30) > self.device.memory()[0]:
            return f"{what}: the GPU has too little memory"
        work = gpu_timing.Workload(self.reference, classes, "float16")
        logits = self.device.periodic(work.stored, voxels, "float16").reshape(1, voxels, classes)
        labels = self.device.periodic(work.labels, voxels, "uint8").reshape(1, voxels)
        case = Case(voxels, classes, dtype="float16", in_place=True)
        coefficients = [
            np.float32(np.random.default_rng(i).normal(size=(1, classes))) for i in range(3)
        ]
        sums, out = self.call(case, logits, labels, None, coefficients)
        for name, value in zip(gpu_timing.SUMS, work.sums(voxels), strict=True):
            self.within(what, "sums, huge", self.reference.relative_error(sums[name], value), 2e-6)
        wanted = work.gradient(coefficients)
        error = gpu_timing.gradient_error(self.device, out, wanted, self.reference)
        self.within(what, "gradient, huge", error, gpu_timing.GRADIENT_TOLERANCE["float16"])
        return None


def regime_cases():
    """All class counts, dtypes and layouts: one voxel, whole tiles, odd sizes, many tiles."""
    for dtype in DTYPES:
        for data_format in FORMATS:
            for c in CLASSES:
                common = {"dtype": dtype, "data_format": data_format}
                kinds = ("uint8", "int16", "int32", "int64") if c <= 128 else ("int16", "int64")
                for i, (voxels, samples) in enumerate(((1, 2), (512, 1), (1003, 2), (77, 8))):
                    labels = kinds[(c + i) % len(kinds)]
                    loss, place = (c + i) % 2 == 0, i % 2 == 1
                    yield Case(
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
                    yield Case(1003, c, activation=activation, cross_entropy=loss, **common)
                if data_format == "channels_last" and dtype in ("float32", "bfloat16") or c <= 5:
                    yield Case(2_000_003 // c, c, cross_entropy=c % 2 == 0, **common)
    for dtype in DTYPES:
        for c in (2, 4, 14, 104):
            yield Case(1003, c, dtype=dtype, misalign=gpu_device.itemsize(dtype))


def option_cases(classes=(1, 3, 6, 20, 70)):
    """Cases with the options that only the general kernels have."""
    for c in classes:
        for data_format in FORMATS:
            for activation in ("softmax", "sigmoid", "none"):
                common = {"activation": activation, "data_format": data_format}
                yield Case(777, c, 2, labels="dense float32", **common)
                yield Case(777, c, 2, dtype="bfloat16", labels="dense float32", **common)
                yield Case(777, c, 2, squared_pred=True, cross_entropy=False, **common)
                yield Case(777, c, 2, weight="float32", focal_gamma=2.0, in_place=True, **common)
                yield Case(777, c, 2, weight="uint8", ignore_label=250, focal_gamma=0.5, **common)
                yield Case(777, c, 2, ignore_label=200, **common)
                yield Case(777, c, 2, labels="int16", ignore_label=-1, **common)


def few_cases():
    """A small case of each kind of kernel, because the sanitizers are a hundred times slower."""
    for c in (1, 2, 3, 4, 5, 14, 17, 64, 104):
        for dtype in ("float32", "bfloat16"):
            activation = "softmax" if c > 1 else "sigmoid"
            yield Case(20_011 // c, c, 2, dtype=dtype, activation=activation, in_place=c % 2 == 0)
    yield Case(5003, 4, data_format="channels_first")
    yield Case(1024, 2, 2, data_format="channels_first")
    yield Case(1003, 4, misalign=4)
    yield from (Case(1003, 6, dtype=d, weight="float32", focal_gamma=2.0) for d in DTYPES)
    yield Case(301, 20, 2, labels="dense float32", data_format="channels_first")


def check(deadline, few):
    """Runs all cases or a few, and returns the exit status."""
    checker = Checker()
    left_out = []
    cases = [*few_cases()] if few else [*option_cases(), *regime_cases()]
    parts = [functools.partial(checker.check, case) for case in cases]
    if not few:
        parts = [checker.same_bits, checker.bad_labels, checker.refusals, *parts]
        parts += [functools.partial(checker.huge, c) for c in (4, 14)]
    for i, part in enumerate(parts):
        if time.monotonic() > deadline:
            left_out.append(f"{len(parts) - i} of {len(parts)} parts: no time left")
            break
        left_out += [reason] if (reason := part()) else []
    result = {"count": checker.count, "failures": checker.failures, "worst": checker.worst}
    result |= {"left_out": left_out, "build_info": checker.core.build_info()}
    gpu_timing.emit({"kind": "few_checks" if few else "checks", **result})
    return 1 if checker.failures else 0


def check_tensorflow():
    """Compares the ops on the GPU with those on the CPU, and trains for ten steps."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(gpu_timing.ROOT))
    try:
        import tensorflow as tf
    except ImportError as error:
        return {"skipped": f"TensorFlow cannot be imported: {error}"}
    if not tf.config.list_physical_devices("GPU"):
        return {"skipped": f"TensorFlow {tf.__version__} sees no GPU"}
    try:
        import dice_op

        built_for = dice_op.core.build_info()["cuda"]
        losses = dice_op.losses
    except (ImportError, RuntimeError, OSError) as error:
        return {"skipped": f"dice_op cannot be imported: {error}"}
    if not built_for:
        return {"skipped": "dice_op is built here without CUDA"}
    failures = []
    rng = np.random.default_rng(0)
    for c in (2, 4, 14, 104):
        for dtype in ("float32", "bfloat16", "float16"):
            x = tf.cast(rng.normal(size=(2, 16, 16, 15, c)), dtype)
            y = tf.constant(rng.integers(0, c, x.shape[:-1]), tf.uint8)
            results = {}
            for place in ("CPU", "GPU"):
                with tf.device(f"/{place}:0"), tf.GradientTape() as tape:
                    tape.watch(x)
                    sums = dice_op.dice_sums(y, x, activation="softmax", cross_entropy=True)
                    total = sum(tf.reduce_sum(s * s) for s in sums[:4]) * 1e-6
                results[place] = [*sums, tape.gradient(total, x)]
            for i, (got, wanted) in enumerate(zip(results["GPU"], results["CPU"], strict=True)):
                got, wanted = (tf.cast(v, tf.float64).numpy() for v in (got, wanted))
                error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
                if not error <= (gpu_timing.GRADIENT_TOLERANCE[dtype] if i == 5 else 4e-6):
                    failures.append(f"C={c} {dtype}: output {i} is off by {error:.2e}")
    import keras

    image = rng.normal(size=(4, 16, 16, 16, 1)).astype(np.float32)
    truth = np.uint8(image[..., 0] > 0) + np.uint8(image[..., 0] > 1)
    histories = {}
    for jit_compile in ("auto", False):  # Keras' default is XLA where there is a GPU.
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((16, 16, 16, 1)),
                keras.layers.Conv3D(8, 3, padding="same", activation="relu"),
                keras.layers.Conv3D(3, 1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1), losses.DiceLoss(), jit_compile=jit_compile)
        name = "with XLA" if model.jit_compile else "without XLA"
        history = [float(model.train_on_batch(image, truth)) for _ in range(10)]
        histories[name] = history
        if not (np.isfinite(history).all() and history[-1] < history[0]):
            failures.append(f"the training's losses {name}: {history}")
    # cuDNN may use TF32 in only one of them, or other kernels, so the tolerance is wide.
    if set(histories) != {"with XLA", "without XLA"}:
        failures.append("Keras' default did not choose XLA")
    elif not np.allclose(*histories.values(), rtol=1e-3):
        failures.append(f"XLA trains otherwise: {histories}")
    return {"version": tf.__version__, "failures": failures, "training": histories}


def main():
    """Checks, prints the results for gpu_check.py, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("all", "few", "tensorflow"))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no check after this time"
    )
    arguments = parser.parse_args()
    if arguments.what != "tensorflow":
        return check(time.monotonic() + arguments.seconds, arguments.what == "few")
    result = check_tensorflow()
    gpu_timing.emit({"kind": "tensorflow", **result})
    return 1 if result.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
