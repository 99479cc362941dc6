"""TLSEngine's states, tested without I/O and with the ciphertext split at any point."""

from __future__ import annotations

import re
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import trisock
from trisock import Address, ClientTLS, ServerTLS, TLSError, TLSInfo
from trisock._tls.engine import TRANSITIONS, TLSEngine, TLSState
from trisock._tls.roles import resolve_role
from trisock.testing import Authority, serving

PEER = Address("192.0.2.1", 25)


class Side:
    """One end of a connection: its engine, and the errors that the engine has reported."""

    def __init__(self, tls: ClientTLS | ServerTLS, side: str) -> None:
        role = resolve_role(tls, server_hostname=None, connected_host=None, side=side)
        self.errors: list[trio.BrokenResourceError] = []
        self.engine = TLSEngine(role, lambda: PEER, self.remember)
        self.bio = ssl.MemoryBIO()
        self.engine.wrap_bio(self.bio, ssl.MemoryBIO())
        self.info: TLSInfo | None = None

    def remember(self, error: trio.BrokenResourceError) -> trio.BrokenResourceError:
        self.errors.append(error)
        return error

    def handshake_step(self, ciphertext: bytes) -> bytes:
        """Continue the handshake with ciphertext from the peer, and return the data to send."""
        self.bio.write(ciphertext)
        try:
            self.engine.do_handshake()
        except ssl.SSLWantReadError:
            return self.engine.data_to_send()
        data = self.engine.data_to_send() if not self.engine.server_side else b""
        if self.info is None:
            self.info = self.engine.finish_handshake()
        return data


def connected(
    client_tls: ClientTLS, server_tls: ServerTLS, split: Callable[[bytes], list[bytes]]
) -> tuple[Side, Side]:
    """Return a client and a server after the handshake. ``split`` cuts each flight into parts."""
    client, server = Side(client_tls, "client"), Side(server_tls, "server")
    flight, receiver, sender = client.handshake_step(b""), server, client
    while client.info is None or server.info is None:
        response = b"".join(receiver.handshake_step(piece) for piece in split(flight))
        flight, receiver, sender = response, sender, receiver
    return client, server


@pytest.fixture
def sides(client_tls: ClientTLS, server_tls: ServerTLS) -> tuple[Side, Side]:
    return connected(client_tls, server_tls, lambda data: [data])


class Failing:
    """An SSLObject whose handshake raises these errors, one in each call."""

    def __init__(self, *errors: ssl.SSLError) -> None:
        self._errors = iter(errors)

    def do_handshake(self) -> None:
        raise next(self._errors)


def ssl_error(library: str, reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[{library}: {reason}] ...")
    error.library, error.reason = library, reason
    return error


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        # As with OpenSSL 3.6: after plain text, only the first call fails.
        ([("SSL", "WRONG_VERSION_NUMBER"), None], "the peer does not speak TLS"),
        ([("EVP", "DECODE_ERROR"), ("SSL", "INTERNAL_ERROR")], "decode error"),
    ],
    ids=["plain text", "both calls fail"],
)
def test_a_failed_handshake_raises_its_first_error_at_once(
    errors: list[tuple[str, str] | None], text: str, client_tls: ClientTLS
) -> None:
    client = Side(client_tls, "client")
    raised = [ssl_error(*each) if each else ssl.SSLWantReadError() for each in errors]
    client.engine._ssl_object = Failing(*raised)  # type: ignore[assignment]
    with pytest.raises(TLSError, match=text):
        client.engine.do_handshake()
    assert client.engine.state is TLSState.FAILED


def read_all(engine: TLSEngine, ciphertext: bytes) -> bytes | None:
    """Decrypt ciphertext. Return the data, or ``None`` if there is no data and no close_notify."""
    engine.incoming.write(ciphertext)
    found = None
    while (data := engine.read()) is not None:
        found = (found or b"") + data
        if not data:
            break
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 6, 100])
def test_a_handshake_and_data_can_be_split_anywhere(
    client_tls: ClientTLS, server_tls: ServerTLS, size: int
) -> None:
    def split(data: bytes) -> list[bytes]:
        return [data[i : i + size] for i in range(0, len(data), size)]

    client, server = connected(client_tls, server_tls, split)
    assert client.info is not None
    assert client.info.version == "TLSv1.3"
    assert server.info is not None
    assert server.info.server_hostname == "example.org"
    message = bytes(range(256)) * 100  # two records
    client.engine.write(message)
    got = b""
    for piece in split(client.engine.data_to_send()):
        got += read_all(server.engine, piece) or b""
    assert got == message


