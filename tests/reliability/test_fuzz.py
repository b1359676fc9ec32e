"""Calls drawn at random are right, or refused in words, from every front end."""

import functools
import re

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from dice_op import core
from helpers import calls, emulation, reference
from helpers.calls import refusal
from helpers.each_loss import EACH
from helpers.installed import needs
from helpers.kernel_inputs import read_label_sets

# --- NumPy ----------------------------------------------------------------------------------------


def by_core(call, arrays=None, **more):
    """The sums and the gradient of a call, as dice_op.core gives them."""
    logits, labels, weight = arrays or call.arrays
    sums = core.sums(logits, labels, voxel_weight=weight, **call.options, **more)
    if not call.has_gradient:
        return sums, None
    options = {k: v for k, v in call.options.items() if k != "cross_entropy"}
    given = {f"d_{name}": value for name, value in call.derivatives.items()}
    gradient = core.gradient(logits, labels, voxel_weight=weight, **given, **options, **more)
    return sums, gradient


def check(call, sums, gradient):
    call.check_sums(sums)
    if gradient is not None:
        call.check_gradient(gradient)


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


def test_numpy_agrees_with_float64(fuzz):
    def one(call, threads):
        check(call, *by_core(call, threads=threads))

    fuzz(one, calls.legal(), st.integers(1, 3), examples=300)


def test_memory_of_any_sort_gives_the_same_bits_or_is_refused(fuzz):
    def one(call, which, how, threads):
        wanted, gradient = by_core(call)
        locked = [a if a is None else a.copy() for a in call.arrays]
        for array in locked:
            if array is not None:
                array.flags.writeable = False
        found, other = by_core(call, locked, threads=threads)
        assert_same_bits(found, wanted)
        if gradient is not None:
            np.testing.assert_array_equal(other, gradient)
        if call.arrays[which] is None:
            return
        change, words = calls.MEMORY[how]
        strange = list(call.arrays)
        strange[which] = change(strange[which])
        message = refusal(lambda: by_core(call, strange), (TypeError, ValueError))
        assert re.search(words, message), message

    how = st.sampled_from(list(calls.MEMORY))
    which, threads = st.integers(0, 2), st.integers(1, 3)
    fuzz(one, calls.legal(2000, least=2), which, how, threads, examples=60)


def test_wrong_calls_are_refused_in_words(fuzz):
    def one(drawn):
        arguments, names, words = drawn
        message = refusal(lambda: of_numpy(arguments), (TypeError, ValueError))
        if len(names) == 1:
            assert re.search(words, message, re.DOTALL), (names, message)

    fuzz(one, calls.wrong(), examples=300)


def of_numpy(arguments):
    return core.sums(
        arguments.logits, arguments.labels, voxel_weight=arguments.weight, **arguments.options
    )


@pytest.mark.parametrize("name", calls.WRONG)
def test_each_way_to_be_wrong_is_refused_in_words(name):
    @hypothesis.settings(
        derandomize=True,
        deadline=None,
        max_examples=3,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls.wrong(name))
    def one(drawn):
        arguments, _, words = drawn
        message = refusal(lambda: of_numpy(arguments), (TypeError, ValueError))
        assert re.search(words, message, re.DOTALL), message

    one()


# --- label maps -----------------------------------------------------------------------------------


