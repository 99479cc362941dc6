"""Pluto's UDP sockets: connect with "udp", udpserver, setpeer, isudp, inside and outside Trio."""

from __future__ import annotations

import socket as stdlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio

from helpers.deadline import DEADLINE
from helpers.pluto import both_sides, got, inside
from helpers.pluto_udp import needs_ipv6, raw_socket, udp_client, udpserver
from trisock.pluto import async_socket, scheduler, socket

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


# ---- socket.connect with "udp" ----


@both_sides
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_connect_udp_returns_a_socket_that_sends_to_the_host(host: str) -> None:
    with raw_socket() as raw:
        s = await got(socket.connect(host, raw.getsockname()[1], "udp"))
        assert isinstance(s, socket)
        assert isinstance(s, async_socket) is inside()
        if s.getpeer()[0] == "::1":
            pytest.skip("localhost is ::1 here")
        assert s.getpeer() == raw.getsockname()
        assert await got(s.send("gr\u00fc\u00df dich")) is True
        data, address = raw.recvfrom(100)
        assert data.decode() == "gr\u00fc\u00df dich"
        raw.sendto(b"answer", address)
        assert await got(s.recv()) == b"answer"
        assert address[1] == s.port


@both_sides
@needs_ipv6
async def test_connect_udp_accepts_an_ipv6_address() -> None:
    with raw_socket("::1") as raw:
        s = await udp_client(raw)
        assert s.getpeer() == raw.getsockname()[:2]
        assert await got(s.send(b"ping"))
        data, address = raw.recvfrom(100)
        raw.sendto(data, address)
        assert await got(s.recv()) == b"ping"


@both_sides
async def test_connect_udp_sends_to_a_broadcast_address() -> None:
    with stdlib.socket(stdlib.AF_INET, stdlib.SOCK_DGRAM) as raw:
        raw.bind(("", 0))
        raw.settimeout(DEADLINE)
        s = await got(socket.connect("127.255.255.255", raw.getsockname()[1], "udp"))
        assert await got(s.send(b"all")) is True
        data, address = raw.recvfrom(100)
        assert data == b"all"
        raw.sendto(b"one", ("127.0.0.1", address[1]))  # not from the broadcast address
        assert await got(s.recv()) == b"one"


@both_sides
@pytest.mark.parametrize(
    ("host", "port"),
    [("a..b", 80), ("localhost", 65536), ("127.0.0.1", 0), ("127.0.0.1", -1), ("::1%a\n", 80)],
)
async def test_connect_udp_returns_none_for_an_invalid_host_or_port(
    host: str, port: int, reasons: Callable[[], list[str]]
) -> None:
    assert await got(socket.connect(host, port, "udp")) is None
    assert len(reasons()) == 1


@both_sides
async def test_connect_udp_returns_none_for_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, reasons: Callable[[], list[str]]
) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise stdlib.gaierror(stdlib.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", unknown)
    assert await got(socket.connect("no-such-host.invalid", 80, "udp")) is None
    assert "no-such-host.invalid:80" in reasons()[0]


@both_sides
async def test_connect_raises_for_an_unknown_transport() -> None:
    for transport in ("sctp", "UDP", ""):
        with pytest.raises(ValueError, match="a transport must be 'tcp' or 'udp'"):
            await got(socket.connect("127.0.0.1", 80, transport))  # type: ignore[arg-type]
    for mistake in (None, 1, ["udp"]):
        with pytest.raises(TypeError, match="a transport must be a str"):
            await got(socket.connect("127.0.0.1", 80, mistake))  # type: ignore[arg-type]
    for host, port in ((None, 80), ("127.0.0.1", "80"), ("127.0.0.1", True)):
        with pytest.raises(TypeError):
            await got(socket.connect(host, port, "udp"))  # type: ignore[arg-type]


@both_sides
async def test_connect_tcp_can_be_named() -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        s = await got(socket.connect("127.0.0.1", listening.getsockname()[1], "tcp"))
        assert not s.isudp()


# ---- socket.udpserver ----


@both_sides
async def test_udpserver_receives_from_anybody_and_answers_the_last_sender() -> None:
    server = udpserver()
    with raw_socket() as one, raw_socket() as two:
        for raw in (one, two, one):
            raw.sendto(b"ping", ("127.0.0.1", server.port))
            assert await got(server.recv()) == b"ping"
            assert server.getpeer() == raw.getsockname()
            assert await got(server.send("pong")) is True
            assert raw.recvfrom(100) == (b"pong", ("127.0.0.1", server.port))


@both_sides
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
async def test_udpserver_on_a_port_receives_on_all_addresses(host: str) -> None:
    server = udpserver(0)
    with raw_socket(host) as raw:
        raw.connect((host, server.port))  # the kernel drops answers from another address
        raw.send(b"ping")
        assert await got(server.recv()) == b"ping"
        assert server.getpeer() == raw.getsockname()[:2]
        assert await got(server.send("pong"))
        assert raw.recv(100) == b"pong"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
@both_sides
async def test_udpserver_answers_from_the_address_that_the_datagram_was_sent_to() -> None:
    server = udpserver(0)
    with raw_socket() as raw:
        raw.sendto(b"ping", ("127.0.0.7", server.port))
        await got(server.recv())
        await got(server.send("pong"))
        assert raw.recvfrom(100) == (b"pong", ("127.0.0.7", server.port))
        with raw_socket() as other:  # has not sent to 127.0.0.7
            server.setpeer(*other.getsockname())
            await got(server.send("hello"))
            assert other.recvfrom(100) == (b"hello", ("127.0.0.1", server.port))


@both_sides
async def test_udpserver_answers_a_broadcast_from_its_own_address() -> None:
    server = udpserver(0)
    with raw_socket() as raw:
        raw.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_BROADCAST, 1)
        raw.sendto(b"ping", ("127.255.255.255", server.port))
        assert await got(server.recv()) == b"ping"
        assert await got(server.send("pong")) is True
        assert raw.recvfrom(100) == (b"pong", ("127.0.0.1", server.port))


