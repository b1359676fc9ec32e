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
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` executes them
default_role = "code"  # docstrings mark code with single backquotes
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "none"
napoleon_custom_sections = [("Call", "params_style")]
copybutton_exclude = ".linenos, .gp, .go"
html_theme = "pydata_sphinx_theme"
html_title = f"dice_op {release}"
html_static_path = ["_static"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "dice_op"},
    # Each version has a folder of its name on the site, and an entry in this file.
    "switcher": {"json_url": "_static/versions.json", "version_match": release},
    "check_switcher": False,
    "navbar_end": ["version-switcher", "theme-switcher"],
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "which_loss": []}  # The bar at the top has all.
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # the browser's own: MathJax would have to come from another site


def setup(app):
    from docutils import nodes
    from docutils.utils.math.latex2mathml import tex2mathml

    def writer(as_block):
        def visit(self, node):
            self.body.append(tex2mathml(node.astext(), as_block=as_block))
            raise nodes.SkipNode

        return visit

    app.add_html_math_renderer("mathml", (writer(False), None), (writer(True), None))
