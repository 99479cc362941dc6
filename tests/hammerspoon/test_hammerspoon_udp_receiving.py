"""How hs.socket.udp's objects receive: receive, receiveOne, pause, setCallback, setBufferSize."""

# ruff: noqa: N802 (tests are named after hs.socket.udp's names)

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    Calls,
    Log,
    errors_in,
    fail,
    fail_in_a_group,
    fail_later,
    measured,
    until,
)
from helpers.hammerspoon_udp import port_of, raw_udp, sender
from trisock.hammerspoon import UDPSocket, UDPSockets

MIB = 1024 * 1024

Say = Callable[..., Awaitable[None]]


@pytest.fixture
def say(there: Any, host: str, listening: UDPSocket) -> Say:
    """Sends datagrams to the listening object."""

    async def say(*datagrams: bytes) -> None:
        for data in datagrams:
            await there.sendto(data, (host, port_of(listening)))

    return say


async def data_of(calls: Calls, number: int) -> list[object]:
    """Wait for the next calls of a read callback; return their data."""
    return [data for data, _sockaddr in await calls.take(number)]  # type: ignore[misc]


# ---- receive, read ----


@pytest.mark.parametrize("method", ["receive", "read"])
async def test_receive_and_read_call_back_for_every_datagram(
    listening: UDPSocket, there: Any, say: Say, calls: Calls, method: str
) -> None:
    assert getattr(listening, method)() is listening
    for data in (b"one", b"", b"\0\xff", bytes(9216)):
        await say(data)
        got, sockaddr = await calls.next()
        assert got == data
        assert sender(sockaddr) == there.getsockname()[:2]
    await say(*[b"%d" % number for number in range(20)])
    assert await data_of(calls, 20) == [b"%d" % number for number in range(20)]


async def test_receive_accepts_the_read_callback(
    listening: UDPSocket, say: Say, calls: Calls
) -> None:
    other = Calls()
    assert listening.receive(other) is listening
    await say(b"one")
    assert await data_of(other, 1) == [b"one"]
    assert listening.receiveOne(calls) is listening
    await say(b"two")
    assert await data_of(calls, 1) == [b"two"]
    assert await other.none()


@pytest.mark.parametrize("method", ["receive", "read", "receiveOne", "readOne"])
async def test_receive_methods_without_a_callback_return_None_and_log(
    udp: UDPSockets, log: Log, method: str
) -> None:
    for created in (udp.new(), udp.server(0)):
        log.clear()
        assert getattr(created, method)() is None
        assert "there is no callback" in log.text


@pytest.mark.parametrize("method", ["receive", "read", "receiveOne", "readOne"])
async def test_receive_methods_on_a_closed_object_return_None_and_log(
    udp: UDPSockets, log: Log, calls: Calls, method: str
) -> None:
    created = udp.new()
    assert getattr(created, method)(calls) is None
    assert "it is closed" in log.text
    created.listen(0)
    assert getattr(created, method)() is created  # the callback was set all the same


async def test_datagrams_wait_until_receive(listening: UDPSocket, say: Say, calls: Calls) -> None:
    await say(b"one", b"two")
    assert await calls.none()
    listening.receive()
    assert await data_of(calls, 2) == [b"one", b"two"]


# ---- receiveOne, readOne, pause ----


@pytest.mark.parametrize("method", ["receiveOne", "readOne"])
async def test_receiveOne_and_readOne_call_back_once(
    listening: UDPSocket, say: Say, calls: Calls, method: str
) -> None:
    for _ in range(3):  # before a datagram arrives, a further call changes nothing
        assert getattr(listening, method)() is listening
    await say(b"one", b"two", b"three")
    assert await data_of(calls, 1) == [b"one"]
    assert await calls.none()
    getattr(listening, method)()
    assert await data_of(calls, 1) == [b"two"]
    assert await calls.none()


