"""The result of every combination of TLS settings on two sides.

The tests try all combinations of versions, kinds of keys, client certificates, names and ALPN. Both
sides use trisock. ``MORE_NAMES`` and ``MORE_CLIENT_CERTIFICATES`` are combined only with versions
and kinds of keys. ``test_tls_peers.py`` tests trisock against other programs.
"""

from __future__ import annotations

import itertools
import ssl
import time

import pytest
import trio

from helpers.cancellation import grid
from helpers.certificates import (
    CLIENTS_ONLY,
    EXPIRED,
    KINDS,
    NOT_YET_VALID,
    VALID,
    der,
)
from helpers.pairs import closing
from helpers.raw_tls import Outcome, visit
from helpers.tls_axes import (
    ALPNS,
    CLIENT_CERTIFICATES,
    MORE_CLIENT_CERTIFICATES,
    MORE_NAMES,
    NAMES,
    NO_CERTIFICATE,
    TOO_EARLY,
    TOO_LATE,
    VERSIONS,
    WRONG_CA,
    WRONG_PURPOSE,
    Authorities,
    Fault,
    client_of,
)
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError, TLSInfo
from trisock._errors import describe_ssl_error, ssl_reason
from trisock.testing import socket_pair

# The part of a TLS 1.2 cipher's name that depends on the kind of the server's key.
AUTHENTICATION = {"RSA 2048": "RSA", "P-256": "ECDSA", "P-384": "ECDSA", "Ed25519": "ECDSA"}


# ---- conversations ----


@pytest.fixture(scope="session")
def authorities() -> Authorities:
    return Authorities()


async def converse(
    client_tls: ClientTLS | ssl.SSLContext, name: str, server_tls: ServerTLS | ssl.SSLContext
) -> tuple[Outcome, Outcome]:
    """Send data both ways in several records, and close. Return the outcomes of both sides."""
    outcomes: dict[str, Outcome] = {}
    question, answer = bytes(range(256)) * 70, b"answer" * 3000

    async def client(sock: Socket) -> TLSInfo:
        info = await sock.starttls(client_tls, server_hostname=name)
        await sock.send(question)
        assert await sock.recv_exactly(len(answer)) == answer
        await sock.close()
        return info

    async def server(sock: Socket) -> TLSInfo:
        info = await sock.starttls(server_tls)
        assert await sock.recv_exactly(len(question)) == question
        await sock.send(answer)
        assert await sock.recv() == b""  # close_notify
        await sock.close()  # or else the client's close waits for a delayed ACK
        return info

    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        async def run(side: str) -> None:
            try:
                outcomes[side] = await (client(a) if side == "client" else server(b))
            except TLSError as exc:
                outcomes[side] = exc
                await (a if side == "client" else b).close()

        nursery.start_soon(run, "client")
        nursery.start_soon(run, "server")
    return outcomes["client"], outcomes["server"]


# ---- all combinations ----

# Each of these takes seconds, so the usual run tries two of them. (RSA keys are slow.)
USUAL = {("TLSv1.2", "P-256"), ("TLSv1.3", "P-256")}


@pytest.mark.parametrize(("version", "kind"), grid(lambda *each: each in USUAL, VERSIONS, KINDS))
async def test_every_combination_gives_the_expected_result(
    version: str, kind: str, authorities: Authorities
) -> None:
    usual = (NAMES["exact"], CLIENT_CERTIFICATES["none"], ALPNS["none"])
    for name, client_certificate, alpn in [
        *itertools.product(NAMES.values(), CLIENT_CERTIFICATES.values(), ALPNS.values()),
        *((each, *usual[1:]) for each in MORE_NAMES.values()),
        *((usual[0], each, usual[2]) for each in MORE_CLIENT_CERTIFICATES.values()),
    ]:
        certificate = authorities.server(name.certified, kind)
        shown = authorities.client(client_certificate.shown, kind)
        client_tls = client_of(version, authorities.right.pem, alpn=alpn.offered, certificate=shown)
        server_tls = ServerTLS(
            certificate,
            alpn_protocols=alpn.spoken,
            require_alpn=alpn.required,
            client_ca=None if client_certificate.asked == "no" else authorities.right.pem,
            require_client_certificate=client_certificate.asked == "required",
        )
        client, server = await converse(client_tls, name.asked, server_tls)
        # The client verifies first. Then the server verifies the client, and ALPN comes last.
        if name.fault is not None:
            name.fault.check(client, server, version)
            continue
        if (fault := client_certificate.fault or alpn.fault) is not None:
            fault.check(server, client, version)
            continue
        where = (name, client_certificate, alpn)
        assert isinstance(client, TLSInfo), where
        assert isinstance(server, TLSInfo), where
        for info in (client, server):
            assert info.version == version
            assert info.alpn_protocol == alpn.chosen
            assert not info.session_reused
        assert client.cipher == server.cipher
        prefix = "TLS_" if version == "TLSv1.3" else f"ECDHE-{AUTHENTICATION[kind]}-"
        assert client.cipher.startswith(prefix)
        assert client.server_hostname == (name.on_the_wire or name.asked)
        assert server.server_hostname == name.on_the_wire
        assert client.peer_certificate == der(certificate)
        requested = shown is not None and client_certificate.asked != "no"
        assert server.peer_certificate == (der(shown) if requested else None)


