"""How a connection ends: for whom, within which time, and what the end says."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served, closing, raw_pair, raw_unix_pair, tcp_pair, tls_pair
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock._net import linger as _linger
from trisock._net import syscalls as _syscalls

PAIRS = {"tcp": raw_pair, "unix": raw_unix_pair}


@contextlib.contextmanager
def another_holder(sock: Socket) -> Iterator[None]:
    """Let somebody else hold the descriptor, as a forked child does."""
    duplicate = os.dup(sock.fileno())
    try:
        yield
    finally:
        os.close(duplicate)


# ---- whoever else holds the descriptor ----


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("how", ["close", "cancelled close", "left unread"])
async def test_a_close_ends_the_connection_for_other_holders_too(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0)
    sock, raw = PAIRS[kind]()
    raw.settimeout(5)
    with raw, another_holder(sock):
        if how == "left unread":
            raw.sendall(b"x" * 100)
            await trio.lowlevel.wait_readable(sock.fileno())
        with trio.CancelScope() as scope:
            if how == "cancelled close":
                scope.cancel()
            await sock.close()
        try:
            assert raw.recv(1) == b""
        except ConnectionResetError:
            assert how == "left unread"


@pytest.mark.parametrize("kind", PAIRS)
async def test_an_abort_ends_the_connection_for_other_holders_too(kind: str) -> None:
    sock, raw = PAIRS[kind]()
    raw.settimeout(5)
    with raw, another_holder(sock):
        await sock.send(b"what may be lost")
        sock.abort()
        if kind == "unix":
            assert raw.recv(100) in (b"what may be lost", b"")
            assert raw.recv(1) == b""
        else:
            with pytest.raises(ConnectionResetError):
                while raw.recv(100):
                    pass


async def test_an_abort_where_the_system_cannot_reset_still_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_syscalls, "_connect", None)
    monkeypatch.setattr(_syscalls, "_has_forked", True)
    sock, raw = raw_pair()
    raw.settimeout(5)
    with raw, another_holder(sock):
        sock.abort()
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""


# ---- SO_LINGER ----


@pytest.mark.parametrize("how", ["close", "cancelled", "leave"])
async def test_so_linger_does_not_keep_the_thread_waiting(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0.1)
    sock, raw = raw_pair()
    with raw:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 4))
        with trio.move_on_after(0.1):
            await sock.send(b"x" * 30_000_000)
        start = trio.current_time()
        with trio.CancelScope() as scope:
            if how == "cancelled":
                scope.cancel()
            if how == "leave":
                async with sock:
                    pass
            await sock.close()
        assert trio.current_time() - start < 2


# ---- SIGPIPE ----

WRITES = {
    "connected": "sock = await trisock.connect('127.0.0.1', port)",
    "adopted": "sock = trisock.Socket(await trio.open_tcp_stream('127.0.0.1', port))",
}
SENDS = {
    "send": "await sock.send(b'x')",
    "buffers": "await sock.send(b'x', b'y')",
    "file": "await sock.send_file(file)",
    "memory": "await sock.send_file(io.BytesIO(b'x' * 1000))",
    "after eof": "await sock.send_eof(); await sock.send(b'x')",
}


@pytest.mark.parametrize("made", WRITES)
@pytest.mark.parametrize("send", SENDS)
def test_a_peer_that_has_left_kills_no_process(made: str, send: str) -> None:
    program = f"""
        import io, signal, socket, trio, trisock

        async def main():
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            with socket.create_server(("127.0.0.1", 0)) as listening, open(__file__, "rb") as file:
                port = listening.getsockname()[1]
                {WRITES[made]}
                listening.accept()[0].close()
                failures = 0
                for _ in range(50):
                    try:
                        {SENDS[send]}
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        failures += 1
                    await trio.sleep(0.001)
                assert failures
                await sock.close()

        trio.run(main)
    """
    with open(os.memfd_create("program"), "w+") as file:
        file.write(textwrap.dedent(program))
        file.flush()
        path = f"/proc/self/fd/{file.fileno()}"
        done = subprocess.run([sys.executable, path], pass_fds=[file.fileno()], timeout=60)
    assert done.returncode == 0, signal.Signals(-done.returncode)


# ---- what a clean end says ----


class Own(Exception):
    """A fault of the handler's."""


async def half_an_answer(sock: Socket) -> None:
    await sock.send(b"half")
    raise Own


