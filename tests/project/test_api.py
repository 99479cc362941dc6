"""The public API does not change by accident. Each name is stable or provisional."""

from __future__ import annotations

import difflib
import importlib
import re

import pytest

from helpers.api import COMMAND, PUBLIC_MODULES, SNAPSHOT, public_names, snapshot
from helpers.documents import ROOT

PAGE = (ROOT / "docs/stability.md").read_text(encoding="utf-8")
NOTED = SNAPSHOT.read_text(encoding="utf-8")


def names_of(module: str) -> list[str]:
    paths = (path.rpartition(".") for path in public_names())
    return sorted(name for owner, _, name in paths if owner == module)


def section(module: str) -> str:
    """Return the part of docs/stability.md that is about a module."""
    assert f"## `{module}`\n" in PAGE
    return PAGE.split(f"## `{module}`\n")[1].split("\n## ")[0]


def stable(module: str) -> list[str]:
    listed = re.search(r"^Stable: (.*?)\.(?= |$)", section(module), re.MULTILINE)
    return re.findall(r"`(.+?)`", listed[1]) if listed else []


def provisional(module: str) -> list[str]:
    """Return the provisional names, members (``Listener.abort``) and arguments (``run(tls=)``)."""
    rows = re.findall(r"^\| (`.+`) \| .+\. \|$", section(module), re.MULTILINE)
    return re.findall(r"`(.+?)`", " ".join(rows))


def test_the_api_has_not_changed_unnoticed() -> None:
    changes = difflib.unified_diff(NOTED.splitlines(), snapshot().splitlines(), lineterm="", n=0)
    text = "\n".join(line for line in changes if re.match(r"[+-](?![+-]{2} )", line))
    message = f"the public API has changed:\n{text}\nIf this is intended, run: {COMMAND}"
    assert not text, message


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_each_public_name_exists(module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)  # gunicorn is not installed everywhere
    imported = importlib.import_module(module)
    assert names_of(module) == sorted(imported.__all__)
    assert [name for name in imported.__all__ if not hasattr(imported, name)] == []


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_each_public_name_is_stable_or_provisional(module: str) -> None:
    """docs/stability.md has each name once."""
    whole = [name for name in provisional(module) if re.fullmatch(r"\w+", name)]
    assert sorted([*stable(module), *whole]) == names_of(module)


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_each_provisional_member_and_argument_exists(module: str) -> None:
    for name in provisional(module):
        path, _, argument = name.removesuffix("=)").partition("(")
        lines = re.findall(rf"^{re.escape(module)}\.{re.escape(path)}(?:: | = ).*$", NOTED, re.M)
        assert any(f"{argument}: " in line for line in lines), name
