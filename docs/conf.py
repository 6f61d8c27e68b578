"""Settings of Sphinx for the documentation site. `scripts/docs` builds it; tools/docsite makes pages of the code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sowatch import __version__

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
#: argparse wraps usages at it: one width on every machine.
os.environ["COLUMNS"] = "80"

project = "sowatch"
copyright = "the authors of sowatch"  # noqa: A001  (Sphinx's name)
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docsite"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_static"]
nitpicky = True
#: One backquote in a docstring: a name of sowatch. docsite links it, or finds that it does not exist.
default_role = "py:obj"

#: As a repository's pages link to headings.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
#: `--json` stays what is typed.
smartquotes = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": False}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "sowatch"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
#: A browser refuses to fetch them from files.
html_show_search_summary = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
