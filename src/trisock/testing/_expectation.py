"""What a Script expects to receive: bytes, or a match of a pattern. No I/O."""

from __future__ import annotations

import re
from typing import Protocol

# A pattern is tried after each byte, so the cost grows with the square of this limit. A pattern
# that starts with ``.*`` takes 80 ms for 16 KiB without a match.
MAX_PATTERN_BYTES = 16384

# An error shows at most this many bytes.
_SHOWN_BYTES = 120

# At most this many of the shown bytes come before the first difference.
_SHOWN_BEFORE = 20


class Mismatch(Exception):
    """No further bytes can fulfil the expectation. The message follows "expected X, but"."""


class Expectation(Protocol):
    """What is expected next. ``str()`` describes the expectation for an error."""

    def find(self, received: bytearray, tried: int) -> int | None:
        """Return how many bytes fulfil the expectation, or None if more bytes are needed.

        Args:
          received: the bytes from the current position on.
          tried: how many of these bytes earlier calls have examined.

        Raises ``Mismatch`` if more bytes cannot help.
        """


class Literal:
    """Exactly these bytes."""

    def __init__(self, expected: bytes) -> None:
        if not expected:
            raise ValueError("expect needs at least one byte; to expect the end, use expect_eof")
        self._expected = expected

    def __str__(self) -> str:
        return shown(self._expected)

    def find(self, received: bytearray, tried: int) -> int | None:
        """See ``Expectation``."""
        expected = self._expected
        size = min(len(expected), len(received))
        if received[tried:size] == expected[tried:size]:
            return size if size == len(expected) else None
        first = next(i for i in range(tried, size) if received[i] != expected[i])
        if first <= _SHOWN_BEFORE:
            raise Mismatch(f"{shown(received)} came")
        start = first - _SHOWN_BEFORE
        raise Mismatch(
            f"the first difference is at byte {first}: expected {shown(expected, start)}, but "
            f"{shown(received, start)} came"
        )


class Pattern:
    """The shortest match of a pattern at the start of the unread bytes."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern

    def __str__(self) -> str:
        return f"a match of {shown(self._pattern.pattern)}"

    def find(self, received: bytearray, tried: int) -> int | None:
        """See ``Expectation``."""
        match = self._pattern.match
        for end in range(tried + 1, min(len(received), MAX_PATTERN_BYTES) + 1):
            found = match(received, 0, end)
            if found:
                return found.end()
        if len(received) >= MAX_PATTERN_BYTES:
            raise Mismatch(f"none ended within {MAX_PATTERN_BYTES} bytes: {shown(received)} came")
        return None


def expectation(expected: object) -> Expectation:
    """Turn the argument of ``Script.expect`` into an Expectation."""
    if isinstance(expected, re.Pattern) and isinstance(expected.pattern, bytes):
        return Pattern(expected)
    if isinstance(expected, (bytes, bytearray, memoryview)):
        return Literal(bytes(expected))
    kind = "pattern of str" if isinstance(expected, re.Pattern) else type(expected).__name__
    raise TypeError(f"expect takes bytes or a compiled pattern of bytes, not a {kind}")


def shown(data: bytes | bytearray, start: int = 0) -> str:
    """Show data in an error: at most 120 bytes from an offset on, and how many more there are."""
    end = start + _SHOWN_BYTES
    text = ("... " if start else "") + repr(bytes(data[start:end]))
    return f"{text} and {len(data) - end} more bytes" if len(data) > end else text
