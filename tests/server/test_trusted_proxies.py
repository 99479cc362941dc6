"""A server behind a proxy: which PROXY headers it accepts, and how it uses them."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served
from helpers.proxy_headers import LINE4, LOCAL, UNIX_STREAM, VALID, binary, tlv, with_crc
from helpers.server import bound, connect, echo, logged, opening
from trisock import Address, ClientTLS, ProxyHeader, ServerStats, ServerTLS, Socket

CLIENT, SERVER = Address("192.0.2.1", 50000), Address("198.51.100.2", 443)
HEADER = ProxyHeader(source=CLIENT, destination=SERVER, tlvs=((2, b"example.org"),))
LOOPBACK = ["127.0.0.0/8", "::1"]


class Behind:
    """A handler that records its sockets, and echoes."""

    def __init__(self) -> None:
        self.socks: list[Socket] = []
        self.received: list[bytes] = []

    async def __call__(self, sock: Socket) -> None:
        self.socks.append(sock)
        async for chunk in sock:
            self.received.append(chunk)
            await sock.send(chunk)


async def refused(server: trisock.Server, *chunks: bytes) -> None:
    """Send the first bytes of a connection in pieces, and wait for the reset."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.setblocking(False)
        for chunk in chunks:
            with contextlib.suppress(ConnectionError):  # already reset
                raw.send(chunk)
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionResetError):
            while True:
                await trio.lowlevel.wait_readable(raw)
                assert raw.recv(1)


@contextlib.asynccontextmanager
async def behind(handler: Any = echo, **options: Any) -> AsyncIterator[trisock.Server]:
    options = {"host": "127.0.0.1", "trusted_proxies": LOOPBACK, **options}
    async with bound(handler, **options) as server:
        yield server


# ---- what the handler sees ----


