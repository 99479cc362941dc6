"""How Sphinx builds the docs: ``nox -s docs``."""

import trisock.starttls.client
import trisock.starttls.server

# These two import some names for type checkers only. Sphinx resolves their annotations with these.
for module in (trisock.starttls.client, trisock.starttls.server):
    for name in ("Address", "Socket", "TLSArgument", "TLSInfo"):
        vars(module).setdefault(name, getattr(trisock, name))

project = "trisock"
author = "the trisock developers"
release = trisock.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "trisock"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
myst_heading_anchors = 3
