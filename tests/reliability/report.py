"""Writes the tables of docs/reliability.md from docs/reliability.json, the record of what the tests
have seen: `make reliability` runs it, and with `--check` it only says whether they are up to date.

The page has a pair of comments for each part of the record, such as <!-- errors --> and
<!-- /errors -->. What stands between them is written anew.
"""

import json
import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).parents[2] / "docs"
RECORD, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"


def table(head, rows):
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(value):
    """A number as people read it."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.01 else f"{value:,.4g}"
    return str(value)


def errors(entries):
    """A row for each sum and dtype, and a column for each platform: the largest error of the bound.

    The name of an entry is "sum, dtype, platform".
    """
    names = [name.split(", ", 2) for name in entries]
    platforms = list(dict.fromkeys(platform for _, _, platform in names))
    rows = []
    for what, dtype in dict.fromkeys((what, dtype) for what, dtype, _ in names):
        cells = []
        for platform in platforms:
            entry = entries.get(f"{what}, {dtype}, {platform}")
            value = entry and entry["value"]
            cells.append(f"{value['largest']:.1e} of {value['bound']:.1e}" if value else "–")
        rows.append([f"`{what}`", dtype, *cells])
    return table(["", "logits", *platforms], rows)


def numbers(entries):
    """A row for each number, with the test that saw it."""
    rows = [
        [what, shown(e["value"]), f"`{e['test']}`", f"{e['date']}, {e['commit']}"]
        for what, e in sorted(entries.items())
    ]
    return table(["what", "seen", "by", "when, commit"], rows)


def in_numbers(record):
    """The tests in numbers: what the other tables say, added up."""

    def values(part, words=""):
        return [e["value"] for what, e in record[part].items() if re.search(words, what)]

    steps = [int(n) for name in record["long runs"] for n in re.findall(r"that (\d+) steps", name)]
    rows = [
        ["inputs drawn, or made by a fuzzer", sum(values("fuzzing", "inputs"))],
        ["tests and calls under sanitizers", sum(values("sanitizers"))],
        [
            "bugs planted in the kernels or their emulator, each noticed",
            len(record["planted bugs"]),
        ],
        ["requests and calls that failed on purpose", sum(values("faults", "^requests|^failing"))],
        ["voxels in the largest volume", max(values("scale", "voxels in"))],
        ["steps of each front end in a long run", min(steps)],
        ["bytes that these steps have left, at most", max(values("long runs", "bytes"))],
        *([f"coverage: {what}", f"{e['value']} %"] for what, e in record["coverage"].items()),
    ]
    return table(["", "seen"], [[what, shown(value)] for what, value in rows])


def planted(entries):
    """The bugs in words: a table of them would have the same test in each row."""
    return "\n".join(f"- {bug}" for bug in sorted(entries))


def written(page, record):
    """The page with its tables."""
    forms = {"errors": errors, "planted bugs": planted}
    tables = {part: forms.get(part, numbers)(entries) for part, entries in record.items()}
    for part, made in {**tables, "in numbers": in_numbers(record)}.items():
        begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
        page, count = re.subn(
            f"{begin}.*{end}", lambda _, t=f"{begin}\n\n{made}\n\n{end}": t, page, flags=re.DOTALL
        )
        if count != 1:
            sys.exit(f"{PAGE.name} must have one {begin} and one {end}")
    return page


if __name__ == "__main__":
    page = PAGE.read_text()
    made = written(page, json.loads(RECORD.read_text()))
    if "--check" in sys.argv:
        sys.exit(made != page and f"{PAGE.name} is not up to date: run {sys.argv[0]}")
    PAGE.write_text(made)
