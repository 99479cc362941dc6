"""The examples in docs/testing.md are tests, and they pass."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import trio.testing

from helpers.documents import ROOT

PAGE = (ROOT / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAMES = re.findall(r"^async def (test_\w+)", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """Run all code blocks of the page as one program, and return the names that it defines."""
    found: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/testing.md", "exec"), found)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_example_of_the_page_passes(name: str, namespace: dict[str, Any]) -> None:
    test = namespace[name]
    if inspect.signature(test).parameters:
        clock = trio.testing.MockClock(autojump_threshold=0)
        trio.run(test, clock, clock=clock)
    else:
        trio.run(test)


def test_each_code_block_of_the_page_contains_a_test() -> None:
    assert len(BLOCKS) >= 5
    assert all("async def test_" in block for block in BLOCKS)
