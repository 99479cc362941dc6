"""send, write, setTimeout and broadcast of hs.socket.udp's objects, and the bounds of sends."""

# ruff: noqa: N802 (tests are named after hs.socket.udp's names)

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trisock
from helpers.full_buffer import full_buffer
from helpers.hammerspoon import LOCALHOST, Calls, Log, errors_in, measured, until
from helpers.hammerspoon_udp import (
    BROADCAST,
    CLOSED,
    WaitingResolver,
    free_port,
    local,
    port_of,
    raw_udp,
)
from helpers.resolver import Resolver
from trisock.hammerspoon import UDPSockets, callbacks
from trisock.hammerspoon.udp import endpoint

MIB = 1024 * 1024


async def received(there: Any, number: int) -> list[bytes]:
    """Wait for the next datagrams; return their data."""
    return [await there.recv(65535) for _ in range(number)]


# ---- send, write ----


@pytest.mark.parametrize("method", ["send", "write"])
async def test_send_and_write_send_one_datagram_each(
    udp: UDPSockets, there: Any, host: str, method: str
) -> None:
    port = there.getsockname()[1]
    client = udp.new()
    send = getattr(client, method)
    buffer = bytearray(b"buffer")
    for data in (b"", "café", b"\0\xff", buffer, bytes(65507)):
        assert send(data, host, port) is client
    buffer[:] = b"edited"
    assert await received(there, 5) == [b"", "café".encode(), b"\0\xff", b"buffer", bytes(65507)]


async def test_send_without_host_goes_to_the_peer(udp: UDPSockets, there: Any, host: str) -> None:
    client = udp.new().connect(host, there.getsockname()[1])
    assert client is not None
    assert client.send("one").write("two") is client
    assert await received(there, 2) == [b"one", b"two"]


async def test_send_opens_a_closed_object_at_once(udp: UDPSockets, there: Any, host: str) -> None:
    client = udp.new().send("one", host, there.getsockname()[1])
    assert not client.closed()
    client.send("two", host, there.getsockname()[1])
    for _ in range(2):
        assert (await there.recvfrom(100))[1][:2] == (host, port_of(client))


async def test_send_passes_the_tag_to_its_callback(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    address = (host, there.getsockname()[1])
    client = udp.new()
    client.send("x", *address, 7, calls).send("x", *address, calls)
    client.send("x", *address, 0, calls).send("x", *address, None, calls)
    client.send("x", *address, fn=calls, tag=9).send("x", host=host, port=address[1], tag=calls)  # type: ignore[call-overload]
    client.send("x", *address, 5).send("x", *address, 3, calls)
    assert await calls.take(7) == [(7,), (-1,), (0,), (-1,), (9,), (-1,), (3,)]
    client.close().connect(*address)
    client.send("x", 7, calls).send("x", calls).send("x", 0, calls)
    client.send("x", None, calls).send("x", fn=calls, tag=9).send("x", tag=calls).send("x", 1)
    assert await calls.take(6) == [(7,), (-1,), (0,), (-1,), (9,), (-1,)]
    assert await calls.none()  # each callback is called once
    await received(there, 15)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), {}),
        ((LOCALHOST,), {}),
        ((9, LOCALHOST), {}),
        ((LOCALHOST, "9"), {}),
        ((LOCALHOST, True), {}),
        ((b"localhost", 9), {}),
        ((None, 9), {}),
        ((print,), {}),
        ((5, print), {}),
        ((LOCALHOST, 9, "tag"), {}),
        ((LOCALHOST, 9, 1.5), {}),
        ((LOCALHOST, 9, 1, "fn"), {}),
        ((LOCALHOST, 9, print, print), {}),
        ((LOCALHOST, 9, 1, print, None), {}),
        ((LOCALHOST, 9), {"port": 9}),
        ((LOCALHOST, 9), {"timeout": 5}),
    ],
)
async def test_send_raises_TypeError_for_wrong_arguments(
    udp: UDPSockets, arguments: Any, named: Any
) -> None:
    client = udp.new()
    with pytest.raises(TypeError):
        client.send("x", *arguments, **named)
    assert client.info() == CLOSED


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((LOCALHOST, 9), {}),
        ((LOCALHOST,), {}),
        ((), {"host": LOCALHOST, "port": 9}),
        ((1, 2), {}),
        ((print, print), {}),
        ((True,), {}),
        ((1, print, None), {}),
        ((1,), {"tag": 2}),
    ],
)
async def test_send_raises_TypeError_for_a_host_on_a_connected_object(
    udp: UDPSockets, there: Any, host: str, arguments: Any, named: Any
) -> None:
    client: Any = udp.new().connect(host, there.getsockname()[1])
    with pytest.raises(TypeError):
        client.send("wrong", *arguments, **named)
    client.send("right")
    assert await there.recv(100) == b"right"


