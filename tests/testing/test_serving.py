"""trisock.testing.serving: a handler behind a real server, and what it raises."""

from __future__ import annotations

import contextlib
import logging
import ssl
import sys
from pathlib import Path

import pytest
import trio

import trisock
from helpers.server import echo
from trisock import Socket, TLSError
from trisock.testing import Authority, serving

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

SERVER_LOG = "trisock.server"


async def wait_for_eof(sock: Socket) -> None:
    assert await sock.recv() == b""


async def fail(sock: Socket) -> None:
    raise ValueError(f"what came was {await sock.recv_line()!r}")


async def sleep(sock: Socket) -> None:
    await trio.sleep_forever()


# ---- connecting ----


async def test_a_client_talks_to_the_handler() -> None:
    async with serving(echo) as s:
        client = await s.connect()
        await client.send(b"hello\n")
        assert await client.recv_line() == b"hello"
    assert s.server.closing.is_set()
    with pytest.raises(ConnectionRefusedError):
        await s.connect()


async def test_the_handler_runs_when_connect_returns() -> None:
    async with serving(wait_for_eof) as s:
        for number in range(1, 20):
            await s.connect()
            assert len(s.server.connections) == number
        assert await s.server.broadcast(b"hello") == 19


async def test_connect_returns_when_the_server_is_full() -> None:
    async with serving(wait_for_eof, max_connections=1) as s:
        first, second = await s.connect(), await s.connect()
        assert [sock.getpeer() for sock in s.server.connections] == [first.getlocal()]
        await first.close()
        while s.server.stats().accepted < 2:
            await trio.lowlevel.checkpoint()
        assert [sock.getpeer() for sock in s.server.connections] == [second.getlocal()]


async def test_connect_returns_while_another_task_never_blocks(autojump_clock: object) -> None:
    async def spin() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(spin)
        trio.lowlevel.current_clock().rate = 50  # type: ignore[attr-defined]
        async with serving(echo) as s:
            await s.connect()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "::1", "127.0.0.1"])
async def test_connect_finds_the_server_on_any_host(host: str | None) -> None:
    async with serving(echo, host=host) as s:
        client = await s.connect(local_address=None)
        assert client.getpeer().port == s.server.port


