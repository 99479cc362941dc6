"""Fuzzing of addresses: hosts, ports, paths, and the bytes that parseAddress decodes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import strategies as st

import trisock
from helpers.fuzzing import SOME_CHANGES, Fuzz, changed
from helpers.pairs import closing
from helpers.sockaddrs import BSD4, BSD6, LINUX4, LINUX6
from trisock import hammerspoon

# ---- parseAddress ----


def test_parse_address_returns_the_host_and_port_in_the_bytes(fuzz: Fuzz) -> None:
    def parse(data: bytes) -> None:
        parsed = hammerspoon.Sockets.parseAddress(data)
        if parsed is None:
            return
        assert len(data) in (16, 28)
        family = socket.AF_INET if len(data) == 16 else socket.AF_INET6
        at = 4 if family == socket.AF_INET else 8
        packed = socket.inet_pton(family, parsed["host"].partition("%")[0])
        assert packed == data[at : at + len(packed)]
        assert parsed["port"] == int.from_bytes(data[2:4], "big")

    real = st.sampled_from([LINUX4, LINUX6, BSD4, BSD6])
    fuzz(
        parse,
        200,
        data=st.binary(max_size=40)
        | st.integers(0, 40).map(lambda size: bytes([size]) * size)
        | real
        | st.builds(changed, real, SOME_CHANGES),
    )


# ---- hosts, ports and paths ----

REAL_HOSTS = ["localhost", "127.0.0.1", "::1", "example.org", "b\xfccher.example"]
SOME_HOSTS = st.sampled_from(REAL_HOSTS) | st.text(max_size=300) | st.sampled_from(
    ["", ".", "..", "127.1", "fe80::1%lo", "::1%", "[::1]", "*", "a..b", "\0", "a b",
     "xn--", "xn--a", "\u2024", "\ud800", "a" * 64, "localhost:443", "https://x/", "user@host"]
) | st.text(max_size=20).map(lambda zone: f"fe80::1%{zone}")  # fmt: skip
SOME_PORTS = st.sampled_from([-1, 0, 1, 65535, 65536, True]) | st.integers()


def is_one_line(text: str) -> bool:
    """Return whether a text has no control characters, newlines or lone surrogates."""
    return text.isprintable()


def test_any_host_and_port_works_or_fails_as_documented(
    fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name server is queried: every host resolves to this machine or to nothing."""

    async def getaddrinfo(host: bytes | None, port: int, *_: object, **__: object) -> object:
        assert host is None or isinstance(host, bytes)
        assert host is None or host.isascii()
        await trio.lowlevel.checkpoint()
        if host is not None and len(host) % 3 == 0:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("trio._highlevel_open_tcp_stream.getaddrinfo", getaddrinfo)

    async def open_it(clock: trio.testing.MockClock, host: Any, port: Any, how: str) -> None:
        error: Exception | None = None
        try:
            if how == "connect":
                (await trisock.connect(host, port)).abort()
            elif how == "listen":
                (await trisock.listen(port, host=host)).abort()
            else:
                trisock.listen_nowait(port, host=host).abort()
        except (OSError, TypeError, ValueError) as exc:
            error = exc
        assert error is None or (str(error) and not isinstance(error, UnicodeError))
        assert is_one_line(str(error))
        if isinstance(host, str) and len(host) > 40 and not host.replace(".", "").isalpha():
            assert host not in str(error)  # a long host may be a secret, passed by mistake

    fuzz.run_async(
        open_it,
        250,
        host=SOME_HOSTS | st.sampled_from([None, b"localhost", 1]),
        port=SOME_PORTS | st.sampled_from([None, "80", 80.0]),
        how=st.sampled_from(["connect", "listen", "listen_nowait"]),
    )


def test_any_path_works_or_fails_as_documented(
    fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def open_it(clock: trio.testing.MockClock, path: Any, how: str) -> None:
        error: Exception | None = None
        try:
            if how == "connect_unix":
                (await trisock.connect_unix(path)).abort()
            elif how == "listen_unix":
                async with await trisock.listen_unix(path) as listener:
                    texts = [repr(listener), str(listener.addresses[0])]
                    client = await trisock.connect_unix(path)
                    async with closing(client):
                        texts += [repr(client), str(client.getpeer())]
                    assert all("unix:'" in text or 'unix:"' in text for text in texts)
                    assert all(is_one_line(text) for text in texts)
            else:
                trisock.listen_unix_nowait(path).abort()
        except (OSError, TypeError, ValueError) as exc:
            error = exc
        assert error is None or str(error)
        assert is_one_line(str(error))
        assert not list(tmp_path.iterdir())

    names = st.text(max_size=120).map(lambda text: text.replace("/", "\\"))
    fuzz.run_async(
        open_it,
        100,
        path=names
        | st.binary(max_size=120).map(lambda data: data.replace(b"/", b"\\"))
        | st.sampled_from(
            ["\0", b"\0a\0b", "\ud800", "a\0b", ".", "..", "no/such/directory", None, 1]
        ),
        how=st.sampled_from(["connect_unix", "listen_unix", "listen_unix_nowait"]),
    )