@pytest.mark.parametrize("data", [None, 5, ["x"]])
async def test_send_raises_TypeError_for_data_of_a_wrong_type(udp: UDPSockets, data: Any) -> None:
    client = udp.new()
    with pytest.raises(TypeError, match="data must be bytes or str"):
        client.send(data, LOCALHOST, 9)
    assert client.closed()


async def test_errors_of_send_quote_no_argument(udp: UDPSockets) -> None:
    client: Any = udp.new()
    for arguments in [("key", "key"), (b"key", 1), (LOCALHOST, 1, "key"), (LOCALHOST, 1, 1, "key")]:
        with pytest.raises(TypeError) as caught:
            client.send("key", *arguments)
        assert "key" not in str(caught.value)
    with pytest.raises(ValueError, match="index 3") as caught_too:
        client.send("key\udcff", LOCALHOST, 1)
    assert "key" not in str(caught_too.value)


async def test_sends_go_out_in_order(udp: UDPSockets, there: Any, host: str) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(name=[host]))
    port = there.getsockname()[1]
    client = udp.new()
    for number in range(50):
        client.send(b"%d" % number, host if number % 2 else "name", port)
    assert await received(there, 50) == [b"%d" % number for number in range(50)]


@pytest.mark.parametrize(
    ("data", "host", "port", "reason"),
    [
        (bytes(65508), LOCALHOST, 9, "cannot send to 127.0.0.1:9: Message too long"),
        ("x", LOCALHOST, 0, "cannot send to 127.0.0.1:0: Invalid argument"),
        ("x", LOCALHOST, 65536, "a port must be in 0-65535"),
        ("x", LOCALHOST, -1, "a port must be in 0-65535"),
        ("x", BROADCAST, 9, "cannot send to 127.255.255.255:9: Permission denied"),
        ("x", "unknown", 9, "cannot look up unknown:9: not known"),
        ("x", "no\nname", 9, "is not a host name"),
        ("x", "::1%no/zone", 9, "is not a host name"),
        ("x", "", 9, "is not a host name"),
    ],
)
async def test_a_failed_send_is_logged_and_later_sends_succeed(
    udp: UDPSockets, log: Log, calls: Calls, data: str, host: str, port: int, reason: str
) -> None:
    class Unknown(Resolver):
        async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            raise trio.socket.gaierror(trio.socket.EAI_NONAME, "not known")

    trio.socket.set_custom_hostname_resolver(Unknown())
    with raw_udp() as there:
        client = udp.new().send(data, host, port, 1, calls)
        client.send("next", *there.getsockname(), 2, calls)
        assert await there.recv(100) == b"next"
        assert await calls.next() == (2,)
        assert await calls.none()
    [record] = [each for each in log.records if each.levelno > logging.DEBUG]
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert record.getMessage().isprintable()


async def test_a_send_after_connect_can_fail_as_well(
    udp: UDPSockets, there: Any, host: str, log: Log, calls: Calls
) -> None:
    client: Any = udp.new().connect(host, there.getsockname()[1])
    client.send(bytes(70_000), 1, calls).send("next", 2, calls)
    assert await there.recv(100) == b"next"
    assert await calls.next() == (2,)
    assert "Message too long" in log.text


async def test_a_listening_object_answers_from_its_port(
    udp: UDPSockets, there: Any, host: str
) -> None:
    server = udp.server(0)
    assert server.send("answer", host, there.getsockname()[1]) is server
    assert await there.recvfrom(100) == (
        b"answer",
        (host, port_of(server), 0, 0)[: len(there.getsockname())],
    )


async def test_a_servers_failed_sends_are_logged_at_INFO(udp: UDPSockets, log: Log) -> None:
    """Anyone can make a server send answers to an invalid address."""
    server = udp.server(0)
    for _ in range(100):
        server.send("answer", LOCALHOST, 0)
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    assert 0 < len(log.records) < 100  # other tasks run in between
    await until(lambda: len(log.records) == 100)
    assert {each.levelno for each in log.records} == {logging.INFO}


