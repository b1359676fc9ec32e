"""The pages of the losses and metrics: each of these has one, and it says what is there.

A row of a page's table "In other libraries" is one of docs/migration.md, whose tests run it; or the
last test here runs both of its cells, as they are written, with the other library itself.
"""

import ast
import functools
import importlib
import inspect
import re

import keras
import numpy as np
import pytest

from dice_op import core, losses, metrics
from helpers.installed import needs
from helpers.paths import DOCS, PACKAGE
from helpers.peers import CLASSES, NEEDS_PEERS, volume

HEADINGS = [
    "Formula",
    "Use it",
    "Options that matter",
    "Figure",
    "In other libraries",
    "When not to use it",
    "Reference",
]
FOLDERS = (DOCS / "losses", DOCS / "metrics")
PAGES = [p for folder in FOLDERS for p in sorted(folder.glob("*.md")) if p.stem != "index"]
IDS = [f"{page.parent.name}/{page.stem}" for page in PAGES]
of_each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)
# Their texts are on docs/api.md, because losses and metrics of different pages share them.
BASES = {"SumsLoss", "OverlapLoss", "OverlapScore"}
DIRECTIVE = re.compile(r"^\.\. auto(?:class|function):: (\S+)", re.M)


def sections(page):
    """{heading: text} of a page, in its order. The text above the first heading has the key ""."""
    title, *others = re.split(r"^## ", page, flags=re.M)
    return {"": title} | dict(part.split("\n", 1) for part in others)


