"""Tests of connect and connect_unix."""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
import sys
import weakref
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.pairs import closing
from helpers.resolver import Resolver
from trisock import ClientTLS, ServerTLS, TLSError, _connect
from trisock.testing import Authority, serving


@pytest.mark.parametrize(
    ("listen_host", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        (None, "localhost"),
        (None, "127.0.0.1"),
        (None, "::1"),
    ],
)
async def test_connect_accepts_names_and_addresses(listen_host: str | None, host: str) -> None:
    async with await trisock.listen(0, host=listen_host) as listener:
        client = await trisock.connect(host, listener.port)
        server = await listener.accept()
        async with closing(client, server):
            assert client.getside() == "client"
            assert server.getside() == "server"
            assert client.getpeer().port == listener.port
            assert server.getpeer() == client.getlocal()
            await client.send(b"hello")
            assert await server.recv() == b"hello"


async def test_connect_tries_every_address_of_a_name() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(**{"two.example": ["::1", "127.0.0.1"]}))
    async with await trisock.listen(0, host="127.0.0.1") as listener:  # not on ::1
        sock = await trisock.connect("two.example", listener.port)
        async with closing(sock):
            assert sock.getpeer() == ("127.0.0.1", listener.port)


async def test_an_international_name_is_resolved_in_its_ascii_form() -> None:
    resolver = Resolver(**{"xn--fa-hia.de": ["127.0.0.1"], "my_service": ["127.0.0.1"]})
    trio.socket.set_custom_hostname_resolver(resolver)
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        for name in ("faß.de", "my_service"):
            (await trisock.connect(name, listener.port)).abort()
    assert resolver.asked[-2:] == [b"xn--fa-hia.de", b"my_service"]


@pytest.mark.parametrize(
    ("host", "shown", "attempts"),
    [("127.0.0.1", "127.0.0.1", 1), ("::1", "[::1]", 1), ("two.example", "two.example", 2)],
)
async def test_connect_raises_the_error_that_all_attempts_share(
    host: str, shown: str, attempts: int, free_port: int
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(**{"two.example": ["::1", "127.0.0.1"]}))
    with pytest.raises(ConnectionRefusedError, match=re.escape(f"{shown}:{free_port}")) as caught:
        await trisock.connect(host, free_port)
    assert caught.value.errno == errno.ECONNREFUSED
    assert len(caught.value.__cause__.exceptions) == attempts  # type: ignore[union-attr]


async def test_connect_raises_an_oserror_that_lists_different_errors(free_port: int) -> None:
    # Nobody listens on 127.0.0.1, and ::1 cannot be reached from an IPv4 address.
    trio.socket.set_custom_hostname_resolver(Resolver(**{"two.example": ["127.0.0.1", "::1"]}))
    with pytest.raises(OSError, match=f"two.example:{free_port}") as caught:
        await trisock.connect("two.example", free_port, local_address="127.0.0.1")
    assert type(caught.value) is OSError
    errors = caught.value.__cause__.exceptions  # type: ignore[union-attr]
    where = f"cannot connect to two.example:{free_port} from '127.0.0.1': "
    assert str(caught.value) == where + "; ".join(map(str, errors))
    assert len(errors) == 2


async def test_connect_lists_three_different_errors_and_counts_the_others() -> None:
    # The refusal of each loopback address has a different message.
    many = [f"127.0.0.{number}" for number in range(1, 6)]
    trio.socket.set_custom_hostname_resolver(Resolver(**{"many.example": [*many, "::1"]}))
    with pytest.raises(OSError, match=r"^[^;]+; [^;]+; [^;]+; and 3 more$"):
        await trisock.connect("many.example", 9, local_address="127.0.0.1")


async def test_connecting_to_an_unknown_host_raises_gaierror_naming_the_host() -> None:
    with pytest.raises(socket.gaierror, match=r"unknown\.invalid:80"):
        await trisock.connect("unknown.invalid", 80)


async def test_arguments_are_checked_before_connecting(authority: Authority) -> None:
    for arguments, options, error, words in [
        (("localhost", "80"), {}, TypeError, "a port must be an int.*localhost"),
        (("localhost", 65536), {}, ValueError, "0-65535.*localhost"),
        ((b"localhost", 80), {}, TypeError, "a host must be a str"),
        (("", 80), {}, ValueError, "not a host name"),
        (("a b", 80), {}, ValueError, "not a host name"),
        (("localhost", 80), {"tls": 1}, TypeError, "tls must be a server name"),
        (("localhost", 80), {"tls": False}, TypeError, "tls must be a server name"),
        (("localhost", 80), {"tls": []}, ValueError, "at least one certificate"),
    ]:
        with pytest.raises(error, match=words):
            await trisock.connect(*arguments, **options)  # type: ignore[arg-type]


