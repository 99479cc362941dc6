"""The output of the command: stdout and stderr, which may be terminals."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

from rich.console import Console


def terminal(stream: TextIO | None) -> Console | None:
    """Return a console for ``sys.stdout`` or ``sys.stderr``, or ``None`` if it is no terminal."""
    if stream is None or not stream.isatty():
        return None
    return Console(file=stream, highlight=False)


def plain_console() -> Console:
    """Return a console for stdout that writes plain text, unless stdout is a terminal."""
    return terminal(sys.stdout) or Console(force_terminal=False, no_color=True, highlight=False)


def say(text: str) -> None:
    """Write a line to stderr. An error is ignored: there is nowhere to report it."""
    if sys.stderr is not None:
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            discard(sys.stderr)  # otherwise Python would try again at exit, with status 120


def notify(text: str) -> None:
    """Write a line to stderr if it is a terminal: scripts have no use for it."""
    if terminal(sys.stderr) is not None:
        say(text)


def show(text: str) -> None:
    """Write a line to stdout at once, so that a pipe's reader sees it."""
    print(text, flush=True)


def flush() -> None:
    """Write what is still buffered. Raises ``OSError`` if it cannot be written."""
    if sys.stdout is not None:
        sys.stdout.flush()


def descriptor(stream: TextIO | None) -> int | None:
    """Return the descriptor of ``sys.stdin`` or ``sys.stdout``, or ``None`` if it is closed."""
    # If the stream is closed, the number of its descriptor may belong to a socket by now.
    return None if stream is None else stream.fileno()


def escape_unencodable() -> None:
    """Let stdout escape the characters that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Discard all further output to stdout or stderr, for example because nobody reads it."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
