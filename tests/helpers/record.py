"""The file in which the numbers of docs/reliability.md stand, each with where it comes from."""

import datetime
import json

from helpers.paths import BUILD, ROOT
from helpers.processes import alone_in, run


def write(file, part, what, value, test):
    """Writes a number over the one that was seen before.

    Args:
      file: the record, which is made if there is none.
      part: a group of numbers, such as "fuzz".
      what: the number's name in that group.
      test: what has seen it, a test or a command.
    """
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=ROOT).stdout.strip()
    if run("git", "status", "--porcelain", "csrc", "dice_op", "tests", cwd=ROOT).stdout:
        commit += " with changes"
    entry = {
        "value": value,
        "test": test,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }
    with alone_in(BUILD / "record"):
        record = json.loads(file.read_text()) if file.exists() else {}
        record.setdefault(part, {})[what] = entry
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