async def test_the_local_address_can_be_chosen() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        sock = await trisock.connect("127.0.0.1", listener.port, local_address="127.0.0.2")
        async with closing(sock):
            assert sock.getlocal().host == "127.0.0.2"
    with pytest.raises(
        OSError, match=r"cannot connect to 127\.0\.0\.1:9 from '192\.0\.2\.1': local_address cannot"
    ):
        await trisock.connect("127.0.0.1", 9, local_address="192.0.2.1")


async def test_connect_accepts_the_address_of_a_link_local_peer() -> None:
    address = next((each for each in link_local_addresses()), None)
    if address is None:
        pytest.skip("this machine has no link-local IPv6 address")
    async with await trisock.listen(0, host=address) as listener:
        assert listener.addresses[0].host == address
        client = await trisock.connect(address, listener.port)
        server = await listener.accept()
        async with closing(client, server):
            assert client.getpeer().host == address
            again = await trisock.connect(client.getpeer().host, client.getpeer().port)
            again.abort()


def link_local_addresses() -> list[str]:
    found = []
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, _, flags, name = line.split()
        if digits.startswith("fe80") and not int(flags, 16) & 0x40:  # skip tentative addresses
            address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
            found.append(f"{address}%{name}")
    return found


async def test_a_cancelled_connect_leaves_nothing_open() -> None:
    # On Linux, a listener with a full backlog does not answer.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(2):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        before = set(os.listdir("/proc/self/fd"))
        await cancel_when_blocked(trisock.connect, "127.0.0.1", full.getsockname()[1])
        assert set(os.listdir("/proc/self/fd")) == before
        for filler in fillers:
            filler.close()


async def test_cancelled_calls_of_connect_and_listen_leave_nothing_open(tmp_path: Path) -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        async with await trisock.listen_unix(tmp_path / "one"):
            for call in (
                lambda: trisock.connect("127.0.0.1", listener.port),
                lambda: trisock.connect_unix(tmp_path / "one"),
                lambda: trisock.listen(0),
                lambda: trisock.listen_unix(tmp_path / "two"),
            ):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()  # type: ignore[no-untyped-call]
                assert scope.cancelled_caught
        assert not (tmp_path / "two").exists()


# ---- tls= ----


