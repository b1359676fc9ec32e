"""Every block of code on every page runs, from top to bottom, as a reader would run it.

Blocks marked `python` run in an order and with the names of those above them on the page. What a
page takes for granted, such as a model or images, it says in a comment that readers do not see:

    <!-- invisible-code-block: python
    labels = np.zeros((2, 8, 8, 8), np.uint8)
    -->

Of blocks marked `sh`, targets of make, scripts and their options are looked up. A block of output
is marked `text`.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import sybil
from sybil.parsers import myst

from dice_op import _check, core
from helpers.paths import DOCS, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Words of a page's code for what `make test` has not, so that `make test-full` runs it.
MORE = r"^\s*(import|from) (torch|jax|monai|medicai)\b|\bdice_op\.(torch|jax)\b|KERAS_BACKEND"
KNOWN = {"python", "sh", "text", "json", "dockerfile", "bibtex", "toml", "c++", "cuda", "make"}


def blocks(page):
    """(language, code) of each fenced block of code, but not of Sphinx' directives."""
    found = re.findall(r"^( *)(```+|~~~+)(\S*)[^\n]*\n(.*?)^\1\2", page.read_text(), re.M | re.S)
    return [(language, code) for _, _, language, code in found if not language.startswith("{")]


def python_of(page):
    hidden = re.findall(r"<!--+ invisible-code-block: python\n(.*?)-->", page.read_text(), re.S)
    return "\n".join([*hidden, *(code for language, code in blocks(page) if language == "python")])


def run(page):
    """Runs the page's code, in the folder and the process in which this is called."""
    parsers = [myst.PythonCodeBlockParser(), myst.SkipParser()]
    document = sybil.Sybil(parsers=parsers, path=str(page.parent), pattern=page.name).parse(page)
    for example in document.examples():
        example.evaluate()


def processes():
    """The pages that each process runs. A short page takes less time than the imports."""
    short = [page for page in PAGES if page.parent.name in ("losses", "metrics")]
    alone = [[page] for page in PAGES if page not in short]
    for pages in (short[::2], short[1::2], *alone):
        if code := "\n".join(map(python_of, pages)).strip():
            marks = pytest.mark.full if re.search(MORE, code, re.M) else ()
            name = IDS[PAGES.index(pages[0])] if len(pages) == 1 else f"{len(pages)} short pages"
            yield pytest.param(pages, marks=marks, id=name)


@pytest.mark.parametrize("pages", list(processes()))
def test_the_code_of_a_page_runs(pages, tmp_path):
    """In a process of its own: a page may choose the backend of Keras, or a dtype policy."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, __file__, *map(str, pages)]
    environment = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_says_its_language(page):
    assert {language for language, _ in blocks(page)} <= KNOWN
    assert not re.search(r"skip: (start|end|next(?! if\())", page.read_text()), "says no reason"


def commands(page):
    for language, code in blocks(page):
        if language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield [w for w in words if not re.fullmatch(r"[A-Z][A-Z_0-9]*=.*", w)]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_commands_of_a_page_are_there(page):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        for script in (w for w in words if w.endswith(".py") and "/" in w and w[0] != "/"):
            known = (ROOT / script).read_text()
            assert all(f'"{w}"' in known for w in words if w.startswith("--")), words
        if "dice_op" in words and "-m" in words:
            assert words[words.index("dice_op") + 1] in ("check", "info"), words


def test_the_menu_of_versions_has_this_one():
    versions = [v["version"] for v in json.loads((DOCS / "_static" / "versions.json").read_text())]
    assert core.build_info()["version"].partition("+")[0] in versions


def test_the_first_page_shows_what_check_prints():
    page = (DOCS / "get_started.md").read_text()
    counts = set(re.findall(r"(\d+) of (\d+) passed", page))
    assert counts == {(str(len(_check.CASES)),) * 2}


if __name__ == "__main__":
    from pathlib import Path

    for name in sys.argv[1:]:
        run(Path(name))
