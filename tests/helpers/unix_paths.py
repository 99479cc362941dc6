"""Listeners on Unix paths, and stale socket files."""

from __future__ import annotations

import socket
from pathlib import Path

import trisock


def leave_stale(path: Path) -> None:
    """Create a stale socket file: nothing listens on it."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def accepts(listener: trisock.Listener, path: Path) -> bool:
    """Connect, and return whether the listener has the connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return listener.hasconnection()


def listen_once(path: Path, mode: int | None = None) -> None:
    """Check that a listener on the path accepts, and close it."""
    listener = trisock.listen_unix_nowait(path, mode=mode)
    assert accepts(listener, path)
    listener.abort()
