"""What ``_udp.syscalls`` does on Windows, with a fake socket: these tests run on Linux too."""

from __future__ import annotations

import errno
import importlib.util
import socket
import sys
from types import ModuleType
from typing import Any

import pytest

SENDER = ("192.0.2.1", 9)

# The errors with which Windows reports ICMP for an earlier send.
icmp_errors = pytest.mark.parametrize("number", [errno.ECONNRESET, errno.ENETRESET])


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, as it is on Windows."""
    spec = importlib.util.find_spec("trisock._udp.syscalls")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "platform", "win32")
    spec.loader.exec_module(module)
    return module


class FakeSocket:
    """A socket whose ``recvfrom`` raises the errors first."""

    def __init__(self, *errnos: int) -> None:
        self.left = list(errnos)

    def getpeername(self) -> tuple[str, int]:
        return SENDER

    def recvfrom(self, size: int) -> tuple[bytes, Any]:
        assert size == 65535  # a longer datagram would be lost
        if self.left:
            raise OSError(self.left.pop(0), "refused")
        return b"hello", SENDER


def test_a_datagram_is_truncated(windows: ModuleType) -> None:
    receive = windows.receiver(FakeSocket(), False)
    assert receive(5, 256) == (b"hello", [], 0, SENDER)
    assert receive(4, 256) == (b"hell", [], windows.MSG_TRUNC, SENDER)


@icmp_errors
def test_icmp_errors_do_not_reach_a_socket_without_a_peer(windows: ModuleType, number: int) -> None:
    receive = windows.receiver(FakeSocket(number, number), False)
    assert receive(5, 256)[0] == b"hello"


@icmp_errors
def test_icmp_errors_reach_a_socket_with_one_peer(windows: ModuleType, number: int) -> None:
    receive = windows.receiver(FakeSocket(number), True)
    with pytest.raises(OSError, match="refused"):
        receive(5, 256)
    assert receive(5, 256)[0] == b"hello"


@pytest.mark.parametrize("number", [errno.EBADF, errno.EAGAIN])
def test_other_errors_are_raised(windows: ModuleType, number: int) -> None:
    with pytest.raises(OSError, match="refused"):
        windows.receiver(FakeSocket(number), False)(5, 256)


def test_a_source_cannot_be_chosen(windows: ModuleType) -> None:
    item = (socket.IPPROTO_IP, 0, b"")
    with pytest.raises(OSError, match="this system cannot choose the source of a datagram"):
        windows.send_to(FakeSocket(), b"x", item, SENDER)
