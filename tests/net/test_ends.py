"""The end of a connection: shared descriptors, SO_LINGER, SIGPIPE, close_notify, server slots."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.forks import run_in_child
from helpers.pairs import RESET, all_served, closing, read_all
from helpers.server import bound, connect
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock._net import linger as _linger
from trisock._net import syscalls as _syscalls
from trisock._server import accepting as _accepting
from trisock._server.listening import ListeningSockets
from trisock.testing import serving

BOTH_FAMILIES = pytest.mark.parametrize("family", ["tcp", "unix"])


# ---- other processes that hold the descriptor ----


@contextlib.contextmanager
def another_holder(sock: Socket) -> Iterator[None]:
    """Hold a duplicate of the descriptor, as a forked child does."""
    duplicate = os.dup(sock.fileno())
    try:
        yield
    finally:
        os.close(duplicate)


@BOTH_FAMILIES
@pytest.mark.parametrize("how", ["close", "cancelled close", "close with unread data"])
async def test_a_close_ends_the_connection_in_other_processes_as_well(
    how: str, sock: Socket, raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0)
    raw.settimeout(5)
    with another_holder(sock):
        if how == "close with unread data":
            raw.sendall(b"x" * 100)
            await trio.lowlevel.wait_readable(sock.fileno())
        with trio.CancelScope() as scope:
            if how == "cancelled close":
                scope.cancel()
            await sock.close()
        try:
            assert raw.recv(1) == b""
        except ConnectionResetError:
            assert how == "close with unread data"


@BOTH_FAMILIES
async def test_an_abort_ends_the_connection_in_other_processes_as_well(
    family: str, sock: Socket, raw: socket.socket
) -> None:
    raw.settimeout(5)
    with another_holder(sock):
        await sock.send(b"this may be lost")
        sock.abort()
        if family == "unix":
            assert raw.recv(100) in (b"this may be lost", b"")
            assert raw.recv(1) == b""
        else:
            with pytest.raises(ConnectionResetError):
                while raw.recv(100):
                    pass


@pytest.mark.parametrize("forked", [False, True])
async def test_abort_works_without_connect_from_libc(
    forked: bool, sock: Socket, raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback is a close with SO_LINGER.

    It sends a reset only if no other process has the descriptor.
    """
    monkeypatch.setattr(_syscalls, "_connect", None)
    monkeypatch.setattr(_syscalls, "_has_forked", forked)
    raw.settimeout(5)
    if forked:
        with another_holder(sock):
            sock.abort()
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(1) == b""
    else:
        sock.abort()
        with pytest.raises(ConnectionResetError):
            raw.recv(1)


# ---- SO_LINGER ----


@pytest.mark.parametrize("how", ["close", "cancelled", "async with"])
async def test_so_linger_does_not_block_the_thread(
    how: str, sock: Socket, raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0.1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 4))
    await cancel_when_blocked(sock.send, b"x" * 30_000_000)
    start = trio.current_time()
    with trio.CancelScope() as scope:
        if how == "cancelled":
            scope.cancel()
        if how == "async with":
            async with sock:
                pass
        await sock.close()
    assert trio.current_time() - start < 2


async def test_so_linger_does_not_reset_an_idle_connection_on_close(a: Socket, b: Socket) -> None:
    a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    await a.send(b"all of it")
    await a.close()
    assert await b.recv() == b"all of it"
    assert await b.recv() == b""


# ---- SIGPIPE ----


async def connect_with_trio(port: int) -> Socket:
    return Socket(await trio.open_tcp_stream("127.0.0.1", port))


async def connect_with_trisock(port: int) -> Socket:
    return await trisock.connect("127.0.0.1", port)


async def send_after_eof(sock: Socket, _: object) -> None:
    await sock.send_eof()
    await sock.send(b"x")


@pytest.mark.parametrize("connect_to", [connect_with_trio, connect_with_trisock])
@pytest.mark.parametrize(
    "send",
    [
        lambda sock, _: sock.send(b"x"),
        lambda sock, _: sock.send(b"x", b"y"),
        lambda sock, file: sock.send_file(file),
        lambda sock, _: sock.send_file(io.BytesIO(b"x" * 1000)),
        send_after_eof,
    ],
    ids=["send", "buffers", "file", "memory", "after eof"],
)
def test_a_send_to_a_closed_peer_raises_no_sigpipe(
    connect_to: Callable[[int], Awaitable[Socket]],
    send: Callable[[Socket, object], Awaitable[object]],
) -> None:
    async def send_until_it_has_failed_ten_times() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening, open(__file__, "rb") as file:
            sock = await connect_to(listening.getsockname()[1])
            listening.accept()[0].close()
            failures = 0
            while failures < 10:
                try:
                    await send(sock, file)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    failures += 1
            await sock.close()

    def run() -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        trio.run(send_until_it_has_failed_ten_times)

    run_in_child(run)


# ---- close_notify ----


class HandlerError(Exception):
    pass


async def half_a_response(sock: Socket) -> None:
    await sock.send(b"half")
    raise HandlerError


