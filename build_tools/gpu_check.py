"""Builds dice_op for this machine's GPU, checks it, measures it, and writes a record.

    python build_tools/gpu_check.py [--quick]
    python build_tools/gpu_check.py --rehearse    where there is no GPU

It needs Linux, a GPU with its driver, nvcc of CUDA 12 or later, and Python >= 3.10 with numpy,
pybind11 and cmake. What it checks and measures in PyTorch, JAX, TensorFlow and Keras, and beside
Triton, it skips if they cannot be imported, and the record says so. The exit status is 0 if all
checks that ran passed, 1 if one failed, and 2 if there is no GPU or no nvcc.

A second start on the same day, with the same commit and the same GPU, continues the record. It
runs the steps that have not passed yet.

A rehearsal goes through every step on a stand-in for a GPU, the emulator of the tests, with small
volumes. Its record goes to build/, says that it is a rehearsal, and its times mean nothing.
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
RESULTS = ROOT / "benchmarks" / "results"
EMULATOR = ROOT / "tests" / "kernels" / "cuda_emulator" / "emulator.cmake"
# How lines begin that workers print for this program (benchmarks/measuring.py).
RESULT, WORDS = "RECORD ", "SAY "

# The steps and their weights. The most valuable come first, because time may run out. A step may
# use its share, by weight, of the time that is left for it and for the steps after it. The build,
# which all of them need, may take all of it.
STEPS = {
    "build": 3, "check": 2, "measure": 3, "contenders": 3.5, "front_ends": 2, "keras": 4,
    "sanitizer": 1.5, "tensorflow": 1,
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
    """The record as a JSON file, which is written again whenever something is added.

    target: the GPU, or the rehearsal.
    """

    def __init__(self, target, arguments, facts):
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
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.data = {
            "date": date, "rehearsal": target.rehearsal, "gpu": facts,
            "compiler": target.compiler(), "commit": arguments.commit or head or "unknown",
            "dirty": bool(output_of("git", "status", "--porcelain")) if head else None,
            "python": sys.version.split()[0], "packages": versions, "quick": arguments.quick,
            "starts": [
                {"date": date, "arguments": sys.argv[1:], "time_limit": arguments.time_limit},
            ],
            "steps": {}, "results": [],
        }  # fmt: skip
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["name"]).strip("-").lower()
        self.path = arguments.out / f"{date[:10]}-{name}-{self.data['commit']}.json"
        self.step_in_progress = None
        arguments.out.mkdir(parents=True, exist_ok=True)

    def other_than(self, found):
        """Names what an earlier record was made for, and this one is not."""
        names = ("commit", "rehearsal", "quick", "compiler")
        pairs = [(name, found.get(name), self.data[name]) for name in names]
        pairs += [("GPU", found["gpu"]["name"], self.data["gpu"]["name"])]
        return [f"{name} {before}, and not {now}" for name, before, now in pairs if before != now]

    def go_on_with(self, path):
        """Takes over the results of an earlier record. Returns why it cannot, or None."""
        found = json.loads(path.read_text())
        if other := self.other_than(found):
            return f"{path.name} is a record with {'; '.join(other)}"
        for name in ("date", "steps", "results"):
            self.data[name] = found[name]
        self.data["starts"] = found["starts"] + self.data["starts"]
        self.data["dirty"] = found["dirty"] or self.data["dirty"]
        self.path = self.path.with_name(path.name)
        return None

    def can_go_on(self):
        """Whether the file of this name is an earlier record of the same sources.

        The commit does not say what the sources are where some have changed since.
        """
        if not self.path.exists() or self.data["dirty"] or self.data["commit"] == "unknown":
            return False
        found = json.loads(self.path.read_text())
        return not found["dirty"] and not self.other_than(found)

    def passed(self, name):
        """Whether a step has passed, now or in an earlier start."""
        return self.data["steps"].get(name, {}).get("status") == "passed"

    def write(self):
        """Writes the file under another name first, so that an interruption leaves no half file."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(without_paths(self.data), indent=1) + "\n")
        beside.replace(self.path)

    def begin(self, name, planned):
        """Begins a step. What an earlier start found there is dropped.

        Until the step ends, the record says that it did not: the program may be killed.
        """
        self.step_in_progress = name
        self.data["results"] = [r for r in self.data["results"] if r["step"] != name]
        self.data["steps"][name] = {"status": "unfinished", "planned": round(planned, 1)}
        self.data["steps"] = {n: self.data["steps"][n] for n in STEPS if n in self.data["steps"]}
        self.write()

    def add(self, result):
        """Adds a result of a worker."""
        self.data["results"].append({"step": self.step_in_progress, **result})
        self.write()

    def step(self, name, status, start, **details):
        """Adds how a step ended; `status` is "passed", "failed" or "skipped"."""
        seconds = round(time.monotonic() - start, 1)
        planned = self.data["steps"][name]["planned"]
        self.data["steps"][name] = {
            "status": status, "planned": planned, "seconds": seconds, **details,
        }  # fmt: skip
        self.write()
        reason = details.get("reason", "")
        print(f"{name}: {status} after {seconds} s{': ' if reason else ''}{reason}", flush=True)


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


