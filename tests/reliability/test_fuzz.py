"""Calls drawn at random are right or refused, from every front end, and no entry point can be
crashed.

`make test` and CI draw the same inputs each time. `make fuzz` draws others: as many as the
environment variable DICE_OP_FUZZ says, from a seed that it prints.
"""

import importlib.util
import os
import re
import secrets
import time

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from dice_op import core
from helpers import calls, emulation, reference
from helpers.kernel_inputs import read_label_sets
from helpers.paths import BUILD


def needs(module):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: make test-full")


ASKED = int(os.environ.get("DICE_OP_FUZZ", 0))
SEED = int(os.environ.get("DICE_OP_FUZZ_SEED", secrets.randbits(32))) if ASKED else 0
# How many inputs: few of them in every run, ten times as many in `make test-full`.
MANY = pytest.param(10, marks=pytest.mark.full, id="many")
SHARES = pytest.mark.parametrize("share", [pytest.param(1, id="few"), MANY])

_COMMON = {
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "print_blob": True,
}
hypothesis.settings.register_profile("always the same", derandomize=True, **_COMMON)
hypothesis.settings.register_profile(
    "fresh",
    database=hypothesis.database.DirectoryBasedExampleDatabase(BUILD / "hypothesis"),
    **_COMMON,
)


@pytest.fixture
def fuzz(request, seen, share):
    """Calls a function with inputs of strategies: `examples` of them, times the test's share; or
    if DICE_OP_FUZZ says a number, that one divided by `cost`."""

    def run(check, *strategies, examples, cost=1):
        if ASKED and share > 1:
            pytest.skip("DICE_OP_FUZZ says how many")
        examples = max(1, ASKED // cost) if ASKED else share * examples
        profile = hypothesis.settings.get_profile("fresh" if ASKED else "always the same")
        count = 0

        def each(inputs):
            nonlocal count
            count += 1
            check(*inputs)

        test = hypothesis.given(st.tuples(*strategies))(each)
        if ASKED:
            print(f"DICE_OP_FUZZ_SEED={SEED}")
            test = hypothesis.seed(SEED)(test)
        hypothesis.settings(profile, max_examples=examples)(test)()
        assert count > 0
        seen("fuzzing", f"inputs, {request.node.originalname}", count)

    return run


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


@SHARES
def test_numpy_agrees_with_float64(fuzz, share):
    def one(call, threads):
        check(call, *by_core(call, threads=threads))

    fuzz(one, calls.legal(), st.integers(1, 3), examples=300)


@SHARES
def test_memory_of_any_sort_gives_the_same_bits_or_is_refused(fuzz, share):
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


@SHARES
def test_wrong_calls_are_refused_in_words(fuzz, share):
    def one(drawn):
        arguments, names, words = drawn
        message = refusal(lambda: of_numpy(arguments), (TypeError, ValueError))
        if len(names) == 1:
            assert re.search(words, message, re.DOTALL), (names, message)

    fuzz(one, calls.wrong(), examples=300)


def refusal(call, errors):
    """The message of the error that the call must raise. It must be one of ours, in words."""
    with pytest.raises(errors) as raised:
        call()
    message = str(raised.value)
    assert len(message) > 20 and " " in message, message
    return message


def of_numpy(arguments):
    return core.sums(
        arguments.logits, arguments.labels, voxel_weight=arguments.weight, **arguments.options
    )


@pytest.mark.parametrize("name", calls.WRONG)
def test_each_way_to_be_wrong_is_refused_in_words(name):
    @hypothesis.settings(hypothesis.settings.get_profile("always the same"), max_examples=3)
    @hypothesis.given(calls.wrong(name))
    def one(drawn):
        arguments, _, words = drawn
        message = refusal(lambda: of_numpy(arguments), (TypeError, ValueError))
        assert re.search(words, message, re.DOTALL), message

    one()
