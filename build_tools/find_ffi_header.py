"""Finds the header of XLA's foreign function interface that a build takes: the earliest there is.

    python build_tools/find_ffi_header.py               looks at TensorFlow and jaxlib
    python build_tools/find_ffi_header.py jaxlib        looks at jaxlib alone

It prints, as a CMake list, the folder to include, the version of the interface in it, and the
version that TensorFlow's own headers name; each is empty if there is none. A runtime takes handlers
of its own version of the interface and of earlier ones, so the earliest header serves the most.
"""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("tensorflow", "jaxlib")
# The first JAX with each version of the interface.
JAX = {(0, 1): "0.7", (0, 2): "0.8.1", (0, 3): "0.9.1", (0, 4): "0.11.1"}


def include_folder(package):
    """The headers of an installed package, which is not imported; None if it is not there."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) / "include" if spec else None


def version_in(folder):
    """The version of the interface that the headers in a folder name, such as (0, 1), or None."""
    header = folder / "xla" / "ffi" / "api" / "c_api.h"
    if not header.exists():
        return None
    text = header.read_text()
    parts = (re.search(rf"^#define XLA_FFI_API_{p} (\d+)", text, re.M) for p in ("MAJOR", "MINOR"))
    return tuple(int(part[1]) for part in parts)


def earliest(packages=PACKAGES):
    """The version and the folder of the header, of the first package if several have this version;
    or None. TensorFlow 2.19 lacks a part of it."""
    folders = filter(None, map(include_folder, packages))
    whole = [f for f in folders if (f / "xla" / "ffi" / "api" / "ffi.h").exists()]
    return min(((version_in(f), f) for f in whole), key=lambda found: found[0], default=None)


def oldest_jax(packages=PACKAGES):
    """The first version of JAX that takes handlers of a build here; None if there is no header."""
    found = earliest(packages)
    if not found:
        return None
    version, folder = found
    return JAX.get(version) or (metadata.version("jaxlib") if "jaxlib" in folder.parts else None)


def main():
    packages = sys.argv[1:] or PACKAGES
    version, folder = earliest(packages) or ((), "")
    tensorflow = include_folder("tensorflow") if "tensorflow" in packages else None
    own = tensorflow and version_in(tensorflow)
    print(folder, *(".".join(map(str, v or ())) for v in (version, own)), sep=";")


if __name__ == "__main__":
    main()