@st.composite
def label_maps(draw):
    """Two label maps, and the arguments of core.scores."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(0, 3)), *draw(st.lists(st.integers(0, 40), min_size=1, max_size=2)))
    classes = draw(st.one_of(st.integers(1, 9), st.sampled_from([40, 130])))
    kind = draw(st.sampled_from(["classes", "regions", "label_sets"]))
    options = {"classes": classes, "threads": draw(st.integers(1, 3))}
    values = np.arange(max(classes, 2))
    if kind == "regions":
        values = np.arange(draw(st.integers(1, 9)))
        regions = [rng.choice(values, rng.integers(1, len(values) + 1)) for _ in range(classes)]
        options["regions"] = [sorted({int(v) for v in region}) for region in regions]
        values = np.arange(max(map(max, options["regions"])) + 1)
    labels_may_be = values
    if kind == "label_sets" and classes > 1:
        options["label_sets"] = {
            int(v): rng.choice(classes, rng.integers(1, min(classes, 5) + 1), False).tolist()
            for v in rng.integers(0, 120, 3)
        }
        labels_may_be = np.union1d(values, list(options["label_sets"]))
    labels, prediction = rng.choice(labels_may_be, shape), rng.choice(values, shape)
    if draw(st.booleans()):  # as in volumes, where neighbours are mostly equal
        labels, prediction = (np.sort(a, axis=-1) for a in (labels, prediction))
    ignore = draw(st.sampled_from([None, 0, 1, 100]))
    if ignore is not None and ignore not in options.get("label_sets", {}):
        options["ignore_label"] = ignore
        labels = np.where(rng.random(shape) < 0.2, ignore, labels)
    dtypes = st.sampled_from(["int16", "uint16", "int32", ">i4", "int64", "uint64", "float32"])
    narrow = ["uint8"] if classes < 257 else []
    one, other = (draw(st.one_of(dtypes, st.sampled_from([*narrow, "int16"]))) for _ in range(2))
    return prediction.astype(one), labels.astype(other), options


def test_scores_are_counted_as_numpy_counts_them(fuzz):
    def one(drawn):
        prediction, labels, options = drawn
        classes, unknown = options["classes"], 0
        maps = [
            np.asarray(a).astype(np.int64).reshape(len(a), int(np.prod(a.shape[1:])))
            for a in (prediction, labels)
        ]
        if "regions" in options:
            p, t = (np.stack([np.isin(m, r) for r in options["regions"]], -1) for m in maps)
        else:
            p, t = (reference.one_hot(m, classes) for m in maps)
            if "label_sets" in options:
                named = np.where(maps[1] == options.get("ignore_label"), 0, maps[1])
                t, unknown = read_label_sets(options["label_sets"], named, classes)
        counts = (maps[1] != options.get("ignore_label"))[..., None] * (1 - unknown)
        found = core.scores(prediction, labels, **options)
        i, p, t = ((counts * a).sum(1) for a in (p * t, p, t))
        for name, value in {"intersection": i, "pred_sum": p, "label_sum": t}.items():
            np.testing.assert_array_equal(found[name], value, err_msg=str(options))
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(found["dice"], 2 * i / (p + t))
            np.testing.assert_array_equal(found["jaccard"], i / (p + t - i))

    fuzz(one, label_maps(), examples=150)


# --- TensorFlow -----------------------------------------------------------------------------------


def renamed(options):
    """The options as every front end but core takes them."""
    options = dict(options)
    if "focal_gammas" in options:
        options["focal_gamma"] = options.pop("focal_gammas")
    return options


def by_tensorflow(call, compiled=False):
    import tensorflow as tf

    import dice_op

    def compute(logits, labels, weight, derivatives):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            sums = dice_op.dice_sums(labels, logits, voxel_weight=weight, **renamed(call.options))
            found = {k: v for k, v in sums._asdict().items() if v is not None}
            total = sum(tf.reduce_sum(found[k] * d) for k, d in derivatives.items())
        return found, tape.gradient(total, logits) if call.has_gradient else None

    derivatives = {k: tf.constant(v) for k, v in call.derivatives.items() if call.has_gradient}
    arrays = [None if a is None else tf.constant(a) for a in call.arrays]
    program = tf.function(compute, jit_compile=True) if compiled else compute
    sums, gradient = program(*arrays, derivatives)
    return {k: v.numpy() for k, v in sums.items()}, None if gradient is None else gradient.numpy()


def check_front_end(call, front_end):
    """A front end gives what float64 gives, and the very bits of NumPy's sums, but for the tiniest
    numbers, which TensorFlow's threads take for zeros."""
    sums, gradient = front_end(call)
    check(call, sums, gradient)
    for name, value in by_core(call)[0].items():
        np.testing.assert_allclose(np.asarray(sums[name]), value, rtol=0, atol=2**-96)


def test_tensorflow_agrees_with_float64(fuzz):
    def one(call):
        check_front_end(call, by_tensorflow)

    fuzz(one, calls.legal(4000), examples=60, cost=3)


def test_programs_of_xla_agree_with_float64(fuzz):
    def one(call):
        check_front_end(call, lambda call: by_tensorflow(call, compiled=True))

    fuzz(one, calls.legal(1000), examples=3, cost=200)


def of_tensorflow(arguments):
    import dice_op

    return dice_op.dice_sums(
        arguments.labels,
        arguments.logits,
        voxel_weight=arguments.weight,
        **renamed(arguments.options),
    )


def test_tensorflow_refuses_wrong_calls_in_words(fuzz):
    import tensorflow as tf

    errors = (TypeError, ValueError, tf.errors.InvalidArgumentError)

    def one(drawn):
        arguments, names, words = drawn
        message = refusal(lambda: of_tensorflow(arguments), errors)
        if len(names) == 1:
            assert re.search(words, message, re.DOTALL), (names, message)

    fuzz(one, calls.wrong(), examples=60, cost=3)


# --- PyTorch and JAX ------------------------------------------------------------------------------


