"""docs/promises.md names existing tests."""

from __future__ import annotations

import re

from helpers.documents import ROOT, all_tests


def test_each_promise_names_existing_tests() -> None:
    text = (ROOT / "docs" / "promises.md").read_text()
    known = all_tests()
    promises = [line for line in text.splitlines() if line.startswith("| ") and "::" in line]
    assert len(promises) > 50
    named = re.findall(r"`(test_\w+\.py::\w+)`", text)
    assert [test for test in named if test not in known] == []
