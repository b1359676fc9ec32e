"""Commands for an installation.

`python -m dice_op info` prints what a bug report needs to say about it, and `python -m dice_op
check` compares what it computes on this machine with double precision.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import platform
import sys
import typing
from collections.abc import Callable, Sequence

from dice_op import _check, _gpu, core


def info() -> dict[str, typing.Any]:
    """What this build is and what it runs on. No framework is needed for it."""
    report: dict[str, typing.Any] = {
        f"build_{k}" if k != "version" else k: v for k, v in core.build_info().items()
    }
    report["simd_level"] = report.pop("build_simd_level")
    report["python"] = platform.python_version()
    report["platform"] = platform.platform()
    report["processors"] = os.cpu_count()
    machine = _gpu.machine()
    newest = f" (CUDA {machine.cuda[0]}.{machine.cuda[1]})"
    report["driver"] = machine.driver and machine.driver + newest
    report["gpus"] = list(map(str, machine.gpus))
    problem = _gpu.problem(report["build_cuda"], report["build_cuda_archs"], machine)
    report["gpu_kernels"] = problem or ("fit" if machine.gpus and report["build_cuda"] else None)
    report["tensorflow"] = None
    report["op"] = report["xla"] = "not loaded: TensorFlow is not installed"
    if importlib.util.find_spec("tensorflow"):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        report["tensorflow"] = _or_why_not(
            lambda: importlib.import_module("tensorflow").__version__
        )
        report["op"] = _or_why_not(_op)
        report["xla"] = _or_why_not(_xla)
    keras = importlib.util.find_spec("keras")
    report["keras"] = _or_why_not(_keras) if keras else None
    report["losses"] = _or_why_not(_losses) if keras else None
    for name in ("torch", "jax"):
        report[name] = None
        if importlib.util.find_spec(name):
            report[name] = _or_why_not(functools.partial(_front_end, name))
    return report


def _or_why_not(find_out: Callable[[], str]) -> str:
    """What `find_out` returns, or its error in words.

    People ask for this report when something does not work, so that every error is caught.
    """
    try:
        return find_out()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"not loaded: {type(error).__name__}: {lines[0]}"


def _keras() -> str:
    import keras

    return f"{keras.__version__} on {keras.backend.backend()}"


def _op() -> str:
    from dice_op._loader import LIBRARY, library

    library()
    return f"loaded from {LIBRARY}"


def _xla() -> str:
    from dice_op._loader import XLA_LIBRARY, xla_problem

    problem = xla_problem()
    return f"not loaded: {problem}" if problem else f"loaded from {XLA_LIBRARY}"


def _front_end(name: str) -> str:
    """The framework's version, if dice_op works with it."""
    importlib.import_module(f"dice_op.{name}")
    return str(importlib.import_module(name).__version__)


def _losses() -> str:
    importlib.import_module("dice_op.losses")
    return "loaded"


def _run_check(front_end: str | None, as_json: bool) -> int:
    """Prints the table. Returns 1 if something failed, else 0."""
    if front_end and as_json:  # The other forms start this one in a process for each front end.
        print(json.dumps(_check.check_front_end(front_end)))
        return 0
    rows = []
    for row in _check.check([front_end] if front_end else list(_check.FRONT_ENDS)):
        rows.append(row)
        if not as_json:
            print(_check.line(row), flush=True)
    failed = any(row.get("failures") for row in rows)
    if as_json:
        print(json.dumps({"version": core.build_info()["version"], "rows": rows}, indent=2))
    elif failed:
        print("Something failed: please report it with the output of `python -m dice_op info`.")
    elif not front_end and sum("not_here" not in row for row in rows) < 2:
        print(
            "dice_op works on NumPy alone. To train, install PyTorch or JAX; or install "
            "TensorFlow, and then build dice_op again."
        )
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dice_op", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, build and processor features")
    command.add_argument("--json", action="store_true", help="as JSON")
    command = commands.add_parser("check", help="whether this machine computes what it should")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--front-end", choices=_check.FRONT_ENDS, help="only this one")
    options = parser.parse_args(arguments)
    if options.command == "check":
        return _run_check(options.front_end, options.json)
    report = info()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    width = max(map(len, report))
    for key, value in report.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<{width}}  {'none' if text in (None, '') else text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
