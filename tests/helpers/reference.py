"""The pages of the reference: the names that each section documents, and its examples.

A section begins with a heading. It has the directives of some names, and programs that use these
names. A ``text`` block after a program shows its output.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .api import SNAPSHOT
from .documents import ROOT

DIRECTIVE = re.compile(r"^\.\. auto\w+:: ([.\w]+).*\n((?:   :.*\n)*)", re.MULTILINE)
MEMBERS = re.compile(r"^   :members:(.*)", re.MULTILINE)

# A name in a row of a table, or at the start of a sentence such as "`trisock.x` maps ...".
ROW = re.compile(r"^(?:\| )?`(trisock\.[.\w]+)` (?:\||maps)", re.MULTILINE)

EXAMPLE = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)

# A field of a dataclass or a dict, as ``print`` and ``pprint`` show it.
FIELD = re.compile(r"\b(\w+)=|'(\w+)':")

# A property that its class's docstring describes, among the attributes.
DESCRIBED_BY_CLASS = {"trisock.IncompleteReadError.partial"}


@dataclass(frozen=True)
class Example:
    """A program, and its output (``""`` if the page does not show it)."""

    program: str
    output: str

    def uses(self) -> set[str]:
        """Return the names in the code, and the fields in the output."""
        names = {a or b for a, b in FIELD.findall(self.output)}
        for node in ast.walk(ast.parse(self.program)):
            names.update(names_in(node))
        return names


@dataclass(frozen=True)
class Section:
    """A section of a page, with the page's name in its title."""

    title: str
    text: str

    @functools.cached_property
    def examples(self) -> list[Example]:
        return [Example(*each) for each in EXAMPLE.findall(self.text)]

    @functools.cached_property
    def uses(self) -> set[str]:
        """The names that the examples use."""
        return {name for example in self.examples for name in example.uses()}

    @functools.cached_property
    def documents(self) -> set[str]:
        """The names that have a directive or a row. ``name.*`` stands for all members."""
        names = {*ROW.findall(self.text)}
        for name, options in DIRECTIVE.findall(self.text):
            names.add(name)
            for members in MEMBERS.findall(options):
                names.update(f"{name}.{each}" for each in re.findall(r"\w+", members) or ["*"])
        return names


def sections() -> list[Section]:
    result = []
    for path in sorted((ROOT / "docs").glob("api-*.md")):
        for text in path.read_text(encoding="utf-8").removeprefix("# ").split("\n## "):
            result.append(Section(f"{path.name}: {text.splitlines()[0]}", text))
    return result


def section_of(name: str) -> Section | None:
    """Return the section with the directive of a name, or of the class that it belongs to."""
    owner = name.rpartition(".")[0]
    for wanted in (name, f"{owner}.*", *([owner] if is_field(name) else [])):
        for section in SECTIONS:
            if wanted in section.documents:
                return section
    return None


def is_field(name: str) -> bool:
    """Return whether a class's docstring describes this name. A method has its own docstring."""
    return "def(" not in SIGNATURES[name][0] or name in DESCRIBED_BY_CLASS


def names_in(node: ast.AST) -> Iterator[str]:
    """Yield the name that a syntax node uses: a variable, attribute, keyword argument or key."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
            yield name
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            yield name


def signatures() -> dict[str, list[str]]:
    """Return the lines of ``api.txt``, by name. An overloaded function has several."""
    result: dict[str, list[str]] = {}
    for line in SNAPSHOT.read_text(encoding="utf-8").splitlines():
        found = re.match(r"(trisock[.\w]*)(?:: | = )?(.*)", line)
        if found is not None and found[2] != "module":
            result.setdefault(found[1], []).append(found[2])
    return result


SECTIONS = sections()
SIGNATURES = signatures()
