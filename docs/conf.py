# SPDX-License-Identifier: MIT
"""How Sphinx builds these pages: ``make docs``."""

import postage

project = "postage"
copyright = "the postage authors"
release = postage.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "postage"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# `type` is an attribute of messages and of queues, and also a word of Python.
suppress_warnings = ["ref.python"]
