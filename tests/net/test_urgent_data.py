"""Urgent data (``MSG_OOB``) hides neither readable data nor EOF."""

from __future__ import annotations

import select
import socket

import pytest
import trio

from helpers.pairs import reset
from trisock import Socket


def act(raw: socket.socket, actions: str) -> None:
    """Send urgent data (``!``), normal data (``d``), FIN (``F``) or a reset (``R``), in order."""
    for action in actions:
        if action == "!":
            raw.send(b"!", socket.MSG_OOB)
        elif action == "d":
            raw.send(b"hello\n")
        elif action == "F":
            raw.shutdown(socket.SHUT_WR)
        else:
            reset(raw)


async def wait_for_event(sock: Socket, event: int) -> None:
    """Poll for an event that Trio cannot wait for."""
    poll = select.poll()
    poll.register(sock.fileno(), event)
    while not any(found & event for _, found in poll.poll(0)):
        await trio.lowlevel.checkpoint()


def unix_has_urgent_data() -> bool:
    a, b = socket.socketpair()
    with a, b:
        try:
            a.send(b"!", socket.MSG_OOB)
        except OSError:
            return False
        return True


@pytest.mark.parametrize("family", ["tcp", "unix"] if unix_has_urgent_data() else ["tcp"])
@pytest.mark.parametrize("actions", ["d", "!d", "d!", "!d!", "dF", "!dF", "d!F", "!!dF", "!F", "F"])
async def test_isopen_is_true_while_data_around_urgent_bytes_is_unread(
    actions: str, sock: Socket, raw: socket.socket
) -> None:
    act(raw, actions)
    if "d" in actions or "F" in actions:
        await trio.lowlevel.wait_readable(sock.fileno())
    expected = b"hello\n" * actions.count("d")
    got = b""
    # On a Unix socket, a second urgent byte turns the first into ordinary data.
    while len(expected) > len(got.replace(b"!", b"")):
        assert sock.isopen()
        got += await sock.recv(1)
    assert got.replace(b"!", b"") == expected
    if "F" in actions:
        while await sock.recv():
            pass
        assert not sock.isopen()
        assert await sock.recv() == b""
    else:
        assert sock.isopen()
        with trio.CancelScope() as scope:
            scope.cancel()
            await sock.recv()
        assert scope.cancelled_caught


@pytest.mark.parametrize("actions", ["R", "!R", "!dR", "dR"])
async def test_isopen_does_not_hide_a_reset_from_the_reader(
    actions: str, sock: Socket, raw: socket.socket
) -> None:
    act(raw, actions)
    await trio.lowlevel.wait_readable(sock.fileno())
    await wait_for_event(sock, select.POLLERR)
    for _ in range(3):
        assert sock.isopen() == ("d" in actions)
    if "d" in actions:
        assert await sock.recv() == b"hello\n"
    assert not sock.isopen()
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await sock.recv()


async def test_an_unread_urgent_byte_causes_no_reset_on_close(
    sock: Socket, raw: socket.socket
) -> None:
    act(raw, "!")
    await wait_for_event(sock, select.POLLPRI)
    await sock.send(b"answer")
    assert raw.recv(100) == b"answer"
    await sock.close()
    assert raw.recv(100) == b""


async def test_isopen_ignores_the_default_timeout(sock: Socket, raw: socket.socket) -> None:
    socket.setdefaulttimeout(30)
    try:
        act(raw, "!d")
        await trio.lowlevel.wait_readable(sock.fileno())
        assert sock.isopen()
        assert await sock.recv_until(b"\n") == b"hello\n"
        assert sock.isopen()
    finally:
        socket.setdefaulttimeout(None)
