"""What SECURITY.md says that people can rely on."""

import ast
import re

import pytest

from helpers.paths import CSRC, PACKAGE, ROOT
from helpers.processes import output_of

LIBRARIES = sorted(PACKAGE.glob("*.so"))
SOURCES = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
VARIABLE = re.compile(r"^\| `([A-Z_]+)` \|", re.MULTILINE)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_a_library_is_hardened(library):
    segments = output_of("readelf", "-lW", library)
    (stack,) = re.findall(r"GNU_STACK(?: +0x\w+)+ ([RWE ]{3}) 0x", segments)
    assert stack == "RW ", "the stack may not hold code"
    assert "GNU_RELRO" in segments
    assert not re.search(r" LOAD .* RWE ", segments), "nothing is both written and run"
    dynamic = output_of("readelf", "-dW", library)
    assert "NOW" in dynamic, "all addresses are found before they become read-only"
    assert "TEXTREL" not in dynamic
    assert re.findall(r"Library r(?:un)?path: \[(.*)\]", dynamic) in ([], ["$ORIGIN"])
    assert "__stack_chk_fail" in output_of("nm", "-D", "--undefined-only", library)


def test_the_environment_is_read_only_for_the_variables_that_are_listed():
    listed = set(VARIABLE.findall((ROOT / "SECURITY.md").read_text()))
    read = set()
    for path in CSRC.rglob("*.*"):
        read |= set(re.findall(r"getenv\(([^)]*)\)", path.read_text()))
    for path, tree in SOURCES.items():
        uses = understood = 0
        for node in ast.walk(tree):
            match node:
                case (
                    ast.Attribute(attr="environ" | "getenv") | ast.alias(name="environ" | "getenv")
                ):
                    uses += 1
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get"),
                    args=[ast.Constant(value=name), *_],
                ):
                    understood += 1
                    read.add(name)
                case ast.Call(  # This one is written.
                    func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="setdefault"),
                    args=[ast.Constant(value="TF_CPP_MIN_LOG_LEVEL"), _],
                ):
                    understood += 1
                case ast.keyword(  # A process of our own gets the whole.
                    arg="env", value=ast.Dict(keys=[None, None], values=[ast.Attribute(), _])
                ):
                    understood += 1
        assert uses == understood, path
    assert {name.strip('"') for name in read} == listed


def test_no_text_becomes_code():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not {"pickle", "marshal", "shelve", "dill", "yaml"} & set(modules), path


def test_a_variable_that_names_a_file_does_not_open_it(run_python, tmp_path):
    """Python tells an audit hook of each file that it opens and each library that it loads."""
    file = tmp_path / "hostile.so"
    file.write_text("not a library")
    opened = run_python(
        """
        import sys
        seen = []
        sys.addaudithook(lambda event, args: seen.append((event, str(args))))
        import dice_op.losses, numpy as np
        from dice_op import core
        core.sums(np.zeros((1, 5, 2), np.float32), np.zeros((1, 5), np.uint8))
        print([(event, args) for event, args in seen if "hostile" in args and event != "os.putenv"])
        print(any(event == "open" for event, _ in seen))
        """,
        **dict.fromkeys(VARIABLE.findall((ROOT / "SECURITY.md").read_text()), str(file)),
    )
    assert opened.split("\n")[:2] == ["[]", "True"]


def test_workflows_name_each_action_by_its_commit_and_may_only_read():
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(workflows) > 1
    for workflow in workflows:
        text = workflow.read_text()
        actions = re.findall(r"uses: (.*)", text)
        assert actions, workflow
        for action in actions:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d[\d.]*", action), action
        assert re.search(r"^permissions:\n  contents: read\n(?! )", text, re.MULTILINE), workflow
