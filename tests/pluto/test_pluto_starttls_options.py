"""The options of Pluto's starttls: alpn, early_data and require_ecdhe."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import rsa_certificate
from helpers.pluto import (
    Thread,
    both_sides,
    got,
    pair,
    raw_peer,
    recv_all,
    reset,
    run_both,
)
from trisock import ServerTLS
from trisock.testing import Authority

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls

Certs = list[dict[str, str | bytes]]


async def upgrade(client: tuple[Any, ...], server: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """Upgrade both ends of a connection. Return the ends and their results."""
    a, b = await pair()
    results = await run_both(lambda: got(a.starttls(*client)), lambda: got(b.starttls(*server)))
    return a, b, *results


# ---- alpn ----


@both_sides
async def test_starttls_with_alpn_returns_the_chosen_protocol(certs: Certs, trusted: None) -> None:
    options = {"alpn": ["h2", "http/1.1"]}
    client, server, *results = await upgrade(("localhost", options), (certs, options))
    assert results == [(True, "h2")] * 2
    await got(client.send("secret"))
    assert await got(server.recv()) == b"secret"


@both_sides
async def test_starttls_with_alpn_prefers_the_servers_order(certs: Certs, trusted: None) -> None:
    _, _, *results = await upgrade(
        ("localhost", {"alpn": ("h2", "http/1.1")}), (certs, {"alpn": ["http/1.1", "h2"]})
    )
    assert results == [(True, "http/1.1")] * 2


@both_sides
@pytest.mark.parametrize("server_alpn", [None, ["other"]])
async def test_starttls_with_alpn_returns_no_protocol_if_none_is_common(
    server_alpn: list[str] | None, certs: Certs, trusted: None
) -> None:
    given = (certs,) if server_alpn is None else (certs, {"alpn": server_alpn})
    _, _, client, server = await upgrade(("localhost", {"alpn": ["h2"]}), given)
    assert client == (True, None)
    assert server == (True if server_alpn is None else (True, None))


@both_sides
async def test_starttls_with_alpn_returns_false_on_failure(certs: Certs) -> None:
    """The result is not a tuple, because any tuple with items is true."""
    options = {"alpn": ["h2"]}
    client, _, *results = await upgrade(("localhost", options), (certs, options))
    assert results == [False, False]
    assert not client.isopen()
    assert await got(client.starttls("localhost", options)) is False


@both_sides
async def test_starttls_with_options_returns_none_if_tls_is_in_use(
    certs: Certs, trusted: None
) -> None:
    client, server, *_ = await upgrade(("localhost",), (certs,))
    assert await got(client.starttls("localhost", {"alpn": ["h2"], "early_data": "x"})) is None
    await got(client.send("still works"))
    assert await got(server.recv()) == b"still works"


@both_sides
async def test_starttls_adds_options_to_client_tls_and_certificates(authority: Authority) -> None:
    given = authority.client_tls("localhost")
    options = {"alpn": ["h2"], "require_ecdhe": True}
    _, _, *results = await upgrade((given, options), (authority.certificate(), {"alpn": ["h2"]}))
    assert results == [(True, "h2")] * 2
    assert given.alpn_protocols == ()


@both_sides
@pytest.mark.parametrize("kind", ["ServerTLS", "SSLContext"])
async def test_starttls_adds_no_alpn_to_roles_that_it_cannot_copy(
    kind: str, server_tls: ServerTLS
) -> None:
    client, _ = await pair()
    role = server_tls if kind == "ServerTLS" else ssl.create_default_context()
    with pytest.raises(TypeError, match=f"with a {kind}, set its ALPN protocols"):
        await got(client.starttls(role, {"alpn": ["h2"]}))
    assert client.isopen()


# ---- early_data ----


@both_sides
@pytest.mark.parametrize("data", ["gr\u00fc\u00df dich", "gr\u00fc\u00df dich".encode()])
async def test_starttls_sends_early_data_directly_after_the_handshake(
    data: str | bytes, certs: Certs, trusted: None
) -> None:
    client, server, *results = await upgrade(("localhost", {"early_data": data}), (certs,))
    assert results == [True, True]
    await got(client.send("later"))
    assert await got(server.recv()) == "gr\u00fc\u00df dich".encode()
    assert await got(server.recv()) == b"later"


@both_sides
async def test_starttls_never_sends_early_data_to_an_untrusted_server(certs: Certs) -> None:
    client, raw = await raw_peer()
    with raw:
        received = Thread(lambda: recv_all(raw) if raw.send(b"not TLS") else b"")
        assert await got(client.starttls("localhost", {"early_data": "a secret"})) is False
        assert b"a secret" not in received.result()
    _, _, *results = await upgrade(("localhost", {"early_data": "a secret"}), (certs,))
    assert results == [False, False]


@both_sides
async def test_starttls_returns_false_if_early_data_cannot_be_sent(
    certs: Certs, trusted: None, monkeypatch: pytest.MonkeyPatch, reasons: Callable[[], list[str]]
) -> None:
    async def fail(self: trisock.Socket, data: bytes) -> None:
        raise trio.BrokenResourceError("the peer is gone")

    monkeypatch.setattr(trisock.Socket, "send", fail)
    client, _, *results = await upgrade(("localhost", {"early_data": "hello"}), (certs,))
    assert results == [False, True]
    assert not client.isopen()
    assert "the peer is gone" in reasons()


@pytest.mark.parametrize("when", ["before a byte is sent", "in the middle"])
async def test_a_cancelled_send_of_early_data_closes_the_socket(
    when: str, certs: Certs, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "before a byte is sent":

        async def wait(self: trisock.Socket, data: bytes) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(trisock.Socket, "send", wait)
    client, server = await pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.starttls, certs)
        with trio.CancelScope() as scope:

            async def cancel_after_the_handshake() -> None:
                while not client.istls():
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

            nursery.start_soon(cancel_after_the_handshake)
            await client.starttls("localhost", {"early_data": bytes(50_000_000)})
    assert scope.cancelled_caught
    assert not client.isopen()
    assert await client.recv() is None


# ---- require_ecdhe ----


def offered_suites(hello: bytes) -> list[int]:
    """Return the cipher suites in a ClientHello."""
    at = 5 + 4 + 2 + 32  # Skip the headers of record and message, version, and random.
    at += 1 + hello[at]  # Skip the session ID.
    size = int.from_bytes(hello[at : at + 2], "big")
    suites = hello[at + 2 : at + 2 + size]
    return [int.from_bytes(suites[i : i + 2], "big") for i in range(0, size, 2)]


# ECDHE-ECDSA and ECDHE-RSA with AES-GCM (RFC 5289) and with ChaCha20-Poly1305 (RFC 7905).
ECDHE = {0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8, 0xCCA9}
TLS_1_3 = {0x1301, 0x1302, 0x1303}
EMPTY_RENEGOTIATION_INFO = 0x00FF  # not a suite (RFC 5746)


@both_sides
@pytest.mark.parametrize("required", [True, False, None])
async def test_require_ecdhe_offers_only_suites_that_our_servers_accept(
    required: bool | None,
) -> None:
    client, raw = await raw_peer()

    def receive() -> bytes:
        hello = raw.recv(65536)
        reset(raw)
        return hello

    hello = Thread(receive)
    assert await got(client.starttls("localhost", {"require_ecdhe": required})) is False
    offered = set(offered_suites(hello.result())) - {EMPTY_RENEGOTIATION_INFO}
    if required:
        assert offered == ECDHE | TLS_1_3
    else:
        assert offered > ECDHE | TLS_1_3


@both_sides
@pytest.mark.parametrize("suite", ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA256"])
async def test_require_ecdhe_refuses_suites_that_our_servers_refuse(
    suite: str, authority: Authority, trusted: None
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    rsa_certificate(authority, "localhost").load_into(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suite)
    is_accepted = "GCM" in suite
    _, _, *results = await upgrade(("localhost", {"require_ecdhe": True}), (context,))
    assert results == [is_accepted, is_accepted]
    _, _, *results = await upgrade(("localhost", {"require_ecdhe": False}), (context,))
    assert results == [True, True]


# ---- mistakes ----


@both_sides
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("h2", TypeError, "options must be a dict, not a str"),
        ([("alpn", ["h2"])], TypeError, "options must be a dict, not a list"),
        ({"Alpn": ["h2"]}, ValueError, "only the options alpn, early_data, require_ecdhe"),
        ({1: True}, ValueError, "only the options"),
        ({"alpn": "h2"}, TypeError, "must be a sequence of str"),
        ({"alpn": [b"h2"]}, TypeError, "must be a str"),
        ({"alpn": [""]}, ValueError, "invalid protocol"),
        ({"early_data": 5}, TypeError, "early_data must be a str or bytes, not 5"),
        ({"require_ecdhe": 1}, TypeError, "require_ecdhe must be True or False, not 1"),
    ],
)
async def test_starttls_raises_for_invalid_options_and_changes_nothing(
    options: Any, error: type[Exception], message: str
) -> None:
    client, raw = await raw_peer()
    with raw:
        with pytest.raises(error, match=message):
            await got(client.starttls("localhost", options))
        assert client.isopen()
        assert await got(client.send("untouched")) is True
        assert raw.recv(100) == b"untouched"


@both_sides
@pytest.mark.parametrize("options", [{"early_data": "x"}, {"require_ecdhe": True}])
async def test_starttls_raises_for_a_clients_option_on_a_server(
    options: dict[str, Any], certs: Certs
) -> None:
    _, server = await pair()
    with pytest.raises(ValueError, match="options of a client"):
        await got(server.starttls(certs, options))
    assert server.isopen()


@both_sides
async def test_starttls_ignores_options_that_are_none(certs: Certs, trusted: None) -> None:
    unset = {"alpn": None, "early_data": None, "require_ecdhe": None}
    _, _, *results = await upgrade(("localhost", unset), (certs, unset))
    assert results == [True, True]