def rows(text):
    """The rows of a table, as lists of cells, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def section(page, heading):
    return sections(page.read_text())[heading]


# --- that the pages are there ---------------------------------------------------------------------


def documented():
    """{name: the pages whose directives document it}"""
    found = {}
    for page in DOCS.rglob("*.md"):
        for name in DIRECTIVE.findall(page.read_text()):
            found.setdefault(name, []).append(page)
    return found


def scores():
    """The names of the metrics. They are those that Keras can load."""
    classes = [m for m in vars(metrics).values() if inspect.isclass(m)]
    return [m.__name__ for m in classes if issubclass(m, metrics.OverlapScore)]


@pytest.mark.parametrize(
    ("module", "folder", "names"),
    [("losses", FOLDERS[0], losses.__all__), ("metrics", FOLDERS[1], scores())],
)
def test_each_loss_and_metric_is_documented_once_on_a_page_of_its_folder(module, folder, names):
    pages = documented()
    assert len(names) > 7
    for name in names:
        places = pages.get(f"dice_op.{module}.{name}")
        assert places and len(places) == 1, (name, places)
        assert (places[0] == DOCS / "api.md") if name in BASES else (places[0].parent == folder)


def test_each_page_documents_something_and_nothing_twice():
    pages = documented()
    assert {p for places in pages.values() for p in places} >= set(PAGES)
    assert [name for name, places in pages.items() if len(places) > 1] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_index_lists_every_page_of_its_folder(folder):
    text = (folder / "index.md").read_text()
    pages = {page.stem for page in folder.glob("*.md")} - {"index"}
    in_table = [re.findall(r"\]\((\w+)\.md\)", row[-1]) for row in rows(text)]
    assert sorted(sum(in_table, [])) == sorted(pages)
    tree = re.search(r"^:::\{toctree\}\n:hidden:\n\n(.*?)^:::", text, re.M | re.S)[1]
    assert sorted(tree.split()) == sorted(pages)


@of_each_page
def test_a_page_has_all_headings_in_order(page):
    found = sections(page.read_text())
    assert list(found)[1:] == HEADINGS
    assert all(text.strip() for text in found.values())
    assert re.match(r"# \S", page.read_text())


@of_each_page
def test_the_figure_of_a_page_is_there_and_says_what_draws_it(page):
    text = section(page, "Figure")
    [image] = re.findall(r"!\[[^\]]+\]\((\S+\.svg)\)", text)
    assert (page.parent / image).is_file()
    assert f"python docs/figures.py {(page.parent / image).stem}`" in text.replace("\n", " ")


# --- that the options are those of the code -------------------------------------------------------


def defaults_of(name):
    """{argument: its default} of a function or class. An argument without a default has `...`."""
    if name == "dice_op.core.scores":  # A compiled function has no signature, but a stub.
        tree = ast.parse((PACKAGE / "core.pyi").read_text())
        function = next(n for n in tree.body if getattr(n, "name", None) == "scores")
        of_keywords = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        return {a.arg: ast.literal_eval(value) for a, value in of_keywords}
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    makers = [documented]
    if inspect.isclass(documented):
        makers = [c.__init__ for c in documented.__mro__ if "__init__" in vars(c)]
    found = {}
    for maker in makers:  # A class comes before its bases, whose defaults it may replace.
        for argument in inspect.signature(maker).parameters.values():
            default = ... if argument.default is argument.empty else argument.default
            found.setdefault(argument.name, default)
    return found


@of_each_page
def test_the_options_of_a_page_are_arguments_with_these_defaults(page):
    table = rows(section(page, "Options that matter"))
    assert 3 <= len(table) <= 6
    arguments = defaults_of(DIRECTIVE.findall(page.read_text())[0])
    for names, default, _ in table:
        written = ... if default == "required" else ast.literal_eval(default.strip("`"))
        for name in re.findall(r"`(\w+)`", names):
            assert arguments[name] == written, name


# --- that the calls of other libraries are equal --------------------------------------------------


@functools.cache
def rows_of_migration():
    """{(heading, first cell): the other cells} of docs/migration.md."""
    text = (DOCS / "migration.md").read_text()
    return {
        (heading, first): others
        for heading, table in sections(text).items()
        for first, *others in rows(table.split("\n# ")[0])
    }


def rows_of_pages():
    for page, name in zip(PAGES, IDS, strict=True):
        for there, *cells in rows(section(page, "In other libraries")):
            library, _, theirs = there.partition(": ")
            yield pytest.param(library, theirs, *cells, id=f"{name}: {there}")


def quoted(row):
    library, theirs, *_ = row.values
    return (library, theirs) in rows_of_migration()


QUOTED = [row for row in rows_of_pages() if quoted(row)]
OWN = [row for row in rows_of_pages() if not quoted(row)]


@pytest.mark.parametrize(("library", "theirs", "ours", "mark"), QUOTED)
def test_a_row_that_is_quoted_is_as_in_migration(library, theirs, ours, mark):
    assert rows_of_migration()[library, theirs] == [ours, mark]


def code_of(cell):
    return re.search("`([^`]+)`", cell)[1]


def of_metric(metric, x, y):
    metric.update_state(y, x)
    return np.asarray(metric.result())


def of_monai(metric, p, y, classes):
    """A metric of MONAI, of label maps."""
    import torch

    p, y = (torch.tensor(np.moveaxis(np.eye(classes)[v], -1, 1)) for v in (p, y))
    metric(p, y)
    found = metric.aggregate()
    return np.asarray(found[0] if isinstance(found, list) else found)


def by_deep_supervision(theirs, ours):
    """Both losses of three outputs, of which the last has another ratio on each axis."""
    import torch
    from monai import losses as monai

    x, y = volume("random")
    outputs = [x, x[:, :3, :3, :2], x[:, :2, :1, :1]]
    made = eval(ours, vars(losses))
    each = zip(made["loss_weights"], made["loss"], outputs, strict=True)
    found = sum(weight * float(loss(np.uint8(y), x)) for weight, loss, x in each)
    outputs = [torch.tensor(np.moveaxis(x, -1, 1)) for x in outputs]
    return float(eval(theirs, vars(monai))(outputs, torch.tensor(y[:, None]).float())), found


def evaluated(library, theirs, ours, name):
    """What their code and ours give for the volume of this name."""
    if "DeepSupervisionLoss" in theirs:
        return by_deep_supervision(code_of(theirs), code_of(ours))
    of_masks = "masks" in theirs
    x, y = volume(name, 1 if of_masks else CLASSES)
    p = (x[..., 0] > 0).astype(int) if of_masks else x.argmax(-1)
    classes = CLASSES
    if "core.scores" in ours:
        x, y, p, classes = x[1:2], y[1:2], p[1:2], CLASSES + 1  # The last class is in neither map.
    names = {"b": 2.0, "C": classes, "np": np, "nan": np.nan, "core": core, "metrics": metrics}
    made = eval(code_of(ours), names | {"prediction": p, "labels": y})
    found = made if isinstance(made, np.ndarray) else of_metric(made, x, np.uint8(y))
    if library.startswith("scikit-learn"):
        import sklearn.metrics

        flat = {"y": y.ravel(), "p": p.ravel()}
        return eval(code_of(theirs), vars(sklearn.metrics) | names | flat), found
    if library.startswith("Keras"):
        given = 1 / (1 + np.exp(-x[..., 0])) if of_masks else x
        return of_metric(eval(code_of(theirs), vars(keras.metrics) | names), given, y), found
    from monai import metrics as monai

    return of_monai(eval(code_of(theirs), vars(monai) | names), p, y, classes), found


NEEDS = [*NEEDS_PEERS, needs("sklearn")]


def needs_peers(test):
    """Says that a test needs the other libraries, and is one of `make test-full`."""
    return functools.reduce(lambda test, mark: mark(test), NEEDS, test)


@needs_peers
@pytest.mark.filterwarnings("ignore")  # scikit-learn warns where it divides by 0.
@pytest.mark.parametrize("name", ["random", "absent class"])
@pytest.mark.parametrize(("library", "theirs", "ours", "mark"), OWN)
def test_a_row_of_these_pages_alone_is_equal(library, theirs, ours, mark, name):
    assert mark == "✓"
    expected, found = evaluated(library, theirs, ours, name)
    assert np.isfinite(expected).any()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@needs_peers
@pytest.mark.filterwarnings("ignore:A single label")  # scikit-learn's
def test_what_others_have_where_a_class_is_nowhere():
    """The pages of three metrics say it below their tables."""
    import sklearn.metrics
    from monai import metrics as monai

    nothing, some = np.zeros((1, 8), int), np.array([[0, 0, 0, 0, 0, 0, 1, 1]])
    for theirs, ours in (
        (keras.metrics.Precision(), metrics.Precision),
        (keras.metrics.Recall(), metrics.Sensitivity),
    ):
        assert of_metric(theirs, 0.0 * nothing, nothing) == 0
        options = {"prediction": "threshold", "over": "dataset", "absent": "predicted"}
        assert np.isnan(of_metric(ours(**options), nothing[..., None] - 1.0, nothing))
    assert sklearn.metrics.matthews_corrcoef(nothing[0], nothing[0]) == 0
    assert np.isnan(of_metric(metrics.Matthews(**options), nothing[..., None] - 1.0, nothing))

    theirs = monai.ConfusionMatrixMetric(metric_name="precision", reduction="mean_batch")
    ours = metrics.Precision(over="dataset", average="none", absent="predicted")
    assert np.isnan(of_monai(theirs, nothing, some, 2)[1])
    assert of_metric(ours, np.eye(2)[nothing], some)[1] == 0


@needs_peers
def test_the_versions_are_those_that_the_pages_name():
    installed = {
        "scikit-learn": importlib.import_module("sklearn").__version__,
        "MONAI": importlib.import_module("monai").__version__,
        "Keras": keras.__version__,
    }
    for row in OWN:
        library, version = row.values[0].rsplit(" ", 1)
        assert installed[library].startswith(version + ".")
