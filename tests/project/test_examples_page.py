"""docs/examples.md has each example, with a command that the example itself shows."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.documents import ROOT
from helpers.examples import EXAMPLES

PAGE = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| .+ \| `(.+)` \|$", PAGE, re.MULTILINE)
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_the_page_has_each_example_once() -> None:
    assert sorted(re.findall(r"python examples/(\w+)\.py", " ".join(COMMANDS))) == NAMES


def test_the_page_of_sources_has_each_example_once() -> None:
    sources = (ROOT / "docs/example-sources.md").read_text(encoding="utf-8")
    assert re.findall(r"^```{literalinclude} \.\./examples/(\w+)\.py$", sources, re.M) == NAMES
    assert re.findall(r"^## (\w+)\.py$", sources, re.M) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_example_begins_with_its_purpose_and_a_command(name: str) -> None:
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert text is not None
    first = text.partition("\n")[0]
    assert re.fullmatch(r"[A-Z].{30,}\.", first), first
    assert f"python examples/{name}.py" in text
    [command] = [each for each in COMMANDS if f"python examples/{name}.py" in each]
    assert command in re.sub(r"\s+", " ", text)
