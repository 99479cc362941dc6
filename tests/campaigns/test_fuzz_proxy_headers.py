"""Fuzzing of PROXY headers: we refuse what the PyPI package refuses, at every split."""

from __future__ import annotations

import contextlib
import secrets
from random import Random

import pytest
import trio

import trisock
from helpers.proxy_headers import package_errs, refused_by_package
from helpers.proxy_mutants import mutants, valid_header
from helpers.server import bound
from trisock import Socket
from trisock._net.proxy_parser import parse_proxy_header


@pytest.fixture
def random(times: int) -> Random:
    """Draw the same examples in each normal run, and different ones with ``--times``."""
    seed = 1 if times == 1 else secrets.randbits(64)
    print("seed", seed)
    return Random(seed)


def size_of(data: bytes) -> int | None:
    """Return the size of the header at the start, or ``None`` if there is no valid header.

    Check that the result does not depend on how the bytes arrive.
    """
    size = None
    refused = False
    for end in range(len(data) + 1):
        try:
            parsed = parse_proxy_header(data[:end])
        except ValueError:
            assert size is None
            refused = True
        else:
            assert not refused
            assert parsed is not None or size is None
            if parsed is not None:
                assert parsed[1] == (size or end) <= 4096
                size = parsed[1]
    return size


def test_every_valid_header_is_accepted_at_every_split(random: Random, times: int) -> None:
    for _ in range(500 * times):
        data = valid_header(random)
        assert size_of(data + b"x") == len(data)
        assert refused_by_package(data) is False or package_errs(data)


def test_the_package_accepts_every_header_that_we_accept(random: Random, times: int) -> None:
    malformed = 0
    for data in mutants(random, 1500 * times):
        if size_of(data) is None:
            malformed += 1
        else:
            assert refused_by_package(data) is False or package_errs(data), data
    assert malformed >= 1000 * times


def test_a_parsed_header_can_be_sent_again(random: Random, times: int) -> None:
    for _ in range(500 * times):
        parsed = parse_proxy_header(valid_header(random))
        assert parsed is not None
        sent = parsed[0].to_bytes()
        assert parse_proxy_header(sent) == (parsed[0], len(sent))
        assert refused_by_package(sent) is False or package_errs(sent)


async def test_no_malformed_header_reaches_a_handler(random: Random, times: int) -> None:
    served: list[tuple[trisock.ProxyHeader | None, bytes]] = []

    async def handler(sock: Socket) -> None:
        served.append((sock.proxy_header, b"".join([chunk async for chunk in sock])))

    async def send(data: bytes) -> None:
        cut = random.randrange(len(data) + 1)
        with contextlib.suppress(trio.BrokenResourceError, ConnectionError):
            async with await trisock.connect("127.0.0.1", server.port) as sock:
                for part in filter(None, (data[:cut], data[cut:])):
                    await sock.send(part)
                await sock.send_eof()
                await sock.recv()

    headers = mutants(random, 200 * times)
    async with bound(handler, host="127.0.0.1", trusted_proxies=["127.0.0.1"]) as server:
        for start in range(0, len(headers), 50):
            async with trio.open_nursery() as nursery:
                for data in headers[start : start + 50]:
                    nursery.start_soon(send, data)
    expected = []
    for data in headers:
        with contextlib.suppress(ValueError):
            if (parsed := parse_proxy_header(data)) is not None:
                expected.append((parsed[0], data[parsed[1] :]))
    assert sorted(served, key=repr) == sorted(expected, key=repr)
    stats = server.stats()
    assert stats.bad_proxy_headers == len(headers) - len(served)
    assert stats.accepted == len(headers)