# --- what is checked ------------------------------------------------------------------------------


def nvcc_path():
    """The compiler for the build, or an empty string if there is none.

    Where no variable names a compiler and pip has installed none, the usual folder may have one.
    """
    found = find_nvcc.of_machine() + find_nvcc.of_pip()
    return found[0] if found else shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def cmake_path():
    """CMake, on PATH or beside this Python."""
    return shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))


class Gpu:
    """This machine's first GPU: what it is, how to build for it, and how workers use it."""

    rehearsal = False
    build = ROOT / "build" / "gpu"
    records = RESULTS  # the folder
    sanitizers = ("memcheck", "racecheck", "synccheck", "initcheck")

    @property
    def install(self):
        """Where the package is installed that is built for it."""
        return self.build / "install"

    def facts(self):
        """What nvidia-smi says about the GPU, or None if there is none."""
        fields = (
            "name,driver_version,compute_cap,memory.total,clocks.sm,clocks.mem,clocks.max.sm,"
            "clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current,utilization.gpu"
        )
        text = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
        values = [value.strip() for value in text.split(",")]
        if len(values) != len(fields.split(",")) or not re.match(r"\d+\.\d+$", values[2]):
            return None
        return dict(zip(fields.split(","), values, strict=True))

    def why_not(self):
        """Why nothing can be checked here, or None."""
        if self.facts() is None:
            return "there is no GPU here (nvidia-smi names none)"
        if not nvcc_path():
            return "there is no nvcc on PATH, under CUDA_HOME, or from pip"
        return None

    def compiler(self):
        """The compiler of the kernels, for the record."""
        release = re.search(r"release ([\d.]+)", output_of(nvcc_path(), "--version"))
        return f"nvcc {release[1]}" if release else None

    def builders(self):
        """The commands that build the module, and the library of benchmarks/gpu/device.py."""
        arch = self.facts()["compute_cap"].replace(".", "")
        nvcc = nvcc_path()
        options = ["-DDICE_OP_CUDA=on", f"-DDICE_OP_CUDA_ARCHS={arch}"]
        library = [
            "-shared",
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            f"-arch=sm_{arch}",
        ]
        # The nvcc that pip installs does not look in the folder where pip puts CUDA's runtime.
        library += [f"-L{Path(nvcc).resolve().parent.parent / 'lib'}"]
        library += ["benchmarks/gpu/device.cu", "-o", str(self.build / "libgpu_device.so")]
        return {
            **self.cmake(*options, f"-DCMAKE_CUDA_COMPILER={nvcc}"),
            "measuring library": [nvcc, *library],
        }

    def cmake(self, *options):
        """The commands that configure, compile and install the module."""
        cmake = cmake_path()
        configure = [cmake, "-S", ".", "-B", str(self.build), "-DDICE_OP_WITH_TENSORFLOW=OFF"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        if not (self.build / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        jobs = str(os.cpu_count() or 1)
        return {
            "configure": [*configure, *options],
            "compile": [cmake, "--build", str(self.build), "--parallel", jobs],
            "install": [cmake, "--install", str(self.build), "--prefix", str(self.install)],
        }

    def worker(self, module, *arguments, installed=True):
        """Returns how a worker starts: its command, its folder, and its environment.

        With `python -m`, the folder in which it starts comes first on the path. So a worker imports
        the dice_op that is built for this GPU, and not the one of the source folder; or, if
        `installed` is False, the other way round. The rest comes from the repository: benchmarks,
        and the modules of tests/.
        """
        folder = self.install if installed else ROOT
        path = [folder, ROOT, ROOT / "tests"]
        path += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
        environment["PYTHONIOENCODING"] = "utf-8"
        return [sys.executable, "-m", module, *arguments], folder, environment

    def sanitizer(self):
        """The beginning of a command that runs another one under compute-sanitizer.

        It is empty if there is no such tool.
        """
        tool = shutil.which("compute-sanitizer")
        tool = tool or str(Path(nvcc_path()).with_name("compute-sanitizer"))
        return [tool] if Path(tool).exists() else []


class Rehearsal(Gpu):
    """A stand-in for a GPU: the kernels on the emulator of tests/kernels/cuda_emulator.

    tests/gpu/rehearsal.py runs the workers there, with small volumes.
    """

    rehearsal = True
    build = ROOT / "build" / "rehearsal"
    records = ROOT / "build"
    sanitizers = ("memcheck",)  # the stand-in is the same for all

    def facts(self):
        unknown = dict.fromkeys(("clocks.sm", "clocks.max.sm"), "unknown")
        return {"name": "rehearsal without a GPU", "driver_version": "none", **unknown}

    def why_not(self):
        return None

    def compiler(self):
        return (output_of(os.environ.get("CXX", "c++"), "--version").splitlines() or [None])[0]

    def builders(self):
        # Better optimised, the kernels would take twice as long to compile. GCC 12 makes wrong code
        # of what it compiles with -Os and optimises once more with -O1 when it links.
        options = ["-DDICE_OP_CUDA=off", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
        options += ["-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"]
        return self.cmake(*options, f"-DCMAKE_PROJECT_dice_op_INCLUDE={EMULATOR}")

    def worker(self, module, *arguments, installed=True):
        return super().worker("gpu.rehearsal", module, *arguments, installed=installed)

    def sanitizer(self):
        # It takes the words of compute-sanitizer, and then only runs the command after them.
        return ["sh", "-c", 'shift 4; exec "$@"', "no sanitizer"]


# --- the steps ------------------------------------------------------------------------------------


def build(target, seconds, record, start):
    """Builds what the other steps need. Returns whether that worked."""
    took = {}
    for what, command in target.builders().items():
        print(f"  {what}", flush=True)
        begun = time.monotonic()
        status, log = run_worker(command, max(1, seconds - (begun - start)), record)
        took[what] = round(time.monotonic() - begun, 1)
        if status != 0:
            print(log)
            record.step("build", "failed", start, reason=f"{what}: {status}", log=log, took=took)
            return False
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    package = target.install / "dice_op"
    shutil.copytree(ROOT / "dice_op", package, ignore=no_binaries, dirs_exist_ok=True)
    record.step("build", "passed", start, took=took)
    return True


def run_sanitizer(target, seconds, record, start):
    """Runs a few cases under each tool of compute-sanitizer; an error fails the step."""
    tool = target.sanitizer()
    if not tool:
        record.step("sanitizer", "skipped", start, reason="there is no compute-sanitizer")
        return
    results, end = {}, start + seconds
    for i, kind in enumerate(target.sanitizers):
        share = (end - time.monotonic()) / (len(target.sanitizers) - i)
        command, *where = target.worker("gpu.kernels", "few", "--seconds", str(share * 0.8))
        command = [*tool, "--tool", kind, "--error-exitcode", "99", *command]
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
    reason = "a stand-in for the tool, which looks for nothing" if target.rehearsal else ""
    record.step("sanitizer", status, start, tools=results, reason=reason)


def run_step(name, target, arguments, seconds, record, start):
    """Runs a step that consists of workers. If they skip all that they do, so is the step."""
    workers, first, ends = WORKERS[name], len(record.data["results"]), []
    for i, (weight, *program) in enumerate(workers):
        left = start + seconds - time.monotonic()
        share = left * weight / sum(worker[0] for worker in workers[i:])
        options = ["--seconds", str(share * 0.85)]
        options += ["--quick"] * (arguments.quick and name in ("measure", "contenders"))
        # What is built for this GPU has no op for TensorFlow.
        how = target.worker(*program, *options, installed="tensorflow" not in program)
        before = len(record.data["results"])
        status, log = run_worker(how[0], max(1, share), record, *how[1:])
        wrong = [r for r in record.data["results"][before:] if r.get("wrong")]
        wrong += [f for r in record.data["results"][before:] for f in r.get("failures", ())]
        if name == "contenders":  # The step records what others compute, and judges only dice_op.
            wrong = [r for r in wrong if isinstance(r, dict) and r["ours"]]
        ends.append({"status": status, "wrong": len(wrong)} | ({"log": log} if status else {}))
    crashed = any(end["status"] != 0 for end in ends)
    # On a GPU others may crash. In a rehearsal the harness would be to blame.
    crash_counts = name != "contenders" or target.rehearsal
    failed = any(end["wrong"] for end in ends) or (crashed and crash_counts)
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
        "--rehearse", action="store_true", help="go through all steps on a stand-in for a GPU"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="the folder for the record (default: benchmarks/results, of a rehearsal build)",
    )
    parser.add_argument(
        "--continue",
        dest="earlier",
        type=Path,
        metavar="FILE.json",
        help="continue this record, which may be of another day or of changed sources",
    )
    parser.add_argument(
        "--anew", action="store_true", help="begin a new record even if there is one to continue"
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
    arguments.target = Rehearsal() if arguments.rehearse else Gpu()
    arguments.out = arguments.out or arguments.target.records
    if arguments.rehearse and RESULTS in (folder := arguments.out.resolve(), *folder.parents):
        parser.error("a rehearsal measures nothing, so that its record is no result")
    return arguments


def open_record(target, arguments):
    """Returns the record of this start, which may continue an earlier one."""
    record = Record(target, arguments, target.facts())
    earlier = arguments.earlier
    if not earlier and not arguments.anew and record.can_go_on():
        earlier = record.path
    if earlier:
        if why := record.go_on_with(earlier):
            sys.exit(f"gpu_check: {why}")
        print(f"continues {earlier.name}, which was begun at {record.data['date']}")
    return record


def plan(steps, seconds):
    """Divides the time among the steps by their weights. Returns the seconds of each."""
    together = sum(STEPS[step] for step in steps)
    return {step: seconds * STEPS[step] / together for step in steps}


def show_plan(planned, record):
    """Prints how long each step may take."""
    print("planned:")
    for name in STEPS:
        if name in planned:
            print(f"  {name:<12}{planned[name]:>6.0f} s")
        elif record.passed(name):
            print(f"  {name:<12}  passed before")
    print(f"  {'together':<12}{sum(planned.values()):>6.0f} s", flush=True)


def main():
    """Runs the steps in order, each with its share of the time, and returns the exit status."""
    arguments = parse_arguments()
    if arguments.render:
        return render(arguments.render)
    target = arguments.target
    if why := target.why_not():
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.time_limit
    record = open_record(target, arguments)
    facts = record.data["gpu"]
    about = f"{facts['name']}, driver {facts['driver_version']}, {record.data['compiler']}"
    print(about, flush=True)
    steps = [step for step in STEPS if step in arguments.steps and not record.passed(step)]
    if steps and "build" in arguments.steps and "build" not in steps:
        steps = ["build", *steps]  # It may be another machine. If it is not, there is little to do.
    planned = plan(steps, arguments.time_limit)
    show_plan(planned, record)
    built = True
    for i, name in enumerate(steps):
        start = time.monotonic()
        left = deadline - start
        seconds = plan(steps[i:], left)[name]
        record.begin(name, planned[name])
        if not built:
            record.step(name, "skipped", start, reason="the build failed")
        elif left < 5:
            record.step(name, "skipped", start, reason="no time left")
        elif name == "build":
            built = build(target, left, record, start)
        elif name == "sanitizer":
            run_sanitizer(target, seconds, record, start)
        else:
            run_step(name, target, arguments, seconds, record, start)
    record.data["gpu_afterwards"] = target.facts()
    record.write()
    print(record.path, flush=True)
    render(record.path)
    return 1 if any(s["status"] == "failed" for s in record.data["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
