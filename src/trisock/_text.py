"""Text from outside, made safe for one line of a log, an error or a repr."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape what is not printable, as ``repr`` does, and leave the rest.

    Escaped are control characters, line ends (U+0085, U+2028 and U+2029 too), bidirectional
    controls and lone surrogates: the result is one line, and every codec of Unicode takes it.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
