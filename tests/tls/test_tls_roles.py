"""ClientTLS and ServerTLS: their options, and which roles share a context."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import ssl
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import trio

from helpers.certificates import CertificateAuthority, der
from helpers.pairs import closing
from helpers.pem import pems
from helpers.raw_tls import raw_client_context
from trisock import ClientTLS, ServerTLS
from trisock._tls import certificate as loading
from trisock._tls import roles
from trisock.testing import Authority, socket_pair

# ---- options ----


def test_roles_check_their_options(authority: Authority) -> None:
    good = authority.certificate("example.org")
    for make, error, words in [
        (lambda: ServerTLS([]), ValueError, "at least one certificate"),
        (lambda: ServerTLS("pem"), TypeError, "not a str"),
        (lambda: ServerTLS([1]), TypeError, "not a int"),  # type: ignore[list-item]
        (lambda: ServerTLS(good, require_alpn=True), ValueError, "needs alpn_protocols"),
        (lambda: ServerTLS(good, alpn_protocols="h2"), TypeError, "sequence of str"),
        (lambda: ServerTLS(good, alpn_protocols=[b"h2"]), TypeError, "must be a str"),  # type: ignore[list-item]
        (lambda: ServerTLS(good, alpn_protocols=[""]), ValueError, "1 to 255"),
        (lambda: ServerTLS(good, alpn_protocols=["x" * 256]), ValueError, "1 to 255"),
        (lambda: ServerTLS(good, client_ca="x"), ValueError, "client_ca is not PEM"),
        (
            lambda: ServerTLS(good, client_ca="-----BEGIN CERTIFICATE-----\n"),
            ValueError,
            "client_ca holds no PEM certificate",
        ),
        (
            lambda: ServerTLS(good, require_client_certificate=True),
            ValueError,
            "needs client_ca",
        ),
        (lambda: ClientTLS("a b"), ValueError, "not a host name"),
        (lambda: ClientTLS(1), TypeError, "a host must be a str"),  # type: ignore[arg-type]
        (lambda: ClientTLS("x", ca="x"), ValueError, "ca is not PEM"),
        (
            lambda: ClientTLS("x", ca=b"-----BEGIN \xff"),
            ValueError,
            "ca holds no PEM certificate",
        ),
        (lambda: ClientTLS("x", certificate="pem"), TypeError, "a certificate must be"),  # type: ignore[arg-type]
        (lambda: ClientTLS("x", alpn_protocols=1), TypeError, "sequence of str"),  # type: ignore[arg-type]
    ]:
        with pytest.raises(error, match=words):
            make()


@pytest.mark.parametrize(
    ("content", "words"), [("x", "is not PEM: "), ("-----BEGIN X\n", "holds no PEM certificate ")]
)
def test_an_error_names_a_bad_file_of_authorities(
    content: str, words: str, authority: Authority, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    path.write_text(content)
    good = authority.certificate("localhost")
    for what, make in [
        ("client_ca", lambda: ServerTLS(good, client_ca=path)),
        ("ca", lambda: ClientTLS("x", ca=path)),
    ]:
        with pytest.raises(ValueError, match=rf"^{what} {words}.* \(in {path}\)$"):
            make()


@pytest.mark.parametrize("unset", [None, 0, "", "no", ()])
def test_a_security_option_must_be_a_bool(authority: Authority, unset: object) -> None:
    certificate = authority.certificate("localhost")
    for name in ("verify", "require_ecdhe"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            ClientTLS("localhost", **{name: unset})  # type: ignore[arg-type]
    for name in ("require_alpn", "require_client_certificate"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            ServerTLS(certificate, **{name: unset})  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["imap\n", "\x7f", "\0", "a\tb", "h2\r"])
def test_control_characters_in_alpn_protocols_are_refused(protocol: str) -> None:
    with pytest.raises(ValueError, match="printable") as caught:
        ClientTLS("x", alpn_protocols=["imap", protocol])
    assert repr(protocol) not in str(caught.value)


# ---- values ----


def test_roles_are_immutable_and_hashable(authority: Authority) -> None:
    role = ClientTLS("example.org", ca=authority.ca, alpn_protocols=["imap"])
    with pytest.raises(AttributeError):
        role.verify = False  # type: ignore[misc]
    assert {role: 1}[ClientTLS("example.org", ca=authority.ca.decode(), alpn_protocols=("imap",))]
    server = ServerTLS([authority.certificate("example.org")])
    with pytest.raises(AttributeError):
        server.certificates = ()  # type: ignore[misc]
    assert server == ServerTLS(authority.certificate("example.org"))


def test_roles_can_be_copied_but_a_key_cannot_be_pickled(authority: Authority) -> None:
    good = authority.certificate("example.org")
    client = ClientTLS("example.org", ca=authority.ca, alpn_protocols=["imap"])
    server = ServerTLS(good, client_ca=authority.ca)
    for role in (client, server, ClientTLS("example.org", certificate=good), good):
        for twin in (copy.copy(role), copy.deepcopy(role)):
            assert twin == role
            assert hash(twin) == hash(role)
    assert pickle.loads(pickle.dumps(client)) == client
    assert pickle.loads(pickle.dumps(client))._context() is client._context()
    for secret in (good, server, ClientTLS("example.org", certificate=good), [good]):
        with pytest.raises(TypeError, match="private key"):
            pickle.dumps(secret)
    assert dataclasses.asdict(client) == {
        "server_hostname": "example.org",
        "ca": client.ca,
        "alpn_protocols": ("imap",),
        "certificate": None,
        "verify": True,
        "require_ecdhe": False,
    }
    assert dataclasses.asdict(server)["certificates"] == (good,)
    assert dataclasses.replace(client, verify=False).verify is False


# ---- ciphers ----


def tls_1_2_suites(context: ssl.SSLContext) -> set[str]:
    return {each["name"] for each in context.get_ciphers() if each["protocol"] != "TLSv1.3"}


@pytest.mark.parametrize("verify", [True, False])
def test_require_ecdhe_offers_the_suites_of_a_server(verify: bool, authority: Authority) -> None:
    server = ServerTLS(authority.certificate("localhost"))
    required = ClientTLS("localhost", verify=verify, require_ecdhe=True)
    assert tls_1_2_suites(required._context()) == tls_1_2_suites(server._context())
    usual = dataclasses.replace(required, require_ecdhe=False)
    assert tls_1_2_suites(usual._context()) > tls_1_2_suites(server._context())
    assert usual != required


# ---- trust ----


def test_verification_is_on_by_default(authority: Authority) -> None:
    verified = ClientTLS("example.org", ca=authority.ca)._context()
    assert verified.check_hostname
    assert verified.verify_mode == ssl.CERT_REQUIRED
    assert len(verified.get_ca_certs()) == 1  # only the given authority is trusted
    unverified = ClientTLS("example.org", verify=False)._context()
    assert not unverified.check_hostname
    assert unverified.verify_mode == ssl.CERT_NONE
    for context in (verified, unverified, ClientTLS("example.org")._context()):
        assert not context.hostname_checks_common_name


@pytest.mark.parametrize(
    "variable", ["SSL_CERT_FILE", pytest.param("SSL_CERT_DIR", marks=pytest.mark.needs("openssl"))]
)
async def test_the_environment_selects_the_systems_trust_store(
    variable: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.ca)
    if variable == "SSL_CERT_DIR":
        path = tmp_path
        # OpenSSL looks for a file named after the hash of the certificate's subject.
        subprocess.run(["openssl", "rehash", path], check=True)
    monkeypatch.setenv(variable, str(path))
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, [authority.certificate("example.org")])
        await a.starttls("example.org")


async def test_an_intermediate_or_leaf_can_be_the_trust_anchor() -> None:
    root = CertificateAuthority("root")
    between = CertificateAuthority("between", issuer=root)
    good = between.issue("example.org")
    leaf = ssl.DER_cert_to_PEM_cert(der(good)).encode()
    for anchor in (root.pem, between.pem, leaf):
        a, b = await socket_pair()
        async with closing(a, b), trio.open_nursery() as nursery:
            role = ServerTLS(good, client_ca=anchor, require_client_certificate=True)
            nursery.start_soon(b.starttls, role)
            await a.starttls(ClientTLS("example.org", ca=anchor, certificate=good))
            await a.send(b"x")


def test_verify_flags_do_not_depend_on_the_python_version(authority: Authority) -> None:
    for context in (
        ClientTLS("x", ca=authority.ca)._context(),
        ServerTLS(authority.certificate("example.org"), client_ca=authority.ca)._context(),
    ):
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert ClientTLS("x")._context().verify_flags == ssl.create_default_context().verify_flags


# ---- contexts ----


def test_equal_tls_arguments_share_a_context(authority: Authority) -> None:
    chain, key = pems(authority, "example.org")

    def context(tls: object, side: str) -> ssl.SSLContext:
        return roles.resolve_role(tls, server_hostname=None, connected_host=None, side=side).context

    mapping = {"chain": chain, "private_key": key}
    assert context([mapping], "server") is context([dict(mapping)], "server")
    assert loading.to_certificate(mapping) is loading.to_certificate(dict(mapping))
    with pytest.raises(ValueError, match="needs the fields"):
        loading.to_certificate({**mapping, "privat_key": key})
    # The system's trust store is loaded once for all server names.
    assert context("one.example", "client") is context("two.example", "client")


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_each_trust_store_has_its_own_context(
    variable: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.ca)
    role = ClientTLS("example.org")
    before = role._context()
    path = tmp_path / "ca.pem" if variable == "SSL_CERT_FILE" else tmp_path
    monkeypatch.setenv(variable, str(path))
    assert role._context() is not before
    if variable == "SSL_CERT_FILE":
        assert role._context().get_ca_certs()[0]["subject"]


async def test_ended_connections_leave_few_sessions_in_memory(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients use TLS 1.2 without tickets, so each server context has to store sessions."""
    contexts: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()
    real = ssl.SSLContext.wrap_bio

    def recorded(self: ssl.SSLContext, *args: object, **options: object) -> ssl.SSLObject:
        if options.get("server_side"):
            contexts.add(self)
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ssl.SSLContext, "wrap_bio", recorded)
    context = raw_client_context(authority, "TLSv1_2")
    context.options |= ssl.OP_NO_TICKET
    role = ServerTLS(
        [authority.certificate("example.org"), authority.certificate("second.example")]
    )
    for number in range(100):
        a, b = await socket_pair()
        name = ("example.org", "second.example")[number % 2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, role)
            await a.starttls(context, server_hostname=name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            nursery.start_soon(b.close)
    gc.collect()
    assert sum(each.session_stats()["number"] for each in contexts) <= 16


def test_a_program_without_tls_does_not_import_cryptography() -> None:
    program = """
        import sys, trisock
        assert "cryptography" not in sys.modules
        trisock.ClientTLS("example.org")
        assert "cryptography" in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True)
