"""Pluto's sockets and listeners without TLS: each call on Pluto's page, inside and outside Trio."""

from __future__ import annotations

import contextlib
import socket as stdlib
import ssl
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from helpers.pluto import (
    Thread,
    both_sides,
    checkpoint,
    got,
    inside,
    pair,
    raise_emfile,
    raw_peer,
    recv_all,
    reset,
    run_both,
    starttls_on_both,
    tls_pair,
    wait_for_client,
    wait_readable,
)
from helpers.pluto_udp import can_bind_ipv6, needs_ipv6
from trisock.pluto import async_socket, listener, socket
from trisock.testing import Authority

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls

# ---- socket.connect ----


@both_sides
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_connect_returns_a_socket(host: str) -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        s = await got(socket.connect(host, listening.getsockname()[1]))
        assert isinstance(s, socket)
        assert isinstance(s, async_socket) is inside()
        await got(s.close())


@both_sides
async def test_connect_accepts_an_ipv6_address() -> None:
    listening = socket.listen(0)
    s = await got(socket.connect("::1", listening.port))
    if s is None:
        pytest.skip("no IPv6 here")
    assert s.getpeer() == ("::1", listening.port)


@both_sides
async def test_connect_returns_none_when_refused(reasons: Callable[[], list[str]]) -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    assert await got(socket.connect("127.0.0.1", port)) is None
    assert f"cannot connect to 127.0.0.1:{port}: Connection refused" in reasons()[0]


