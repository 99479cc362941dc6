"""OpenSSL has one error queue per thread, so a connection can find errors of other connections."""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import datetime
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from helpers.client_hellos import records_of
from helpers.pairs import closing, raw_pair
from helpers.raw_tls import (
    RawTLS,
    handshake,
    raw_client_context,
    tls_server_and_raw_client,
    upgrade,
)
from trisock import ClientTLS, ServerTLS
from trisock.testing import Authority, socket_pair

try:
    _openssl = ctypes.PyDLL(_ssl.__file__)
    _openssl.ERR_set_error.restype = None
except (AttributeError, OSError):
    pytest.skip("ctypes cannot call OpenSSL's functions", allow_module_level=True)

_ERR_LIB_SSL = 20


def leave_an_error() -> None:
    """Leave an error in the queue. Even a successful OpenSSL call may leave one."""
    _openssl.ERR_new()
    _openssl.ERR_set_error(_ERR_LIB_SSL, ctypes.c_int(134), None)  # certificate verify failed


class LeavingErrors(trio.abc.Instrument):
    """Leaves an error in the queue before each task step, as code outside trisock may do."""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        leave_an_error()


@contextlib.contextmanager
def leaving_errors() -> Iterator[None]:
    instrument = LeavingErrors()
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)
        _openssl.ERR_clear_error()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_a_connection_survives_stray_errors_in_the_queue(
    version: str, authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    with leaving_errors():
        client, server = await socket_pair()
        client._connection.connected_host = "example.org"
        async with closing(client, server):
            for _ in range(2):
                await upgrade(client, client_tls, server, server_tls)
                for one, other in ((client, server), (server, client)):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(one.send, b"x" * 100_000)
                        assert await other.recv_exactly(100_000) == b"x" * 100_000
                    assert await other.peek() is None
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.stoptls)
                    await client.stoptls()
                await client.send(b"plain text")
                assert await server.recv() == b"plain text"
            await upgrade(client, raw_client_context(authority, version), server, server_tls)
            await client.close()
            assert await server.recv() == b""


async def test_a_split_record_is_read_despite_a_stray_error(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with tls_server_and_raw_client(authority, server_tls) as (sock, peer):
        for cut in range(1, 27):
            peer.ssl.write(b"hello")
            record = peer.outgoing.read()
            peer.raw.sendall(record[:cut])
            leave_an_error()
            assert await sock.peek() is None
            peer.raw.sendall(record[cut:])
            assert await sock.recv() == b"hello"


async def test_a_connections_own_error_still_breaks_the_connection() -> None:
    client, server = await socket_pair(tls=True)
    async with closing(client, server):
        leave_an_error()
        await client.stream.send_all(b"\x17\x03\x03\0\x20" + bytes(32))
        with pytest.raises(trio.BrokenResourceError, match="forged or damaged"):
            await server.recv()


# ---- a client whose certificate chain leaves an error ----


def issue(
    name: str, issuer: x509.Name, issuer_key: ec.EllipticCurvePrivateKey, *, is_ca: bool, san: bytes
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
    )
    if san:
        oid = x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, san), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()), key


def client_with_a_bad_chain(authority: Authority, tmp_path: Path) -> ssl.SSLContext:
    """Return the context of a client that sends a good chain and one bad certificate."""
    root = x509.load_pem_x509_certificate(authority.ca)
    root_key = authority._ca._private_key
    intermediate, intermediate_key = issue("Middle", root.subject, root_key, is_ca=True, san=b"")
    bad, _ = issue("Middle", root.subject, root_key, is_ca=True, san=b"\x30\x03\x82\x05a")
    leaf, key = issue("client", intermediate.subject, intermediate_key, is_ca=False, san=b"")
    pem = serialization.Encoding.PEM
    (tmp_path / "chain.pem").write_bytes(
        b"".join(each.public_bytes(pem) for each in (leaf, bad, intermediate))
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(cadata=authority.ca.decode())
    context.load_cert_chain(tmp_path / "chain.pem")
    return context


@pytest.fixture
def verifying_server_tls(authority: Authority) -> ServerTLS:
    return authority.server_tls("example.org", client_ca=authority.ca)


async def test_a_bad_chain_breaks_no_other_connection(
    authority: Authority, verifying_server_tls: ServerTLS, tmp_path: Path
) -> None:
    context = client_with_a_bad_chain(authority, tmp_path)
    sock, raw = raw_pair()
    victim, victim_raw = raw_pair()
    peer = RawTLS(raw, context, server_hostname="example.org")
    victim_peer = RawTLS(victim_raw, context, server_hostname="example.org")
    with raw, victim_raw:
        async with closing(sock, victim):
            info = await handshake(victim, verifying_server_tls, victim_peer)
            assert info.peer_certificate is not None
            _openssl.ERR_clear_error()
            info = await handshake(sock, verifying_server_tls, peer)
            assert info.peer_certificate is not None
            assert not _openssl.ERR_peek_error()  # code outside trisock must find no error
            victim_peer.ssl.write(b"hello")
            record = victim_peer.outgoing.read()
            victim_raw.sendall(record[:10])
            assert await victim.peek() is None
            victim_raw.sendall(record[10:])
            assert await victim.recv() == b"hello"


async def test_a_handshake_survives_a_bad_chain_in_a_separate_record(
    authority: Authority, verifying_server_tls: ServerTLS, tmp_path: Path
) -> None:
    """The chain leaves an error in the queue. OpenSSL reports this error instead of WANT_READ."""
    context = client_with_a_bad_chain(authority, tmp_path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    sock, raw = raw_pair()
    raw.setblocking(False)
    peer = RawTLS(raw, context, server_hostname="example.org")
    with raw:
        async with closing(sock), trio.open_nursery() as nursery:
            nursery.start_soon(sock.starttls, verifying_server_tls)
            while True:
                try:
                    peer.ssl.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    # Send one record at a time, so that the server has to wait after each record.
                    for record in records_of(peer.outgoing.read()):
                        raw.sendall(record)
                        await trio.testing.wait_all_tasks_blocked()
                    await trio.lowlevel.wait_readable(raw)
                    peer.incoming.write(raw.recv(65536))
        assert sock.istls()
