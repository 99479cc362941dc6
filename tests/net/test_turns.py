"""Turns to send, and the ends of sockets that meet them."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import clog, closing, raw_pair, tcp_pair, unix_pair
from trisock import Socket
from trisock._net import syscalls as _syscalls
from trisock._net.conflicts import SendLock
from trisock._server import server as _server


async def test_a_sender_that_is_cancelled_while_it_waits_leaves_no_conflict() -> None:
    turn = SendLock("busy")
    await turn.acquire()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            async with turn:
                raise AssertionError("the turn is another's")

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    turn.check()
    turn.release()
    async with turn:
        pass


async def test_a_broadcast_that_is_cut_short_leaves_an_upgrade_behind_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await clog(a)
        delivered: list[bool] = []

        async def broadcast() -> None:
            delivered.append(await a._connection.broadcast(b"news", a._connection.generation, 5))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(broadcast)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BrokenResourceError):
                await a.starttls("example.org", handshake_timeout=20)
        assert delivered == [False]


async def test_an_abort_resets_where_only_linger_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_syscalls, "_connect", None)
    monkeypatch.setattr(_syscalls, "_has_forked", False)
    a, b = await tcp_pair()
    async with closing(a, b):
        a.abort()
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await b.recv()


async def test_several_buffers_on_a_stream_closed_below_are_not_sent() -> None:
    sock, raw = raw_pair()
    with raw:
        sock.stream.socket.close()
        with pytest.raises(trio.ClosedResourceError):
            await sock.send(b"one", b"two")
        await sock.close()


async def test_after_a_quiet_minute_a_shortage_is_reported_anew(
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def handler(sock: Socket) -> None:
        raise AssertionError("nobody comes")

    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(_server, "_REPORT_SECONDS", 5)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        for _ in range(2):
            server._exhaustion = "EMFILE (too many open files)"
            await server._report_exhaustion()
            assert server._exhaustion is None
        nursery.cancel_scope.cancel()
    assert len(caplog.records) == 2
