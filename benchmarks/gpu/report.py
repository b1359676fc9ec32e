"""Writes a record of build_tools/gpu_check.py as text, Markdown tables and a plot.

python -m benchmarks.gpu.report FILE    writes beside the record, and prints what it wrote
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.gpu import comparison
from benchmarks.report import table

HOW = ("launched", "graph")  # launched one by one, or as a graph
# The steps that have results. The record says why, if one has none.
STEPS = ("check", "measure", "contenders", "front_ends", "keras", "sanitizer", "tensorflow")


def _timed(result, how):
    return result if how == "launched" else result.get("graph", {})


def _microseconds(result, how):
    timed = _timed(result, how)
    return f"{1e6 * timed['seconds']:.1f}" if "seconds" in timed else "–"


def line(result):
    """Describes a result in one line for the terminal."""
    kind = result.get("kind")
    if kind in ("yardsticks", "yardsticks_again"):
        return ", ".join(
            f"{name} {result[name]['bytes_per_second'] / 1e12:.3f} TB/s"
            for name in ("copy", "read")
        )
    if kind == "kernels" and "pair" in result:
        parts = [
            f"{part} {_microseconds(result[part], 'graph')} µs "
            f"({_percent(result[part], 'graph', 'of_copy')})"
            for part in ("forward", "backward", "pair")
        ]
        return f"{result['name']}: {', '.join(parts)} of the copy rate, as a graph"
    if kind == "contender" and "seconds" in result:
        times = " / ".join(_microseconds(result, how) for how in HOW)
        return f"{result['contender']}, {result['name']}: {times} µs launched / as a graph"
    if kind in ("kernels", "contender") and (why := result.get("skipped") or result.get("failed")):
        return f"{', '.join(filter(None, (result.get('contender'), result['name'])))}: {why}"
    if kind in ("checks", "few_checks"):
        return f"{result['count']} checks, {len(result['failures'])} failed"
    return json.dumps(result)[:300]


def _percent(result, how, of):
    timed = _timed(result, how)
    return f"{100 * timed[of]:.0f} %" if of in timed else "–"


def _spread(result):
    low_and_high = _timed(result, "graph").get("p10_p90")
    return " – ".join(f"{1e6 * t:.1f}" for t in low_and_high) if low_and_high else "–"


def _best(result):
    """The seconds of the faster way to launch it, or None if it was not timed."""
    times = [_timed(result, how).get("seconds") for how in HOW]
    return min((t for t in times if t), default=None)


def _volume(result):
    case = result["case"]
    return case["classes"], case["dtype"], case["shape"][0]


def _contenders(results):
    """The titles of the contenders as they were measured, but ours first."""
    ours = {r["contender"]: r["ours"] for r in results}
    return sorted(ours, key=lambda title: not ours[title])


def _remark(result):
    """What a reader must know about a result that is missing or wrong."""
    if result.get("wrong"):
        return f"differs: loss {result['error']}, gradient {result['gradient_error']}"
    why = result.get("failed") or result.get("graph", {}).get("failed", "")
    return " ".join(str(why).split()).replace("|", "/")[:120]


def _not_here(record):
    """The steps without a result, and what the others left out: each as words that say why."""
    left_out = {r["step"]: r["what"] for r in record["results"] if r["kind"] == "left_out"}
    for name in STEPS:
        step = record["steps"].get(name, {"status": "was not asked for"})
        found = [r for r in record["results"] if r["step"] == name and "skipped" not in r]
        if not found:
            yield f"{name}: {': '.join(filter(None, (step['status'], step.get('reason'))))}"
        if name in left_out:
            yield f"{name}: {len(left_out[name])} of its parts, for want of time"
    for result in (r for r in record["results"] if "skipped" in r):
        of = f"{result['name']}, " if "name" in result else ""
        yield f"{result['step']}: {of}{result['skipped']}"


def markdown(record):
    """Returns the record as Markdown."""
    gpu, results = record["gpu"], record["results"]
    dirty = {True: ", changed", False: "", None: ""}[record["dirty"]]
    title, nothing = f"# {gpu['name']}, {record['date'][:10]}", []
    if record["rehearsal"]:
        title += ": a rehearsal on a stand-in for a GPU, whose times mean nothing"
        nothing = ["This is a rehearsal: these times mean nothing.", ""]
    starts = (" ".join(("gpu_check.py", *start["arguments"])) for start in record["starts"])
    text = [
        title,
        "",
        f"Commit {record['commit']}{dirty}; driver {gpu['driver_version']}, {record['compiler']}; "
        f"SM clock {gpu['clocks.sm']} before, at most {gpu['clocks.max.sm']}; "
        + ", ".join(f"{name} {version}" for name, version in record["packages"].items())
        + f". {', then '.join(f'`{start}`' for start in starts)}",
        "",
    ]
    steps = record["steps"]
    rows = [
        (name, s["status"], s["planned"], s.get("seconds", "–"), s.get("reason", ""))
        for name, s in steps.items()
    ]
    seconds = sum(s.get("seconds", 0) for s in steps.values())
    rows.append(("together", "", record["starts"][-1]["time_limit"], round(seconds, 1), ""))
    text += table(("step", "", "planned seconds", "seconds", ""), rows)
    for tool, result in record["steps"].get("sanitizer", {}).get("tools", {}).items():
        text.append(f"- {tool}: {result.splitlines()[0]}")
    text.append("")
    for result in (r for r in results if "worst" in r and r["kind"] != "few_checks"):
        rows = [
            (kind, f"{float(w['error']):.1e}", f"{w['tolerance']:.1e}", w["case"])
            for kind, w in result["worst"].items()
        ]
        of = {"checks": "the kernels", "tensorflow": "TensorFlow's op"}.get(result["kind"])
        of = of or f"the losses in {result['framework']}"
        text += [f"## {result['count']} checks of {of}, {len(result['failures'])} failed", ""]
        text += table(("relative error", "largest", "allowed", "where"), rows)
        text += [f"- {item}" for item in (*result["failures"], *result["left_out"])] + [""]
    for result in (r for r in results if r["kind"] == "yardsticks"):
        text += ["## Kernels", "", *nothing]
        text += [f"This GPU, in the same process: {line(result)}.", ""]
    measured = [r for r in results if r["kind"] == "kernels"]
    rows = []
    for r in sorted((r for r in measured if "pair" in r), key=_volume):
        cells = [r["name"]]
        for part in ("forward", "backward", "pair"):
            cells += [_microseconds(r[part], how) for how in HOW]
            cells.append(_percent(r[part], "graph", "of_read" if part == "forward" else "of_copy"))
        rows.append((*cells, _spread(r["pair"]), f"{r['pair']['host_us']:.0f}"))
    if rows:
        head = ["volume, classes"]
        for part, of in (("forward", "read"), ("backward", "copy"), ("pair", "copy")):
            head += [f"{part}, launched µs", "graph µs", f"of {of} rate"]
        text += table((*head, "pair, p10 – p90 µs", "host µs a pair"), rows)
    text += ["## Calculated and measured", ""]
    if why := record["calculated"].get("skipped"):
        text += [f"Nothing is compared: {why}.", ""]
    else:
        rows = record["calculated"]["kernels"]
        far = sum(row["differs"] for row in rows)
        text += [
            "Fractions of the rate of reading for the sums, and of copying for the gradient. "
            f"{far} of {len(rows)} differ by more than {100 * comparison.ALLOWED:.0f} %.",
            "",
        ]
        head = ("kernel", "volume", "calculated", "measured", "measured / calculated", "")
        text += table(head, [*comparison.markdown_rows(rows)])
    contenders = [r for r in results if r["kind"] == "contender"]
    titles = _contenders(contenders)
    rows = []
    for volume in sorted({_volume(r) for r in contenders}):
        here = [r for r in contenders if _volume(r) == volume]
        here.sort(key=lambda r: titles.index(r["contender"]))
        ours = next((_best(r) for r in here if r["ours"]), None)
        for r in here:
            best = _best(r)
            memory = f"{r['extra_bytes'] / r['logits_bytes']:.2f}" if "extra_bytes" in r else "–"
            ratio = f"{best / ours:.2f}" if best and ours else "–"
            times = [_microseconds(r, how) for how in HOW]
            rows.append((r["name"], r["contender"], *times, ratio, memory, _remark(r)))
    if rows:
        text += ["## Loss and gradient, with others", "", *nothing]
        text += table(
            ("volume, classes", "", "launched µs", "graph µs", "best / dice_op's best")
            + ("extra memory / logits", "",), rows,
        )  # fmt: skip
    trainings = [r for r in results if r["kind"] == "keras" and "losses" in r]
    if trainings:
        text += ["## Trainings in Keras", ""]
        rows = [
            (
                r["backend"],
                "compiled" if r["compiled"] else "not compiled",
                *(f"{r[which][0]:.3f} to {r[which][-1]:.3f}" for which in ("losses", "scores")),
                "; ".join(r["failures"]),
            )
            for r in trainings
        ]
        text += table(("backend", "", "loss", "score", ""), rows)
    if not_here := [*_not_here(record)]:
        text += ["## What is not here", "", *(f"- {item}" for item in not_here), ""]
    return "\n".join(text)


def plot(record, path):
    """Plots the time of loss and gradient, with a panel for each class count and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contenders = [r for r in record["results"] if r["kind"] == "contender" and _best(r)]
    pairs = [r for r in record["results"] if r["kind"] == "kernels" and "pair" in r]
    pairs = [r for r in pairs if not Case.from_json(r["case"]).cross_entropy]
    panels = [(c, d) for c in (4, 14) for d in ("float32", "bfloat16")]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (classes, dtype), axis in zip(panels, axes.flat, strict=True):

        def draw(title, results, time_of, axis=axis, panel=(classes, dtype), **style):
            points = sorted(
                (_volume(r)[2], 1e6 * time_of(r))
                for r in results
                if _volume(r)[:2] == panel and time_of(r)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=title, **style)

        for title in _contenders(contenders):
            draw(title, [r for r in contenders if r["contender"] == title], _best)
        draw("dice_op, kernels alone", pairs, lambda r: _best(r["pair"]), color="black")
        copy = next((r["copy"] for r in record["results"] if r["kind"] == "yardsticks"), None)
        if copy:
            draw(
                "their bytes at the copy rate", pairs, color="gray", linestyle=":",
                time_of=lambda r, copy=copy: r["bytes"]["pair"] / copy["bytes_per_second"],
            )  # fmt: skip
        axis.set(title=f"{classes} classes, {dtype}", xlabel="edge of the volume", ylabel="µs")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        edges = sorted({_volume(r)[2] for r in (*pairs, *contenders)})
        axis.set_xticks(edges, [str(edge) for edge in edges])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(f"Dice loss and gradient, {record['gpu']['name']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def render(path):
    """Writes Markdown and, if there is matplotlib, a plot beside a record. Returns their paths.

    The record itself gets what the calculated file says of its kernels by now.
    """
    record = json.loads(path.read_text())
    record["calculated"] = comparison.of_record(record)
    beside = path.with_suffix(".part")  # An interruption must not leave half a record.
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)
    table = path.with_suffix(".md")
    table.write_text(markdown(record))
    os.environ.setdefault("MPLCONFIGDIR", "/tmp")  # matplotlib needs a folder that it may write to.
    try:
        plot(record, path.with_suffix(".png"))
    except ImportError:
        return [table]
    return [table, path.with_suffix(".png")]


def main():
    for written in render(Path(sys.argv[1])):
        if written.suffix == ".md":
            print(written.read_text())
        print(written)


if __name__ == "__main__":
    main()
