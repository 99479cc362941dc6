"""``helpers/reads.py`` lists every read method."""

from __future__ import annotations

import inspect

from helpers.reads import READS
from trisock._net.receiving import BufferedReceiver


def test_the_list_of_reads_has_every_read_method() -> None:
    methods = {
        name
        for name, function in vars(BufferedReceiver).items()
        if name == "lines" or name == "__anext__" or _is_public_coroutine(name, function)
    }
    assert {key.partition(" ")[0] for key in READS} == methods


def _is_public_coroutine(name: str, function: object) -> bool:
    return not name.startswith("_") and inspect.iscoroutinefunction(function)
