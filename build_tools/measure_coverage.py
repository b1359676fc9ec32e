"""Measures which lines and branches the tests reach, and fails where they are too few.

    make coverage
    make coverage RECORD=docs/reliability.json    also writes the numbers into the record

It compiles a second copy of the package, in which GCC counts how often each line runs, and runs the
tests on it that reach the most. coverage.py watches the Python of the tests' processes and of those
that they start, but not the threads that XLA starts. The tables end on the screen, and each file,
line by line, in build/coverage.

A line that no test can reach says why: `# pragma: no cover - WHY` in Python, and in C++ a comment
with GCOVR_EXCL_LINE, or with GCOVR_EXCL_START and GCOVR_EXCL_STOP around several.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

from helpers import record
from helpers.paths import BUILD, ROOT

WORK = BUILD / "coverage"
PACKAGE = WORK / "package"
SOURCE = ROOT / "dice_op"
LEAST = {"Python": 95, "C++": 90}  # percent
FOLDERS = ("core", "cpu", "xla", "tf", "pybind")  # of csrc/; csrc/cuda runs on the emulator alone
FLAGS = "-O1 --coverage -fprofile-update=atomic"  # as several threads count
ON_EVERY_CHANGE = (
    "tests/kernels/test_core.py",
    "tests/kernels/test_scores.py",
    "tests/kernels/test_simd.py",
    "tests/front_ends",
    "tests/losses",
    "tests/packaging/test_check.py",
    "tests/packaging/test_gpus.py",
    "tests/packaging/test_import.py",
    "tests/packaging/test_info.py",
)
IN_FULL = (  # other frameworks, which `make test` has not
    "tests/front_ends",
    "tests/losses/test_backends.py",
    "tests/packaging/test_check.py",
    "tests/packaging/test_import.py",
)
CONFIGURATION = f"""
[run]
branch = true
parallel = true
patch = subprocess
source_dirs = {SOURCE}
data_file = {WORK / "data" / "python"}

[report]
exclude_also =
    if typing.TYPE_CHECKING:
    @overload
    raise NotImplementedError
partial_also =
    if not typing.TYPE_CHECKING:
