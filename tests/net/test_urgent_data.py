"""Urgent data (``MSG_OOB``) hides neither what can be read nor the end."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable

import pytest
import trio

from helpers.pairs import closing, raw_pair
from trisock import Socket


def raw_unix_pair() -> tuple[Socket, socket.socket]:
    ours, raw = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    return Socket(stream, side="server"), raw


def say(raw: socket.socket, what: str) -> None:
    """Do one thing after another: send urgent or plain bytes, end, reset."""
    for each in what:
        if each == "!":
            raw.send(b"!", socket.MSG_OOB)
        elif each == "d":
            raw.send(b"hello\n")
        elif each == "F":
            raw.shutdown(socket.SHUT_WR)
        else:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()


async def event(sock: Socket, event: int) -> None:
    """Wait until the kernel reports an event that Trio does not wait for."""
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


PAIRS: dict[str, Callable[[], tuple[Socket, socket.socket]]] = {
    "tcp": raw_pair,
    **({"unix": raw_unix_pair} if unix_has_urgent_data() else {}),
}


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("what", ["d", "!d", "d!", "!d!", "dF", "!dF", "d!F", "!!dF", "!F", "F"])
async def test_a_socket_is_open_until_all_is_read_around_urgent_data(
    what: str, family: str
) -> None:
    sock, raw = PAIRS[family]()
    async with closing(sock):
        with raw:
            await reads_all(sock, raw, what)


async def reads_all(sock: Socket, raw: socket.socket, what: str) -> None:
    say(raw, what)
    if "d" in what or "F" in what:
        await trio.lowlevel.wait_readable(sock.fileno())
    got = b""
    # On a Unix socket a second urgent byte makes ordinary data of the first.
    while what.count("d") * 6 > len(got.replace(b"!", b"")):
        assert sock.isopen()
        got += await sock.recv(1)
    assert got.replace(b"!", b"") == b"hello\n" * what.count("d")
    if "F" in what:
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


async def test_a_question_takes_no_reset_away_from_the_reader() -> None:
    for what in ("R", "!R", "!dR", "dR"):
        sock, raw = raw_pair()
        async with closing(sock):
            say(raw, what)
            await trio.lowlevel.wait_readable(sock.fileno())
            await event(sock, select.POLLERR)
            for _ in range(3):
                assert sock.isopen() == ("d" in what)
            if "d" in what:
                assert await sock.recv() == b"hello\n"
            assert not sock.isopen()
            for _ in range(2):
                with pytest.raises(trio.BrokenResourceError, match="reset"):
                    await sock.recv()


async def test_an_urgent_byte_does_not_make_a_close_reset() -> None:
    sock, raw = raw_pair()
    with raw:
        say(raw, "!")
        await event(sock, select.POLLPRI)
        await sock.send(b"answer")
        assert raw.recv(100) == b"answer"
        await sock.close()
        assert raw.recv(100) == b""


async def test_isopen_does_not_wait_whatever_the_default_timeout() -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        socket.setdefaulttimeout(30)
        try:
            say(raw, "!d")
            await trio.lowlevel.wait_readable(sock.fileno())
            assert sock.isopen()
            assert await sock.recv_until(b"\n") == b"hello\n"
            assert sock.isopen()
        finally:
            socket.setdefaulttimeout(None)
        raw.close()
