"""Checks of what ``trisock.hammerspoon``'s calls are given.

No error quotes an argument: it may be a password, or a key in the wrong place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard


def is_int(value: object) -> TypeGuard[int]:
    """Return whether it is a number, and not a bool, which is an int to Python."""
    return isinstance(value, int) and not isinstance(value, bool)


def to_wanted(delimiter: object) -> int | bytes:
    """Return what a read waits for: a number of bytes, or a delimiter."""
    if isinstance(delimiter, bool):
        raise TypeError("a read takes a number of bytes or a delimiter, not a bool")
    wanted = delimiter if isinstance(delimiter, int) else to_bytes(delimiter)
    if wanted == b"" or (isinstance(wanted, int) and wanted < 0):
        raise ValueError("a read takes a number of bytes or a delimiter of at least one byte")
    return wanted


def to_bytes(data: object) -> bytes:
    """Return data as bytes; a copy of what can change."""
    if not isinstance(data, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"data is bytes or str, not {type(data).__name__}")
    if not isinstance(data, str):
        return bytes(data)
    try:
        return data.encode()
    except UnicodeEncodeError as exc:  # its repr has all of the text
        raise ValueError(f"the character at {exc.start} cannot be sent: {exc.reason}") from None


def check_callback(fn: Callable[..., object] | None) -> Callable[..., object] | None:
    """Return a callback; ``TypeError`` if it cannot be called."""
    if fn is not None and not callable(fn):
        raise TypeError(f"a callback is a function, not {type(fn).__name__}")
    return fn


def check_timeout(timeout: object) -> float:
    """Return a number of seconds; ``TypeError`` or ``ValueError`` if it is none."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"a timeout is a number of seconds, not {type(timeout).__name__}")
    try:
        if math.isnan(timeout):
            raise TypeError("a timeout is a number of seconds, not NaN")
    except OverflowError:
        raise ValueError("a timeout is a number of seconds, and no larger than a float") from None
    return timeout


def where(host: str, port: int | None) -> str:
    """Return how the log calls a host or a path; not what cannot be one: that may be a key."""
    if port is None:
        return host if len(host) < 108 and host.isprintable() else "no path"
    plausible = len(host) < 256 and not host.split()[1:] and max(map(len, host.split("."))) < 64
    return f"{host if plausible else 'no host'}:{port}"
