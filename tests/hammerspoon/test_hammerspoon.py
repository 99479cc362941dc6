"""hs.socket's calls: each name, value and note of its page, and what it promises besides."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.hammerspoon_kit import Calls
from helpers.pairs import closing
from trisock import ClientTLS, ServerTLS, hammerspoon
from trisock._server.listening import ListeningSockets
from trisock.hammerspoon import Info, Socket, Sockets
from trisock.hammerspoon import callbacks as _callbacks
from trisock.hammerspoon import queues as _queued

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

LOCALHOST = "127.0.0.1"
MORE_THAN_FITS = b"x" * 4_000_000  # into a connection whose peer does not read


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def ended(peer: trisock.Socket) -> bytes:
    """Wait until the connection has ended; return what came before."""
    return b"".join([chunk async for chunk in peer])


@contextlib.asynccontextmanager
async def connected(
    hs: Sockets, fn: Any = None, host: str = LOCALHOST
) -> AsyncIterator[tuple[Socket, trisock.Socket]]:
    """Give an object that is connected, and the other end."""
    async with await trisock.listen(0, host) as listener:
        ready = trio.Event()
        client = hs.new(fn).connect(host, listener.port, ready.set)
        assert client is not None
        peer = await listener.accept()
        async with closing(peer):
            await ready.wait()
            yield client, peer


@contextlib.asynccontextmanager
async def connected_unix(
    hs: Sockets, path: str, fn: Any = None
) -> AsyncIterator[tuple[Socket, trisock.Socket]]:
    """Do the same over a Unix connection: it is known what it takes."""
    async with await trisock.listen_unix(path) as listener:
        ready = trio.Event()
        client = hs.new(fn).connect(path, ready.set)
        assert client is not None
        peer = await listener.accept()
        async with closing(peer):
            await ready.wait()
            yield client, peer


@contextlib.asynccontextmanager
async def clients_of(server: Socket, number: int = 1) -> AsyncIterator[list[trisock.Socket]]:
    """Give so many connections to a server, which has them all."""
    async with contextlib.AsyncExitStack() as stack:
        peers = []
        for _ in range(number):
            path = server.info()["unixSocketPath"]
            if path:
                peer = await trisock.connect_unix(path)
            else:
                peer = await trisock.connect(LOCALHOST, server.info()["localPort"])
            await stack.enter_async_context(closing(peer))
            peers.append(peer)
        await until(lambda: server.connections() == number)
        yield peers


@contextlib.asynccontextmanager
async def nobody_accepts(path: str) -> AsyncIterator[None]:
    """Give a Unix path to which a connect waits for as long as one likes."""
    async with await trisock.listen_unix(path, backlog=1):
        with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                try:
                    waiting.connect(path)
                except BlockingIOError:
                    break
            yield


@pytest.fixture
async def hs() -> AsyncIterator[Sockets]:
    async with hammerspoon.open_sockets() as hs:
        yield hs


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "trisock.hammerspoon")
    return caplog


def complaints(log: pytest.LogCaptureFixture) -> list[str]:
    """What is logged as an error: what is wrong with the program."""
    return [each.getMessage() for each in log.records if each.levelno >= logging.ERROR]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """A clock that jumps when nothing is left to do; the rest leaves loopback some time."""
    return trio.testing.MockClock(autojump_threshold=0.05)


@pytest.fixture
def trusted(authority: Authority, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system trust the authority, for startTLS as hs.socket has it."""
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


# ---- the page ----


def test_all_names_of_the_page_are_there() -> None:
    for name in [
        "connect", "connected", "connections", "disconnect", "info", "listen", "read", "receive",
        "send", "setCallback", "setTimeout", "startTLS", "write",
    ]:  # fmt: skip
        assert callable(getattr(Socket, name))
    for name in ["new", "server", "parseAddress", "setLogLevel"]:
        assert callable(getattr(Sockets, name))


def test_receive_is_read_and_send_is_write() -> None:
    assert Socket.receive is Socket.read
    assert Socket.send is Socket.write


async def test_the_pages_http_client(hs: Sockets) -> None:
    requests = []

    async def handler(sock: trisock.Socket) -> None:
        requests.append(await sock.recv_until(b"\r\n\r\n"))
        await sock.send(b"HTTP/1.0 301 Moved Permanently\r\nContent-Length: 5\r\n\r\n<html")

    printed = Calls()
    TAG_HTTP_HEADER, TAG_HTTP_CONTENT = 1, 2  # noqa: N806

    def httpCallback(data: bytes, tag: int) -> None:
        if tag == TAG_HTTP_HEADER:
            printed(tag, "TAG_HTTP_HEADER")
            printed(data)
            contentLength = data.partition(b"\r\nContent-Length: ")[2].partition(b"\r\n")[0]  # noqa: N806
            client.read(int(contentLength), TAG_HTTP_CONTENT)
        elif tag == TAG_HTTP_CONTENT:
            printed(tag, "TAG_HTTP_CONTENT")
            printed(data)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        found = hs.new(httpCallback).connect("localhost", server.port)
        assert found is not None
        client = found
        client.write("GET /index.html HTTP/1.0\r\nHost: google.com\r\n\r\n")
        client.read("\r\n\r\n", TAG_HTTP_HEADER)
        assert [await printed.next() for _ in range(4)] == [
            (1, "TAG_HTTP_HEADER"),
            (b"HTTP/1.0 301 Moved Permanently\r\nContent-Length: 5\r\n\r\n",),
            (2, "TAG_HTTP_CONTENT"),
            (b"<html",),
        ]
        await until(lambda: not client.connected())
        server.stop()
    assert requests == [b"GET /index.html HTTP/1.0\r\nHost: google.com\r\n\r\n"]


# ---- timeout, new, server ----


async def test_timeout_is_for_new_objects_only(hs: Sockets) -> None:
    assert hs.timeout == -1  # which is hs.socket's default
    before = hs.new()
    hs.timeout = 5
    assert before.info()["timeout"] == -1
    assert hs.new().info()["timeout"] == 5
    assert hs.server(0).info()["timeout"] == 5
    assert hs.new().setTimeout(7).info()["timeout"] == 7


async def test_timeout_holds_for_what_new_objects_do(
    jumping_clock: trio.testing.MockClock, hs: Sockets
) -> None:
    hs.timeout = 5
    async with connected(hs, print) as (client, peer):
        hs.timeout = -1
        client.read("\n")
        assert await ended(peer) == b""
        assert 5 <= trio.current_time() < 6


async def test_new_is_unconnected(hs: Sockets) -> None:
    created = hs.new()
    assert isinstance(created, Socket)
    assert not created.connected()
    assert created.connections() == 0


async def test_new_takes_the_read_callback(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, peer):
        client.read("\n")
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)


async def test_server_listens_on_a_port_with_a_read_callback(hs: Sockets, calls: Calls) -> None:
    async with await trisock.listen(0) as listener:
        port = listener.port
    server = hs.server(port, calls)
    assert server.info()["localPort"] == port
    async with clients_of(server) as [peer]:
        server.read("\n")
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)


async def test_server_on_port_0_takes_any_that_is_free(hs: Sockets) -> None:
    ports = {hs.server(0).info()["localPort"] for _ in range(3)}
    assert len(ports) == 3
    assert 0 not in ports


async def test_server_listens_on_a_path(hs: Sockets, path: str, calls: Calls) -> None:
    server = hs.server(path, calls)
    async with clients_of(server) as [peer]:
        server.read("\n")
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)


