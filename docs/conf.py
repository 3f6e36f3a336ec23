"""The site: `make docs` builds it with Sphinx from the pages of this folder and the docstrings."""

import pylogits

project = "pylogits"
author = "the pylogits developers"
version = release = pylogits.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
highlight_language = "none"  # the literal blocks of docstrings are formulas
# Every link and reference must lead somewhere.
nitpicky = True

# Headings get the anchors that GitHub gives them.
myst_heading_anchors = 3

templates_path = ["_templates"]
autosummary_generate = True
# Everything is importable from pylogits itself, whichever module it lies in.
autosummary_imported_members = True
autodoc_typehints = "none"  # numpydoc's sections say more than the annotations
add_module_names = False
numpydoc_show_class_members = False

html_theme = "furo"
html_title = "pylogits"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
exclude_patterns = ["charts/README.md"]  # a page of its own, for who looks at the folder
