"""connect, connected, listen, close and closed of hs.socket.udp's objects."""

# ruff: noqa: N802 (tests are named after hs.socket.udp's names)

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
import trio

from helpers.hammerspoon import LOCALHOST, Calls, Log, errors_in, until
from helpers.hammerspoon_udp import (
    BROADCAST,
    CLOSED,
    IPV6_LOCALHOST,
    WaitingResolver,
    free_port,
    local,
    port_of,
    raw_udp,
    sender,
)
from helpers.resolver import Resolver
from trisock.hammerspoon import UDPSockets

# ---- connect, connected ----


async def test_connect_to_an_address_is_connected_at_once(
    udp: UDPSockets, there: Any, host: str
) -> None:
    client = udp.new()
    assert client.connect(host, there.getsockname()[1]) is client
    assert client.connected()
    assert not client.closed()
    client.send("hello")
    assert (await there.recvfrom(10))[1][:2] == local(client.info())


async def test_connect_to_localhost_needs_no_lookup(udp: UDPSockets) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())  # a lookup would raise KeyError
    for prefer, disable, expected in [
        (None, None, LOCALHOST),
        (4, None, LOCALHOST),
        (6, None, IPV6_LOCALHOST),
        (None, 4, IPV6_LOCALHOST),
        (6, 6, LOCALHOST),
    ]:
        client: Any = udp.new().preferIPv(prefer)
        if disable is not None:
            client.enableIPv(disable, False)
        client.connect("LocalHost", 9)
        assert client.connected()
        assert client.info()["connectedHost"] == expected


