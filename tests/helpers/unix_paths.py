"""Listeners on Unix paths, and stale socket files."""

from __future__ import annotations

import socket
from pathlib import Path

import trisock


def leave_stale(path: Path) -> None:
    """Create a socket file that nothing listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def accepts(listener: trisock.Listener, path: Path) -> bool:
    """Connect to a path. Return whether the listener received the connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return listener.hasconnection()


def listen_once(path: Path, mode: int | None = None) -> None:
    """Listen on the path, check that a connection arrives, and close the listener."""
    listener = trisock.listen_unix_nowait(path, mode=mode)
    assert accepts(listener, path)
    listener.abort()
