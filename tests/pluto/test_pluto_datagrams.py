"""The methods of Pluto's UDP sockets: send, recv, peek, unrecv, starttls, close, isopen."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.pluto import both_sides, checkpoint, got, in_child, run_both, run_outside
from helpers.pluto_udp import needs_ipv6, raw_socket, udp_client, udpserver, wait_arrived
from trisock.pluto import socket
from trisock.pluto.blocking import background

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls

# On other systems, no host has the address 0.0.0.0.
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="0.0.0.0 is this host on Linux")


# ---- send ----


@both_sides
async def test_send_of_a_datagram_that_is_too_long_returns_false(
    reasons: Callable[[], list[str]],
) -> None:
    with raw_socket() as raw:
        s = await udp_client(raw)
        assert await got(s.send(bytes(70_000))) is False
        assert "Message too long" in reasons()[0]
        assert s.isopen()
        for size in (65_507, 1, 0):
            assert await got(s.send(bytes(size))) is True
            assert len(raw.recv(70_000)) == size
        with pytest.raises(TypeError):
            await got(s.send(1))


@both_sides
async def test_a_second_attempt_to_answer_goes_to_the_same_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first attempt fails, as if its source address were that of a multicast group."""
    server = udpserver()
    original = trisock.UDPSocket.send

    async def without_source(
        self: trisock.UDPSocket,
        data: bytes,
        address: tuple[str, int],
        *,
        source: tuple[str, int] | None = None,
    ) -> None:
        if source is not None:
            server._transport.setpeer("127.0.0.1", 9)  # as recv in another task may do
            raise OSError("not from this address")
        await original(self, data, address)

    with raw_socket() as raw:
        raw.sendto(b"ping", ("127.0.0.1", server.port))
        await got(server.recv())
        monkeypatch.setattr(trisock.UDPSocket, "send", without_source)
        assert await got(server.send("pong")) is True
        assert raw.recv(100) == b"pong"


# ---- recv ----


@both_sides
async def test_recv_waits_for_a_datagram() -> None:
    server = udpserver()
    client = await got(socket.connect("127.0.0.1", server.port, "udp"))
    results = await run_both(lambda: got(server.recv()), lambda: got(client.send("late")))
    assert results == (b"late", True)


@both_sides
async def test_a_client_receives_only_from_its_peers() -> None:
    with raw_socket() as raw, raw_socket() as stranger:
        s = await udp_client(raw)
        await got(s.send("hello"))
        _, address = raw.recvfrom(100)
        for _ in range(50):
            stranger.sendto(b"forged", address)
        await wait_arrived(s)
        assert await got(s.peek()) is None
        raw.sendto(b"genuine", address)
        assert await got(s.recv()) == b"genuine"
        assert s.getpeer() == raw.getsockname()


@both_sides
async def test_a_client_of_a_group_receives_from_anybody() -> None:
    s = await got(socket.connect("239.255.255.250", 1900, "udp"))
    with raw_socket() as device:
        device.sendto(b"NOTIFY", ("127.0.0.1", s.port))
        assert await got(s.recv()) == b"NOTIFY"
        assert s.getpeer() == ("239.255.255.250", 1900)


@both_sides
@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("::ffff:127.0.0.1", "127.0.0.1"),
        pytest.param("0:0::1", "::1", marks=needs_ipv6),
        pytest.param("::1%1", "::1", marks=needs_ipv6),
        pytest.param("0.0.0.0", "127.0.0.1", marks=only_linux),
    ],
)
async def test_a_client_recognizes_its_peer_in_any_notation(written: str, host: str) -> None:
    with raw_socket(host) as raw:
        s = await got(socket.connect(written, raw.getsockname()[1], "udp"))
        assert await got(s.send(b"ping"))
        data, address = raw.recvfrom(100)
        raw.sendto(data, address)
        assert await got(s.recv()) == b"ping"