async def test_receiveOne_in_the_callback_asks_for_the_next(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    def callback(data: bytes, sockaddr: bytes) -> None:
        calls(data)
        if data != b"last":
            server.receiveOne()

    server = udp.server(0, callback)
    server.receiveOne()
    for data in (b"one", b"two", b"last", b"too many"):
        await there.sendto(data, (host, port_of(server)))
    assert await calls.take(3) == [(b"one",), (b"two",), (b"last",)]
    assert await calls.none()


async def test_receive_and_receiveOne_replace_each_other(
    listening: UDPSocket, say: Say, calls: Calls
) -> None:
    listening.receive()
    listening.receiveOne()
    await say(b"one", b"two")
    assert await data_of(calls, 1) == [b"one"]
    assert await calls.none()
    listening.receiveOne()
    listening.receive()
    await say(b"three")
    assert await data_of(calls, 2) == [b"two", b"three"]


async def test_pause_suspends_reading_until_receive_or_receiveOne(
    listening: UDPSocket, say: Say, calls: Calls
) -> None:
    listening.receive()
    await say(b"one")
    assert await data_of(calls, 1) == [b"one"]
    assert listening.pause() is listening
    await say(b"two", b"three", b"four")
    assert await calls.none()
    listening.receiveOne()
    assert await data_of(calls, 1) == [b"two"]
    assert await calls.none()
    listening.receiveOne()
    listening.pause()
    assert await calls.none()
    listening.receive()
    assert await data_of(calls, 2) == [b"three", b"four"]


async def test_pause_returns_self_in_any_state(udp: UDPSockets) -> None:
    for created in (udp.new(), udp.server(0), udp.new().connect(LOCALHOST, 9)):
        assert created is not None
        assert created.pause() is created
        assert created.close().pause() is created


async def test_pause_in_the_callback_holds_back_the_next_datagram(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    def callback(data: bytes, sockaddr: bytes) -> None:
        calls(data)
        server.pause()

    server = udp.server(0, callback)
    for data in (b"one", b"two", b"three"):
        await there.sendto(data, (host, port_of(server)))
    for data in (b"one", b"two", b"three"):
        assert await calls.none()
        server.receive()
        assert await calls.next() == (data,)


async def test_pause_holds_back_a_datagram_that_was_received_already(
    listening: UDPSocket, there: Any, host: str, say: Say, calls: Calls
) -> None:
    """The read callback waits for its turn behind the callback of a send."""
    resume = trio.Event()

    async def slow(tag: int) -> None:
        calls("slow")
        await resume.wait()
        listening.pause()

    listening.send("x", host, there.getsockname()[1], slow)
    assert await calls.next() == ("slow",)
    listening.receive()
    await say(b"one", b"two")
    assert await calls.none()
    resume.set()
    assert await calls.none()
    listening.receive()
    assert await data_of(calls, 2) == [b"one", b"two"]


# ---- setCallback ----


async def test_setCallback_replaces_the_read_callback(
    listening: UDPSocket, say: Say, calls: Calls
) -> None:
    other = Calls()
    listening.receive()
    assert listening.setCallback(other) is listening
    await say(b"one")
    assert await data_of(other, 1) == [b"one"]
    listening.setCallback(calls)
    await say(b"two")
    assert await data_of(calls, 1) == [b"two"]
    assert await other.none()


@pytest.mark.parametrize("arguments", [(), (None,)])
async def test_setCallback_without_a_function_suspends_reading(
    listening: UDPSocket, say: Say, calls: Calls, arguments: Any
) -> None:
    listening.receive()
    assert listening.setCallback(*arguments) is listening
    await say(b"one", b"two")
    assert await calls.none()
    listening.setCallback(calls)  # ``receive`` is still in effect
    assert await data_of(calls, 2) == [b"one", b"two"]


async def test_setCallback_applies_to_a_datagram_that_was_received_already(
    listening: UDPSocket, there: Any, host: str, say: Say, calls: Calls
) -> None:
    resume = trio.Event()
    listening.send("x", host, there.getsockname()[1], lambda tag: resume.wait())
    await there.recv(10)
    listening.receive()
    await say(b"one")
    assert await calls.none()
    listening.setCallback(None)
    resume.set()
    assert await calls.none()
    other = Calls()
    listening.setCallback(other)
    assert await data_of(other, 1) == [b"one"]
    assert await calls.none()


# ---- setBufferSize ----


async def test_setBufferSize_cuts_longer_datagrams(
    listening: UDPSocket, say: Say, calls: Calls
) -> None:
    listening.receive()
    assert await calls.none()  # setBufferSize also applies to a receive in progress
    assert listening.setBufferSize(5) is listening
    await say(b"1234", b"12345", b"123456")
    assert await data_of(calls, 3) == [b"1234", b"12345", b"12345"]


async def test_setBufferSize_is_9216_at_first(listening: UDPSocket, say: Say, calls: Calls) -> None:
    listening.receive()
    await say(bytes(20_000))
    assert await data_of(calls, 1) == [bytes(9216)]
    listening.setBufferSize(-1)
    await say(bytes(65507))
    assert await data_of(calls, 1) == [bytes(65507)]


async def test_setBufferSize_applies_to_one_version_or_both(udp: UDPSockets, calls: Calls) -> None:
    server = udp.server(0, calls)
    server.setBufferSize(2, 4).setBufferSize(3, 6).receive()
    with raw_udp() as ipv4, raw_udp("::1") as ipv6:
        for there, host, expected in [(ipv4, "127.0.0.1", b"12"), (ipv6, "::1", b"123")]:
            await there.sendto(b"123456", (host, port_of(server)))
            assert await data_of(calls, 1) == [expected]
        server.setBufferSize(4, 5)  # any other number means both versions
        for there, host in [(ipv4, "127.0.0.1"), (ipv6, "::1")]:
            await there.sendto(b"123456", (host, port_of(server)))
            assert await data_of(calls, 1) == [b"1234"]


async def test_setBufferSize_0_drops_datagrams(
    listening: UDPSocket, there: Any, say: Say, calls: Calls
) -> None:
    listening.setBufferSize(0).receiveOne()
    await say(b"dropped", b"")
    assert await calls.none()
    listening.setBufferSize(10)  # receiveOne still waits for its datagram
    await say(b"one", b"two")
    assert await data_of(calls, 1) == [b"one"]
    assert await calls.none()


async def test_setBufferSize_has_a_maximum_for_each_version(udp: UDPSockets) -> None:
    created = udp.new()
    for size, version, ipv4, ipv6 in [
        (65536, None, 65535, 65536),
        (1000, 4, 1000, 65536),
        (2000, 6, 1000, 2000),
        (4294967296, None, 65535, 4294967295),
        (0, None, 0, 0),
        (-1, None, 65535, 4294967295),
        (7, "4", 7, 7),
    ]:
        assert created.setBufferSize(size, version) is created  # type: ignore[arg-type]
        info = created.info()
        assert info["maxReceiveIPv4BufferSize"] == ipv4
        assert info["maxReceiveIPv6BufferSize"] == ipv6
    for wrong in (None, "5", 5.0, True):
        with pytest.raises(TypeError, match="number of bytes"):
            created.setBufferSize(wrong)  # type: ignore[arg-type]


# ---- callbacks ----


async def test_udp_callbacks_can_be_async_and_run_in_order(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    resume = trio.Event()

    async def callback(*arguments: object) -> None:
        calls(*arguments[:1])
        await resume.wait()
        calls("done")

    client: Any = udp.new(callback).connect(host, there.getsockname()[1], callback)
    client.receive().send("x", 5, callback)
    _data, address = await there.recvfrom(10)  # the send does not wait for the callback
    await there.sendto(b"answer", address)
    assert await calls.next() == ()
    assert await calls.none()
    other = udp.new()
    other.send("x", host, there.getsockname()[1], calls)
    assert await calls.next() == (-1,)  # another object's callbacks do not wait
    resume.set()
    assert await calls.take(5) == [("done",), (5,), ("done",), (b"answer",), ("done",)]


async def leave_a_scope_open(*_: object) -> None:
    trio.CancelScope().__enter__()


class Unhashable(Exception):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


async def fail_unhashably(*_: object) -> None:
    raise Unhashable


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (fail, "ZeroDivisionError: plain"),
        (fail_later, "ZeroDivisionError: async"),
        (fail_in_a_group, "ZeroDivisionError: in a group"),
        (leave_a_scope_open, "Cancel scope stack corrupted"),
        (fail_unhashably, "Unhashable"),
    ],
)
async def test_a_udp_callback_error_is_logged_and_harms_nothing_else(
    udp: UDPSockets,
    there: Any,
    host: str,
    calls: Calls,
    log: Log,
    callback: Callable[..., object],
    words: str,
) -> None:
    client: Any = udp.new(callback).connect(host, there.getsockname()[1], callback)
    client.receive().send("x", callback)
    _data, address = await there.recvfrom(10)
    await there.sendto(b"answer", address)
    await until(lambda: len(errors_in(log)) == 3)
    assert errors_in(log) == [f"a callback of {client!r} failed"] * 3
    assert words in log.text
    client.setCallback(calls).send("y", 2, calls)
    await there.sendto(b"later", address)
    assert sorted([len(call) for call in await calls.take(2)]) == [1, 2]


async def test_a_callback_can_close_and_reuse_its_object(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    async def callback(data: bytes, sockaddr: bytes) -> None:
        calls(data)
        if data == b"again":
            server.close().listen(port)
            server.receive()
            await trio.lowlevel.checkpoint()
            calls("still in the first callback")

    server = udp.server(0, callback)
    server.receive()
    port = port_of(server)
    for data in (b"again", b"lost"):
        await there.sendto(data, (host, port))
    assert await calls.take(2) == [(b"again",), ("still in the first callback",)]
    await there.sendto(b"next", (host, port))
    assert await calls.next() == (b"next",)
    assert await calls.none()


# ---- bounds and errors ----


async def test_datagrams_wait_in_the_kernel_during_a_callback(
    udp: UDPSockets, there: Any, host: str, calls: Calls
) -> None:
    resume = trio.Event()

    async def slow(data: bytes, sockaddr: bytes) -> None:
        calls(data[:1])
        await resume.wait()

    server = udp.server(0, slow)
    server.receive()
    with measured() as grown:
        for number in range(1000):  # 9 MB, of which the kernel drops most
            await there.sendto(b"%d" % (number % 10) * 9000, (host, port_of(server)))
        assert await calls.next() == (b"0",)
        assert await calls.none()
    assert grown[0] < MIB
    resume.set()
    assert await calls.take(5) == [(b"1",), (b"2",), (b"3",), (b"4",), (b"5",)]


async def test_datagrams_wait_in_the_kernel_while_there_is_no_callback(
    listening: UDPSocket, there: Any, host: str, calls: Calls
) -> None:
    listening.receive()
    listening.setCallback(None)
    with measured() as grown:
        for number in range(1000):
            await there.sendto(b"%d" % (number % 10) * 9000, (host, port_of(listening)))
        assert await calls.none()
    assert grown[0] < MIB
    listening.setCallback(calls)
    assert [data[:1] for data in await data_of(calls, 5)] == [b"0", b"1", b"2", b"3", b"4"]  # type: ignore[index]


async def test_a_flood_of_datagrams_lets_other_tasks_run(
    listening: UDPSocket, there: Any, host: str, calls: Calls
) -> None:
    listening.receive()
    listening.setCallback(lambda data, sockaddr: turns.append(sockaddr))
    turns: list[bytes] = []
    for _ in range(100):
        await there.sendto(b"x", (host, port_of(listening)))
    for _ in range(50):
        await trio.lowlevel.checkpoint()
    assert len(turns) < 100
    await until(lambda: len(turns) == 100)


async def test_receiving_continues_after_a_logged_error(
    listening: UDPSocket, say: Say, calls: Calls, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    recv, failures = trisock.UDPSocket.recv, iter(range(100))

    async def fail(sock: trisock.UDPSocket, size: int) -> trisock.Datagram:
        if next(failures, None) is not None:
            raise OSError("no memory")
        return await recv(sock, size)

    monkeypatch.setattr(trisock.UDPSocket, "recv", fail)
    listening.receive()
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    assert 0 < log.text.count("no memory") < 100  # other tasks run in between
    await say(b"one")
    assert await data_of(calls, 1) == [b"one"]
    assert log.text.count("no memory") == 100
