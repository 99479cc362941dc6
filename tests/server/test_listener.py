"""Tests of listen and Listener."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.failures import few_descriptors, reset_in_the_backlog
from helpers.pairs import closing
from helpers.server import bound, limit_of_the_backlog
from trisock import Listener
from trisock._server import listening as _listening


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        yield listener


async def accept_raises_closed(listener: Listener) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


# ---- listen ----


async def test_ipv4_and_ipv6_share_one_port_if_host_is_none() -> None:
    async with await trisock.listen(0) as listener:
        assert listener.port
        assert listener.addresses == (("0.0.0.0", listener.port), ("::", listener.port))
        for host in ("127.0.0.1", "::1"):
            client = await trisock.connect(host, listener.port)
            server = await listener.accept()
            async with closing(client, server):
                assert server.getlocal() == (host, listener.port)
                assert server.getpeer() == client.getlocal()
        assert repr(listener).endswith(f"[::]:{listener.port} open>")
    assert repr(listener).endswith("closed>")
    assert listener.port  # still known after the close


async def test_all_addresses_of_a_host_get_the_same_port() -> None:
    async with await trisock.listen(0, host="localhost") as listener:
        assert len({address.port for address in listener.addresses}) == 1


async def test_listen_retries_if_a_port_is_taken_on_one_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = socket.socket.bind
    refused = []

    class Unlucky(socket.socket):
        def bind(self, address: object) -> None:
            if self.family == socket.AF_INET6 and len(refused) < 3:
                refused.append(address)
                raise OSError(errno.EADDRINUSE, "in use")
            real(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(_listening.socket, "socket", Unlucky)
    async with await trisock.listen(0) as listener:
        assert len(refused) == 3
        assert {address.port for address in listener.addresses} == {listener.port}
    monkeypatch.setattr("trisock._server.listener._SAME_PORT_TRIES", 2)
    refused.clear()
    with pytest.raises(OSError, match=r"cannot listen on \*:0") as caught:
        await trisock.listen(0)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("at", ["socket", "bind"])
async def test_a_machine_without_ipv6_listens_on_ipv4(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.socket

    class NoIPv6(socket.socket):
        def __init__(self, family: int = -1, *args: object, **kwargs: object) -> None:
            if at == "socket" and family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")
            super().__init__(family, *args, **kwargs)  # type: ignore[arg-type]

        def bind(self, address: object) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, "no IPv6 here")
            real.bind(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(_listening.socket, "socket", NoIPv6)
    async with await trisock.listen(0) as listener:
        assert listener.addresses == (("0.0.0.0", listener.port),)
    with pytest.raises(OSError, match="cannot listen on"):
        await trisock.listen(0, host="::1")


@pytest.mark.parametrize(("port", "more"), [(80, r" \(a port below 1024 needs .*\)"), (8080, "")])
async def test_a_forbidden_port_raises_an_oserror_that_says_why(
    port: int, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(_listening.socket, "socket", Forbidden)
    with pytest.raises(
        PermissionError, match=rf"cannot listen on \*:{port}: Permission denied{more}$"
    ):
        await trisock.listen(port)


async def test_listen_fails_if_only_one_address_family_gets_a_descriptor() -> None:
    with few_descriptors(1), pytest.raises(OSError, match="cannot listen on") as caught:
        await trisock.listen(0)
    assert caught.value.errno == errno.EMFILE


async def test_a_port_in_use_raises_an_oserror_with_the_address(listener: Listener) -> None:
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{listener.port}") as caught:
        await trisock.listen(listener.port, host="127.0.0.1")
    assert caught.value.errno == errno.EADDRINUSE


async def test_two_listeners_can_share_a_port_with_reuse_port() -> None:
    async with await trisock.listen(0, host="127.0.0.1", reuse_port=True) as one:
        async with await trisock.listen(one.port, host="127.0.0.1", reuse_port=True) as two:
            assert one.port == two.port
        async with bound(
            trisock.Socket.recv, one.port, host="127.0.0.1", reuse_port=True
        ) as server:
            assert one.port == server.port


async def test_reuse_port_fails_on_platforms_without_so_reuseport(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(OSError, match="no SO_REUSEPORT on this platform"):
        await trisock.listen(0, reuse_port=True)


@pytest.mark.parametrize("backlog", [None, 0, 7])
async def test_the_backlog_is_the_given_one_or_the_systems_maximum(backlog: int | None) -> None:
    maximum = int(Path("/proc/sys/net/core/somaxconn").read_text())
    expected = min(maximum, 0xFFFF) if backlog is None else backlog
    async with bound(trisock.Socket.recv, host="127.0.0.1", backlog=backlog) as server:
        assert limit_of_the_backlog(server._listening.sockets[0]) == expected
    async with await trisock.listen(0, host="127.0.0.1", backlog=backlog) as listener:
        assert limit_of_the_backlog(listener.sockets[0]) == expected
    async with trisock.listen_nowait(0, host="127.0.0.1", backlog=backlog) as listener:
        assert limit_of_the_backlog(listener.sockets[0]) == expected


async def test_listen_refuses_invalid_arguments() -> None:
    for arguments, options, error, words in [
        (("80",), {}, TypeError, "a port must be an int"),
        ((65536,), {}, ValueError, "0-65535"),
        ((0,), {"host": b"localhost"}, TypeError, "a host must be a str or None"),
        ((0,), {"host": "a b"}, ValueError, "not a host name"),
        ((0,), {"backlog": 1.5}, TypeError, "backlog must be an int or None"),
        ((0,), {"backlog": True}, TypeError, "backlog must be an int or None"),
        ((0,), {"backlog": -1}, ValueError, "backlog must be 0 or more"),
        ((0,), {"host": "unknown.invalid"}, OSError, "cannot listen on unknown.invalid:0"),
        ((0,), {"host": "192.0.2.1"}, OSError, "cannot listen on 192.0.2.1:0"),
        ((0, "127.0.0.1"), {}, TypeError, "positional argument"),
    ]:
        with pytest.raises(error, match=words):
            await trisock.listen(*arguments, **options)  # type: ignore[arg-type]


async def test_listen_can_reuse_a_closed_listeners_port_immediately() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        client = await trisock.connect("127.0.0.1", listener.port)
        server = await listener.accept()
        await server.send_eof()  # the side that sends FIN first enters TIME_WAIT
        assert await client.recv() == b""
        await client.close()
        await server.close()
    async with await trisock.listen(listener.port, host="127.0.0.1"):
        pass


# ---- Listener ----


async def test_iteration_over_a_listener_ends_when_it_closes() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    got = []
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            async for sock in listener:
                got.append(sock)

        nursery.start_soon(serve)
        clients = [await trisock.connect("127.0.0.1", listener.port) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        await listener.close()
    assert len(got) == 3
    async with closing(*got, *clients):
        pass
    for call in (listener.accept, listener.__aiter__().accept):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    closed = rf"this side has already closed the listener on 127\.0\.0\.1:{listener.port}$"
    with pytest.raises(trio.ClosedResourceError, match=closed):
        listener.hasconnection()
    await listener.aclose()


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
async def test_closing_a_listener_wakes_the_task_in_accept(host: str | None) -> None:
    listener = await trisock.listen(0, host=host)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_raises_closed, listener)
        await trio.testing.wait_all_tasks_blocked()
        busy = (
            rf"another task is accepting from the listener on .*:{listener.port}.*: only one task"
        )
        with pytest.raises(trio.BusyResourceError, match=busy):
            await listener.accept()
        with trio.testing.assert_checkpoints():
            await listener.close()


async def test_hasconnection_guarantees_that_accept_returns() -> None:
    async with await trisock.listen(0) as listener:
        assert not listener.hasconnection()
        client = await trisock.connect("localhost", listener.port)
        while not listener.hasconnection():
            await trio.lowlevel.checkpoint()
        assert listener.hasconnection()
        client.abort()
        assert listener.hasconnection()
        with trio.testing.assert_checkpoints():
            sock = await listener.accept()
        assert not listener.hasconnection()
        sock.abort()


async def test_hasconnection_takes_no_connection_from_a_waiting_accept() -> None:
    async with await trisock.listen(0) as listener:
        got = []

        async def accept() -> None:
            got.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            client = socket.create_connection(("127.0.0.1", listener.port))
            assert not listener.hasconnection()  # no other task has run since the connect
        with client:
            async with closing(*got):
                assert len(got) == 1


async def test_hasconnection_promises_no_connection_that_another_task_accepts() -> None:
    async with await trisock.listen(0) as listener:
        client = await trisock.connect("localhost", listener.port)
        while not listener.hasconnection():
            await trio.lowlevel.checkpoint()
        found: list[bool] = []

        async def look() -> None:
            found.append(listener.hasconnection())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            sock = await listener.accept()  # its checkpoint lets ``look`` run
        assert found == [False]
        sock.abort()
        client.abort()


async def test_closing_a_listener_resets_a_connection_found_by_hasconnection() -> None:
    async with await trisock.listen(0) as listener:
        client = await trisock.connect("localhost", listener.port)
        while not listener.hasconnection():
            await trio.lowlevel.checkpoint()
    async with closing(client):
        with pytest.raises(trio.BrokenResourceError):
            await client.recv()


async def test_a_cancelled_accept_loses_no_connection() -> None:
    async with await trisock.listen(0) as listener:
        client = await trisock.connect("localhost", listener.port)
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        assert scope.cancelled_caught
        async with closing(client, await listener.accept()):
            pass


async def test_a_connection_reset_before_accept_is_dropped_and_counted(
    listener: Listener,
) -> None:
    for _ in range(3):
        reset_in_the_backlog(listener.port)
    assert not listener.hasconnection()
    assert listener.dropped == 3
    reset_in_the_backlog(listener.port)
    client = await trisock.connect("127.0.0.1", listener.port)
    server = await listener.accept()
    async with closing(client, server):
        assert listener.dropped == 4
        assert server.getpeer() == client.getlocal()


async def test_accept_skips_dead_connections_reported_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Systems other than Linux report a dead connection as an error of accept(2)."""

    class Reporting(socket.socket):
        errors = [errno.ECONNABORTED, errno.EPROTO]

        def accept(self) -> object:  # type: ignore[override]
            if self.errors:
                raise OSError(self.errors.pop(), "dead")
            return super().accept()

    listening = Reporting()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    async with Listener([listening]) as listener:
        client = await trisock.connect("127.0.0.1", listener.port)
        async with closing(client, await listener.accept()):
            assert listener.dropped == 2


