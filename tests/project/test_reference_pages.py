"""The reference has each public name, its example runs, and it says what a cancellation leaves."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from typing import Any

import pytest

from helpers.api import PUBLIC_MODULES
from helpers.programs import run
from helpers.reference import SECTIONS, SIGNATURES, Section, section_of

# Programs call special methods by statements, such as ``async with`` and ``async for``.
NAMES = [name for name in SIGNATURES if not name.endswith("__")]

# Only gunicorn uses this class, by its name on gunicorn's command line.
WITHOUT_EXAMPLE = {"trisock.gunicorn.TrioWorker"}

# Calls whose result is awaited. Done and _Made are the awaitables of trisock.pluto.
AWAITED = re.compile(r"async def|-> (?:Done|_Made)$")
ASYNC = [name for name, (first, *_) in SIGNATURES.items() if AWAITED.search(first)]


def test_the_reference_has_each_public_name() -> None:
    assert [name for name in NAMES if section_of(name) is None] == []


def test_each_public_name_is_used_by_an_example_in_its_section() -> None:
    unused = []
    for name in NAMES:
        section = section_of(name)
        if section is None or name.rpartition(".")[2] not in section.uses:
            unused.append(name)
    assert set(unused) == WITHOUT_EXAMPLE


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
async def test_each_example_prints_what_the_page_says(section: Section) -> None:
    if "trisock.gunicorn" in section.text:
        pytest.importorskip("gunicorn", exc_type=ImportError)
    for example in section.examples:
        # In development mode, Python reports each file that a program leaves open.
        done = await run(sys.executable, "-X", "dev", "-c", example.program)
        assert (done.returncode, done.stderr.decode()) == (0, "")
        same = doctest.OutputChecker().check_output(
            example.output, done.stdout.decode(), doctest.ELLIPSIS
        )
        assert same, done.stdout.decode()
        assert example.output, "the page does not show the example's output"


@pytest.mark.parametrize("name", ASYNC)
def test_each_awaited_call_says_what_a_cancellation_leaves(name: str) -> None:
    """The docstring of a special method's class describes the cancellation."""
    owner, _, last = name.rpartition(".")
    assert "cancel" in docstring(owner if last.endswith("__") else name).lower()


def docstring(name: str) -> str:
    module = max((each for each in PUBLIC_MODULES if name.startswith(f"{each}.")), key=len)
    pytest.importorskip(module, exc_type=ImportError)  # gunicorn is not installed everywhere
    found: Any = importlib.import_module(module)
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    return inspect.getdoc(found) or ""
