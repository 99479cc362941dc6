"""Servers, of all faces, cancelled at every moment (helpers/cancellation.py tells how)."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import (
    CLEAR,
    LARGE,
    SERVERS,
    Attempt,
    Kit,
    at_every_moment,
    connect_to,
    covers,
    grid,
)
from helpers.peers import Peer, Script
from trisock import Socket, hammerspoon, pluto

# ---- servers ----


async def greet(sock: Socket) -> None:
    await sock.send(b"hello")
    while line := await sock.recv():
        await sock.send(line)


@covers("bind")
@pytest.mark.parametrize("given", ["port", "listener"])
async def test_a_cancelled_bind_leaves_nothing_that_listens(given: str) -> None:
    async def scenario(attempt: Attempt) -> None:
        listener = trisock.listen_nowait(0)
        port = listener.port
        if given == "port":
            listener.abort()
        async with trio.open_nursery() as nursery:
            await attempt(
                lambda: trisock.bind(nursery, port if given == "port" else listener, greet)
            )
            assert attempt.error is None
            if not attempt.cancelled:
                attempt.value.stop()
        trisock.listen_nowait(port).abort()

    await at_every_moment(scenario)


@covers("bind")
@pytest.mark.parametrize(
    ("layer", "max_connections"),
    grid(
        lambda layer, max_connections: layer == CLEAR or max_connections is None,
        [CLEAR, *SERVERS],
        [None, 1],
    ),
)
async def test_a_cancelled_server_leaves_no_connection_and_no_listener(
    layer: str, max_connections: int | None, kit: Kit
) -> None:
    """Its own task is cancelled, and so are those of the handlers, wherever they are."""

    async def scenario(attempt: Attempt) -> None:
        listener = trisock.listen_nowait(0, host="127.0.0.1")
        peers = []
        servers = []

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                server = await trisock.bind(
                    nursery,
                    listener,
                    greet,
                    tls=None if layer == CLEAR else kit.server_tls,
                    max_connections=max_connections,
                )
                servers.append(server)

        def script() -> Script:
            for _ in range(2):
                peers.append(Peer(connect_to(listener)))
                if layer != CLEAR:
                    kit.turn_to_tls(peers[-1], layer)
            yield
            for peer in peers:
                while not peer.heard:
                    peer.act()
                    yield
                peer.say(b"line")
                while peer.heard != b"helloline":
                    peer.act()
                    yield
                peer.end()
                yield
                if not peer.gone:  # it waits for both directions to end
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

    await at_every_moment(scenario)


@covers("Server.wait_closed")
async def test_a_cancelled_wait_closed_leaves_the_server_as_it_is() -> None:
    async def scenario(attempt: Attempt) -> None:
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

    await at_every_moment(scenario)


@covers("Server.broadcast")
@pytest.mark.parametrize("layer", grid(lambda layer: "1_2" not in layer, [CLEAR, *SERVERS]))
async def test_a_cancelled_broadcast_ends_only_what_was_begun(
    layer: str, kit: Kit, tmp_path: Path
) -> None:
    """To one client that takes it all, and one that does not."""

    async def scenario(attempt: Attempt) -> None:
        listener = trisock.listen_unix_nowait(tmp_path / "socket")
        answers = []

        async def handler(sock: Socket) -> None:
            await sock.send(b"hello")
            await sock.recv()
            try:
                await sock.send(b"after it")
            except trio.BrokenResourceError:
                answers.append("broken")
            else:
                answers.append("sent")

        async with trio.open_nursery() as nursery:
            server = await trisock.bind(
                nursery, listener, handler, tls=None if layer == CLEAR else kit.server_tls
            )
            peers = [Peer(connect_to(listener)) for _ in range(2)]
            slow, fast = peers
            for peer in peers:
                if layer != CLEAR:
                    kit.turn_to_tls(peer, layer)
                while peer.heard != b"hello":
                    peer.act()
                    await trio.lowlevel.checkpoint()

            def script() -> Script:
                yield
                while len(fast.heard) < len(LARGE):
                    fast.act()
                    yield
                yield from slow.acting()

            await attempt(lambda: server.broadcast(LARGE), script())
            assert attempt.error is None
            assert attempt.cancelled or attempt.value == 2
            for peer in peers:
                peer.act()
                peer.say(b"go on")
            while len(answers) < 2:
                await trio.lowlevel.checkpoint()
                for peer in peers:
                    peer.act()
            server.stop()
        for peer in peers:
            while not peer.gone:
                peer.act()
            peer.raw.close()
            said = bytes(peer.heard).removeprefix(b"hello")
            if said.endswith(b"after it"):
                assert said.removesuffix(b"after it") in (b"", LARGE)
            else:
                assert attempt.cancelled
                assert LARGE.startswith(said)
        assert sum(peer.heard.endswith(b"after it") for peer in peers) == answers.count("sent")

    await at_every_moment(scenario)


# ---- hs.socket ----


@covers("hammerspoon.open_sockets")
async def test_cancelled_open_sockets_leave_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def scenario(attempt: Attempt) -> None:
        async def converse() -> None:
            async with hammerspoon.open_sockets() as hs:
                over = trio.Event()
                server = hs.server(path, lambda data, tag: server.write(data))
                client = hs.new(lambda data, tag: over.set()).connect(path)
                client.write(b"line\n").read(5)
                while not server.connections():
                    await trio.lowlevel.checkpoint()
                server.read(b"\n")
                await over.wait()

        await attempt(converse)
        assert attempt.error is None
        assert not list(tmp_path.iterdir())

    await at_every_moment(scenario)


@pytest.mark.parametrize("kind", ["unread", "write fails", "slow callback"])
async def test_cancelled_open_sockets_leave_nothing_of_peers_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What waits for a hangup, for two seconds, or for a callback, holds descriptors too."""
    monkeypatch.setattr("trisock.hammerspoon.queues.UNREAD_SECONDS", 0, raising=False)
    monkeypatch.setattr("trisock.hammerspoon.queues._SETTLE_SECONDS", 0, raising=False)
    monkeypatch.setattr("trisock.hammerspoon.callbacks.MAX_HELD", 0, raising=False)
    path = str(tmp_path / "socket")
    descriptors = len(os.listdir("/proc/self/fd"))

    async def scenario(attempt: Attempt) -> None:
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
        assert len(os.listdir("/proc/self/fd")) == descriptors

    await at_every_moment(scenario)


@covers("pluto.scheduler.run")
async def test_a_cancelled_scheduler_has_ended_and_can_run_again() -> None:
    async def scenario(attempt: Attempt) -> None:
        scheduler = pluto.scheduler()
        listener = pluto.socket.bind(scheduler, 0, lambda s: s.send(b"hello"))

        def script() -> Script:
            yield
            with Peer(connect_to(listener._listening)) as peer:
                while peer.heard != b"hello":
                    peer.act()
                    yield
            listener._server.stop()

        await attempt(scheduler.run, script())
        assert attempt.error is None
        trisock.listen_nowait(listener.port).abort()
        scheduler.add(trio.lowlevel.checkpoint)
        await scheduler.run()

    await at_every_moment(scenario)
