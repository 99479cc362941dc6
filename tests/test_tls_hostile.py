"""A TLS 1.3 peer that keeps to the keys and to no rule: floods of what carries no data, and worse.

What OpenSSL allows without end may keep us busy, but no other task, and takes no memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from conftest import Authority, closing, raw_pair
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from test_tls import RawTLS

from trisock import ClientTLS, ServerTLS, Socket, TLSError

# RFC 8446, section 5.1
ALERT, HANDSHAKE, DATA, HEARTBEAT = 21, 22, 23, 24
# section 4
NEW_SESSION_TICKET, KEY_UPDATE, FINISHED, CERTIFICATE_REQUEST = 4, 24, 20, 13


def message(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


NEW_KEYS = message(KEY_UPDATE, b"\0")  # the sender's only
TICKET = message(NEW_SESSION_TICKET, bytes(8) + b"\x01x" + b"\x3e\x80" + bytes(16000) + b"\0\0")


def expand(secret: bytes, label: bytes, length: int) -> bytes:
    """RFC 8446, section 7.1: HKDF-Expand-Label, without a context."""
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
    return HKDFExpand(hashes.SHA384(), length, info).derive(secret)


class Forger:
    """Encrypts whatever it is told to, as records of TLS 1.3 with AES-256-GCM."""

    def __init__(self, secret: bytes) -> None:
        self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._key, self._iv = AESGCM(expand(secret, b"key", 32)), expand(secret, b"iv", 12)
        self._number = 0

    def record(self, kind: int, content: bytes) -> bytes:
        inner = content + bytes([kind])
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        nonce = bytes(
            a ^ b for a, b in zip(self._iv, self._number.to_bytes(12, "big"), strict=True)
        )
        self._number += 1
        sealed = header + self._key.encrypt(nonce, inner, header)
        if kind == HANDSHAKE and content[:1] == bytes([KEY_UPDATE]):
            self._use(expand(self._secret, b"traffic upd", 48))
        return sealed


@contextlib.asynccontextmanager
async def forging(
    role: str, authority: Authority, tmp_path: Path
) -> AsyncIterator[tuple[Socket, socket.socket, Forger]]:
    """Give one of ours in a role, its peer's plain socket, and what encrypts for the peer."""
    sock, raw = raw_pair()
    certificate = authority.issue("example.org")
    if role == "server":
        context = ssl.create_default_context(cadata=authority.pem.decode())
        options: dict[str, object] = {"server_hostname": "example.org"}
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        certificate.load_into(context)
        options = {"server_side": True}
    context.keylog_filename = str(tmp_path / "keys")
    peer = RawTLS(raw, context, **options)
    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                if role == "server":
                    await sock.starttls(ServerTLS(certificate))
                else:
                    await sock.starttls(ClientTLS("example.org", ca=authority.pem))
            assert sock.tls is not None
            assert sock.tls.cipher == "TLS_AES_256_GCM_SHA384"
            which = "CLIENT_TRAFFIC_SECRET_0" if role == "server" else "SERVER_TRAFFIC_SECRET_0"
            [secret] = [
                line.split()[2]
                for line in (tmp_path / "keys").read_text().splitlines()
                if line.startswith(which)
            ]
            yield sock, raw, Forger(bytes.fromhex(secret))


# ---- what OpenSSL has an end to ----


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        pytest.param(DATA, b"", "record too small", id="empty records"),
        pytest.param(ALERT, b"\x01\x5a", "too many warn alerts", id="warnings"),
        pytest.param(ALERT, b"\x01\x70", "the alert 'unrecognized name'", id="an alert"),
        pytest.param(HANDSHAKE, b"", "bad length", id="empty messages"),
        pytest.param(HANDSHAKE, message(FINISHED, bytes(48)), "unexpected", id="Finished"),
        pytest.param(HANDSHAKE, message(CERTIFICATE_REQUEST, b"\0\0\0"), "unexpected", id="ask"),
        pytest.param(HANDSHAKE, message(KEY_UPDATE, b"\2"), "bad key update", id="neither"),
        pytest.param(HEARTBEAT, b"\x01\xff\xff", "bad record type", id="heartbeat"),
        pytest.param(99, b"x", "bad record type", id="a type that is none"),
        pytest.param(DATA, bytes(16385), "data length too long", id="too large"),
        pytest.param(0, b"", "bad record type|unexpected", id="nothing but zeros"),
    ],
)
@pytest.mark.parametrize("role", ["server", "client"])
async def test_what_no_peer_sends_ends_the_connection(
    role: str, kind: int, content: bytes, words: str, authority: Authority, tmp_path: Path
) -> None:
    async with forging(role, authority, tmp_path) as (sock, raw, forger):
        raw.sendall(b"".join(forger.record(kind, content) for _ in range(40)))
        for _ in range(2):
            with pytest.raises(TLSError, match=words):
                await sock.recv()
        assert not sock.isopen()


async def test_a_server_takes_no_session_tickets(authority: Authority, tmp_path: Path) -> None:
    async with forging("server", authority, tmp_path) as (sock, raw, forger):
        raw.sendall(forger.record(HANDSHAKE, TICKET))
        with pytest.raises(TLSError, match="unexpected message"):
            await sock.recv()


async def test_a_message_is_not_collected_without_end(authority: Authority, tmp_path: Path) -> None:
    async with forging("client", authority, tmp_path) as (sock, raw, forger):
        claim = bytes([NEW_SESSION_TICKET]) + b"\xff\xff\xff"  # 16 MiB
        raw.sendall(forger.record(HANDSHAKE, claim + bytes(16000)))
        with pytest.raises(TLSError, match="excessive message size"):
            await sock.recv()


# ---- what it has no end to ----

FLOODS = [("server", NEW_KEYS), ("client", NEW_KEYS), ("client", TICKET)]
IDS = ["key updates for a server", "key updates for a client", "tickets for a client"]


def memory() -> int:
    """Return how many bytes of memory this process takes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("role", "content"), FLOODS, ids=IDS)
async def test_a_flood_stops_no_other_task_can_be_cancelled_and_takes_no_memory(
    role: str, content: bytes, authority: Authority, tmp_path: Path
) -> None:
    async with forging(role, authority, tmp_path) as (sock, raw, forger):
        # More than the kernel holds: nobody can have sent so many unless they were read.
        records, most = 0, max(50_000, 20_000_000 // (len(content) + 22))
        enough = threading.Event()

        def flood() -> None:
            nonlocal records
            while not enough.is_set() and records < most:
                records += 10
                raw.sendall(b"".join(forger.record(HANDSHAKE, content) for _ in range(10)))
            raw.sendall(forger.record(DATA, b"the end"))

        before = memory()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, flood)
            for number in range(1000, 5000, 1000):
                async with trio.open_nursery() as reading:
                    reading.start_soon(sock.recv)
                    while records < number:  # the task that the flood must not stop
                        await trio.lowlevel.checkpoint()
                    assert records < most
                    reading.cancel_scope.cancel()
            enough.set()
            assert await sock.recv() == b"the end"
        assert memory() - before < 20_000_000  # of 64 MB of tickets
