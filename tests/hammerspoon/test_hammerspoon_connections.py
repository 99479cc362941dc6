"""hs.socket's objects connect, listen and disconnect."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import socket
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    MORE_THAN_FITS,
    Calls,
    Log,
    clients_of,
    connect_to,
    errors_in,
    unix_client,
    until,
)
from helpers.pairs import closing, read_all
from trisock import ServerTLS, hammerspoon
from trisock.hammerspoon import Socket, Sockets, callbacks, endpoints
from trisock.testing import Authority, Script, serving

# ---- connect ----


async def test_connect_returns_self(hs: Sockets, path: str) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new()
        assert client.connect(LOCALHOST, listener.port) is client
        assert not client.connected()  # connect does not wait
        async with closing(await listener.accept()):
            await until(client.connected)
    async with await trisock.listen_unix(path) as listener:
        client = hs.new()
        assert client.connect(path) is client
        async with closing(await listener.accept()):
            await until(client.connected)


async def test_connect_calls_fn_once_and_without_arguments(
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
                # The next connection does not call the old fn.
                client.disconnect().connect(*arguments[:-1])  # type: ignore[arg-type]
                async with closing(await listener.accept()):
                    await until(client.connected)
                    assert await calls.none()
                client.disconnect()


async def test_connect_on_a_connected_object_returns_None_and_logs(
    client: Socket, peer: trisock.Socket, log: Log
) -> None:
    assert client.connect(LOCALHOST, 1) is None
    assert "cannot connect: it is already connected or listening (disconnect first)" in log.text
    assert client.listen(0) is None
    assert client.connected()
    client.write("still there\n")
    assert await peer.recv() == b"still there\n"


async def test_an_object_in_use_cannot_connect_or_listen(hs: Sockets, log: Log, path: str) -> None:
    server = hs.server(path)
    assert server.connect(path) is None
    assert server.listen(0) is None
    async with clients_of(server):
        pass
    connecting = hs.new().connect(path)
    assert connecting is not None
    assert connecting.connect(path) is None
    assert connecting.listen(0) is None
    assert len(errors_in(log)) == 4
    assert all("it is already connected or listening" in each for each in errors_in(log))


async def test_a_failed_connect_is_logged_and_leaves_the_object_reusable(
    hs: Sockets, log: Log, path: str, calls: Calls, free_port: int
) -> None:
    for arguments, words in [((LOCALHOST, free_port), "refused"), ((path,), "No such file")]:
        client = hs.new(calls)
        assert client.connect(*arguments, calls) is client  # type: ignore[arg-type]
        client.write("lost", 1, calls).read(1)
        assert not client.info()["isDisconnected"]
        await until(lambda: client.info()["isDisconnected"])  # noqa: B023
        assert words in log.text
        assert not client.connected()
        connect_to(hs.server(0), client)
        await until(client.connected)
    assert await calls.none()
    assert not errors_in(log)  # only a mistake in the program is logged as an error


# ---- listen ----


async def test_listen_returns_self(hs: Sockets, port_or_path: int | str) -> None:
    created = hs.new()
    assert created.listen(port_or_path) is created
    async with clients_of(created):
        assert created.connected()


async def test_listen_on_a_port_in_use_returns_None_and_logs(hs: Sockets, log: Log) -> None:
    port = hs.server(0).info()["localPort"]
    created = hs.new()
    assert created.listen(port) is None
    assert f"cannot listen on *:{port}: {os.strerror(errno.EADDRINUSE)}" in log.text
    assert created.listen(0) is created


async def test_listen_on_a_path_in_use_returns_None_and_logs(
    hs: Sockets, log: Log, path: str
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


async def test_listen_replaces_a_stale_path(hs: Sockets, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    created = hs.new()
    assert created.listen(path) is created
    async with clients_of(created):
        pass


async def test_listen_and_connect_expand_the_home_directory(
    hs: Sockets, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    server = hs.server("~/socket")
    assert (tmp_path / "socket").is_socket()
    client = hs.new()
    client.connect("~/socket")
    await until(server.connected)
    for each in (server, client):
        assert each.info()["unixSocketPath"] == str(tmp_path / "socket")
    server.disconnect()
    assert not (tmp_path / "socket").exists()


# ---- connected, connections ----


async def test_a_client_counts_as_one_connection_until_it_disconnects(client: Socket) -> None:
    assert (client.connected(), client.connections()) == (True, 1)
    client.disconnect()
    assert (client.connected(), client.connections()) == (False, 0)


async def test_a_server_counts_its_connected_clients(server: Socket) -> None:
    assert (server.connected(), server.connections()) == (False, 0)
    async with clients_of(server, 3) as peers:
        assert (server.connected(), server.connections()) == (True, 3)
        await peers[0].close()
        await until(lambda: server.connections() == 2)
    await until(lambda: not server.connected())


# ---- disconnect ----


async def test_disconnect_returns_self_in_any_state(hs: Sockets, path: str) -> None:
    for created in (hs.new(), hs.server(0), hs.server(path)):
        assert created.disconnect() is created
        assert created.disconnect() is created
        assert created.info()["isDisconnected"]


async def test_disconnect_closes_the_connection_gracefully(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.write("goodbye\n", calls)
    await calls.next()
    client.disconnect()
    assert await read_all(peer) == b"goodbye\n"


async def test_disconnect_makes_the_object_reusable_immediately(
    hs: Sockets, path: str, calls: Calls
) -> None:
    one, two = hs.new(calls), hs.new(calls)
    for server, client in [(one, two), (two, one), (one, two)]:  # as in hs.socket's own tests
        for port_or_path in (0, path):
            assert server.listen(port_or_path) is server
            connect_to(server, client).write("hello\n")
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
        assert other.listen(port) is other
        for peer in peers:
            assert await read_all(peer) == b""
        assert server.connections() == 0
        assert other.connections() == 0


async def test_disconnect_removes_the_unix_path_immediately(hs: Sockets, path: str) -> None:
    server = hs.server(path)
    async with clients_of(server) as [peer]:
        server.disconnect()
        assert not os.path.exists(path)
        assert await read_all(peer) == b""


async def test_disconnect_works_right_after_connect_and_listen(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    client = connect_to(server, hs.new(), calls)
    server.disconnect()
    client.disconnect()
    assert not os.path.exists(path)
    assert await calls.none()


@unix_client
async def test_disconnect_drops_queued_reads_writes_and_callbacks(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    begun, resume = trio.Event(), trio.Event()

    async def first(tag: object) -> None:
        begun.set()
        await resume.wait()
        calls("a running callback continues")

    client.write("sent", first)
    await begun.wait()
    client.write("sent too", calls)
    client.write(MORE_THAN_FITS, calls)
    client.write("never sent", calls)
    client.read("\n")
    await wait_all_tasks_blocked()  # a callback is queued and a write is partly done
    client.disconnect()
    content = await read_all(peer)
    assert content.startswith(b"sentsent toox")
    assert b"never" not in content
    resume.set()
    assert await calls.next() == ("a running callback continues",)
    assert await calls.none()


async def test_a_servers_disconnect_drops_pending_writes_to_its_clients(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 2) as peers:
        server.write(MORE_THAN_FITS, calls)
        await peers[0].recv_exactly(len(MORE_THAN_FITS))
        server.disconnect()
        server.listen(path)  # a callback that was not dropped would run now
        await read_all(peers[1])
        assert await calls.none()


async def test_callbacks_queued_before_a_disconnect_are_never_called() -> None:
    # A disconnect between the end of a read and the read's callback clears the queue.
    calls = Calls()
    async with trio.open_nursery() as nursery:
        queue = callbacks.CallbackQueue("it", nursery, logging.getLogger("test"))
        old = queue.put
        old(calls, "queued")
        queue.clear()
        old(calls, "late")
        queue.put(calls, "new")
    assert await calls.next() == ("new",)
    assert await calls.none()


async def test_a_server_may_be_disconnected_at_once(
    hs: Sockets, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        hs.server(0, print).disconnect()
    await wait_all_tasks_blocked()
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


async def test_the_block_waits_for_a_disconnect_to_finish(
    authority: Authority, server_tls: ServerTLS
) -> None:
    script = Script().starttls(server_tls).expect(b"bye").expect_eof()  # with close_notify
    async with serving(script) as s:
        written = trio.Event()
        async with hammerspoon.open_sockets() as hs:
            client = hs.new(print)
            client.connect("127.0.0.1", s.server.port).startTLS(authority.client_tls("localhost"))
            client.write("bye", lambda tag: written.set())
            await written.wait()
            client.disconnect()


async def test_the_block_waits_for_a_servers_disconnect_to_finish(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0)
        client = await trisock.connect(LOCALHOST, server.info()["localPort"])
        await until(server.connected)
        server.startTLS(server_tls).write("bye")
        await client.starttls(authority.client_tls("localhost"))
        assert await client.recv_exactly(3) == b"bye"
        server.disconnect()
    async with client:
        assert await client.recv() == b""  # with close_notify


@pytest.mark.parametrize("passes", range(6))
async def test_a_servers_disconnect_also_closes_a_client_being_accepted(
    hs: Sockets, path: str, passes: int
) -> None:
    server = hs.server(path)
    await wait_all_tasks_blocked()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(path)
        for _ in range(passes):  # during the first passes, the server accepts the client
            await trio.lowlevel.checkpoint()
        server.disconnect()
        await wait_all_tasks_blocked()
        raw.setblocking(False)
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""


class BeforeFirstStep(trio.abc.Instrument):
    """Calls a function when the next new task is about to run."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._new: set[trio.lowlevel.Task] = set()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._new.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self._new:
            trio.lowlevel.remove_instrument(self)
            self._function()


