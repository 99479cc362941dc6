"""Read and write the descriptors of a terminal, a pipe or a file, without blocking Trio.

The descriptors stay in blocking mode, because other programs, such as the shell, share them.
"""

from __future__ import annotations

import codecs
import io
import os
import re

import trio

from .._text import printable

_CHUNK = 65536  # bytes


async def read(descriptor: int) -> bytes:
    """Read the next bytes. Return ``b""`` at EOF.

    A cancelled read consumes nothing, unless a thread reads (see below).
    """
    try:
        await trio.lowlevel.wait_readable(descriptor)
    except OSError:
        # epoll does not wait for regular files, and Windows waits for sockets only. So a thread
        # reads. If the read is cancelled, the abandoned thread may still consume input.
        return await trio.to_thread.run_sync(os.read, descriptor, _CHUNK, abandon_on_cancel=True)
    return os.read(descriptor, _CHUNK)


async def write(descriptor: int, data: bytes) -> None:
    """Write all bytes. If this is cancelled, an unknown part of the bytes is written."""
    # Write in a thread: a writable descriptor may have less room than the data needs, and a
    # blocking write would then block Trio.
    await trio.to_thread.run_sync(_write_all, descriptor, data, abandon_on_cancel=True)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class TerminalText:
    """Converts a peer's bytes to text that is safe to show on a terminal.

    A control character can move the cursor, change the window's title, or make some terminals send
    input to the shell. So all control characters are escaped, except line feeds and tabs. CRLF and
    a lone CR become a line feed.
    """

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)

    def convert(self, data: bytes, *, final: bool = False) -> bytes:
        """Convert the next bytes. An incomplete character is kept back, unless ``final``."""
        text: str = self._decoder.decode(data, final)
        parts = re.split("([\n\t])", text)
        safe = "".join(part if part in ("\n", "\t") else printable(part) for part in parts)
        return safe.encode()