async def test_server_that_cannot_listen_is_an_object_all_the_same(
    hs: Sockets, log: pytest.LogCaptureFixture, path: str
) -> None:
    port = hs.server(0).info()["localPort"]
    hs.server(path)
    for taken in (port, path):
        log.clear()
        created = hs.server(taken)
        assert isinstance(created, Socket)
        assert created.info()["isDisconnected"]
        assert "cannot listen" in log.text
        assert created.listen(0) is created


# ---- connect ----


async def test_connect_host_port_returns_self(hs: Sockets) -> None:
    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new()
        assert client.connect(LOCALHOST, listener.port) is client
        assert not client.connected()  # returns at once
        async with closing(await listener.accept()):
            await until(client.connected)


async def test_connect_path_returns_self(hs: Sockets, path: str) -> None:
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
        await trisock.listen(0, LOCALHOST) as tcp,
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
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs) as (client, peer):
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
    assert len(complaints(log)) == 3


async def test_connect_where_nobody_listens_is_logged_and_unconnected_again(
    hs: Sockets, log: pytest.LogCaptureFixture, path: str, calls: Calls
) -> None:
    async with await trisock.listen(0, LOCALHOST) as listener:
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
    assert not complaints(log)  # the network's fault, not the program's


async def test_connect_with_a_wrong_argument_is_logged_and_unconnected_again(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    for arguments in [(LOCALHOST, 65536), ("", 80)]:
        log.clear()
        client = hs.new()
        client.connect(*arguments)
        await until(lambda: client.info()["isDisconnected"])  # noqa: B023
        assert log.records[0].levelno >= logging.WARNING


# ---- listen ----


async def test_listen_returns_self(hs: Sockets, path: str) -> None:
    for port_or_path in (0, path):
        created = hs.new()
        assert created.listen(port_or_path) is created
        async with clients_of(created):
            assert created.connected()


async def test_listen_on_a_port_that_is_taken_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    port = hs.server(0).info()["localPort"]
    created = hs.new()
    assert created.listen(port) is None
    assert f"cannot listen on *:{port}: {os.strerror(errno.EADDRINUSE)}" in log.text
    assert created.listen(65536) is None
    assert created.listen(0) is created


async def test_listen_on_a_path_that_is_taken_is_None_and_logged(
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


async def test_connected_and_connections_of_a_client(hs: Sockets) -> None:
    async with connected(hs) as (client, _peer):
        assert client.connected() is True
        assert client.connections() == 1
        client.disconnect()
        assert client.connected() is False
        assert client.connections() == 0


async def test_connected_and_connections_of_a_server(hs: Sockets) -> None:
    server = hs.server(0)
    assert server.connected() is False
    assert server.connections() == 0
    async with clients_of(server, 3) as peers:
        assert server.connected() is True
        assert server.connections() == 3
        await peers[0].close()
        await until(lambda: server.connections() == 2)
    await until(lambda: not server.connected())


# ---- disconnect ----


async def test_disconnect_returns_self_whatever_it_is(hs: Sockets, path: str) -> None:
    for created in (hs.new(), hs.server(0), hs.server(path)):
        assert created.disconnect() is created
        assert created.disconnect() is created
        assert created.info()["isDisconnected"]


async def test_disconnect_ends_the_connection_gracefully(hs: Sockets, calls: Calls) -> None:
    async with connected(hs) as (client, peer):
        client.write("goodbye\n", calls)
        await calls.next()
        client.disconnect()
        assert await ended(peer) == b"goodbye\n"


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
            assert await ended(peer) == b""
        assert server.connections() == 0
        assert other.connections() == 0


async def test_disconnect_removes_the_unix_path_at_once(hs: Sockets, path: str) -> None:
    server = hs.server(path)
    async with clients_of(server) as [peer]:
        server.disconnect()
        assert not os.path.exists(path)
        assert await ended(peer) == b""


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
    async with connected_unix(hs, path, calls) as (client, peer):
        begun, go_on = trio.Event(), trio.Event()

        async def first(tag: object) -> None:
            begun.set()
            await go_on.wait()
            calls("one that has begun goes on")

        client.write("sent", first)
        await begun.wait()
        client.write("sent too", calls)
        client.write(MORE_THAN_FITS, calls)
        client.write("never sent", calls)
        client.read("\n")
        await trio.testing.wait_all_tasks_blocked()  # a callback is due, and a write half done
        client.disconnect()
        content = await ended(peer)
        assert content.startswith(b"sentsent toox")
        assert b"never" not in content
        go_on.set()
        assert await calls.next() == ("one that has begun goes on",)
        assert await calls.none()


async def test_disconnect_drops_what_its_clients_have_not_got(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 2) as peers:
        server.write(MORE_THAN_FITS, calls)
        await peers[0].recv_exactly(len(MORE_THAN_FITS))
        server.disconnect()
        server.listen(path)  # the callback would be taken for this one's
        await ended(peers[1])
        assert await calls.none()


async def test_what_was_due_before_a_clear_is_never_called() -> None:
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


# ---- info ----

KEYS: dict[str, tuple[type, ...]] = {
    "connectedAddress": (bytes,),
    "connectedHost": (str,),
    "connectedPort": (int,),
    "connectedURL": (str,),
    "connections": (int,),
    "isConnected": (bool,),
    "isDisconnected": (bool,),
    "isIPv4": (bool,),
    "isIPv4Enabled": (bool,),
    "isIPv4PreferredOverIPv6": (bool,),
    "isIPv6": (bool,),
    "isIPv6Enabled": (bool,),
    "isSecure": (bool,),
    "localAddress": (bytes,),
    "localHost": (str,),
    "localPort": (int,),
    "timeout": (int, float),
    "unixSocketPath": (str,),
    "userData": (str,),
}

NOTHING: dict[str, object] = {
    "connectedAddress": b"",
    "connectedHost": "",
    "connectedPort": 0,
    "connectedURL": "",
    "connections": 0,
    "isConnected": False,
    "isDisconnected": True,
    "isIPv4": False,
    "isIPv4Enabled": True,
    "isIPv4PreferredOverIPv6": False,
    "isIPv6": False,
    "isIPv6Enabled": True,
    "isSecure": False,
    "localAddress": b"",
    "localHost": "",
    "localPort": 0,
    "timeout": -1,
    "unixSocketPath": "",
    "userData": "",
}


def info_of(sock: Socket) -> Info:
    """Return its info(), which has all keys, each of its type, and no others."""
    info = sock.info()
    assert list(info) == list(KEYS)
    assert len(info) == 19
    for key, types in KEYS.items():
        value = info[key]  # type: ignore[literal-required]
        assert type(value) in types, key
    return info


def address(info: Info, key: str) -> tuple[object, ...]:
    parsed = Sockets.parseAddress(info[key])  # type: ignore[literal-required]
    assert parsed is not None
    return parsed["host"], parsed["port"], parsed["addressFamily"]


async def test_info_of_an_object_that_was_never_connected(hs: Sockets) -> None:
    assert info_of(hs.new()) == NOTHING


async def test_info_while_it_is_connecting(hs: Sockets, path: str) -> None:
    tcp = hs.new().connect(LOCALHOST, hs.server(0).info()["localPort"])
    assert tcp is not None
    assert info_of(tcp) == {**NOTHING, "isDisconnected": False}
    async with nobody_accepts(path):
        unix = hs.new().connect(path)
        assert unix is not None
        assert info_of(unix) == {**NOTHING, "isDisconnected": False, "unixSocketPath": path}


@pytest.mark.parametrize(
    ("host", "family"), [(LOCALHOST, socket.AF_INET), ("::1", socket.AF_INET6)]
)
async def test_info_of_a_connection(hs: Sockets, host: str, family: int) -> None:
    async with connected(hs, host=host) as (client, peer):
        info = info_of(client)
        here, there = peer.getpeer(), peer.getlocal()
        assert address(info, "connectedAddress") == (*there, family)
        assert address(info, "localAddress") == (*here, family)
        assert info == {
            **NOTHING,
            "connectedAddress": info["connectedAddress"],
            "connectedHost": host,
            "connectedPort": there.port,
            "connections": 1,
            "isConnected": True,
            "isDisconnected": False,
            "isIPv4": family == socket.AF_INET,
            "isIPv6": family == socket.AF_INET6,
            "localAddress": info["localAddress"],
            "localHost": host,
            "localPort": here.port,
            "userData": "DEFAULT",
        }


async def test_info_of_a_unix_connection(hs: Sockets, path: str) -> None:
    async with connected_unix(hs, path) as (client, _peer):
        assert info_of(client) == {
            **NOTHING,
            "connectedURL": path,
            "connections": 1,
            "isConnected": True,
            "isDisconnected": False,
            "unixSocketPath": path,
            "userData": "DEFAULT",
        }


async def test_info_of_a_secure_connection(hs: Sockets, server_tls: ServerTLS) -> None:
    async with connected(hs) as (client, peer):
        client.startTLS(False)
        assert info_of(client)["isSecure"] is False
        await peer.starttls(server_tls)
        await until(lambda: client.info()["isSecure"])
        assert info_of(client)["isConnected"] is True


async def test_info_of_a_server_on_both_families(hs: Sockets) -> None:
    server = hs.server(0)
    info = info_of(server)
    assert address(info, "localAddress") == ("0.0.0.0", info["localPort"], socket.AF_INET)
    assert info["localPort"] > 0
    listening = {
        **NOTHING,
        "isDisconnected": False,
        "isIPv4": True,
        "isIPv6": True,
        "localAddress": info["localAddress"],
        "localHost": "0.0.0.0",
        "localPort": info["localPort"],
        "userData": "SERVER",
    }
    assert info == listening
    async with clients_of(server, 2):
        assert info_of(server) == {**listening, "connections": 2}


async def test_info_of_a_unix_server(hs: Sockets, path: str) -> None:
    listening = {
        **NOTHING,
        "isDisconnected": False,
        "unixSocketPath": path,
        "userData": "SERVER",
    }
    server = hs.server(path)
    assert info_of(server) == listening
    async with clients_of(server, 2):
        assert info_of(server) == {**listening, "connections": 2}


async def test_info_after_disconnect(hs: Sockets, path: str) -> None:
    for port_or_path in (0, path):
        server = hs.server(port_or_path)
        assert info_of(server.disconnect()) == NOTHING
    async with connected(hs) as (client, _peer):
        assert info_of(client.disconnect()) == NOTHING
    async with connected(hs) as (client, peer):
        await peer.close()
        await until(lambda: not client.connected())
        assert info_of(client) == NOTHING


async def test_repr_says_what_it_is_and_where(hs: Sockets, path: str) -> None:
    def tail(created: Socket) -> str:
        return f" ({id(created):#x})"

    server = hs.server(0)
    port = server.info()["localPort"]
    assert repr(server) == f"hs.socket(server): 0.0.0.0:{port}" + tail(server)
    unix = hs.server(path)
    assert repr(unix) == f"hs.socket(server): {path}" + tail(unix)
    async with connected(hs) as (client, peer):
        assert repr(client) == f"hs.socket: {peer.getlocal()}" + tail(client)
        client.disconnect()
        assert repr(client) == "hs.socket: :0" + tail(client)
    client.connect(path)
    assert repr(client) == f"hs.socket: {path}" + tail(client)


# ---- read ----


async def test_read_returns_self(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, _peer):
        assert client.read(1) is client
        assert client.receive("\n", 1) is client


async def test_read_by_count(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, peer):
        client.read(5)
        await peer.send(b"hel")
        assert await calls.none()
        await peer.send(b"lo, world")
        assert await calls.next() == (b"hello", -1)
        assert client.read(0) is client  # and nothing else, as in hs.socket
        assert await calls.none()


async def test_read_by_delimiter_up_to_and_including_it(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, peer):
        client.read("\r\n").read(b"\0\xff").read("é").read(bytearray(b"--"))  # type: ignore[union-attr, arg-type]
        await peer.send(b"one\ntwo\r")
        assert await calls.none()
        await peer.send(b"\n\0\0\xffcaf\xc3\xa9--rest")
        assert await calls.next() == (b"one\ntwo\r\n", -1)
        assert await calls.next() == (b"\0\0\xff", -1)
        assert await calls.next() == ("café".encode(), -1)
        assert await calls.next() == (b"--", -1)
        assert await calls.none()


async def test_read_tag_is_passed_to_the_callback(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, peer):
        client.read("\n", 7)
        client.read("\n", tag=0)
        client.read("\n")
        client.read("\n", None)
        await peer.send(b"a\nb\nc\nd\n")
        expected = [(b"a\n", 7), (b"b\n", 0), (b"c\n", -1), (b"d\n", -1)]
        assert [await calls.next() for _ in range(4)] == expected


async def test_read_calls_queue_in_order(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, peer):
        for tag in range(100):
            client.read("\n" if tag % 2 else 3, tag)
        await peer.send(b"abcd\n" * 50)
        for tag in range(100):
            assert await calls.next() == (b"d\n" if tag % 2 else b"abc", tag)


async def test_read_before_it_is_connected(hs: Sockets, calls: Calls) -> None:
    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new(calls).connect(LOCALHOST, listener.port)
        assert client is not None
        assert client.read("\n", 1) is client
        assert client.read("\n", 2) is client
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(b"one\ntwo\n")
            assert await calls.next() == (b"one\n", 1)
            assert await calls.next() == (b"two\n", 2)


async def test_read_without_a_callback_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs) as (client, _peer):
        assert client.read("\n") is None
        assert "there is no callback" in log.text
        assert client.connected()


async def test_read_unconnected_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture, calls: Calls
) -> None:
    assert hs.new(calls).read("\n") is None
    assert "it is not connected" in log.text


