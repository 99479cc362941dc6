"""OpenSSL's error queue belongs to the thread: whatever is in there is not this connection's."""

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
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from helpers.authority import Authority
from helpers.pairs import closing, raw_pair, tcp_pair, tls_pair
from helpers.raw_tls import RawTLS, upgrade
from trisock import ClientTLS, ServerTLS

try:
    _openssl = ctypes.PyDLL(_ssl.__file__)
    _openssl.ERR_set_error.restype = None
except (AttributeError, OSError):
    pytest.skip("OpenSSL's functions cannot be called from here", allow_module_level=True)

_ERR_LIB_SSL = 20


def leave_an_error() -> None:
    """Do what a call that succeeds and yet complains does."""
    _openssl.ERR_new()
    _openssl.ERR_set_error(_ERR_LIB_SSL, ctypes.c_int(134), None)  # certificate verify failed


class LeavingErrors(trio.abc.Instrument):
    """Leaves an error in the queue before each step of each task, as other code of theirs may."""

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


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_whole_conversation_survives_errors_of_others(
    version: ssl.TLSVersion, authority: Authority
) -> None:
    client_tls = ssl.create_default_context(cadata=authority.pem.decode())
    client_tls.maximum_version = version
    server_tls = ServerTLS(authority.issue("example.org"))
    with leaving_errors():
        client, server = await tcp_pair()
        client._connection.connected_host = "example.org"
        async with closing(client, server):
            for _ in range(2):
                await upgrade(
                    client, ClientTLS("example.org", ca=authority.pem), server, server_tls
                )
                for one, other in ((client, server), (server, client)):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(one.send, b"x" * 100_000)
                        assert await other.recv_exactly(100_000) == b"x" * 100_000
                    assert await other.peek() is None
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.stoptls)
                    await client.stoptls()
                await client.send(b"clear")
                assert await server.recv() == b"clear"
            await upgrade(client, client_tls, server, server_tls)
            await client.close()
            assert await server.recv() == b""


async def test_a_read_in_two_pieces_survives_an_error_of_another(authority: Authority) -> None:
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")
    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(ServerTLS(authority.issue("example.org")))
            for cut in range(1, 27):
                peer.ssl.write(b"hello")
                record = peer.outgoing.read()
                raw.sendall(record[:cut])
                leave_an_error()
                assert await sock.peek() is None
                raw.sendall(record[cut:])
                assert await sock.recv() == b"hello"


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
    """Return the context of a client whose chain is good but for a certificate more."""
    root = x509.load_pem_x509_certificate(authority.pem)
    root_key = authority.ca._private_key
    intermediate, intermediate_key = issue("Middle", root.subject, root_key, is_ca=True, san=b"")
    made_up, _ = issue("Middle", root.subject, root_key, is_ca=True, san=b"\x30\x03\x82\x05a")
    leaf, key = issue("client", intermediate.subject, intermediate_key, is_ca=False, san=b"")
    pem = serialization.Encoding.PEM
    (tmp_path / "chain.pem").write_bytes(
        b"".join(each.public_bytes(pem) for each in (leaf, made_up, intermediate))
        + key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.load_cert_chain(tmp_path / "chain.pem")
    return context


async def test_a_chain_with_a_bad_certificate_breaks_no_other_connection(
    authority: Authority, tmp_path: Path
) -> None:
    server_tls = ServerTLS(authority.issue("example.org"), client_ca=authority.pem)
    context = client_with_a_bad_chain(authority, tmp_path)
    sock, raw = raw_pair()
    victim, victim_raw = raw_pair()
    with raw, victim_raw:
        async with closing(sock, victim):
            peers = []
            for one, wire in ((victim, victim_raw), (sock, raw)):
                peers.append(RawTLS(wire, context, server_hostname="example.org"))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        trio.to_thread.run_sync, peers[-1].run, peers[-1].ssl.do_handshake
                    )
                    info = await one.starttls(server_tls)
                assert info.peer_certificate is not None
                if one is victim:
                    _openssl.ERR_clear_error()
            assert not _openssl.ERR_peek_error()  # also for what else the program has
            peers[0].ssl.write(b"hello")
            record = peers[0].outgoing.read()
            victim_raw.sendall(record[:10])
            assert await victim.peek() is None
            victim_raw.sendall(record[10:])
            assert await victim.recv() == b"hello"


async def test_errors_of_its_own_still_end_a_connection(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        leave_an_error()
        await client.stream.send_all(b"\x17\x03\x03\0\x20" + bytes(32))
        with pytest.raises(trio.BrokenResourceError, match="forged or damaged"):
            await server.recv()


async def test_a_bad_chain_that_comes_alone_does_not_end_the_handshake(
    authority: Authority, tmp_path: Path
) -> None:
    """The error that it leaves takes the place of WANT_READ."""
    server_tls = ServerTLS(authority.issue("example.org"), client_ca=authority.pem)
    context = client_with_a_bad_chain(authority, tmp_path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="example.org")
    sock, raw = raw_pair()
    with raw:
        async with closing(sock), trio.open_nursery() as nursery:
            nursery.start_soon(sock.starttls, server_tls)
            raw.setblocking(False)
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    # A record at a time: the server has to wait after each.
                    wire = outgoing.read()
                    while wire:
                        size = 5 + int.from_bytes(wire[3:5], "big")
                        raw.sendall(wire[:size])
                        wire = wire[size:]
                        await trio.testing.wait_all_tasks_blocked()
                    while True:
                        try:
                            incoming.write(raw.recv(65536))
                            break
                        except BlockingIOError:
                            await trio.lowlevel.checkpoint()
        assert sock.istls()
