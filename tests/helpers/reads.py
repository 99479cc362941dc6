"""Every way to read from a Socket. A new read method needs an entry in READS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from trisock import Socket

Read = Callable[[Socket], Awaitable[object]]

# Each key starts with the name of the method. tests/project/test_reads.py finds missing methods.
READS: dict[str, Read] = {
    "recv": lambda sock: sock.recv(),
    "recv a part": lambda sock: sock.recv(1),
    "peek": lambda sock: sock.peek(),
    "recv_exactly": lambda sock: sock.recv_exactly(1),
    "recv_exactly nothing": lambda sock: sock.recv_exactly(0),
    "recv_until": lambda sock: sock.recv_until(b"\n"),
    "lines": lambda sock: anext(sock.lines()),
    "receive_some": lambda sock: sock.receive_some(),
    "__anext__": lambda sock: anext(sock),
}