@both_sides
async def test_udpserver_listens_on_one_address() -> None:
    server = udpserver("127.0.0.1:0")
    assert isinstance(server, async_socket) is inside()
    with raw_socket() as raw:
        raw.sendto(b"ping", ("127.0.0.1", server.port))
        assert await got(server.recv()) == b"ping"
    assert f"127.0.0.1:{server.port}" in repr(server)


@both_sides
async def test_udpserver_returns_none_for_an_occupied_or_invalid_place(
    reasons: Callable[[], list[str]],
) -> None:
    server = udpserver(0)
    places = [server.port, f":{server.port}", 65536, "127.0.0.1:65536", "127.0.0.1", "localhost:0"]
    for where in places:
        assert socket.udpserver(where) is None
    assert len(reasons()) == len(places)
    assert "Address already in use" in reasons()[0]
    for mistake in (None, 1.5, True, b"127.0.0.1:0"):
        with pytest.raises(TypeError, match="where to listen must be an int or a str"):
            socket.udpserver(mistake)  # type: ignore[arg-type]


@both_sides
async def test_an_empty_datagram_does_not_end_a_servers_loop() -> None:
    server = udpserver()
    with raw_socket() as raw:
        for data in (b"", b"one", b"", b"", b"two", b"end"):
            raw.sendto(data, ("127.0.0.1", server.port))
        received = []
        while data := await got(server.recv()):
            received.append(data)
            if data == b"end":
                await got(server.close())
        assert received == [b"one", b"two", b"end"]


@both_sides
async def test_a_server_that_has_received_nothing_has_no_peer(
    reasons: Callable[[], list[str]],
) -> None:
    server = udpserver()
    assert server.getpeer() == ("::", 0)
    assert await got(server.send("nobody")) is False
    assert "has no peer to send to" in reasons()[0]
    assert server.isopen()


@both_sides
async def test_udpserver_survives_a_client_that_is_gone() -> None:
    server = udpserver()
    with raw_socket() as gone:
        gone.sendto(b"ping", ("127.0.0.1", server.port))
        assert await got(server.recv()) == b"ping"
    for _ in range(3):
        await got(server.send("pong"))  # the kernel may report ECONNREFUSED
    with raw_socket() as raw:
        raw.sendto(b"ping again", ("127.0.0.1", server.port))
        assert await got(server.recv()) == b"ping again"


# ---- setpeer ----


@both_sides
async def test_setpeer_changes_whom_a_client_sends_to_and_receives_from() -> None:
    with raw_socket() as one, raw_socket() as two:
        s = await udp_client(one)
        assert s.setpeer(*two.getsockname()) is None
        assert s.getpeer() == two.getsockname()
        await got(s.send("hello"))
        data, address = two.recvfrom(100)
        assert data == b"hello"
        two.sendto(b"from two", address)
        assert await got(s.recv()) == b"from two"
        one.sendto(b"from one", address)  # ``one`` was the peer before
        assert await got(s.recv()) == b"from one"
        assert s.getpeer() == two.getsockname()


