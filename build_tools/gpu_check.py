"""Builds dice_op for this machine's GPU, checks it, measures it, and writes a record.

    python build_tools/gpu_check.py [--quick]

It needs Linux, a GPU with its driver, nvcc of CUDA 12 or later, and Python >= 3.10 with numpy,
pybind11 and cmake. What it checks and measures in PyTorch, JAX, TensorFlow and Keras, and beside
Triton, it skips if they cannot be imported, and the record says so. The exit status is 0 if all
checks that ran passed, 1 if one failed, and 2 if there is no GPU or no nvcc.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
INSTALL = BUILD / "install"
# How lines begin that workers print for this program (benchmarks/measuring.py).
RESULT, WORDS = "RECORD ", "SAY "

# The steps and their weights. A step may use its share, by weight, of the time that is left for it
# and for the steps after it.
STEPS = {
    "build": 3, "check": 2, "front_ends": 2, "keras": 4, "sanitizer": 1.5, "measure": 3,
    "contenders": 3.5, "tensorflow": 1,
}  # fmt: skip
# The workers of the steps that consist of nothing else, and in the same way their weights.
WORKERS = {
    "check": [(1, "gpu.kernels", "all")],
    "front_ends": [(1, "gpu.front_ends", name) for name in ("torch", "jax")],
    "keras": [(1, "gpu.keras_training", name) for name in ("tensorflow", "jax", "torch")],
    "measure": [(1, "benchmarks.gpu.kernels")],
    "contenders": [
        (3, "benchmarks.gpu.contenders", "torch"),
        (1, "benchmarks.gpu.contenders", "jax"),
    ],
    "tensorflow": [(1, "gpu.tensorflow_ops", "tensorflow")],
}
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


# --- the record -----------------------------------------------------------------------------------


def output_of(*command):
    """Returns what a command prints, or an empty string if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def without_paths(value):
    """Returns a value for the record: without paths of this machine, and with NaN as a string.

    Strict JSON has no NaN.
    """
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        value = value.replace(str(ROOT), ".")
        return re.sub(r"(?<![\w.:])/(?:[\w.+@-]+/)+", "", value)
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


