"""trisock.starttls.upgrade and connect(starttls=): the driver, its limits and its end."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import pickle
import ssl
from typing import Literal

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trisock
from helpers.pairs import closing, raw_unix_pair, unix_pair
from helpers.starttls_conversations import CLIENT_CONVERSATIONS, Conversation, Heard
from trisock import ClientTLS, ServerTLS, Socket, StartTLSError, TLSError
from trisock.starttls import PROTOCOLS, upgrade
from trisock.testing import Authority, Script, serving


def script(conversation: Conversation) -> Script:
    """Return the peer's side of a conversation as a script."""
    steps = Script()
    for each in conversation:
        steps = steps.expect(each.data) if isinstance(each, Heard) else steps.send(each)
    return steps


async def fail(sock: Socket, protocol: str, tls: ClientTLS, timeout: float = 60) -> StartTLSError:
    """Return the error of an upgrade that fails before TLS."""
    with pytest.raises(StartTLSError) as caught:
        await upgrade(sock, protocol, tls, timeout=timeout)
    assert sock.fileno() == -1
    assert caught.value.protocol == protocol
    return caught.value


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_upgrade_starts_tls(
    protocol: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    peer = script(CLIENT_CONVERSATIONS[protocol]).starttls(server_tls).send(b"hello").expect_eof()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(peer, b)
        await upgrade(a, protocol, client_tls)
        assert await a.recv() == b"hello"
        await a.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_split_of_a_conversation_does_not_matter(
    protocol: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async def converse(cuts: list[int]) -> None:
        a, b = unix_pair()

        async def peer() -> None:
            for each in CLIENT_CONVERSATIONS[protocol]:
                if isinstance(each, Heard):
                    assert await b.recv_exactly(len(each.data)) == each.data
                    continue
                offsets = sorted({0, len(each), *(cut % len(each) for cut in cuts)})
                for start, end in itertools.pairwise(offsets):
                    await b.send(each[start:end])
                    await trio.testing.wait_all_tasks_blocked()
            await b.starttls(server_tls)

        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(peer)
            await upgrade(a, protocol, client_tls)

    @settings(
        max_examples=10,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.integers(0, 400), max_size=6))
    def run(cuts: list[int]) -> None:
        trio.run(converse, cuts)

    run()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_conversation_may_arrive_byte_by_byte(
    protocol: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    peer = Script(byte_by_byte=True)
    for each in CLIENT_CONVERSATIONS[protocol]:
        peer = peer.expect(each.data) if isinstance(each, Heard) else peer.send(each)
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(peer.starttls(server_tls), b)
        await upgrade(a, protocol, client_tls)


# ---- connect(starttls=) ----


async def test_connect_upgrades_and_verifies_the_host(
    trusted: None, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = b"EHLO [127.0.0.1]\r\n"
    conversation = [
        Heard(names) if each == Heard(b"EHLO localhost\r\n") else each
        for each in CLIENT_CONVERSATIONS["smtp"]
    ]
    peer = script(conversation).starttls(authority.server_tls("localhost")).send(b"hello")
    async with serving(peer, host="127.0.0.1") as s:
        for port in (s.server.port, None):
            monkeypatch.setattr("trisock._connect.PROTOCOLS", {"smtp": (s.server.port, 1)})
            for tls in (True, None):
                sock = await trisock.connect("localhost", port, starttls="smtp", tls=tls)
                assert await sock.recv() == b"hello"
                assert sock.connected_host == "localhost"
                assert sock.getpeer().port == s.server.port
                await sock.close()


@pytest.mark.parametrize("tls", [None, True])
async def test_connect_refuses_a_certificate_that_is_not_for_the_host(
    tls: Literal[True] | None, trusted: None, authority: Authority
) -> None:
    async def peer(sock: Socket) -> None:
        await script(CLIENT_CONVERSATIONS["pop3"])(sock)
        with pytest.raises(TLSError):
            await sock.starttls(authority.server_tls("other.example"))

    async with serving(peer, host="127.0.0.1") as s:
        with pytest.raises(TLSError, match="not valid for 'localhost'") as caught:
            await trisock.connect("localhost", s.server.port, starttls="pop3", tls=tls)
    assert caught.value.reason == "CERTIFICATE_VERIFY_FAILED"


async def test_connect_closes_a_connection_without_starttls(client_tls: ClientTLS) -> None:
    peer = (
        Script().send(b"220 x\r\n").expect(b"EHLO [127.0.0.1]\r\n").send(b"250 x\r\n").expect_eof()
    )
    async with serving(peer) as s:
        with pytest.raises(StartTLSError, match="does not offer STARTTLS") as caught:
            await trisock.connect("127.0.0.1", s.server.port, starttls="smtp", tls=client_tls)
    assert caught.value.offered is False
    assert str(s.server.port) in str(caught.value)


async def test_ipv6_clients_name_themselves_by_their_address(client_tls: ClientTLS) -> None:
    peer = Script().send(b"220 x\r\n").expect(b"EHLO [IPv6:::1]\r\n").send(b"502 x\r\n")
    async with serving(peer, host="::1") as s:
        with pytest.raises(StartTLSError):
            await trisock.connect("::1", s.server.port, starttls="smtp", tls=client_tls)


async def test_connect_rejects_arguments_before_it_connects(server_tls: ServerTLS) -> None:
    with pytest.raises(TypeError, match="connect needs a port"):
        await trisock.connect("localhost")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"one of smtp, .*, not 'gopher'"):
        await trisock.connect("localhost", starttls="gopher")
    with pytest.raises(TypeError, match="a protocol must be a str, not True"):
        await trisock.connect("localhost", starttls=True)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="https_compatible is for TLS from the start"):
        await trisock.connect("localhost", 1, starttls="imap", https_compatible=True)
    with pytest.raises(TypeError, match="tls must be a TLS client's role"):
        await trisock.connect("localhost", 1, starttls="imap", tls=server_tls)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(TypeError, match="tls must be a TLS client's role, not a SSLContext"):
        await trisock.connect("localhost", 1, starttls="imap", tls=context)


# ---- arguments ----


async def test_a_wrong_argument_changes_nothing(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await b.send(b"+OK\r\n")
        for protocol, tls, timeout, error, text in [
            ("gopher", client_tls, 60, ValueError, "one of smtp"),
            (b"imap", client_tls, 60, TypeError, "a protocol must be a str"),
            ("imap", client_tls, -1, ValueError, "timeout must be 0 or more"),
            ("imap", server_tls, 60, TypeError, "TLS client's role, not a ServerTLS"),
            ("imap", 5, 60, TypeError, "tls must be"),
            ("imap", None, 60, ValueError, "needs the server's name"),
            ("xmpp", ClientTLS(verify=False), 60, ValueError, "xmpp needs the server's name"),
        ]:
            with pytest.raises(error, match=text):
                await upgrade(a, protocol, tls, timeout=timeout)  # type: ignore[arg-type]
        assert await a.recv() == b"+OK\r\n"
        assert await b.peek() is None


async def test_upgrade_needs_an_idle_connection_in_plain_text(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.recv)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await upgrade(a, "imap", client_tls)
        await b.send(b"x")
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, server_tls)
        await a.starttls(client_tls)
        with pytest.raises(RuntimeError, match="already using TLS"):
            await upgrade(a, "imap", client_tls)
        await a.close()
        with pytest.raises(RuntimeError, match="already using TLS"):
            await upgrade(a, "imap", client_tls)
    a, b = unix_pair()
    a.abort()
    b.abort()
    with pytest.raises(trio.ClosedResourceError):
        await upgrade(a, "imap", client_tls)


# ---- failures ----


@pytest.mark.parametrize(
    ("protocol", "said", "text"),
    [
        ("pop3", b"x" * 9000, "a line of more than 8192 bytes"),
        ("smtp", b"220-x\r\n" * 513, "more than 512 lines"),
        (
            "sieve",
            2 * (b"x {8000}\r\n" + b"y" * 8000) + b" {700}\r\n",
            "more than 16384 bytes as its greeting",
        ),
        ("smtp", (b"220-" + b"x" * 4000 + b"\r\n") * 5, "more than 16384 bytes as its greeting"),
        ("irc", (b"x" * 8000 + b"\r\n") * 9, "more than 65536 bytes"),
        ("ldap", b"\x30\x84\xff\xff\xff\xff", "more than 65536 bytes"),
        ("imap", b"* OK {99999999999999999999}\r\n", "more than 16384 bytes as its greeting"),
        ("telnet", b"\xff\xfc\x01" * 513, "more than 512 lines, tags or commands"),
        ("telnet", b"\xff\xfd\x01" + b"x" * 9000, "a line of more than 8192 bytes"),
        ("telnet", b"\xff\xfd\x01\xff\xfa" + b"x" * 9000, "a line of more than 8192 bytes"),
        ("pop3", b"+OK\r\n+OK\r\nDELE 1\r\n", "unencrypted bytes followed the last message"),
        ("pop3", b"-ERR \x1b[31m\xff\r\n", r": '-ERR \x1b[31m\xff'"),
        ("pop3", b"-ERR " + b"x" * 1000 + b"\r\n", f": '-ERR {'x' * 195}'..."),
    ],
)
async def test_a_peer_that_breaks_the_rules_is_refused(
    protocol: str, said: bytes, text: str, client_tls: ClientTLS
) -> None:
    a, b = unix_pair()

    async def peer() -> None:
        await b.send(said)
        await b.send_eof()

    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        error = await fail(a, protocol, client_tls)
    assert text in str(error)
    assert str(error).isprintable()


async def test_the_end_of_the_stream_is_a_starttls_error(client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    await b.close()
    async with closing(a):
        error = await fail(a, "pop3", client_tls)
    assert str(error).endswith("the peer closed the connection before it said anything")
    a, b = unix_pair()
    await b.send(b"+OK\r\n+")
    await b.send_eof()
    async with closing(a, b):
        error = await fail(a, "pop3", client_tls)
    assert str(error).endswith("the peer closed the connection")
    assert type(error.__cause__) is trisock.IncompleteReadError


async def test_a_broken_connection_is_a_starttls_error(client_tls: ClientTLS) -> None:
    a, raw = raw_unix_pair()
    raw.close()
    async with closing(a):
        error = await fail(a, "postgres", client_tls)
    assert str(error).endswith("failed: the connection is broken: Broken pipe")


@pytest.mark.parametrize("then", [b"", b"220 go ahead\r\ninjected\r\n", b"454 no\r\n"])
async def test_an_offer_is_remembered(then: bytes, client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await b.send(b"220 hi\r\n250-me\r\n250 STARTTLS\r\n", then)
        await b.send_eof()
        error = await fail(a, "smtp", client_tls)
    assert error.offered is True


def test_a_silent_peer_times_out(client_tls: ClientTLS) -> None:
    async def main() -> None:
        a, b = unix_pair()
        async with closing(a, b):
            error = await fail(a, "pop3", client_tls)
        assert trio.current_time() == 60
        assert str(error).endswith(
            "nothing arrived within 60 seconds "
            "(does the server expect TLS from the start on this port?)"
        )
        a, b = unix_pair()
        async with closing(a, b):
            await b.send(b"+OK\r\n")
            error = await fail(a, "pop3", client_tls, 1.5)
        assert str(error).endswith("no complete answer arrived within 1.5 seconds")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_negotiation_and_the_handshake_share_the_time(client_tls: ClientTLS) -> None:
    async def main() -> None:
        a, b = unix_pair()

        async def peer() -> None:
            await trio.sleep(40.0321)
            await b.send(b"+OK\r\n")
            await b.recv()
            await b.send(b"+OK\r\n")

        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(peer)
            begin = trio.current_time()
            with pytest.raises(TLSError, match="not finished within 20 seconds"):
                await upgrade(a, "pop3", client_tls)
            assert trio.current_time() - begin == pytest.approx(60, abs=0.001)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_upgrade_works_without_a_timeout(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    async def main() -> None:
        a, b = unix_pair()

        async def peer() -> None:
            await trio.sleep(1000)
            await script(CLIENT_CONVERSATIONS["pop3"]).starttls(server_tls)(b)

        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(peer)
            await upgrade(a, "pop3", client_tls, timeout=None)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_a_cancelled_upgrade_closes_the_socket(client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        with trio.CancelScope() as scope:
            scope.cancel()
            await upgrade(a, "pop3", client_tls)
        assert scope.cancelled_caught
        assert a.fileno() == -1


async def test_a_failed_handshake_closes_the_socket(
    server_tls: ServerTLS, other_authority: Authority
) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def peer() -> None:
            await script(CLIENT_CONVERSATIONS["pop3"])(b)
            with pytest.raises(TLSError):
                await b.starttls(server_tls)

        with pytest.raises(TLSError, match="the certificate was refused") as caught:
            await upgrade(a, "pop3", other_authority.client_tls("example.org"))
    assert type(caught.value) is TLSError
    assert a.fileno() == -1


async def test_an_exception_from_a_custom_ssl_context_is_raised(client_tls: ClientTLS) -> None:
    class Broken(ssl.SSLContext):
        def wrap_bio(self, *args: object, **options: object) -> ssl.SSLObject:
            raise ZeroDivisionError

    context = Broken(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    a, b = unix_pair()
    async with closing(a, b):
        await b.send(b"+OK\r\n")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def peer() -> None:
                await b.recv_until(b"\n")
                await b.send(b"+OK\r\n")

            with pytest.raises(ZeroDivisionError):
                await upgrade(a, "pop3", context)
        assert a.fileno() == -1


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"", "closed"),
        (b"+OK\r\n", "closed"),
        (b"-ERR no\r\n", "refused"),
        (b"x" * 9000, "violation"),
        (b"+OK\r\n+OK\r\nx", "violation"),
    ],
)
async def test_an_error_has_a_kind(said: bytes, kind: str, client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await b.send(said)
        await b.send_eof()
        assert (await fail(a, "pop3", client_tls)).kind == kind


async def test_a_silent_server_is_a_timeout(
    client_tls: ClientTLS, autojump_clock: trio.testing.MockClock
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        with pytest.raises(StartTLSError) as caught:
            await upgrade(a, "pop3", client_tls, timeout=5)
        assert caught.value.kind == "timeout"


async def test_an_error_can_be_copied_and_pickled(client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await b.send(b"-ERR no\r\n")
        error = await fail(a, "pop3", client_tls)
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is StartTLSError
        assert str(again) == str(error)
        assert (again.protocol, again.offered, again.reply) == ("pop3", None, b"-ERR no")
        assert again.kind == "refused"
    assert error.args == (str(error),)


async def test_a_failed_upgrade_leaves_no_garbage(client_tls: ClientTLS) -> None:
    async def refused(protocol: str, said: bytes) -> None:
        a, b = unix_pair()
        await b.send(said)
        with contextlib.suppress(StartTLSError):
            await upgrade(a, protocol, client_tls)
        b.abort()

    for protocol, said in [
        ("pop3", b"-ERR no\r\n"),
        ("xmpp", b"<!DOCTYPE x>"),
        ("pop3", b"x" * 9000),
    ]:
        await refused(protocol, said)
        gc.collect()
        await refused(protocol, said)
        assert gc.collect() == 0