async def test_read_of_what_cannot_be_read_raises_and_harms_nothing(
    hs: Sockets, calls: Calls
) -> None:
    async with connected(hs, calls) as (client, peer):
        for wrong in ("", -1):
            with pytest.raises(ValueError, match="a number of bytes or a delimiter"):
                client.read(wrong)
        for wrong in (None, 1.5):
            with pytest.raises(TypeError, match="data is bytes or str"):
                client.read(wrong)  # type: ignore[arg-type]
        client.read("\n")
        await peer.send(b"a\n")
        assert await calls.next() == (b"a\n", -1)


async def test_arguments_of_the_wrong_kind_raise_at_once(hs: Sockets) -> None:
    for call in (
        lambda: hs.new(5),  # type: ignore[arg-type]
        lambda: hs.new().setCallback(5),  # type: ignore[arg-type]
        lambda: hs.new().setTimeout("5"),  # type: ignore[arg-type]
        lambda: hs.new().setTimeout(float("nan")),
        lambda: hs.new().connect(LOCALHOST, "80"),  # type: ignore[arg-type]
        lambda: hs.new().connect({"host": LOCALHOST, "port": 80}),  # type: ignore[arg-type]
        lambda: hs.new().connect(LOCALHOST, 80, 5),  # type: ignore[arg-type]
        lambda: hs.new().write("x", 1, 5),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"a function|a number of seconds|no host and port"):
            call()


