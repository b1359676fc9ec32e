"""Calls of the CUDA kernels on the emulator, each with the results that it must give."""

import functools

import ml_dtypes
import numpy as np

from helpers import emulation, reference
from helpers.kernel_inputs import distances_of, in_format, make, renamed, sure, with_label_sets

EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}
REGIONS = {1: [(1,)], 3: [(1, 2, 3), (2, 3), (3,)], 6: [(c, c + 1) for c in range(6)]}


class Cases:
    """Calls, and the results that they must give."""

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
        ignore_none=None,
        regions=None,
        gap=0,
        **options,
    ):
        """Adds a call. ignore: a label that some voxels get; ignore_none: one that no voxel has;
        gap: how much larger the largest logit of each voxel becomes."""
        n, v, c = shape
        x, y, t = make(shape, label_kind, activation, seed)
        x = sure(x, gap) if gap else x
        if activation == "argmax":
            x = np.round(x)  # There are ties then.
        if regions:
            y = np.random.default_rng(seed).integers(0, max(map(max, regions)) + 1, y.shape)
            y = y.astype(label_kind)
            t = np.stack([np.isin(y, r) for r in regions], -1).astype(float)
            options["regions"] = regions
        unknown = None
        if label_sets := options.get("label_sets"):
            y, t, unknown = with_label_sets(label_sets, y, c, seed)
        x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        m = weight
        rng = np.random.default_rng(seed + 1)
        if weight is not None:
            weight = rng.integers(0, 3, (n, v)).astype(weight)
            x[weight == 0] = np.nan  # A voxel without weight may hold anything.
            m = weight.astype(np.float64)
        if ignore is not None:
            y = y.copy()
            y[rng.random(y.shape) < 0.3] = ignore
            m = (y != ignore) * (1.0 if m is None else m)
        coefficients = rng.normal(size=(5, n, c)).astype(
            "float64" if dtype == "float64" else "float32"
        )
        x_, y_ = in_format(data_format, x, y)
        self.calls.append(
            emulation.case(
                x_, y_, weight=weight, coefficients=coefficients, activation=activation,
                data_format=data_format, ignore_label=ignore_none if ignore is None else ignore,
                **options,
            )
        )  # fmt: skip
        loss = options.get("cross_entropy", True)
        of_reference = ("squared_pred", "soft_label", "focal_gamma", "label_smoothing", "threshold")
        given = {k: v for k, v in options.items() if k in of_reference}
        given = {"activation": activation, **renamed(given)}
        if unknown is not None:
            given["unknown"] = unknown
        if "dist_matrix" in options:
            given["dist_matrix"] = options["dist_matrix"]
        if "focal_gammas" in options:
            given["gamma"] = np.float32(options["focal_gammas"])
        wanted = reference.sums(x, t, m, **given)
        wanted["weight_sum"] = np.full(n, float(v)) if m is None else m.sum(1)
        if not loss:
            coefficients[2:4] = 0
            wanted = {k: v for k, v in wanted.items() if "cross_entropy" not in k}
        if activation not in ("argmax", "threshold"):
            gradient = reference.gradient(x, t, coefficients, m, **given)
            wanted["gradient"] = in_format(data_format, gradient)[0]
        label = f"{name} {shape} {label_kind} {dtype} {activation} {data_format} {options}"
        largest = np.abs(coefficients).max(initial=0) * (1 if m is None else np.max(m, initial=0))
        self.expected.append((label, wanted, EPSILON[dtype], largest))

    def check(self, results):
        for (label, wanted, epsilon, largest), result in zip(self.expected, results, strict=True):
            assert not isinstance(result, str), (label, result)
            assert result["bad_label"] == "", label
            for name, value in wanted.items():
                got = result[name].reshape(value.shape).astype(np.float64)
                if name == "gradient":
                    # One class under softmax has no gradient, but e (1 / e) rounds.
                    if not np.any(value):
                        assert np.abs(got).max(initial=0) <= 2**-21 * largest, label
                        continue
                    error = reference.gradient_error(got, value)
                    bound = 1e-13 if epsilon < 1e-15 else max(2 * epsilon, 2e-6)
                    assert error <= bound, (label, error)
                else:
                    error = reference.relative_error(got, value)
                    bound = 1e-12 if epsilon < 1e-15 else 1e-6
                    assert error <= bound, (label, name, error)


@functools.cache
def few_cases(small=False):
    """Calls of the kernels in few_kernels.cc, one of each sort; a warp gets several tiles and
    flushes."""
    v = 300 if small else 20_000
    cases = Cases()
    cases.add((2, v, 4))
    cases.add((1, v + 1, 4), "int64", cross_entropy=False)
    cases.add((1, v, 2), data_format="channels_first")
    cases.add((2, v, 3), "int32")
    cases.add((1, v + 77, 5), dtype="bfloat16", in_place=True)
    cases.add((1, v + 77, 16))
    cases.add((1, v // 8 + 3, 64), in_place=True)
    cases.add((1, v // 10 + 3, 104), cross_entropy=False)
    cases.add((1, v + 5, 3), weight="float32", ignore=200)
    cases.add((2, v // 4, 6), "int32", weight="float32")
    cases.add((1, 300, 4), misalign=8)
    cases.add((2, v // 4 + 1, 3), weight="float32", focal_gamma=2.0)
    cases.add((2, v // 4 + 1, 4), "soft", data_format="channels_first")
    cases.add((2, v // 8 + 1, 4), "soft", soft_label=True)
    cases.add((1, v // 8 + 1, 4), gap=15, cross_entropy=False)
    cases.add((1, v // 16 + 1, 50), weight="uint8", data_format="channels_first", in_place=True)
    cases.add((2, v // 4 + 1, 3), label_smoothing=0.25, weight="uint8")
    cases.add((2, v // 8 + 1, 4), activation="argmax", cross_entropy=False)
    cases.add((1, v // 8 + 1, 3), activation="sigmoid", regions=REGIONS[3], ignore=200)
    sets = {200: (0, 2), 3: (1, 2, 3), 9: (1,)}
    cases.add((2, v // 8 + 1, 4), label_sets=sets, label_smoothing=0.25)
    cases.add((1, v // 8 + 1, 4), label_sets=sets, activation="sigmoid", weight="uint8")
    cases.add((1, v // 8 + 1, 4), label_sets={5: (0, 1), 6: (1, 2)}, cross_entropy=False)
    cases.add((1, v // 8 + 1, 3), focal_gammas=[2.0, 0.0, 0.5])
    cases.add((2, v // 8 + 1, 4), dist_matrix=distances_of(4), weight="uint8", ignore=200)
    cases.add((1, v // 8 + 1, 3), dist_matrix=distances_of(3), cross_entropy=False)
    return cases


def bits(results):
    return [{k: v.tobytes() for k, v in r.items() if isinstance(v, np.ndarray)} for r in results]
