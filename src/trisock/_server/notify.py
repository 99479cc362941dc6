"""ServiceManager: tell systemd about the state of this program (the protocol of sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

import trio

from .. import _fork, _guard
from .._address import format_unix_path
from .._net.syscalls import SEND_FLAGS
from .._net.unix_path import unix_socket
from .._text import format_seconds, printable

READY = b"READY=1"
STOPPING = b"STOPPING=1"
WATCHDOG = b"WATCHDOG=1"

# If systemd does not read its messages for this many seconds, a message is dropped.
_SEND_TIMEOUT = 5

_logger = logging.getLogger("trisock.server")


def reloading(now_ns: int) -> bytes:
    """Return the message that tells systemd that a reload has begun.

    Args:
      now_ns: the time of CLOCK_MONOTONIC in nanoseconds. systemd compares it with the time at which
        it sent SIGHUP (``Type=notify-reload``).
    """
    return b"RELOADING=1\nMONOTONIC_USEC=%d" % (now_ns // 1000)


def socket_address(path: str) -> str | None:
    """Return the address for connect(2) of a ``NOTIFY_SOCKET``, or ``None`` if it is invalid."""
    if path.startswith("@") and len(path) > 1:
        return "\0" + path[1:]  # a name in the abstract namespace
    return path if path.startswith("/") else None


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds between two watchdog messages, or ``None`` if systemd wants none.

    Without a message for a certain time, systemd considers the program hung. The interval is half
    of this time, as sd_watchdog_enabled(3) recommends.

    Args:
      environment: ``WATCHDOG_USEC`` is that time in microseconds. If ``WATCHDOG_PID`` is set, the
        watchdog is for that process only.
      pid: the ID of this process.

    Raises: ValueError, if a variable is not a positive number.
    """
    if "WATCHDOG_USEC" not in environment:
        return None
    microseconds = _positive(environment, "WATCHDOG_USEC")
    if "WATCHDOG_PID" in environment and _positive(environment, "WATCHDOG_PID") != pid:
        return None
    return microseconds / 2e6


def _positive(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    # A 64-bit number has at most 20 digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) > 0):
        raise ValueError(f"{name} is not a positive number: {printable(text)}")
    return int(text)


class ServiceManager:
    """The connection to systemd. If systemd has not started this program, the methods do nothing.

    A failure never affects the program. Of several failures in a row, only the first is logged. A
    forked child sends nothing, because systemd would mistake its messages for the parent's.

    Args:
      environment: ``os.environ``, with ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._forks = _fork.count
        self._failing = False
        self._address: str | None = None
        self._watchdog: float | None = None
        path = environment.get("NOTIFY_SOCKET")
        if not path:
            return
        self._address = socket_address(path)
        if self._address is None:
            self._warn("NOTIFY_SOCKET is not a Unix socket: %s", printable(path))
            return
        try:
            self._watchdog = watchdog_interval(environment, os.getpid())
        except ValueError as exc:
            self._warn("%s", _guard.text(exc))

    async def notify(self, message: bytes, timeout: float = _SEND_TIMEOUT) -> None:
        """Send a message. This takes at most ``timeout`` seconds, and is a checkpoint.

        If systemd's queue has room, the message is sent before any other task runs.
        """
        if self._address is None or self._forks != _fork.count:
            await trio.lowlevel.checkpoint()
            return
        try:
            with trio.fail_after(timeout):
                await _send(self._address, message)
        except OSError as exc:
            self._failed(_guard.text(exc))
        except trio.TooSlowError:
            self._failed(f"it has read no messages for {format_seconds(timeout)}")
        else:
            self._failing = False

    def _failed(self, why: str) -> None:
        if not self._failing:
            self._failing = True
            self._warn(
                "cannot notify systemd at %s: %s", format_unix_path(self._address or ""), why
            )

    async def notify_reloading(self) -> None:
        """Tell systemd that a reload has begun. After the reload, send ``READY``."""
        await self.notify(reloading(time.monotonic_ns()))

    async def feed_watchdog(self) -> None:
        """If systemd wants watchdog messages, send them until cancelled."""
        if self._watchdog is None:
            return
        while True:
            await self.notify(WATCHDOG)
            await trio.sleep(self._watchdog)

    def _warn(self, message: str, *args: object) -> None:
        _guard.log(_logger, logging.WARNING, message, *args)


async def _send(address: str, message: bytes) -> None:
    with unix_socket(address, socket.SOCK_DGRAM) as sock:
        sock.connect(address)  # never waits: the socket sends datagrams
        await trio.socket.from_stdlib_socket(sock).send(message, SEND_FLAGS)
