"""Servers that do not answer: ``--timeout`` bounds each stage, and the text names the stage."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from helpers.command import Command, Servers
from trisock import Socket, bind
from trisock._command import check as check_module
from trisock._command.check import Options
from trisock._command.connect import ConversationFailedError, Ends, converse
from trisock._command.roles import Roles
from trisock._command.stages import note_look_ups
from trisock._command.urls import parse

MORE = ", or allow more with --timeout"


def error_of(url: str, *words: bytes, timeout: float = 10, idle: float = 0.02) -> str:
    """Check a URL. Return the error, which comes after ``timeout`` seconds.

    The clock jumps when nothing has happened for ``idle`` seconds.

    If the URL has the port PORT, a server listens there: it sends the first of ``words``, answers
    each line with the next word, and then falls silent.
    """

    async def handler(sock: Socket) -> None:
        for number, each in enumerate(words):
            if number:
                await sock.recv_line()
            await sock.send(each)
        await trio.sleep_forever()

    async def main() -> None:
        nonlocal error
        note_look_ups()
        async with trio.open_nursery() as nursery:
            server = await bind(nursery, 0, handler, host="127.0.0.1")
            target = parse(url.replace("PORT", str(server.port)))
            begin = trio.current_time()
            result = await check_module.check(
                target, Options(Roles(None, None), timeout, 14, injection=True)
            )
            assert trio.current_time() == pytest.approx(begin + timeout)
            error = result.error
            nursery.cancel_scope.cancel()

    error: str | None = None
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=idle))
    assert error is not None
    return error


@contextlib.contextmanager
def unreachable_server() -> Iterator[int]:
    """Listen with a full backlog. Linux does not answer further connection requests."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@pytest.fixture
def unanswered_look_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The resolver does not answer. IP addresses need no resolver."""
    over = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: bytes, port: int, *args: int) -> object:
        if args[-1] & socket.AI_NUMERICHOST:
            return real(host, port, *args)
        over.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    over.set()


def test_the_error_names_a_slow_lookup(unanswered_look_up: None) -> None:
    assert error_of("imap://mail.example.org") == (
        "no answer within 10 seconds, while looking up the name: check the name, and the resolver "
        "of this machine" + MORE
    )


@pytest.mark.parametrize(("host", "idle"), [("localhost", 1), ("127.0.0.1", 0.02)])
def test_the_error_names_a_slow_connect(host: str, idle: float) -> None:
    """A thread looks up the name, which takes real time."""
    with unreachable_server() as port:
        assert error_of(f"tls://{host}:{port}", idle=idle) == (
            "no answer within 10 seconds, while connecting: check the host and the port" + MORE
        )


@pytest.mark.parametrize(
    ("scheme", "implicit"),
    [("imap", "imaps"), ("SUBMISSION", "submissions"), ("smtp", "smtps"), ("lmtp", "tls")],
)
def test_without_a_greeting_the_error_suggests_implicit_tls(scheme: str, implicit: str) -> None:
    assert error_of(f"{scheme}://127.0.0.1:PORT") == (
        "no answer within 10 seconds, while waiting for the server's greeting: check the port, or "
        f"write {implicit}:// if it expects TLS from the start" + MORE
    )


@pytest.mark.parametrize(("scheme", "words"), [("pop3", [b"+OK ready\r\n"]), ("ldap", [])])
def test_the_error_names_a_slow_starttls(scheme: str, words: list[bytes]) -> None:
    """In LDAP, the client speaks first, so there is no greeting to wait for."""
    assert error_of(f"{scheme}://127.0.0.1:PORT", *words) == (
        "no answer within 10 seconds, while negotiating STARTTLS: check the host and the port"
        + MORE
    )


@pytest.mark.parametrize(
    ("scheme", "words"), [("pop3", [b"+OK ready\r\n", b"+OK go\r\n"]), ("tls", [])]
)
def test_the_error_names_a_slow_handshake(scheme: str, words: list[bytes]) -> None:
    assert error_of(f"{scheme}://127.0.0.1:PORT", *words) == (
        "no answer within 10 seconds, during the TLS handshake: check the host and the port" + MORE
    )


@pytest.mark.parametrize("scheme", ["tls", "imap"])
def test_a_timeout_may_be_longer_than_that_of_the_library(scheme: str) -> None:
    error = error_of(f"{scheme}://127.0.0.1:PORT", timeout=200)
    assert error.startswith("no answer within 200 seconds, ")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """The kernel accepts connections into the backlog, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


def test_a_timeout_is_critical(silent_port: int, ca_file: Path, command: Command) -> None:
    url = f"tls://127.0.0.1:{silent_port}"
    done = command("check", "--timeout", "0.1", "--ca", ca_file, url)
    assert done.status == 2
    assert done.out.startswith(f"CRITICAL {url}: no answer within 0.1 seconds, ")


def test_a_timeout_bounds_the_close_too(
    servers: Servers, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate is verified before the close, so the server is good."""

    async def never(sock: Socket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            sock.abort()

    monkeypatch.setattr(Socket, "close", never)
    assert command("check", "--timeout", "2", "--ca", servers.ca, servers.good).status == 0


def test_the_connect_command_has_a_timeout_too(silent_port: int) -> None:
    async def main() -> None:
        target = parse(f"imap://127.0.0.1:{silent_port}")
        ends = Ends(None, None, lambda text: None)
        with pytest.raises(ConversationFailedError, match=r".+") as caught:
            await converse(target, Roles(None, None), ends, proxy_protocol=False, keep_lf=False)
        assert trio.current_time() == pytest.approx(60)
        assert str(caught.value) == (
            "no answer within 60 seconds, while waiting for the server's greeting: check the port, "
            "or write imaps:// if it expects TLS from the start"
        )

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.02))
