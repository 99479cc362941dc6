"""Broadcasts while TLS begins or ends, a handler is slow, a task is cancelled or a server stops."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing
from helpers.server import bound, broadcasting, chat, connected
from trisock import ClientTLS, ServerTLS, Socket
from trisock._server import broadcast as _broadcast
from trisock.testing import serving, socket_pair

BIG = b"b" * 20_000_000


async def passes(number: int) -> None:
    for _ in range(number):
        await trio.lowlevel.checkpoint()


# The number of scheduler passes between starting a broadcast and calling starttls or stoptls.
PASSES = pytest.mark.parametrize("between", range(6))


@PASSES
async def test_a_broadcast_under_tls_is_never_sent_in_plain_text(
    between: int, server_tls: ServerTLS
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_until(b"CCC\n")
        async with trio.open_nursery() as inner:
            inner.start_soon(lambda: s.server.broadcast(b"SECRET\n", timeout=3))
            await passes(between)
            try:
                await sock.stoptls()
            except trisock.TLSError:
                return  # the client read SECRET where it expected close_notify
        await sock.send(b"plain\n")

    async with serving(handler, tls=server_tls) as s:
        for _ in range(5):
            client = await s.connect()
            await client.send(b"CCC\n")
            try:
                await client.stoptls()
            except trisock.TLSError:
                continue  # SECRET arrived encrypted
            assert b"".join([chunk async for chunk in client]) == b"plain\n"


@PASSES
async def test_a_broadcast_never_aborts_a_starttls(
    between: int, server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    delivered: list[int] = []

    async def handler(sock: Socket) -> None:
        async def broadcast() -> None:
            delivered.append(await s.server.broadcast(b"NEWS\n", timeout=0.05))

        async with trio.open_nursery() as inner:
            inner.start_soon(broadcast)
            await passes(between)
            await sock.starttls(server_tls)
        await sock.send(b"secret")

    async with serving(handler) as s:
        for _ in range(10):
            delivered.clear()
            client = await s.connect()
            while not delivered:  # send the ClientHello after the broadcast
                await trio.lowlevel.checkpoint()
            if delivered == [1]:
                assert await client.recv_until(b"\n") == b"NEWS\n"
            await client.starttls(client_tls)
            assert await client.recv() == b"secret"
    assert s.server.stats() == trisock.ServerStats(accepted=10)


async def test_a_broadcast_skips_a_handler_that_waits_for_a_file() -> None:
    source, sink = os.pipe()

    async def handler(sock: Socket) -> None:
        with open(source, "rb", buffering=0) as pipe:
            await sock.send_file(pipe)
        await sock.recv()

    async with serving(handler) as s:
        async with await s.connect() as client:
            os.write(sink, b"first,")
            assert await client.recv_exactly(6) == b"first,"
            assert await s.server.broadcast(b"news", timeout=0.1) == 0
            os.write(sink, b"second")
            os.close(sink)
            assert await client.recv_exactly(6) == b"second"
            assert await s.server.broadcast(b"news") == 1
            assert await client.recv_exactly(4) == b"news"
    assert s.server.stats() == trisock.ServerStats(accepted=1)


async def test_a_broadcast_skips_a_client_that_reads_a_long_response() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(BIG)
        await sock.recv()

    async with serving(handler) as s, await s.connect() as client:
        got = len(await client.recv())
        async with broadcasting(s.server, b"news", timeout=0.1) as delivered:
            while not delivered:  # read steadily, but slower than the server sends
                got += len(await client.recv(50_000))
                await trio.sleep(0.01)
        assert delivered == [0]
        await client.recv_exactly(len(BIG) - got)
        assert await s.server.broadcast(b"more") == 1
        assert await client.recv_exactly(4) == b"more"
    assert s.server.stats() == trisock.ServerStats(accepted=1)


async def test_a_started_broadcast_is_shielded_from_cancellation() -> None:
    async with serving(chat) as s, await s.connect() as client:
        assert await client.recv() == b"hi\n"
        with trio.CancelScope() as scope:
            async with broadcasting(s.server, BIG) as delivered:
                scope.cancel()
                # The scope is cancelled. An unshielded checkpoint would raise Cancelled here,
                # before the broadcast ends.
                assert s.server.connections
                with trio.CancelScope(shield=True):
                    assert await client.recv_exactly(len(BIG)) == BIG
        assert delivered == [1]
        assert await s.server.broadcast(b"news") == 1
        assert await client.recv_exactly(4) == b"news"


@pytest.mark.parametrize("timeout", [1000, math.inf])
@pytest.mark.parametrize("how", ["no grace", "cancelled"])
async def test_stopping_the_server_ends_a_broadcast(how: str, timeout: float) -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"hi\n")
        await server.broadcast(BIG, timeout=timeout)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with connected(server) as client:
            assert await client.recv_until(b"\n") == b"hi\n"
            await trio.testing.wait_all_tasks_blocked()
            if how == "no grace":
                server.stop(grace=0)
                await server.wait_closed()
            else:
                nursery.cancel_scope.cancel()
    await server.wait_closed()


async def chat_until_idle(sock: Socket) -> None:
    await sock.recv()
    await sock.send(b"hi\n")
    with sock.idle():
        await sock.recv()


@pytest.mark.parametrize("tls", [False, True])
async def test_a_stop_does_not_cut_a_broadcast_short(tls: bool, server_tls: ServerTLS) -> None:
    async with serving(chat_until_idle, tls=server_tls if tls else None) as s:
        async with await s.connect() as client:
            await client.send(b"hello")
            assert await client.recv_until(b"\n") == b"hi\n"
            async with broadcasting(s.server, BIG) as delivered:
                s.server.stop()
                while s.server.connections:
                    await trio.lowlevel.checkpoint()
                assert await client.recv_exactly(len(BIG)) == BIG
                assert await client.recv() == b""
            assert delivered == [1]


async def test_a_stop_aborts_a_client_that_does_not_read_broadcasts(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with bound(chat_until_idle) as server, connected(server) as client:
        await client.send(b"hello")
        assert await client.recv_until(b"\n") == b"hi\n"
        async with broadcasting(server, BIG, timeout=math.inf) as delivered:
            server.stop(grace=None)
            await server.wait_closed()
        assert delivered == [0]
        assert server.stats().aborted == 1
        with pytest.raises(trio.BrokenResourceError):
            while await client.recv():
                pass


async def test_a_stop_without_grace_ends_the_wait_for_a_broadcast() -> None:
    async with bound(chat_until_idle) as server, connected(server) as client:
        await client.send(b"hello")
        assert await client.recv_until(b"\n") == b"hi\n"
        async with broadcasting(server, BIG, timeout=math.inf) as delivered:
            server.stop(grace=None)
            while server.connections:
                await trio.lowlevel.checkpoint()
            server.stop(grace=0)
            await server.wait_closed()
        assert delivered == [0]
        assert server.stats().active == 0


async def test_a_cancelled_wait_for_a_broadcast_closes_immediately() -> None:
    a, b = await socket_pair()
    async with closing(a, b):
        await a._connection.sending.acquire()  # a broadcast also holds this lock
        with trio.CancelScope() as scope:
            scope.cancel()
            await _broadcast.finish_broadcasts(a._connection)
        assert scope.cancelled_caught
        assert a.fileno() < 0
        assert await b.recv() == b""


async def test_an_error_in_a_broadcast_is_raised_to_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(sock: Socket, *_: object) -> bool:
        raise ValueError("unexpected")

    monkeypatch.setattr(_broadcast, "broadcast_to", broken)
    async with bound(Socket.recv) as server, connected(server) as client:
        with pytest.RaisesGroup(ValueError):
            await server.broadcast(b"news")
        assert len(server.connections) == 1
        assert client.isopen()


def test_ctrl_c_anywhere_in_a_broadcast_ends_the_program() -> None:
    program = """
import signal, sys
import trio, trisock
from trisock._server import broadcast

def run(at):
    count = 0
    def trace(frame, event, arg):
        nonlocal count
        if frame.f_code is not broadcast.Broadcast.run.__code__ or event not in ("call", "line"):
            return trace if frame.f_code is broadcast.Broadcast.run.__code__ else None
        count += event == "line"
        if count == at and event == "line":
            signal.raise_signal(signal.SIGINT)
        return trace
    async def main():
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, trisock.Socket.recv, host="127.0.0.1")
            async with await trisock.connect("127.0.0.1", server.port):
                while not server.connections:
                    await trio.lowlevel.checkpoint()
                sys.settrace(trace)
                await server.broadcast(b"x")
                sys.settrace(None)
                nursery.cancel_scope.cancel()
    try:
        trio.run(main, strict_exception_groups=False)
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
    return count >= at

at = 1
while run(at):
    at += 1
print(at)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert int(done.stdout) > 5
