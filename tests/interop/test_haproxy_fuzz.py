"""HAProxy and trisock read thousands of PROXY headers, most of them malformed."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from random import Random

import pytest
import trio

import trisock
from helpers.haproxy import haproxy
from helpers.proxy_headers import (
    VALID,
    haproxy_errs,
    haproxy_is_lax,
    package_errs,
    refused_by_package,
)
from helpers.proxy_mutants import mutants, valid_header
from helpers.server import bound
from trisock import ProxyHeader, Socket
from trisock._net.proxy_parser import parse_proxy_header

pytestmark = pytest.mark.needs("haproxy")

# How many headers HAProxy gets at a time. HAProxy requires each header in one segment.
BATCH = 50

REST = b"the rest"


def accepted(header: ProxyHeader | None, rest: bytes) -> bytes:
    """Return the answer of the server behind HAProxy, if HAProxy has accepted a header."""
    ends = None if header is None or header.source is None else (header.source, header.destination)
    return repr(ends).encode() + b"\n" + rest


async def behind_haproxy(sock: Socket) -> None:
    await sock.send(accepted(sock.proxy_header, b""))
    async for chunk in sock:
        await sock.send(chunk)


async def ask_haproxy(port: int, headers: list[bytes]) -> list[bytes]:
    """Return the answer to each header, or ``b""`` if HAProxy has refused the header."""
    answers = [b""] * len(headers)

    async def ask(index: int) -> None:
        with contextlib.suppress(trio.BrokenResourceError, ConnectionError):
            async with await trisock.connect("127.0.0.1", port) as sock:
                await sock.send(headers[index] + REST)
                await sock.send_eof()
                answers[index] = b"".join([chunk async for chunk in sock])

    for start in range(0, len(headers), BATCH):
        async with trio.open_nursery() as nursery:
            for index in range(start, min(start + BATCH, len(headers))):
                nursery.start_soon(ask, index)
    return answers


@pytest.mark.parametrize("count", [700, pytest.param(14_000, marks=pytest.mark.interop)])
async def test_headers_that_haproxy_refuses_reach_no_handler(
    count: int, times: int, tmp_path: Path
) -> None:
    seed = 1 if times == 1 else secrets.randbits(64)
    print("seed", seed)
    random = Random(seed)
    headers = VALID + [valid_header(random) for _ in range(count // 10)] + mutants(random, count)
    handled: list[bytes] = []

    async def handler(sock: Socket) -> None:
        handled.append(accepted(sock.proxy_header, b"".join([chunk async for chunk in sock])))

    async def send(data: bytes) -> None:
        cut = random.randrange(len(data) + 1)
        with contextlib.suppress(trio.BrokenResourceError, ConnectionError):
            async with await trisock.connect("127.0.0.1", ours.port) as sock:
                await sock.send(data[:cut])
                await sock.send(data[cut:])
                await sock.send(REST)
                await sock.send_eof()
                await sock.recv()

    trusted = {"host": "127.0.0.1", "trusted_proxies": ["127.0.0.1"]}
    async with bound(behind_haproxy, **trusted) as backend, bound(handler, **trusted) as ours:
        options = {"bind": "accept-proxy", "server": "send-proxy-v2"}
        async with haproxy("127.0.0.1", backend.port, tmp_path, **options) as port:
            answers = await ask_haproxy(port, headers)
        for start in range(0, len(headers), BATCH):
            async with trio.open_nursery() as nursery:
                for data in headers[start : start + BATCH]:
                    nursery.start_soon(send, data)

    expected = []
    refused_by_both = 0
    for data, answer in zip(headers, answers, strict=True):
        parsed = None
        with contextlib.suppress(ValueError):
            parsed = parse_proxy_header(data + REST)
        if parsed is None:
            # HAProxy may accept the malformed headers that haproxy_is_lax describes.
            assert answer == b"" or haproxy_is_lax(data), data
            is_refused = answer == b"" or refused_by_package(data + REST) is True
            refused_by_both += is_refused
            continue
        header, size = parsed
        expected.append(accepted(header, (data + REST)[size:]))
        assert refused_by_package(data + REST) is False or package_errs(data + REST), data
        if answer == b"":
            # If nothing follows the header, HAProxy may see the client's FIN before it has
            # connected to the backend. Then it sends no answer.
            assert haproxy_errs(data) or size == len(data + REST), data
        elif header.source is None:  # HAProxy sends its own address instead
            assert answer.partition(b"\n")[2] == (data + REST)[size:]
        else:
            assert answer == expected[-1], data
    assert refused_by_both >= count // 1.4
    assert sorted(handled) == sorted(expected)
    assert ours.stats().bad_proxy_headers == len(headers) - len(handled)
    print(f"{refused_by_both} malformed headers refused by HAProxy or the package, and by us")
