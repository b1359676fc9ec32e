"""build_tools/find_ffi_header.py, which is no part of a package, as a module."""

import importlib.util

from helpers.paths import BUILD_TOOLS

_spec = importlib.util.spec_from_file_location("finder", BUILD_TOOLS / "find_ffi_header.py")
finder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(finder)
