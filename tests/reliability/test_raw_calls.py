"""The raw ops of TensorFlow and the raw handlers of XLA refuse in words what the front ends would
never pass: each wrong argument by itself, and several at once, drawn at random."""

import numpy as np
import pytest
from hypothesis import strategies as st

from dice_op import core
from helpers.installed import needs

N, V, C = 2, 5, 3
X = np.random.default_rng(0).normal(size=(N, V, C)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, C, (N, V)).astype(np.int32)
W = np.ones((N, V), np.float32)
D = np.ones((N, C), np.float32)
NONE = D[:, :0]
NAN = float("nan")

# The arrays of a call, each with others that it may get, most of which are wrong.
ARRAYS = {
    "logits": [X, X.astype(np.float64), X.astype(np.int32), X[0, 0], X[0], X[:0], X[:, :, :0]],
    "labels": [Y, Y[:1], Y[0], Y + 9, Y - 9, Y.astype(np.uint32), Y + 0.5, Y * NAN, X, Y[:, :0]],
    "weight": [[], [W], [W, W], [W[:1]], [D], [W.astype(np.complex64)], [W[0, 0]], [W * NAN]],
}
# The options as attributes.
TABLES = {
    "ignore_label": [[], [1], [1, 2], [2**62]],
    "regions": [[], [1, 2, 4], [1, 2], [-1], [-5, 1], [2**40], [0], [7] * 300, [-(2**63)]],
    "label_sets": [[], [9, 2, 0, 1], [9, 5, 0], [9, -1], [9], [300, 1, 0], [9, 2, 0, 7], [9, 0]],
    "focal_gammas": [[], [1.0] * 3, [1.0], [NAN] * 3, [-1.0] * 3, [1.0] * 300],
    "dist_matrix": [[], [0, 1, 1, 1, 0, 1, 1, 1, 0], [1.0] * 9, [0.0, 1.0], [0.0], [NAN] * 9],
}
NUMBERS = {
    "focal_gamma": [0.0, 2.0, -1.0, NAN, float("inf"), 3e38],
    "label_smoothing": [0.0, 0.5, -0.1, 1.1, NAN],
    "threshold": [0.0, 0.5, NAN, float("inf")],
}
WORDS = {
    "activation": ["softmax", "sigmoid", "none", "argmax", "threshold", "tanh", ""],
    "data_format": ["channels_last", "channels_first", "NCHW"],
    "squared_pred": [False, True],
    "soft_label": [False, True],
    "with_cross_entropy": [False, True],
}
DERIVATIVES = [D, NONE, D[0], D[:, :2], D.astype(np.float64), D[:1], D.astype(np.int32), D * NAN]
ALL = ARRAYS | WORDS | NUMBERS | TABLES


def each_way(pools):
    """Each call in which one argument is another one than the first of its pool."""
    for name, pool in pools.items():
        for value in pool[1:]:
            yield {name: value}


def with_defaults(pools, changes):
    return {name: changes.get(name, pool[0]) for name, pool in pools.items()}


def several(pools):
    """Several arguments that are others."""
    some = st.lists(st.sampled_from(sorted(pools)), min_size=2, max_size=4, unique=True)
    return some.flatmap(
        lambda names: st.fixed_dictionaries({n: st.sampled_from(pools[n][1:]) for n in names})
    )


def outcome(call, errors):
    """The message of an error, which must be one that says something, or the results."""
    try:
        return call()
    except errors as error:
        message = str(error)
        assert len(message) > 20, message
        return message


def check_results(results, arguments):
    """What is not refused is a number where the arrays hold numbers."""
    if isinstance(results, str):
        return
    found = [np.asarray(r, np.float64) for r in results]
    values = [v if isinstance(v, list) else [v] for v in arguments.values()]
    numbers = [a for value in values for a in value if isinstance(a, np.ndarray)]
    if all(np.all(np.isfinite(v)) for v in numbers):
        assert not any(np.any(np.isnan(f)) for f in found), str(arguments)


# --- TensorFlow -----------------------------------------------------------------------------------

OF_OP = ALL | {
    "Tsums": ["float32", "float64", "int32"],
    "remainders": [[], [0.0] * 6, [1.0], [0.0] * 8, [NAN] * 6, [1e30] * 6],
}
OF_GRADIENT = {name: pool for name, pool in OF_OP.items() if name != "Tsums"} | {
    "d_intersection": DERIVATIVES,
    "d_pred_sum": DERIVATIVES,
    "d_cross_entropy": [NONE, D, D[0], NONE[:1]],
    "d_negative_cross_entropy": [NONE, D, D[0]],
    "d_distance_sum": [NONE, D, D[0]],
}


