"""A TLS 1.3 peer that violates the protocol after the handshake: invalid records, and floods.

OpenSSL limits only some floods. Any other flood may keep the reading task busy, but it must not
block other tasks or consume much memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from helpers.memory import allocated
from helpers.pairs import closing, raw_pair
from helpers.raw_tls import RawTLS, handshake, raw_client_context
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock.testing import Authority, socket_pair

# RFC 8446, section 5.1
ALERT, HANDSHAKE, DATA, HEARTBEAT = 21, 22, 23, 24
# RFC 8446, section 4
NEW_SESSION_TICKET, KEY_UPDATE, FINISHED, CERTIFICATE_REQUEST = 4, 24, 20, 13


def message(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


NEW_KEYS = message(KEY_UPDATE, b"\0")  # updates only the sender's keys
TICKET = message(NEW_SESSION_TICKET, bytes(8) + b"\x01x" + b"\x3e\x80" + bytes(16000) + b"\0\0")


def expand(secret: bytes, label: bytes, length: int) -> bytes:
    """Derive bytes with HKDF-Expand-Label and an empty context (RFC 8446, section 7.1)."""
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
    return HKDFExpand(hashes.SHA384(), length, info).derive(secret)


class Forger:
    """Forges TLS 1.3 records with any content, which it encrypts with AES-256-GCM."""

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

    def records(self, kind: int, content: bytes, count: int) -> bytes:
        return b"".join(self.record(kind, content) for _ in range(count))


@contextlib.asynccontextmanager
async def forging(
    role: str, authority: Authority, tmp_path: Path
) -> AsyncIterator[tuple[Socket, socket.socket, Forger]]:
    """Yield the TLS client or server (``role``), its peer's raw socket, and the peer's Forger."""
    sock, raw = raw_pair()
    certificate = authority.certificate("example.org")
    if role == "server":
        context = raw_client_context(authority)
        tls: ServerTLS | ClientTLS = ServerTLS(certificate)
        options: dict[str, object] = {"server_hostname": "example.org"}
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        certificate.load_into(context)
        tls = authority.client_tls("example.org")
        options = {"server_side": True}
    context.keylog_filename = str(tmp_path / "keys")
    peer = RawTLS(raw, context, **options)
    with raw:
        async with closing(sock):
            info = await handshake(sock, tls, peer)
            assert info.cipher == "TLS_AES_256_GCM_SHA384"
            which = "CLIENT_TRAFFIC_SECRET_0" if role == "server" else "SERVER_TRAFFIC_SECRET_0"
            [secret] = [
                line.split()[2]
                for line in (tmp_path / "keys").read_text().splitlines()
                if line.startswith(which)
            ]
            # Close the file: the thread of the handshake may still refer to the context.
            context.keylog_filename = None  # type: ignore[assignment]
            yield sock, raw, Forger(bytes.fromhex(secret))


# ---- records that OpenSSL refuses ----


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        pytest.param(DATA, b"", "record too small", id="empty records"),
        pytest.param(ALERT, b"\x01\x5a", "too many warn alerts", id="warnings"),
        pytest.param(ALERT, b"\x01\x70", "the alert 'unrecognized name'", id="an alert"),
        pytest.param(HANDSHAKE, b"", "bad length", id="empty messages"),
        pytest.param(HANDSHAKE, message(FINISHED, bytes(48)), "unexpected", id="Finished"),
        pytest.param(
            HANDSHAKE,
            message(CERTIFICATE_REQUEST, b"\0\0\0"),
            "unexpected",
            id="CertificateRequest",
        ),
        pytest.param(
            HANDSHAKE, message(KEY_UPDATE, b"\2"), "bad key update", id="an unknown key update"
        ),
        pytest.param(HEARTBEAT, b"\x01\xff\xff", "bad record type", id="heartbeat"),
        pytest.param(99, b"x", "bad record type", id="an unknown type"),
        pytest.param(DATA, bytes(16385), "data length too long", id="too large"),
        pytest.param(0, b"", "bad record type|unexpected", id="padding only"),
    ],
)
@pytest.mark.parametrize("role", ["server", "client"])
async def test_an_invalid_record_breaks_the_connection(
    role: str, kind: int, content: bytes, words: str, authority: Authority, tmp_path: Path
) -> None:
    if ssl.OPENSSL_VERSION_INFO >= (3, 2):
        words += "|a record was invalid"  # newer versions say this instead of the reason
    async with forging(role, authority, tmp_path) as (sock, raw, forger):
        raw.sendall(forger.records(kind, content, 40))
        for _ in range(2):
            with pytest.raises(TLSError, match=words):
                await sock.recv()
        assert not sock.isopen()


async def test_a_server_refuses_session_tickets(authority: Authority, tmp_path: Path) -> None:
    async with forging("server", authority, tmp_path) as (sock, raw, forger):
        raw.sendall(forger.record(HANDSHAKE, TICKET))
        with pytest.raises(TLSError, match="unexpected message"):
            await sock.recv()


async def test_the_size_of_a_handshake_message_is_bounded(
    authority: Authority, tmp_path: Path
) -> None:
    async with forging("client", authority, tmp_path) as (sock, raw, forger):
        claim = bytes([NEW_SESSION_TICKET]) + b"\xff\xff\xff"  # announces 16 MiB
        raw.sendall(forger.record(HANDSHAKE, claim + bytes(16000)))
        with pytest.raises(TLSError, match="excessive message size"):
            await sock.recv()


# ---- floods that OpenSSL does not limit ----

FLOODS = [("server", NEW_KEYS), ("client", NEW_KEYS), ("client", TICKET)]
IDS = ["key updates for a server", "key updates for a client", "tickets for a client"]


def memory() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("role", "content"), FLOODS, ids=IDS)
async def test_a_flood_blocks_no_other_task_and_uses_little_memory(
    role: str, content: bytes, authority: Authority, tmp_path: Path
) -> None:
    async with forging(role, authority, tmp_path) as (sock, raw, forger):
        # The kernel cannot buffer all records (``most``), so the flood waits until some are read.
        records, most = 0, max(50_000, 20_000_000 // (len(content) + 22))
        enough = threading.Event()

        def flood() -> None:
            nonlocal records
            while not enough.is_set() and records < most:
                records += 10
                raw.sendall(forger.records(HANDSHAKE, content, 10))
            raw.sendall(forger.record(DATA, b"the end"))

        before = memory()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, flood)
            for number in range(1000, 5000, 1000):
                async with trio.open_nursery() as reading:
                    reading.start_soon(sock.recv)
                    while records < number:  # this task must not be blocked
                        await trio.lowlevel.checkpoint()
                    assert records < most
                    reading.cancel_scope.cancel()
            enough.set()
            assert await sock.recv() == b"the end"
        assert memory() - before < 20_000_000  # the tickets have at least 64 MB


# ---- all ways to read have the same bounds ----

REQUEST = message(KEY_UPDATE, b"\1")  # requests a response


async def peeking(sock: Socket) -> None:
    while not await sock.peek():
        assert sock.isopen()


READERS: dict[str, Callable[[Socket], Awaitable[object]]] = {
    "peek": peeking,
    "peek and wait": lambda sock: sock.peek(wait=True),
    "skip_until": lambda sock: sock.skip_until(b"the end"),
    "recv": Socket.recv,
    "recv_exactly": lambda sock: sock.recv_exactly(1),
}
USUAL_READERS = [
    pytest.param(read, id=name, marks=() if name in ("peek", "recv") else pytest.mark.rare)
    for name, read in READERS.items()
]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
async def test_every_read_responds_to_key_updates(
    read: Callable[[Socket], Awaitable[object]], authority: Authority, tmp_path: Path
) -> None:
    async with forging("server", authority, tmp_path) as (sock, raw, forger):
        flood = forger.records(HANDSHAKE, REQUEST, 1000)
        raw.sendall(flood + forger.record(DATA, b"the end"))
        await read(sock)
        received = 0
        while received < 990 * 22:  # until we have responded to almost all requests
            await trio.lowlevel.wait_readable(raw)
            received += len(raw.recv(1_000_000))


@pytest.mark.parametrize("read", USUAL_READERS)
async def test_the_responses_of_every_read_are_bounded(
    read: Callable[[Socket], Awaitable[object]], authority: Authority, tmp_path: Path
) -> None:
    async with forging("server", authority, tmp_path) as (sock, raw, forger):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        # The send queue and the kernel have room for at most half of the responses.
        data = forger.records(HANDSHAKE, REQUEST, 10_000)

        def flood() -> None:
            with contextlib.suppress(OSError):
                raw.sendall(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, flood)
            with contextlib.suppress(TLSError, AssertionError):
                await read(sock)
            with pytest.raises(TLSError, match="asks for responses but does not read them"):
                await sock.recv()
            sock.abort()


@pytest.mark.parametrize("read", USUAL_READERS)
async def test_every_read_lets_other_tasks_run_between_empty_records(
    read: Callable[[Socket], Awaitable[object]], authority: Authority, tmp_path: Path
) -> None:
    async with forging("server", authority, tmp_path) as (sock, raw, forger):
        flood = forger.records(HANDSHAKE, NEW_KEYS, 2000)
        raw.sendall(flood + forger.record(DATA, b"the end"))
        passes = 0

        async def count() -> None:
            nonlocal passes
            while True:
                await trio.lowlevel.checkpoint()
                passes += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await read(sock)
            nursery.cancel_scope.cancel()
        assert passes >= 2000 / 64


async def test_stoptls_finds_unread_data_after_records_without_data(
    authority: Authority, tmp_path: Path
) -> None:
    async with forging("server", authority, tmp_path) as (sock, raw, forger):
        first = forger.record(DATA, b"CCC\n")
        flood = forger.records(HANDSHAKE, NEW_KEYS, 500)
        raw.sendall(first + flood + forger.record(DATA, b"more"))
        assert await sock.recv() == b"CCC\n"
        with pytest.raises(RuntimeError, match="decrypted bytes are unread") as caught:
            await sock.stoptls()
        assert sock._connection.caused(caught.value)  # the peer caused the error, not the program
        assert await sock.recv() == b"more"


@pytest.mark.skipif(not allocated(), reason="malloc does not report its allocations")
async def test_an_idle_connection_frees_memory_after_a_burst() -> None:
    pairs = [await socket_pair(tls=True) for _ in range(10)]
    async with closing(*(sock for pair in pairs for sock in pair)):

        async def send(client: Socket, size: int) -> None:
            for _ in range(0, size, 10_000):
                await client.send(bytes(10_000))  # small sends keep the client's BIO small

        async def burst(size: int) -> int:
            for client, server in pairs:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send, client, size)
                    await trio.testing.wait_all_tasks_blocked()
                    await server.recv_exactly(size)
            return allocated()

        before = await burst(10_000)
        after = await burst(300_000)
        assert (after - before) / len(pairs) < 30_000
