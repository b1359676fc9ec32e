"""Writes a record of `python -m benchmarks` as text, Markdown, plots and README.md's table."""

import re
import statistics

from benchmarks.cases import CASES, Case, cube
from benchmarks.contenders import IN_PLACE
from benchmarks.machine import UNDISTURBED, disturbed

# The contenders in README.md and in the plots.
SHOWN = (
    "dice_op",
    "dice_op, XLA",
    "vectorised, XLA",
    "vectorised",
    "keras.losses.Dice",
    "monai",
    "monai, torch.compile",
    "multi-class snippet",
)
README_CASES = ("160³ × 4", "128³ × 14")
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def table(head, rows):
    """Returns a table as lines of Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]


def _milliseconds(result):
    return f"{1e3 * result['seconds']:.3g} ms"


def _memory(result):
    if result["extra_bytes"] is None:
        return "–"
    return f"{result['extra_bytes'] / result['logits_bytes']:.2f}"


def _speed(result, case):
    """GB/s of the least traffic: logits and labels read twice, and the gradient written once."""
    return 1e-9 * (3 * case.logits_bytes + 2 * case.labels_bytes) / result["seconds"]


def _notes(record):
    """Maps case and contender to a note, if other programs used the processors meanwhile."""
    paces = {(r["name"], r["contender"]): r["pace"] for r in record["results"] if "pace" in r}
    fastest = min(paces.values(), default=None)
    return {
        key: f" (processors at {fastest / pace:.0%})"
        for key, pace in paces.items()
        if disturbed(pace, fastest)
    }


def _quiet(record, notes):
    """Returns lines that say how many measurements have such a note."""
    measured = sum("pace" in result for result in record["results"])
    if not measured:
        return []
    return [
        f"A measurement is repeated where the processors computed at less than {UNDISTURBED:.0%}",
        f"of their fastest before or after it. {len(notes)} of {measured} found no",
        "better moment, and say so.",
        "",
    ]


def line(result):
    """Describes a result in one line for the terminal."""
    if "failed" in result:
        return f"{result['contender']}: failed: {result['failed'][:150]}"
    low, high = (1e3 * q for q in result["quartiles"])
    limit = f", {result['of_limit']:.2f} x limit" if "of_limit" in result else ""
    wrong = "WRONG by " if result["wrong"] else "error " if result["same_loss"] else ""
    return (
        f"{result['contender']:28}{_milliseconds(result):>10} ({low:.3g} to {high:.3g}){limit}, "
        f"memory {_memory(result)} x logits" + (f", {wrong}{result['error']:.1e}" if wrong else "")
    )


def _row(result, note):
    if "failed" in result:
        return [result["contender"], "failed", "", "", "", ""]
    wrong = f" wrong by {result['error']:.1g}" if result["wrong"] else f"{result['error']:.0e}"
    error = wrong if result["same_loss"] else "another loss"
    low, high = (1e3 * q for q in result["quartiles"])
    return [
        result["contender"],
        f"{_milliseconds(result)} ({low:.3g} – {high:.3g}){note}",
        f"{_speed(result, Case.from_json(result['case'])):.1f}",
        f"{result['of_limit']:.2f}",
        _memory(result),
        error,
    ]


def _about(machine):
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['simd_level']}; memory is "
        f"read at {machine['read'] / 1e9:.1f} GB/s, and read and written at "
        f"{machine['copy'] / 1e9:.1f} GB/s. "
        f"Python {machine['python']}, {packages}. {machine['date']}, commit {machine['commit']}"
        f"{' with changes' if machine['changed'] else ''}."
    )


def _by_name(record):
    return {(r["name"], r["contender"]): r for r in record["results"] if "failed" not in r}


def _claims(record):
    """Returns lines with the ratios that this project has targets for."""
    by = _by_name(record)

    def seconds(case, contender="dice_op"):
        return by[case, contender]["seconds"]

    lines = []
    for case in README_CASES:
        if (case, "dice_op, XLA") not in by:
            continue
        best = min(("dice_op", "dice_op, XLA"), key=lambda name: seconds(case, name))
        others = {c: r for (n, c), r in by.items() if n == case and not r["ours"]}
        peers = [p for p, r in others.items() if r["same_loss"] and not r["wrong"]]
        fastest = min(peers, key=lambda name: seconds(case, name))
        snippets = [p for p in peers if others[p]["snippet"]]
        snippet = min(snippets, key=lambda name: seconds(case, name))
        lines.append(
            f"- {case}: {best} takes {by[case, best]['of_limit']:.2f} times the limit. The fastest "
            f"peer that computes this loss ({fastest}) takes {_times(by, case, fastest, best)} as "
            f"long, the faster of the snippets ({snippet}) {_times(by, case, snippet, best)}. Peak "
            f"extra memory: {_memory(by[case, best])} × logits, in place "
            f"{_memory(by[case, IN_PLACE])}."
        )
    cases = {str(case): case for case in CASES}
    for contender in ("dice_op", "dice_op, XLA"):
        of_4 = [n for n in cases if _is_cube(cases[n], 4) and (n, contender) in by]
        per_voxel = (
            f"{n.split(' ')[0]} {1e9 * seconds(n, contender) / cases[n].voxels:.2f}" for n in of_4
        )
        lines.append(f"- {contender}, nanoseconds per voxel of 4 classes: {', '.join(per_voxel)}.")
        of_96 = [n for n in cases if _is_cube(cases[n], None, 96) and (n, contender) in by]
        per_logit = (
            f"{cases[n].classes} classes "
            f"{1e9 * seconds(n, contender) / (cases[n].voxels * cases[n].classes):.2f}"
            for n in sorted(of_96, key=lambda n: cases[n].classes)
        )
        lines.append(f"- {contender}, nanoseconds per logit of 96³ voxels: {', '.join(per_logit)}.")
    halves = [n for n in cases if cases[n].dtype == "float16" and (n, "dice_op") in by]
    lines.append(
        "- Half, of the time of float: "
        + ", ".join(
            f"{n.removesuffix(' float16')} {seconds(n) / seconds(n.removesuffix(' float16')):.2f}"
            for n in halves
        )
        + "."
    )
    for case in README_CASES:
        # The record may be older than CONTENDERS and have other levels.
        levels = [r for (name, _), r in by.items() if name == case and r["simd_level"]]
        if levels:
            times = (f"{r['simd_level']} {_milliseconds(r)}" for r in levels)
            lines.append(f"- Instruction sets, {case}: {', '.join(times)}.")
    return [*lines, ""]


def _times(by, case, contender, of):
    return f"{by[case, contender]['seconds'] / by[case, of]['seconds']:.1f} times"


def _is_cube(case, classes=None, edge=None):
    plain = case == cube(case.shape[0], case.classes)
    return plain and classes in (None, case.classes) and edge in (None, case.shape[0])


def _overhead(record):
    head = ["8³ × 4, eager", "forward", "with gradient"]
    rows = [
        [name, *(f"{1e6 * t:.0f} µs" for t in times)] for name, times in record["overhead"].items()
    ]
    return ["## What a call costs", "", *table(head, rows)]


def markdown(record):
    """Returns all results as Markdown, with a table for each case."""
    notes = _notes(record)
    lines = ["# Loss and gradient on a CPU", "", _about(record["machine"]), ""]
    lines += [
        "Median and quartiles. GB/s: two reads of logits and labels, one write of the gradient,",
        "over the time; the limit is what those take at the machine's own speed. Memory: peak of",
        "what comes on top of logits and labels, in logits. Error: of the loss, against double",
        "precision.",
        "",
        *_quiet(record, notes),
        *_claims(record),
        *_overhead(record),
        "",
    ]
    for name in dict.fromkeys(r["name"] for r in record["results"]):
        head = ["", "time", "GB/s", "× limit", "memory", "error"]
        of_name = [r for r in record["results"] if r["name"] == name]
        rows = [_row(r, notes.get((name, r["contender"]), "")) for r in of_name]
        lines += [f"## {name}", "", *table(head, rows)]
    return "\n".join(lines)


def plot(record, path):
    """Plots time over voxels, and time and memory over classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    plain = [
        r
        for r in record["results"]
        if "failed" not in r and not r["wrong"] and Case.from_json(r["case"]).plain
    ]

    def draw(axis, of, x, y, limit=None):
        for number, name in enumerate(SHOWN):
            points = sorted(
                (x(Case.from_json(r["case"])), y(r))
                for r in plain
                if r["contender"] == name and of(r)
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=4, color=f"C{number}", label=name)
        if limit:
            limits = {}
            for r in filter(of, plain):
                limits.setdefault(x(Case.from_json(r["case"])), []).append(limit(r))
            points = sorted((at, statistics.median(of_all)) for at, of_all in limits.items())
            axis.plot(*zip(*points, strict=True), "k--", lw=1, label="memory's limit")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)

    def milliseconds(result):
        return 1e3 * result["seconds"]

    def limit(result):
        return milliseconds(result) / result["of_limit"]

    def cubes_of_4(result):
        return result["case"]["classes"] == 4

    def cubes_of_96(result):
        return (
            Case.from_json(result["case"]).shape == (96, 96, 96) and result["case"]["classes"] > 1
        )

    draw(axes[0], cubes_of_4, lambda c: c.voxels, milliseconds, limit)
    axes[0].set(title="4 classes", xlabel="voxels", ylabel="loss and gradient, ms")
    draw(axes[1], cubes_of_96, lambda c: c.classes, milliseconds, limit)
    axes[1].set(title="96³ voxels", xlabel="classes", ylabel="loss and gradient, ms")
    draw(
        axes[2],
        lambda r: cubes_of_96(r) and r["extra_bytes"] is not None,
        lambda c: c.classes,
        lambda r: max(r["extra_bytes"], 1) / r["logits_bytes"],
    )
    axes[2].set(title="96³ voxels", xlabel="classes", ylabel="peak extra memory, × logits")
    axes[2].set_yscale("linear")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def readme_part(record):
    """Returns the short table for README.md, with its markers."""
    by, notes = _by_name(record), _notes(record)
    rows = []
    for name in SHOWN:
        results = [by.get((case, name)) for case in README_CASES]
        ours = any(r and r["ours"] for r in results)
        cells = [f"`{name}`" if ours else name]
        for case, result in zip(README_CASES, results, strict=True):
            cells += (
                [
                    _milliseconds(result) + notes.get((case, name), ""),
                    f"{result['seconds'] / by[case, 'dice_op']['seconds']:.1f}",
                    _memory(result),
                ]
                if result
                else ["–"] * 3
            )
        rows.append(cells)
    columns = ("time", "relative to `dice_op`", "memory")
    head = ["", *(f"{case}: {column}" for case in README_CASES for column in columns)]
    return "\n".join([BEGIN, "", _about(record["machine"]), "", *table(head, rows), END])


def write(record, path):
    """Writes the table and the plot beside the record, and the part of README.md."""
    path.with_suffix(".md").write_text(markdown(record))
    plot(record, path.with_suffix(".png"))
    readme = path.parents[2] / "README.md"
    text = readme.read_text()
    readme.write_text(
        re.sub(f"{BEGIN}.*{END}", lambda _: readme_part(record), text, count=1, flags=re.DOTALL)
    )
