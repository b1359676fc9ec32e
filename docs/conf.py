"""How Sphinx makes these pages: `make docs`. The API reference is made of the docstrings."""

import os
import re
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

project = "dice_op"
author = "the authors of dice_op"
release = re.search(r'^version = "(.*)"', (root / "pyproject.toml").read_text(), re.MULTILINE)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code with single backquotes
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "none"
napoleon_custom_sections = [("Call", "params_style")]
html_theme = "furo"
html_title = f"dice_op {release}"