@pytest.mark.parametrize("tls", [False, True])
async def test_a_handler_sees_the_addresses_in_the_header(
    tls: bool, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    handler = Behind()
    ours = client_tls if tls else None
    async with behind(handler, tls=server_tls if tls else None) as server:
        async with await connect(server, proxy_header=HEADER, tls=ours) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
            assert client.proxy_header is None
            assert client.getpeer().port == server.port
    (sock,) = handler.socks
    assert sock.proxy_header == HEADER == sock.info().proxy_header
    assert sock.getpeer() == sock.info().peer == CLIENT
    assert sock.getlocal() == sock.info().local == SERVER
    assert "192.0.2.1:50000" in repr(sock)
    assert server.stats() == ServerStats(accepted=1)


@pytest.mark.parametrize("data", [LINE4, binary(), with_crc(binary(tlv(0xE0, bytes(500))))])
@pytest.mark.parametrize("rest", [b"", b"\n", b"the first request"])
async def test_a_header_may_arrive_in_any_two_pieces(data: bytes, rest: bytes) -> None:
    handler = Behind()
    async with behind(handler) as server:
        for cut in {*range(1, 20), len(data) - 1, len(data)}:
            async with await connect(server) as client:
                await client.send(data[:cut])
                await trio.testing.wait_all_tasks_blocked()
                await client.send(data[cut:] + rest + b".")
                received = b""
                while len(received) < len(rest) + 1:
                    received += await client.recv()
                assert received == rest + b"."
            assert handler.socks[-1].getpeer() == CLIENT
        assert server.stats().bad_proxy_headers == 0


async def test_bytes_after_the_header_are_the_first_that_a_handler_reads() -> None:
    async def handler(sock: Socket) -> None:
        assert sock.info().buffered <= 4096 - len(LINE4)
        await sock.send(await sock.recv_exactly(100_000))

    data = bytes(range(250)) * 400
    async with behind(handler) as server, await connect(server) as client:
        await client.send(LINE4 + data)
        assert await client.recv_exactly(100_000) == data


async def test_at_most_4096_bytes_are_held_before_the_handler_runs() -> None:
    held = []

    async def handler(sock: Socket) -> None:
        held.append(sock.info().buffered)

    for data in VALID:
        async with behind(handler) as server, await connect(server) as client:
            await client.send(data + bytes(20_000))
            with contextlib.suppress(trio.BrokenResourceError):
                await client.recv()
        assert held.pop() <= 4096 - len(data)


async def test_a_client_hello_may_arrive_with_the_header(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    handler = Behind()
    async with behind(handler, tls=server_tls) as server:
        async with await connect(server) as client:
            await start_tls_in_the_headers_segment(client, client_tls)
            await client.send(b"hello")
            assert await client.recv() == b"hello"
    assert handler.socks[0].getpeer() == CLIENT


async def start_tls_in_the_headers_segment(client: Socket, tls: ClientTLS) -> None:
    """Send a header and start TLS, so that the ClientHello is in the header's segment."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    await client.send(LINE4)
    async with trio.open_nursery() as nursery:

        async def uncork() -> None:
            await trio.testing.wait_all_tasks_blocked()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

        nursery.start_soon(uncork)
        await client.starttls(tls)


@pytest.mark.parametrize(
    ("data", "header"),
    [
        (b"PROXY UNKNOWN\r\n", ProxyHeader(version=1)),
        (binary(command=LOCAL, family=0), ProxyHeader(command="LOCAL")),
        (binary(command=LOCAL), ProxyHeader(command="LOCAL")),
        (binary(family=0), ProxyHeader()),
    ],
)
async def test_a_health_check_keeps_the_connections_own_addresses(
    data: bytes, header: ProxyHeader
) -> None:
    handler = Behind()
    async with behind(handler) as server, await connect(server) as client:
        await client.send(data + b"hello")
        assert await client.recv() == b"hello"
        (sock,) = handler.socks
        assert sock.proxy_header == header
        assert sock.getpeer() == client.getlocal()
        assert sock.getlocal() == client.getpeer()


async def test_log_lines_and_errors_name_the_client(log: pytest.LogCaptureFixture) -> None:
    texts = []

    async def handler(sock: Socket) -> None:
        try:
            await sock.recv_until(b"\n", max_bytes=2)
        except trisock.LimitExceededError as exc:
            texts.append(str(exc))
        raise RuntimeError("the handler's own error")

    async with behind(handler) as server, await connect(server, proxy_header=HEADER) as client:
        await client.send(b"long")
        await client.recv()
    (record,) = logged(log, logging.ERROR)
    assert record.getMessage() == "the handler of 192.0.2.1:50000 failed"
    assert "from 192.0.2.1:50000" in texts[0]


async def test_a_path_in_a_header_cannot_forge_a_log_line(log: pytest.LogCaptureFixture) -> None:
    async def handler(sock: Socket) -> None:
        raise RuntimeError(str(sock.getpeer()))

    path = b"\n2025-01-01 INFO sshd Accepted password\x1b[2K"
    ends = path.ljust(108, b"\0") + bytes(108)
    async with behind(handler) as server, await connect(server) as client:
        await client.send(binary(family=UNIX_STREAM, ends=ends))
        await client.recv()
    (record,) = logged(log, logging.ERROR)
    assert record.getMessage().isprintable()
    assert "unix:'\\n2025" in record.getMessage()


async def test_a_failed_handshake_is_logged_with_the_clients_address(
    server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    async with behind(tls=server_tls) as server, await connect(server) as client:
        await client.send(LINE4 + b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(trio.BrokenResourceError):
            while await client.recv():
                pass
    (record,) = logged(log, logging.INFO)
    assert record.getMessage().startswith("TLS handshake with 192.0.2.1:50000 failed")
    assert server.stats() == ServerStats(accepted=1, failed_handshakes=1)


async def test_without_trusted_proxies_a_header_is_data() -> None:
    async with bound(echo, host="127.0.0.1") as server:
        async with await connect(server, proxy_header=HEADER) as client:
            assert await client.recv_exactly(len(HEADER.to_bytes())) == HEADER.to_bytes()
            (sock,) = server.connections
            assert sock.proxy_header is None
            assert sock.info().proxy_header is None


# ---- refused connections ----


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"\x16\x03\x01\x02\x00\x01"],
        [b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 70000\r\n"],
        [b"PROXY UNKNOWN\n"],
        [b"PRO", b"XI"],
        [with_crc(binary())[:-1] + b"\0"],
        [with_crc(binary())[:-1], b"\0"],
        [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"],
    ],
)
async def test_a_connection_without_a_valid_header_is_reset(
    chunks: list[bytes], tls: bool, server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    handler = Behind()
    async with behind(handler, tls=server_tls if tls else None) as server:
        await refused(server, *chunks)
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, bad_proxy_headers=1)
    assert handler.socks == []
    (record,) = logged(log, logging.INFO)
    assert record.levelno == logging.INFO
    assert record.exc_info is None
    assert record.getMessage().startswith("refused the connection with 127.0.0.1:")


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "before"), (b"P", "inside"), (with_crc(binary())[:-1], "inside")]
)
async def test_eof_before_the_end_of_the_header_is_refused(
    data: bytes, why: str, log: pytest.LogCaptureFixture
) -> None:
    handler = Behind()
    async with behind(handler) as server:
        async with await connect(server) as client:
            if data:
                await client.send(data)
            await client.send_eof()
            with contextlib.suppress(trio.BrokenResourceError):
                assert await client.recv() == b""
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, bad_proxy_headers=1)
    assert handler.socks == []
    (record,) = logged(log, logging.INFO)
    assert record.getMessage().endswith(f": it ended {why} its PROXY header")


async def test_a_proxy_that_resets_the_connection_is_counted(
    log: pytest.LogCaptureFixture,
) -> None:
    async with behind() as server:
        client = await connect(server)
        while not server.stats().active:
            await trio.lowlevel.checkpoint()
        client.abort()
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, bad_proxy_headers=1)
    (record,) = logged(log, logging.INFO)
    assert record.getMessage().endswith(": the connection is broken: Connection reset by peer")


@pytest.mark.parametrize("trusted", [["10.0.0.0/8"], ["127.0.0.2"], ["::/0"], ["unix"]])
async def test_a_connection_from_elsewhere_is_reset(
    trusted: list[str], server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    handler = Behind()
    async with behind(handler, trusted_proxies=trusted, tls=server_tls) as server:
        await refused(server, LINE4)
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, untrusted_proxies=1)
    assert handler.socks == []
    (record,) = logged(log, logging.INFO)
    assert record.levelno == logging.INFO
    assert record.getMessage().endswith(": the peer is not in trusted_proxies")


async def test_a_refused_connection_is_reset_for_a_forked_child_too() -> None:
    # abort() disconnects the socket itself, even if other processes have descriptors of it.
    async with behind() as server:
        raw = socket.create_connection(("127.0.0.1", server.port))
        with raw:
            raw.setblocking(False)
            while not opening(server):
                await trio.lowlevel.checkpoint()
            (connection,) = opening(server)
            with socket.fromfd(connection.socket.fileno(), socket.AF_INET, socket.SOCK_STREAM):
                raw.send(b"GET /")
                await trio.lowlevel.wait_readable(raw)
                with pytest.raises(ConnectionResetError):
                    raw.recv(1)


async def test_a_refused_connection_releases_its_slot() -> None:
    async with behind(max_connections=1) as server:
        for _ in range(3):
            await refused(server, b"GET /")
        async with await connect(server, proxy_header=HEADER) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"


# ---- the time limit ----


@pytest.mark.parametrize("data", [b"", b"PROXY TCP4 192.0.2.1", binary()[:-1]])
async def test_a_late_header_is_treated_as_invalid(
    data: bytes, jumping_clock: trio.testing.MockClock, log: pytest.LogCaptureFixture
) -> None:
    handler = Behind()
    async with behind(handler, handshake_timeout=3) as server:
        await refused(server, data)
        assert 3 <= trio.current_time() < 4
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, bad_proxy_headers=1)
    assert handler.socks == []
    (record,) = logged(log, logging.INFO)
    assert record.getMessage().endswith(": its PROXY header has not arrived in time")


async def test_header_and_handshake_share_one_time_limit(
    server_tls: ServerTLS, mock_clock: trio.testing.MockClock
) -> None:
    async with behind(tls=server_tls, handshake_timeout=10) as server:
        async with await connect(server) as client:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(6)
            await client.send(LINE4)
            while not any(each.tls for each in opening(server)):
                await trio.lowlevel.checkpoint()
            mock_clock.jump(6)
            with contextlib.suppress(trio.BrokenResourceError):
                assert await client.recv() == b""
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, failed_handshakes=1)


async def test_after_the_header_there_is_no_time_limit(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with behind(handshake_timeout=10) as server:
        async with await connect(server, proxy_header=HEADER) as client:
            await client.send(b"one")
            assert await client.recv() == b"one"
            mock_clock.jump(20)
            await client.send(b"two")
            assert await client.recv() == b"two"


async def test_the_end_of_the_grace_ends_a_wait_for_a_header() -> None:
    async with behind() as server, await connect(server) as client:
        await trio.testing.wait_all_tasks_blocked()
        server.stop(grace=0)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await client.recv() == b""
        await server.wait_closed()
        assert server.stats() == ServerStats(accepted=1, refused=1)


async def test_cancelling_the_server_cancels_a_wait_for_a_header() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, host="127.0.0.1", trusted_proxies=LOOPBACK)
        async with await connect(server) as client:
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), contextlib.suppress(trio.BrokenResourceError):
                assert await client.recv() == b""
    assert server.stats() == ServerStats(accepted=1, refused=1)


# ---- trusted_proxies ----


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(
    "trusted", [["127.0.0.1", "::1"], ["127.0.0.0/8", "::/16"], ["::1/128", "0.0.0.0/0"]]
)
async def test_networks_and_addresses_can_be_trusted(host: str, trusted: list[str]) -> None:
    async with behind(host=host, trusted_proxies=trusted) as server:
        async with await trisock.connect(host, server.port, proxy_header=HEADER) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"


@pytest.mark.parametrize("trusted", [["127.0.0.1"], ["::ffff:127.0.0.0/104"], ["::ffff:7f00:1"]])
async def test_a_mapped_address_is_trusted_as_ipv4(trusted: list[str]) -> None:
    with socket.socket(socket.AF_INET6) as both:
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        both.bind(("::", 0))
        both.listen()
        listener = trisock.Listener([socket.socket(fileno=both.detach())])
    async with bound(echo, listener, trusted_proxies=trusted) as server:
        async with await connect(server, proxy_header=HEADER) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"


async def test_unix_clients_can_be_trusted(tmp_path: Path) -> None:
    handler = Behind()
    path = str(tmp_path / "socket")
    listener = await trisock.listen_unix(path)
    async with bound(handler, listener, trusted_proxies=["10.0.0.0/8", "unix"]) as server:
        async with await trisock.connect_unix(path, proxy_header=HEADER) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
    assert handler.socks[0].getpeer() == CLIENT
    assert server.stats() == ServerStats(accepted=1)


async def test_unix_clients_are_not_trusted_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = Behind()
    listener = await trisock.listen_unix(str(tmp_path / "socket"))
    async with bound(handler, listener, trusted_proxies=["127.0.0.1", "0.0.0.0/0"]) as server:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.bind("127.0.0.1")  # a relative path that looks like a trusted address
            raw.connect("socket")
            raw.setblocking(False)
            await trio.lowlevel.wait_readable(raw)
            assert raw.recv(1) == b""
        await all_served(server, 1)
        assert server.stats() == ServerStats(accepted=1, untrusted_proxies=1)
    assert handler.socks == []


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        ([], "every connection would be refused"),
        (["10.0.0.1/8"], r"did you mean '10\.0\.0\.0/8'\?"),
        (["proxy.example"], "a network, an address or 'unix', not 'proxy.example'$"),
        (["10.0.0.0/33"], "10.0.0.0/33"),
        ([""], "not ''"),
        (["UNIX"], "not 'UNIX'"),
        (["127.0.0.1:80"], "127.0.0.1:80"),
        (["fe80::1%lo"], "fe80::1%lo"),
        (["10.0.0.0/255.0.0.256"], "10.0.0.0/255.0.0.256"),
    ],
)
async def test_invalid_trusted_proxies_are_refused_by_bind(
    trusted: list[str], message: str, nursery: trio.Nursery
) -> None:
    with pytest.raises(ValueError, match=message):
        await trisock.bind(nursery, 0, echo, trusted_proxies=trusted)


@pytest.mark.parametrize("trusted", ["10.0.0.0/8", b"::1", 5, [5], [b"::1"], [None], True])
async def test_trusted_proxies_of_a_wrong_type_are_refused(
    trusted: Any, nursery: trio.Nursery
) -> None:
    with pytest.raises(TypeError, match="trusted"):
        await trisock.bind(nursery, 0, echo, trusted_proxies=trusted)


# ---- garbage ----


async def test_refused_connections_are_freed_without_the_collector(
    jumping_clock: trio.testing.MockClock,
) -> None:
    gc.collect()
    gc.disable()
    try:
        references: list[weakref.ref[object]] = []
        async with behind(handshake_timeout=1) as server:
            for chunk in (b"GET / HTTP/1.1\r\n", b"PROXY UNKNOWN\n", b"PROXY"):
                with socket.create_connection(("127.0.0.1", server.port)) as raw:
                    raw.setblocking(False)
                    while not opening(server):
                        await trio.lowlevel.checkpoint()
                    (connection,) = opening(server)
                    references.append(weakref.ref(connection.transport.socket))
                    del connection
                    raw.send(chunk)
                    await trio.lowlevel.wait_readable(raw)
                    with pytest.raises(ConnectionResetError):
                        raw.recv(1)
        await server.wait_closed()
        assert [each() for each in references] == [None] * 3
    finally:
        gc.enable()
