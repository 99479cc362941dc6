"""The Python snippets of the documentation: as programs, and as modules for a type checker.

A snippet that runs something at its end is a program. Any other snippet is a part of a program. For
a type checker, ``as_module`` puts a part into an async function, in which the names of
``SURROUNDINGS`` exist.
"""

from __future__ import annotations

import re
import textwrap

from helpers.documents import ROOT

# The names that parts use. The text of a page explains them, but no snippet defines them.
SURROUNDINGS = """
from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio
import trisock
from trisock import Socket, hammerspoon, pluto
from trisock.testing import check_handler, faults, serving

certificate: trisock.Certificate
listener: pluto.listener
nursery: trio.Nursery
rows: list[object] = []
server: trisock.Server
sock: trisock.Socket
tls: trisock.ServerTLS


async def answer(request: bytes) -> bytes: ...
async def deliver_mail(database: object) -> None: ...
async def handler(sock: trisock.Socket) -> None: ...
async def reply(sock: trisock.Socket, data: bytes) -> bool: ...
async def session(sock: trisock.Socket) -> None: ...
async def smtp(sock: trisock.Socket) -> None: ...
def forget_everything_said_so_far() -> None: ...
def is_banned(address: trisock.Address) -> bool: ...
def open_database() -> contextlib.AbstractAsyncContextManager[object]: ...
def serve(s: Any) -> None: ...
"""

PROGRAM = re.compile(r"^(?:    )?(?:trio|trisock|asyncio|sched)\.run\(", re.MULTILINE)


def snippets(page: str) -> list[str]:
    """Return the Python snippets of a page, such as ``"docs/tls.md"``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def is_program(snippet: str) -> bool:
    return PROGRAM.search(snippet) is not None or "import socket\n" in snippet


def as_module(snippet: str) -> str:
    if is_program(snippet):
        return snippet
    return f"{SURROUNDINGS}\n\nasync def part() -> None:\n{textwrap.indent(snippet, '    ')}"
