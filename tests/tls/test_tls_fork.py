"""After a fork, only the parent can use its TLS connections: two processes must not share keys."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio

from helpers.pairs import closing
from helpers.reads import READS
from trisock import ClientTLS, ServerTLS, Socket, bind, pluto
from trisock.testing import socket_pair

USES: dict[str, Callable[[Socket], Awaitable[object]]] = {
    "send": lambda sock: sock.send(b"secret"),
    "send a lot": lambda sock: sock.send(b"secret" * 100_000),
    **{name: READS[name] for name in READS if name not in {"peek", "recv_exactly nothing"}},
    "stoptls": lambda sock: sock.stoptls(),
    "wait": lambda sock: sock.wait_send_all_might_not_block(),
}


def in_child(use: Callable[[Socket], Awaitable[object]], sock: Socket) -> str:
    """Call ``use`` in a forked child, under ``trio.run``. Return the error, or ``"nothing"``."""

    async def bounded() -> None:
        with trio.fail_after(10):
            await use(sock)

    def run() -> str:
        try:
            trio.run(bounded)
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}"
        return "nothing"

    return forked(run)


def forked(function: Callable[[], str]) -> str:
    """Call a function in a forked child, and return its result."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, function().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        returned = pipe.read().decode()
    os.waitpid(child, 0)
    return returned


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("role", ["client", "server"])
def test_only_the_parent_can_use_tls_after_a_fork(
    use: Callable[[Socket], Awaitable[object]],
    role: str,
) -> None:
    async def before() -> tuple[Socket, Socket]:
        client, server = await socket_pair(tls=True)
        ours, peer = (client, server) if role == "client" else (server, client)
        await peer.send(b"for the parent")
        return ours, peer

    async def use_and_close(sock: Socket) -> None:
        try:
            await use(sock)
        finally:
            await sock.close()
            assert sock.fileno() == -1
            assert not sock.isopen()

    async def after(ours: Socket, peer: Socket) -> None:
        async with closing(ours, peer):
            assert await ours.recv() == b"for the parent"  # the child has read nothing
            await ours.send(b"one")
            assert await peer.recv() == b"one"  # the child has sent nothing
            await ours.close()
            assert await peer.recv() == b""

    ours, peer = trio.run(before)
    raised = in_child(use_and_close, ours)
    assert raised.startswith("BrokenResourceError")
    assert "fork" in raised
    trio.run(after, ours, peer)


def test_an_abort_in_a_child_does_not_reset_the_connection() -> None:
    async def after() -> None:
        async with closing(client, server):
            await client.send(b"one")
            assert await server.recv() == b"one"
            await client.close()
            assert await server.recv() == b""

    def abort() -> str:
        client.abort()
        return str(client.fileno())

    client, server = trio.run(lambda: socket_pair(tls=True))
    assert forked(abort) == "-1"
    trio.run(after)


def test_a_child_can_start_tls_on_a_plain_connection(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async def upgrade_and_send(sock: Socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.starttls, server_tls)
            await sock.starttls(client_tls)
        await sock.send(b"from the child")
        assert await server.recv() == b"from the child"

    client, server = trio.run(socket_pair)
    assert in_child(upgrade_and_send, client) == "nothing"
    client.abort()
    server.abort()


def test_only_the_parent_can_use_plutos_tls_after_a_fork(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """This test calls pluto outside Trio, so each call blocks the thread."""
    started = threading.Event()
    port = 0
    stop = trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []

    async def echo(sock: Socket) -> None:
        async for line in sock.lines(keep_ends=True):
            await sock.send(line)

    async def serve() -> None:
        nonlocal port
        with stop:
            async with trio.open_nursery() as nursery:
                server = await bind(nursery, 0, echo, host="127.0.0.1", tls=server_tls)
                port = server.port
                token.append(trio.lowlevel.current_trio_token())
                started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        started.wait()
        sock = pluto.socket.connect("127.0.0.1", port)
        assert sock.starttls(client_tls)
        assert forked(lambda: repr(sock.send(b"secret\n"))) in ("None", "False")
        sock.send(b"one\n")
        assert sock.recv() == b"one\n"
        sock.close()
    finally:
        token[0].run_sync_soon(stop.cancel)
        thread.join()