async def test_connect_calls_fn_of_a_udp_object_once_without_arguments(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    client = udp.new().connect(host, there.getsockname()[1], calls)
    assert client is not None
    client.send("x", calls)
    assert await calls.take(2) == [(), (-1,)]
    assert await calls.none()


async def test_connect_to_a_name_is_connected_after_the_lookup(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    resolver = WaitingResolver(name=[host])
    trio.socket.set_custom_hostname_resolver(resolver)
    client = udp.new(calls).connect("name", there.getsockname()[1], calls)
    assert client is not None
    assert not client.connected()
    assert not client.closed()
    assert client.receive() is client
    client.send("one", 1, calls).send("two", 2, calls)
    assert await calls.none()
    resolver.release.set()
    assert await calls.take(3) == [(), (1,), (2,)]
    assert client.connected()
    assert await there.recv(10) == b"one"
    await there.sendto(b"answer", local(client.info()))
    assert (await calls.next())[0] == b"answer"


async def test_a_connected_object_receives_from_its_peer_only(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    client = udp.new(calls).connect(host, there.getsockname()[1])
    assert client is not None
    client.receive()
    with raw_udp(host) as stranger:
        await stranger.sendto(b"from a stranger", local(client.info()))
        await there.sendto(b"from the peer", local(client.info()))
        data, sockaddr = await calls.next()
        assert (data, sender(sockaddr)) == (b"from the peer", there.getsockname()[:2])
    assert await calls.none()


async def test_a_second_connect_returns_None_and_logs(
    udp: UDPSockets, there: Any, host: str, log: Log, calls: Calls
) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    client: Any = udp.new().connect(host, there.getsockname()[1])
    connecting: Any = udp.new().connect("name", 9)
    server = udp.server(0)
    for each in (client, connecting, server):
        log.clear()
        before = each.info()
        assert each.connect(host, 9, calls) is None
        assert "it is already connected or listening" in log.text
        assert each.info() == before
    client.send("hello")
    assert await there.recv(10) == b"hello"
    assert await calls.none()


async def test_connect_after_a_send_keeps_the_order_and_gets_a_new_port(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    resolver = WaitingResolver(name=[host])
    trio.socket.set_custom_hostname_resolver(resolver)
    port = there.getsockname()[1]
    client: Any = udp.new(calls).send("one", "name", port)
    client.receive()
    first_port = port_of(client)
    assert client.connect(host, port, calls) is client
    assert not client.connected()  # connect waits for the send
    client.send("two")
    resolver.release.set()
    assert await calls.next() == ()
    assert client.connected()
    for data, sent_from in [(b"one", first_port), (b"two", port_of(client))]:
        got, address = await there.recvfrom(10)
        assert (got, address[1]) == (data, sent_from)
    assert first_port != port_of(client)
    await there.sendto(b"answer", address)  # receive is still in effect
    assert (await calls.next())[0] == b"answer"


async def test_connect_drops_a_datagram_that_a_stranger_has_sent(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    resume = trio.Event()

    async def slow(tag: int) -> None:
        calls("slow")
        await resume.wait()

    client: Any = udp.new(calls).send("x", host, there.getsockname()[1], slow)
    assert await calls.next() == ("slow",)
    client.receive()
    with raw_udp(host) as stranger:
        await stranger.sendto(b"from a stranger", (host, port_of(client)))
    assert await calls.none()  # its callback waits for ``slow``
    client.connect(host, there.getsockname()[1])
    resume.set()
    await there.sendto(b"from the peer", local(client.info()))
    assert (await calls.next())[0] == b"from the peer"
    assert await calls.none()


async def test_connect_after_a_finished_send_is_connected_at_once(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    port = there.getsockname()[1]
    client: Any = udp.new(calls).send("one", host, port, calls)
    client.receive()
    assert await calls.next() == (-1,)
    assert await calls.none()
    client.connect(host, port)
    assert client.connected()
    await there.sendto(b"answer", local(client.info()))
    assert (await calls.next())[0] == b"answer"


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        (LOCALHOST, 0, "a peer's port must be in 1-65535, not 0"),
        ("localhost", 0, "a peer's port must be in 1-65535, not 0"),
        ("name", 0, "a peer's port must be in 1-65535, not 0"),
        (LOCALHOST, 65536, "a port must be in 0-65535"),
        (LOCALHOST, -1, "a port must be in 0-65535"),
        (BROADCAST, 9, "cannot connect to 127.255.255.255:9: Permission denied"),
        ("unknown", 9, "cannot look up unknown:9: not known"),
        ("no\nname", 9, "is not a host name"),
        ("", 9, "is not a host name"),
    ],
)
async def test_a_connect_that_fails_is_logged_and_leaves_the_object_closed(
    udp: UDPSockets, log: Log, calls: Calls, host: str, port: int, reason: str
) -> None:
    class Partial(Resolver):
        async def getaddrinfo(self, name: bytes | None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            if name == b"unknown":
                raise trio.socket.gaierror(trio.socket.EAI_NONAME, "not known")
            return await super().getaddrinfo(name, *args, **kwargs)

    trio.socket.set_custom_hostname_resolver(Partial(name=[LOCALHOST]))
    client: Any = udp.new(calls)
    assert client.connect(host, port, calls) is client
    if not client.closed():
        client.send("lost", 1, calls).receive()
    await until(client.closed)
    assert client.info() == CLOSED
    [record] = [each for each in log.records if each.levelno > logging.DEBUG]
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert record.getMessage().isprintable()
    assert await calls.none()
    with raw_udp() as there:
        assert client.connect(*there.getsockname()) is client
        client.send("next")
        assert await there.recv(10) == b"next"


async def test_a_connect_that_fails_after_a_send_leaves_the_object_open(
    udp: UDPSockets, there: Any, host: str, log: Log, calls: Calls
) -> None:
    resolver = WaitingResolver(name=[host])
    trio.socket.set_custom_hostname_resolver(resolver)
    address = (host, there.getsockname()[1])
    client: Any = udp.new().send("one", "name", address[1], calls)
    before = client.info()
    client.connect("unknown", 9, calls)
    client.send("lost", 1, calls).send("lost", 2, calls)
    resolver.release.set()
    assert await calls.next() == (-1,)
    await until(lambda: "KeyError" in log.text)  # the fake resolver raised it
    assert client.info() == before
    log.clear()
    client.send("next", *address, 3, calls)
    assert await calls.next() == (3,)
    assert [await there.recv(10) for _ in range(2)] == [b"one", b"next"]
    assert await calls.none()
    assert {each.levelno for each in log.records} == {logging.DEBUG}  # the lost sends are dropped


@pytest.mark.parametrize(
    "arguments", [(LOCALHOST,), (LOCALHOST, "9"), (LOCALHOST, True), (b"x", 9), (9, LOCALHOST)]
)
async def test_connect_raises_TypeError_for_arguments_of_wrong_types(
    udp: UDPSockets, arguments: Any
) -> None:
    client = udp.new()
    with pytest.raises(TypeError):
        client.connect(*arguments)
    assert client.closed()


async def test_connect_to_a_broadcast_address_needs_broadcast(udp: UDPSockets, log: Log) -> None:
    with raw_udp(BROADCAST) as there:
        client: Any = udp.new().broadcast()
        client.connect(*there.getsockname()).send("to all")
        assert await there.recv(10) == b"to all"


async def test_connected_is_true_only_after_connect(udp: UDPSockets, calls: Calls) -> None:
    client = udp.new()
    assert client.connected() is False
    client.send("x", LOCALHOST, 9)
    assert client.connected() is False
    assert udp.server(0).connected() is False
    client.connect(LOCALHOST, 9, calls)
    assert await calls.next() == ()
    assert client.connected() is True
    assert client.close().connected() is False


# ---- listen ----


async def test_listen_returns_self_and_binds_the_port(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    port = free_port()
    server = udp.new(calls)
    assert server.listen(port) is server
    server.receive()
    await there.sendto(b"hello", (host, port))
    data, sockaddr = await calls.next()
    assert (data, sender(sockaddr)) == (b"hello", there.getsockname()[:2])


async def test_listen_on_port_0_takes_a_free_port(udp: UDPSockets) -> None:
    server = udp.new()
    assert server.listen(0) is server
    assert port_of(server) > 0


async def test_listen_on_a_taken_port_returns_None_and_logs(udp: UDPSockets, log: Log) -> None:
    with raw_udp("::") as taken:
        port = taken.getsockname()[1]
        server = udp.new()
        assert server.listen(port) is None
        assert server.closed()
        assert errors_in(log) == [
            f"{server!r}: [Errno {errno.EADDRINUSE}] cannot open UDP on *:{port}: "
            "Address already in use"
        ]
    assert server.listen(port) is server


async def test_listen_on_an_open_object_returns_None_and_logs(udp: UDPSockets, log: Log) -> None:
    sent, connected = udp.new().send("x", LOCALHOST, 9), udp.new().connect(LOCALHOST, 9)
    assert connected is not None
    for each in (sent, connected, udp.server(0)):
        log.clear()
        before = each.info()
        assert each.listen(0) is None
        assert "cannot listen: it is not closed" in log.text
        assert each.info() == before


@pytest.mark.parametrize("port", [-1, 65536])
async def test_listen_on_an_impossible_port_returns_None_and_logs(
    udp: UDPSockets, log: Log, port: int
) -> None:
    assert udp.new().listen(port) is None
    assert "a port must be in 0-65535" in log.text


@pytest.mark.parametrize("port", ["9", None, True, 9.0])
async def test_listen_raises_TypeError_for_ports_of_wrong_types(udp: UDPSockets, port: Any) -> None:
    server = udp.new()
    with pytest.raises(TypeError, match="a port must be an int"):
        server.listen(port)
    assert server.closed()


# ---- close, closed ----


async def test_close_returns_self_in_any_state(udp: UDPSockets) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    objects: list[Any] = [
        udp.new(),
        udp.server(0),
        udp.new().send("x", LOCALHOST, 9),
        udp.new().connect(LOCALHOST, 9),
        udp.new().connect("name", 9),
    ]
    for each in objects:
        assert each.close() is each
        assert each.info() == CLOSED
        assert each.close() is each


async def test_close_frees_the_port_and_the_object_at_once(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    server = udp.server(0, calls)
    server.receive()
    port = port_of(server)
    assert await calls.none()  # the object is waiting for a datagram
    server.close()
    assert udp.server(port).info()["userData"] == "SERVER"
    assert server.connect(host, there.getsockname()[1]) is server
    await there.sendto(b"not received", local(server.info()))
    assert await calls.none()  # close has cancelled receive
    server.receive()
    assert (await calls.next())[0] == b"not received"


async def test_two_objects_can_change_roles(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    port = free_port()
    a: Any = udp.server(port)
    b: Any = udp.new().connect(host, port)
    for server, client in [(a, b), (b, a)]:
        assert (server.info()["localPort"], client.info()["connectedPort"]) == (port, port)
        server.receive(calls)
        client.send("hello")
        assert (await calls.next())[0] == b"hello"
        a.close()
        b.close()
        assert a.info()["localPort"] == b.info()["connectedPort"] == 0
        client.listen(port)
        server.connect(host, port)


async def test_close_drops_pending_sends_datagrams_and_callbacks(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    resume = trio.Event()
    address = (host, there.getsockname()[1])
    client: Any = udp.new(calls).send("one", *address, lambda tag: resume.wait())
    client.send("two", *address, calls).receive()
    _, address_of_client = await there.recvfrom(10)
    assert await there.recv(10) == b"two"
    await there.sendto(b"datagram", address_of_client)
    assert await calls.none()
    client.send("lost", *address, calls)
    assert client.close().closed()
    resume.set()
    client.listen(0)
    client.receive()
    client.send("next", *address, 5, calls)
    assert await there.recv(10) == b"next"
    assert await calls.next() == (5,)
    assert await calls.none()


async def test_close_keeps_the_callback_and_the_settings(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    server = udp.server(0, calls)
    server.setTimeout(5).setBufferSize(3).preferIPv(6).close()
    settings = {"timeout": 5, "isIPv6Preferred": True, "isIPVersionNeutral": False}
    sizes = {"maxReceiveIPv4BufferSize": 3, "maxReceiveIPv6BufferSize": 3}
    assert server.info() == {**CLOSED, **settings, **sizes}
    server.listen(0)
    assert server.receive() is server
    await there.sendto(b"hello", (host, port_of(server)))
    assert (await calls.next())[0] == b"hel"


async def test_closed_is_true_until_a_send_connect_or_listen(
    udp: UDPSockets,
) -> None:
    for use in (
        lambda each: each.send("x", LOCALHOST, 9),
        lambda each: each.connect(LOCALHOST, 9),
        lambda each: each.listen(0),
    ):
        each: Any = udp.new(print)
        each.broadcast().reusePort().enableIPv(4).preferIPv().pause().setTimeout(1)
        assert each.closed() is True
        use(each)
        assert each.closed() is False
        assert each.close().closed() is True
