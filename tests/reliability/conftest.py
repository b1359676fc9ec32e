"""How many inputs the tests of this folder draw.

`make test` and CI draw the same inputs each time. `make fuzz` draws others: as many as the
environment variable DICE_OP_FUZZ says, from a seed that it prints.
"""

import os
import secrets

import hypothesis
import pytest
from hypothesis import strategies as st

from helpers.paths import BUILD

ASKED = int(os.environ.get("DICE_OP_FUZZ", 0))
SEED = int(os.environ.get("DICE_OP_FUZZ_SEED", 0)) or secrets.randbits(32)
# Ten times as many in `make test-full`.
MANY = pytest.param(10, marks=pytest.mark.full, id="many")
COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
ALWAYS_THE_SAME = hypothesis.settings(derandomize=True, **COMMON)
FRESH = hypothesis.settings(
    derandomize=False,
    database=hypothesis.database.DirectoryBasedExampleDatabase(BUILD / "hypothesis"),
    print_blob=True,
    **COMMON,
)


@pytest.fixture(params=[pytest.param(1, id="few"), MANY])
def fuzz(request, seen):
    """Calls a function with inputs of strategies, `examples` of them or more; or, if DICE_OP_FUZZ
    says a number, with that one divided by `cost`."""
    if ASKED and request.param > 1:
        pytest.skip("DICE_OP_FUZZ says how many")

    def draw(check, *strategies, examples, cost=1):
        examples = max(1, ASKED // cost) if ASKED else request.param * examples
        count = 0

        def each(inputs):
            nonlocal count
            count += 1
            check(*inputs)

        test = hypothesis.given(st.tuples(*strategies))(each)
        if ASKED:
            print(f"DICE_OP_FUZZ_SEED={SEED}")
            test = hypothesis.seed(SEED)(test)
        hypothesis.settings(FRESH if ASKED else ALWAYS_THE_SAME, max_examples=examples)(test)()
        assert count > 0
        seen("fuzzing", f"inputs of {request.node.originalname}", count)

    return draw
