"""Writes a record of build_tools/gpu_check.py as text, Markdown tables and a plot."""

import json
import os

TITLES = {
    "dice_op": "dice_op",
    "dice_op_jax": "dice_op in JAX's jit",
    "triton": "Triton kernels",
    "compiled": "torch.compile, MONAI's form",
    "jax": "JAX, jit",
    "nnunet": "PyTorch eager, nnU-Net's form",
    "monai": "PyTorch eager, MONAI's form",
}
MODES = ("launches", "graph")


def _volume(result):
    loss = " +CE" if result.get("cross_entropy") else ""
    return f"{result['edge']}³ × {result['classes']} {result['dtype']}{loss}"


def _microseconds(result, mode):
    timed = result.get(mode, {})
    return f"{1e3 * timed['median_ms']:.1f}" if "median_ms" in timed else "–"


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
            f"({100 * result[part]['graph'].get('of_copy', 0):.0f} %)"
            for part in ("forward", "backward", "pair")
        ]
        return f"{_volume(result)}: {', '.join(parts)} of the copy rate, as a graph"
    if kind == "contender" and "launches" in result:
        times = " / ".join(_microseconds(result, mode) for mode in MODES)
        return f"{TITLES[result['name']]}, {_volume(result)}: {times} µs launched / as a graph"
    if kind in ("checks", "few_checks"):
        return f"{result['count']} checks, {len(result['failures'])} failed"
    return json.dumps(result)[:300]


