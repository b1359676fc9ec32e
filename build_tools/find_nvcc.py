"""Finds CUDA's compiler, nvcc. No other file searches for it: all of them ask this one.

    python build_tools/find_nvcc.py             prints the path of the first that it finds
    python build_tools/find_nvcc.py --no-pip    does not look at what pip has installed

The exit status is 1 if there is none.
"""

import os
import shutil
import sys
from pathlib import Path


def of_machine():
    """The compilers that CUDACXX, CUDA_HOME, CUDA_PATH and PATH name, in this order."""
    candidates = [os.environ.get("CUDACXX")]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            candidates.append(f"{folder}/bin/nvcc")
    candidates.append("nvcc")
    return [path for path in map(shutil.which, filter(None, candidates)) if path]


def of_pip(folders=None):
    """The compilers that pip has put into these folders; without folders, beside this Python."""
    folders = sys.path if folders is None else folders
    return [str(p) for folder in folders for p in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))]


def main():
    found = of_machine() + ([] if "--no-pip" in sys.argv[1:] else of_pip())
    if not found:
        sys.exit(1)
    print(found[0])


if __name__ == "__main__":
    main()
