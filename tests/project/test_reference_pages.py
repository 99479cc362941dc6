"""The reference has each public name."""

from __future__ import annotations

import re

import pytest

from helpers.api import public_names
from helpers.documents import ROOT

PAGES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("api-*.md"))]
DOCUMENTED = {
    *re.findall(r"^\.\. auto\w+:: (trisock[.\w]+)", "\n".join(PAGES), re.MULTILINE),
    *re.findall(r"`(trisock\.[.\w]+)` (?:\||maps)", "\n".join(PAGES)),
}


@pytest.mark.parametrize("name", [name for name in public_names() if name != "trisock.starttls"])
def test_a_public_name_is_in_the_reference(name: str) -> None:
    assert name in DOCUMENTED