"""


def run(*command, check=True, cwd=ROOT, **variables):
    command = [str(word) for word in command]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=cwd)
    if check and done.returncode:
        sys.exit(f"{' '.join(command[:4])} ... failed with status {done.returncode}")
    return done.returncode


def build():
    """Compiles the package that counts, into a folder of its own; its Python files are links."""
    import ninja

    cmake = (sys.executable, "-m", "cmake")
    options = (
        "-DDICE_OP_CUDA=off",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={FLAGS}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={pathlib.Path(ninja.BIN_DIR, 'ninja')}",
        "--log-level=WARNING",
    )
    run(*cmake, "-S", ROOT, "-B", WORK / "build", "-G", "Ninja", *options)
    run(*cmake, "--build", WORK / "build")
    shutil.rmtree(PACKAGE, ignore_errors=True)
    install = (*cmake, "--install", WORK / "build", "--prefix", PACKAGE)
    subprocess.run([str(word) for word in install], check=True, stdout=subprocess.DEVNULL)
    for file in SOURCE.rglob("*.py*"):
        if file.suffix in (".py", ".pyi"):
            link = PACKAGE / "dice_op" / file.relative_to(SOURCE)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file)


def run_tests(chosen):
    """Runs them on that package. Returns whether all passed."""
    for leftover in (*(WORK / "build").rglob("*.gcda"), *(WORK / "data").glob("*")):
        leftover.unlink()
    (WORK / "data").mkdir(exist_ok=True)
    configuration = WORK / "coverage.ini"
    configuration.write_text(CONFIGURATION)
    # A process that is started in ROOT would find the dice_op there, and not that on PYTHONPATH.
    where = {"cwd": WORK, "PYTHONPATH": str(PACKAGE)}
    pytest = (sys.executable, "-m", "coverage", "run", f"--rcfile={configuration}", "-m", "pytest")
    options = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}")
    options += ("--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal")
    statuses = [
        run(*pytest, *options, "-m", marked, *(ROOT / t for t in tests), check=False, **where)
        for marked, tests in chosen
    ]
    return not any(statuses)


def of_python():
    """The numbers of each file, as (name, lines, covered lines, branches, covered branches)."""
    configuration = f"--rcfile={WORK / 'coverage.ini'}"
    coverage = (sys.executable, "-m", "coverage")
    report = WORK / "python.json"
    run(*coverage, "combine", "--quiet", configuration)
    run(*coverage, "json", "--quiet", "-o", report, configuration)
    run(*coverage, "html", "--quiet", "-d", WORK / "python", configuration)
    for name, file in json.loads(report.read_text())["files"].items():
        s = file["summary"]
        lines = s["num_statements"], s["covered_lines"]
        yield os.path.relpath(name, ROOT), *lines, s["num_branches"], s["covered_branches"]


def of_cpp():
    """The same, without branches: GCC counts those that exceptions would take as well.

    A line of a template is reached if it is in one of the functions that are made from it, at one
    of the SIMD levels.
    """
    report = WORK / "c++.json"
    (WORK / "c++").mkdir(exist_ok=True)
    gcovr = (sys.executable, "-m", "gcovr", "--merge-lines", "--root", ROOT, WORK / "build")
    filters = [f"--filter={ROOT}/csrc/{folder}/" for folder in FOLDERS]
    run(*gcovr, *filters, "--json", report, "--html-nested", WORK / "c++" / "index.html")
    for file in json.loads(report.read_text())["files"]:
        reached = {}
        for line in file["lines"]:
            if not line.get("gcovr/excluded"):
                number = line["line_number"]
                reached[number] = reached.get(number, False) or line["count"] > 0
        yield file["file"], len(reached), sum(reached.values()), 0, 0


def percent(total, covered):
    return round(100 * covered / total, 1) if total else 100.0


def summary(files):
    """The parts that must reach a threshold, as {name: (percent, the least that it must be)}."""
    found = {}

    def add(name, least, of, column):
        total = sum(f[column] for f in of)
        found[name] = percent(total, sum(f[column + 1] for f in of)), least

    python = [f for f in files if f[0].startswith("dice_op/")]
    add("Python, lines", LEAST["Python"], python, 1)
    add("Python, branches", LEAST["Python"], python, 3)
    for folder in FOLDERS:
        of = [f for f in files if f[0].startswith(f"csrc/{folder}/")]
        add(f"C++, csrc/{folder}, lines", LEAST["C++"], of, 1)
    return found


def table(files):
    yield f"{'':32} {'lines':>6} {'reached':>8} {'branches':>9} {'reached':>8}"
    for name, lines, reached, branches, taken in files:
        row = f"{name:32} {lines:6} {percent(lines, reached):6} %"
        yield row + (f" {branches:9} {percent(branches, taken):6} %" if branches else "")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", type=pathlib.Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    build()
    passed = run_tests([("not full and not long", ON_EVERY_CHANGE), ("full", IN_FULL)])
    files = [*of_python(), *of_cpp()]
    lines = [*table(files), ""]
    found = summary(files)
    for name, (value, least) in found.items():
        lines.append(f"{name}: {value} %{f', less than {least} %' if value < least else ''}")
        if options.record and passed:
            record.write(options.record, "coverage", name, value, "make coverage")
    links = "".join(f'<p><a href="{p}/index.html">{p}</a></p>' for p in ("python", "c++"))
    (WORK / "index.html").write_text(f"<pre>{chr(10).join(lines)}</pre>{links}\n")
    print(*lines, f"Line by line: {WORK / 'index.html'}", sep="\n")
    if not passed:
        print("A test failed, so that this may not be all.")
    sys.exit(not passed or any(value < least for value, least in found.values()))


if __name__ == "__main__":
    main()
