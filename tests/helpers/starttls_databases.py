"""Small LDAP and database servers for third-party clients (see starttls_servers.py)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct

from cryptography import x509

from helpers.ldap_client import ber, ber_elements
from helpers.postgres_client import message
from helpers.starttls_servers import PASSWORD, Site
from trisock import Socket, starttls

# ---- LDAP ----

START_TLS = b"1.3.6.1.4.1.1466.20037"


async def receive_ber(sock: Socket) -> bytes:
    """Return the content of the next BER value."""
    _, size = await sock.recv_exactly(2)
    if size & 0x80:
        size = int.from_bytes(await sock.recv_exactly(size & 0x7F), "big")
    return await sock.recv_exactly(size)


def ldap_message(number: bytes, tag: int, *contents: bytes) -> bytes:
    return ber(0x30, ber(0x02, number), ber(tag, *contents))


SUCCESS = (ber(0x0A, b"\0"), ber(0x04), ber(0x04))


async def ldap(site: Site, sock: Socket) -> None:
    """Serve one entry, with ``site.mail`` as its description. Accept any new entry (RFC 4511)."""
    names = {0x60: "bind", 0x63: "search", 0x68: "add", 0x77: "extended"}
    while True:
        (_, number), (tag, content), *_ = ber_elements(await receive_ber(sock))
        site.record(sock, names.get(tag, "unbind").encode() + b" " + content)
        match names.get(tag):
            case "extended" if (0x80, START_TLS) in ber_elements(content) and not sock.istls():
                await sock.send(ldap_message(number, 0x78, *SUCCESS))
                await sock.starttls(site.tls)
            case "bind":
                await sock.send(ldap_message(number, 0x61, *SUCCESS))
            case "search":
                values = ber(0x31, *(ber(0x04, text) for text in site.mail))
                attribute = ber(0x30, ber(0x04, b"description"), values)
                entry = ber(0x04, b"dc=example"), ber(0x30, attribute)
                await sock.send(ldap_message(number, 0x64, *entry))
                await sock.send(ldap_message(number, 0x65, *SUCCESS))
            case "add":
                await sock.send(ldap_message(number, 0x69, *SUCCESS))
            case _:
                return


# ---- databases ----

SSL_REQUEST = struct.pack("!ii", 8, 80877103)


async def receive_pg(sock: Socket) -> bytes:
    (size,) = struct.unpack("!i", await sock.recv_exactly(4))
    return await sock.recv_exactly(size - 4)


async def postgres(site: Site, sock: Socket, *, password: bool = False) -> None:
    """Answer each query with the literal that it contains."""
    await starttls.accept(sock, "postgres", site.tls)
    startup = await receive_pg(sock)
    site.record(sock, startup)
    if password and not await scram_sha_256_plus(site, sock):
        await sock.send(message(b"E", b"SFATAL\0C28P01\0Mchannel binding required\0\0"))
        return
    await sock.send(message(b"R", struct.pack("!i", 0)))
    for name, value in [(b"client_encoding", b"UTF8"), (b"server_version", b"15.0")]:
        await sock.send(message(b"S", name, b"\0", value, b"\0"))
    await sock.send(message(b"Z", b"I"))
    while (kind := await sock.recv_exactly(1)) == b"Q":
        query = await receive_pg(sock)
        site.record(sock, query)
        text = query.split(b"'")[1]
        column = b"column\0" + struct.pack("!ihihih", 0, 0, 25, -1, -1, 0)
        await sock.send(
            message(b"T", struct.pack("!h", 1), column),
            message(b"D", struct.pack("!hi", 1, len(text)), text),
            message(b"C", b"SELECT 1\0"),
            message(b"Z", b"I"),
        )
    site.record(sock, kind)


async def postgres_with_password(site: Site, sock: Socket) -> None:
    """Require the password, and a channel binding to the server's certificate."""
    await postgres(site, sock, password=True)


async def scram_sha_256_plus(site: Site, sock: Socket) -> bool:
    """Authenticate by SCRAM with channel binding (RFC 5802, 5929 and 7677)."""

    def sign(key: bytes, text: bytes) -> bytes:
        return hmac.digest(key, text, "sha256")

    async def receive() -> bytes:
        assert await sock.recv_exactly(1) == b"p"
        return await receive_pg(sock)

    await sock.send(message(b"R", struct.pack("!i", 10), b"SCRAM-SHA-256-PLUS\0\0"))
    mechanism, _, response = (await receive()).partition(b"\0")
    first = response[4:]  # the response starts with its size
    gs2_header = b"p=tls-server-end-point,,"
    if mechanism != b"SCRAM-SHA-256-PLUS" or not first.startswith(gs2_header):
        return False
    bare = first.removeprefix(gs2_header)
    nonce, salt, iterations = bare.partition(b",r=")[2] + b"server", b"salt", 4096
    challenge = b"r=%b,s=%b,i=%d" % (nonce, base64.b64encode(salt), iterations)
    await sock.send(message(b"R", struct.pack("!i", 11), challenge))
    without_proof, _, proof = (await receive()).rpartition(b",p=")
    certificate = x509.load_pem_x509_certificate(site.certificate._chain)
    assert certificate.signature_hash_algorithm is not None
    binding = gs2_header + certificate.fingerprint(certificate.signature_hash_algorithm)
    if without_proof != b"c=%b,r=%b" % (base64.b64encode(binding), nonce):
        return False
    salted = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), salt, iterations)
    text = b",".join([bare, challenge, without_proof])
    stored_key = hashlib.sha256(sign(salted, b"Client Key")).digest()
    signature = sign(stored_key, text)
    client_key = bytes(a ^ b for a, b in zip(base64.b64decode(proof), signature, strict=True))
    if hashlib.sha256(client_key).digest() != stored_key:
        return False
    verifier = base64.b64encode(sign(sign(salted, b"Server Key"), text))
    await sock.send(message(b"R", struct.pack("!i", 12), b"v=", verifier))
    return True


CLIENT_SSL = 0x0800


def mysql_packet(number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "little") + bytes([number]) + content


async def receive_mysql(sock: Socket) -> tuple[int, bytes]:
    *size, number = await sock.recv_exactly(4)
    return number, await sock.recv_exactly(int.from_bytes(bytes(size), "little"))


# Protocol version 10, server version, thread number, 8 bytes of salt, lower capability bits (with
# CLIENT_SSL), charset UTF-8, status, upper capability bits, filler, 12 bytes of salt.
MYSQL_GREETING = mysql_packet(
    0,
    b"\x0a8.0.0\0" + bytes(4) + b"12345678\0\x00\x8a\x21\2\0" + bytes(13) + b"123456789012\0",
)


async def mysql(site: Site, sock: Socket) -> None:
    """Require TLS but no password, and answer each command with OK."""
    await sock.send(MYSQL_GREETING)
    _, request = await receive_mysql(sock)
    if not int.from_bytes(request[:2], "little") & CLIENT_SSL or len(request) != 32:
        return
    await sock.starttls(site.tls)
    while True:
        number, command = await receive_mysql(sock)
        site.record(sock, command)
        if command == b"\1":  # quit
            return
        await sock.send(mysql_packet(number + 1, b"\0\0\0\2\0\0\0"))
