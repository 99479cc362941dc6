"""The fixture of the tests that fuzz."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from helpers.fuzzing import Fuzz


@pytest.fixture
def fuzz(
    times: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fuzz]:
    """Run checks on many examples; nothing may be logged meanwhile, or raised where nobody is."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    fuzz = Fuzz(times)
    with caplog.at_level(logging.INFO):
        yield fuzz
    print(f"{fuzz.examples} examples")
    assert not caplog.records
    assert not unraisable
