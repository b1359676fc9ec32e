"""The page on reliability has the numbers of the record, and names tests that there are."""

import ast
import json
import re
import sys

import pytest

from helpers.paths import DOCS, ROOT, TESTS
from helpers.processes import output_of

PAGE = (DOCS / "reliability.md").read_text()
RECORD = json.loads((DOCS / "reliability.json").read_text())


def test_each_table_has_its_part_of_the_record():
    tables = re.findall(r"<!-- (\w[\w ]*) -->", PAGE)
    assert sorted(tables) == sorted([*RECORD, "in numbers"]) and all(RECORD.values())


def test_the_tables_are_those_of_the_record():
    output_of(sys.executable, TESTS / "reliability" / "report.py", "--check")


def named_tests():
    """Each test that the page names, in the tables too: a file, or a file and a function."""
    return sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAGE)))


@pytest.mark.parametrize("named", named_tests())
def test_a_test_that_is_named_is_there(named):
    file, _, function = named.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert not function or function in {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
