"""The client side of the PostgreSQL protocol."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from helpers.real_servers import PASSWORD
from helpers.tls_clients import RefusedError
from trisock import Socket


def message(kind: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return kind + (len(content) + 4).to_bytes(4, "big") + content


async def pg_receive(sock: Socket) -> tuple[bytes, bytes]:
    """Skip informational messages, and return the next message of another kind."""
    while True:
        head = await sock.recv_exactly(5)
        content = await sock.recv_exactly(int.from_bytes(head[1:], "big") - 4)
        kind = head[:1]
        if kind == b"E":
            raise RefusedError(content)
        if kind not in b"SNK":
            return kind, content


async def pg_expect(sock: Socket, kind: bytes, start: bytes = b"") -> bytes:
    got, content = await pg_receive(sock)
    assert (got, content[: len(start)]) == (kind, start)
    return content[len(start) :]


async def pg_startup(sock: Socket, user: bytes) -> None:
    version = (3 << 16).to_bytes(4, "big")
    await sock.send(
        message(b"", version, b"user\0", user, b"\0", b"database\0", b"postgres\0", b"\0")
    )


OK, SASL, SASL_CONTINUE, SASL_FINAL = (number.to_bytes(4, "big") for number in (0, 10, 11, 12))


async def pg_login(sock: Socket, binding: bytes | None = None) -> None:
    """Authenticate with SCRAM-SHA-256-PLUS (RFC 5802).

    Each side proves that it knows the password. The proof is valid only for this TLS connection.
    """
    if binding is None:
        assert sock.tls is not None
        binding = sock.tls.channel_binding("tls-server-end-point")
    await pg_startup(sock, b"postgres")
    mechanism = b"SCRAM-SHA-256-PLUS"
    assert mechanism in (await pg_expect(sock, b"R", SASL)).split(b"\0")
    gs2_header = b"p=tls-server-end-point,,"
    client_first = b"n=,r=" + base64.b64encode(secrets.token_bytes(18))
    first = gs2_header + client_first
    await sock.send(message(b"p", mechanism, b"\0", len(first).to_bytes(4, "big"), first))
    server_first = await pg_expect(sock, b"R", SASL_CONTINUE)
    given = dict(part.split(b"=", 1) for part in server_first.split(b","))
    assert given[b"r"].startswith(client_first[5:])
    salted = hashlib.pbkdf2_hmac(
        "sha256", PASSWORD.encode(), base64.b64decode(given[b"s"]), int(given[b"i"])
    )
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    final = b"c=%s,r=%s" % (base64.b64encode(gs2_header + binding), given[b"r"])
    signed = b",".join([client_first, server_first, final])
    signature = hmac.digest(hashlib.sha256(client_key).digest(), signed, "sha256")
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    await sock.send(message(b"p", final, b",p=", base64.b64encode(proof)))
    verifier = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
    assert await pg_expect(sock, b"R", SASL_FINAL) == b"v=" + base64.b64encode(verifier)
    await pg_logged_in(sock)


async def pg_logged_in(sock: Socket) -> None:
    await pg_expect(sock, b"R", OK)
    await pg_expect(sock, b"Z", b"I")


async def pg_query(sock: Socket, query: str) -> list[bytes]:
    """Return the first column of a query's result."""
    await sock.send(message(b"Q", query.encode(), b"\0"))
    rows: list[bytes] = []
    while True:
        kind, content = await pg_receive(sock)
        if kind == b"Z":
            return rows
        if kind == b"D":
            rows.append(content[6 : 6 + int.from_bytes(content[2:6], "big")])