async def test_a_servers_disconnect_closes_a_client_whose_task_has_not_run(
    hs: Sockets, path: str
) -> None:
    server = hs.server(path)
    await wait_all_tasks_blocked()
    trio.lowlevel.add_instrument(BeforeFirstStep(server.disconnect))
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(path)
        await wait_all_tasks_blocked()
        raw.setblocking(False)
        assert raw.recv(1) == b""


async def test_a_client_waits_until_its_server_has_accepted_it(hs: Sockets) -> None:
    server = hs.server(0)
    await wait_all_tasks_blocked()
    raw = socket.create_connection((LOCALHOST, server.info()["localPort"]))
    raw.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
    async with trisock.Socket(stream) as client:
        assert server.connections() == 0  # no other task has run
        await endpoints._wait_accepted(client)
        assert server.connections() == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.write("x", "tag"),
        lambda s: s.write("x", print, 1),
        lambda s: s.write("x", True),
        lambda s: s.write(5),
        lambda s: s.read("\n", print),
    ],
)
def test_wrong_arguments_raise_without_a_connection_too(call: Callable[[Socket], object]) -> None:
    async def main() -> None:
        async with hammerspoon.open_sockets() as hs:
            with pytest.raises(TypeError):
                call(hs.new(print))

    trio.run(main)


async def test_eof_in_the_middle_of_a_read_is_logged(hs: Sockets, log: Log) -> None:
    server = hs.server(0, print)
    client = await trisock.connect("127.0.0.1", server.info()["localPort"])
    while not server.connections():
        await trio.lowlevel.checkpoint()
    server.read("\n")
    await client.send(b"half a li")
    await client.close()
    await until(lambda: "the peer has ended its side in the middle of a read" in log.text)