@both_sides
async def test_recv_and_peek_return_none_after_an_error(
    monkeypatch: pytest.MonkeyPatch, reasons: Callable[[], list[str]]
) -> None:
    server = udpserver()

    async def fail(self: trisock.UDPSocket) -> trisock.Datagram:
        raise OSError("out of memory")

    monkeypatch.setattr(trisock.UDPSocket, "recv", fail)
    assert await got(server.recv()) is None
    assert await got(server.peek()) is None
    assert reasons() == ["out of memory"] * 2


async def test_a_second_reader_gets_a_busy_resource_error() -> None:
    server = udpserver()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.recv)
        await trio.testing.wait_all_tasks_blocked()
        for read in (server.recv, server.peek):
            with pytest.raises(trio.BusyResourceError):
                await read()
        await server.close()


async def test_a_cancelled_recv_loses_no_datagram() -> None:
    server = udpserver()
    with raw_socket() as raw:
        for _ in range(30):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.recv)
                    await trio.testing.wait_all_tasks_blocked()
                    raw.sendto(b"ping", ("127.0.0.1", server.port))
                    scope.cancel()
            assert await server.recv() == b"ping"


# ---- peek, unrecv ----


@both_sides
async def test_peek_returns_the_next_datagram_and_leaves_it_unread() -> None:
    server = udpserver()
    with raw_socket() as raw:
        for _ in range(30):  # enough rounds that recv would wait before it reads
            assert await got(server.peek()) is None
            raw.sendto(b"one", ("127.0.0.1", server.port))
            raw.sendto(b"two", ("127.0.0.1", server.port))
            await wait_arrived(server)
            assert [await got(server.peek()) for _ in range(2)] == [b"one"] * 2
            assert [await got(server.recv()) for _ in range(2)] == [b"one", b"two"]


@both_sides
async def test_peek_does_not_change_the_peer() -> None:
    server = udpserver()
    with raw_socket() as raw:
        raw.sendto(b"ping", ("127.0.0.1", server.port))
        await wait_arrived(server)
        assert await got(server.peek()) == b"ping"
        assert server.getpeer() == ("::", 0)
        await got(server.recv())
        assert server.getpeer() == raw.getsockname()


@both_sides
async def test_unrecv_puts_data_before_all_unread_datagrams() -> None:
    server = udpserver()
    with raw_socket() as raw:
        raw.sendto(b"later", ("127.0.0.1", server.port))
        server.unrecv("World")
        server.unrecv(b"Hello")
        server.unrecv("")
        assert await got(server.peek()) == b"Hello"
        assert [await got(server.recv()) for _ in range(2)] == [b"Hello", b"World"]
        assert server.getpeer() == ("::", 0)
        assert await got(server.recv()) == b"later"
        assert server.getpeer() == raw.getsockname()
        with pytest.raises(TypeError):
            server.unrecv(5)


# ---- starttls, close, isopen ----


@both_sides
async def test_starttls_on_a_udp_socket_returns_false_and_closes_it(
    reasons: Callable[[], list[str]], certs: list[dict[str, str | bytes]]
) -> None:
    with raw_socket() as raw:
        for sock, tls in ((await udp_client(raw), "localhost"), (udpserver(), certs)):
            assert await got(sock.starttls(tls)) is False
            assert not sock.isopen()
            assert await got(sock.send("not in plain text")) is False
        assert all("which needs TCP" in each for each in reasons()[::2])
        other = await udp_client(raw)
        with pytest.raises(ValueError, match="starttls has only the options"):
            await got(other.starttls("localhost", {"unknown": True}))
        assert other.isopen()


@both_sides
async def test_a_closed_udp_socket_neither_sends_nor_receives() -> None:
    with raw_socket() as raw:
        for sock in (await udp_client(raw), udpserver()):
            sock.unrecv("x")
            assert sock.isopen() is True
            assert await got(sock.close()) is None
            assert sock.isopen() is False
            assert await got(sock.send("x")) is False
            sock.unrecv("x")
            assert await got(sock.recv()) is None
            assert await got(sock.peek()) is None
            sock.setpeer("127.0.0.1", 9)
            assert sock.getpeer() == ("127.0.0.1", 9)
            await got(sock.close())  # a second close does nothing


