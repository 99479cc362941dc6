"""The pages for contributors name commands and files that exist."""

from __future__ import annotations

import re

import pytest

import trisock
from helpers.documents import ROOT

PAGES = [
    ".github/pull_request_template.md",
    ".github/workflows/ci.yml",
    ".pre-commit-config.yaml",
    "CONTRIBUTING.md",
    "docs/releasing.md",
    "docs/stability.md",
]


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> str:
    return (ROOT / request.param).read_text(encoding="utf-8")


def test_each_nox_session_exists(page: str) -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def (\w+)\(session: nox\.Session", noxfile, re.MULTILINE))
    named = " ".join(re.findall(r'nox -s "?([a-z]+(?: [a-z]+)*)', page)).split()
    assert [name for name in named if name not in sessions] == []


def test_each_file_exists(page: str) -> None:
    named = re.findall(r"(?<![\w/.-])((?:tests|docs|src|benchmarks)/[\w/.-]*\w)", page)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_each_link_leads_to_a_file() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https:|#)([^)]+)\)", page)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+) — ", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == trisock.__version__
