"""Log records about a connection carry its peer. Stats count failed handshakes of handlers."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import Any

import pytest
import trio

import trisock
from helpers.pairs import all_served
from helpers.server import bound, connect, logged
from trisock import ServerTLS, Socket


async def send_half_a_line(sock: Socket) -> None:
    await sock.send(b"half")


async def read_a_line(sock: Socket) -> None:
    await sock.recv_line()


async def fail(_: Socket) -> None:
    raise ValueError("a fault")


async def left_open(_: Socket) -> None:
    trio.move_on_after(1).__enter__()


def peer_of(record: logging.LogRecord) -> Any:
    return record.peer  # type: ignore[attr-defined]


@pytest.mark.parametrize("handler", [read_a_line, fail, left_open])
@pytest.mark.parametrize("tls", [False, True])
async def test_each_record_has_the_peer(
    handler: Any, tls: bool, server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    async with bound(handler, host="127.0.0.1", tls=server_tls if tls else None) as server:
        async with await connect(server) as client:
            with contextlib.suppress(trio.BrokenResourceError):  # the handler has ended already
                await client.send(b"neither a line nor TLS")
                await client.send_eof()
            await all_served(server, 1)
        (record,) = logged(log, logging.INFO)
        assert peer_of(record) == client.getlocal()
        assert str(client.getlocal()) in record.getMessage()


async def test_a_refused_proxy_is_the_peer_of_its_record(log: pytest.LogCaptureFixture) -> None:
    async with bound(fail, host="127.0.0.1", trusted_proxies=["192.0.2.1"]) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            await all_served(server, 1)
            (record,) = logged(log, logging.INFO)
            assert peer_of(record) == client.getsockname()


@pytest.mark.parametrize("caught", [False, True])
async def test_a_handlers_own_failed_starttls_is_counted(
    caught: bool, server_tls: ServerTLS
) -> None:
    async def handler(sock: Socket) -> None:
        try:
            await sock.starttls(server_tls)
        except trisock.TLSError:
            if not caught:
                raise

    async with bound(handler, host="127.0.0.1") as server:
        async with await connect(server) as client:
            await client.send(b"not TLS\r\n" * 10)
            await all_served(server, 1)
    stats = server.stats()
    assert stats.failed_handshakes == 1
    assert stats.peer_errors == (not caught)


async def test_a_failed_starttls_to_another_server_is_not_counted(server_tls: ServerTLS) -> None:
    async def handler(sock: Socket) -> None:
        async with await trisock.connect("127.0.0.1", plain.port) as other:
            with pytest.raises(trisock.TLSError):
                await other.starttls("example.org")

    async with (
        bound(send_half_a_line, host="127.0.0.1") as plain,
        bound(handler, host="127.0.0.1") as server,
        await connect(server) as client,
    ):
        assert await client.recv() == b""
    assert server.stats() == trisock.ServerStats(accepted=1)


async def test_eof_between_two_messages_is_a_normal_end(log: pytest.LogCaptureFixture) -> None:
    async with bound(read_a_line, host="127.0.0.1") as server:
        async with await connect(server):
            pass
        await all_served(server, 1)
    assert server.stats() == trisock.ServerStats(accepted=1)
    assert not logged(log, logging.INFO)
