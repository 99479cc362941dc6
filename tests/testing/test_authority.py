"""trisock.testing.Authority: certificates and TLS roles for tests."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Callable

import pytest
import trio
from cryptography import x509

from helpers.pairs import closing
from helpers.raw_tls import upgrade
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError, TLSInfo
from trisock.testing import Authority, socket_pair


async def handshake(client: object, server: object) -> tuple[TLSInfo, TLSInfo]:
    a, b = await socket_pair()
    async with closing(a, b):
        return await upgrade(a, client, b, server)


@pytest.mark.parametrize("names", [(), ("mail.example.org",), ("*.example.org", "10.0.0.1")])
async def test_a_client_accepts_the_servers_names(
    names: tuple[str, ...], authority: Authority
) -> None:
    wanted = names or ("localhost", "127.0.0.1", "::1")
    for name in wanted:
        role = authority.client_tls(name.replace("*", "www"))
        await handshake(role, authority.server_tls(*names))


async def test_client_and_server_fit_without_arguments(authority: Authority) -> None:
    info, _ = await handshake(authority.client_tls(), authority.server_tls())
    assert info.server_hostname == "localhost"


async def refusal(client: ClientTLS, certificate: Certificate) -> str:
    """Return the client's error."""
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(fail_handshake, b, certificate)
        with pytest.raises(TLSError) as caught:
            await a.starttls(client)
    return str(caught.value)


async def fail_handshake(sock: Socket, certificate: Certificate) -> None:
    with pytest.raises(TLSError):
        await sock.starttls(certificate)


@pytest.mark.parametrize(
    ("issue", "reason"),
    [
        (Authority.expired, "certificate has expired"),
        (Authority.wrong_name, "certificate is not valid for 'localhost'"),
        (lambda _: Authority().certificate(), "unable to get local issuer certificate"),
    ],
)
async def test_a_client_rejects_each_kind_of_wrong_certificate(
    issue: Callable[[Authority], Certificate], reason: str, authority: Authority
) -> None:
    assert reason in await refusal(authority.client_tls(), issue(authority))


async def test_an_expired_certificate_may_have_other_names(authority: Authority) -> None:
    expired = authority.expired("example.org")
    assert expired.names == ("example.org",)
    assert expired != authority.expired()
    assert "expired" in await refusal(authority.client_tls("example.org"), expired)


async def test_a_server_gets_the_clients_certificate(authority: Authority) -> None:
    server = authority.server_tls(client_ca=authority.ca, require_client_certificate=True)
    client = authority.client_tls(certificate=authority.client("alice@example.org"))
    _, info = await handshake(client, server)
    assert info.peer_certificate is not None
    found = x509.load_der_x509_certificate(info.peer_certificate)
    assert found.subject.rfc4514_string().startswith("CN=alice@example.org")
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.RFC822Name) == ["alice@example.org"]
    assert found.not_valid_after_utc > datetime.datetime.now(datetime.timezone.utc)


def test_options_are_those_of_the_roles(authority: Authority) -> None:
    client = authority.client_tls("example.org", alpn_protocols=["h2"])
    assert client == ClientTLS("example.org", ca=authority.ca, alpn_protocols=["h2"])
    server = authority.server_tls("example.org", alpn_protocols=["h2"], require_alpn=True)
    certificate = authority.certificate("example.org")
    assert server == ServerTLS(certificate, alpn_protocols=["h2"], require_alpn=True)


def test_certificates_are_cached(authority: Authority) -> None:
    for issue in (
        authority.certificate,
        authority.expired,
        authority.wrong_name,
        lambda: authority.client("alice"),
        lambda: authority.certificate("a.example", "b.example"),
    ):
        assert issue() is issue()
    kinds = [authority.certificate("alice"), authority.expired("alice"), authority.client("alice")]
    assert len({*kinds, Authority().certificate("alice")}) == 4


def test_the_authority_can_be_given_to_the_ssl_module(authority: Authority) -> None:
    context = ssl.create_default_context(cadata=authority.ca.decode())
    assert len(context.get_ca_certs()) == 1