# ---- the server's certificate ----


@pytest.mark.parametrize(("version", "kind"), grid(lambda *each: each in USUAL, VERSIONS, KINDS))
async def test_a_client_refuses_an_invalid_server_certificate(
    version: str, kind: str, authorities: Authorities
) -> None:
    right, wrong, intermediate = authorities.right, authorities.wrong, authorities.intermediate
    for certificate, fault in [
        (intermediate.issue("example.org", kind=kind), None),
        (intermediate.issue("example.org", kind=kind, with_chain=False), WRONG_CA),
        (wrong.issue("example.org", kind=kind), WRONG_CA),
        (right.issue("example.org", kind=kind, dates=EXPIRED), TOO_LATE),
        (right.issue("example.org", kind=kind, dates=NOT_YET_VALID), TOO_EARLY),
        (right.issue("example.org", kind=kind, purpose=CLIENTS_ONLY), WRONG_PURPOSE),
    ]:
        client, server = await converse(
            client_of(version, right.pem), "example.org", ServerTLS(certificate)
        )
        if fault is None:
            assert isinstance(client, TLSInfo)
            assert client.peer_certificate == der(certificate)
        else:
            fault.check(client, server, version)


def test_configuring_a_weak_key_raises_value_error(authorities: Authorities) -> None:
    small = authorities.right.issue("example.org", kind="RSA 1024")
    for make in (lambda: ServerTLS(small), lambda: ClientTLS("x", certificate=small)):
        with pytest.raises(ValueError, match=r"example\.org.*key too small"):
            make()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_peers_weak_key_is_rejected(version: str, authorities: Authorities) -> None:
    small = authorities.right.issue("example.org", kind="RSA 1024")
    weak = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    weak.set_ciphers("DEFAULT:@SECLEVEL=0")
    small.load_into(weak)
    client, server = await converse(client_of(version, authorities.right.pem), "example.org", weak)
    fault = Fault("EE certificate key too weak", "bad certificate", verify_code=66)
    fault.check(client, server, version)


# ---- resumption ----


def plain_client(version: str, ca: bytes, certificate: Certificate | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.decode())
    context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    if certificate is not None:
        certificate.load_into(context)
    return context


async def accepted(
    server_tls: ServerTLS,
    context: ssl.SSLContext,
    name: str,
    session: ssl.SSLSession | None,
    *,
    reused: bool,
) -> tuple[TLSInfo, ssl.SSLSession | None]:
    """Visit a server that accepts the client; return the server's TLSInfo and the new session."""
    info, session = await visit(server_tls, context, name, session)
    assert isinstance(info, TLSInfo)
    assert info.session_reused == reused
    return info, session


async def refused(
    server_tls: ServerTLS, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None
) -> tuple[TLSError, ssl.SSLSession | None]:
    """Visit a server that refuses the client; return the server's error and the session."""
    error, session = await visit(server_tls, context, name, session)
    assert isinstance(error, TLSError)
    return error, session


@pytest.mark.parametrize(
    ("version", "kind", "tickets"),
    grid(lambda version, kind, tickets: (version, kind) in USUAL, VERSIONS, KINDS, [True, False]),
)
async def test_a_resumed_session_keeps_the_client_certificate(
    version: str, kind: str, tickets: bool, authorities: Authorities
) -> None:
    right = authorities.right.pem
    shown = authorities.client("right", kind)
    assert shown is not None
    context = plain_client(version, right, shown)
    if not tickets:  # the server caches the session
        context.options |= ssl.OP_NO_TICKET
    names = ("first.example", "*.second.example")
    certificates = [authorities.server(name, kind) for name in names]
    server_tls = ServerTLS(certificates, client_ca=right, require_client_certificate=True)
    for name in ("first.example", "any.second.example"):
        session = None
        for reused in (False, True, True):
            info, session = await accepted(server_tls, context, name, session, reused=reused)
            assert info.peer_certificate == der(shown)
            assert info.version == version
            assert info.server_hostname == name


