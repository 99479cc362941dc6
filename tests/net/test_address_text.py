"""Logs and errors show addresses and arguments on one printable line, and never show a key."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import trisock
from helpers.pairs import all_served, closing
from helpers.server import connect
from trisock import ClientTLS, Socket
from trisock._text import format_seconds

HOSTILE_NAMES = [
    "\0\n2025-01-01 INFO sshd Accepted password for root\x1b[2K",
    "\0\x85\u2028\u2029\u202e\x9b",
    b"\0\xff\xfe",
    "\x00127.0.0.1:80",
    "127.0.0.1",
    "127.0.0.1:80",
    "::1",
    "[::1]:80",
    "x y:1",
]
KEY = trustme.CA().issue_cert("example.org").private_key_pem.bytes().decode()
BODY = "".join(KEY.splitlines()[1:-1])


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_safe(text: str) -> None:
    assert text.isprintable()
    text.encode()
    assert ":0 " not in f"{text} "


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_a_unix_peers_name_cannot_forge_a_log_line(
    name: str | bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    to_file = logging.FileHandler(log, encoding="utf-8")
    reprs: list[str] = []

    async def handler(sock: Socket) -> None:
        reprs.append(repr(sock))
        assert sock.getpeer() == (os.fsdecode(name), 0)
        assert sock.info().peer.port == 0
        raise ValueError

    logger = logging.getLogger("trisock.server")
    logger.addHandler(to_file)
    try:
        async with trio.open_nursery() as nursery:
            listener = await trisock.listen_unix("server")
            server = await trisock.bind(nursery, listener, handler)
            with socket.socket(socket.AF_UNIX) as peer:
                peer.bind(name)
                peer.connect("server")
                await all_served(server, 1)
            server.stop()
    finally:
        logger.removeHandler(to_file)
        to_file.close()
    assert log.read_text().splitlines()[0].startswith("the handler of ")
    texts = [record.getMessage() for record in caplog.records] + reprs
    assert len(texts) == 2
    for text in texts:
        assert_safe(text)
        assert " unix:'" in text


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_a_unix_listeners_path_is_shown_on_one_safe_line(name: str | bytes) -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv()

    async with trio.open_nursery() as nursery:
        listener = await trisock.listen_unix(name)
        server = await trisock.bind(nursery, listener, handler)
        (task,) = (task.name for task in nursery.child_tasks)
        client = await trisock.connect_unix(name)
        texts = [repr(listener), repr(server), repr(client), str(client.getpeer()), task]
        async with closing(client):
            with pytest.raises(trisock.TLSError) as caught:
                await client.starttls(ClientTLS("example.org"))
            texts.append(str(caught.value))
        server.stop()
    for text in texts:
        assert_safe(text)
        assert "unix:'" in text
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)) as refused:
        await trisock.connect_unix(name)
    assert_safe(str(refused.value))


async def test_the_port_distinguishes_a_unix_path_from_a_host(tmp_path: Path) -> None:
    async with await trisock.listen_unix(tmp_path / "x") as listener:
        assert [address.port for address in listener.addresses] == [0]
        assert str(listener.addresses[0]) == str(tmp_path / "x")
    async with await trisock.listen(0) as listener:
        assert all(address.port for address in listener.addresses)


@pytest.mark.usefixtures("in_tmp_path")
async def test_a_unix_path_resembling_an_ip_address_has_no_sockaddr() -> None:
    from trisock.hammerspoon.sockaddr import pack_sockaddr

    listener = await trisock.listen_unix("127.0.0.1")
    async with listener:
        assert pack_sockaddr(listener.addresses[0]) == b""


@pytest.mark.parametrize(
    "host",
    ["::1%1\nINFO forged", "::1%1 forged", "fe80::1%\x1b[2K", "fe80::1%\u2028", "::1%a/b",
     "::1%" + "x" * 16, "fe80::1%\udcff"],
)  # fmt: skip
async def test_an_ipv6_address_with_an_invalid_zone_is_refused(host: str) -> None:
    for call in (lambda: trisock.connect(host, 9), lambda: trisock.listen(0, host=host)):
        with pytest.raises(ValueError, match="is not a host name") as caught:
            await call()
        assert_safe(str(caught.value))
    with pytest.raises(ValueError, match="is not a host name"):
        ClientTLS(host)


# ---- host names that no certificate can match ----


@pytest.mark.parametrize(
    ("host", "hint"),
    [
        ("localhost:443", "without a port"),
        ("localhost:https", "without a port"),
        ("127.0.0.1:443", "without a port"),
        ("[::1]:443", "without a port"),
        ("localhost:", "without a port"),
        ("[::1]", "without brackets"),
        ("[fe80::1%lo]", "without brackets"),
        ("https://x/", "URL"),
        ("x/y", "URL"),
        ("user@host", "user name"),
        ("*.example.org", "wildcard"),
        ("b\xfccher.example:443", "without a port"),
        ("localhost\uff1a443", ""),
        ("a,b", ""),
    ],
)  # fmt: skip
async def test_a_host_that_is_not_a_bare_name_is_refused(host: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"is not a host name.*{hint}"):
        ClientTLS(host)
    with pytest.raises(ValueError, match=f"is not a host name.*{hint}"):
        await trisock.connect(host, 443)
    with pytest.raises(ValueError, match=f"is not a host name.*{hint}"):
        await trisock.listen(0, host=host)


@pytest.mark.parametrize("host", ["127.1", "256.1.1.1", "1.2.3.4.5", "127.0.0.01"])
def test_a_malformed_ip_address_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="is not a host name"):
        ClientTLS(host)


# ---- keys passed as the wrong argument ----

CALLS: list[Callable[[Any], Any]] = [
    lambda key: trisock.connect(key, 1),
    lambda key: trisock.connect("localhost", key),
    lambda key: trisock.connect("127.0.0.1", 1, local_address=key),
    lambda key: trisock.connect(key, "1"),  # type: ignore[arg-type]
    lambda key: trisock.listen(0, host=key),
    lambda key: trisock.listen(key),
    lambda key: trisock.listen(0, backlog=key),
    lambda key: trisock.listen_unix(key),
    lambda key: trisock.connect_unix(key),
    lambda key: trisock.listen_unix("x", backlog=key),
]
# These calls receive a key only if the caller mixes up the order of the arguments.
MISPLACED: list[Callable[[trio.Nursery, Any], Any]] = [
    lambda nursery, key: trisock.bind(nursery, 0, key),
    lambda nursery, key: trisock.bind(nursery, key, print),  # type: ignore[arg-type]
    lambda nursery, key: trisock.bind(nursery, 0, print, max_connections=key),  # type: ignore[arg-type]
    lambda nursery, key: trisock.bind(nursery, 0, print, handshake_timeout=key),  # type: ignore[arg-type]
    lambda nursery, key: trisock.bind(nursery, 0, print, backlog=key),  # type: ignore[arg-type]
    lambda nursery, key: trisock.bind(nursery, 0, print, host=key),  # type: ignore[arg-type]
]
ON_A_SERVER: list[Callable[[trisock.Server, Any], Any]] = [
    lambda server, key: server.broadcast(key),
    lambda server, key: server.broadcast(b"", timeout=key),
    lambda server, key: server.stop(key),
    lambda server, key: server.set_tls(key),
]
ON_A_SOCKET: list[Callable[[Socket, Any], Any]] = [
    lambda sock, key: sock.starttls(key, server_hostname=1),  # type: ignore[arg-type]
    lambda sock, key: sock.starttls("a", server_hostname=key, handshake_timeout=0),
    lambda sock, key: sock.starttls("a", handshake_timeout=key),
    lambda sock, key: sock.starttls("a", https_compatible=key),
    lambda sock, key: sock.recv(key),
    lambda sock, key: sock.recv_exactly(key),
    lambda sock, key: sock.recv_until(b"x", max_bytes=key),
    lambda sock, key: sock.send_file(key),
    lambda sock, key: sock.send_file(io.BytesIO(), key),
    lambda sock, key: sock.send_file(io.BytesIO(), count=key),
    lambda sock, key: sock.send_file(io.BytesIO(), progress=key),
    lambda sock, key: sock.setsockopt(key, 1, 1),
    lambda _, key: Socket(key),
    lambda sock, key: Socket(sock.stream, side=key),
    lambda _, key: trisock.Listener([key]),
    lambda _, key: trisock.Listener(key),
    lambda _, key: BINDING.channel_binding(key),
]
BINDING = trisock.TLSInfo("TLSv1.3", "", None, None, None, False)
KEYS: list[Any] = [KEY, KEY.encode(), BODY, BODY[:64], BODY.encode(), "00ff" * 10, [KEY], {KEY: 1}]


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
async def test_no_error_quotes_a_key(call: Callable[[Any], Any], key: Any) -> None:
    with pytest.raises((TypeError, ValueError, OSError)) as caught:
        (await call(key)).abort()  # the call may succeed: a short key can be a valid path
        raise FileNotFoundError
    if isinstance(caught.value, FileNotFoundError | PermissionError):
        return  # the short key was a valid path, and this error may show a path
    error: BaseException | None = caught.value
    while error is not None:
        for secret in (KEY, BODY, BODY[:30], "00ff00ff00ff"):
            assert secret not in str(error)
        error = error.__cause__
    assert_safe(str(caught.value).replace(":0 ", " "))


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
async def test_no_error_quotes_a_key_passed_as_the_wrong_argument(key: Any) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, sleep, host="127.0.0.1")
        async with closing(sock := await connect(server)):
            calls: list[Callable[[], Any]] = [
                *(functools.partial(call, nursery, key) for call in MISPLACED),
                *(functools.partial(call, server, key) for call in ON_A_SERVER),
                *(functools.partial(call, sock, key) for call in ON_A_SOCKET),
            ]
            for call in calls:
                error: BaseException | None = None
                try:
                    result = call()
                    if inspect.isawaitable(result):
                        await result
                except Exception as exc:
                    error = exc
                while error is not None:
                    for secret in (KEY, BODY, BODY[:30], "00ff00ff00ff"):
                        assert secret not in repr(error), call
                    error = error.__cause__
        nursery.cancel_scope.cancel()


async def sleep(_: Socket) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize(
    "port", [2**64, 10**5000, -(10**5000)], ids=["2**64", "10**5000", "-10**5000"]
)
async def test_a_port_with_many_digits_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=r"0-65535, not an int of \d+ bits"):
        await trisock.connect("localhost", port)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 seconds"),
        (0.5, "0.5 seconds"),
        (1, "1 second"),
        (1.0, "1 second"),
        (60, "60 seconds"),
        (58.743127, "58.7 seconds"),
        (0.999569, "1 second"),
        (0.00512, "0.00512 seconds"),
        (2.25, "2.25 seconds"),
        (3600, "3600 seconds"),
        (14 * 86400, "1209600 seconds"),
    ],
)
def test_a_duration_has_no_useless_digits(number: float, text: str) -> None:
    assert format_seconds(number) == text


def test_an_error_quotes_a_short_invalid_name() -> None:
    with pytest.raises(ValueError, match=r"'a\.\.b' is not a host name"):
        ClientTLS("a..b")
