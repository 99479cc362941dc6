"""Format text for one line of a log, an error message or a repr."""

from __future__ import annotations

from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


def printable(text: str) -> str:
    """Escape unprintable characters, as ``repr`` does.

    Unprintable characters are control characters, line ends (also U+0085, U+2028 and U+2029),
    bidirectional controls and lone surrogates. So the result is one line that every Unicode codec
    can encode.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def format_seconds(number: float) -> str:
    """Format a duration: ``1 second``, ``0.5 seconds``. Round ``58.743127`` to ``58.7``."""
    shown = round(number, 1) if number > 10 else float(f"{number:.3g}")
    return f"{shown:.12g} second{'' if shown == 1 else 's'}"


def set_message(error: ErrorT, message: str, *, without_peer: str) -> ErrorT:
    """Set the message of our own error, and return the error.

    ``without_peer``: the message without the peer's address, for log lines that begin with the
    address.
    """
    error.args = (message,)
    vars(error)["_without_peer"] = without_peer
    return error


def message_without_peer(exc: BaseException) -> str | None:
    """Return the ``without_peer`` of ``set_message``, as one line, or ``None`` if there is none."""
    try:
        return printable(vars(exc)["_without_peer"])
    except Exception:  # a user's exception class may raise any error here
        return None
