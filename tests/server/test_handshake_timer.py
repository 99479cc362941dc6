"""The time limit of a server's TLS handshakes."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

import trisock
from helpers.server import echo
from trisock import ClientTLS, ServerTLS
from trisock._net.connection import Connection
from trisock._server.server import Server
from trisock.testing import serving
from trisock.testing._serving import Serving


async def silent_client(s: Serving) -> trisock.Socket:
    """Return a client that sends nothing, after the server has begun to wait for its handshake."""
    before = s.server.stats().active
    client = await s.connect(tls=None)
    while s.server.stats().active == before:
        await trio.lowlevel.checkpoint()
    return client


async def test_a_handshake_with_a_silent_client_times_out(
    server_tls: ServerTLS,
    jumping_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trisock.server")
    async with serving(echo, tls=server_tls, handshake_timeout=3) as s:
        async with await silent_client(s) as client:
            assert await client.recv() == b""
            assert 3 <= trio.current_time() < 4
            (record,) = caplog.records
            why = f"TLS handshake with {client.getlocal()} failed: not finished within 3 seconds"
            assert record.getMessage() == why
            assert record.levelno == logging.INFO
    assert s.server.stats().failed_handshakes == 1


async def test_each_handshake_has_the_whole_time_limit(
    server_tls: ServerTLS, mock_clock: trio.testing.MockClock
) -> None:
    async with serving(echo, tls=server_tls, handshake_timeout=10) as s:
        async with await silent_client(s) as first:
            mock_clock.jump(6)
            async with await silent_client(s) as second:
                mock_clock.jump(6)
                assert await first.recv() == b""
                await trio.testing.wait_all_tasks_blocked()
                assert await second.peek() is None
                mock_clock.jump(6)
                assert await second.recv() == b""


async def test_a_finished_handshake_has_no_time_limit(
    client_tls: ClientTLS, server_tls: ServerTLS, mock_clock: trio.testing.MockClock
) -> None:
    async with serving(echo, tls=server_tls, handshake_timeout=10) as s:
        async with await silent_client(s) as silent, await s.connect(tls=client_tls) as client:
            mock_clock.jump(20)
            assert await silent.recv() == b""
            await client.send(b"still there")
            assert await client.recv() == b"still there"


async def test_the_time_limit_holds_while_the_client_sends_slowly(
    server_tls: ServerTLS, mock_clock: trio.testing.MockClock
) -> None:
    async with serving(echo, tls=server_tls, handshake_timeout=10) as s:
        async with await silent_client(s) as client:
            for byte in b"\x16\x03\x01\x02\x00\x01":
                await client.send(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(1.9)
            assert await client.recv() == b""
    assert s.server.stats().failed_handshakes == 1


async def test_a_server_needs_no_time_limit_for_handshakes(
    client_tls: ClientTLS, server_tls: ServerTLS, mock_clock: trio.testing.MockClock
) -> None:
    async with serving(echo, tls=server_tls, handshake_timeout=None) as s:
        async with await silent_client(s) as client:
            mock_clock.jump(20)
            await client.starttls(client_tls, handshake_timeout=None)
            await client.send(b"hello")
            assert await client.recv() == b"hello"


async def test_a_handshake_can_begin_after_a_stop(
    server_tls: ServerTLS, client_tls: ClientTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Server._start

    def start_and_stop(server: Server, connection: Connection) -> None:
        start(server, connection)
        server.stop()  # before the connection's task has run

    monkeypatch.setattr(Server, "_start", start_and_stop)
    async with serving(echo, tls=server_tls) as s, await s.connect(tls=client_tls) as client:
        await client.send(b"hello")
        assert await client.recv() == b"hello"
        await client.close()
        await s.server.wait_closed()
    assert s.server.stats() == trisock.ServerStats(accepted=1)
