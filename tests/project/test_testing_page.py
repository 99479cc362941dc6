"""The examples of docs/testing.md, run as the tests that they are."""

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
    """What the blocks of the page define, as one program."""
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


def test_each_block_has_examples() -> None:
    assert len(BLOCKS) >= 5
    assert all("async def test_" in block for block in BLOCKS)