def test_every_split_of_two_records_gives_the_same_bytes(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = connected(client_tls, server_tls, lambda data: [data])
    client.engine.write(b"one")
    length = len(client.engine.data_to_send()) * 2
    for cut in range(length + 1):
        client, server = connected(client_tls, server_tls, lambda data: [data])
        client.engine.write(b"one")
        client.engine.write(b"two")
        ciphertext = client.engine.data_to_send()
        first = read_all(server.engine, ciphertext[:cut]) or b""
        assert first + (read_all(server.engine, ciphertext[cut:]) or b"") == b"onetwo"


def test_session_tickets_are_sent_with_the_first_data(sides: tuple[Side, Side]) -> None:
    _, server = sides
    assert server.engine.unsent == 0
    server.engine.write(b"hello")
    only_hello = server.engine.unsent
    assert len(server.engine.data_to_send()) > only_hello  # the tickets are sent first


def test_unsent_ciphertext_is_sent_first(sides: tuple[Side, Side]) -> None:
    client, server = sides
    client.engine.write(b"one")
    ciphertext = client.engine.data_to_send()
    client.engine.put_back(ciphertext[10:])
    client.engine.write(b"two")
    assert client.engine.unsent > len(ciphertext) - 10
    assert read_all(server.engine, ciphertext[:10] + client.engine.data_to_send()) == b"onetwo"
    assert client.engine.unsent == 0


def test_a_clean_close_goes_through_every_closing_state(sides: tuple[Side, Side]) -> None:
    client, server = sides
    assert client.engine.state is server.engine.state is TLSState.OPEN
    with pytest.raises(ssl.SSLWantReadError):
        client.engine.unwrap()
    assert client.engine.state is TLSState.CLOSING
    plain_text = b"plain text"
    assert read_all(server.engine, client.engine.data_to_send()) == b""
    assert server.engine.state is TLSState.PEER_CLOSED
    server.engine.incoming.write(plain_text)
    assert not server.engine.can_read
    assert server.engine.read() == b""  # EOF, on every call
    server.engine.unwrap()
    assert server.engine.state is TLSState.CLOSED
    assert server.engine.incoming.take_all() == plain_text
    client.bio.write(server.engine.data_to_send())
    client.engine.unwrap()
    assert client.engine.state is TLSState.CLOSED


def test_read_batch_does_not_consume_bytes_after_close_notify(sides: tuple[Side, Side]) -> None:
    client, server = sides
    client.engine.write(b"last")
    client.engine.close_notify()
    server.engine.incoming.write(client.engine.data_to_send() + b"plain text")
    records: list[bytes] = []
    server.engine.read_batch(records, 10)
    assert records == [b"last"]
    assert server.engine.state is TLSState.PEER_CLOSED
    assert server.engine.incoming.take_all() == b"plain text"


@pytest.mark.parametrize("call", ["read", "write", "unwrap", "do_handshake"])
def test_a_failed_engine_raises_a_fresh_copy_of_its_failure(
    sides: tuple[Side, Side], call: str
) -> None:
    client, server = sides
    client.engine.write(b"data")
    ciphertext = bytearray(client.engine.data_to_send())
    ciphertext[-1] ^= 1
    with pytest.raises(TLSError, match="forged or damaged") as first:
        read_all(server.engine, bytes(ciphertext))
    assert server.engine.state is TLSState.FAILED
    assert server.engine.unsent  # the alert is queued
    arguments: tuple[Any, ...] = (b"data",) if call == "write" else ()
    with pytest.raises(TLSError, match="forged or damaged") as again:
        getattr(server.engine, call)(*arguments)
    assert again.value is not first.value
    assert server.errors == [first.value, again.value]


def test_a_failed_handshake_names_the_peer_and_queues_an_alert(
    server_tls: ServerTLS, authority: Authority
) -> None:
    client = Side(authority.client_tls("other.example"), "client")
    server = Side(server_tls, "server")
    flight = server.handshake_step(client.handshake_step(b""))
    with pytest.raises(TLSError, match=r"TLS handshake with 'other\.example' \(192\.0\.2\.1:25\)"):
        client.handshake_step(flight)
    assert client.engine.state is TLSState.FAILED
    with pytest.raises(TLSError, match="alert"):
        server.handshake_step(client.engine.data_to_send())


def test_SSLStream_uses_only_five_attributes_of_the_engine(  # noqa: N802
    monkeypatch: pytest.MonkeyPatch, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """If a later version of Trio uses another attribute, TLSEngine has to provide it."""
    used: set[str] = set()
    real = TLSEngine.__getattribute__

    def recorded(self: TLSEngine, name: str) -> object:
        if sys._getframe(1).f_globals["__name__"] == "trio._ssl":
            used.add(name)
        return real(self, name)

    async def main() -> None:
        async def echo(sock: trisock.Socket) -> None:
            await sock.send(await sock.recv())
            await sock.stoptls()

        async with serving(echo, tls=server_tls) as s:
            sock = await s.connect()
            await sock.send(b"x")
            assert await sock.recv() == b"x"
            await sock.stoptls()

    monkeypatch.setattr(TLSEngine, "__getattribute__", recorded)
    trio.run(main)
    assert used == {"wrap_bio", "do_handshake", "unwrap", "server_side", "version"}


def test_the_allowed_transitions_match_the_docs() -> None:
    docs = Path(__file__).parents[2] / "docs/design.md"
    rows = re.findall(r"^\| ([A-Z_, ]+) \| [^|]+ \| ([A-Z_]+) \|", docs.read_text(), re.MULTILINE)
    assert {(before, after) for states, after in rows for before in states.split(", ")} == {
        (before.name, after.name) for before, follow in TRANSITIONS.items() for after in follow
    }


@pytest.mark.parametrize("before", TLSState)
@pytest.mark.parametrize("after", TLSState)
def test_an_engine_makes_only_listed_transitions(
    client_tls: ClientTLS, before: TLSState, after: TLSState
) -> None:
    engine = Side(client_tls, "client").engine
    engine.state = before
    if after is before or after in TRANSITIONS[before]:
        engine._enter(after)
        assert engine.state is after
    else:
        with pytest.raises(AssertionError, match=f"{before} cannot become {after}"):
            engine._enter(after)