async def half_a_response_in_a_group(sock: Socket) -> None:
    await sock.send(b"half")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(half_a_response, sock)


async def half_a_response_in_a_block(sock: Socket) -> None:
    with contextlib.suppress(HandlerError):
        async with sock:
            await half_a_response(sock)


async def whole_response(sock: Socket) -> None:
    await sock.send(b"half and half")


@pytest.mark.parametrize(
    ("handler", "whole"),
    [
        (half_a_response, False),
        (half_a_response_in_a_group, False),
        (half_a_response_in_a_block, False),
        (whole_response, True),
    ],
)
async def test_close_notify_is_sent_only_if_the_handler_returns(
    handler: Callable[[Socket], Awaitable[None]],
    whole: bool,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
) -> None:
    async with bound(handler, tls=server_tls) as server:
        async with closing(client := await connect(server, tls=client_tls)):
            assert (await client.recv_exactly(4)) == b"half"
            if whole:
                assert await read_all(client) == b" and half"
            else:
                with pytest.raises(TLSError):
                    await read_all(client)


@pytest.mark.parametrize("layer", ["tls"])
@pytest.mark.parametrize("fails", [True, False])
async def test_async_with_sends_close_notify_only_if_its_body_succeeds(
    fails: bool, a: Socket, b: Socket
) -> None:
    with contextlib.suppress(HandlerError):
        async with a:
            await a.send(b"half")
            if fails:
                raise HandlerError
    assert await b.recv() == b"half"
    if fails:
        with pytest.raises(TLSError, match="close_notify"):
            await b.recv()
    else:
        assert await b.recv() == b""


async def test_a_peer_that_closes_between_lines_receives_close_notify(
    server_tls: ServerTLS,
) -> None:
    async def handler(sock: Socket) -> None:
        while True:
            await sock.send(b"to " + await sock.recv_until(b"\n"))

    async with serving(handler, tls=server_tls) as s:
        client = await s.connect()
        await client.send(b"hello\n")
        assert await client.recv() == b"to hello\n"
        with trio.fail_after(10):
            await client.stoptls()  # waits for the server's close_notify


async def test_sent_data_arrives_even_if_the_handler_then_fails() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"x" * 2_000_000)
        raise HandlerError

    async with bound(handler, host="127.0.0.1") as server, await connect(server) as client:
        await client.send(b"unread")
        assert await client.recv_exactly(2_000_000)
        assert await client.recv() == b""


# ---- the server's slots: max_connections ----


@pytest.fixture
def endless_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a close wait for its peer for 1000 seconds, which is longer than any test runs."""
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 1000)


async def say_bye(sock: Socket) -> None:
    await trio.lowlevel.wait_readable(sock.fileno())  # the data stays unread
    await sock.send(b"bye")


async def lingering_client(server: trisock.Server) -> Socket:
    """Return a client whose unread data makes the server's close wait."""
    client = await connect(server)
    await client.send(b"unread")
    return client


async def assert_served(*clients: Socket) -> None:
    for client in clients:
        assert await client.recv() == b"bye"


@contextlib.asynccontextmanager
async def served_clients(server: trisock.Server, count: int) -> AsyncIterator[list[Socket]]:
    """Yield served clients, whose unread data makes the server's close wait. Then abort them."""
    clients = [await lingering_client(server) for _ in range(count)]
    async with closing(*clients):
        await assert_served(*clients)
        yield clients


@pytest.mark.usefixtures("endless_linger")
async def test_a_close_that_waits_for_its_peer_occupies_no_slot() -> None:
    async with serving(say_bye, max_connections=3) as s:
        async with served_clients(s.server, 3):
            with trio.fail_after(10):
                async with served_clients(s.server, 1):
                    pass


@pytest.mark.usefixtures("endless_linger")
async def test_the_number_of_connections_lingering_without_a_slot_is_limited() -> None:
    async with serving(say_bye, max_connections=3) as s:
        async with served_clients(s.server, 6) as clients:
            late = [await lingering_client(s.server) for _ in range(4)]
            async with closing(*late):
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert s.server.stats().accepted == s.server.stats().active == 6
                # When any client leaves, the next client is served. No slot is lost.
                for leaving, client in zip([*clients[4:], *clients[:2]], late, strict=True):
                    await leaving.close()
                    await assert_served(client)
                    assert s.server.stats().active <= 7
        await all_served(s.server, 10)
        async with served_clients(s.server, 6):
            pass


async def test_descriptor_exhaustion_is_reported_again_after_a_quiet_interval(
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(_accepting, "_REPORT_SECONDS", 5)
    sockets = ListeningSockets([socket.create_server(("127.0.0.1", 0))])
    async with trio.open_nursery() as nursery:
        acceptor = _accepting.Acceptor(sockets, None, trio.Event(), pytest.fail, nursery)
        for _ in range(2):
            acceptor._exhaustion = errno.EMFILE
            await acceptor._report_exhaustion(errno.EMFILE)
            assert acceptor._exhaustion is None
    sockets.close()
    assert len(caplog.records) == 2
