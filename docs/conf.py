"""How Sphinx builds the docs: ``nox -s docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

import trisock.starttls.client
import trisock.starttls.server

# These two import some names for type checkers only. Sphinx resolves their annotations with these.
for module in (trisock.starttls.client, trisock.starttls.server):
    for name in ("Address", "Socket", "TLSArgument", "TLSInfo"):
        vars(module).setdefault(name, getattr(trisock, name))

sys.path.append(str(Path(__file__).parent / "_extensions"))

project = "trisock"
author = project_copyright = "the trisock developers"
release = trisock.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "link_names"]
exclude_patterns = ["_build", "_extensions"]
html_theme = "furo"
html_title = f"trisock {release}"
html_theme_options = {
    "source_repository": "https://github.com/trisock/trisock/",
    "source_branch": "main",
    "source_directory": "docs/",
}
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_search_scorer = str(Path(__file__).parent / "_extensions" / "scorer.js")
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
myst_heading_anchors = 3
python_maximum_signature_line_length = 88


def mark_returns(*arguments: Any) -> None:
    """Make a field of ``Returns: ...`` on one line, which napoleon takes for a paragraph.

    A paragraph in the middle would split the fields, and Sphinx would list the parameters twice.
    """
    lines: list[str] = arguments[-1]
    inside = False
    for number, line in enumerate(lines):
        if re.match(r"Returns: \S", line):
            lines[number] = f":returns: {line.removeprefix('Returns: ')}"
            inside = True
        elif inside and line.strip():
            lines[number] = f"  {line}"
        else:
            inside = False


def drop_parameters(app: Any, domain: str, kind: str, content: Any) -> None:
    """Drop the parameters of a class without a public constructor: its directive ends with ``()``.

    Otherwise autodoc would list the annotations of ``__init__``.
    """
    if kind == "class" and not any(content.parent[0].findall(addnodes.desc_parameterlist)):
        for field in list(content.findall(nodes.field)):
            if field.parent.parent is content and field[0].astext().startswith(("param ", "type ")):
                field.parent.remove(field)


def setup(app: Any) -> None:
    """Connect the functions above. Sphinx calls this."""
    app.connect("autodoc-process-docstring", mark_returns, priority=400)  # before napoleon
    app.connect("object-description-transform", drop_parameters, priority=900)  # after autodoc