async def half_an_answer_in_a_group(sock: Socket) -> None:
    await sock.send(b"half")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(half_an_answer, sock)


async def half_an_answer_in_a_block(sock: Socket) -> None:
    with contextlib.suppress(Own):
        async with sock:
            await half_an_answer(sock)


async def whole_answer(sock: Socket) -> None:
    await sock.send(b"half and half")


async def an_answer_to_each_line(sock: Socket) -> None:
    while True:
        await sock.send(b"to " + await sock.recv_until(b"\n"))


@pytest.mark.parametrize(
    ("handler", "whole"),
    [
        (half_an_answer, False),
        (half_an_answer_in_a_group, False),
        (half_an_answer_in_a_block, False),
        (whole_answer, True),
    ],
)
async def test_close_notify_vouches_only_for_a_handler_that_has_returned(
    handler: Callable[[Socket], object],
    whole: bool,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1", tls=server_tls)  # type: ignore[arg-type]
        client = await trisock.connect("127.0.0.1", server.port, tls=client_tls)
        async with closing(client):
            got = b""
            try:
                while chunk := await client.recv():
                    got += chunk
            except TLSError:
                assert not whole
            else:
                assert whole
            assert got.startswith(b"half")
        server.stop()


async def test_a_block_left_by_an_exception_does_not_vouch(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    for error in (Own(), None):
        a, b = await tls_pair(client_tls, server_tls)
        async with closing(a, b):
            with contextlib.suppress(Own):
                async with a:
                    await a.send(b"half")
                    if error is not None:
                        raise error
            assert await b.recv() == b"half"
            if error is None:
                assert await b.recv() == b""
            else:
                with pytest.raises(TLSError, match="close_notify"):
                    await b.recv()


async def test_a_peer_that_ends_between_two_lines_is_answered_with_close_notify(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, an_answer_to_each_line, tls=server_tls)
        client = await trisock.connect("127.0.0.1", server.port, tls=client_tls)
        async with closing(client):
            await client.send(b"hello\n")
            assert await client.recv() == b"to hello\n"
            with trio.fail_after(10):
                await client.stoptls()  # waits for the server's close_notify
        server.stop()


async def test_what_a_handler_has_sent_before_it_failed_arrives() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"x" * 2_000_000)
        raise Own

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        async with await trisock.connect("127.0.0.1", server.port) as client:
            await client.send(b"unread")
            assert await client.recv_exactly(2_000_000)
            assert await client.recv() == b""
        server.stop()


# ---- slots ----


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close waits for its peer for as long as the test takes."""
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 1000)


async def answer(sock: Socket) -> None:
    await trio.lowlevel.wait_readable(sock.fileno())  # and leave it unread
    await sock.send(b"bye")


async def lingering(server: trisock.Server) -> Socket:
    """Return a client for which the server's close waits."""
    client = await trisock.connect("127.0.0.1", server.port)
    await client.send(b"a byte too much")
    return client


@pytest.mark.usefixtures("patient")
async def test_a_close_that_waits_for_its_peer_keeps_no_slot_from_others() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, answer, host="127.0.0.1", max_connections=3)
        clients = [await lingering(server) for _ in range(3)]
        async with closing(*clients):
            for client in clients:
                assert await client.recv() == b"bye"
            with trio.fail_after(10):
                async with await lingering(server) as honest:
                    assert await honest.recv() == b"bye"
        server.stop()


@pytest.mark.usefixtures("patient")
async def test_no_more_closes_wait_than_there_are_slots_beside_them() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, answer, host="127.0.0.1", max_connections=3)
        clients = [await lingering(server) for _ in range(6)]
        async with closing(*clients):
            for client in clients:
                assert await client.recv() == b"bye"
            late = [await lingering(server) for _ in range(4)]
            async with closing(*late):
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert server.stats().accepted == server.stats().active == 6
                # Whichever of them ends, the next one is served; and no slot is lost.
                for gone, client in zip([*clients[4:], *clients[:2]], late, strict=True):
                    await gone.close()
                    assert await client.recv() == b"bye"
                    assert server.stats().active <= 7
        await all_served(server, 10)
        clients = [await lingering(server) for _ in range(6)]
        async with closing(*clients):
            for client in clients:
                assert await client.recv() == b"bye"
        server.stop()


async def test_a_pair_that_is_settled_closes_at_once_whatever_its_options() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await a.send(b"all of it")
        await a.close()
        assert await b.recv() == b"all of it"
        assert await b.recv() == b""
