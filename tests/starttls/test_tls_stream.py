"""Each test reaches a code path of TLSStream that real peers rarely reach."""

from __future__ import annotations

import contextlib
import ssl

import pytest
import trio
import trio.testing

from helpers.pairs import closing
from trisock import ClientTLS, ServerTLS, Socket, TLSError, _fork
from trisock._net import connection as _connection
from trisock._net.tls_stream import SendState, TLSStream
from trisock._tls import engine as engine_module
from trisock.testing import socket_pair


@pytest.fixture
def tls(a: Socket) -> TLSStream:
    """The client's TLSStream."""
    assert a._connection.tls is not None
    return a._connection.tls


async def read_ahead(sock: Socket) -> None:
    """Read ciphertext from the kernel without decrypting it."""
    tls = sock._connection.tls
    assert tls is not None
    tls.engine.incoming.write(await sock._connection.transport.receive())


class HandshakeWaiting:
    """An SSLObject whose handshake needs more ciphertext."""

    def do_handshake(self) -> None:
        raise ssl.SSLWantReadError


async def test_a_call_is_retried_after_another_connections_error(tls: TLSStream) -> None:
    tls.engine._ssl_object = HandshakeWaiting()  # type: ignore[assignment]
    assert tls.engine._retry(ssl.SSLError("of another"), lambda: 5) == 5

    def fails() -> int:
        error = ssl.SSLError(1, "of its own")
        error.reason = "BAD_RECORD_TYPE"
        raise error

    with pytest.raises(TLSError):
        tls.engine._retry(ssl.SSLError("of another"), fails)


async def test_a_response_that_fails_does_not_lose_decrypted_data(
    a: Socket, b: Socket, tls: TLSStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(self: TLSStream) -> None:
        raise TLSError("too many responses")

    monkeypatch.setattr(TLSStream, "_flush_responses", flush)
    await b.send(b"data")
    await read_ahead(a)
    tls.engine.outgoing.write(b"a response")
    assert await a.recv() == b"data"
    with pytest.raises(TLSError):
        await a.recv()


async def test_eof_before_a_response_is_sent_raises_tls_error(
    a: Socket, tls: TLSStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ended(self: TLSStream) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(TLSStream, "_flush_responses", lambda self: None)
    monkeypatch.setattr(TLSStream, "_fill", ended)
    tls.engine.put_back(b"half a response")
    with pytest.raises(TLSError, match="without close_notify"):
        await a.recv()


async def test_a_reader_with_unsendable_responses_does_not_spin(a: Socket, tls: TLSStream) -> None:
    tls.engine.put_back(b"a response")
    tls.send_state = SendState.OVER
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.recv)
        await trio.testing.wait_all_tasks_blocked()  # never returns if the reader spins
        nursery.cancel_scope.cancel()


async def test_receive_pending_sends_queued_responses(
    a: Socket, b: Socket, tls: TLSStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses: list[bytes] = []

    def flush(self: TLSStream) -> None:
        responses.append(self.engine.outgoing.read())

    monkeypatch.setattr(TLSStream, "_flush_responses", flush)
    await b.send(b"one")
    await read_ahead(a)
    tls.engine.outgoing.write(b"a response")
    assert tls.receive_pending()[-1] == b"one"
    assert responses == [b"a response"]


async def test_after_a_fork_every_use_of_tls_fails(
    a: Socket, b: Socket, tls: TLSStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await b.send(b"for the parent")
    await read_ahead(a)
    with monkeypatch.context() as patch:
        patch.setattr(_fork, "count", _fork.count + 1)
        assert not tls.engine.can_read  # otherwise stoptls would decrypt forever
        with pytest.raises(trio.BrokenResourceError, match="fork before TLS begins"):
            await tls.send_ciphertext(b"of the parent")
        assert tls.final_bytes() == b""
        with pytest.raises(trio.BrokenResourceError, match="fork before TLS begins"):
            tls.engine.check()
        with pytest.raises(trio.BrokenResourceError, match="fork before TLS begins"):
            await a.recv()
        assert tls.final_bytes() == b""


async def test_an_unreadable_certificate_of_a_resumed_session_raises_tls_error(
    client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(certificate: bytes) -> bool:
        raise ValueError("the certificate cannot be read")

    monkeypatch.setattr(ssl.SSLObject, "session_reused", property(lambda self: True))
    monkeypatch.setattr(engine_module, "has_expired", unreadable)
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        async def serve() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await b.starttls(server_tls)

        nursery.start_soon(serve)
        with pytest.raises(TLSError, match="cannot be read"):
            await a.starttls(client_tls)


async def test_the_search_for_an_alert_is_bounded(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_MAX_RECORDS_BEFORE_ALERT", 1)
    for each in (b"one", b"two", b"three"):
        await b.send(each)
    await trio.lowlevel.wait_readable(a.fileno())
    a._connection.raise_pending_alert()
    assert await a.recv_exactly(11) == b"onetwothree"


async def test_a_response_that_fails_during_a_send_ends_sending(
    a: Socket, tls: TLSStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trio.lowlevel.cancel_shielded_checkpoint

    async def reader_fails() -> None:
        tls.send_state = SendState.OVER  # as ``_send_nowait`` does when a response fails
        await checkpoint()

    with monkeypatch.context() as patched:
        patched.setattr(trio.lowlevel, "cancel_shielded_checkpoint", reader_fails)
        await a.send(b"a message")
    assert tls.send_state is SendState.OVER
    assert tls.final_bytes() == b""


async def test_received_records_are_returned_after_the_stream_is_closed(
    a: Socket, b: Socket, tls: TLSStream
) -> None:
    await b.send(b"data")
    await read_ahead(a)
    await a.stream.aclose()
    tls.engine.outgoing.write(b"a response")
    assert tls.receive_pending() == [b"data"]
    with pytest.raises(trio.ClosedResourceError):
        await a.recv()
