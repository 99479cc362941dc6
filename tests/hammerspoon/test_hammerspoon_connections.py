"""Objects of hs.socket that connect, listen and disconnect."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import errno
import logging
import os
import pathlib
import socket

import pytest
import trio
import trio.testing

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    MORE_THAN_FITS,
    Calls,
    clients_of,
    connected,
    errors_in,
    until,
)
from helpers.pairs import closing, read_all
from trisock.hammerspoon import Socket, Sockets
from trisock.hammerspoon import callbacks as _callbacks

# ---- connect ----


async def test_connect_returns_self(hs: Sockets, path: str) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new()
        assert client.connect(LOCALHOST, listener.port) is client
        assert not client.connected()  # returns at once
        async with closing(await listener.accept()):
            await until(client.connected)
    async with await trisock.listen_unix(path) as listener:
        client = hs.new()
        assert client.connect(path) is client
        async with closing(await listener.accept()):
            await until(client.connected)


async def test_connect_expands_the_home_directory(
    hs: Sockets, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with await trisock.listen_unix(tmp_path / "socket") as listener:
        client = hs.new()
        client.connect("~/socket")
        async with closing(await listener.accept()):
            await until(client.connected)
            assert client.info()["unixSocketPath"] == str(tmp_path / "socket")


async def test_connect_fn_is_called_once_and_without_arguments(
    hs: Sockets, path: str, calls: Calls
) -> None:
    async with (
        await trisock.listen(0, host=LOCALHOST) as tcp,
        await trisock.listen_unix(path) as unix,
    ):
        for listener, arguments in [
            (tcp, (LOCALHOST, tcp.port, calls)),
            (unix, (path, calls)),
            (unix, (path, None, calls)),
        ]:
            client = hs.new().connect(*arguments)  # type: ignore[arg-type]
            assert client is not None
            async with closing(await listener.accept()):
                assert await calls.next() == ()
                assert client.connected()
                assert await calls.none()
                # Single-use: it is not kept for the next connection.
                client.disconnect().connect(*arguments[:1], *arguments[1:-1])  # type: ignore[arg-type]
                async with closing(await listener.accept()):
                    await until(client.connected)
                    assert await calls.none()
                client.disconnect()


async def test_connect_of_a_connected_object_is_None_and_logged(
    client: Socket, peer: trisock.Socket, log: pytest.LogCaptureFixture
) -> None:
    assert client.connect(LOCALHOST, 1) is None
    assert "it is connected or listening already" in log.text
    assert client.listen(0) is None
    assert client.connected()
    client.write("still there\n")
    assert await peer.recv() == b"still there\n"


async def test_connect_of_a_listening_or_connecting_object_is_None(
    hs: Sockets, log: pytest.LogCaptureFixture, path: str
) -> None:
    server = hs.server(path)
    assert server.connect(path) is None
    async with clients_of(server):
        pass
    connecting = hs.new().connect(path)
    assert connecting is not None
    assert connecting.connect(path) is None
    assert connecting.listen(0) is None
    assert len(errors_in(log)) == 3


async def test_connect_without_a_server_is_logged_and_unconnected_again(
    hs: Sockets, log: pytest.LogCaptureFixture, path: str, calls: Calls
) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        port = listener.port
    for arguments, words in [((LOCALHOST, port), "refused"), ((path,), "No such file")]:
        client = hs.new(calls)
        assert client.connect(*arguments, calls) is client  # type: ignore[arg-type]
        client.write("lost", 1, calls).read(1)
        assert not client.info()["isDisconnected"]
        await until(lambda: client.info()["isDisconnected"])  # noqa: B023
        assert words in log.text
        assert not client.connected()
        server = hs.server(0)
        assert client.connect(LOCALHOST, server.info()["localPort"]) is client
        await until(client.connected)
        assert server.disconnect()
    assert await calls.none()
    assert not errors_in(log)  # the network's fault, not the program's


# ---- listen ----


async def test_listen_returns_self(hs: Sockets, path: str) -> None:
    for port_or_path in (0, path):
        created = hs.new()
        assert created.listen(port_or_path) is created
        async with clients_of(created):
            assert created.connected()


async def test_listen_on_a_taken_port_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    port = hs.server(0).info()["localPort"]
    created = hs.new()
    assert created.listen(port) is None
    assert f"cannot listen on *:{port}: {os.strerror(errno.EADDRINUSE)}" in log.text
    assert created.listen(65536) is None
    assert created.listen(0) is created


async def test_listen_on_a_taken_path_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture, path: str
) -> None:
    server = hs.server(path)
    assert hs.new().listen(path) is None
    assert path in log.text
    async with clients_of(server):
        pass
    file = pathlib.Path(path + "-file")
    file.write_text("mine")
    assert hs.new().listen(str(file)) is None
    assert file.read_text() == "mine"


async def test_listen_replaces_a_path_that_is_stale(hs: Sockets, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    created = hs.new()
    assert created.listen(path) is created
    async with clients_of(created):
        pass


async def test_listen_expands_the_home_directory(
    hs: Sockets, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    created = hs.server("~/socket")
    assert (tmp_path / "socket").is_socket()
    assert created.info()["unixSocketPath"] == str(tmp_path / "socket")
    created.disconnect()
    assert not (tmp_path / "socket").exists()


async def test_listen_of_an_object_in_use_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    server = hs.server(0)
    assert server.listen(0) is None
    assert "it is connected or listening already" in log.text


# ---- connected, connections ----


async def test_connected_and_connections_of_a_client(client: Socket) -> None:
    assert (client.connected(), client.connections()) == (True, 1)
    client.disconnect()
    assert (client.connected(), client.connections()) == (False, 0)


async def test_connected_and_connections_of_a_server(server: Socket) -> None:
    assert (server.connected(), server.connections()) == (False, 0)
    async with clients_of(server, 3) as peers:
        assert (server.connected(), server.connections()) == (True, 3)
        await peers[0].close()
        await until(lambda: server.connections() == 2)
    await until(lambda: not server.connected())


# ---- disconnect ----


async def test_disconnect_returns_self_whatever_it_is(hs: Sockets, path: str) -> None:
    for created in (hs.new(), hs.server(0), hs.server(path)):
        assert created.disconnect() is created
        assert created.disconnect() is created
        assert created.info()["isDisconnected"]


async def test_disconnect_ends_the_connection_gracefully(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.write("goodbye\n", calls)
    await calls.next()
    client.disconnect()
    assert await read_all(peer) == b"goodbye\n"


async def test_disconnect_frees_the_object_for_reuse_at_once(
    hs: Sockets, path: str, calls: Calls
) -> None:
    # As hs.socket's own tests do: the two change roles.
    one, two = hs.new(calls), hs.new(calls)
    for server, client in [(one, two), (two, one), (one, two)]:
        for port_or_path in (0, path):
            assert server.listen(port_or_path) is server
            if isinstance(port_or_path, str):
                client.connect(port_or_path)
            else:
                client.connect(LOCALHOST, server.info()["localPort"])
            client.write("hello\n")
            await until(server.connected)
            server.read("\n", 1)
            assert await calls.next() == (b"hello\n", 1)
            server.write("hello yourself\n")
            client.read("\n", 2)
            assert await calls.next() == (b"hello yourself\n", 2)
            server.disconnect()
            client.disconnect()


async def test_disconnect_drops_each_client_and_stops_listening(hs: Sockets) -> None:
    server = hs.server(0)
    port = server.info()["localPort"]
    async with clients_of(server, 3) as peers:
        server.disconnect()
        other = hs.new()
        assert other.listen(port) is other  # free at once
        for peer in peers:
            assert await read_all(peer) == b""
        assert server.connections() == 0
        assert other.connections() == 0


async def test_disconnect_removes_the_unix_path_at_once(hs: Sockets, path: str) -> None:
    server = hs.server(path)
    async with clients_of(server) as [peer]:
        server.disconnect()
        assert not os.path.exists(path)
        assert await read_all(peer) == b""


async def test_disconnect_before_it_has_begun(hs: Sockets, path: str, calls: Calls) -> None:
    server = hs.server(path)
    client = hs.new().connect(path, calls)
    assert client is not None
    server.disconnect()
    client.disconnect()
    assert not os.path.exists(path)
    assert await calls.none()


async def test_disconnect_drops_queued_reads_writes_and_callbacks(
    hs: Sockets, path: str, calls: Calls
) -> None:
    async with connected(hs, path, calls) as (client, peer):
        begun, go_on = trio.Event(), trio.Event()

        async def first(tag: object) -> None:
            begun.set()
            await go_on.wait()
            calls("a running callback continues")

        client.write("sent", first)
        await begun.wait()
        client.write("sent too", calls)
        client.write(MORE_THAN_FITS, calls)
        client.write("never sent", calls)
        client.read("\n")
        await trio.testing.wait_all_tasks_blocked()  # a callback is queued, and a write half done
        client.disconnect()
        content = await read_all(peer)
        assert content.startswith(b"sentsent toox")
        assert b"never" not in content
        go_on.set()
        assert await calls.next() == ("a running callback continues",)
        assert await calls.none()


async def test_disconnect_drops_pending_writes_to_its_clients(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 2) as peers:
        server.write(MORE_THAN_FITS, calls)
        await peers[0].recv_exactly(len(MORE_THAN_FITS))
        server.disconnect()
        server.listen(path)  # the callback would look like this one's
        await read_all(peers[1])
        assert await calls.none()


async def test_callbacks_queued_before_a_clear_are_never_called() -> None:
    # disconnect() may come between the end of a read and the call.
    calls = Calls()
    async with trio.open_nursery() as nursery:
        queue = _callbacks.CallbackQueue("it", nursery, logging.getLogger("test"))
        old = queue.put
        old(calls, "due")
        queue.clear()
        old(calls, "late")
        queue.put(calls, "new")
    assert await calls.next() == ("new",)
    assert await calls.none()
