"""The example sni_router: it finds the server name in a ClientHello, and routes by that name."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys
from contextlib import AsyncExitStack

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import trisock
from helpers.client_hellos import client_hello, handshake_of, hello_with, name_extension, split
from helpers.examples import name_or_value_error, running, sni_router
from helpers.pairs import closing, read_all
from helpers.programs import curl
from trisock.testing import Authority, socket_pair


def handshake_message(name: str | None) -> bytes:
    return handshake_of(client_hello(name))


@pytest.mark.parametrize("name", ["example.org", "EXAMPLE.org", "a.b-c.example", "x" * 63 + ".org"])
def test_server_name_is_the_name_in_a_real_client_hello(name: str) -> None:
    assert sni_router.server_name(handshake_message(name)) == name.lower()


def test_server_name_is_none_for_a_hello_without_a_name() -> None:
    assert sni_router.server_name(handshake_message(None)) is None
    assert sni_router.server_name(handshake_message("127.0.0.1")) is None
    assert sni_router.server_name(hello_with(None)) is None
    assert sni_router.server_name(hello_with(b"")) is None


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\2" + handshake_message("example.org")[1:],
        handshake_message("example.org") + b"\0",
        handshake_message("example.org")[:-1],
        hello_with(name_extension(b"one.example", b"two.example")),
        hello_with(name_extension(b"one.example") + name_extension(b"two.example")),
        hello_with(name_extension(b"")),
        hello_with(name_extension(b"b\xc3\xbccher.example")),
        hello_with(name_extension(b"one.example\0.two.example")),
        hello_with(b"\0\0\0\2\0\5"),
        hello_with(b"\0\0\0\3\0\0\0"),
    ],
)
def test_server_name_refuses_an_ambiguous_or_malformed_hello(message: bytes) -> None:
    with pytest.raises(ValueError, match="ClientHello") as caught:
        sni_router.server_name(message)
    assert caught.type is ValueError


REAL_HELLO = handshake_message("some.example.org")


@settings(database=None, deadline=None)
@given(st.binary(max_size=300))
def test_server_name_raises_only_value_error_on_garbage(garbage: bytes) -> None:
    name_or_value_error(garbage)
    name_or_value_error(b"\1" + len(garbage).to_bytes(3, "big") + garbage)
    name_or_value_error(hello_with(garbage))
    name_or_value_error(hello_with(name_extension(garbage)))


@settings(database=None, deadline=None)
@given(
    st.integers(0, len(REAL_HELLO)),
    st.integers(0, len(REAL_HELLO)),
    st.binary(max_size=8),
)
def test_server_name_raises_only_value_error_on_damaged_hellos(
    start: int, end: int, replacement: bytes
) -> None:
    name_or_value_error(REAL_HELLO[:start] + replacement + REAL_HELLO[end:])


@pytest.mark.needs("curl")
async def test_router_connects_curl_to_the_named_server(
    tmp_path: pathlib.Path, authority: Authority, other_authority: Authority
) -> None:
    cas = []
    async with AsyncExitStack() as stack:
        routes = []
        for name, issuer in (("one.example", authority), ("two.example", other_authority)):
            paths = [tmp_path / f"{name}.{kind}" for kind in ("cert", "key", "ca")]
            issued = issuer.certificate(name)
            for path, pem in zip(
                paths, (issued._chain, issued._private_key, issuer.ca), strict=True
            ):
                path.write_bytes(pem)
            cert, key, ca = map(str, paths)
            cas.append(ca)
            backend = await stack.enter_async_context(
                running("https_server", "--cert", cert, "--key", key)
            )
            routes += ["--route", f"{name}=127.0.0.1:{backend.port}"]
        router = await stack.enter_async_context(running("sni_router", *routes))

        async def get(name: str, ca: str) -> subprocess.CompletedProcess[bytes]:
            return await curl(
                "--resolve", f"{name}:{router.port}:127.0.0.1", "--cacert", ca,
                "--data", f"for {name}", f"https://{name}:{router.port}/",
            )  # fmt: skip

        assert (await get("one.example", cas[1])).returncode == 60
        assert (await get("two.example", cas[0])).returncode == 60
        one, two = await get("one.example", cas[0]), await get("TWO.example", cas[1])
        assert (one.returncode, one.stdout) == (0, b"for one.example")
        assert (two.returncode, two.stdout) == (0, b"for TWO.example")


def pieces_of_hello(cut: int) -> list[bytes]:
    """Split a ClientHello, which has records of 50 bytes, into pieces of ``cut`` bytes."""
    return split(client_hello("echo.example", largest_record=50), cut)


async def test_router_forwards_every_byte_and_eof_both_ways() -> None:
    async def talk(stream: trio.SocketStream, pieces: list[bytes]) -> None:
        rest = bytes(range(256)) * 10_000
        received = bytearray()

        async def send() -> None:
            for piece in pieces:
                await stream.send_all(piece)
            await stream.send_all(rest)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async for chunk in stream:  # until EOF from the echo server
                received += chunk
        assert received == b"".join(pieces) + rest

    async with (
        running("echo_server") as backend,
        running("sni_router", "--route", f"Echo.Example=127.0.0.1:{backend.port}") as router,
    ):
        for cut in (1, 7, 10_000):
            async with await trio.open_tcp_stream("127.0.0.1", router.port) as stream:
                await talk(stream, pieces_of_hello(cut))


async def test_router_resets_the_other_side_when_one_side_breaks() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as backend:
        async with running("sni_router", "--default", f"127.0.0.1:{backend.port}") as router:
            hello = client_hello("any.example")
            for broken in ("client", "backend"):
                client = await trisock.connect("127.0.0.1", router.port)
                await client.send(hello)
                inner = await backend.accept()
                async with client, inner:
                    assert await inner.recv_exactly(len(hello)) == hello
                    one, other = (client, inner) if broken == "client" else (inner, client)
                    one.abort()
                    with pytest.raises(trio.BrokenResourceError):
                        await other.recv()


async def test_router_forwards_an_answer_before_the_client_has_finished_sending() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as backend:
        async with running("sni_router", "--default", f"127.0.0.1:{backend.port}") as router:
            async with await trisock.connect("127.0.0.1", router.port) as client:
                await client.send(client_hello("any.example"))
                inner = await backend.accept()
                await inner.send(b"enough")
                await inner.send_eof()
                assert await read_all(client) == b"enough"
                await client.send(b"the rest")
                await client.send_eof()
                assert (await read_all(inner)).endswith(b"the rest")
                await inner.close()


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: one.example\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x28",
    b"\x16\x02\x00\x00\x05hello",
    b"\x16\x03\x01\x00\x00",
    b"\x16\x03\x01\xff\xff",
    b"\x16\x03\x01\x00\x04\x01\xff\xff\xff" + b"\x16\x03\x01\x10\x00" + b"x" * 4096 * 5,
    b"\x16\x03\x01\x00\x01\x01" * 20_000,
]
CUT_SHORT = [
    b"",
    b"\x16",
    b"\x16\x03\x01\x00\x05",
    b"\x16\x03\x01\x00\x05hello",
    client_hello("echo.example")[:-1],
]


@pytest.mark.parametrize("garbage", [*GARBAGE, *CUT_SHORT], ids=lambda garbage: repr(garbage[:9]))
async def test_peeking_at_garbage_raises_only_value_error(garbage: bytes) -> None:
    client, server = await socket_pair()
    async with closing(client, server):
        await client.send(garbage)
        if garbage in CUT_SHORT:
            await client.send_eof()  # without EOF, the router would wait for more bytes
        with pytest.raises(ValueError, match=r"client|ClientHello") as caught:
            await sni_router.peek_client_hello(server)
        assert caught.type is ValueError


async def test_peeking_at_a_client_hello_leaves_it_unread() -> None:
    client, server = await socket_pair()
    async with closing(client, server):
        hello = client_hello("echo.example", largest_record=9)
        await client.send(hello, b"and more")
        assert await sni_router.peek_client_hello(server) == handshake_of(hello)
        assert await server.recv_exactly(len(hello) + 8) == hello + b"and more"


async def test_router_drops_garbage_and_continues() -> None:
    async with (
        running("echo_server") as backend,
        running("sni_router", "--default", f"127.0.0.1:{backend.port}") as router,
    ):
        for garbage in [*GARBAGE, *CUT_SHORT]:
            async with await trisock.connect("127.0.0.1", router.port) as sock:
                await sock.send(garbage)
                await sock.send_eof()
                assert await read_all(sock) == b"", garbage[:20]
        async with await trisock.connect("127.0.0.1", router.port) as sock:
            hello = client_hello(None)
            await sock.send(hello)
            assert await sock.recv_exactly(len(hello)) == hello


async def test_router_sends_an_alert_for_an_unknown_name(ca: str) -> None:
    async with running("sni_router", "--route", "known.example=127.0.0.1:1") as router:
        sock = await trisock.connect("127.0.0.1", router.port)
        with pytest.raises(trisock.TLSError, match="unrecognized name"):
            await sock.starttls("unknown.example")


async def test_router_reports_an_unreachable_backend_and_continues() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as nobody:
        pass
    async with running("sni_router", "--default", f"127.0.0.1:{nobody.port}") as router:
        for _ in range(2):
            async with await trisock.connect("127.0.0.1", router.port) as sock:
                await sock.send(client_hello("any.example"))
                assert await read_all(sock) == b""
        number = errno.ECONNREFUSED
        complaint = f"cannot connect to 127.0.0.1:{nobody.port}: {os.strerror(number)}"
        router.complaints = f"{OSError(number, complaint)}\n" * 2


@pytest.mark.parametrize(
    "route",
    [
        "one.example",
        "one.example=",
        "one.example=:1",
        "one.example=host:https",
        "one.example=host:0",
    ],
)
def test_router_refuses_a_malformed_route(
    route: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sni_router.py", "--route", route, "--help"])
    with pytest.raises(SystemExit, match="2"):
        sni_router.main()
    assert "--route" in capsys.readouterr().err