def by_torch(call):
    import torch

    import dice_op.torch

    def tensor(array):
        if array is None or array.dtype != ml_dtypes.bfloat16:
            return array if array is None else torch.tensor(array)
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)

    logits, labels, weight = map(tensor, call.arrays)
    logits.requires_grad_(call.has_gradient)
    options = renamed(call.options)
    sums = dice_op.torch.dice_sums(logits, labels, voxel_weight=weight, **options)
    found = {k: v for k, v in sums._asdict().items() if v is not None}
    gradient = None
    if call.has_gradient:
        sum((found[k] * tensor(d)).sum() for k, d in call.derivatives.items()).backward()
        gradient = logits.grad.double().numpy()
    return {k: v.detach().numpy() for k, v in found.items()}, gradient


@needs("torch")
def test_pytorch_agrees_with_float64(fuzz):
    def one(call):
        check_front_end(call, by_torch)

    fuzz(one, calls.legal(4000), examples=60, cost=3)


@needs("torch")
def test_pytorch_refuses_wrong_calls_in_words(fuzz):
    import torch

    import dice_op.torch

    def one(drawn):
        arguments, names, words = drawn
        arrays = arguments.logits, arguments.labels, arguments.weight
        logits, labels, weight = (a if a is None else torch.tensor(a) for a in arrays)
        options = {"data_format": "channels_last", **renamed(arguments.options)}
        call = functools.partial(dice_op.torch.dice_sums, logits, labels, voxel_weight=weight)
        message = refusal(lambda: call(**options), (TypeError, ValueError))
        if len(names) == 1:
            assert re.search(words, message, re.DOTALL), (names, message)

    fuzz(one, calls.wrong(), examples=60, cost=3)


def by_jax(call):
    import jax

    import dice_op.jax

    options = renamed(call.options)
    given = [a for a in call.arrays if a is not None]

    def compute(logits, labels, weight=None):
        sums = dice_op.jax.dice_sums(logits, labels, voxel_weight=weight, **options)
        return {k: v for k, v in sums._asdict().items() if v is not None}

    with jax.enable_x64(True):
        given = [jax.numpy.asarray(a) for a in given]
        if not call.has_gradient:
            return compute(*given), None
        sums, pull = jax.vjp(lambda logits: compute(logits, *given[1:]), given[0])
        d = {k: call.derivatives.get(k, np.zeros(v.shape, v.dtype)) for k, v in sums.items()}
        return sums, pull(d)[0]


@needs("jax")
def test_jax_agrees_with_float64(fuzz):
    def one(call):
        check_front_end(call, by_jax)

    fuzz(one, calls.legal(2000), examples=20, cost=10)


# --- CUDA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "few"),
    [
        ("plain", True),
        pytest.param("plain", False, marks=pytest.mark.full),
        pytest.param("address", True, marks=pytest.mark.long),
    ],
)
def test_cuda_kernels_agree_with_float64(fuzz, kind, few, tmp_path):
    """One run of the emulator takes all the calls. few: the kernels of most sorts of calls, which
    are compiled in seconds."""
    drawn = []

    def one(call):
        if few and not has_few_kernels(call):
            return
        call.coefficients = [k.astype(np.float64) for k in call.coefficients]
        drawn.append(call)

    fuzz(one, calls.legal(3000), examples=120, cost=10)
    assert drawn
    program = emulation.build(kind, few=few)
    results = emulation.run(program, [emulated(call) for call in drawn], tmp_path)
    for call, result in zip(drawn, results, strict=True):
        if call.x.shape[2] > 256 or len(call.options.get("dist_matrix", ())) > 25:
            assert "at most" in result, call
            continue
        assert isinstance(result, dict) and result.pop("bad_label") == "", (call, result)
        gradient, _ = result.pop("gradient"), result.pop("specialised")
        call.check_sums(result)
        if call.has_gradient:
            call.check_gradient(gradient.reshape(call.logits.shape))


def has_few_kernels(call):
    """Whether few_kernels.cc has a kernel for the call."""
    exact = call.weight is not None and call.weight.dtype not in (bool, np.uint8, np.int8, np.int16)
    in_double = call.logits.dtype == np.float64 or (not call.has_gradient and exact)
    per_class = call.dense and call.labels.dtype.name in calls.FLOATS
    activations = ("softmax", "argmax", "sigmoid") if per_class else ("softmax", "argmax")
    return call.activation in activations and not in_double and call.x.shape[2] <= 4