@both_sides
async def test_closing_a_udp_socket_wakes_a_waiting_recv() -> None:
    server = udpserver()

    async def close() -> None:
        while not server._transport._udp._receiving.in_use:
            await got(checkpoint())
        await got(server.close())

    assert await run_both(lambda: got(server.recv()), close) == (None, None)


@both_sides
async def test_udp_methods_can_be_called_with_the_socket_as_first_argument() -> None:
    with raw_socket() as raw:
        s = await udp_client(raw)
        assert await got(socket.send(s, "hello")) is True
        data, address = raw.recvfrom(100)
        raw.sendto(data, address)
        assert await got(socket.recv(s)) == b"hello"
        socket.unrecv(s, "again")
        assert await got(socket.peek(s)) == b"again"
        socket.setpeer(s, "127.0.0.1", 9)
        assert socket.getpeer(s) == ("127.0.0.1", 9)
        assert socket.isopen(s)
        await got(socket.close(s))
        assert not socket.isopen(s)


# ---- garbage collection, forks, interrupts ----


@both_sides
async def test_a_dropped_udp_socket_is_closed_silently() -> None:
    server = udpserver()
    port = server.port
    del server
    gc.collect()
    again = udpserver(f"127.0.0.1:{port}")
    await got(again.close())


def test_parent_and_child_can_use_a_udp_socket_after_a_fork() -> None:
    with raw_socket() as raw:
        s = socket.connect(*raw.getsockname(), "udp")
        assert s is not None
        in_child(lambda: s.send("from the child"))
        in_child(s.close)
        assert raw.recv(100) == b"from the child"
        assert s.send("from the parent")
        assert raw.recv(100) == b"from the parent"


def test_an_interrupted_recv_puts_the_datagram_back_and_keeps_the_peer() -> None:
    server = udpserver()
    with raw_socket() as one, raw_socket() as two:
        one.sendto(b"one", ("127.0.0.1", server.port))
        assert server.recv() == b"one"
        two.sendto(b"two", ("127.0.0.1", server.port))
        received = server.recv()
        server._undo_recv(received)  # as if an interrupt had discarded the result
        server._undo_recv(None)
        assert server.getpeer() == one.getsockname()
        assert server.recv() == b"two"
        assert server.getpeer() == two.getsockname()
        server._undo_recv(bytes(bytearray(b"an older one")))  # another thread received later
        assert server.getpeer() == two.getsockname()
        assert server.recv() == b"an older one"
        server.close()
        server._undo_recv(received)  # ignored, because the socket is closed
        assert server.recv() is None


def test_an_interrupted_recv_or_starttls_of_a_client_is_undone() -> None:
    with raw_socket() as raw:
        s = run_outside(udp_client(raw))
        raw.sendto(b"one", ("127.0.0.1", s.port))
        s._undo_recv(s.recv())
        assert s.recv() == b"one"
        assert s.getpeer() == raw.getsockname()
        s.unrecv("unread")
        s._undo_starttls(False)
        assert not s.isopen()
        assert s.recv() is None


def test_an_interrupted_close_of_a_udp_socket_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    s = udpserver()

    def interrupt(call: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(background, "result_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            s.close()
    assert not s.isopen()
    assert s.recv() is None


@pytest.mark.parametrize("call", ["close", "starttls"])
def test_an_interrupted_close_or_starttls_leaves_the_socket_closed(call: str) -> None:
    """The interrupt arrived before the background thread received the call."""
    for method, arguments, result in (
        ("send", ["x"], False),
        ("recv", [], None),
        ("peek", [], None),
        ("unrecv", ["x"], None),
        ("isopen", [], False),
    ):
        s = udpserver()
        s.setpeer("127.0.0.1", 9)
        s.unrecv("unread")
        intent = s._transport.closing if call == "close" else s._transport.upgrade
        intent.recorded = True
        assert getattr(s, method)(*arguments) is result
        assert not s._transport._udp.isopen()
