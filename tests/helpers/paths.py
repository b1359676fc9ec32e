"""Where things lie in this repository, said once: no test looks for them from its own place."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
BUILD = ROOT / "build"
BUILD_TOOLS = ROOT / "build_tools"
CSRC = ROOT / "csrc"
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
TESTS = ROOT / "tests"
# The package that the tests import; it need not be the one in this folder.
PACKAGE = pathlib.Path(importlib.util.find_spec("dice_op").origin).parent