def emulated(call):
    n, v, c = call.x.shape
    last = call.options["data_format"] == "channels_last"
    dense = call.dense and (c > 1 or call.labels.dtype.name in calls.FLOATS)
    logits = call.logits.reshape((n, v, c) if last else (n, c, v))
    labels = call.labels.reshape(logits.shape if dense else (n, v))
    weight = None if call.weight is None else call.weight.reshape(n, v)
    given = {"weight": weight, "coefficients": call.coefficients}
    return emulation.case(logits, labels, **given, **call.options)


# --- losses and scores ----------------------------------------------------------------------------


@st.composite
def losses(draw):
    """A loss, or the words that refuse its options; logits [N, V, 4] in float64, and labels."""
    from dice_op import losses

    name, given = EACH[draw(st.sampled_from(list(EACH)))]
    flags = {k: st.booleans() for k in ("include_background", "squared_pred", "batch")}
    optional = {
        "activation": st.sampled_from(["softmax", "sigmoid", "none"]),
        **flags,
        "soft_label": st.booleans(),
        "ignore_label": st.sampled_from([None, 0, 2, 200]),
        "label_sets": st.sampled_from([None, {3: (0, 3), 9: (1, 2, 3)}]),
        "absent": st.sampled_from(["zero", "one", "skip", "keep"]),
        "average": st.sampled_from(["macro", "micro", "weighted"]),
        "focal_gamma": st.sampled_from([0.0, 0.5, 2.0, [0.0, 1.0, 2.0, 0.5]]),
        "label_smoothing": st.sampled_from([0.0, 0.25]),
        "lambda_ce": st.sampled_from([0.0, 0.5]),
    }
    options = given | draw(st.fixed_dictionaries({}, optional=optional))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 40)), 4
    x = 2 * rng.normal(size=shape)
    if options.get("activation") == "none":
        x = reference.softmax(x)
    y = rng.integers(0, 4, shape[:2])
    if draw(st.booleans()) and not (options.get("ignore_label") or options.get("label_sets")):
        y = reference.softmax(rng.normal(size=shape))
    try:
        loss = getattr(losses, name)(**options, reduction="none", data_format="channels_last")
    except (TypeError, ValueError) as error:
        loss = str(error)
    return loss, x, y


def test_losses_of_the_kernels_are_those_of_plain_operations(fuzz):
    import tensorflow as tf

    from dice_op import DiceSums, _text, composite

    compared = 0

    def of_plain_operations(loss, y, x):
        text = _text.written(loss.options_of_sums(4, lambda: y.dtype.is_floating))
        sums = composite.sums(x, y, [], **_text.for_composite(text))
        named = zip(DiceSums._fields, sums, strict=True)
        return loss.losses_of(
            DiceSums(**{k: s if k in _text.asked(text) else None for k, s in named})
        )

    def one(drawn):
        nonlocal compared
        loss, x, y = drawn
        if isinstance(loss, str):
            assert len(loss) > 20
            return
        x, y = tf.constant(x), tf.constant(y)

        def value_and_gradient(function):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = function(y, x)
            return value.numpy(), tape.gradient(value, x).numpy()

        try:
            results = [value_and_gradient(loss)]
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            assert len(str(error)) > 20
            return
        results.append(value_and_gradient(lambda y, x: of_plain_operations(loss, y, x)))
        compared += 1
        for found, wanted in zip(*results, strict=True):
            scale = np.abs(wanted).max(initial=0) + 1e-9
            assert np.abs(found - wanted).max(initial=0) <= 1e-6 * scale, loss.options()

    fuzz(one, losses(), examples=60, cost=10)
    assert compared > 0


def test_metrics_are_the_scores_of_numpy(fuzz):
    from dice_op import metrics

    def one(seed, samples, voxels, classes, ignore):
        rng = np.random.default_rng(seed)
        x = np.round(rng.normal(size=(samples, voxels, classes)), 1).astype(np.float32)
        y = rng.integers(0, classes, (samples, voxels)).astype(np.int32)
        found = core.scores(x, y, ignore_label=ignore)
        i, p, t = (found[k].sum(0) for k in ("intersection", "pred_sum", "label_sum"))
        for metric, formula in (
            (metrics.DiceScore, lambda: 2 * i / (p + t)),
            (metrics.JaccardScore, lambda: i / (p + t - i)),
        ):
            score = metric(over="dataset", average="none", ignore_label=ignore)
            score.update_state(y, x)
            with np.errstate(invalid="ignore"):
                wanted = np.where(t > 0, formula(), np.nan)
            np.testing.assert_allclose(score.result(), wanted, rtol=1e-6)

    numbers = st.integers(1, 3), st.integers(1, 60), st.integers(2, 9)
    ignore = st.sampled_from([None, 0, 1, 100])
    fuzz(one, st.integers(0, 2**32 - 1), *numbers, ignore, examples=20, cost=20)
