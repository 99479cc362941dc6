"""hs.socket's documented names, and timeout, new, server, open_sockets and setLogLevel."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pathlib
import pickle
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    MORE_THAN_FITS,
    UNCONNECTED,
    Calls,
    Log,
    clients_of,
    connected,
    errors_in,
    full_backlog,
    until,
)
from helpers.pairs import closing, read_all
from trisock import hammerspoon
from trisock.hammerspoon import Socket, Sockets, callbacks

# ---- hs.socket's page ----


def test_every_name_on_hs_sockets_page_exists() -> None:
    for name in [
        "connect", "connected", "connections", "disconnect", "info", "listen", "read", "receive",
        "send", "setCallback", "setTimeout", "startTLS", "write",
    ]:  # fmt: skip
        assert callable(getattr(Socket, name))
    for name in ["new", "server", "parseAddress", "setLogLevel"]:
        assert callable(getattr(Sockets, name))


def test_receive_and_send_are_aliases_of_read_and_write() -> None:
    assert Socket.receive is Socket.read
    assert Socket.send is Socket.write


async def test_the_http_client_on_hs_sockets_page_works(hs: Sockets) -> None:
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
            client.read(int(contentLength), TAG_HTTP_CONTENT)  # type: ignore[union-attr]
        elif tag == TAG_HTTP_CONTENT:
            printed(tag, "TAG_HTTP_CONTENT")
            printed(data)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = hs.new(httpCallback).connect("localhost", server.port)
        assert client is not None
        client.write("GET /index.html HTTP/1.0\r\nHost: google.com\r\n\r\n")
        client.read("\r\n\r\n", TAG_HTTP_HEADER)
        assert await printed.take(4) == [
            (1, "TAG_HTTP_HEADER"),
            (b"HTTP/1.0 301 Moved Permanently\r\nContent-Length: 5\r\n\r\n",),
            (2, "TAG_HTTP_CONTENT"),
            (b"<html",),
        ]
        await until(lambda: not client.connected())
        server.stop()
    assert requests == [b"GET /index.html HTTP/1.0\r\nHost: google.com\r\n\r\n"]


# ---- timeout, new, server ----


async def test_timeout_applies_to_new_objects_only(hs: Sockets) -> None:
    assert hs.timeout == -1  # hs.socket's default
    before = hs.new()
    hs.timeout = 5
    assert before.info()["timeout"] == -1
    assert hs.new().info()["timeout"] == 5
    assert hs.server(0).info()["timeout"] == 5
    assert hs.new().setTimeout(7).info()["timeout"] == 7


async def test_a_new_object_times_out_after_the_modules_timeout(
    autojump_clock: MockClock, hs: Sockets
) -> None:
    hs.timeout = 5
    async with connected(hs, fn=print) as (client, peer):
        hs.timeout = -1
        client.read("\n")
        assert await read_all(peer) == b""
        assert 5 <= trio.current_time() < 6


async def test_new_returns_an_unconnected_object(hs: Sockets) -> None:
    created = hs.new()
    assert isinstance(created, Socket)
    assert not created.connected()
    assert created.connections() == 0


async def test_new_accepts_the_read_callback(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.read("\n")
    await peer.send(b"line\n")
    assert await calls.next() == (b"line\n", -1)


async def test_server_accepts_a_port_or_path_and_a_callback(
    hs: Sockets, port_or_path: int | str, calls: Calls
) -> None:
    if port_or_path == 0:
        async with await trisock.listen(0) as listener:
            port_or_path = listener.port
    server = hs.server(port_or_path, calls)
    assert port_or_path in (server.info()["localPort"], server.info()["unixSocketPath"])
    async with clients_of(server) as [peer]:
        server.read("\n")
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)


async def test_server_on_port_0_listens_on_any_free_port(hs: Sockets) -> None:
    ports = {hs.server(0).info()["localPort"] for _ in range(3)}
    assert len(ports) == 3
    assert 0 not in ports


async def test_server_returns_an_object_even_if_it_cannot_listen(
    hs: Sockets, log: Log, port_or_path: int | str, path: str
) -> None:
    in_use = hs.server(port_or_path).info()
    created = hs.server(in_use["localPort"] or path)
    assert isinstance(created, Socket)
    assert created.info()["isDisconnected"]
    assert "cannot listen" in log.text
    assert created.listen(0) is created


# ---- open_sockets ----


async def test_no_socket_or_task_is_left_after_open_sockets_exits(
    path: str, tmp_path: pathlib.Path, log: Log, calls: Calls
) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with (
        await trisock.listen(0, host=LOCALHOST) as listener,
        full_backlog(str(tmp_path / "full")),
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
                if number == 0:  # a read in progress
                    client.read("\n")
                elif number == 1:  # a handshake in progress
                    client.startTLS(False)
                elif number == 2:  # a callback in progress, and a second one queued
                    client.write("x", lambda tag: trio.sleep_forever())
                    client.write("x", calls)
                else:  # a close in progress
                    client.disconnect()
            connecting = hs.new(calls).connect(str(tmp_path / "full"), calls)
            assert connecting is not None
            objects.append(connecting)
            unix.write(MORE_THAN_FITS, calls)
            await wait_all_tasks_blocked(0.01)
        assert all(each.info() == UNCONNECTED for each in objects)
        assert not os.path.exists(path)
    assert await calls.none()
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert not errors_in(log)


async def test_no_callback_starts_after_open_sockets_exits() -> None:
    calls = Calls()
    async with trio.open_nursery() as nursery:
        queue = callbacks.CallbackQueue("it", nursery, logging.getLogger("test"))
        queue.put(calls)
        nursery.cancel_scope.cancel()
    assert await calls.none()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_an_exception_from_the_block_is_raised_unchanged(cancelled: bool) -> None:
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught, trio.CancelScope() as scope:
        async with hammerspoon.open_sockets() as hs:
            hs.server(0)
            await wait_all_tasks_blocked()
            if cancelled:
                scope.cancel()
            raise error
    assert caught.value is error


async def test_cancelling_open_sockets_closes_sockets_and_ends_tasks() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    with trio.CancelScope() as scope:
        async with hammerspoon.open_sockets() as hs, connected(hs, fn=print) as (client, _peer):
            client.read("\n")
            hs.server(0)
            await wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert client.info() == UNCONNECTED
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_a_call_after_open_sockets_has_exited_is_logged(
    log: Log, path: str, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs, connected(hs, fn=calls) as (client, _peer):
        server = hs.server(0, calls)
    for each in (client, server, hs.new(calls), hs.server(0, calls)):
        for returned, method, *arguments in [
            (None, each.connect, LOCALHOST, 1),
            (None, each.connect, path),
            (None, each.listen, 0),
            (None, each.listen, path),
            (None, each.read, "\n"),
            (each, each.write, "lost", calls),
            (each, each.startTLS),
        ]:
            log.clear()
            assert method(*arguments) is returned
            assert len(errors_in(log)) == 1
        assert each.disconnect() is each
        assert each.setCallback().setTimeout(1).connected() is False
    assert not os.path.exists(path)
    assert await calls.none()


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
def test_setLogLevel_accepts_the_levels_of_hs_logger(
    log: Log, name: str, number: int, level: int
) -> None:
    logger = logging.getLogger("trisock.hammerspoon")
    for given in (name, number):
        logger.setLevel(logging.NOTSET)
        Sockets.setLogLevel(given)
        assert logger.level == level


async def test_setLogLevel_suppresses_messages_below_the_level(hs: Sockets, log: Log) -> None:
    for level, messages in [("nothing", 0), ("error", 1), ("debug", 1)]:
        hs.setLogLevel(level)
        log.clear()
        hs.new().write("lost")
        assert len(log.records) == messages


async def test_a_clients_connect_and_disconnect_are_logged(hs: Sockets, log: Log) -> None:
    server = hs.server(0)
    async with clients_of(server) as [peer]:
        await peer.close()
        await until(lambda: not server.connected())
        where = peer.getlocal()
    assert log.messages == [f"{where}: connected", f"the client {where}: disconnected"]


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_the_objects_cannot_be_copied(
    hs: Sockets, copying: Callable[[object], object]
) -> None:
    """A copy would share the object's queue, but not its state."""
    for each in (hs, hs.new(), hs.udp, hs.udp.new()):
        with pytest.raises(TypeError, match=r"cannot be (copied|pickled)"):
            copying(each)