@pytest.mark.parametrize(
    ("version", "name"),
    grid(
        lambda version, name: name == "second.example",
        VERSIONS,
        ["first.example", "second.example"],
    ),
)
async def test_a_strict_server_rejects_sessions_from_a_lenient_server(
    version: str, name: str, authorities: Authorities
) -> None:
    """The session has no client certificate, or a client certificate from another authority.

    All servers here have the same server certificates and run in one process.
    """
    right, wrong = authorities.right.pem, authorities.wrong.pem
    certificates = [authorities.server(f"{each}.example", "P-256") for each in ("first", "second")]
    strict = ServerTLS(certificates, client_ca=right, require_client_certificate=True)
    for other, shown, fault in [
        (ServerTLS(certificates), None, NO_CERTIFICATE),
        (ServerTLS(certificates, client_ca=right), None, NO_CERTIFICATE),
        (
            ServerTLS(certificates, client_ca=wrong, require_client_certificate=True),
            "wrong CA",
            WRONG_CA,
        ),
    ]:
        context = plain_client(version, right, authorities.client(shown, "P-256"))
        _, session = await accepted(other, context, name, None, reused=False)
        _, session = await accepted(other, context, name, session, reused=True)
        error, _ = await refused(strict, context, name, session)
        assert fault.words in str(error)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_refused_certificate_leaves_no_session(
    version: str, authorities: Authorities
) -> None:
    right = authorities.right.pem
    server_tls = ServerTLS(
        authorities.server("example.org", "P-256"),
        client_ca=right,
        require_client_certificate=True,
    )
    context = plain_client(version, right, authorities.client("wrong CA", "P-256"))
    session = None
    for _ in range(2):
        error, session = await refused(server_tls, context, "example.org", session)
        assert WRONG_CA.words in str(error)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_session_cannot_outlive_its_client_certificate(
    version: str, authorities: Authorities, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = authorities.right.pem
    name = "example.org"
    server_tls = ServerTLS(authorities.server(name, "P-256"), client_ca=right)
    context = plain_client(version, right, authorities.client("right", "P-256"))
    _, session = await accepted(server_tls, context, name, None, reused=False)
    monkeypatch.setattr(time, "time", VALID[1].timestamp)  # the certificate's last valid second
    _, session = await accepted(server_tls, context, name, session, reused=True)
    monkeypatch.setattr(time, "time", lambda: VALID[1].timestamp() + 1)
    error, _ = await refused(server_tls, context, name, session)
    assert "the certificate was refused: certificate has expired" in str(error)
    assert (error.reason, error.verify_code) == ("CERTIFICATE_VERIFY_FAILED", 10)


# ---- ciphers ----

# Ciphers without encryption, authentication or forward secrecy, and obsolete ciphers.
# test_tls_scanners.py covers ciphers that OpenSSL has removed, such as RC4.
WEAK = ["eNULL", "aNULL", "kRSA", "ECDHE+ARIA", "ECDHE+CAMELLIA"]
# Ciphers with CBC or finite-field Diffie-Hellman. Many servers still accept these ciphers, but
# trisock's servers do not.
OLD = ["ECDHE+SHA1", "ECDHE+SHA256:!AESGCM:!CHACHA20", "DHE"]

NO_SHARED_CIPHER = Fault("share no cipher", "handshake failure", reason="NO_SHARED_CIPHER")


def limited_to(context: ssl.SSLContext, ciphers: str) -> ssl.SSLContext:
    """Limit a context to these TLS 1.2 ciphers, even if they are weak."""
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("ciphers", WEAK + OLD)
async def test_a_server_refuses_weak_ciphers(ciphers: str, authorities: Authorities) -> None:
    name = "example.org"
    server_tls = ServerTLS([authorities.server(name, kind) for kind in ("RSA 2048", "P-256")])
    context = ssl.create_default_context(cadata=authorities.right.pem.decode())
    client, server = await converse(limited_to(context, ciphers), name, server_tls)
    NO_SHARED_CIPHER.check(server, client, "TLSv1.2")


@pytest.mark.parametrize("ciphers", WEAK)
async def test_a_client_refuses_weak_ciphers(ciphers: str, authorities: Authorities) -> None:
    offered = {cipher["kea"] for cipher in ssl.create_default_context().get_ciphers()}
    if ciphers == "kRSA" and "kx-rsa" in offered:
        pytest.skip("this build of Python offers the key exchange RSA")
    context = limited_to(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ciphers)
    for kind in ("RSA 2048", "P-256"):
        authorities.server("example.org", kind).load_into(context)
    client_tls = ClientTLS(ca=authorities.right.pem)
    client, server = await converse(client_tls, "example.org", context)
    NO_SHARED_CIPHER.check(server, client, "TLSv1.2")


# ---- alerts ----


@pytest.mark.parametrize(
    ("text", "reason", "alert"),
    [
        ("tlsv1 alert no application protocol", None, "no application protocol"),
        ("tlsv1 unrecognized name", "TLSV1_UNRECOGNIZED_NAME", "unrecognized name"),
        ("tlsv13 alert certificate required", None, "certificate required"),
        ("sslv3 alert bad certificate", "SSLV3_ALERT_BAD_CERTIFICATE", "bad certificate"),
    ],
)
def test_the_error_contains_each_alert_known_to_python_or_not(
    text: str, reason: str | None, alert: str
) -> None:
    error = ssl.SSLError(1, f"[SSL] {text} (_ssl.c:1006)")
    error.reason = reason  # type: ignore[assignment]
    shown, _, advice = describe_ssl_error(error).partition(" (")
    assert shown == f"the peer refused, with the alert '{alert}'"
    assert bool(advice) == (alert == "certificate required")
    assert ssl_reason(error) == text.upper().replace(" ", "_")
