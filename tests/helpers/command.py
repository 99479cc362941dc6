"""Types for tests of the command: how to call it, its results, and the servers to check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """The exit status and the output of the command."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@dataclass(frozen=True)
class Servers:
    """The URLs of three servers. One certificate expires soon, and one has the wrong name.

    ``ca``: the file with their authority's certificate.
    """

    ca: Path
    good: str
    soon: str
    wrong: str