def table(head, rows):
    """Returns a table as lines of Markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]


def _percent(result, mode, of):
    timed = result.get(mode, {})
    return f"{100 * timed[of]:.0f} %" if of in timed else "–"


def _spread(result):
    timed = result.get("graph", {})
    if "p10_ms" not in timed:
        return "–"
    return f"{1e3 * timed['p10_ms']:.1f} – {1e3 * timed['p90_ms']:.1f}"


def markdown(record):
    """Returns the record as Markdown."""
    gpu, results = record["gpu"], record["results"]
    dirty = {True: ", changed", False: "", None: ""}[record["dirty"]]
    text = [
        f"# {gpu['name']}, {record['date'][:10]}",
        "",
        f"Commit {record['commit']}{dirty}; driver {gpu['driver_version']}, nvcc {record['nvcc']}; "
        f"SM clock {gpu['clocks.sm']} before, at most {gpu['clocks.max.sm']}; "
        + ", ".join(f"{name} {version}" for name, version in record["packages"].items())
        + f". `gpu_check.py {' '.join(record['arguments'])}`",
        "",
    ]
    rows = [(n, s["status"], s["seconds"], s.get("reason", "")) for n, s in record["steps"].items()]
    text += table(("step", "", "seconds", ""), rows)
    for tool, result in record["steps"].get("sanitizer", {}).get("tools", {}).items():
        text.append(f"- {tool}: {result.splitlines()[0]}")
    text.append("")
    for result in (r for r in results if r["kind"] == "checks"):
        rows = [
            (kind, f"{float(w['error']):.1e}", f"{w['tolerance']:.1e}", w["case"])
            for kind, w in result["worst"].items()
        ]
        text += [f"## {result['count']} checks, {len(result['failures'])} failed", ""]
        text += table(("relative error", "largest", "allowed", "where"), rows)
        text += [f"- {item}" for item in (*result["failures"], *result["left_out"])] + [""]
    for result in (r for r in results if r["kind"] == "yardsticks"):
        text += ["## Kernels", "", f"This GPU, in the same process: {line(result)}.", ""]
    measured = [r for r in results if r["kind"] == "kernels"]
    measured.sort(key=lambda r: (r.get("classes", 0), r.get("dtype", ""), r.get("edge", 0)))
    rows = []
    for r in measured:
        if "pair" not in r:
            continue
        cells = [_volume(r)]
        for part in ("forward", "backward", "pair"):
            cells += [_microseconds(r[part], mode) for mode in MODES]
            cells.append(_percent(r[part], "graph", "of_read" if part == "forward" else "of_copy"))
        rows.append((*cells, _spread(r["pair"]), f"{r['pair']['host_us']:.0f}"))
    if rows:
        head = ["volume, classes"]
        for part, of in (("forward", "read"), ("backward", "copy"), ("pair", "copy")):
            head += [f"{part}, launched µs", "graph µs", f"of {of} rate"]
        text += table((*head, "pair, p10 – p90 µs", "host µs a pair"), rows)
    contenders = [r for r in results if r["kind"] == "contender"]
    volumes = sorted({(r["classes"], r["dtype"], r["edge"]) for r in contenders})
    rows = []
    for volume in volumes:
        here = [r for r in contenders if (r["classes"], r["dtype"], r["edge"]) == volume]
        ours = next((_best(r) for r in here if r["name"] == "dice_op"), None)
        for r in sorted(here, key=lambda r: [*TITLES].index(r["name"])):
            best = _best(r)
            logits = r["edge"] ** 3 * r["classes"] * {"float32": 4, "bfloat16": 2}[r["dtype"]]
            memory = f"{r['peak_extra_bytes'] / logits:.2f}" if "peak_extra_bytes" in r else "–"
            ratio = f"{best / ours:.2f}" if best and ours else "–"
            why = r.get("error") or r.get("graph", {}).get("error", "")
            if r.get("passed") is False:
                why = f"differs: loss {r['loss_error']}, gradient {r['gradient_error']}"
            times = [_microseconds(r, mode) for mode in MODES]
            why = " ".join(str(why).split()).replace("|", "/")[:120]
            rows.append((_volume(r), TITLES[r["name"]], *times, ratio, memory, why))
    if rows:
        text += ["## Loss and gradient, with others", ""]
        text += table(
            ("volume, classes", "", "launched µs", "graph µs", "best / dice_op's best")
            + ("extra memory / logits", "",), rows,
        )  # fmt: skip
    left = [r for r in results if r["kind"] == "left_out"]
    if left:
        text += ["## Left out for want of time", ""]
        text += [f"- {r['step']}: {len(r['what'])} of its parts" for r in left] + [""]
    return "\n".join(text)


def _best(result):
    times = [result.get(mode, {}).get("median_ms") for mode in MODES]
    return min((t for t in times if t), default=None)


def plot(record, path):
    """Plots the time of loss and gradient, with a panel for each class count and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contenders = [r for r in record["results"] if r["kind"] == "contender" and _best(r)]
    pairs = [r for r in record["results"] if r["kind"] == "kernels" and "pair" in r]
    pairs = [r for r in pairs if not r["cross_entropy"]]
    panels = [(c, d) for c in (4, 14) for d in ("float32", "bfloat16")]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (classes, dtype), axis in zip(panels, axes.flat, strict=True):

        def draw(title, results, time_of, axis=axis, panel=(classes, dtype), **style):
            points = sorted(
                (r["edge"], 1e3 * time_of(r))
                for r in results
                if (r["classes"], r["dtype"]) == panel and time_of(r)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=title, **style)

        for name, title in TITLES.items():
            draw(title, [r for r in contenders if r["name"] == name], _best)
        draw("dice_op, kernels alone", pairs, lambda r: _best(r["pair"]), color="black")
        copy = next((r["copy"] for r in record["results"] if r["kind"] == "yardsticks"), None)
        if copy:
            draw(
                "their bytes at the copy rate", pairs, color="gray", linestyle=":",
                time_of=lambda r, copy=copy: r["bytes"]["pair"] / copy["bytes_per_second"] * 1e3,
            )  # fmt: skip
        axis.set(title=f"{classes} classes, {dtype}", xlabel="edge of the volume", ylabel="µs")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        edges = sorted({r["edge"] for r in (*pairs, *contenders)})
        axis.set_xticks(edges, [str(edge) for edge in edges])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(f"Dice loss and gradient, {record['gpu']['name']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def render(path):
    """Writes Markdown and, if there is matplotlib, a plot beside a record. Returns their paths."""
    record = json.loads(path.read_text())
    table = path.with_suffix(".md")
    table.write_text(markdown(record))
    os.environ.setdefault("MPLCONFIGDIR", "/tmp")  # matplotlib needs a folder that it may write to.
    try:
        plot(record, path.with_suffix(".png"))
    except ImportError:
        return [table]
    return [table, path.with_suffix(".png")]