class Record:
    """The record as a JSON file, which is written again whenever something is added."""

    def __init__(self, folder, gpu, commit):
        modules = (
            "numpy", "torch", "triton", "jax", "cupy-cuda13x", "tensorflow", "keras", "ml_dtypes",
        )  # fmt: skip
        versions = {}
        for name in modules:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        head = output_of("git", "rev-parse", "--short=10", "HEAD")
        nvcc = re.search(r"release ([\d.]+)", output_of(nvcc_path(), "--version"))
        self.data = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": gpu, "nvcc": nvcc[1] if nvcc else None, "commit": commit or head or "unknown",
            "dirty": bool(output_of("git", "status", "--porcelain")) if head else None,
            "python": sys.version.split()[0], "packages": versions, "arguments": sys.argv[1:],
            "steps": {}, "results": [],
        }  # fmt: skip
        name = re.sub(r"[^A-Za-z0-9]+", "-", gpu["name"]).strip("-").lower()
        self.path = folder / f"{self.data['date'][:10]}-{name}-{self.data['commit']}.json"
        folder.mkdir(parents=True, exist_ok=True)

    def write(self):
        """Writes the file under another name first, so that an interruption leaves no half file."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(without_paths(self.data), indent=1) + "\n")
        beside.replace(self.path)

    def add(self, result):
        """Adds a result of a worker."""
        self.data["results"].append(result)
        self.write()

    def step(self, name, status, start, **details):
        """Adds how a step ended; `status` is "passed", "failed" or "skipped"."""
        seconds = round(time.monotonic() - start, 1)
        self.data["steps"][name] = {"status": status, "seconds": seconds, **details}
        self.write()
        reason = details.get("reason", "")
        print(f"{name}: {status} after {seconds} s{': ' if reason else ''}{reason}", flush=True)


def worker(module, *arguments, installed=True):
    """Returns how a worker starts: its command, its folder, and its environment.

    With `python -m`, the folder in which it starts comes first on the path. So a worker imports the
    dice_op that is built for this GPU, and not the one of the source folder; or, if `installed` is
    False, the other way round. The rest comes from the repository: benchmarks, and the modules of
    tests/.
    """
    folder = INSTALL if installed else ROOT
    path = [folder, ROOT, ROOT / "tests"]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    environment["PYTHONIOENCODING"] = "utf-8"
    return [sys.executable, "-m", module, *arguments], folder, environment


def run_worker(command, seconds, record, folder=ROOT, environment=None):
    """Runs a worker and adds its results as they come.

    Returns its exit status, or a text that says why it has none, and the end of its log.
    """
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            errors="replace", cwd=folder, env=environment,
        )  # fmt: skip
    except OSError as error:
        return f"{error.strerror}: {error.filename}", ""
    stopped = threading.Event()

    def stop():
        stopped.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    log = []
    try:
        for text in process.stdout:
            if text.startswith(RESULT):
                record.add(json.loads(text.removeprefix(RESULT)))
                continue
            if text.startswith(WORDS):
                text = "  " + text.removeprefix(WORDS)
                print(text, end="", flush=True)
            log = [*log[-40:], text.rstrip()]
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
    return ("stopped: no time left" if stopped.is_set() else status), "\n".join(log)[-3000:]


# --- the steps ------------------------------------------------------------------------------------


def nvcc_path():
    """The compiler for the build, or an empty string if there is none.

    Where no variable names a compiler and pip has installed none, the usual folder may have one.
    """
    found = find_nvcc.of_machine() + find_nvcc.of_pip()
    return found[0] if found else shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def gpu_facts():
    """What nvidia-smi says about the first GPU, or None if there is no GPU."""
    fields = (
        "name,driver_version,compute_cap,memory.total,clocks.sm,clocks.mem,clocks.max.sm,"
        "clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current,utilization.gpu"
    )
    text = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in text.split(",")]
    if len(values) != len(fields.split(",")) or not re.match(r"\d+\.\d+$", values[2]):
        return None
    return dict(zip(fields.split(","), values, strict=True))


def build(arch, seconds, record, start):
    """Builds the module, and the library that benchmarks/gpu/device.py loads, for this GPU only."""
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    nvcc = nvcc_path()
    configure = [
        cmake,
        "-S",
        ".",
        "-B",
        str(BUILD),
        "-DDICE_OP_WITH_TENSORFLOW=OFF",
        "-DDICE_OP_CUDA=on",
    ]
    configure += [f"-DDICE_OP_CUDA_ARCHS={arch}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_BUILD_TYPE=Release"]
    if not (BUILD / "CMakeCache.txt").exists() and shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    library = [
        "-shared",
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        f"-arch=sm_{arch}",
    ]
    # The nvcc that pip installs does not look in the folder where pip puts CUDA's runtime.
    library += [f"-L{Path(nvcc).resolve().parent.parent / 'lib'}"]
    library += ["benchmarks/gpu/device.cu", "-o", str(BUILD / "libgpu_device.so")]
    jobs = str(os.cpu_count() or 1)
    took = {}
    for what, command in (
        ("configure", configure),
        ("compile", [cmake, "--build", str(BUILD), "--parallel", jobs]),
        ("install", [cmake, "--install", str(BUILD), "--prefix", str(INSTALL)]),
        ("measuring library", [nvcc, *library]),
    ):
        print(f"  {what}", flush=True)
        begun = time.monotonic()
        status, log = run_worker(command, max(1, seconds - (begun - start)), record)
        took[what] = round(time.monotonic() - begun, 1)
        if status != 0:
            print(log)
            record.step("build", "failed", start, reason=f"{what}: {status}", log=log, took=took)
            return False
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "dice_op", INSTALL / "dice_op", ignore=no_binaries, dirs_exist_ok=True)
    record.step("build", "passed", start, took=took)
    return True


def run_sanitizer(seconds, record, start):
    """Runs a few cases under each tool of compute-sanitizer; an error fails the step."""
    tool = shutil.which("compute-sanitizer") or str(
        Path(nvcc_path()).with_name("compute-sanitizer")
    )
    if not Path(tool).exists():
        record.step("sanitizer", "skipped", start, reason="there is no compute-sanitizer")
        return
    results, end = {}, start + seconds
    for i, kind in enumerate(SANITIZERS):
        share = (end - time.monotonic()) / (len(SANITIZERS) - i)
        command, *where = worker("gpu.kernels", "few", "--seconds", str(share * 0.8))
        command = [tool, "--tool", kind, "--error-exitcode", "99", *command]
        status, log = run_worker(command, max(1, share), record, *where)
        errors = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", log)
        found = [int(a or b) for a, b in errors]
        if status == 0:
            results[kind] = "no errors"
        elif any(found) or status == 99 or "  FAILED" in log:
            results[kind] = f"failed: exit {status}, {sum(found)} errors\n{log}"
        else:  # The tool does not work on every machine, so this is no failure of dice_op.
            results[kind] = f"did not run to its end: {status}\n{log[-600:]}"
        print(f"  {kind}: {results[kind]}", flush=True)
    first_words = {result.split()[0] for result in results.values()}
    status = (
        "failed" if "failed:" in first_words else "passed" if "no" in first_words else "skipped"
    )
    record.step("sanitizer", status, start, tools=results)


def run_step(name, arguments, seconds, record, start):
    """Runs a step that consists of workers. If they skip all that they do, so is the step."""
    workers, first, ends = WORKERS[name], len(record.data["results"]), []
    for i, (weight, *program) in enumerate(workers):
        left = start + seconds - time.monotonic()
        share = left * weight / sum(worker[0] for worker in workers[i:])
        options = ["--seconds", str(share * 0.85)]
        options += ["--quick"] * (arguments.quick and name in ("measure", "contenders"))
        # What is built for this GPU has no op for TensorFlow.
        how = worker(*program, *options, installed="tensorflow" not in program)
        before = len(record.data["results"])
        status, log = run_worker(how[0], max(1, share), record, *how[1:])
        wrong = [r for r in record.data["results"][before:] if r.get("wrong")]
        wrong += [f for r in record.data["results"][before:] for f in r.get("failures", ())]
        if name == "contenders":  # The step records what others compute, and judges only dice_op.
            wrong = [r for r in wrong if isinstance(r, dict) and r["ours"]]
        ends.append({"status": status, "wrong": len(wrong)} | ({"log": log} if status else {}))
    crashed = any(end["status"] != 0 for end in ends)
    failed = any(end["wrong"] for end in ends) or (crashed and name not in ("contenders",))
    reasons = [
        f"exit {end['status']}: {end['log'].splitlines()[-1] if end['log'] else ''}"
        for end in ends
        if end["status"] != 0
    ]
    results = record.data["results"][first:]
    skipped = [result["skipped"] for result in results if "skipped" in result]
    nothing = results and len(skipped) == len(results) and not crashed
    status = "failed" if failed else "skipped" if nothing else "passed"
    reason = "; ".join(dict.fromkeys([*reasons, *skipped]))
    record.step(name, status, start, workers=ends, reason=reason)


def render(path):
    """Writes the table and plot of a record, and prints them. Returns the exit status."""
    command = [sys.executable, "-m", "benchmarks.gpu.report", str(path.resolve())]
    return subprocess.run(command, cwd=ROOT).returncode


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="measure only a few volumes")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="the folder for the record",
    )
    parser.add_argument(
        "--steps",
        default=",".join(STEPS),
        help="the steps to run, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--skip", default="", help="the steps to leave out, separated by commas")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=540,
        metavar="SECONDS",
        help="the time that all steps may take together (default: %(default)s)",
    )
    parser.add_argument(
        "--commit", help="the name of the commit, if the sources are no git repository"
    )
    parser.add_argument(
        "--render",
        type=Path,
        metavar="FILE.json",
        help="only write the table and plot of this record again",
    )
    arguments = parser.parse_args()
    arguments.steps = [s for s in arguments.steps.split(",") if s not in arguments.skip.split(",")]
    if unknown := {*arguments.steps, *filter(None, arguments.skip.split(","))} - {*STEPS}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    return arguments


def main():
    """Runs the steps in order, each with its share of the time, and returns the exit status."""
    arguments = parse_arguments()
    if arguments.render:
        return render(arguments.render)
    gpu = gpu_facts()
    if gpu is None:
        print("gpu_check: there is no GPU here (nvidia-smi names none)", file=sys.stderr)
        return 2
    if not nvcc_path():
        print("gpu_check: there is no nvcc on PATH, under CUDA_HOME, or from pip", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.time_limit
    record = Record(arguments.out, gpu, arguments.commit)
    print(f"{gpu['name']}, driver {gpu['driver_version']}, nvcc {record.data['nvcc']}", flush=True)
    steps = [step for step in STEPS if step in arguments.steps]
    for i, name in enumerate(steps):
        start = time.monotonic()
        left = deadline - start
        seconds = left * STEPS[name] / sum(STEPS[step] for step in steps[i:])
        if left < 5:
            record.step(name, "skipped", start, reason="no time left")
        elif name == "build":
            if not build(gpu["compute_cap"].replace(".", ""), left, record, start):
                break  # Without the module there is nothing to check.
        elif name == "sanitizer":
            run_sanitizer(seconds, record, start)
        else:
            run_step(name, arguments, seconds, record, start)
    record.data["gpu_afterwards"] = gpu_facts()
    record.write()
    print(record.path, flush=True)
    render(record.path)
    return 1 if any(s["status"] == "failed" for s in record.data["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