async def test_read_of_a_listening_socket_reads_from_each_client(hs: Sockets, calls: Calls) -> None:
    server = hs.server(0, calls)
    async with clients_of(server, 3) as peers:
        assert server.read("\n", 5) is server
        for number, peer in enumerate(peers):
            await peer.send(b"%d\n" % number)
            assert await calls.next() == (b"%d\n" % number, 5)


async def test_read_of_a_listening_socket_is_for_those_who_are_there(
    hs: Sockets, calls: Calls
) -> None:
    server = hs.server(0, calls)
    assert server.read("\n", 1) is server  # from nobody
    async with clients_of(server) as [peer]:
        await peer.send(b"too late\n")
        assert await calls.none()
        server.read("\n", 2)
        assert await calls.next() == (b"too late\n", 2)


# ---- setCallback ----


async def test_setCallback_returns_self_and_holds_for_what_is_read_from_then_on(
    hs: Sockets, calls: Calls
) -> None:
    other = Calls()
    async with connected(hs, other) as (client, peer):
        client.read("\n", 1)
        client.read("\n", 2)
        assert client.setCallback(calls) is client
        await peer.send(b"a\n")
        assert await calls.next() == (b"a\n", 1)
        client.setCallback(other)
        await peer.send(b"b\n")
        assert await other.next() == (b"b\n", 2)


