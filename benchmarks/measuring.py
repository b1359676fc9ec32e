"""The harness: measures what a contender takes for a volume, on any device, in any framework.

A `Framework` says how arrays are made, how the clock is read, and how the peak of memory is found.
cpu.py has those of a CPU, and gpu/ those of a GPU. A process that measures prints each result as a
line of JSON, which the process that started it reads.
"""

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULT = "RECORD "  # begins the line of a result
WORDS = "SAY "  # begins a line that gpu_check.py shows to its user
LEAST_CALLS_OF_A_GRAPH = 8


class Framework:
    """What the harness must know about a framework on a device.

    Its arguments are those of a contender's step: logits, labels, and, where the framework can
    write a gradient into memory that exists, this memory.
    """

    least, most = 5, 50  # how often a call is timed
    longest = 4.0  # how many seconds this may take; slow calls are repeated less often
    calls_to_warm_up = 5
    calls_per_sample = 1  # how many calls are between two readings of the clock
    has_graphs = False  # whether calls can be recorded and launched together
    times_wrong_results = False

    def sets_of(self, case):
        """How many sets of arguments are needed so that no cache keeps them between calls."""
        return 1

    def arguments(self, volume):
        """Makes a set of arguments."""
        raise NotImplementedError

    def ready(self, step, case, arguments):
        """Traces, compiles and warms up. Returns the step as it is called from now on."""
        raise NotImplementedError

    def peak(self, step, arguments):
        """Calls the step. Returns (loss, gradient), and the peak of extra bytes or None."""
        raise NotImplementedError

    def rows(self, gradient, start, count):
        """Returns some voxels of a gradient, in float64 `[count, C]` on the host."""
        raise NotImplementedError

    def samples(self, runs, repeats):
        """Calls the runs in turn, and returns the seconds that each sample took, per call."""
        raise NotImplementedError

    def graph(self, runs):
        """A context that gives a function which launches all runs, recorded in a graph."""
        raise NotImplementedError

    def forget(self):
        """Gives memory back that the framework keeps, before the next contender."""

    def repeats(self, seconds):
        """How often to repeat a sample whose calls take this long."""
        fitting = int(self.longest / max(seconds * self.calls_per_sample, 1e-9))
        return max(self.least, min(self.most, fitting))


# --- time -----------------------------------------------------------------------------------------


def summary(samples):
    """Returns the median and the spread of times in seconds."""
    lower, _, upper = statistics.quantiles(samples, n=4)
    p10, p90 = np.percentile(samples, (10, 90))
    return {
        "seconds": statistics.median(samples),
        "quartiles": [lower, upper],
        "p10_p90": [float(p10), float(p90)],
        "repeats": len(samples),
    }


def time_calls(framework, runs):
    """Times calls that are launched one by one. `runs` has a call for each set of arguments."""
    warm_up = max(framework.calls_to_warm_up, min(len(runs), framework.most))
    warm_up = math.ceil(warm_up / framework.calls_per_sample)
    once = statistics.median(framework.samples(runs, warm_up))
    result = summary(framework.samples(runs, framework.repeats(once)))
    if framework.calls_per_sample > 1:
        result["calls_per_sample"] = framework.calls_per_sample
    return result


def time_graph(framework, runs):
    """Times calls in one graph, which uses all sets of arguments in turn. A sample is a replay."""
    calls = max(len(runs), LEAST_CALLS_OF_A_GRAPH)
    with framework.graph([runs[i % len(runs)] for i in range(calls)]) as replay:
        once = statistics.median(framework.samples([replay], 3))
        samples = framework.samples([replay], framework.repeats(once))
    return summary([seconds / calls for seconds in samples]) | {"calls_per_sample": calls}


def times(framework, runs):
    """Times calls that are launched one by one, and under `graph` as a graph, if there is one."""
    result = time_calls(framework, runs)
    if framework.has_graphs:
        try:
            result["graph"] = time_graph(framework, runs)
        except Exception as error:  # Some contenders do not work in a graph.
            result["graph"] = {"failed": short(error)}
    return result


# --- one contender --------------------------------------------------------------------------------


def measure(framework, contender, case, volume):
    """Compares a contender's results with those in float64, and measures its memory and time."""
    sets = [framework.arguments(volume) for _ in range(framework.sets_of(case))]
    step = framework.ready(contender.make_step(case), case, sets[0])
    (loss, gradient), extra = framework.peak(step, sets[0])
    result = {"loss": float(loss), "extra_bytes": extra, "logits_bytes": case.logits_bytes}
    result |= volume.errors(result["loss"], functools.partial(framework.rows, gradient))
    del gradient  # This frees its memory.
    result["wrong"] = contender.same_loss and result["wrong"]
    if result["wrong"] and not framework.times_wrong_results:
        return result
    return result | times(framework, [functools.partial(step, *arguments) for arguments in sets])


# --- processes ------------------------------------------------------------------------------------


def short(error):
    """The type of an exception and the beginning of its message."""
    return f"{type(error).__name__}: {error}"[:400]


def emit(result, words=None):
    """Prints a result for the process that started this one, and words for its user."""
    print(RESULT + json.dumps(result), flush=True)
    if words:
        say(words)


def say(words):
    """Prints a line that gpu_check.py shows."""
    print(WORDS + words, flush=True)


def in_new_process(module, *arguments, **variables):
    """Runs a module in a new process. Returns the result that it emits, or its error as a text.

    variables: what the environment has besides.
    """
    command = [sys.executable, "-m", module, *arguments]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**quiet, **os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit {done.returncode}"
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return json.loads(results[-1].removeprefix(RESULT))


def follow(plan, deadline, name, facts, measure_part, line, catching=Exception):
    """Measures the parts of a plan in their order, and emits a result for each.

    Args:
      deadline: no part begins after this time of the monotonic clock.
      name: the name of the plan, for the record of what was left out.
      facts: what a result says about a part besides what was measured.
      line: describes a result in words.
      catching: the exceptions that become a result, so that the next part is measured.
    """
    for number, part in enumerate(plan):
        start = time.monotonic()
        if start > deadline:
            left = [facts(part)["name"] for part in plan[number:]]
            emit({"kind": "left_out", "step": name, "what": left})
            say(f"{len(left)} of {len(plan)} parts left out for want of time")
            return
        result = facts(part)
        try:
            result |= measure_part(part)
        except catching as error:
            result["failed"] = short(error)
        result["seconds_spent"] = round(time.monotonic() - start, 1)
        emit(result, line(result))
