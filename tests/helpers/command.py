"""The command in the tests: how it is called, what it did, and servers for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What the command did."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@dataclass(frozen=True)
class Servers:
    """Three servers: good, with a certificate of 5 days, and with one for another name.

    ``ca``: the file of their authority.
    """

    ca: Path
    good: str
    soon: str
    wrong: str