async def test_a_unix_listener_is_served_too(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = await trisock.listen_unix(path)
    async with serving(echo, port_or_listener=listener) as s:
        client = await s.connect()
        assert client.getpeer() == (str(path), 0)


# ---- TLS ----


@pytest.mark.parametrize("name", ["localhost", "example.org", "*.example.org", "127.0.0.1"])
async def test_the_client_trusts_the_servers_authority_by_default(name: str) -> None:
    async with serving(echo, tls=Authority().server_tls(name)) as s:
        client = await s.connect()
        assert client.istls()
        assert (await s.connect(tls=None)).tls is None


async def test_connect_trusts_a_server_with_a_list_of_certificates(authority: Authority) -> None:
    async with serving(echo, tls=[authority.certificate()]) as s:
        assert (await s.connect()).istls()


async def test_the_clients_role_can_be_given(authority: Authority) -> None:
    stranger = Authority()
    async with serving(echo, tls=authority.server_tls()) as s:
        with pytest.raises(TLSError, match="unable to get local issuer certificate"):
            await s.connect(tls=stranger.client_tls())
        assert (await s.connect(tls=authority.client_tls())).istls()


async def test_an_unknown_certificate_needs_a_role_for_the_client(authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.certificate().load_into(context)
    async with serving(echo, tls=context) as s:
        with pytest.raises(ValueError, match="so tls must be given"):
            await s.connect()
        assert (await s.connect(tls=authority.client_tls())).istls()


async def test_a_certificate_of_no_authority_is_unknown(other_certificate: object) -> None:
    async with serving(echo, tls=other_certificate) as s:
        with pytest.raises(ValueError, match="so tls must be given"):
            await s.connect()


@pytest.fixture
def other_certificate() -> trisock.Certificate:
    from helpers.certificates import CertificateAuthority

    return CertificateAuthority("unknown to trisock.testing").issue("localhost")


# ---- the end of the block ----


@pytest.mark.parametrize("tls", [False, True])
async def test_handlers_read_eof_before_the_server_stops(tls: bool, authority: Authority) -> None:
    stopping = []

    async def handler(sock: Socket) -> None:
        assert await sock.recv() == b"last words"
        assert await sock.recv() == b""
        stopping.append(s.server.closing.is_set())

    async with serving(handler, tls=authority.server_tls() if tls else None) as s:
        await (await s.connect()).send(b"last words")
    assert stopping == [False]
    assert s.server.stats().peer_errors == 0


async def test_a_clients_last_connection_reaches_its_handler() -> None:
    received = []

    async def handler(sock: Socket) -> None:
        received.append(await sock.recv_line())

    async with serving(handler) as s:
        async with await trisock.connect("127.0.0.1", s.server.port) as client:
            await client.send(b"hello\n")
    assert received == [b"hello"]


async def test_handlers_may_run_for_five_seconds_after_the_block(autojump_clock: object) -> None:
    ended = []

    async def handler(sock: Socket) -> None:
        await trio.sleep(4.9)
        ended.append(sock)

    async with serving(handler) as s:
        await s.connect()
    assert len(ended) == 1


async def test_a_handler_that_hangs_fails_the_test(autojump_clock: object) -> None:
    with pytest.raises(AssertionError, match="still ran 5 seconds after") as caught:
        async with serving(sleep) as s:
            client = await s.connect()
    assert str(client.getlocal()) in str(caught.value)


async def test_the_error_names_ten_hanging_peers(autojump_clock: object) -> None:
    with pytest.raises(AssertionError, match=r"peers: (127.0.0.1:\d+, ){10}\.\.\."):
        async with serving(sleep) as s:
            for _ in range(11):
                await s.connect()


async def test_the_block_can_stop_an_endless_handler() -> None:
    async with serving(sleep) as s:
        await s.connect()
        s.server.stop(grace=0)


async def test_a_cancelled_block_cancels_the_handlers() -> None:
    with trio.CancelScope() as scope:
        async with serving(sleep) as s:
            client = await s.connect()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not client.isopen()
    assert s.server.stats().active == 0


# ---- what is raised ----


async def test_the_handlers_exception_is_raised_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ValueError, match="what came was b'hello'"):
        async with serving(fail) as s:
            await (await s.connect()).send(b"hello\n")
    assert [each.levelname for each in caplog.records] == ["ERROR"]


async def test_errors_of_several_handlers_are_a_group() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with serving(fail) as s:
            for text in (b"one\n", b"two\n"):
                await (await s.connect()).send(text)
    texts = [str(each) for each in caught.value.exceptions]
    assert sorted(texts) == ["what came was b'one'", "what came was b'two'"]


async def test_a_group_from_a_handler_stays_a_group() -> None:
    async def handler(sock: Socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, sock)

    with pytest.raises(ExceptionGroup) as caught:
        async with serving(handler) as s:
            await (await s.connect()).send(b"hello\n")
    assert [type(each) for each in caught.value.exceptions] == [ValueError]


async def test_the_blocks_exception_precedes_those_of_handlers() -> None:
    with pytest.raises(ExceptionGroup, match="a serving block") as caught:
        async with serving(fail) as s:
            client = await s.connect()
            await client.send(b"hello\n")
            await client.recv_line()
    assert [type(each) for each in caught.value.exceptions] == [
        trisock.IncompleteReadError,
        ValueError,
    ]


async def test_the_blocks_exception_is_raised_unchanged() -> None:
    for error in (KeyError("block"), ExceptionGroup("mine", [KeyError("block")])):
        with pytest.raises(type(error)) as caught:
            async with serving(sleep) as s:
                await s.connect()
                raise error
        assert caught.value is error
        assert error.__context__ is None


async def test_an_error_that_the_peer_caused_is_not_raised() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_line()
        await sock.recv_line()

    async with serving(handler) as s:
        await (await s.connect()).send(b"half a li")
        (await s.connect()).abort()
    assert s.server.stats().peer_errors == 2


async def test_an_open_cancel_scope_is_raised() -> None:
    async def handler(sock: Socket) -> None:
        stack.enter_context(trio.fail_after(30))

    stack = contextlib.ExitStack()
    with pytest.raises(RuntimeError, match="left a cancel scope open"):
        async with serving(handler) as s:
            await s.connect()


async def test_a_keyboard_interrupt_in_a_handler_ends_the_block() -> None:
    async def handler(sock: Socket) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with serving(handler) as s:
            await s.connect()
            await trio.sleep_forever()


async def test_each_server_raises_its_own_errors() -> None:
    async with serving(echo) as outer:
        with pytest.raises(ValueError, match="what came"):
            async with serving(fail) as inner:
                await (await inner.connect()).send(b"hello\n")
        assert (await outer.connect()).isopen()


async def test_an_error_without_an_exception_is_raised_as_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def handler(sock: Socket) -> None:
        logging.getLogger(SERVER_LOG).error("accept failed with %s", "EMFILE")

    with pytest.raises(RuntimeError, match="accept failed with EMFILE"):
        async with serving(handler) as s:
            await s.connect()


@pytest.mark.parametrize("off", ["disabled", "level", "filter"])
async def test_a_failure_is_noticed_without_logging(
    off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger(SERVER_LOG)
    if off == "disabled":  # as logging.config does to existing loggers
        monkeypatch.setattr(logger, "disabled", True)
    elif off == "level":
        monkeypatch.setattr(logger, "manager", logging.Manager(logging.RootLogger(logging.INFO)))
        monkeypatch.setattr(logger.manager, "disable", logging.CRITICAL)
    else:
        monkeypatch.setattr(logger, "filters", [lambda record: False])
    logger._cache.clear()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="1 handlers failed, but logging is turned off"):
        async with serving(fail) as s:
            await (await s.connect()).send(b"hello\n")
    logger._cache.clear()  # type: ignore[attr-defined]


async def test_a_hundred_errors_are_kept_and_the_rest_counted() -> None:
    async def handler(sock: Socket) -> None:
        raise ValueError

    with pytest.raises(ExceptionGroup) as caught:
        async with serving(handler) as s:
            for _ in range(103):
                await (await trisock.connect("127.0.0.1", s.server.port)).close()
            while s.server.stats().handler_errors < 103:
                await trio.lowlevel.checkpoint()
    assert len(caught.value.exceptions) == 101
    assert str(caught.value.exceptions[-1]) == "3 more errors"


async def test_wrong_arguments_raise_the_errors_of_bind() -> None:
    for handler, arguments in ((echo, {"wrong": 1}), (7, {}), (echo, {"tls": "a.name"})):
        with pytest.raises(TypeError):
            async with serving(handler, **arguments):  # type: ignore[arg-type]
                pass
