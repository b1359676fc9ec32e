"""Makes executed notebooks of the examples, for the documentation.

    make notebooks
    python build_tools/notebooks.py nifti_pipeline    # only this one
    python build_tools/notebooks.py --text    # executes nothing, if no code has changed

`docs/examples/NAME.ipynb` has the code of `examples/NAME.py` and what it printed and drew. Run this
again when an example has changed: a test compares the two.
"""

import argparse
import base64
import json
import os
import pathlib
import tempfile
import time

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs" / "examples"
NAMES = ("nifti_pipeline", "small_structures")
LARGEST_PICTURE = 150_000  # bytes
LARGEST = 700_000


def read(name):
    """Returns the notebook of an example, without the empty lines that Python's style asks for."""
    notebook = jupytext.read(EXAMPLES / f"{name}.py")
    for cell in notebook.cells:
        cell.source = cell.source.strip("\n")
    return notebook


def execute(name):
    """Returns the notebook of an example, as it ran in an empty folder."""
    notebook = read(name)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        nbclient.NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources=where, record_timing=False,
            coalesce_streams=True,
        ).execute()  # fmt: skip
    return notebook


def with_new_text(name):
    """Returns the notebook as it was executed, with the Markdown of the example."""
    notebook = nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
    example = read(name)
    codes = [[c.source for c in n.cells if c.cell_type == "code"] for n in (notebook, example)]
    if codes[0] != codes[1]:
        raise SystemExit(f"The code of {name} has changed: execute it.")
    executed = (cell for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells = [next(executed) if c.cell_type == "code" else c for c in example.cells]
    return notebook


def tidy(notebook):
    """Leaves out what differs from machine to machine: times, names of cells, words on stderr."""
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            # An error has stopped the execution. The rest of stderr is about the processor.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def check(notebook):
    """Stops if a path of this machine or a large picture has got in."""
    text = json.dumps(notebook)
    for path in (str(ROOT), os.path.expanduser("~"), tempfile.gettempdir()):
        if path + "/" in text:
            raise SystemExit(f"{path} is in the output")
    pictures = [
        len(base64.b64decode(output.data["image/png"]))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    print(f"pictures of {pictures} bytes, {len(text)} bytes in all", flush=True)
    if max(pictures) > LARGEST_PICTURE or len(text) > LARGEST:
        raise SystemExit("That is too much: draw it smaller.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--text", action="store_true", help="only renew the Markdown")
    arguments = parser.parse_args()
    os.environ.update(PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3")
    for name in arguments.names or NAMES:
        began = time.perf_counter()
        notebook = with_new_text(name) if arguments.text else execute(name)
        tidy(notebook)
        check(notebook)
        nbformat.write(notebook, DOCS / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
