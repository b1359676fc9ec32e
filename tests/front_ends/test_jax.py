"""XLA's handlers are called from JAX, in a process without TensorFlow.

This proves that they need no TensorFlow, and so work on a GPU machine that has none. `make
test-full` installs JAX.
"""

import pytest

from helpers.installed import needs

pytestmark = [pytest.mark.full, needs("jax")]

SETUP = """
    import os, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import ml_dtypes
    import numpy as np
    from dice_op import core
    from dice_op import _text, jax as front_end
    from dice_op._sums import DiceSums
    rng = np.random.default_rng(0)
"""

VALUES = """
    OPTIONS = [
        {},
        {"activation": "sigmoid", "cross_entropy": True, "focal_gamma": 2.0},
        {"squared_pred": True, "cross_entropy": True, "ignore_label": 2},
        {"data_format": "channels_first", "cross_entropy": True},
        {"cross_entropy": True, "label_smoothing": 0.25},
        {"activation": "sigmoid", "regions": [(0,), (1, 2), (2,), (3,), (4, 1)]},
        {"label_sets": {4: (0, 1), 3: (2, 3, 4)}, "cross_entropy": True},
        {"cross_entropy": True, "focal_gammas": [2, 0, 0.5, 1, 0]},
        {"dist_matrix": 1 - np.eye(5)},
    ]

    def check(x, y, weight, options):
        text = _text.written(options)
        weights = () if weight is None else (weight,)
        wanted = core.sums(x, y, voxel_weight=weight, **options)
        sums = jax.jit(lambda *a: front_end._call_sums(text, *a))(x, y, *weights)
        for name, result in zip(_text.asked(text), sums, strict=True):
            np.testing.assert_array_equal(result, wanted[name])
        d = {
            name: rng.normal(size=(2, 5)).astype(wanted["pred_sum"].dtype)
            for name, has_gradient in _text.asked(text).items() if has_gradient
        }
        given = {f"d_{name}": value for name, value in d.items()}
        wanted = core.gradient(x, y, voxel_weight=weight, **given, **options)
        call = jax.jit(lambda *a: front_end._call_gradient(text, *a))
        assert np.any(wanted.astype(np.float64) != 0)
        np.testing.assert_array_equal(call(x, y, *weights, *d.values()), wanted)

    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        for options in OPTIONS:
            x = rng.normal(size=(2, 41, 37, 23, 5)).astype(dtype)
            y = rng.integers(0, 5, size=x.shape[:-1]).astype(np.int16)
            if "data_format" in options:
                x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
            check(x, y, None, options)
            check(x, y, rng.integers(0, 3, size=y.shape).astype(np.float32), options)
    print("tensorflow" in sys.modules)
"""


def test_jax_gives_the_same_bits_as_numpy(run_python):
    """kernels/test_core.py compares the bits on NumPy arrays with the float64 reference."""
    assert run_python(SETUP + VALUES).splitlines() == ["False"]


OTHERS = """
    class Core:
        def __getattr__(self, name):
            return getattr(core, name)

        def ffi_targets(self):
            return core.ffi_targets() | {"TPU": {}}

    x, y = rng.normal(size=(2, 3, 300)).astype(np.float32), np.zeros((2, 3), np.int32)
    front_end.core = Core()
    print(np.array_equal(front_end.dice_sums(x, y).pred_sum, core.sums(x, y)["pred_sum"]))
"""


def test_a_platform_that_cannot_do_a_call_does_not_hinder_another_one(run_python):
    """A build with CUDA has handlers of a GPU, which takes at most 256 classes; the CPU takes any
    number. Here a platform without kernels is in place of the GPU."""
    assert run_python(SETUP + OTHERS).splitlines() == ["True"]


def test_a_jax_that_is_older_than_the_handlers_is_refused_in_words(tmp_path, run_python):
    """And it goes on working. It would not, once it had been given such handlers."""
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n\n#define XLA_FFI_API_MINOR 0\n")
    code = """
        import sys
        import jax, jaxlib
        from dice_op import core
        jax.ffi.include_dir = lambda: sys.argv[1]
        try:
            import dice_op.jax
        except ImportError as error:
            print(error)
        print(jax.__version__, jaxlib.__version__, core.build_info()["ffi"])
        print(jax.numpy.ones(3).sum())
    """
    said, versions, total = run_python(code, tmp_path, JAX_PLATFORMS="cpu").splitlines()
    jax, jaxlib, built = versions.split()
    assert f"does not serve JAX {jax}: its handlers were compiled with version {built} of" in said
    assert f"jaxlib {jaxlib} has version 0.0" in said and "Install a later JAX, or build" in said
    assert total == "3.0"


ERRORS = """
    x, y = rng.normal(size=(2, 3, 4)).astype(np.float32), np.zeros((2, 3), np.int32)
    d = np.zeros((2, 4), np.float32)

    def attempt(function):
        try:
            jax.block_until_ready(function())
            print("nothing")
        except Exception as error:
            print(str(error).splitlines()[0])

    def sums(x, y, *rest, **options):
        return front_end._call_sums(_text.written(options), x, y, *rest)

    def raw_gradient(x, y, *rest, **options):
        call = jax.ffi.ffi_call("dice_op_sums_grad", jax.ShapeDtypeStruct(x.shape, x.dtype))
        return call(x, y, *rest, **front_end._attributes(_text.written(options)))

    attempt(lambda: sums(x, y + np.array([0, 0, 9], np.int32)))
    attempt(lambda: sums(x, y[:, :2]))
    attempt(lambda: sums(x, y, activation="soft"))
    attempt(lambda: sums(x, y, d, d))
    attempt(lambda: sums(x.astype(np.int32), y))
    attempt(lambda: sums(x, y.astype(np.uint32)))
    none = d[:, :0]
    attempt(lambda: raw_gradient(x, y, d, d))
    attempt(lambda: raw_gradient(x, y, d, d, none, none, none, activation="argmax"))
    attempt(lambda: raw_gradient(x, y, d, d, d, none, none))
    attempt(lambda: raw_gradient(x, y, d.astype(np.float64), d, none, none, none))
    def raw(results, ignore_label=()):
        call = jax.ffi.ffi_call("dice_op_sums", results)
        attributes = front_end._attributes(_text.written({}))
        return call(x, y, **{**attributes, "ignore_label": np.array(ignore_label, np.int64)})

    results = [jax.ShapeDtypeStruct((2, 4), np.float32)] * 9
    attempt(lambda: raw(results[:5]))
    attempt(lambda: raw(results))
    attempt(lambda: raw(results, [1, 2]))
"""


def test_errors_say_what_is_wrong(run_python):
    says = [
        "labels (y_true) at voxel [0, 2] have the value 9",
        "labels (y_true) have shape [2, 2]",
        "activation is 'soft', but must be one of 'softmax', 'sigmoid', 'none'",
        "4 operands, but there must be 2, and one more for a voxel weight",
        "logits (y_pred) have dtype int32",
        "labels have dtype U32[2, 3], which dice_op does not take: use a float of any",
        "4 operands, but there must be 7, and one more for a voxel weight",
        "activation 'argmax' has no gradient",
        "d_cross_entropy must be float32[2, 0], but is F32[2, 4]",
        "d_intersection must be float32[2, 4], but is F64[2, 4]",
        "there must be 9 results",
        "cross_entropy must be float32[2, 0], but is F32[2, 4]",
        "ignore_label has several values, but must have none or one",
    ]
    said = run_python(SETUP + ERRORS).splitlines()
    assert len(said) == len(says)
    for line, words in zip(said, says, strict=True):
        assert words in line
