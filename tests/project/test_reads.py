"""``helpers/reads.py`` lists every read method."""

from __future__ import annotations

import inspect
import typing
from collections.abc import AsyncIterator

from helpers.reads import READS
from trisock import Lines
from trisock._net.message_receiving import MessageReceiver
from trisock._net.receiving import BufferedReceiver


def test_the_list_of_reads_has_every_read_method() -> None:
    methods = {
        name
        for cls in (BufferedReceiver, MessageReceiver, Lines)
        for name, function in vars(cls).items()
        if name == "__anext__" or _is_read(name, function)
    }
    assert {key.partition(" ")[0] for key in READS} == methods


def _is_read(name: str, function: object) -> bool:
    """Return whether a method is public and either is async or returns an async iterator."""
    if name.startswith("_") or not inspect.isfunction(function):
        return False
    if inspect.iscoroutinefunction(function):
        return True
    result = typing.get_type_hints(function)["return"]
    return inspect.isclass(result) and issubclass(result, AsyncIterator)
