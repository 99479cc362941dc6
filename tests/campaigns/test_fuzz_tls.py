"""Fuzzing of TLS: handshakes, records, ClientHello messages and the names in them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import ssl
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import strategies as st

import trisock
from helpers.client_hellos import handshake_of, hello_for, hello_with, name_extension
from helpers.examples import name_or_value_error, sni_router
from helpers.flights import certificate_in
from helpers.fuzzing import AN_OFFSET, SOME_CHANGES, Change, Fuzz, changed
from helpers.mutants import SOME_CUTS, Mutant, mutant_pair
from helpers.pairs import raw_pair
from helpers.peers import Script, alongside
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock.testing import Authority

# ---- the handshake ----

ROLES = ["TLSv1_2 client", "TLSv1_3 client", "TLSv1_2 server", "TLSv1_3 server"]


@functools.lru_cache
def roles_of(
    authority: Authority, role: str, client_certificate: bool
) -> tuple[ClientTLS | ServerTLS, ssl.SSLContext]:
    """Return the TLS role of our socket, and the SSL context of its peer."""
    version, _, side = role.partition(" ")
    certificate = authority.certificate("example.org")
    ours: ClientTLS | ServerTLS
    if side == "client":
        ours = authority.client_tls(
            "example.org", certificate=certificate if client_certificate else None
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    else:
        ours = ServerTLS(
            certificate,
            client_ca=authority.ca if client_certificate else None,
            require_client_certificate=client_certificate,
        )
        context = ssl.create_default_context(cadata=authority.ca.decode())
    if side == "client" or client_certificate:
        certificate.load_into(context)
    if side == "client" and client_certificate:
        context.load_verify_locations(cadata=authority.ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = ssl.TLSVersion[version]
    return ours, context


async def handshake(sock: Socket, role: ClientTLS | ServerTLS, script: Script, ending: str) -> bool:
    """Check that starttls succeeds, or fails as documented."""
    error = None
    async with alongside(script):
        try:
            info = await sock.starttls(role)
        except TLSError as exc:
            error = exc
    if error is None:
        assert sock.tls is info
        return True
    assert sock.fileno() == -1
    assert sock.tls is None
    where = re.escape(str(sock.getpeer()))
    match = re.fullmatch(rf"TLS handshake with .*{where}\)? failed: (\w[^_]*)", str(error))
    assert match, str(error)
    assert ending == "silent" or "seconds" not in match[1]
    for call in (sock.recv, sock.peek, lambda: sock.send(b"x"), lambda: sock.starttls(role)):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    return False


def start_tls(mutant: Mutant, context: ssl.SSLContext, ours: ClientTLS | ServerTLS) -> None:
    """Make the mutant start TLS: as the server if our side is the client, else as the client."""
    server_side = isinstance(ours, ClientTLS)
    mutant.start_tls(
        context,
        server_side=server_side,
        server_hostname=None if server_side else "example.org",
    )


ENDINGS = st.sampled_from(["ended", "ended", "silent"])


@pytest.mark.parametrize("role", ROLES)
def test_a_mutated_handshake_succeeds_or_fails_as_documented(
    role: str, authority: Authority, fuzz: Fuzz
) -> None:
    async def converse(
        clock: trio.testing.MockClock,
        changes: list[Change],
        flight: int,
        cuts: list[int],
        client_certificate: bool,
        ending: str,
    ) -> None:
        ours, context = roles_of(authority, role, client_certificate)
        async with mutant_pair(cuts, changes, flight, make=raw_pair) as (sock, mutant):
            start_tls(mutant, context, ours)
            if await handshake(sock, ours, mutant.conversing(clock, ending), ending):
                async with alongside(mutant.conversing(clock, "ended")):
                    with contextlib.suppress(trio.BrokenResourceError):
                        await sock.send(b"confidential")
                        await sock.recv()
                    await sock.close()
            assert mutant.heard in (b"", b"confidential")

    fuzz.run_async(
        converse,
        60,
        changes=SOME_CHANGES,
        flight=st.integers(0, 2),
        cuts=SOME_CUTS,
        client_certificate=st.booleans(),
        ending=ENDINGS,
    )


@functools.lru_cache
def recording(authority: Authority, role: str, client_certificate: bool) -> bytes:
    """Return everything that the peer sends in a complete conversation."""
    ours, context = roles_of(authority, role, client_certificate)
    server_side = isinstance(ours, ClientTLS)
    ends = [
        ours._context().wrap_bio(
            a := ssl.MemoryBIO(),
            b := ssl.MemoryBIO(),
            server_side=not server_side,
            server_hostname="example.org" if server_side else None,
        ),
        context.wrap_bio(
            c := ssl.MemoryBIO(),
            d := ssl.MemoryBIO(),
            server_side=server_side,
            server_hostname=None if server_side else "example.org",
        ),
    ]
    said = b""
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            c.write(b.read())
            flight = d.read()
            said += flight
            a.write(flight)
    ends[1].write(b"data")
    with contextlib.suppress(ssl.SSLWantReadError):
        ends[1].unwrap()
    return said + d.read()


@pytest.mark.parametrize("role", ROLES)
def test_a_replayed_or_random_handshake_fails_as_documented(
    role: str, authority: Authority, fuzz: Fuzz
) -> None:
    async def play(
        clock: trio.testing.MockClock, wire: bytes, cuts: list[int], early: int, ending: str
    ) -> None:
        ours, _ = roles_of(authority, role, False)
        async with mutant_pair(cuts, make=raw_pair) as (sock, mutant):
            early %= len(wire) + 1
            sock.unrecv(wire[:early])
            mutant.send(wire[early:])
            assert not await handshake(sock, ours, mutant.conversing(clock, ending), ending)

    recordings = st.booleans().map(lambda certificate: recording(authority, role, certificate))
    fuzz.run_async(
        play,
        60,
        wire=st.binary(max_size=600)
        | st.builds(changed, recordings, SOME_CHANGES)
        | recordings
        | st.binary(max_size=300).map(lambda data: b"\x16\x03\x01\x01\x2c\x01\x00" + data),
        cuts=SOME_CUTS,
        early=st.just(0) | AN_OFFSET,
        ending=ENDINGS,
    )


# ---- after the handshake ----

SENT = [b"first", b"", b"second\n", b"third" * 1000]


@pytest.mark.parametrize("role", ROLES)
def test_corrupted_records_never_yield_wrong_data(
    role: str, authority: Authority, fuzz: Fuzz
) -> None:
    async def read(
        clock: trio.testing.MockClock, changes: list[Change], cuts: list[int], calls: list[str]
    ) -> None:
        ours, context = roles_of(authority, role, False)
        async with mutant_pair(cuts, changes) as (sock, mutant):
            start_tls(mutant, context, ours)
            async with alongside(mutant.conversing(clock, "silent")):
                await sock.starttls(ours)
            mutant.act()
            mutant._flight = 0
            mutant.send(b"".join(map(mutant.encrypt, SENT)) + mutant.close_notify())
            got = b""
            async with alongside(mutant.conversing(clock, "ended")):
                for call in itertools.chain(calls, itertools.repeat("recv")):
                    try:
                        chunk = await READS[call](sock)
                    except trisock.IncompleteReadError:
                        continue
                    except RuntimeError:  # stoptls refuses while decrypted bytes are unread
                        assert call == "stoptls"
                        continue
                    except TLSError:
                        break
                    got += chunk or b""
                    if call == "stoptls" or (call == "recv" and not chunk):
                        assert got == b"".join(SENT), "EOF came too early"
                        assert sock.istls() == (call == "recv")
                        break
            assert b"".join(SENT).startswith(got)

    fuzz.run_async(
        read,
        60,
        changes=SOME_CHANGES,
        cuts=SOME_CUTS,
        calls=st.lists(st.sampled_from(sorted(READS)), max_size=6),
    )


async def peek_twice(sock: Socket) -> bytes:
    first = await sock.peek()
    assert await sock.peek() == first or first is None
    return b""


async def check_state(sock: Socket) -> bytes:
    assert sock.isopen() in (True, False)
    assert sock.info().istls
    return b""


READS: dict[str, Callable[[Socket], Awaitable[bytes | None]]] = {
    "recv": Socket.recv,
    "recv_exactly": lambda sock: sock.recv_exactly(7),
    "recv_until": lambda sock: sock.recv_until(b"\n"),
    "peek": peek_twice,
    "isopen": check_state,
    "stoptls": lambda sock: sock.stoptls(),  # type: ignore[dict-item, return-value]
}


# ---- SNI ----

NAMES = [
    ("first.example",),
    ("example.org", "www.example.org"),
    ("*.wild.example",),
    ("xn--bcher-kva.example",),
]


def index_for(name: bytes) -> int:
    """Return the index of the certificate that matches a name, or 0 if no certificate does."""
    wanted = name.decode("latin-1").lower().removesuffix(".")
    for index, names in enumerate(NAMES):
        for each in names:
            if each == wanted or (each[:2] == "*." and wanted.partition(".")[2] == each[2:]):
                return index
    return 0


A_LABEL = st.sampled_from(
    ["", "*", "www", "wild", "example", "org", "WILD", "xn--bcher-kva", "b\xfc"]
)
SOME_NAMES = (
    st.binary(min_size=1, max_size=300)
    | st.text(min_size=1, max_size=80).map(str.encode)
    | st.lists(A_LABEL | st.text("ab-_. ", max_size=70), min_size=1, max_size=4).map(
        lambda labels: ".".join(labels).encode()
    )
    | st.sampled_from(
        [
            *(name.encode() for names in NAMES for name in names),
            b"a.wild.example",
            b"a.b.wild.example",
            b"example.org.",
            b"Www.Example.ORG",
            b"127.0.0.1",
            b"::1",
            b".",
            b"..",
            b"\0",
            b"example.org\0.wild.example",
            "b\xfccher.example".encode(),
            b"a" * 64 + b".wild.example",
            b"a" * 300,
        ]
    )
)


A_HOST = re.compile(rb"(?=.{1,254}\Z)(?:[\w-]{1,63}\.)*[\w-]{1,63}\.?\Z")


def test_a_server_chooses_the_certificate_that_matches_the_name(
    authority: Authority, fuzz: Fuzz
) -> None:
    """If no certificate matches, the server chooses the first. It may refuse an invalid name."""
    certificates = [authority.certificate(*names) for names in NAMES]
    role = ServerTLS(certificates)
    ders = [ssl.PEM_cert_to_DER_cert(each._chain.decode()) for each in certificates]

    async def ask(clock: trio.testing.MockClock, name: bytes) -> None:
        async with mutant_pair([], make=raw_pair) as (sock, mutant):
            mutant.send(hello_for(name))
            assert not await handshake(sock, role, mutant.conversing(clock, "ended"), "ended")
            mutant.act()
            chosen = certificate_in(bytes(mutant.wire))
            if chosen is None:  # the server refused the name, which is too long or has a NUL
                assert mutant.wire[0] == 21, "no alert"
                assert len(name) > 255 or b"\0" in name
            else:
                # An invalid host name matches no certificate.
                assert ders.index(chosen) == (index_for(name) if A_HOST.match(name) else 0)

    fuzz.run_async(ask, 150, name=SOME_NAMES.filter(len))


# ---- ClientHello parsing in the SNI router example ----


def test_parsing_any_client_hello_raises_nothing_but_value_error(fuzz: Fuzz) -> None:
    hellos = st.binary(max_size=300).map(hello_with) | SOME_NAMES.map(
        lambda name: hello_with(name_extension(name))
    )
    real = st.just(handshake_of(hello_for(b"example.org")))
    fuzz(
        name_or_value_error,
        200,
        message=hellos | st.builds(changed, hellos | real, SOME_CHANGES) | st.binary(max_size=300),
    )


def test_peeking_at_a_client_hello_leaves_all_bytes_unread(fuzz: Fuzz) -> None:
    async def peek(clock: trio.testing.MockClock, wire: bytes, cuts: list[int]) -> None:
        async with mutant_pair(cuts) as (sock, mutant):
            mutant.send(wire)
            error, message = ValueError, None
            async with alongside(mutant.conversing(clock, "ended")):
                try:
                    message = await sni_router.peek_client_hello(sock)
                except ValueError as exc:
                    error = type(exc)
                read = b"".join([chunk async for chunk in sock])
            assert error is ValueError
            if message is not None:
                assert read == wire
                assert handshake_of(wire).startswith(message)

    real = st.just(hello_for(b"example.org"))
    fuzz.run_async(
        peek,
        80,
        wire=real | st.builds(changed, real, SOME_CHANGES) | st.binary(max_size=100),
        cuts=SOME_CUTS,
    )
