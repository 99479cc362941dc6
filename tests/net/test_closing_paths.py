"""Rarely taken paths at the end of a connection: for example, a close that need not wait."""

from __future__ import annotations

import socket
import sys

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing
from trisock import Socket
from trisock._net import linger as _linger
from trisock._net.connection_state import ConnectionState
from trisock._net.syscalls import send_queue_size
from trisock._net.tls_stream import TLSStream
from trisock.testing import socket_pair


async def _visit(server: trisock.Server) -> None:
    async with await trisock.connect("127.0.0.1", server.port):
        pass


# Not an async test: these have a deadline, under which a server closes connections in other tasks.
def test_a_close_that_need_not_wait_releases_its_slot() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(
                nursery, 0, Socket.recv, host="127.0.0.1", max_connections=1
            )
            with trio.fail_after(30):
                for _ in range(3):
                    await _visit(server)
                while server.stats().accepted < 3 or server.stats().active:
                    await trio.lowlevel.checkpoint()
            server.stop()

    trio.run(main)


def test_a_handler_may_return_while_another_task_reads() -> None:
    async def main() -> None:
        async def read(sock: Socket) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await sock.recv()

        async def handler(sock: Socket) -> None:
            nursery.start_soon(read, sock)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
            with trio.fail_after(30):
                async with await trisock.connect("127.0.0.1", server.port) as client:
                    assert await client.recv() == b""
            server.stop()

    trio.run(main)


async def test_a_handshake_timeout_before_tls_resets_the_connection() -> None:
    a, b = await socket_pair()
    async with closing(a, b):
        a._connection.time_out_handshake(1)
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await b.recv()


async def test_a_handshake_timeout_ignores_a_closed_connection() -> None:
    a, b = await socket_pair()
    async with closing(a, b):
        a._connection.close_immediately()
        a._connection.time_out_handshake(1)
        assert a._connection.state is ConnectionState.CLOSED
        assert await b.recv() == b""


async def test_waiting_for_acknowledgement_ends_at_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0)
    a, b = await socket_pair()
    async with closing(a, b):
        await _linger.wait_until_acknowledged(a.stream.socket)


async def test_only_linux_reports_the_size_of_the_send_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = await socket_pair()
    async with closing(a, b):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "darwin")
            assert send_queue_size(a.stream.socket) == 0


async def test_a_full_send_queue_makes_a_tls_close_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await socket_pair(tls=True)
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.close)
        assert await b.recv() == b""
        tls = b._connection.tls
        assert tls is not None
        while not b._connection.transport.has_ended():
            await trio.lowlevel.checkpoint()
        with monkeypatch.context() as patch:
            patch.setattr(TLSStream, "_send_nowait", lambda *_: False)
            assert not tls.close_if_ended()
        await b.close()


async def test_a_tls_close_after_a_shutdown_by_other_code_loses_nothing(
    mock_clock: trio.testing.MockClock,
) -> None:
    """The close has a close_notify to send, but nothing can follow FIN.

    The clock stands still, so a wait for a time limit would never end.
    """
    a, b = await socket_pair(tls=True)

    async def receive() -> None:
        assert len(await b.recv_exactly(1_000_000)) == 1_000_000
        await b.close()

    async with closing(a, b), trio.open_nursery() as nursery:
        await b.send(b"unread")
        nursery.start_soon(receive)
        await a.send(bytes(1_000_000))
        a.stream.socket.shutdown(socket.SHUT_WR)
        await a.close()