async def test_an_unexpected_error_of_a_send_is_logged_with_its_traceback(
    udp: UDPSockets, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trisock.UDPSocket, "send", lambda *_: 1 / 0)
        client = udp.new().send("lost", LOCALHOST, 9)
        await until(lambda: errors_in(log))
        assert "ZeroDivisionError" in log.text
    with raw_udp() as there:
        client.send("next", *there.getsockname())
        assert await there.recv(100) == b"next"


async def test_send_on_an_object_that_cannot_be_opened_is_logged(
    udp: UDPSockets, log: Log, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(trisock, "open_udp_nowait", fail)
    client = udp.new()
    assert client.send("lost", LOCALHOST, 9, calls) is client
    assert client.closed()
    assert "Too many open files" in log.text
    assert await calls.none()


# ---- ICMP errors ----


@pytest.mark.parametrize("receiving", [True, False])
async def test_an_icmp_error_is_logged_and_loses_no_later_send(
    udp: UDPSockets, host: str, calls: Calls, log: Log, receiving: bool
) -> None:
    port = free_port()
    client: Any = udp.new(calls).connect(host, port)
    if receiving:
        client.receive()
    client.send("nobody is there", 1, calls)
    assert await calls.next() == (1,)
    assert await calls.none()  # until the ICMP error has arrived
    with raw_udp(host, port) as there:
        client.send("somebody is there", 2, calls)
        assert await there.recv(100) == b"somebody is there"
        assert await calls.next() == (2,)
        assert client.connected()
        [record] = [each for each in log.records if "Connection refused" in each.getMessage()]
        assert record.levelno == logging.WARNING
        client.receive()
        await there.sendto(b"answer", local(client.info()))
        assert (await calls.next())[0] == b"answer"


async def test_an_icmp_error_in_both_attempts_of_a_send_is_logged_once(
    udp: UDPSockets, calls: Calls, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(trisock.UDPSocket, "send", refuse)
    client: Any = udp.new().connect(LOCALHOST, 9)
    client.send("lost", calls)
    await until(lambda: "refused" in log.text)
    assert await calls.none()
    assert log.text.count("refused") == 1


# ---- setTimeout ----


async def test_setTimeout_of_a_udp_object_returns_self(udp: UDPSockets) -> None:
    created = udp.new()
    assert created.setTimeout(2.5) is created
    assert created.info()["timeout"] == 2.5
    for wrong in ("5", None, True, float("nan")):
        with pytest.raises(TypeError):
            created.setTimeout(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float"):
        created.setTimeout(10**400)
    assert created.info()["timeout"] == 2.5


async def test_setTimeout_drops_only_the_send_that_takes_too_long(
    autojump_clock: MockClock, udp: UDPSockets, there: Any, host: str, calls: Calls, log: Log
) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    port = there.getsockname()[1]
    client = udp.new().setTimeout(5).send("lost", "name", port, 1, calls)
    client.send("lost", "name", port, 2, calls)  # its timeout starts when it is first in the queue
    client.setTimeout(-1).send("next", host, port, 3, calls)
    assert await there.recv(100) == b"next"
    assert 10 <= trio.current_time() < 11
    assert await calls.next() == (3,)
    assert log.text.count("a send took more than 5 s") == 2
    assert not errors_in(log)


async def test_setTimeout_keeps_the_timeout_of_queued_sends(
    autojump_clock: MockClock, udp: UDPSockets, host: str, there: Any, calls: Calls
) -> None:
    resolver = WaitingResolver(name=[host])
    trio.socket.set_custom_hostname_resolver(resolver)
    client = udp.new().setTimeout(-1).send("late", "name", there.getsockname()[1], calls)
    client.setTimeout(1)
    await trio.sleep(40)
    resolver.release.set()
    assert await calls.next() == (-1,)
    assert await there.recv(100) == b"late"


async def test_setTimeout_0_allows_sends_that_need_not_wait(
    udp: UDPSockets, host: str, there: Any, calls: Calls, log: Log
) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver(name=[host]))
    port = there.getsockname()[1]
    client = udp.new().setTimeout(0)
    for number in range(40):
        client.send("waits", "name", port, calls).send("x", host, port, number, calls)
    assert await calls.take(40) == [(number,) for number in range(40)]
    assert log.text.count("a send took more than 0 s") == 40


async def test_setTimeout_limits_the_wait_for_room_in_the_kernels_buffer(
    udp: UDPSockets, host: str, there: Any, calls: Calls, log: Log
) -> None:
    address = (host, there.getsockname()[1])
    client = udp.new()
    with full_buffer(1):
        client.setTimeout(0).send("no room", *address, 1, calls).send("next", *address, 2, calls)
        assert await calls.next() == (2,)
    assert "a send took more than 0 s" in log.text
    with full_buffer(3):
        client.setTimeout(-1).send("waits", *address, 3, calls).send("last", *address, 4, calls)
        assert await calls.take(2) == [(3,), (4,)]
    assert await received(there, 3) == [b"next", b"waits", b"last"]


# ---- broadcast ----


@pytest.mark.parametrize("when", ["closed", "open", "listening"])
async def test_broadcast_allows_and_forbids_broadcasts(
    udp: UDPSockets, calls: Calls, log: Log, when: str
) -> None:
    with raw_udp(BROADCAST) as there:
        address = there.getsockname()
        client = udp.new()
        if when == "open":
            client.send("refused", *address)
            await until(lambda: "Permission denied" in log.text)
        elif when == "listening":
            client.listen(0)
        assert client.broadcast() is client
        client.send("to all", *address, 1, calls)
        assert await there.recv(100) == b"to all"
        assert await calls.next() == (1,)
        log.clear()
        assert client.broadcast(False) is client
        client.send("refused", *address, 2, calls)
        await until(lambda: "Permission denied" in log.text)
        assert client.broadcast(True) is client
        client.send("to all again", *address, 3, calls)
        assert await there.recv(100) == b"to all again"
        assert await calls.next() == (3,)
        client.close().send("after close", *address)
        assert await there.recv(100) == b"after close"


async def test_broadcast_returns_None_if_the_system_refuses(
    udp: UDPSockets, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(trisock.UDPSocket, "setsockopt", fail)
    server = udp.server(0)
    assert server.broadcast() is None
    assert "not here" in log.text
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError):
            server.broadcast(wrong)  # type: ignore[arg-type]


# ---- bounds ----


async def test_sends_beyond_MAX_UNSENT_are_dropped_and_logged_once(
    udp: UDPSockets, host: str, there: Any, calls: Calls, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = WaitingResolver(name=[host])
    trio.socket.set_custom_hostname_resolver(resolver)
    port = there.getsockname()[1]
    client = udp.new()
    size = callbacks.cost(b"0", "name", 1000)
    monkeypatch.setattr(endpoint, "MAX_UNSENT", 5 * size)
    for number in range(9):
        client.send(b"%d" % number, "name", port, number, calls)
    assert log.text.count("datagrams are dropped") == 1
    resolver.release.set()
    assert await calls.take(5) == [(number,) for number in range(5)]
    assert await received(there, 5) == [b"%d" % number for number in range(5)]
    for number in range(9):
        client.send(b"%d" % number, "name", port, number, calls)
    assert log.text.count("datagrams are dropped") == 2
    assert await calls.take(5) == [(number,) for number in range(5)]
    assert await calls.none()


async def test_a_single_send_may_exceed_MAX_UNSENT(
    udp: UDPSockets, host: str, there: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_UNSENT", 100)
    udp.new().send(bytes(1000), host, there.getsockname()[1])
    assert len(await there.recv(2000)) == 1000


@pytest.mark.parametrize("connecting", [True, False])
async def test_queued_sends_cost_at_most_twice_the_bound(
    udp: UDPSockets, monkeypatch: pytest.MonkeyPatch, connecting: bool
) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    monkeypatch.setattr(endpoint, "MAX_UNSENT", MIB)
    client: Any = udp.new()
    if connecting:
        client.connect("name", 9)
    with measured() as grown:
        for number in range(1000, 21_000):
            if connecting:
                client.send(b"", number, lambda tag: None)
            else:
                client.send(b"", f"name{number}", 9, number, lambda tag: None)
    assert grown[0] < 2 * MIB


async def test_sends_with_a_callback_wait_for_slow_callbacks(
    udp: UDPSockets, host: str, there: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MAX_HELD", 3000)
    resume = trio.Event()

    async def slow(tag: int) -> None:
        await resume.wait()
        calls(tag)

    client = udp.new()
    for tag in range(50):
        client.send(b"%d" % tag, host, there.getsockname()[1], tag, slow)
    assert await calls.none()
    assert len(client._callbacks.pending.queued) < 10
    resume.set()
    assert await calls.take(50) == [(tag,) for tag in range(50)]
