"""Cancel servers of trisock, ``pluto`` and ``hammerspoon`` at every cancel point.

See helpers/cancellation.py.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import (
    LARGE,
    PLAIN,
    SERVERS,
    Attempt,
    Connections,
    at_every_cancel_point,
    connect_to,
    covers,
    during,
    grid,
)
from helpers.peers import Peer, Script
from trisock import Socket, hammerspoon, pluto

# ---- servers ----


async def greet(sock: Socket) -> None:
    await sock.send(b"hello")
    while line := await sock.recv():
        await sock.send(line)


def acting_until_heard(peer: Peer, expected: bytes) -> Script:
    while peer.heard != expected:
        peer.act()
        yield


@covers("bind")
@pytest.mark.parametrize("given", ["port", "listener"])
@at_every_cancel_point
async def test_a_cancelled_bind_leaves_no_listener(attempt: Attempt, given: str) -> None:
    listener = trisock.listen_nowait(0)
    port = listener.port
    if given == "port":
        listener.abort()
    async with trio.open_nursery() as nursery:
        await attempt(lambda: trisock.bind(nursery, port if given == "port" else listener, greet))
        assert attempt.error is None
        if not attempt.cancelled:
            attempt.value.stop()
    trisock.listen_nowait(port).abort()


@covers("open_service", "Service.bind")
@at_every_cancel_point
async def test_a_cancelled_service_leaves_no_server_and_no_signal_handler(
    attempt: Attempt,
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    listener = trisock.listen_nowait(0, host="127.0.0.1")
    services: list[trisock.Service] = []
    peers: list[Peer] = []

    async def serve() -> None:
        async with trisock.open_service() as service:
            services.append(service)
            await service.bind(listener, greet)

    def script() -> Script:
        peers.append(peer := Peer(connect_to(listener)))
        yield from acting_until_heard(peer, b"hello")
        peer.end()
        yield
        services[0].stop()

    await attempt(serve, script())
    assert attempt.error is None
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    listener.abort()  # if the call was cancelled before the server owned it
    for peer in peers:
        peer.raw.close()
    trisock.listen_nowait(listener.port, host="127.0.0.1").abort()


@covers("bind")
@pytest.mark.parametrize(
    ("layer", "max_connections"),
    grid(
        lambda layer, max_connections: layer == PLAIN or max_connections is None,
        [PLAIN, *SERVERS],
        [None, 1],
    ),
)
@at_every_cancel_point
async def test_a_cancelled_server_leaves_no_connection_and_no_listener(
    attempt: Attempt, layer: str, max_connections: int | None, connections: Connections
) -> None:
    """The cancelled nursery contains the server's own task and the tasks of its handlers."""
    listener = trisock.listen_nowait(0, host="127.0.0.1")
    peers: list[Peer] = []
    servers: list[trisock.Server] = []

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(
                nursery,
                listener,
                greet,
                tls=connections.role_of(layer),
                max_connections=max_connections,
            )
            servers.append(server)

    def script() -> Script:
        for _ in range(2):
            peers.append(Peer(connect_to(listener)))
            connections.start_tls(peers[-1], layer)
        yield
        for peer in peers:
            yield from acting_until_heard(peer, b"hello")
            peer.say(b"line")
            yield from acting_until_heard(peer, b"helloline")
            peer.end()
            yield
            if not peer.gone:  # the server waits for EOF in both directions
                peer.act()
                peer.raw.close()
                peer.gone = True
        servers[0].stop()

    await attempt(serve, script())
    assert attempt.error is None
    for server in servers:
        await server.wait_closed()
        assert not server.connections
        assert server.stats().active == 0
        assert server.stats().handler_errors == 0
    trisock.listen_nowait(listener.port, host="127.0.0.1").abort()
    for peer in peers:
        if not peer.gone:
            peer.raw.setblocking(True)
            with contextlib.suppress(ConnectionError):
                while peer.raw.recv(65536):
                    pass
        peer.raw.close()


@covers("Server.wait_closed")
@at_every_cancel_point
async def test_a_cancelled_wait_closed_does_not_stop_the_server(attempt: Attempt) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, greet)

        def script() -> Script:
            yield
            yield
            server.stop()

        await attempt(server.wait_closed, script())
        if attempt.cancelled:
            client = await trisock.connect("127.0.0.1", server.port)
            assert await client.recv() == b"hello"
            await client.close()
            server.stop()
            await server.wait_closed()


