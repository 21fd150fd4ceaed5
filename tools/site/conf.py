"""How Sphinx makes the site of docs/: `make site`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the repository, for tools and examples

project = "fusedopt"
author = "the fusedopt contributors"
copyright = author
release = metadata.version("fusedopt")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "tools.site.command_lines",
    "tools.site.mathml",
    "tools.site.optimizer_pages",
    "tools.site.root_pages",
    "tools.site.sources",
]

# ---- the text ----
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as code hosts make them
myst_all_links_external = False
default_role = "py:obj"
highlight_language = "none"

# ---- what is read from docstrings ----
autodoc_mock_imports = ["transformers"]  # which the site does not need
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# ---- how it looks ----
html_theme = "furo"
html_title = f"fusedopt {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_permalinks_icon = "#"
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"