async def test_accept_without_descriptors_raises_oserror_and_loses_no_connection(
    listener: Listener,
) -> None:
    client = await trisock.connect("127.0.0.1", listener.port)
    with few_descriptors(0):
        text = rf"cannot accept from the listener on \S+:{listener.port}: Too many open files"
        with pytest.raises(OSError, match=text) as caught:
            await listener.accept()
        assert caught.value.errno == errno.EMFILE
        assert not listener.hasconnection()  # because accept would raise an error
    async with closing(client, await listener.accept()):
        pass


async def test_accept_alternates_between_the_sockets_of_a_listener() -> None:
    """A flood of connections to one address does not starve the other address."""
    async with await trisock.listen(0) as listener:
        clients = [await trisock.connect("127.0.0.1", listener.port) for _ in range(5)]
        clients.append(await trisock.connect("::1", listener.port))
        first_two = [await listener.accept() for _ in range(2)]
        rest = [await listener.accept() for _ in range(4)]
        async with closing(*clients, *first_two, *rest):
            assert {sock.getlocal().host for sock in first_two} == {"127.0.0.1", "::1"}


async def test_listening_sockets_can_be_adopted() -> None:
    plain = socket.create_server(("127.0.0.1", 0))
    of_trio = trio.socket.socket()
    await of_trio.bind(("127.0.0.1", 0))
    of_trio.listen()
    # systemd passes a listening socket as a descriptor.
    from_a_descriptor = socket.socket(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    for sock in (plain, of_trio, from_a_descriptor):
        async with Listener([sock]) as listener:
            client = await trisock.connect("127.0.0.1", listener.port)
            async with closing(client, await listener.accept()):
                pass


async def test_a_listener_refuses_sockets_that_do_not_listen() -> None:
    for make, error, words in [
        (list, ValueError, "at least one socket"),
        (lambda: ["x"], TypeError, "needs sockets"),
    ]:
        with pytest.raises(error, match=words):
            Listener(make())
    with socket.socket() as stream, pytest.raises(ValueError, match="not a listening socket"):
        Listener([stream])
    with socket.socket(type=socket.SOCK_DGRAM) as datagram:
        with pytest.raises(ValueError, match="not a stream socket"):
            Listener([datagram])


async def test_accept_skips_a_backlog_full_of_dead_connections(listener: Listener) -> None:
    for _ in range(1500):
        reset_in_the_backlog(listener.port)
    client = await trisock.connect("127.0.0.1", listener.port)
    with trio.testing.assert_checkpoints():
        server = await listener.accept()
    async with closing(client, server):
        assert listener.dropped == 1500
        assert server.getpeer() == client.getlocal()


async def test_hasconnection_skips_a_bounded_number_of_dead_connections(
    listener: Listener,
) -> None:
    for _ in range(200):
        reset_in_the_backlog(listener.port)
    assert not listener.hasconnection()
    assert listener.dropped == _listening._MAX_DEAD_PER_PASS


async def iteration_ends(listener: Listener) -> None:
    async for _ in listener:
        raise AssertionError


@pytest.mark.parametrize("passes", range(6))
@pytest.mark.parametrize("ends", [accept_raises_closed, iteration_ends])
async def test_closing_a_listener_at_any_moment_ends_its_accept(
    ends: Callable[[Listener], Awaitable[None]], passes: int
) -> None:
    for _ in range(5):  # Trio chooses at random which task runs first
        listener = await trisock.listen(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends, listener)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            await listener.close()


async def test_listener_does_not_close_a_socket_that_it_refuses() -> None:
    with trio.socket.socket() as sock:
        with pytest.raises(ValueError, match="not a listening socket"):
            Listener([sock])
        assert sock.fileno() >= 0


# ---- outside Trio ----


def test_listen_nowait_works_outside_trio() -> None:
    listener = trisock.listen_nowait(0)
    assert listener.addresses == (("0.0.0.0", listener.port), ("::", listener.port))
    client = socket.create_connection(("127.0.0.1", listener.port))

    async def serve() -> None:
        async with listener, await listener.accept() as server:
            assert server.getpeer() == client.getsockname()

    with client:
        trio.run(serve)


async def test_listen_nowait_accepts_addresses_but_no_names() -> None:
    async with trisock.listen_nowait(0, host="::1") as listener:
        assert listener.addresses == (("::1", listener.port),)
        with pytest.raises(OSError, match=rf"\[::1\]:{listener.port}") as caught:
            trisock.listen_nowait(listener.port, host="::1")
        assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(ValueError, match="not a name: 'localhost'"):
        trisock.listen_nowait(0, host="localhost")
    with pytest.raises(TypeError):
        trisock.listen_nowait("80")  # type: ignore[arg-type]


async def test_abort_stops_listening_immediately() -> None:
    listener = await trisock.listen(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_raises_closed, listener)
        await trio.testing.wait_all_tasks_blocked()
        listener.abort()
    listener.abort()  # A second abort does nothing.
    trisock.listen_nowait(listener.port).abort()  # The port is free.


def test_listeners_and_sockets_can_be_aborted_outside_trio() -> None:
    listener = trisock.listen_nowait(0, host="127.0.0.1")
    with (
        socket.create_connection(("127.0.0.1", listener.port)) as first,
        socket.create_connection(("127.0.0.1", listener.port)) as second,
    ):
        accepted = trio.run(listener.accept)
        assert accepted.isopen()
        accepted.abort()
        assert not accepted.isopen()
        with pytest.raises(ConnectionResetError):
            first.recv(1)
        assert listener.hasconnection()
        listener.abort()
        with pytest.raises(ConnectionResetError):
            second.recv(1)
