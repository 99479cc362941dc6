"""Escape untrusted text for one line of a log, an error message or a repr."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape unprintable characters, as ``repr`` does.

    Unprintable characters are control characters, line ends (also U+0085, U+2028 and U+2029),
    bidirectional controls and lone surrogates. So the result is one line that every Unicode codec
    can encode.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