@both_sides
async def test_setpeer_on_a_server_lasts_until_the_next_recv() -> None:
    server = udpserver()
    with raw_socket() as one, raw_socket() as two:
        server.setpeer(*two.getsockname())
        assert await got(server.send("first"))
        assert two.recv(100) == b"first"
        one.sendto(b"ping", ("127.0.0.1", server.port))
        await got(server.recv())
        assert server.getpeer() == one.getsockname()
        server.setpeer(*two.getsockname())
        assert await got(server.send("forwarded"))
        assert two.recv(100) == b"forwarded"


@both_sides
@needs_ipv6
async def test_setpeer_may_change_the_family() -> None:
    with raw_socket() as one, raw_socket("::1") as two:
        s = await udp_client(one)
        s.setpeer("::1", two.getsockname()[1])
        await got(s.send("hello"))
        data, address = two.recvfrom(100)
        two.sendto(data, address)
        assert await got(s.recv()) == b"hello"


@both_sides
async def test_setpeer_raises_for_an_invalid_address_and_changes_nothing() -> None:
    with raw_socket() as raw:
        s = await udp_client(raw)
        for ip, port in (("localhost", 80), ("1.2.3", 80), ("", 80), ("127.0.0.1", 0)):
            with pytest.raises(ValueError, match="peer"):
                s.setpeer(ip, port)
        with pytest.raises(ValueError, match="port"):
            s.setpeer("127.0.0.1", 65536)
        for ip, port in ((None, 80), (b"127.0.0.1", 80), ("127.0.0.1", "80"), ("127.0.0.1", True)):
            with pytest.raises(TypeError):
                s.setpeer(ip, port)
        assert s.getpeer() == raw.getsockname()


@both_sides
async def test_setpeer_raises_type_error_for_a_tcp_socket() -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        s = await got(socket.connect(*listening.getsockname()))
        with pytest.raises(TypeError, match="setpeer is for UDP sockets"):
            s.setpeer("127.0.0.1", 80)
        assert s.getpeer() == listening.getsockname()


# ---- isudp, getside, istls, port ----


@both_sides
async def test_isudp_tells_the_transport() -> None:
    with raw_socket() as raw, stdlib.create_server(("127.0.0.1", 0)) as listening:
        tcp = await got(socket.connect(*listening.getsockname()))
        udp = await udp_client(raw)
        assert tcp.isudp() is False
        assert udp.isudp() is socket.isudp(udp) is udpserver().isudp() is True
        assert (udp.getside(), udpserver().getside()) == ("client", "server")
        assert (udp.istls(), tcp.istls()) == (False, False)
        raw_server, address = listening.accept()
        raw_server.close()
        assert tcp.port == address[1]


# ---- sides ----


def test_a_udp_socket_can_be_used_only_where_it_was_made() -> None:
    outside = udpserver()
    made: list[Any] = []

    async def use() -> None:
        made.append(udpserver())
        assert outside.isudp()
        calls = [outside.recv, outside.peek, outside.close, outside.isopen]
        for call in (*calls, lambda: outside.setpeer("127.0.0.1", 9), lambda: outside.send("x")):
            with pytest.raises(RuntimeError, match="was made outside Trio"):
                call()

    trio.run(use)
    (inside_trio,) = made
    assert inside_trio.getpeer() == ("::", 0)
    with pytest.raises(RuntimeError, match="was made inside Trio"):
        inside_trio.recv()


# ---- in a scheduler ----


@both_sides
async def test_a_udp_server_and_its_client_run_in_one_scheduler() -> None:
    """This test comes from Pluto's own test suite."""
    sched = scheduler()
    received: list[bytes | None] = []

    async def serve() -> None:
        serv = async_socket.udpserver("127.0.0.1:0")
        assert serv is not None
        sched.add(lambda: client(serv.port))
        received.append(await serv.recv())
        await serv.send("pong")

    async def client(port: int) -> None:
        sock = await socket.connect("localhost", port, "udp")
        assert sock is not None
        if sock.getpeer()[0] != "127.0.0.1":
            sock.setpeer("127.0.0.1", port)
        await sock.send("ping")
        received.append(await sock.recv())

    sched.add(serve)
    await got(sched.run())
    assert received == [b"ping", b"pong"]
