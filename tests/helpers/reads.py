"""Every way to read from a Socket. A new read method needs an entry in READS.

The reads of frames use a header of one byte, so they read the first letter of a text as a length.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from trisock import Socket

Read = Callable[[Socket], Awaitable[object]]

# A line, and a frame with a header of one byte: data for one call of any read.
ITEM = b"\5line\n"


# The reads that wait if nothing has arrived.
def waits(key: str) -> bool:
    return key not in ("peek", "recv_exactly nothing")


# Each key starts with the name of the method. tests/project/test_reads.py finds missing methods.
READS: dict[str, Read] = {
    "recv": lambda sock: sock.recv(),
    "recv a part": lambda sock: sock.recv(1),
    "peek": lambda sock: sock.peek(),
    "peek and wait": lambda sock: sock.peek(wait=True),
    "recv_exactly": lambda sock: sock.recv_exactly(1),
    "recv_exactly nothing": lambda sock: sock.recv_exactly(0),
    "recv_until": lambda sock: sock.recv_until(b"\n"),
    "recv_line": lambda sock: sock.recv_line(),
    "skip_until": lambda sock: sock.skip_until(b"\n"),
    "recv_frame": lambda sock: sock.recv_frame(1),
    "lines": lambda sock: anext(sock.lines()),
    "lines while idle": lambda sock: anext(sock.lines(idle=True)),
    "batches": lambda sock: anext(sock.lines().batches()),
    "batches while idle": lambda sock: anext(sock.lines(idle=True).batches()),
    "frames": lambda sock: anext(sock.frames(1)),
    "frames while idle": lambda sock: anext(sock.frames(1, idle=True)),
    "receive_some": lambda sock: sock.receive_some(),
    "__anext__": lambda sock: anext(sock),
}
