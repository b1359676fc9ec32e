"""The CUDA kernels, executed on the CPU: values, gradients, bits, errors, sanitizers.

The emulator runs the very sources that nvcc compiles. What it does not cover (the rounding of fast
instructions, the hardware itself) is checked on a GPU by build_tools/gpu_check.py.
"""

import functools

import emulation
import ml_dtypes
import numpy as np
import pytest
import reference
from test_core import NAMES, in_format, make, renamed

FORMATS = ("channels_last", "channels_first")
EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}


class Cases:
    """Calls with what they must give."""

    def __init__(self):
        self.calls, self.expected = [], []

    def add(
        self,
        shape,
        label_kind="uint8",
        dtype="float32",
        *,
        activation="softmax",
        data_format="channels_last",
        weight=None,
        ignore=None,
        name="",
        seed=0,
        **options,
    ):
        n, v, c = shape
        x, y, t = make(shape, label_kind, activation, seed)
        x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        m = weight
        rng = np.random.default_rng(seed + 1)
        if weight is not None:
            weight = rng.integers(0, 3, (n, v)).astype(weight)
            x[weight == 0] = np.nan  # a voxel without weight may hold anything
            m = weight.astype(np.float64)
        if ignore is not None:
            y = y.copy()
            y[rng.random(y.shape) < 0.3] = ignore
            m = (y != ignore) * (1.0 if m is None else m)
        coefficients = rng.normal(size=(3, n, c)).astype(
            "float64" if dtype == "float64" else "float32"
        )
        x_, y_ = in_format(data_format, x, y)
        self.calls.append(
            emulation.case(
                x_, y_, weight=weight, coefficients=coefficients, activation=activation,
                data_format=data_format, ignore_label=ignore, **options,
            )
        )  # fmt: skip
        loss = options.get("cross_entropy", True)
        given = {k: v for k, v in options.items() if k in ("squared_pred", "focal_gamma")}
        given = {"activation": activation, **renamed(given)}
        wanted = dict(zip(NAMES, reference.sums(x, t, m, **given), strict=True))
        wanted["weight_sum"] = np.full(n, float(v)) if m is None else m.sum(1)
        if not loss:
            coefficients[2] = 0
            del wanted["cross_entropy"]
        gradient = reference.gradient(x, t, coefficients, m, **given)
        wanted["gradient"] = in_format(data_format, gradient)[0]
        label = f"{name} {shape} {label_kind} {dtype} {activation} {data_format} {options}"
        self.expected.append((label, wanted, EPSILON[dtype]))

    def check(self, results):
        for (label, wanted, epsilon), result in zip(self.expected, results, strict=True):
            assert not isinstance(result, str), (label, result)
            assert result["bad"] == (-1, -1), label
            for name, value in wanted.items():
                got = result[name].reshape(value.shape).astype(np.float64)
                if name == "gradient":
                    if not np.any(value):  # one class under softmax has none
                        assert not np.any(got), label
                        continue
                    error = reference.gradient_error(got, value)
                    assert error <= max(2 * epsilon, 2e-6 * (epsilon > 1e-15)), (label, error)
                else:
                    error = reference.relative_error(got, value)
                    bound = 1e-12 if epsilon < 1e-15 else 1e-6
                    assert error <= bound, (label, name, error)


# Classes, and the regime that channels_last float32 class indices reach with them.
REGIMES = {
    1: "direct (sigmoid); softmax of one class: general",
    2: "direct, two voxels in a word",
    3: "staged, sums in registers",
    4: "direct, a voxel in a word",
    5: "staged, odd rows",
    8: "staged, rows of whole words",
    13: "staged, odd rows",
    14: "staged, rows of even length",
    16: "staged, the last with a thread for a voxel",
    17: "two lanes to a voxel, the first",
    32: "two lanes, padded rows",
    33: "four lanes",
    64: "four lanes, padded rows",
    104: "eight lanes, all but all items",
    105: "eight lanes, odd rows",
    120: "eight lanes, most items",
    129: "sixteen lanes",
    256: "sixteen lanes, the most classes",
}


def voxel_counts(classes):
    """One voxel; a whole number of tiles and words; no multiple of anything; several tiles a warp."""
    return (1, 256, 333) if classes > 64 else (1, 512, 1003)


@functools.cache
def regime_cases(dtype, data_format):
    cases = Cases()
    for c in REGIMES:
        for v in voxel_counts(c):
            for n in (1, 2):
                activations = ("softmax", "sigmoid", "none") if c <= 5 or v == 1 else ("softmax",)
                for activation in activations:
                    cases.add(
                        (n, v, c), ["uint8", "int16", "int32", "int64"][(c + v) % 4], dtype,
                        activation=activation, data_format=data_format, name=REGIMES[c],
                        cross_entropy=bool((c + n) % 2) or v == 1, in_place=bool((v + n) % 2),
                    )  # fmt: skip
    cases.add((8, 100, 4), dtype=dtype, data_format=data_format, name="eight samples")
    cases.add((3, 77, 2), dtype=dtype, data_format=data_format, name="samples that are not aligned")
    cases.add((1, 100, 4), dtype=dtype, data_format=data_format, name="not aligned", misalign=8)
    return cases


@pytest.fixture(scope="session")
def program():
    return functools.cache(emulation.build)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_regimes(dtype, data_format, program, tmp_path):
    cases = regime_cases(dtype, data_format)
    results = emulation.run(program("plain"), cases.calls, tmp_path)
    cases.check(results)
