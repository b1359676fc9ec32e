"""Measures dice_op beside its peers on this machine's processors.

    python -m benchmarks                     all, half an hour or more: results/cpu.*, README.md
    python -m benchmarks --only '160³ × 4'   cases that match a regular expression; only printed
    python -m benchmarks --contenders dice_op vectorised
    python -m benchmarks --report            tables and plots anew from the record

Every contender computes loss and gradient of the same volume in a process of its own, warmed up,
and is held to the loss in double precision. What was measured while others used the processors is
measured again.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import measuring, report
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS, applies

RECORD = measuring.ROOT / "benchmarks" / "results" / "cpu.json"
LARGE = 1 << 30  # bytes of logits: from here on dice_op alone


def machine():
    """What the numbers depend on."""
    from dice_op import core

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=measuring.ROOT)
        return done.stdout.strip()

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("tensorflow", "tensorflow-cpu", "keras", "torch", "monai", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": cpu[1] if cpu else platform.processor(),
        "simd_level": core.build_info()["simd_level"],
        "commit": run("git", "rev-parse", "--short", "HEAD"),
        "changed": bool(run("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "packages": versions,
    }


def fits(case):
    """Whether dice_op's logits and gradient, and a copy on the way, fit into what is free."""
    free = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return 3.5 * case.logits_bytes < 1024 * int(free[1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetition per measurement")
    parser.add_argument("--report", action="store_true", help="from the record that is there")
    arguments = parser.parse_args()
    if arguments.report:
        report.write(json.loads(RECORD.read_text()), RECORD)
        return
    whole = not arguments.only and arguments.contenders == list(CONTENDERS)
    watched = measuring.Machine()
    about = machine() | watched.limits()
    print(
        f"{about['processor']}, {about['threads']} threads, {about['simd_level']}: reads "
        f"{about['read'] / 1e9:.1f} GB/s, copies {about['copy'] / 1e9:.1f} GB/s (read and written)"
    )
    results = []
    for case in [c for c in CASES if re.search(arguments.only, str(c))]:
        if not fits(case):
            print(f"{case}: left out, for lack of memory", flush=True)
            continue
        print(f"{case}: {case.logits_bytes / 1e6:.0f} MB of logits", flush=True)
        names = [
            name
            for name in arguments.contenders
            if applies(name, case) and (case.logits_bytes <= LARGE or name.startswith("dice_op"))
        ]
        for result in measuring.compare(case, names, arguments.seconds, machine=watched):
            results.append(result)
            print("  " + report.line(result), flush=True)
    if whole:
        RECORD.parent.mkdir(exist_ok=True)
        overhead = measuring.in_new_process("benchmarks.overhead")
        record = {"machine": about, "results": results, "overhead": overhead}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        report.write(record, RECORD)
    if not results:
        sys.exit("no case matches")


if __name__ == "__main__":
    main()
