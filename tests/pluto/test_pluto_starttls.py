"""Pluto's starttls: what it verifies, and which arguments it accepts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from helpers.authority import rsa_certificate
from helpers.pairs import clog, unix_pair
from helpers.pluto import (
    both_sides,
    got,
    pair,
    pluto_certificate,
    raw_peer,
    starttls_on_both,
    tls_pair,
)
from trisock import ClientTLS, ServerTLS
from trisock.pluto import async_socket
from trisock.pluto.tcp import TCPTransport
from trisock.testing import Authority

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


@both_sides
async def test_starttls_returns_true_on_success_for_client_and_server(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    assert client.istls() is server.istls() is False
    assert await starttls_on_both(client, server, "localhost", certs) == (True, True)
    assert client.istls() is server.istls() is True
    await got(client.send("secret"))
    assert await got(server.recv()) == b"secret"


@both_sides
@pytest.mark.parametrize("name", ["elsewhere.example", "127.0.0.2"])
async def test_a_hostname_mismatch_closes_the_socket_and_starttls_returns_false(
    name: str,
    certs: list[dict[str, str | bytes]],
    trusted: None,
    reasons: Callable[[], list[str]],
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, name, certs) == (False, False)
    assert any("handshake" in each for each in reasons())
    for sock in (client, server):
        assert not sock.isopen()
        assert not sock.istls()
        assert await got(sock.send("x")) is False
        assert await got(sock.starttls(certs)) is False


@both_sides
async def test_starttls_returns_false_for_an_untrusted_certificate(
    certs: list[dict[str, str | bytes]],
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, "localhost", certs) == (False, False)


@both_sides
async def test_starttls_returns_none_if_tls_is_already_in_use(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await tls_pair(certs)
    assert await got(client.starttls("localhost")) is None
    assert await got(server.starttls(certs)) is None
    await got(client.send("still works"))
    assert await got(server.recv()) == b"still works"


@both_sides
async def test_starttls_accepts_several_certificates(authority: Authority, trusted: None) -> None:
    names = ("one.example", "two.example")
    several = [pluto_certificate(authority.certificate(name)) for name in names]
    for name in names:
        client, server = await pair()
        assert await starttls_on_both(client, server, name, several) == (True, True)


@both_sides
async def test_starttls_accepts_every_key_type(authority: Authority, trusted: None) -> None:
    for certificate in (authority.certificate(), rsa_certificate(authority, "localhost")):
        given = [pluto_certificate(certificate)]
        client, server = await pair()
        assert await starttls_on_both(client, server, "localhost", given) == (True, True)


@both_sides
async def test_starttls_accepts_client_tls_and_server_tls(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, client_tls, server_tls) == (True, True)


@both_sides
@pytest.mark.parametrize(
    "mistake",
    [[{"chain": "x", "private_key": "y"}], [{"chain": "x"}], [], 1, "no such\\name"],
)
async def test_starttls_raises_for_an_invalid_argument_and_changes_nothing(mistake: Any) -> None:
    client, raw = await raw_peer()
    with raw:
        with pytest.raises((TypeError, ValueError)):
            await got(client.starttls(mistake))
        assert client.isopen()
        assert await got(client.send("untouched")) is True
        assert raw.recv(100) == b"untouched"


async def test_starttls_after_a_partial_send_closes_the_socket(
    certs: list[dict[str, str | bytes]],
) -> None:
    one, other = unix_pair()
    s = async_socket(TCPTransport(one), trio.lowlevel.current_trio_token())
    await clog(one)
    one.unrecv(b"still to be read")
    os.read(other.fileno(), 200_000)  # make room for part of the next send
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.send, bytes(10_000_000))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert s.isopen()
    assert await s.starttls(certs) is False
    assert not s.isopen()
    other.abort()