@covers("Server.broadcast")
@pytest.mark.parametrize("layer", grid(lambda layer: "1_2" not in layer, [PLAIN, *SERVERS]))
@at_every_cancel_point
async def test_a_cancelled_broadcast_breaks_only_connections_with_a_partial_send(
    attempt: Attempt, layer: str, connections: Connections, tmp_path: Path
) -> None:
    """One client reads from the start. The other reads only when the first has read everything."""
    listener = trisock.listen_unix_nowait(tmp_path / "socket")
    outcomes = []

    async def handler(sock: Socket) -> None:
        await sock.send(b"hello")
        await sock.recv()
        try:
            await sock.send(b"next")
        except trio.BrokenResourceError:
            outcomes.append("broken")
        else:
            outcomes.append("sent")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, listener, handler, tls=connections.role_of(layer))
        peers = [Peer(connect_to(listener)) for _ in range(2)]
        slow, fast = peers
        for peer in peers:
            connections.start_tls(peer, layer)
            for _ in acting_until_heard(peer, b"hello"):
                await trio.lowlevel.checkpoint()

        def script() -> Script:
            while len(fast.heard) < len(LARGE):
                fast.act()
                yield
            yield from slow.acting()

        await attempt(lambda: server.broadcast(LARGE), during(script()))
        assert attempt.error is None
        assert attempt.cancelled or attempt.value == 2
        for peer in peers:
            peer.act()
            peer.say(b"go on")
        while len(outcomes) < 2:
            await trio.lowlevel.checkpoint()
            for peer in peers:
                peer.act()
        server.stop()
    for peer in peers:
        while not peer.gone:
            peer.act()
        peer.raw.close()
        heard = bytes(peer.heard).removeprefix(b"hello")
        if heard.endswith(b"next"):
            assert heard.removesuffix(b"next") in (b"", LARGE)
        else:
            assert attempt.cancelled
            assert LARGE.startswith(heard)
    assert sum(peer.heard.endswith(b"next") for peer in peers) == outcomes.count("sent")


# ---- hs.socket ----


@covers("hammerspoon.open_sockets")
@at_every_cancel_point
async def test_cancelling_open_sockets_leaves_nothing_open(
    attempt: Attempt, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")

    async def converse() -> None:
        async with hammerspoon.open_sockets() as hs:
            answered = trio.Event()
            server = hs.server(path, lambda data, tag: server.write(data))
            client = hs.new(lambda data, tag: answered.set()).connect(path)
            client.write(b"line\n").read(5)
            while not server.connections():
                await trio.lowlevel.checkpoint()
            server.read(b"\n")
            await answered.wait()

    await attempt(converse)
    assert attempt.error is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["unread", "write fails", "slow callback"])
@at_every_cancel_point
async def test_cancelling_open_sockets_releases_connections_of_closed_peers(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Tasks that wait for a hangup, a timeout or a callback must also release their descriptors."""
    monkeypatch.setattr("trisock.hammerspoon.queues.UNREAD_SECONDS", 0)
    monkeypatch.setattr("trisock.hammerspoon.queues._SETTLE_SECONDS", 0)
    monkeypatch.setattr("trisock.hammerspoon.callbacks.MAX_HELD", 0)
    path = str(tmp_path / "socket")

    async def converse() -> None:
        async with hammerspoon.open_sockets() as hs:

            async def slow(data: bytes, tag: int) -> None:
                await trio.lowlevel.checkpoint()
                server.read(1)

            server = hs.server(path, slow)
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(path)
                while not server.connections():
                    await trio.lowlevel.checkpoint()
                if kind == "slow callback":
                    server.read(1)
                    server.read(1)
                peer.send(b"unread")
            if kind == "write fails":
                server.write(b"x")
            while server.connections():
                await trio.lowlevel.checkpoint()

    await attempt(converse)
    assert attempt.error is None
    assert not list(tmp_path.iterdir())


@at_every_cancel_point
async def test_cancelling_open_sockets_closes_udp_objects(attempt: Attempt) -> None:
    async def converse() -> None:
        async with hammerspoon.open_sockets() as hs:
            answered = trio.Event()

            async def answer(data: bytes, sockaddr: bytes) -> None:
                await trio.lowlevel.checkpoint()
                sender = hs.parseAddress(sockaddr)
                assert sender is not None
                server.send(data, sender["host"], sender["port"])

            server = hs.udp.server(0, answer)
            server.receive()
            client = hs.udp.new(lambda data, sockaddr: answered.set())
            # It waits for the send, and then replaces the socket.
            client.send(b"x", "127.0.0.1", server.info()["localPort"])
            client.connect("127.0.0.1", server.info()["localPort"])
            client.send(b"hello", lambda tag: trio.lowlevel.checkpoint())
            client.receive()
            await answered.wait()

    await attempt(converse)
    assert attempt.error is None


@covers("pluto.scheduler.run")
@at_every_cancel_point
async def test_a_cancelled_scheduler_ends_and_can_run_again(attempt: Attempt) -> None:
    scheduler = pluto.scheduler()
    server = pluto.socket.bind(scheduler, 0, lambda s: s.send(b"hello"))

    def script() -> Script:
        with Peer(connect_to(server._listening)) as peer:
            yield from acting_until_heard(peer, b"hello")
        server.close()

    await attempt(scheduler.run, during(script()))
    assert attempt.error is None
    trisock.listen_nowait(server.port).abort()
    scheduler.add(trio.lowlevel.checkpoint)
    await scheduler.run()