@pytest.mark.usefixtures("trusted")
async def test_connect_can_start_tls(
    authority: Authority, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hello(sock: trisock.Socket) -> None:
        await sock.send(b"hello")

    async with serving(hello, tls=server_tls, host=None) as s:
        for tls, name in [
            (True, "localhost"),
            ("example.org", "example.org"),
            (ClientTLS(ca=authority.ca), "localhost"),
        ]:
            async with await trisock.connect("localhost", s.server.port, tls=tls) as sock:  # type: ignore[arg-type]
                assert sock.tls is not None
                assert sock.tls.server_hostname == name
                assert await sock.recv() == b"hello"
        with pytest.raises(TLSError, match="Hostname mismatch"):
            await trisock.connect("localhost", s.server.port, tls="example.net")
        with pytest.raises(TLSError, match="IP address mismatch"):
            await trisock.connect("127.0.0.2", s.server.port, tls=True)
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(TLSError, match=r"pass the issuer to ClientTLS\(ca="):
            await trisock.connect("localhost", s.server.port, tls=True)


@pytest.mark.parametrize("https_compatible", [False, True])
async def test_connect_passes_https_compatible_on_to_tls(
    client_tls: ClientTLS, server_tls: ServerTLS, https_compatible: bool
) -> None:
    async with (
        await trisock.listen(0, host="127.0.0.1") as listener,
        trio.open_nursery() as nursery,
    ):

        async def serve() -> None:
            async with await listener.accept() as sock:
                await sock.starttls(server_tls)
                await sock.send(b"hello")
                await sock.stream.send_eof()  # FIN, but no close_notify
                await sock.recv()

        nursery.start_soon(serve)
        sock = await trisock.connect(
            "127.0.0.1", listener.port, tls=client_tls, https_compatible=https_compatible
        )
        async with closing(sock):
            assert await sock.recv() == b"hello"
            if https_compatible:
                assert await sock.recv() == b""
            else:
                with pytest.raises(TLSError, match="without close_notify"):
                    await sock.recv()
            nursery.cancel_scope.cancel()


async def test_https_compatible_without_tls_is_refused(free_port: int) -> None:
    with pytest.raises(ValueError, match="https_compatible is for TLS: pass tls as well"):
        await trisock.connect("127.0.0.1", free_port, https_compatible=True)
    with pytest.raises(TypeError, match="https_compatible must be"):
        await trisock.connect("127.0.0.1", free_port, tls=True, https_compatible=1)  # type: ignore[arg-type]


# ---- Unix ----


async def test_connect_unix_accepts_every_type_of_path(
    path: Path, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with await trisock.listen_unix(path) as listener:
        for name in (path, str(path), os.fsencode(path)):
            client = await trisock.connect_unix(name)
            server = await listener.accept()
            async with closing(client, server):
                assert client.getpeer() == (str(path), 0)
                assert server.getlocal() == (str(path), 0)
                assert server.getpeer() == ("", 0)
                await client.send(b"hello")
                assert await server.recv() == b"hello"
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                async with await listener.accept() as sock:
                    await sock.starttls(server_tls)

            nursery.start_soon(serve)
            async with await trisock.connect_unix(path, tls=client_tls) as client:
                assert client.istls()


async def test_connect_unix_errors_include_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await trisock.connect_unix(tmp_path / "nothing")
    path = str(tmp_path / "nothing")
    assert caught.value.filename == path
    assert str(caught.value) == f"[Errno 2] cannot connect: No such file or directory: {path!r}"
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionRefusedError) as caught_refused:
        await trisock.connect_unix(tmp_path / "file")
    assert caught_refused.value.filename == str(tmp_path / "file")


async def test_invalid_unix_paths_are_refused() -> None:
    for path, error, words in [
        ("", ValueError, "empty"),
        ("a\0b", ValueError, "NUL"),
        (1, TypeError, "a path must be"),
        ("x" * 108, OSError, "at most 107 bytes"),
    ]:
        for call in (trisock.connect_unix, trisock.listen_unix):
            with pytest.raises(error, match=words) as caught:
                await call(path)  # type: ignore[arg-type]
            if isinstance(caught.value, OSError):
                assert caught.value.errno == errno.ENAMETOOLONG
                assert caught.value.filename == path
    with pytest.raises(ValueError, match="server's name"):
        await trisock.connect_unix("x", tls=ClientTLS())


async def test_connect_unix_waits_while_the_backlog_is_full(path: Path) -> None:
    async with await trisock.listen_unix(path, backlog=0) as listener:
        first = await trisock.connect_unix(path)
        connected = []

        async def connect() -> None:
            connected.append(await trisock.connect_unix(path))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked()
            assert not connected
            accepted = [await listener.accept(), await listener.accept()]
        async with closing(first, *connected, *accepted):
            await connected[0].send(b"hello")
            assert await accepted[1].recv() == b"hello"
        # A cancelled wait leaves no descriptor open: the fixture no_leaked_descriptor checks this.
        first = await trisock.connect_unix(path)
        await cancel_when_blocked(connect)
        first.abort()


@pytest.mark.skipif(sys.platform != "linux", reason="abstract Unix sockets need Linux")
async def test_abstract_unix_names_need_no_file() -> None:
    name = f"\0trisock-test-{os.getpid()}"
    async with await trisock.listen_unix(name) as listener:
        assert listener.addresses == ((name, 0),)
        client = await trisock.connect_unix(name)
        server = await listener.accept()
        async with closing(client, server):
            assert client.getpeer() == (name, 0)
        with pytest.raises(OSError, match="in use"):
            await trisock.listen_unix(name)
        with pytest.raises(ValueError, match="no mode"):
            await trisock.listen_unix(name, mode=0o600)


async def test_unix_calls_fail_on_platforms_without_unix_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    for call in (trisock.connect_unix, trisock.listen_unix):
        with pytest.raises(OSError, match="no Unix sockets on this platform"):
            await call("/tmp/x")


async def test_a_connection_that_dies_immediately_raises_an_oserror(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = errno.ENOTCONN

    def dead(*_: object, **__: object) -> trisock.Socket:
        raise OSError(number, "dead")

    async with await trisock.listen(0, host="127.0.0.1") as listener:
        monkeypatch.setattr(_connect, "Connection", dead)
        with pytest.raises(ConnectionResetError, match=f"127.0.0.1:{listener.port}"):
            await trisock.connect("127.0.0.1", listener.port)
        number = errno.ENOBUFS
        with pytest.raises(OSError, match="No buffer space"):
            await trisock.connect("127.0.0.1", listener.port)


async def test_a_connection_that_is_reset_immediately_raises_connection_reset_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reset(raw: socket.socket) -> None:  # runs as soon as the connection is made
            peer, _ = listening.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            select.select([raw], [], [])

        monkeypatch.setattr(_connect, "enable_keepalive", reset)
        host, port = listening.getsockname()
        with pytest.raises(ConnectionResetError, match=f"{host}:{port}"):
            await trisock.connect(host, port)


async def test_connect_refuses_a_servers_tls_role(authority: Authority, free_port: int) -> None:
    certificate = authority.certificate("localhost")
    for tls in (certificate, [certificate], trisock.ServerTLS(certificate)):
        with pytest.raises(TypeError, match="must be a TLS client's role"):
            await trisock.connect("localhost", free_port, tls=tls)
        with pytest.raises(TypeError, match="must be a TLS client's role"):
            await trisock.connect_unix("no such path", tls=tls)


async def test_sockets_and_listeners_can_be_weakly_referenced() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        async with await trisock.connect("127.0.0.1", listener.port) as sock:
            assert weakref.ref(sock)() is sock
        assert weakref.ref(listener)() is listener
