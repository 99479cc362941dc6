"""TCP keepalive is on for both sides of a connection, with the times of Go's net package."""

from __future__ import annotations

import socket
import sys

import pytest
import trio

import trisock
from helpers.pairs import all_served, closing, raw_pair, unix_pair
from trisock import Socket

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the options have Linux names")

ON = (1, 15, 15, 9)


def keepalive(sock: Socket | socket.socket) -> tuple[int, ...]:
    """Return the four options: on or off, idle seconds, interval in seconds, probes."""
    return (
        int(bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    )


@pytest.fixture
def defaults() -> tuple[int, ...]:
    """The options of a new socket."""
    with socket.socket() as sock:
        return keepalive(sock)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_both_sides_of_a_connection_have_keepalive(host: str) -> None:
    async with await trisock.listen(0, host=host) as listener:
        client = await trisock.connect(host, listener.port)
        server = await listener.accept()
        async with closing(client, server):
            assert keepalive(client) == ON
            assert keepalive(server) == ON


async def test_a_servers_connections_inherit_keepalive_from_the_listening_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, ...]] = []
    changed: list[tuple[int, int]] = []
    setsockopt = socket.socket.setsockopt

    def record(sock: socket.socket, level: int, option: int, value: int) -> None:
        changed.append((level, option))
        setsockopt(sock, level, option, value)

    async def handler(sock: Socket) -> None:
        found.append(keepalive(sock))

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        monkeypatch.setattr(socket.socket, "setsockopt", record)
        with socket.create_connection(("127.0.0.1", server.port)):
            await all_served(server, 1)
        server.stop()
    assert found == [ON]
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE) not in changed
    assert (socket.SOL_SOCKET, socket.SO_LINGER) in changed  # set by the close


async def test_accepted_connections_have_the_options_of_trio_streams() -> None:
    adopted = socket.create_server(("127.0.0.1", 0))
    for each in (0, trisock.Listener([adopted])):
        listener = each or await trisock.listen(0, host="127.0.0.1")
        async with listener:
            client = await trisock.connect("127.0.0.1", listener.port)
            async with closing(client, server := await listener.accept()):
                for option in (trio.socket.TCP_NODELAY, trio.socket.TCP_NOTSENT_LOWAT):
                    found = server.getsockopt(socket.IPPROTO_TCP, option)
                    assert found == client.stream.getsockopt(socket.IPPROTO_TCP, option) != 0


async def test_setsockopt_turns_keepalive_off(a: Socket, b: Socket) -> None:
    for sock in (a, b):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        assert keepalive(sock) == (0, *ON[1:])


async def test_an_adopted_listening_socket_gets_keepalive(defaults: tuple[int, ...]) -> None:
    raw = socket.create_server(("127.0.0.1", 0))
    early = socket.create_connection(raw.getsockname())
    async with trisock.Listener([raw]) as listener:
        late = socket.create_connection(raw.getsockname())
        with early, late:
            # The connection that was already waiting in the backlog keeps the default options.
            for expected in (defaults, ON):
                async with closing(sock := await listener.accept()):
                    assert keepalive(sock) == expected


async def test_an_adopted_listening_socket_keeps_its_own_keepalive_times() -> None:
    raw = socket.create_server(("127.0.0.1", 0))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 600)
    own = keepalive(raw)
    async with trisock.Listener([raw]) as listener:
        with socket.create_connection(raw.getsockname()):
            async with closing(sock := await listener.accept()):
                assert keepalive(sock) == own


async def test_an_adopted_stream_keeps_its_options(defaults: tuple[int, ...]) -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        with raw:
            assert keepalive(sock) == defaults


async def test_unix_sockets_have_no_keepalive(tmp_path: object) -> None:
    async with await trisock.listen_unix(f"{tmp_path}/unix") as listener:
        client = await trisock.connect_unix(f"{tmp_path}/unix")
        server = await listener.accept()
        async with closing(client, server, *unix_pair()):
            assert not client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    raw = socket.socket(socket.AF_UNIX)
    raw.bind(f"{tmp_path}/adopted")
    raw.listen()
    async with trisock.Listener([raw]):
        assert not raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_keepalive_uses_the_options_that_the_platform_has(
    monkeypatch: pytest.MonkeyPatch, defaults: tuple[int, ...]
) -> None:
    # macOS calls TCP_KEEPIDLE by another name. Here, the kernel does not know TCP_KEEPINTVL, and
    # Python does not know TCP_KEEPCNT.
    idle, interval, probes = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    monkeypatch.setattr(socket, "TCP_KEEPALIVE", idle, raising=False)
    monkeypatch.setattr(socket, "TCP_KEEPINTVL", 9999)
    monkeypatch.delattr(socket, "TCP_KEEPCNT")
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        client = await trisock.connect("127.0.0.1", listener.port)
    async with closing(client):
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        found = [client.getsockopt(socket.IPPROTO_TCP, each) for each in (idle, interval, probes)]
    assert found == [15, *defaults[2:]]
