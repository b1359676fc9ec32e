"""Compares the kernels that were measured on a GPU with what was calculated for them.

What was calculated is the fraction of the memory's rate on the data sheet that a kernel can reach
on large volumes. The file is benchmarks/results/calculated.json:

    {"memory": {"H200": 4.8e12}, "gpus": {"H200": {"float32": {"4": {"sums": 1.0}}}}}

No kernel reads faster than the yardsticks of the same measurement do, or copies faster. So it is
compared as a fraction of their rates: of that of reading for the sums, and of that of copying for
the gradient.
"""

import json
import re

from benchmarks.gpu import bounds

FILE = bounds.RECORD
# How far the measured may be from the calculated before it is named, relative to the calculated.
ALLOWED = 0.15
# The parts of a measurement, by the name of what was calculated, and what they are a fraction of.
PARTS = {"sums": ("forward", "of_read"), "gradient": ("backward", "of_copy")}
YARDSTICKS = {"sums": "read", "gradient": "copy"}


def calculated_for(gpu, path):
    """Reads what was calculated for a GPU, whose name has one of the file's names as words.

    Returns {(dtype, classes, "sums" or "gradient"): bytes per second}, or a text that says why not.
    """
    if not path.exists():
        return f"there is no {path.name}"
    record = json.loads(path.read_text())
    gpus = record["gpus"]
    names = [n for n in gpus if re.search(rf"(?<![^\W_]){re.escape(n)}(?![^\W_])", gpu)]
    if not names:
        return f"{path.name} has nothing for the GPU {gpu}, only for {', '.join(gpus)}"
    name = max(names, key=len)
    return {
        (dtype, int(classes), part): fraction * record["memory"][name]
        for dtype, by_classes in gpus[name].items()
        for classes, by_part in by_classes.items()
        for part, fraction in by_part.items()
        if part in PARTS
    }


def of_yardsticks(calculated, yardsticks):
    """Calculated bytes per second as fractions of what reading and copying reached, at most 1."""
    return {
        key: min(1.0, rate / yardsticks[YARDSTICKS[key[2]]]["bytes_per_second"])
        for key, rate in calculated.items()
    }


def compare(results, calculated):
    """Compares measured fractions with the calculated ones, kernel by kernel.

    Args:
      results: those of benchmarks.gpu.kernels. Of each kernel the largest volume counts. Those with
        cross-entropy are not compared.
      calculated: as `of_yardsticks` returns it.

    Returns:
      A row for each kernel that was calculated. `measured` is None if it was not measured, and
      `differs` says whether the two are further apart than is allowed.
    """
    largest = {}
    for result in results:
        case = result["case"]
        kernel = case["dtype"], case["classes"]
        if "pair" not in result or case["cross_entropy"]:
            continue
        if result["bytes"]["pair"] >= largest.get(kernel, result)["bytes"]["pair"]:
            largest[kernel] = result
    rows = []
    for (dtype, classes, name), fraction in calculated.items():
        row = {"dtype": dtype, "classes": classes, "part": name, "calculated": fraction}
        row |= {"volume": None, "measured": None, "ratio": None, "differs": False}
        if result := largest.get((dtype, classes)):
            part, of = PARTS[name]
            timed = result[part]["graph"] if of in result[part]["graph"] else result[part]
            ratio = timed[of] / fraction
            row |= {"volume": result["name"], "measured": timed[of], "ratio": ratio}
            row["differs"] = abs(ratio - 1) > ALLOWED
        rows.append(row)
    return rows


def of_record(record):
    """What a record says of it: the rows of `compare`, or why there are none."""
    results = [r for r in record["results"] if r["kind"] == "kernels"]
    calculated = calculated_for(record["gpu"]["name"], FILE)
    if isinstance(calculated, str):
        return {"skipped": calculated}
    if not any("pair" in result for result in results):
        return {"skipped": "no kernel was measured"}
    (yardsticks,) = (r for r in record["results"] if r["kind"] == "yardsticks")
    return {"kernels": compare(results, of_yardsticks(calculated, yardsticks))}


def markdown_rows(rows):
    """The rows as cells of a table, for people."""

    def percent(value):
        return "–" if value is None else f"{100 * value:.0f} %"

    for row in rows:
        remark = "**differs**" if row["differs"] else "" if row["volume"] else "not measured"
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        name = f"{row['dtype']}, {row['classes']} classes, {row['part']}"
        numbers = percent(row["calculated"]), percent(row["measured"]), ratio
        yield name, row["volume"] or "–", *numbers, remark
