"""Argument checks of ``trisock.hammerspoon``.

No error message quotes an argument: it may be a password, or a key passed as the wrong argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    except UnicodeEncodeError as exc:  # the repr of this exception contains the whole text
        raise ValueError(
            f"the character at index {exc.start} cannot be sent: {exc.reason}"
        ) from None


def check_callback(fn: object) -> Callable[..., object] | None:
    """Return a callback. Raises ``TypeError`` if it cannot be called."""
    if fn is None or callable(fn):
        return fn
    raise TypeError(f"a callback must be a function, not {type(fn).__name__}")


def check_flag(flag: object) -> None:
    """Raise ``TypeError`` if a flag is not a bool."""
    if not isinstance(flag, bool):
        raise TypeError(f"a flag must be True or False, not {type(flag).__name__}")


def parse_send(
    has_peer: bool, arguments: Sequence[object], named: Mapping[str, object]
) -> tuple[str | None, int, int, Callable[..., object] | None]:
    """Parse what follows the data of ``hs.socket.udp:send``: ``[host, port][, tag][, fn]``.

    Returns: the host, the port, the tag and the callback. If the object is connected to a peer, the
    host is ``None`` and the port is 0.
    """
    names = ["tag", "fn"] if has_peer else ["host", "port", "tag", "fn"]
    given: dict[str, object] = dict(zip(names, arguments, strict=False))
    is_mistaken = len(arguments) > len(names) or not given.keys().isdisjoint(named)
    given.update(named)
    if is_mistaken or not given.keys() <= {*names}:
        raise TypeError(f"send takes the data and at most {', '.join(names)}")
    host, port = given.get("host"), given.get("port")
    tag, fn = given.get("tag"), given.get("fn")
    if fn is None and callable(tag):
        tag, fn = None, tag
    if not has_peer and not (isinstance(host, str) and is_int(port)):
        kinds = f"{type(host).__name__}, {type(port).__name__}"
        raise TypeError(f"it is not connected: send needs a host and a port, not {kinds}")
    if not (tag is None or is_int(tag)):
        more = ": it is connected, so send takes no host and port" if isinstance(tag, str) else ""
        raise TypeError(f"a tag must be an int, not {type(tag).__name__}{more}")
    tag, fn = -1 if tag is None else tag, check_callback(fn)
    return (host, port, tag, fn) if isinstance(host, str) and is_int(port) else (None, 0, tag, fn)


def check_tag(tag: object) -> int:
    """Return a tag: -1 for ``None``. Raises ``TypeError`` if it is not an int."""
    if tag is None:
        return -1
    if not is_int(tag):
        raise TypeError(f"a tag must be an int, not {type(tag).__name__}")
    return tag


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
    """Format ``host:port``, or a path, for the log. Hide implausible values: they may be keys."""
    if port is None:
        return host if len(host) < 108 and host.isprintable() else "no path"
    plausible = len(host) < 256 and not host.split()[1:] and max(map(len, host.split("."))) < 64
    return f"{host if plausible else 'no host'}:{port}"
