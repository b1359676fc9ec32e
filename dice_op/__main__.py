"""`python -m dice_op info`: what a bug report needs to say about this installation."""

import argparse
import importlib.util
import json
import os
import platform
import sys

from dice_op import _gpu, core


def info():
    """What this build is and what it runs on, as a dict. Works without TensorFlow."""
    report = {f"build_{k}" if k != "version" else k: v for k, v in core.build_info().items()}
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
    report["tensorflow"] = report["keras"] = None
    report["op"] = report["xla"] = "not loaded: TensorFlow is not installed"
    if importlib.util.find_spec("tensorflow"):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import keras
        import tensorflow as tf

        report["tensorflow"] = tf.__version__
        report["keras"] = f"{keras.__version__} on {keras.backend.backend()}"
        try:
            from dice_op import _loader

            _loader.library()
            report["op"] = f"loaded from {_loader.LIBRARY}"
            problem = _loader.xla_problem()
            report["xla"] = (
                f"not loaded: {problem}" if problem else f"loaded from {_loader.XLA_LIBRARY}"
            )
        except ImportError as error:
            report["op"] = report["xla"] = f"not loaded: {error}"
    return report


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m dice_op", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, build and processor features")
    command.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
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