def by_op(pools, changes):
    import tensorflow as tf

    from dice_op.ops import _ops

    given = with_defaults(pools, changes)
    arguments = {("voxel_weight" if k == "weight" else k): v for k, v in given.items()}
    op = _ops.dice_sums_grad if "d_pred_sum" in pools else _ops.dice_sums

    def call():
        results = op(**arguments)
        return [results] if tf.is_tensor(results) else list(results)

    results = outcome(call, (tf.errors.OpError, TypeError, ValueError))
    check_results(results, given)
    return results


@pytest.mark.parametrize("pools", [OF_OP, OF_GRADIENT], ids=["sums", "gradient"])
def test_the_ops_refuse_each_wrong_argument(pools):
    assert not isinstance(by_op(pools, {}), str)
    refused = sum(isinstance(by_op(pools, changes), str) for changes in each_way(pools))
    assert refused > 40


@pytest.mark.parametrize("pools", [OF_OP, OF_GRADIENT], ids=["sums", "gradient"])
def test_the_ops_refuse_several_wrong_arguments(pools, fuzz):
    fuzz(lambda changes: by_op(pools, changes), several(pools), examples=100, cost=2)


# --- XLA ------------------------------------------------------------------------------------------

NEEDS_JAX = needs("jax")
SUM = ((N, C), np.float32)
EMPTY = ((N, 0), np.float32)
BYTES = ((10_000,), np.uint8)
SUMS = [SUM, SUM, SUM, EMPTY, EMPTY, EMPTY, EMPTY, ((N,), np.float32), BYTES]
STRANGE = [((C, N), np.float32), ((N, C), np.float64), ((N, C), np.int32), ((1,), np.uint8), EMPTY]
# A handler is also asked for other results than it has, and gets attributes of other types.
OF_HANDLER = (
    ALL
    | {name: [*pool, 1, "text"] for name, pool in (WORDS | NUMBERS | TABLES).items()}
    | {
        "results": [SUMS, SUMS[:5], [*SUMS, SUM], []]
        + [[*SUMS[:i], other, *SUMS[i + 1 :]] for i in range(9) for other in STRANGE],
        "more": [{}, {"strange": 1}],
        "fewer": [None, "activation", "regions", "focal_gamma"],
    }
)
OF_GRADIENT_HANDLER = OF_HANDLER | {
    "results": [[(X.shape, np.float32)], [SUM], [(X.shape, np.float64)], [], SUMS],
    "derivatives": [[D, D, NONE, NONE, NONE], [], [D] * 5, [D, D, NONE, NONE], [NONE] * 5]
    + [[d, D, NONE, NONE, NONE] for d in DERIVATIVES[2:]],
}


def by_handler(pools, changes):
    import jax

    import dice_op.jax  # noqa: F401 - it registers the handlers

    given = with_defaults(pools, changes)
    gradient = "derivatives" in pools
    attributes = dict(core.op_attributes())
    types = {name: getattr(value, "dtype", None) for name, value in attributes.items()}
    for name in attributes:
        value = given[name]
        listed = isinstance(value, list) and types[name] is not None
        is_number = isinstance(value, float)
        attributes[name] = (
            np.array(value, types[name]) if listed else np.float64(value) if is_number else value
        )
    attributes |= given["more"]
    attributes.pop(given["fewer"], None)

    def call():
        with jax.enable_x64(True):
            results = [jax.ShapeDtypeStruct(*r) for r in given["results"]]
            target = "dice_op_sums_grad" if gradient else "dice_op_sums"
            operands = [given["logits"], given["labels"], *given["weight"]]
            operands += given.get("derivatives", [])
            call = jax.ffi.ffi_call(target, results)
            found = call(*map(jax.numpy.asarray, operands), **attributes)
            return [np.asarray(f) for f in found][: 1 if gradient else 8]

    results = outcome(call, (jax.errors.JaxRuntimeError, TypeError, ValueError))
    check_results(results, given)
    return results


@pytest.mark.full
@NEEDS_JAX
@pytest.mark.parametrize("pools", [OF_HANDLER, OF_GRADIENT_HANDLER], ids=["sums", "gradient"])
def test_the_handlers_refuse_each_wrong_argument(pools):
    assert not isinstance(by_handler(pools, {}), str)
    refused = sum(isinstance(by_handler(pools, changes), str) for changes in each_way(pools))
    assert refused > 60


@NEEDS_JAX
@pytest.mark.parametrize("pools", [OF_HANDLER, OF_GRADIENT_HANDLER], ids=["sums", "gradient"])
def test_the_handlers_refuse_several_wrong_arguments(pools, fuzz):
    fuzz(lambda changes: by_handler(pools, changes), several(pools), examples=20, cost=10)
