"""The recipe socks_client, with proxies on loopback."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import python_socks
import trio
from python_socks.async_.trio import Proxy

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.example_clients import codes, reply, trusting
from helpers.examples import command, load
from helpers.pairs import read_all
from helpers.programs import run, running
from helpers.server import bound, echo
from helpers.shared_examples import SharedServer
from trisock import ClientTLS, ServerTLS, Socket

connect_through_proxy = load("socks_client").connect_through_proxy


class SOCKS5Proxy:
    """A SOCKS5 proxy (RFC 1928, RFC 1929).

    Attributes:
      requested: the hosts that clients asked for, exactly as the clients sent them.
      server: the running server.
    """

    server: trisock.Server

    def __init__(self, login: tuple[bytes, bytes] | None = None, injected: bytes = b"") -> None:
        self.requested: list[str] = []
        self._login = login
        self._injected = injected  # sent to the client together with the answer

    @property
    def url(self) -> str:
        return f"socks5://127.0.0.1:{self.server.port}"

    async def handle(self, sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trisock.IncompleteReadError):
            if await self._authenticate(sock):
                await self._connect(sock)

    async def _authenticate(self, sock: Socket) -> bool:
        _, count = await sock.recv_exactly(2)
        methods = await sock.recv_exactly(count)
        if self._login is None:
            await sock.send(b"\x05\x00")
            return True
        assert 2 in methods
        await sock.send(b"\x05\x02")
        await sock.recv_exactly(1)
        name, password = [await sock.recv_frame(1), await sock.recv_frame(1)]
        good = (name, password) == self._login
        await sock.send(b"\x01" + (b"\x00" if good else b"\x01"))
        return good

    async def _connect(self, sock: Socket) -> None:
        _, _, _, kind = await sock.recv_exactly(4)
        if kind == 3:
            host = (await sock.recv_frame(1)).decode()
        else:
            host = str(ipaddress.ip_address(await sock.recv_exactly(4 if kind == 1 else 16)))
        (port,) = struct.unpack("!H", await sock.recv_exactly(2))
        self.requested.append(host)
        try:
            target = await trisock.connect("127.0.0.1", port)
        except OSError:
            await sock.send(b"\x05\x05\x00\x01" + bytes(6))  # connection refused
            return
        async with target, trio.open_nursery() as nursery:
            await sock.send(b"\x05\x00\x00\x01" + bytes(6) + self._injected)
            nursery.start_soon(copy, sock, target)
            await copy(target, sock)


async def copy(source: Socket, sink: Socket) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async for chunk in source:
            await sink.send(chunk)
        await sink.send_eof()


@asynccontextmanager
async def proxied(
    login: tuple[bytes, bytes] | None = None, injected: bytes = b""
) -> AsyncIterator[SOCKS5Proxy]:
    proxy = SOCKS5Proxy(login, injected)
    async with bound(proxy.handle, host="127.0.0.1") as proxy.server:
        yield proxy


@pytest.fixture
async def target(server_tls: ServerTLS) -> AsyncIterator[trisock.Server]:
    """An echo server that uses TLS."""
    async with bound(echo, host="127.0.0.1", tls=server_tls) as server:
        yield server


async def say_hello(proxy_url: str, target: trisock.Server, tls: ClientTLS) -> None:
    async with await connect_through_proxy(proxy_url, "example.org", target.port, tls=tls) as sock:
        assert sock.istls()
        await sock.send(b"hello")
        assert await sock.recv_exactly(5) == b"hello"


async def test_tls_runs_through_the_proxy_from_end_to_end(
    target: trisock.Server, client_tls: ClientTLS
) -> None:
    async with proxied() as proxy:
        await say_hello(proxy.url, target, client_tls)
        assert proxy.requested == ["example.org"]  # the proxy resolves the name


async def test_the_proxy_may_require_a_login(target: trisock.Server, client_tls: ClientTLS) -> None:
    async with proxied(login=(b"ann", b"p@ss")) as proxy:
        url = proxy.url.replace("//", "//ann:p%40ss@")
        await say_hello(url, target, client_tls)
        with pytest.raises(python_socks.ProxyError):
            await say_hello(url.replace("ann", "bob"), target, client_tls)
        assert len(proxy.requested) == 1


async def test_plain_text_reaches_both_ends_unchanged() -> None:
    sent = bytes(range(256)) * 2000
    async with bound(echo, host="127.0.0.1") as server, proxied() as proxy:
        async with await connect_through_proxy(proxy.url, "127.0.0.1", server.port) as sock:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await sock.send(sent)
                    await sock.send_eof()

                nursery.start_soon(send)
                assert await read_all(sock) == sent
        assert proxy.requested == ["127.0.0.1"]


async def test_starttls_follows_an_unencrypted_greeting(smtp: SharedServer) -> None:
    async with proxied() as proxy:
        async with await connect_through_proxy(proxy.url, "localhost", smtp.port) as sock:
            assert (await reply(sock)).startswith("220 ")
            assert await codes(sock, b"STARTTLS\r\n") == [220]
            await sock.starttls(trusting(smtp.ca))
            assert await codes(sock, b"NOOP\r\n") == [250]


async def test_the_handshake_fails_if_the_proxy_injects_bytes(
    target: trisock.Server, client_tls: ClientTLS
) -> None:
    async with proxied(injected=b"220 injected\r\n") as proxy:
        with pytest.raises(trisock.TLSError):
            await say_hello(proxy.url, target, client_tls)


async def test_a_server_with_another_name_is_refused(
    target: trisock.Server, client_tls: ClientTLS
) -> None:
    async with proxied() as proxy:
        with pytest.raises(trisock.TLSError, match=r"other\.example"):
            await connect_through_proxy(
                proxy.url,
                "example.org",
                target.port,
                tls=ClientTLS("other.example", ca=client_tls.ca),
            )


async def test_the_proxy_reports_a_refused_connection(free_port: int) -> None:
    async with proxied() as proxy:
        with pytest.raises(python_socks.ProxyError, match="refused"):
            await connect_through_proxy(proxy.url, "example.org", free_port)


async def test_an_absent_proxy_raises_os_error() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        url = f"socks5://127.0.0.1:{listener.port}"
    with pytest.raises(OSError, match="Could not connect to proxy"):
        await connect_through_proxy(url, "example.org", 443)


@pytest.mark.parametrize("leave", [Socket.close, Socket.abort])
async def test_a_proxy_that_hangs_up_is_an_error(leave: object) -> None:
    async def hang_up(sock: Socket) -> None:
        await sock.recv_exactly(2)
        if (ending := leave(sock)) is not None:  # type: ignore[operator]
            await ending

    async with bound(hang_up, host="127.0.0.1") as server:
        with pytest.raises((python_socks.ProxyError, OSError)):
            await connect_through_proxy(f"socks5://127.0.0.1:{server.port}", "example.org", 443)


async def test_a_cancelled_connect_closes_the_connection(client_tls: ClientTLS) -> None:
    ended = []

    async def be_silent(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await read_all(sock)
        ended.append(sock)

    async with bound(be_silent, host="127.0.0.1") as server, proxied() as proxy:
        # First the proxy is silent, then the server behind the proxy.
        for url in (f"socks5://127.0.0.1:{server.port}", proxy.url):
            connect = functools.partial(connect_through_proxy, tls=client_tls)
            await cancel_when_blocked(connect, url, "example.org", server.port)
        while len(ended) < 2:
            await trio.lowlevel.checkpoint()


async def test_a_connection_that_is_already_dead_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def unconnected(*_: object) -> trio.socket.SocketType:
        return made

    made = trio.socket.socket()
    monkeypatch.setattr(Proxy, "connect", unconnected)
    with pytest.raises(OSError, match="not connected"):
        await connect_through_proxy("socks5://127.0.0.1:1", "example.org", 443)
    assert made.fileno() == -1


async def test_the_program_fetches_a_page(https: SharedServer) -> None:
    async with proxied() as proxy:
        url = f"https://localhost:{https.port}/some/path?a=b#part"
        result = await run(*command("socks_client", "--proxy", proxy.url, "--ca", https.ca, url))
        assert (result.returncode, result.stderr) == (0, b"")
        assert result.stdout.endswith(b"\r\n\r\nHello! You asked for /some/path?a=b\n")
        assert proxy.requested == ["localhost"]


@pytest.mark.parametrize("why", ["no proxy", "another CA", "not https"])
async def test_the_program_reports_a_failure_in_one_line(
    https: SharedServer, other_ca: str, why: str
) -> None:
    async with proxied() as proxy:
        url = f"https://localhost:{https.port}/"
        arguments = ["--proxy", proxy.url, "--ca", https.ca, url]
        if why == "no proxy":
            arguments[1] = "socks5://127.0.0.1:1"
        elif why == "another CA":
            arguments[3] = other_ca
        else:
            arguments[4] = url.replace("https", "http")
        result = await run(*command("socks_client", *arguments))
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.count(b"\n") == 1  # no traceback


@pytest.mark.needs("microsocks")
async def test_microsocks_carries_tls(
    target: trisock.Server, client_tls: ClientTLS, free_port: int
) -> None:
    async with running("microsocks", "-i", "127.0.0.1", "-p", free_port, stderr=subprocess.DEVNULL):
        while True:
            try:
                await (await trisock.connect("127.0.0.1", free_port)).close()
                break
            except ConnectionRefusedError:
                await trio.sleep(0.01)
        async with await connect_through_proxy(
            f"socks5://127.0.0.1:{free_port}", "localhost", target.port, tls=client_tls
        ) as sock:
            await sock.send(b"hello")
            assert await sock.recv_exactly(5) == b"hello"
