"""Measures dice_op beside its peers on this machine's processors.

    python -m benchmarks                     measures everything, which takes half an hour or more,
                                             and writes results/cpu.* and README.md's table
    python -m benchmarks --only '160³ × 4'   prints the cases that match a regular expression
    python -m benchmarks --contenders dice_op vectorised
                                             prints these contenders
    python -m benchmarks --report            writes tables and plots again from the record

Every contender computes loss and gradient of the same volume in a process of its own, after a
warm-up. Its loss is compared with the loss in double precision. A measurement is repeated if other
programs used the processors meanwhile.
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

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.cpu import compare
from benchmarks.machine import Machine, available_memory
from benchmarks.measuring import ROOT, in_new_process

RECORD = ROOT / "benchmarks" / "results" / "cpu.json"
LARGE = 1 << 30  # bytes of logits; above this, only dice_op is measured


def machine():
    """Describes the machine and the software that the numbers depend on."""
    from dice_op import core

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
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
    """Whether logits, gradient and a copy while they are made fit into the free memory."""
    return 3.5 * case.logits_bytes < available_memory()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="measure only cases whose name matches"
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="how long to repeat each measurement"
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, and write from the record"
    )
    arguments = parser.parse_args()
    if arguments.report:
        report.write(json.loads(RECORD.read_text()), RECORD)
        return
    whole = not arguments.only and arguments.contenders == list(CONTENDERS)
    watched = Machine()
    about = machine() | watched.limits()
    print(
        f"{about['processor']}, {about['threads']} threads, {about['simd_level']}: reads "
        f"{about['read'] / 1e9:.1f} GB/s, copies {about['copy'] / 1e9:.1f} GB/s (read and written)"
    )
    results = []
    for case in [c for c in CASES if re.search(arguments.only, str(c))]:
        if not fits(case):
            print(f"{case}: left out, because there is too little memory", flush=True)
            continue
        print(f"{case}: {case.logits_bytes / 1e6:.0f} MB of logits", flush=True)
        contenders = [
            title
            for title in arguments.contenders
            if CONTENDERS[title].applies(case)
            and not CONTENDERS[title].why_not(case)
            and (case.logits_bytes <= LARGE or CONTENDERS[title].ours)
        ]
        for result in compare(case, contenders, arguments.seconds, machine=watched):
            results.append(result)
            print("  " + report.line(result), flush=True)
    if whole:
        RECORD.parent.mkdir(exist_ok=True)
        overhead = in_new_process("benchmarks.overhead")
        record = {"machine": about, "results": results, "overhead": overhead}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        report.write(record, RECORD)
    if not results:
        sys.exit("no case matches")


if __name__ == "__main__":
    main()
