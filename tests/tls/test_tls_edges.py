"""Parts of TLS that a conversation meets seldom, called by themselves."""

from __future__ import annotations

import contextlib
import os
import ssl

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import closing, tcp_pair, tls_pair
from trisock import Certificate, ClientTLS, ServerTLS, TLSError, _fork
from trisock._net import connection as _connection
from trisock._net.tls_stream import SendState, TLSStream
from trisock._tls import certificate as certificate_module
from trisock._tls import engine as engine_module
from trisock._tls import roles
from trisock._tls.client_hello import ClientHello
from trisock._tls.records import IncomingCiphertext

RECORD = b"\x17\x03\x03\x00\x02ab"


def test_unread_ciphertext_is_given_in_the_order_it_came() -> None:
    arrived = IncomingCiphertext()
    arrived.write(RECORD[:3])
    arrived.write(RECORD[3:] + RECORD)
    assert arrived.pending == 2 * len(RECORD)
    assert bytes(arrived.take()) == RECORD
    assert bytes(arrived.take()) == RECORD
    assert not arrived.pending


def test_the_rest_of_a_split_record_is_one_piece() -> None:
    arrived = IncomingCiphertext()
    arrived.write(RECORD[:3])
    assert bytes(arrived.take()) == RECORD[:3]
    arrived.write(RECORD[3:])
    data, count = arrived.take_many()
    assert (bytes(data), count) == (RECORD[3:], 1)


class Peer:
    """An SSLObject whose handshake says what it is told to."""

    def __init__(self, says: Exception | None) -> None:
        self.says = says

    def do_handshake(self) -> None:
        if self.says is not None:
            raise self.says


async def test_an_error_of_another_connection_is_tried_again(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        tls = a._connection.tls
        assert tls is not None
        tls.engine._ssl_object = Peer(ssl.SSLWantReadError())  # type: ignore[assignment]
        assert tls.engine._retry(ssl.SSLError("of another"), lambda: 5) == 5

        def fails() -> int:
            error = ssl.SSLError(1, "of its own")
            error.reason = "BAD_RECORD_TYPE"
            raise error

        with pytest.raises(TLSError):
            tls.engine._retry(ssl.SSLError("of another"), fails)


async def test_an_answer_that_fails_keeps_what_was_decrypted(
    client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        tls = a._connection.tls
        assert tls is not None

        def flush(self: TLSStream) -> None:
            raise TLSError("too many responses")

        monkeypatch.setattr(TLSStream, "_flush_responses", flush)
        await b.send(b"data")
        tls.engine.incoming.write(await a._connection.transport.receive())
        tls.engine.outgoing.write(b"a response")
        assert await a.recv() == b"data"
        with pytest.raises(TLSError):
            await a.recv()


async def test_an_end_while_an_answer_waits_is_an_error(
    client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        assert a._connection.tls is not None
        a._connection.tls.engine.put_back(b"half a response")

        async def ended(self: TLSStream) -> bool:
            await trio.lowlevel.checkpoint()
            return False

        monkeypatch.setattr(TLSStream, "_flush_responses", lambda self: None)
        monkeypatch.setattr(TLSStream, "_fill", ended)
        with pytest.raises(TLSError, match="without close_notify"):
            await a.recv()


async def test_a_reader_does_not_spin_on_responses_that_cannot_be_sent(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b), trio.open_nursery() as nursery:
        tls = a._connection.tls
        assert tls is not None
        tls.engine.put_back(b"a response")
        tls.send_state = SendState.OVER
        nursery.start_soon(a.recv)
        await trio.testing.wait_all_tasks_blocked()  # a loop that spins would never be blocked
        nursery.cancel_scope.cancel()


async def test_records_read_ahead_are_answered(
    client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"one")
        tls = a._connection.tls
        assert tls is not None
        tls.engine.incoming.write(await a._connection.transport.receive())
        tls.engine.outgoing.write(b"a response")
        answered: list[bytes] = []
        monkeypatch.setattr(
            TLSStream,
            "_flush_responses",
            lambda self: answered.append(self.engine.outgoing.read()),
        )
        assert tls.receive_pending()[-1] == b"one"
        assert answered == [b"a response"]


async def test_after_a_fork_no_way_into_tls_is_open(
    client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"for the parent")
        tls = a._connection.tls
        assert tls is not None
        tls.engine.incoming.write(await a._connection.transport.receive())
        with monkeypatch.context() as patch:
            patch.setattr(_fork, "count", _fork.count + 1)
            assert not tls.engine.can_read  # otherwise stoptls would decrypt forever
            with pytest.raises(trio.BrokenResourceError, match="fork first"):
                await tls.send_ciphertext(b"of the parent")
            assert tls.final_bytes() == b""
            with pytest.raises(trio.BrokenResourceError, match="fork first"):
                tls.engine.check()
            with pytest.raises(trio.BrokenResourceError, match="fork first"):
                await a.recv()
            assert tls.final_bytes() == b""


async def test_a_resumed_certificate_that_cannot_be_read_is_a_tls_error(
    authority: Authority, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(certificate: bytes) -> bool:
        raise ValueError("the certificate cannot be read")

    monkeypatch.setattr(ssl.SSLObject, "session_reused", property(lambda self: True))
    monkeypatch.setattr(engine_module, "has_expired", unreadable)
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        async def serve() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await b.starttls(server_tls)

        nursery.start_soon(serve)
        with pytest.raises(TLSError, match="cannot be read"):
            await a.starttls(ClientTLS("example.org", ca=authority.pem))


async def test_the_search_for_an_alert_has_an_end(
    client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_MAX_RECORDS_BEFORE_ALERT", 1)
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        for each in (b"one", b"two", b"three"):
            await b.send(each)
        await trio.lowlevel.wait_readable(a.fileno())
        a._connection.raise_pending_alert()
        assert await a.recv_exactly(11) == b"onetwothree"


def test_a_path_that_is_too_long_is_not_quoted() -> None:
    path = "a/" * 3000
    with pytest.raises(OSError, match="characters") as caught:
        Certificate.from_files(path)
    assert path not in str(caught.value)


def test_certificates_work_where_proc_cannot_be_opened(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def without_proc(path: str, flags: int, *args: int) -> int:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return really_open(path, flags, *args)

    monkeypatch.setattr(certificate_module.os, "open", without_proc)
    ServerTLS(authority.issue("localhost"))


def test_out_of_descriptors_a_client_gets_the_common_context(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = roles.resolve_role(
        ServerTLS(authority.issue("localhost")),
        server_hostname=None,
        connected_host=None,
        side="server",
    )
    assert role.contexts is not None

    def broken(chosen: object) -> ssl.SSLContext:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(role.contexts, "_build", broken)
    common = role.contexts.choose(ClientHello(b"localhost", supports_tickets=True))
    assert role.contexts.choose(ClientHello(b"localhost", supports_tickets=False)) is common