@both_sides
async def test_connect_returns_none_for_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, reasons: Callable[[], list[str]]
) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise stdlib.gaierror(stdlib.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", unknown)
    assert await got(socket.connect("no-such-host.invalid", 80)) is None
    assert "no-such-host.invalid:80" in reasons()[0]


@both_sides
@pytest.mark.parametrize(("host", "port"), [("a..b", 80), ("x" * 64, 80), ("localhost", 65536)])
async def test_connect_returns_none_for_an_invalid_host_or_port(
    host: str, port: int, reasons: Callable[[], list[str]]
) -> None:
    assert await got(socket.connect(host, port)) is None
    assert len(reasons()) == 1


@both_sides
async def test_connect_raises_type_error_for_a_str_port() -> None:
    with pytest.raises(TypeError):
        await got(socket.connect("localhost", "80"))


# ---- socket.listen ----


@both_sides
async def test_listen_returns_a_listener_immediately() -> None:
    listening = socket.listen(0)
    assert isinstance(listening, listener)
    assert 0 < listening.port < 65536
    assert str(listening.port) in repr(listening)
    stdlib.create_connection(("127.0.0.1", listening.port)).close()


@both_sides
async def test_listen_returns_none_for_an_invalid_or_occupied_port(
    reasons: Callable[[], list[str]],
) -> None:
    assert socket.listen(65536) is None
    listening = socket.listen(0)
    assert socket.listen(listening.port) is None
    assert f"cannot listen on *:{listening.port}: Address already in use" in reasons()[1]


@both_sides
@pytest.mark.parametrize(
    ("host", "also"),
    [
        ("127.0.0.1", None),
        ("0.0.0.0", "127.0.0.1"),
        pytest.param("[::1]", "::1", marks=needs_ipv6),
        pytest.param("::1", None, marks=needs_ipv6),
    ],
)
async def test_listen_listens_on_one_address(host: str, also: str | None) -> None:
    listening = socket.listen(f"{host}:0")
    stdlib.create_connection((also or host, listening.port)).close()
    other = "127.0.0.1" if "::" in host else "::1"
    with pytest.raises(OSError, match=r"refused|assign|support"):
        stdlib.create_connection((other, listening.port))


@both_sides
@pytest.mark.parametrize("where", [0, ":0", "[::]:0", ":::0"])
async def test_listen_without_an_address_listens_on_all_addresses(where: int | str) -> None:
    listening = socket.listen(where)
    for host in ("127.0.0.1", *(["::1"] if can_bind_ipv6() else [])):
        stdlib.create_connection((host, listening.port)).close()


@both_sides
@pytest.mark.parametrize(
    "where",
    [
        *("", "80", "127.0.0.1", "127.0.0.1:", "127.0.0.1:80:", "127.0.0.1:-1", "127.0.0.1:65536"),
        *(
            "localhost:0",
            "*:0",
            "[127.0.0.1:0",
            "[::1:0",
            "x::1]:0",
            "127.0.0.1:\u0660",
            "127.0.0.1: 0",
        ),
        *("127.0.0.1:0\n", "1.2.3:0", "127.0.0.1:000000"),
    ],
)
async def test_listen_returns_none_for_an_invalid_place(
    where: str, reasons: Callable[[], list[str]]
) -> None:
    assert socket.listen(where) is None
    assert len(reasons()) == 1


@both_sides
@pytest.mark.parametrize("mistake", [None, True, 1.5, b"127.0.0.1:0", ("127.0.0.1", 0)])
async def test_listen_raises_type_error_for_anything_but_a_port_or_str(mistake: Any) -> None:
    with pytest.raises(TypeError, match="where to listen must be an int or a str"):
        socket.listen(mistake)


# ---- send ----


@both_sides
@pytest.mark.parametrize("data", ["gr\u00fc\u00df dich", "gr\u00fc\u00df dich".encode()])
async def test_send_accepts_bytes_and_encodes_str_as_utf8(data: str | bytes) -> None:
    client, raw = await raw_peer()
    with raw:
        assert await got(client.send(data)) is True
        assert raw.recv(100) == "gr\u00fc\u00df dich".encode()
        with pytest.raises(TypeError):
            await got(client.send(1))


@both_sides
async def test_methods_can_be_called_with_the_socket_as_first_argument() -> None:
    client, server = await pair()
    assert await got(socket.send(client, "hello")) is True
    assert await got(socket.recv(server)) == b"hello"
    socket.unrecv(server, "again")
    assert await got(socket.peek(server)) == b"again"
    assert socket.getside(server) == "server"
    assert socket.getpeer(client) == client.getpeer()
    assert socket.isopen(client)
    assert not socket.istls(client)
    await got(socket.close(client))
    assert not socket.isopen(client)
    listening = socket.listen(0)
    assert not listener.hasconnection(listening)
    await got(listener.close(listening))
    assert await got(listener.accept(listening)) is None


# ---- recv ----


@both_sides
async def test_recv_returns_the_oldest_chunk() -> None:
    client, raw = await raw_peer()
    with raw:
        raw.sendall(b"one")
        assert await got(client.recv()) == b"one"
        raw.sendall(b"two")
        assert await got(client.recv()) == b"two"


@both_sides
async def test_recv_returns_one_record_under_tls(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await tls_pair(certs)
    await got(client.send("one"))
    await got(client.send("two"))
    assert [await got(server.recv()) for _ in range(2)] == [b"one", b"two"]


@both_sides
async def test_recv_waits_for_a_chunk() -> None:
    client, server = await pair()
    results = await run_both(lambda: got(server.recv()), lambda: got(client.send("late")))
    assert results == (b"late", True)


@both_sides
async def test_recv_returns_none_when_the_peer_has_closed() -> None:
    client, raw = await raw_peer()
    raw.sendall(b"last")
    raw.close()
    assert await got(client.recv()) == b"last"
    assert [await got(client.recv()) for _ in range(2)] == [None, None]


@both_sides
async def test_recv_returns_none_after_a_reset(reasons: Callable[[], list[str]]) -> None:
    client, raw = await raw_peer()
    reset(raw)
    assert await got(client.recv()) is None
    assert "reset by peer" in reasons()[0]


# ---- peek ----


@both_sides
async def test_peek_returns_the_next_chunk_and_leaves_it_unread() -> None:
    client, raw = await raw_peer()
    with raw:
        raw.sendall(b"hello")
        await wait_readable(client)
        assert [await got(client.peek()) for _ in range(2)] == [b"hello"] * 2
        assert await got(client.recv()) == b"hello"


@both_sides
async def test_peek_returns_none_if_no_data_is_pending() -> None:
    client, raw = await raw_peer()
    assert await got(client.peek()) is None
    raw.close()
    await wait_readable(client)
    assert await got(client.peek()) is None


# ---- unrecv ----


@both_sides
async def test_unrecv_puts_data_before_all_unread_data() -> None:
    client, server = await pair()
    await got(server.send("later"))
    client.unrecv("World")
    client.unrecv(b"Hello")
    assert [await got(client.recv()) for _ in range(3)] == [b"Hello", b"World", b"later"]


def client_hello(authority: Authority) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    context = ssl.create_default_context(cadata=authority.ca.decode())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.do_handshake()
    return peer, incoming, outgoing


@both_sides
@pytest.mark.parametrize("how", ["unrecv", "peek"])
async def test_starttls_reads_a_client_hello_pushed_back_with_unrecv(
    how: str, authority: Authority, certs: list[dict[str, str | bytes]]
) -> None:
    client, raw = await raw_peer()  # the side that connected is the TLS server
    peer, incoming, outgoing = client_hello(authority)
    raw.sendall(outgoing.read())
    await wait_readable(client)
    if how == "unrecv":
        client.unrecv(await got(client.recv()))
    else:
        assert (await got(client.peek())).startswith(b"\x16\x03")

    def handshake() -> None:
        while True:
            try:
                peer.do_handshake()
            except ssl.SSLWantReadError:
                incoming.write(raw.recv(65536))
            else:
                raw.sendall(outgoing.read())
                return

    with raw:
        thread = Thread(handshake)
        assert await got(client.starttls(certs)) is True
        thread.result()


@both_sides
async def test_starttls_fails_after_unrecv_of_plain_text(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    client.unrecv("injected")
    assert await starttls_on_both(client, server, "localhost", certs) == (False, False)
    assert not client.isopen()


# ---- close, getpeer, getside, isopen ----


@both_sides
async def test_a_closed_socket_neither_sends_nor_receives(reasons: Callable[[], list[str]]) -> None:
    client, raw = await raw_peer()
    with raw:
        assert client.isopen() is True
        await got(client.close())
        assert client.isopen() is False
        assert await got(client.send("x")) is False
        assert await got(client.recv()) is None
        client.unrecv("x")
        assert await got(client.recv()) is None
        assert await got(client.peek()) is None
    assert "already closed" in reasons()[0]
    assert str(client.getpeer()) in reasons()[0]


@both_sides
async def test_getpeer_and_getside_work_before_and_after_close() -> None:
    client, raw = await raw_peer()
    with raw:
        for _ in range(2):  # the second time, the socket is closed
            assert client.getpeer() == raw.getsockname()
            assert client.getside() == "client"
            await got(client.close())


@both_sides
async def test_close_delivers_all_sent_data() -> None:
    client, raw = await raw_peer()
    with raw:
        message = bytes(range(256)) * 4000
        receiving = Thread(lambda: recv_all(raw))
        await got(client.send(message))
        assert await got(client.close()) is None
        assert receiving.result() == message
        await got(client.close())  # a second close does nothing


@both_sides
async def test_isopen_is_true_until_all_data_has_been_read() -> None:
    client, raw = await raw_peer()
    raw.sendall(b"last")
    raw.close()
    await wait_readable(client)
    assert client.isopen()
    assert await got(client.recv()) == b"last"
    await wait_readable(client)
    assert not client.isopen()


@both_sides
async def test_repr_shows_the_class_and_the_connection() -> None:
    client, _ = await pair()
    name = "async_socket" if inside() else "socket"
    assert repr(client).startswith(f"<trisock.pluto.{name} <trisock.Socket client")


# ---- listener: accept, hasconnection, close ----


@both_sides
async def test_accept_returns_immediately_if_a_client_is_pending() -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port)) as raw:
        s = await got(listening.accept())
        assert s.getside() == "server"
        assert s.getpeer() == raw.getsockname()


@both_sides
async def test_accept_waits_for_a_client() -> None:
    listening = socket.listen(0)
    server, client = await run_both(
        lambda: got(listening.accept()),
        lambda: got(socket.connect("127.0.0.1", listening.port)),
    )
    await got(client.send("hello"))
    assert await got(server.recv()) == b"hello"


@both_sides
async def test_accept_returns_none_when_the_listener_is_closed() -> None:
    listening = socket.listen(0)
    await got(listening.close())
    assert await got(listening.accept()) is None


@both_sides
async def test_closing_a_listener_wakes_a_waiting_accept() -> None:
    listening = socket.listen(0)

    async def close() -> None:
        while not listening._listening._accepting.in_use:
            await got(checkpoint())
        await got(listening.close())

    assert await run_both(lambda: got(listening.accept()), close) == (None, None)


@both_sides
async def test_accept_raises_oserror_if_no_descriptors_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listening = socket.listen(0)
    monkeypatch.setattr(listening._listening._listening, "accept_from", raise_emfile)
    with pytest.raises(OSError, match="Too many open files"):
        await got(listening.accept())


@both_sides
async def test_hasconnection_is_true_while_a_client_is_pending() -> None:
    listening = socket.listen(0)
    assert listening.hasconnection() is False
    with stdlib.create_connection(("127.0.0.1", listening.port)):
        await wait_for_client(listening)
        assert listening.hasconnection() is True
        assert await got(listening.accept()) is not None
        assert listening.hasconnection() is False
    with stdlib.create_connection(("127.0.0.1", listening.port)):
        await wait_for_client(listening)
        await got(listening.close())
        assert listening.hasconnection() is False


@both_sides
async def test_hasconnection_guarantees_that_the_next_accept_does_not_wait() -> None:
    listening = socket.listen(0)
    raw = stdlib.create_connection(("127.0.0.1", listening.port))
    await wait_for_client(listening)
    reset(raw)  # the client disconnects after hasconnection has seen it
    s = await got(listening.accept())
    assert await got(s.recv()) is None
