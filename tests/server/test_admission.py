"""Clients that a server refuses by their address: max_connections_per_host and admit."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served
from helpers.server import bound, chat, connect, echo, logged
from trisock import Address, ProxyHeader, ServerTLS
from trisock._server.admission import Admission

HERE = Address("127.0.0.1", 5000)


class Peer:
    """A stand-in for a connection with this peer."""

    def __init__(self, host: str, port: int = 5000) -> None:
        self.peer = Address(host, port)


def admits(admission: Admission, peer: Peer) -> bool:
    return admission.admit(peer)  # type: ignore[arg-type]


def release(admission: Admission, peer: Peer) -> None:
    admission.release(peer)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def tcp(handler: Any = chat, **options: Any) -> AsyncIterator[trisock.Server]:
    async with bound(handler, host="127.0.0.1", **options) as server:
        yield server


async def is_refused(server: trisock.Server, source: str = "127.0.0.1") -> bool:
    """Connect from this address. Return whether the connection is reset before any data."""
    with trio.socket.socket() as raw:
        await raw.bind((source, 0))
        try:
            await raw.connect(("127.0.0.1", server.port))
            assert await raw.recv(3) == b"hi\n"
        except ConnectionResetError:
            return True
        return False


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8:0:0:ffff::2"),
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
async def test_addresses_of_the_same_host_share_its_limit(first: str, second: str) -> None:
    admission = Admission(1, None)
    assert admits(admission, Peer(first))
    assert not admits(admission, Peer(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8:0:1::1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2"),
        ("::1", "::ffff:192.0.2.1"),
        ("fe80::1%eth0", "fe80::2%eth0"),
        ("fe80::1%eth0", "fe80::1%eth1"),
    ],
)
async def test_addresses_of_different_hosts_have_their_own_limits(first: str, second: str) -> None:
    admission = Admission(1, None)
    assert admits(admission, Peer(first))
    assert admits(admission, Peer(second))


async def test_a_refused_connection_leaves_the_count_as_it_was() -> None:
    admission = Admission(1, lambda address: address.port != 1)
    refused, first, second = Peer("192.0.2.1", 1), Peer("192.0.2.1"), Peer("192.0.2.1")
    assert not admits(admission, refused)
    assert admits(admission, first)
    assert not admits(admission, second)
    release(admission, second)
    release(admission, refused)
    assert not admits(admission, second)
    release(admission, first)
    release(admission, first)
    assert admits(admission, second)
    assert not admits(admission, Peer("192.0.2.1"))


async def test_hosts_without_connections_occupy_no_memory() -> None:
    admission = Admission(2, None)
    for number in range(1000):
        peers = [Peer(f"192.0.{number // 250}.{number % 250}") for _ in range(3)]
        for peer in peers:
            admits(admission, peer)
        for peer in peers:
            release(admission, peer)
    assert not admission._numbers
    assert not admission._hosts


async def test_a_client_above_its_hosts_limit_is_reset() -> None:
    async with tcp(max_connections_per_host=1) as server:
        async with await connect(server) as client:
            assert await client.recv() == b"hi\n"
            assert await is_refused(server)
            assert not await is_refused(server, "127.0.0.2")
        await all_served(server, 2)
        assert not await is_refused(server)
    assert server.stats() == trisock.ServerStats(accepted=4, refused=1)


async def test_a_flood_from_one_host_blocks_no_other_host(log: pytest.LogCaptureFixture) -> None:
    async with tcp(max_connections=5, max_connections_per_host=4) as server:
        flood = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
        while server.stats().refused < 96:
            await trio.lowlevel.checkpoint()
        assert not await is_refused(server, "127.0.0.2")
        for each in flood:
            each.close()
    assert server.stats().refused == 96
    (record,) = [each for each in log.records if "refused" in each.getMessage()]
    why = "its host has 4 connections already (max_connections_per_host)"
    assert re.fullmatch(rf"refused the connection with \S+: {re.escape(why)}", record.getMessage())
    assert record.levelno == logging.INFO
    assert record.peer.host == "127.0.0.1"  # type: ignore[attr-defined]
    assert str(record.peer) in record.getMessage()  # type: ignore[attr-defined]


async def test_a_refused_client_holds_no_slot_and_no_task(log: pytest.LogCaptureFixture) -> None:
    tasks: list[int] = []

    def admit(_: Address) -> bool:
        tasks.append(trio.lowlevel.current_statistics().tasks_living)
        return False

    async with tcp(max_connections=1, admit=admit) as server:
        for _ in range(3):
            assert await is_refused(server)
    assert server.stats() == trisock.ServerStats(accepted=3, refused=3)
    assert len(set(tasks)) == 1
    assert not logged(log, logging.INFO)


async def test_admit_gets_the_address_of_each_client() -> None:
    addresses: list[Address] = []

    def admit(address: Address) -> bool:
        addresses.append(address)
        return True

    async with tcp(admit=admit) as server, await connect(server) as client:
        assert await client.recv() == b"hi\n"
        assert addresses == [client.getlocal()]


async def test_admit_is_not_called_above_a_hosts_limit() -> None:
    calls: list[Address] = []

    def admit(address: Address) -> bool:
        calls.append(address)
        return True

    async with tcp(max_connections_per_host=1, admit=admit) as server:
        async with await connect(server) as client:
            assert await client.recv() == b"hi\n"
            assert await is_refused(server)
    assert len(calls) == 1


def fail(_: Address) -> bool:
    raise ValueError("a fault of admit")


async def asynchronous(_: Address) -> bool:
    return True


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    ("admit", "words"),
    [(fail, "a fault of admit"), (lambda _: 1, "bool"), (lambda _: asynchronous(_), "bool")],
)
async def test_a_failed_admit_is_logged_once_a_minute(
    admit: Callable[[Address], Any],
    words: str,
    log: pytest.LogCaptureFixture,
    mock_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trisock._server.admission._REPORT_SECONDS", 1)
    async with tcp(admit=admit) as server:
        for _ in range(10):
            assert await is_refused(server)
        mock_clock.jump(1)
        assert await is_refused(server)
    first, second = logged(log, logging.INFO)
    assert first.levelno == second.levelno == logging.ERROR
    assert words in str((first.exc_info or ("", ""))[1])
    assert isinstance(first.peer, Address)  # type: ignore[attr-defined]
    assert "9 more" in second.getMessage()
    assert server.stats() == trisock.ServerStats(accepted=11, refused=11)


async def test_an_interrupt_in_admit_ends_the_server() -> None:
    def interrupt(_: Address) -> bool:
        raise KeyboardInterrupt

    limiter = trio.CapacityLimiter(1)
    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        async with tcp(admit=interrupt, max_connections=limiter) as server:
            assert await is_refused(server)
            await trio.sleep_forever()
    assert limiter.borrowed_tokens == 0


async def test_an_interrupt_in_admit_counts_one_refusal_behind_a_proxy() -> None:
    def interrupt(_: Address) -> bool:
        raise KeyboardInterrupt

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        async with tcp(admit=interrupt, trusted_proxies=["127.0.0.1"]) as server:
            header = ProxyHeader(source=Address("192.0.2.1", 1), destination=Address("::1", 2))
            async with await connect(server, proxy_header=header):
                await trio.sleep_forever()
    assert server.stats().refused == 1


async def test_admit_may_stop_the_server() -> None:
    def admit(_: Address) -> bool:
        server.stop(grace=0)
        return False

    async with tcp(admit=admit) as server:
        assert await is_refused(server)
        await server.wait_closed()


async def test_unix_clients_have_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    addresses: list[Address] = []

    def admit(address: Address) -> bool:
        addresses.append(address)
        return True

    listener = await trisock.listen_unix("s")
    async with bound(chat, listener, max_connections_per_host=1, admit=admit):
        async with await trisock.connect_unix("s") as a, await trisock.connect_unix("s") as b:
            assert await a.recv() == await b.recv() == b"hi\n"
    assert addresses == [("", 0)] * 2


async def test_behind_a_proxy_admit_gets_the_headers_address(server_tls: ServerTLS) -> None:
    addresses: list[Address] = []

    def admit(address: Address) -> bool:
        addresses.append(address)
        return address.host != "192.0.2.9"

    def header(host: str) -> ProxyHeader:
        return ProxyHeader(source=Address(host, 1), destination=Address("192.0.2.100", 443))

    async with tcp(
        trusted_proxies=["127.0.0.1"], max_connections=9, max_connections_per_host=1, admit=admit
    ) as server:
        async with await connect(server, proxy_header=header("192.0.2.1")) as first:
            assert await first.recv() == b"hi\n"
            for host in "192.0.2.1", "192.0.2.9":
                async with await connect(server, proxy_header=header(host)) as refused:
                    with pytest.raises(trio.BrokenResourceError):
                        await refused.recv()
            async with await connect(server, proxy_header=header("192.0.2.2")) as other:
                assert await other.recv() == b"hi\n"
        await all_served(server, 4)
        async with await connect(server, proxy_header=header("192.0.2.1")) as again:
            assert await again.recv() == b"hi\n"
    assert [address.host[-1] for address in addresses] == ["1", "9", "2", "1"]
    assert server.stats() == trisock.ServerStats(accepted=5, refused=2)


async def test_a_connection_counts_until_it_is_closed() -> None:
    async def handler(sock: trisock.Socket) -> None:
        await trio.lowlevel.wait_readable(sock.fileno())
        await sock.send(b"hi\n")

    async with tcp(handler, max_connections_per_host=1) as server:
        client = await connect(server)
        await client.send(b"unread: the close has to wait for the client")
        assert await client.recv() == b"hi\n"
        assert await is_refused(server)
        client.abort()


async def test_a_refused_connection_leaves_no_garbage() -> None:
    class Errors(Exception):
        pass

    seen: list[weakref.ref[Errors]] = []

    def admit(_: Address) -> bool:
        error = Errors()
        seen.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    gc.disable()
    try:
        async with tcp(admit=admit) as server:
            logging.getLogger("trisock.server").disabled = True
            assert await is_refused(server)
        assert [each() for each in seen] == [None]
    finally:
        logging.getLogger("trisock.server").disabled = False
        gc.enable()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_connections_per_host": 0}, ValueError, "1 or more"),
        ({"max_connections_per_host": True}, TypeError, "int or None"),
        ({"max_connections_per_host": 1.5}, TypeError, "int"),
        ({"admit": "all"}, TypeError, "plain function"),
        ({"admit": asynchronous}, TypeError, "plain function"),
    ],
)
async def test_a_wrong_limit_is_refused_before_anything_starts(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(error, match=words):
            await trisock.bind(nursery, 0, echo, **options)
        assert not nursery.child_tasks
