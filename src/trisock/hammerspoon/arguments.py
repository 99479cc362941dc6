"""Argument checks of ``trisock.hammerspoon``.

No error message quotes an argument: it may be a password, or a key passed as the wrong argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard


def is_int(value: object) -> TypeGuard[int]:
    """Return whether the value is an int but not a bool (a subclass of int)."""
    return isinstance(value, int) and not isinstance(value, bool)


def parse_delimiter(delimiter: object) -> int | bytes:
    """Return what ends a read: a number of bytes, or a delimiter."""
    if isinstance(delimiter, bool):
        raise TypeError("a read takes a number of bytes or a delimiter, not a bool")
    until = delimiter if isinstance(delimiter, int) else to_bytes(delimiter)
    if until == b"" or (isinstance(until, int) and until < 0):
        raise ValueError("a read takes a number of bytes or a delimiter of at least one byte")
    return until


def to_bytes(data: object) -> bytes:
    """Return data as bytes. Mutable data is copied."""
    if not isinstance(data, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"data must be bytes or str, not {type(data).__name__}")
    if not isinstance(data, str):
        return bytes(data)
    try:
        return data.encode()
    except UnicodeEncodeError as exc:  # its repr contains the whole text
        raise ValueError(
            f"the character at index {exc.start} cannot be sent: {exc.reason}"
        ) from None


def check_callback(fn: Callable[..., object] | None) -> Callable[..., object] | None:
    """Return a callback. Raises ``TypeError`` if it cannot be called."""
    if fn is not None and not callable(fn):
        raise TypeError(f"a callback must be a function, not {type(fn).__name__}")
    return fn


def check_timeout(timeout: object) -> float:
    """Return a timeout (seconds). Raises ``TypeError`` or ``ValueError`` if it is invalid."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"a timeout must be a number of seconds, not {type(timeout).__name__}")
    try:
        if math.isnan(timeout):
            raise TypeError("a timeout must be a number of seconds, not NaN")
    except OverflowError:
        raise ValueError("a timeout must be a number of seconds that fits into a float") from None
    return timeout


def describe_target(host: str, port: int | None) -> str:
    """Format ``host:port``, or a path, for the log. Hide implausible values, which may be keys."""
    if port is None:
        return host if len(host) < 108 and host.isprintable() else "no path"
    plausible = len(host) < 256 and not host.split()[1:] and max(map(len, host.split("."))) < 64
    return f"{host if plausible else 'no host'}:{port}"