@pytest.mark.parametrize("arguments", [(), (None,)])
async def test_setCallback_with_None_or_no_argument_clears_it(
    hs: Sockets, calls: Calls, arguments: tuple[None, ...]
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.read("\n", 1)
        assert client.setCallback(*arguments) is client
        await peer.send(b"read by nobody\n")
        assert await calls.none()
        assert client.read("\n") is None
        client.setCallback(calls).read("\n", 2)
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", 2)


# ---- write ----


async def test_write_returns_self_and_writes_in_order(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        assert client.write("one ") is client
        assert client.send(b"two ") is client
        client.write("três ").write(bytearray(b"four ")).write(memoryview(b"five")).write("")  # type: ignore[arg-type]
        expected = "one two três four five".encode()
        assert await peer.recv_exactly(len(expected)) == expected


async def test_write_fn_receives_the_tag(hs: Sockets, calls: Calls) -> None:
    async with connected(hs) as (client, peer):
        for arguments, tag in [
            ((calls,), -1),
            ((7, calls), 7),
            ((0, calls), 0),
            ((None, calls), -1),
        ]:
            assert client.write("x", *arguments) is client  # type: ignore[arg-type]
            assert await calls.next() == (tag,)
        client.write("x", 8)
        client.write("x", fn=calls)
        client.write("x", fn=calls, tag=9)
        assert await calls.next() == (-1,)
        assert await calls.next() == (9,)
        assert await peer.recv_exactly(7) == b"xxxxxxx"
        assert await calls.none()  # single-use


async def test_write_copies_what_can_change(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        message = bytearray(b"before")
        client.write(message)  # type: ignore[arg-type]
        message[:] = b"after!"
        assert await peer.recv_exactly(6) == b"before"


async def test_write_before_it_is_connected(hs: Sockets, calls: Calls) -> None:
    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new().connect(LOCALHOST, listener.port, calls)
        assert client is not None
        client.write("hello\n", 1, calls)
        async with closing(await listener.accept()) as _:
            assert await calls.next() == ()
            assert await calls.next() == (1,)


async def test_write_unconnected_returns_self_and_is_logged(
    hs: Sockets, log: pytest.LogCaptureFixture, calls: Calls
) -> None:
    client = hs.new()
    assert client.write("lost", calls) is client
    assert "cannot write: it is not connected" in log.text
    assert await calls.none()


async def test_write_of_what_is_no_data_raises(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        with pytest.raises(TypeError):
            client.write(5)  # type: ignore[arg-type]
        client.write("still there")
        assert await peer.recv() == b"still there"


async def test_write_of_a_listening_socket_is_broadcast(hs: Sockets) -> None:
    server = hs.server(0)
    async with clients_of(server, 3) as peers:
        assert server.write("all\n") is server
        for peer in peers:
            assert await peer.recv_exactly(4) == b"all\n"


async def test_write_fn_of_a_listening_socket_is_called_once_when_all_have_it(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 3) as [quick, slow, other]:
        server.write(MORE_THAN_FITS, 5, calls)
        await quick.recv_exactly(len(MORE_THAN_FITS))
        await other.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.none()
        await slow.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.next() == (5,)
        assert await calls.none()


async def test_write_fn_of_a_listening_socket_does_not_count_those_who_are_lost(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 2) as [quick, slow]:
        server.write(MORE_THAN_FITS, 5, calls)
        await quick.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.none()
        slow.abort()
        assert await calls.next() == (5,)
        assert await calls.none()


async def test_write_fn_of_a_listening_socket_does_not_wait_for_those_who_have_left(
    hs: Sockets, calls: Calls
) -> None:
    server = hs.server(0)
    async with clients_of(server, 2) as [leaves, stays]:
        await leaves.close()
        await until(lambda: server.connections() == 1)
        server.write("hello", 5, calls)
        assert await calls.next() == (5,)
        assert await stays.recv() == b"hello"


async def test_write_fn_of_a_listening_socket_is_not_called_if_nobody_has_it(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    server.write("to nobody", calls)
    async with clients_of(server, 2) as peers:
        server.write(MORE_THAN_FITS, calls)
        await trio.testing.wait_all_tasks_blocked()
        for peer in peers:
            peer.abort()
        await until(lambda: not server.connected())
        assert await calls.none()


# ---- setTimeout ----


async def test_setTimeout_returns_self(hs: Sockets) -> None:
    created = hs.new()
    assert created.setTimeout(2.5) is created
    assert created.info()["timeout"] == 2.5


async def test_setTimeout_a_read_that_takes_longer_disconnects(
    jumping_clock: trio.testing.MockClock,
    hs: Sockets,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.setTimeout(5).read("\n")
        assert await ended(peer) == b""
        assert 5 <= trio.current_time() < 6
        assert client.info()["isDisconnected"]
        assert "a read took more than 5 s" in log.text
        assert not complaints(log)
        assert await calls.none()


async def test_setTimeout_a_write_that_takes_longer_disconnects(
    jumping_clock: trio.testing.MockClock, hs: Sockets, path: str, calls: Calls
) -> None:
    async with connected_unix(hs, path) as (client, _peer):
        client.setTimeout(5).write(MORE_THAN_FITS, calls)
        await trio.sleep(4.9)
        assert client.connected()
        await trio.sleep(0.2)
        assert client.info()["isDisconnected"]
        assert await calls.none()


async def test_setTimeout_a_connect_that_takes_longer_is_given_up(
    jumping_clock: trio.testing.MockClock,
    hs: Sockets,
    path: str,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    async with nobody_accepts(path):
        client = hs.new().setTimeout(5).connect(path, calls)
        assert client is not None
        await trio.sleep(4.9)
        assert not client.info()["isDisconnected"]
        await trio.sleep(0.2)
        assert client.info()["isDisconnected"]
        assert "the connect took more than 5 s" in log.text
        assert await calls.none()


async def test_setTimeout_a_handshake_that_takes_longer_disconnects(
    jumping_clock: trio.testing.MockClock, hs: Sockets
) -> None:
    async with connected(hs) as (client, peer):
        client.setTimeout(5).startTLS(False)
        client.write("secret")
        assert b"secret" not in await ended(peer)
        assert 5 <= trio.current_time() < 6
        await trio.sleep(1)
        assert client.info()["isDisconnected"]


async def test_setTimeout_no_handshake_is_without_a_limit(
    jumping_clock: trio.testing.MockClock, hs: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _queued._HANDSHAKE_TIMEOUT == 60
    monkeypatch.setattr(_queued, "_HANDSHAKE_TIMEOUT", 30)
    async with connected(hs) as (client, peer):
        client.startTLS(False)
        await ended(peer)
        assert 30 <= trio.current_time() < 31


async def test_setTimeout_is_for_what_is_queued_from_then_on(
    jumping_clock: trio.testing.MockClock, hs: Sockets, calls: Calls
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.setTimeout(5).read("\n")
        client.setTimeout(-1)
        await ended(peer)
        assert 5 <= trio.current_time() < 6
    async with connected(hs, calls) as (client, peer):
        client.setTimeout(-1).read("\n")
        client.setTimeout(1)
        await trio.sleep(40)
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)


async def test_setTimeout_counts_from_the_operations_turn(
    jumping_clock: trio.testing.MockClock, hs: Sockets, calls: Calls
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.setTimeout(5).read("\n")
        client.read("\n")
        await trio.sleep(4)
        await peer.send(b"line\n")
        await ended(peer)
        assert 9 <= trio.current_time() < 10
        assert await calls.next() == (b"line\n", -1)


async def test_setTimeout_negative_means_none(
    jumping_clock: trio.testing.MockClock, hs: Sockets, path: str, calls: Calls
) -> None:
    async with connected_unix(hs, path, calls) as (client, peer):
        client.setTimeout(-1).read("\n")
        client.write(MORE_THAN_FITS, calls)
        await trio.sleep(50)
        assert client.connected()
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)
        await peer.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.next() == (-1,)


# ---- startTLS ----


async def starttls_server(sock: trisock.Socket, tls: ServerTLS) -> None:
    """Talk a protocol with STARTTLS; then send back what comes."""
    await sock.send(b"hello\n")
    assert await sock.recv_until(b"\n") == b"STARTTLS\n"
    await sock.send(b"go ahead\n")
    await sock.starttls(tls)
    async for line in sock.lines(keep_ends=True):
        await sock.send(b"in secret: " + line)


async def test_startTLS_is_done_in_order_with_reads_and_writes(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    async def handler(sock: trisock.Socket) -> None:
        await starttls_server(sock, server_tls)

    def callback(data: bytes, tag: int) -> None:
        calls(data, tag, client.info()["isSecure"])
        if tag == 1:
            assert client.write("STARTTLS\n").read("\n", 2) is client
            assert client.startTLS("example.org") is client
            client.write("one\n").write("two\n")
            client.read("\n", 3)
            client.read("\n", 4)

    client = hs.new(callback)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client.connect("localhost", server.port)
        client.read("\n", 1)
        assert await calls.next() == (b"hello\n", 1, False)
        assert await calls.next() == (b"go ahead\n", 2, False)
        assert await calls.next() == (b"in secret: one\n", 3, True)
        assert await calls.next() == (b"in secret: two\n", 4, True)
        client.disconnect()
        server.stop()


async def test_startTLS_write_startTLS_write_read_in_one_callback(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    async def handler(sock: trisock.Socket) -> None:
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == b"STARTTLS\n"
        await sock.starttls(server_tls)
        await sock.send(b"in secret: " + await sock.recv_until(b"\n"))

    def callback(data: bytes, tag: int) -> None:
        calls(data, tag)
        if tag == 1:
            client.write("STARTTLS\n").startTLS().write("one\n").read("\n", 2)

    client = hs.new(callback)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client.connect("localhost", server.port)
        client.read("\n", 1)
        assert await calls.next() == (b"hello\n", 1)
        assert await calls.next() == (b"in secret: one\n", 2)
        server.stop()


async def tls_by_hand(peer: trisock.Socket, tls: ServerTLS) -> bytes:
    """Be a TLS server until the connection ends; return all the bytes that came over it."""
    came = bytearray()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls._context().wrap_bio(incoming, outgoing, server_side=True)
    with contextlib.suppress(trio.BrokenResourceError):
        async for chunk in peer:
            came += chunk
            incoming.write(chunk)
            with contextlib.suppress(ssl.SSLError):
                server.do_handshake()
            if outgoing.pending:
                await peer.send(outgoing.read())
    return bytes(came)


GOOD = [(), (True,), (False,), ("example.org",), (True, "example.org"), (False, "example.org")]
GOOD += [(None,), (None, "example.org")]


@pytest.mark.parametrize("arguments", GOOD)
async def test_startTLS_with_verify_and_peerName(
    hs: Sockets,
    trusted: None,
    server_tls: ServerTLS,
    calls: Calls,
    arguments: tuple[Any, ...],
) -> None:
    async with connected(hs, calls) as (client, peer):
        assert client.startTLS(*arguments) is client
        client.write("secret\n")
        client.read("\n")
        await peer.starttls(server_tls)
        assert await peer.recv_until(b"\n") == b"secret\n"
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)


@pytest.mark.parametrize(
    "arguments",
    [
        (),  # which verifies the host given to connect
        (True,),
        ("wrong.example",),
        (True, "wrong.example"),
        (False, "wrong.example"),  # a name is verified all the same
        (ClientTLS("wrong.example"),),
        (ClientTLS(), "wrong.example"),
        (ClientTLS("example.org"), "wrong.example"),
    ],
)
async def test_startTLS_with_the_wrong_name_disconnects_and_sends_nothing_in_the_clear(
    hs: Sockets,
    trusted: None,
    authority: Authority,
    calls: Calls,
    log: pytest.LogCaptureFixture,
    arguments: tuple[Any, ...],
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.write("in the clear\n").startTLS(*arguments)
        client.write("secret\n", calls)
        client.read("\n")
        assert await peer.recv_exactly(13) == b"in the clear\n"
        came = await tls_by_hand(peer, ServerTLS(authority.issue("example.org")))
        assert came.startswith(b"\x16\x03")  # a handshake's record
        assert b"secret" not in came
        await until(lambda: client.info()["isDisconnected"])
        assert "certificate" in log.text
        client.write("secret\n")  # is not connected
        assert await calls.none()


@pytest.mark.parametrize("arguments", [each for each in GOOD if each != (False,)])
async def test_startTLS_with_an_unknown_authority_disconnects(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, arguments: tuple[Any, ...]
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.startTLS(*arguments).write("secret\n", calls)
        came = await tls_by_hand(peer, server_tls)
        assert came.startswith(b"\x16\x03")
        assert b"secret" not in came
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.none()


async def test_startTLS_False_takes_a_certificate_of_anybody(
    hs: Sockets, other_authority: Authority, calls: Calls
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.startTLS(False).read("\n")
        await peer.starttls(ServerTLS(other_authority.issue("anybody.example")))
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)


async def test_startTLS_over_a_unix_connection_needs_a_name(
    hs: Sockets,
    trusted: None,
    path: str,
    server_tls: ServerTLS,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    async with connected_unix(hs, path, calls) as (client, peer):
        client.startTLS().write("secret")
        assert await ended(peer) == b""
        assert "needs to know the server's name" in log.text
    async with connected_unix(hs, path, calls) as (client, peer):
        client.startTLS("example.org").read("\n")
        await peer.starttls(server_tls)
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)


async def test_startTLS_of_a_listening_socket_is_for_its_clients(
    hs: Sockets, client_tls: ClientTLS, server_tls: ServerTLS, calls: Calls
) -> None:
    server = hs.server(0, calls)
    async with clients_of(server, 2) as peers:
        server.write("go ahead\n")
        assert server.startTLS(server_tls) is server
        server.write("hello\n")
        server.read("\n")
        for peer in peers:
            assert await peer.recv_until(b"\n") == b"go ahead\n"
            await peer.starttls(client_tls)
            assert await peer.recv_until(b"\n") == b"hello\n"
            await peer.send(b"secret\n")
            assert await calls.next() == (b"secret\n", -1)


async def test_startTLS_of_a_listening_socket_without_certificates_disconnects(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    server = hs.server(0)
    async with clients_of(server) as [peer]:
        server.startTLS().write("secret")
        assert await ended(peer) == b""
        assert "needs to know the server's name" in log.text


async def test_startTLS_twice_changes_nothing_and_is_logged(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.startTLS(False).startTLS(False).write("secret\n").read("\n")
        await peer.starttls(server_tls)
        assert await peer.recv_until(b"\n") == b"secret\n"
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)
        assert "it is using TLS already" in log.text


async def test_startTLS_unconnected_returns_self_and_is_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    created = hs.new()
    assert created.startTLS() is created
    assert "cannot start TLS: it is not connected" in log.text


async def test_startTLS_before_it_is_connected(
    hs: Sockets, server_tls: ServerTLS, calls: Calls
) -> None:
    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new(calls).connect(LOCALHOST, listener.port)
        assert client is not None
        client.startTLS(False).read("\n")
        peer = await listener.accept()
        async with closing(peer):
            await peer.starttls(server_tls)
            await peer.send(b"yes\n")
            assert await calls.next() == (b"yes\n", -1)


async def test_startTLS_what_was_injected_behind_the_go_ahead_reaches_no_callback(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    def callback(data: bytes, tag: int) -> None:
        calls(data)
        client.startTLS("example.org").read("\n")

    async with connected(hs) as (client, peer):
        client.setCallback(callback).read("\n")
        await peer.send(b"go ahead\ninjected\n")
        with pytest.raises(trio.BrokenResourceError):
            await peer.starttls(server_tls)
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.next() == (b"go ahead\n",)
        assert await calls.none()


async def test_startTLS_what_came_while_nothing_was_read_reaches_no_callback(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    async with connected(hs, calls) as (client, peer):
        await peer.send(b"injected\n")
        await trio.testing.wait_all_tasks_blocked()  # it is in the buffer
        client.startTLS("example.org").read("\n")
        with pytest.raises(trio.BrokenResourceError):
            await peer.starttls(server_tls)
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.none()


@pytest.mark.parametrize("more", ["", "\n"], ids=["nothing to read", "a read that cannot be done"])
async def test_startTLS_behind_the_end_of_the_stream_disconnects_behind_what_was_written(
    more: str, hs: Sockets, trusted: None, calls: Calls
) -> None:
    def callback(data: bytes, tag: int) -> None:
        calls(data)
        client.write("last words\n")
        if more:
            client.read(more)
        client.startTLS("example.org")

    async with connected(hs) as (client, peer):
        client.setCallback(callback).read("\n")
        await peer.send(b"go ahead\n")
        await peer.send_eof()
        assert (await ended(peer)).startswith(b"last words\n")
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.next() == (b"go ahead\n",)
        assert await calls.none()


@pytest.mark.parametrize("arguments", [("",), (True, "not a name"), (True, 5), (False, b"x")])
async def test_startTLS_with_bad_arguments_raises_and_disconnects(
    hs: Sockets, arguments: tuple[Any, ...]
) -> None:
    async with connected(hs) as (client, peer):
        client.write("in the clear\n")
        await peer.recv_until(b"\n")
        with pytest.raises((TypeError, ValueError)):
            client.startTLS(*arguments)
        client.write("secret")
        assert await ended(peer) == b""


@pytest.mark.parametrize("arguments", [(0,), (5,), (b"example.org",)])
async def test_startTLS_with_what_is_no_role_is_logged_and_disconnects(
    hs: Sockets, log: pytest.LogCaptureFixture, arguments: tuple[Any, ...]
) -> None:
    async with connected(hs) as (client, peer):
        client.startTLS(*arguments).write("secret")
        assert await ended(peer) == b""
        assert complaints(log)


async def test_startTLS_of_a_server_with_a_peerName_disconnects(
    hs: Sockets, server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs) as (client, peer):
        client.startTLS(server_tls, "example.org").write("secret")
        assert await ended(peer) == b""
        assert "server_hostname is for the TLS client's role" in log.text


# ---- the end of the stream ----


async def test_what_came_before_the_end_is_still_read(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, calls) as (client, peer):
        await peer.send(b"one\ntwo")
        await peer.close()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.connected()
        client.read("\n", 1)
        client.read(3, 2)
        assert await calls.next() == (b"one\n", 1)
        assert await calls.next() == (b"two", 2)
        await until(lambda: client.info()["isDisconnected"])


async def test_a_read_that_can_never_be_done_disconnects(hs: Sockets, calls: Calls) -> None:
    for wanted in (10, "\n"):
        async with connected(hs, calls) as (client, peer):
            client.read(wanted)
            await peer.send(b"too few")
            await peer.close()
            await until(lambda: client.info()["isDisconnected"])
    assert await calls.none()


async def test_the_end_is_seen_while_nothing_is_read(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        await peer.close()
        await until(lambda: client.info()["isDisconnected"])
    server = hs.server(0)
    async with clients_of(server) as [peer]:
        await peer.close()
        await until(lambda: not server.connected())


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("plain", [True, False])
async def test_a_client_that_shuts_down_its_side_gets_the_answer(
    hs: Sockets, again: bool, plain: bool
) -> None:
    def answer(data: bytes, tag: int) -> None:
        server.write(b"answer to " + data)
        if again:
            server.read("\n")

    async def slow(data: bytes, tag: int) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        answer(data, tag)

    server = hs.server(0, answer if plain else slow)
    async with clients_of(server) as [peer]:
        server.read("\n")
        await peer.send(b"question\n")
        await peer.send_eof()
        assert await ended(peer) == b"answer to question\n"
        assert not server.connected()


async def test_a_client_that_shut_down_its_side_before_it_was_read_gets_the_answer(
    hs: Sockets,
) -> None:
    server = hs.server(0)
    server.setCallback(lambda data, tag: server.write(data))
    async with clients_of(server) as [peer]:
        await peer.send(b"one\ntwo\n")
        await peer.send_eof()
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.read("\n")
        server.read("\n")
        assert await ended(peer) == b"one\ntwo\n"


async def test_a_client_that_shuts_down_its_side_gets_all_that_is_queued(
    hs: Sockets, path: str
) -> None:
    server = hs.server(path)
    async with clients_of(server) as [peer]:
        server.write(MORE_THAN_FITS).write("the last")
        await peer.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert await ended(peer) == MORE_THAN_FITS + b"the last"


async def test_the_end_of_a_secure_stream_disconnects(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.startTLS(False).read("\n", 1)
        await peer.starttls(server_tls)
        await peer.send(b"line\nrest")
        await peer.close()
        assert await calls.next() == (b"line\n", 1)
        client.read(4, 2)
        assert await calls.next() == (b"rest", 2)
        await until(lambda: client.info()["isDisconnected"])
    assert all(each.levelno == logging.DEBUG for each in log.records)


async def test_the_end_of_a_secure_stream_without_close_notify_is_logged(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.startTLS(False).read("\n")
        await peer.starttls(server_tls)
        await peer.send(b"cut of")
        await until(lambda: client.info()["isSecure"])
        peer.stream.socket.shutdown(socket.SHUT_WR)  # behind the back of TLS
        await until(lambda: client.info()["isDisconnected"])
    assert log.records[-2].levelno == logging.WARNING
    assert await calls.none()


async def test_a_reset_disconnects(
    hs: Sockets, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, calls) as (client, peer):
        client.read("\n")
        peer.abort()
        await until(lambda: client.info()["isDisconnected"])
    server = hs.server(0, calls)
    async with clients_of(server, 2) as peers:
        peers[0].abort()
        await until(lambda: server.connections() == 1)
        server.read("\n")
        await peers[1].send(b"line\n")
        assert await calls.next() == (b"line\n", -1)
    assert not complaints(log)


# ---- callbacks ----


async def test_callbacks_may_be_async(hs: Sockets, calls: Calls) -> None:
    async def connecting() -> None:
        await trio.lowlevel.checkpoint()
        calls("connected")

    async def reading(data: bytes, tag: int) -> None:
        await trio.lowlevel.checkpoint()
        calls(data, tag)

    async def writing(tag: int) -> None:
        await trio.lowlevel.checkpoint()
        calls(tag)

    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new(reading).connect(LOCALHOST, listener.port, connecting)
        assert client is not None
        client.write("x\n", 1, writing).read("\n", 2)
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(await peer.recv())
            assert await calls.next() == ("connected",)
            assert await calls.next() == (1,)
            assert await calls.next() == (b"x\n", 2)


async def test_callbacks_of_one_object_come_in_order_and_one_at_a_time(
    hs: Sockets, calls: Calls
) -> None:
    go_on = trio.Event()

    async def connecting() -> None:
        calls("connected")
        await go_on.wait()
        calls("still connecting")

    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new(calls).connect(LOCALHOST, listener.port, connecting)
        assert client is not None
        client.write("x\n", 1, calls)
        client.read("\n", 2)
        client.read("\n", 3)
        peer = await listener.accept()
        async with closing(peer):
            assert await calls.next() == ("connected",)
            assert await peer.recv() == b"x\n"  # only the callbacks wait
            await peer.send(b"a\nb\n")
            assert await calls.none()
            async with connected(hs, calls) as (other, others_peer):  # and only this object's
                other.read("\n")
                await others_peer.send(b"other\n")
                assert await calls.next() == (b"other\n", -1)
            go_on.set()
            assert await calls.next() == ("still connecting",)
            assert await calls.next() == (1,)
            assert await calls.next() == (b"a\n", 2)
            assert await calls.next() == (b"b\n", 3)


async def test_a_callback_that_raises_is_logged_and_harms_nothing(
    hs: Sockets, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    def failing(*arguments: object) -> None:
        raise ZeroDivisionError("plain")

    async def failing_later(*arguments: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("async")

    async def failing_in_a_group(*arguments: object) -> None:
        raise ExceptionGroup("group", [ZeroDivisionError("in a group")])

    async with await trisock.listen(0, LOCALHOST) as listener:
        for callback, words in [
            (failing, "plain"),
            (failing_later, "async"),
            (failing_in_a_group, "in a group"),
        ]:
            log.clear()
            client = hs.new(callback).connect(LOCALHOST, listener.port, callback)
            assert client is not None
            client.write("x\n", callback).read("\n")
            peer = await listener.accept()
            async with closing(peer):
                await peer.send(await peer.recv())
                await until(lambda: len(complaints(log)) == 3)
                assert complaints(log) == [f"a callback of {client!r} failed"] * 3
                assert f"ZeroDivisionError: {words}" in log.text
                client.setCallback(calls).read("\n")
                await peer.send(b"goes on\n")
                assert await calls.next() == (b"goes on\n", -1)
                client.disconnect()


async def test_what_a_callbacks_own_nursery_raises_is_logged_and_cancelled_passes(
    log: pytest.LogCaptureFixture,
) -> None:
    begun = trio.Event()

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise ZeroDivisionError("while it was cancelled") from None

    async def callback() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_when_cancelled)
            nursery.start_soon(trio.sleep_forever)
            begun.set()

    async with hammerspoon.open_sockets() as hs:
        async with connected(hs) as (client, peer):
            client.disconnect().connect(*peer.getlocal(), callback)
            await begun.wait()
    [complaint] = complaints(log)
    assert re.fullmatch(r"a callback of hs\.socket: .* failed", complaint)
    assert "ZeroDivisionError: while it was cancelled" in log.text


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), BaseExceptionGroup("group", [KeyboardInterrupt()])]
)
async def test_a_callback_that_raises_what_is_no_Exception_ends_all(error: BaseException) -> None:
    def callback() -> None:
        raise error

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        async with hammerspoon.open_sockets() as hs:
            hs.new().connect(LOCALHOST, hs.server(0).info()["localPort"], callback)
            await trio.sleep_forever()
    assert isinstance(caught.value, BaseExceptionGroup)
    assert caught.value.split(KeyboardInterrupt)[1] is None  # there is nothing else


class Group(BaseExceptionGroup[Exception]):
    """A group that is no Exception, with nothing but those."""


async def test_a_callbacks_group_of_exceptions_is_logged_whatever_it_is_called(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    def callback() -> None:
        raise Group("group", [ZeroDivisionError("in a group")])

    async with connected(hs) as (client, peer):
        client.disconnect().connect(*peer.getlocal(), callback)
        await until(lambda: complaints(log))
        assert "ZeroDivisionError: in a group" in log.text


async def test_an_async_callback_that_reconnects_its_own_object(hs: Sockets, calls: Calls) -> None:
    async def callback(data: bytes, tag: int) -> None:
        calls(data, tag)
        if data == b"again\n":
            client.disconnect()
            await trio.lowlevel.checkpoint()
            assert client.connect(LOCALHOST, listener.port, reconnected) is client
            client.write("me again\n").read("\n", 2)
            await trio.testing.wait_all_tasks_blocked(0.01)
            calls("still in the first callback")

    def reconnected() -> None:
        calls("connected")

    async with await trisock.listen(0, LOCALHOST) as listener:
        client = hs.new(callback)
        client.connect(LOCALHOST, listener.port)
        client.read("\n", 1)
        client.read("\n", "dropped")  # type: ignore[arg-type]
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(b"again\n")
            again = await listener.accept()
            async with closing(again):
                assert await peer.recv() == b""
                assert await again.recv_until(b"\n") == b"me again\n"
                await again.send(b"welcome\n")
                assert await calls.next() == (b"again\n", 1)
                assert await calls.next() == ("still in the first callback",)
                assert await calls.next() == ("connected",)
                assert await calls.next() == (b"welcome\n", 2)
                assert await calls.none()


# ---- open_sockets ----


async def test_leaving_ends_all(
    path: str, tmp_path: pathlib.Path, log: pytest.LogCaptureFixture, calls: Calls
) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with (
        await trisock.listen(0, LOCALHOST) as listener,
        nobody_accepts(str(tmp_path / "full")),
        contextlib.AsyncExitStack() as stack,
    ):
        async with hammerspoon.open_sockets() as hs:
            server, unix = hs.server(0, calls), hs.server(path, calls)
            await stack.enter_async_context(clients_of(server, 2))
            await stack.enter_async_context(clients_of(unix, 2))
            objects = [server, unix]
            for number in range(4):
                client = hs.new(calls).connect(LOCALHOST, listener.port)
                assert client is not None
                await stack.enter_async_context(closing(await listener.accept()))
                await until(client.connected)
                objects.append(client)
                if number == 0:  # reads
                    client.read("\n")
                elif number == 1:  # shakes hands
                    client.startTLS(False)
                elif number == 2:  # is in a callback, and another one is due
                    client.write("x", lambda tag: trio.sleep_forever())
                    client.write("x", calls)
                else:  # closes
                    client.disconnect()
            connecting = hs.new(calls).connect(str(tmp_path / "full"), calls)
            assert connecting is not None
            objects.append(connecting)
            unix.write(MORE_THAN_FITS, calls)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert all(each.info() == NOTHING for each in objects)
        assert not os.path.exists(path)
    assert await calls.none()
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert not complaints(log)


async def test_no_callback_begins_after_leaving() -> None:
    calls = Calls()
    async with trio.open_nursery() as nursery:
        queue = _callbacks.CallbackQueue("it", nursery, logging.getLogger("test"))
        queue.put(calls)
        nursery.cancel_scope.cancel()
    assert await calls.none()


async def test_an_exception_out_of_the_block_comes_out_as_it_is() -> None:
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught:
        async with hammerspoon.open_sockets() as hs:
            hs.server(0)
            raise error
    assert caught.value is error


async def test_an_exception_out_of_a_cancelled_block_comes_out_as_it_is() -> None:
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught, trio.CancelScope() as scope:
        async with hammerspoon.open_sockets() as hs:
            hs.server(0)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            raise error
    assert caught.value is error


async def test_cancellation_passes_through_and_leaves_nothing_behind() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    with trio.CancelScope() as scope:
        async with hammerspoon.open_sockets() as hs, connected(hs, print) as (client, _peer):
            client.read("\n")
            hs.server(0)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert client.info() == NOTHING
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_calls_after_leaving_are_logged(
    log: pytest.LogCaptureFixture, path: str, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs, connected(hs, calls) as (client, _peer):
        server = hs.server(0, calls)
    for each in (client, server, hs.new(calls), hs.server(0, calls)):
        for call in [
            lambda: each.connect(LOCALHOST, 1),  # noqa: B023
            lambda: each.connect(path),  # noqa: B023
            lambda: each.listen(0),  # noqa: B023
            lambda: each.listen(path),  # noqa: B023
            lambda: each.read("\n"),  # noqa: B023
        ]:
            log.clear()
            assert call() is None
            assert len(complaints(log)) == 1
        for again in [lambda: each.write("lost", calls), each.startTLS]:  # noqa: B023
            log.clear()
            assert again() is each
            assert len(complaints(log)) == 1
        assert each.disconnect() is each
        assert each.setCallback().setTimeout(1).connected() is False
    assert not os.path.exists(path)
    assert await calls.none()


# ---- bounds on peers ----


async def test_a_read_that_finds_no_delimiter_within_MAX_READ_disconnects(
    hs: Sockets,
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_queued, "MAX_READ", 100)
    server = hs.server(0, calls)
    async with clients_of(server, 2) as [endless, good]:
        server.read("\n")
        await endless.send(b"x" * 100)
        await until(lambda: server.connections() == 1)
        assert "no delimiter within 100 bytes" in log.text
        await good.send(b"x" * 99 + b"\n")
        assert await calls.next() == (b"x" * 99 + b"\n", -1)
    assert not complaints(log)


async def test_a_client_that_does_not_read_is_disconnected_at_MAX_UNSENT_and_no_other(
    hs: Sockets,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_queued, "MAX_UNSENT", _callbacks.cost(MORE_THAN_FITS))
    server = hs.server(path)
    async with clients_of(server, 2) as [good, stuck]:
        for tag in (1, 2):
            server.write(MORE_THAN_FITS, tag, calls)
            await good.recv_exactly(len(MORE_THAN_FITS))
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.connections() == 2  # it may wait until there is more than the limit
        server.write("the last", 3, calls)
        assert await good.recv_exactly(8) == b"the last"
        await until(lambda: server.connections() == 1)
        assert [await calls.next() for _ in range(3)] == [(1,), (2,), (3,)]
        assert "bytes are already queued for it" in log.text
        assert b"the last" not in await ended(stuck)
    assert not complaints(log)


async def test_reads_that_wait_for_a_silent_client_are_MAX_READS_at_most(
    hs: Sockets, path: str, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(_queued, "MAX_READS", 3)
    server = hs.server(path, calls)
    async with clients_of(server, 1) as [client]:
        for tag in range(5):
            server.read("\n", tag)
        await client.send(b"a\nb\nc\nd\n")
        assert [await calls.next() for _ in range(3)] == [(b"a\n", 0), (b"b\n", 1), (b"c\n", 2)]
        server.read("\n", 5)
        assert await calls.next() == (b"d\n", 5)


async def test_a_client_object_writes_as_much_as_the_program_wants(
    hs: Sockets, path: str, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(_queued, "MAX_UNSENT", 1)
    async with connected_unix(hs, path) as (client, peer):
        client.write(MORE_THAN_FITS).write(MORE_THAN_FITS).write("the last", calls)
        await peer.recv_exactly(2 * len(MORE_THAN_FITS) + 8)
        await calls.next()


async def test_a_server_whose_accept_fails_for_good_is_logged_and_free_again(
    hs: Sockets, path: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EINVAL, "broken")

    monkeypatch.setattr(ListeningSockets, "accept_from", fail)
    for port_or_path, words in [(0, "the server on 0.0.0.0:"), (path, f"the server on {path}")]:
        server = hs.server(port_or_path)
        await until(lambda: server.info()["isDisconnected"])  # noqa: B023
        assert words in log.text
        assert server.listen(0) is server
        await until(lambda: server.info()["isDisconnected"])  # noqa: B023
    assert not os.path.exists(path)


# ---- setLogLevel ----


@pytest.mark.parametrize(
    ("name", "number", "level"),
    [
        ("nothing", 0, logging.CRITICAL + 1),
        ("error", 1, logging.ERROR),
        ("warning", 2, logging.WARNING),
        ("info", 3, logging.INFO),
        ("debug", 4, logging.DEBUG),
        ("verbose", 5, logging.DEBUG),
    ],
)
def test_setLogLevel_takes_the_levels_of_hs_logger(
    log: pytest.LogCaptureFixture, name: str, number: int, level: int
) -> None:
    logger = logging.getLogger("trisock.hammerspoon")
    for given in (name, number):
        logger.setLevel(logging.NOTSET)
        Sockets.setLogLevel(given)
        assert logger.level == level


@pytest.mark.parametrize("wrong", ["loud", 6, ""])
def test_setLogLevel_of_anything_else_raises(
    log: pytest.LogCaptureFixture, wrong: str | int
) -> None:
    with pytest.raises((ValueError, IndexError)):
        Sockets.setLogLevel(wrong)


async def test_setLogLevel_decides_what_is_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    for level, messages in [("nothing", 0), ("error", 1), ("debug", 1)]:
        hs.setLogLevel(level)
        log.clear()
        hs.new().write("lost")
        assert len(log.records) == messages


async def test_connecting_and_disconnecting_is_logged_for_debugging(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    server = hs.server(0)
    async with clients_of(server) as [peer]:
        await peer.close()
        await until(lambda: not server.connected())
        where = peer.getlocal()
    assert log.messages == [f"{where}: connected", f"the client {where}: disconnected"]
