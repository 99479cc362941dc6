"""Argument checks, and the formatting of arguments for error messages."""

from __future__ import annotations

import math
import operator
import re
from typing import TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"

# A label that is longer than this (characters) is not quoted: it may be a key or a token.
MAX_QUOTED_LABEL = 32


def quoted(value: object) -> str:
    """Format an argument for an error message; quote it only if it is unlikely to be a secret.

    A caller may pass a secret key by mistake in place of any argument, and error messages end up in
    logs.
    """
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        small = value.bit_length() <= 64
        return repr(value) if small else f"an int of {value.bit_length()} bits"
    if isinstance(value, str):
        labels = re.split(r"[.:]", value)
        plausible = re.fullmatch(r"[\w.:%\[\]-]{0,253}", value) and value.isprintable()
        if plausible and max(map(len, labels)) <= MAX_QUOTED_LABEL:
            return repr(value)
        return f"a str of {len(value)} characters"
    if isinstance(value, (bytes, bytearray)):
        return f"{type(value).__name__} ({len(value)} bytes)"
    return f"an object of type {type(value).__name__}"


def type_name(value: object) -> str:
    # Show only the type: the value may be a secret key that was passed by mistake.
    return f"a {type(value).__name__}"


def check_bool(name: str, value: object) -> None:
    """Raise ``TypeError`` unless the value is a bool."""
    # Reject None, although it is falsy: it may come from an option that the program never set, and
    # treating it as False might disable a check.
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type_name(value)}")


def bytes_view(data: object) -> memoryview:
    """Return a flat view of bytes, a bytearray or a memoryview. Other types raise ``TypeError``."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"expected bytes, bytearray or memoryview, not {type(data).__name__}")
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 and view.contiguous else _flat(view)


def delimiter_bytes(data: Buffer) -> bytes:
    delimiter = bytes(bytes_view(data))
    if not delimiter:
        raise ValueError("a delimiter must have at least one byte")
    return delimiter


def _flat(view: memoryview) -> memoryview:
    return view.cast("B") if view.c_contiguous else memoryview(bytes(view))


def positive_int(name: str, value: int) -> int:
    """Return a positive value as an int. Other values raise ``TypeError`` or ``ValueError``."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {quoted(value)}") from None
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {quoted(value)}")
    return value


def seconds_or_inf(name: str, seconds: float | None) -> float:
    """Return a timeout (seconds) as a float, or ``math.inf`` if the timeout is ``None``."""
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {quoted(seconds)}")
    if not seconds >= 0:
        raise ValueError(f"{name} must be 0 or more, not {quoted(seconds)}")
    try:
        return float(seconds)
    except OverflowError:
        raise ValueError(f"{name} is too long: {quoted(seconds)}") from None
