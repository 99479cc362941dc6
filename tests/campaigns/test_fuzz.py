"""Fuzzing: whatever comes from outside, only what is documented comes of it.

Random bytes, and real conversations that were changed: bits flipped, parts cut, inserted, doubled
and swapped, records with other types, versions and lengths. A usual run tries the same examples
each time; ``--times N`` tries N times as many, and others each time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import strategies as st

import trisock
from helpers.authority import Authority
from helpers.client_hellos import handshake_of, hello_for, hello_with, name_extension
from helpers.examples import name_or_value_error, sni_router
from helpers.flights import certificate_in
from helpers.fuzzing import AN_OFFSET, SOME_CHANGES, Change, Fuzz, changed
from helpers.pairs import closing, raw_pair, raw_unix_pair
from helpers.peers import Peer, Script, alongside
from helpers.pem import assert_shows_no_key, chains_and_keys, der_of
from helpers.sockaddrs import BSD4, BSD6, LINUX4, LINUX6
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError, hammerspoon

# ---- mutants ----


class Mutant(Peer):
    """A peer of which one flight is changed, and comes in pieces."""

    def __init__(
        self, raw: socket.socket, changes: list[Change], flight: int, cuts: list[int]
    ) -> None:
        super().__init__(raw)
        self._changes = changes
        self._flight = flight
        self._cuts = cuts
        self._pieces: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        if self._flight == 0:
            data = changed(data, self._changes)
        self._flight -= 1
        places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in self._cuts)})
        self._pieces += [data[start:end] for start, end in itertools.pairwise(places)]

    def conversing(self, clock: trio.testing.MockClock, ending: str) -> Script:
        """Act until there is nothing more to say, and then end, or be silent."""
        for idle in itertools.count():
            yield
            self.act()
            if self._pieces:
                super().send(self._pieces.popleft())
                continue
            if ending == "ended" and idle:
                with contextlib.suppress(OSError):
                    self.raw.shutdown(socket.SHUT_WR)
            clock.jump(10)
            assert idle < 100, "it hangs"


# ---- the handshake ----

ROLES = ["TLSv1_2 client", "TLSv1_3 client", "TLSv1_2 server", "TLSv1_3 server"]


@functools.lru_cache
def roles_of(
    authority: Authority, role: str, client_certificate: bool
) -> tuple[ClientTLS | ServerTLS, ssl.SSLContext]:
    """Return our side's role, and the peer's context."""
    version, _, side = role.partition(" ")
    certificate = authority.issue("example.org")
    ours: ClientTLS | ServerTLS
    if side == "client":
        ours = ClientTLS(
            "example.org", ca=authority.pem, certificate=certificate if client_certificate else None
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    else:
        ours = ServerTLS(
            certificate,
            client_ca=authority.pem if client_certificate else None,
            require_client_certificate=client_certificate,
        )
        context = ssl.create_default_context(cadata=authority.pem.decode())
    if side == "client" or client_certificate:
        certificate.load_into(context)
    if side == "client" and client_certificate:
        context.load_verify_locations(cadata=authority.pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = ssl.TLSVersion[version]
    return ours, context


def run(function: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run an async function with a clock that stands, but for what the peer makes of it."""
    clock = trio.testing.MockClock()
    trio.run(function, clock, *args, clock=clock)


async def shake_hands(
    sock: Socket, role: ClientTLS | ServerTLS, script: Script, ending: str
) -> bool:
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
    said = re.fullmatch(rf"TLS handshake with .*{where}\)? failed: (\w[^_]*)", str(error))
    assert said, str(error)
    assert ending == "silent" or "seconds" not in said[1]
    for call in (sock.recv, sock.peek, lambda: sock.send(b"x"), lambda: sock.starttls(role)):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    return False


THE_ENDING = st.sampled_from(["ended", "ended", "silent"])
SOME_CUTS = st.lists(AN_OFFSET, max_size=4)


@pytest.mark.parametrize("role", ROLES)
def test_a_handshake_with_a_mutant(role: str, authority: Authority, fuzz: Fuzz) -> None:
    async def converse(
        clock: trio.testing.MockClock,
        changes: list[Change],
        flight: int,
        cuts: list[int],
        client_certificate: bool,
        ending: str,
    ) -> None:
        ours, context = roles_of(authority, role, client_certificate)
        sock, raw = raw_pair()
        with Mutant(raw, changes, flight, cuts) as mutant:
            async with closing(sock):
                server_side = isinstance(ours, ClientTLS)
                mutant.turn_to_tls(
                    context,
                    server_side=server_side,
                    server_hostname=None if server_side else "example.org",
                )
                if await shake_hands(sock, ours, mutant.conversing(clock, ending), ending):
                    async with alongside(mutant.conversing(clock, "ended")):
                        with contextlib.suppress(trio.BrokenResourceError):
                            await sock.send(b"confidential")
                            await sock.recv()
                        await sock.close()
                assert mutant.heard in (b"", b"confidential")

    fuzz(
        lambda **drawn: run(converse, *drawn.values()),
        60,
        changes=SOME_CHANGES,
        flight=st.integers(0, 2),
        cuts=SOME_CUTS,
        client_certificate=st.booleans(),
        ending=THE_ENDING,
    )


@functools.lru_cache
def recording(authority: Authority, role: str, client_certificate: bool) -> bytes:
    """Return all that the peer of a role says in a whole conversation."""
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
def test_a_handshake_with_a_recording_or_with_garbage(
    role: str, authority: Authority, fuzz: Fuzz
) -> None:
    async def play(
        clock: trio.testing.MockClock, wire: bytes, cuts: list[int], early: int, ending: str
    ) -> None:
        ours, _ = roles_of(authority, role, False)
        sock, raw = raw_pair()
        with Mutant(raw, [], -1, cuts) as mutant:
            async with closing(sock):
                early %= len(wire) + 1
                sock.unrecv(wire[:early])
                mutant.send(wire[early:])
                assert not await shake_hands(sock, ours, mutant.conversing(clock, ending), ending)

    recordings = st.booleans().map(lambda certificate: recording(authority, role, certificate))
    fuzz(
        lambda **drawn: run(play, *drawn.values()),
        60,
        wire=st.binary(max_size=600)
        | st.builds(changed, recordings, SOME_CHANGES)
        | recordings
        | st.binary(max_size=300).map(lambda data: b"\x16\x03\x01\x01\x2c\x01\x00" + data),
        cuts=SOME_CUTS,
        early=st.just(0) | AN_OFFSET,
        ending=THE_ENDING,
    )


# ---- after the handshake ----

SAID = [b"first", b"", b"second\n", b"third" * 1000]


@pytest.mark.parametrize("role", ROLES)
def test_records_of_a_mutant(role: str, authority: Authority, fuzz: Fuzz) -> None:
    """What is read is what was said, in order, up to an error."""

    async def read(
        clock: trio.testing.MockClock, changes: list[Change], cuts: list[int], calls: list[str]
    ) -> None:
        ours, context = roles_of(authority, role, False)
        server_side = isinstance(ours, ClientTLS)
        sock, raw = raw_unix_pair()
        with Mutant(raw, changes, -1, cuts) as mutant:
            async with closing(sock):
                mutant.turn_to_tls(
                    context,
                    server_side=server_side,
                    server_hostname=None if server_side else "example.org",
                )
                async with alongside(mutant.conversing(clock, "silent")):
                    await sock.starttls(ours)
                mutant.act()
                mutant._flight = 0
                mutant.send(b"".join(map(mutant.encrypt, SAID)) + mutant.the_end())
                got = b""
                async with alongside(mutant.conversing(clock, "ended")):
                    for call in itertools.chain(calls, itertools.repeat("recv")):
                        try:
                            chunk = await READS[call](sock)
                        except trisock.IncompleteReadError:
                            continue
                        except RuntimeError:  # bytes are waiting to be read
                            assert call == "stoptls"
                            continue
                        except TLSError:
                            break
                        got += chunk or b""
                        if call == "stoptls" or (call == "recv" and not chunk):
                            assert got == b"".join(SAID), "the end came too early"
                            assert sock.istls() == (call == "recv")
                            break
                assert b"".join(SAID).startswith(got)

    fuzz(
        lambda **drawn: run(read, *drawn.values()),
        60,
        changes=SOME_CHANGES,
        cuts=SOME_CUTS,
        calls=st.lists(st.sampled_from(sorted(READS)), max_size=6),
    )


async def peeked(sock: Socket) -> bytes:
    first = await sock.peek()
    assert await sock.peek() == first or first is None
    return b""


async def asked(sock: Socket) -> bytes:
    assert sock.isopen() in (True, False)
    assert sock.info().istls
    return b""


READS: dict[str, Callable[[Socket], Awaitable[bytes | None]]] = {
    "recv": Socket.recv,
    "recv_exactly": lambda sock: sock.recv_exactly(7),
    "recv_until": lambda sock: sock.recv_until(b"\n"),
    "peek": peeked,
    "isopen": asked,
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
    """Return which of the certificates fits; the first where none does."""
    asked = name.decode("latin-1").lower().removesuffix(".")
    for index, names in enumerate(NAMES):
        for each in names:
            if each == asked or (each[:2] == "*." and asked.partition(".")[2] == each[2:]):
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


def test_the_choice_of_a_certificate(authority: Authority, fuzz: Fuzz) -> None:
    """One that fits, or the first; a name that no host can have may be refused."""
    certificates = [authority.issue(*names) for names in NAMES]
    role = ServerTLS(certificates)
    ders = [ssl.PEM_cert_to_DER_cert(each._chain.decode()) for each in certificates]

    async def ask(clock: trio.testing.MockClock, name: bytes) -> None:
        sock, raw = raw_pair()
        with Mutant(raw, [], -1, []) as mutant:
            async with closing(sock):
                mutant.send(hello_for(name))
                assert not await shake_hands(sock, role, mutant.conversing(clock, "ended"), "ended")
                mutant.act()
                chosen = certificate_in(bytes(mutant.wire))
                if chosen is None:  # turned away: it can be no name at all
                    assert mutant.wire[0] == 21, "no alert"
                    assert len(name) > 255 or b"\0" in name
                else:
                    # What no host can be called is compared with no certificate.
                    assert ders.index(chosen) == (index_for(name) if A_HOST.match(name) else 0)

    fuzz(lambda name: run(ask, name), 150, name=SOME_NAMES.filter(len))


# ---- parseAddress ----


def test_parse_address(fuzz: Fuzz) -> None:
    def parse(data: bytes) -> None:
        parsed = hammerspoon.Sockets.parseAddress(data)
        if parsed is None:
            return
        assert len(data) in (16, 28)
        family = socket.AF_INET if len(data) == 16 else socket.AF_INET6
        at = 4 if family == socket.AF_INET else 8
        packed = socket.inet_pton(family, parsed["host"].partition("%")[0])
        assert packed == data[at : at + len(packed)]
        assert parsed["port"] == int.from_bytes(data[2:4], "big")

    real = st.sampled_from([LINUX4, LINUX6, BSD4, BSD6])
    fuzz(
        parse,
        200,
        data=st.binary(max_size=40)
        | st.integers(0, 40).map(lambda size: bytes([size]) * size)
        | real
        | st.builds(changed, real, SOME_CHANGES),
    )


# ---- the ClientHello, as the example reads it ----


def test_the_reader_of_a_client_hello(fuzz: Fuzz) -> None:
    hellos = st.binary(max_size=300).map(hello_with) | SOME_NAMES.map(
        lambda name: hello_with(name_extension(name))
    )
    real = st.just(handshake_of(hello_for(b"example.org")))
    fuzz(
        name_or_value_error,
        200,
        message=hellos | st.builds(changed, hellos | real, SOME_CHANGES) | st.binary(max_size=300),
    )


def test_peeking_at_a_client_hello(fuzz: Fuzz) -> None:
    """It consumes nothing of one, in whatever pieces it comes, and refuses all else."""

    async def peek(clock: trio.testing.MockClock, wire: bytes, cuts: list[int]) -> None:
        sock, raw = raw_unix_pair()
        with Mutant(raw, [], -1, cuts) as mutant:
            async with closing(sock):
                mutant.send(wire)
                error, message, read = ValueError, None, b""
                async with alongside(mutant.conversing(clock, "ended")):
                    try:
                        message = await sni_router.peek_client_hello(sock)
                    except ValueError as exc:
                        error = type(exc)
                    while chunk := await sock.recv():
                        read += chunk
                assert error is ValueError
                if message is not None:
                    assert read == wire
                    assert handshake_of(wire).startswith(message)

    real = st.just(hello_for(b"example.org"))
    fuzz(
        lambda **drawn: run(peek, *drawn.values()),
        80,
        wire=real | st.builds(changed, real, SOME_CHANGES) | st.binary(max_size=100),
        cuts=SOME_CUTS,
    )


# ---- PEM ----


def some_pem(pems: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return PEM that is real, changed, joined, or none at all."""
    real = st.sampled_from(pems)
    return (
        real
        | st.builds(changed, real, SOME_CHANGES)
        | st.builds(changed, real.map(der_of), SOME_CHANGES)
        | st.lists(real, max_size=3).map(b"\n".join)
        | st.binary(max_size=100)
        | st.binary(max_size=100).map(lambda data: pems[0][:40] + b"\n" + data)
        | st.builds(lambda pem, data: pem + data * 10_000, real, st.binary(max_size=10))
    )


def as_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def test_loading_certificates_and_keys(fuzz: Fuzz, tmp_path: Path) -> None:
    chains, keys = chains_and_keys()
    chain_file, key_file = tmp_path / "chain.pem", tmp_path / "key.pem"

    def load(chain: bytes, key: bytes, password: bytes | None, how: str) -> None:
        try:
            if how == "files":
                chain_file.write_bytes(chain)
                key_file.write_bytes(key)
                loaded = Certificate.from_files(chain_file, key_file, password)
            elif how == "mapping":
                given = {"chain": as_text(chain), "private_key": as_text(key)}
                ServerTLS(given if password is None else {**given, "password": as_text(password)})
                return
            elif how == "one file":
                chain_file.write_bytes(key + chain)
                loaded = Certificate.from_files(chain_file, None, password)
            else:
                loaded = Certificate(chain, key, password)
            ServerTLS(loaded)
        except (ValueError, TypeError) as exc:
            assert_shows_no_key(exc, key)
        else:
            assert key.decode("latin-1") not in repr(loaded)

    fuzz(
        load,
        150,
        chain=some_pem(chains),
        key=some_pem(keys),
        password=st.none() | st.just(b"secret") | st.binary(max_size=20),
        how=st.sampled_from(["class", "files", "one file", "mapping"]),
    )


def test_loading_a_certificate_with_its_own_key_changed(fuzz: Fuzz) -> None:
    chains, keys = chains_and_keys()

    def load(index: int, changes: list[Change], password: bytes | None) -> None:
        key = changed(keys[index], changes)
        try:
            loaded = Certificate(chains[index % len(chains)], key, password)
            ServerTLS(loaded)
        except (ValueError, TypeError) as exc:
            assert_shows_no_key(exc, key)

    fuzz(
        load,
        100,
        index=st.integers(0, len(keys) - 1),
        changes=st.just([]) | SOME_CHANGES,
        password=st.none() | st.just(b"secret"),
    )


def test_loading_authorities(fuzz: Fuzz) -> None:
    chains, keys = chains_and_keys()

    def load(ca: bytes, text: bool, role: str) -> None:
        given = as_text(ca) if text else ca
        try:
            if role == "client":
                ClientTLS("example.org", ca=given)
            else:
                ServerTLS(Certificate(chains[1], keys[1]), client_ca=given)
        except (ValueError, TypeError) as exc:
            assert_shows_no_key(exc, ca if b"PRIVATE" in ca else b"")

    fuzz(
        load,
        100,
        ca=some_pem([*chains, keys[0]]),
        text=st.booleans(),
        role=st.sampled_from(["client", "server"]),
    )


# ---- reading up to a limit ----


def test_lines_and_their_limits(fuzz: Fuzz) -> None:
    """Against the plain meaning of it: nothing is lost, and nothing longer is given."""

    async def read(
        clock: trio.testing.MockClock,
        said: bytes,
        delimiter: bytes,
        limit: int,
        cuts: list[int],
        how: str,
    ) -> None:
        sock, raw = raw_unix_pair()
        with Mutant(raw, [], -1, cuts) as mutant:
            async with closing(sock):
                mutant.send(said)
                got: list[bytes] = []
                error: Exception | None = None
                async with alongside(mutant.conversing(clock, "ended")):
                    lines = sock.lines(delimiter=delimiter, keep_ends=True, max_bytes=limit)
                    try:
                        while True:
                            if how == "lines":
                                got.append(await anext(lines))
                            else:
                                got.append(await sock.recv_until(delimiter, max_bytes=limit))
                    except StopAsyncIteration:
                        pass
                    except (trisock.LimitExceededError, trisock.IncompleteReadError) as exc:
                        error = exc
                    rest = b""
                    while chunk := await sock.recv():
                        rest += chunk
        assert b"".join(got) + rest == said
        for line in got:
            assert line.endswith(delimiter)
            assert line.index(delimiter) + len(delimiter) == len(line) <= limit
        end = rest.find(delimiter) + len(delimiter)
        if isinstance(error, trisock.LimitExceededError):
            assert error.limit == limit <= len(rest)
            assert delimiter not in rest[:limit]
        elif isinstance(error, trisock.IncompleteReadError):
            assert error.partial == rest
            assert len(rest) < limit
            assert end < len(delimiter)
        else:
            assert not rest

    letters = st.sampled_from([b"a", b"b", b"\r", b"\n", b"\0"])
    text = st.lists(letters, max_size=60).map(b"".join)
    fuzz(
        lambda **drawn: run(read, *drawn.values()),
        150,
        said=text,
        delimiter=text.map(lambda data: data[:3]).filter(len),
        limit=st.integers(1, 70),
        cuts=SOME_CUTS,
        how=st.sampled_from(["lines", "recv_until"]),
    )


def test_skipping_lines_over_the_limit(fuzz: Fuzz) -> None:
    """Against a plain search: take a part of the line, put half of it back, and look again."""

    async def read(
        clock: trio.testing.MockClock, said: bytes, delimiter: bytes, limit: int, cuts: list[int]
    ) -> None:
        part = max(1, limit - len(delimiter) + 1)
        expected = []
        left = said
        while True:
            end = left.find(delimiter) + len(delimiter)
            if len(delimiter) <= end <= limit:
                expected.append(left[:end])
                left = left[end:]
            elif len(left) >= limit:
                left = left[part - part // 2 :]
            else:
                break
        got = []
        sock, raw = raw_unix_pair()
        with Mutant(raw, [], -1, cuts) as mutant:
            async with closing(sock):
                mutant.send(said)
                async with alongside(mutant.conversing(clock, "ended")):
                    while True:
                        try:
                            got.append(await sock.recv_until(delimiter, max_bytes=limit))
                        except trisock.LimitExceededError:
                            skipped = await sock.recv_exactly(part)
                            sock.unrecv(skipped[part - part // 2 :])
                        except trisock.IncompleteReadError as exc:
                            rest = exc.partial
                            break
        assert (got, rest) == (expected, left)

    letters = st.sampled_from([b"a", b"b", b"\r", b"\n", b"\0"])
    text = st.lists(letters, max_size=60).map(b"".join)
    fuzz(
        lambda **drawn: run(read, *drawn.values()),
        150,
        said=text,
        delimiter=text.map(lambda data: data[:3]).filter(len),
        limit=st.integers(1, 40),
        cuts=SOME_CUTS,
    )


# ---- hosts, ports and paths ----

REAL_HOSTS = ["localhost", "127.0.0.1", "::1", "example.org", "b\xfccher.example"]
SOME_HOSTS = st.sampled_from(REAL_HOSTS) | st.text(max_size=300) | st.sampled_from(
    ["", ".", "..", "127.1", "fe80::1%lo", "::1%", "[::1]", "*", "a..b", "\0", "a b",
     "xn--", "xn--a", "\u2024", "\ud800", "a" * 64, "localhost:443", "https://x/", "user@host"]
) | st.text(max_size=20).map(lambda zone: f"fe80::1%{zone}")  # fmt: skip
SOME_PORTS = st.sampled_from([-1, 0, 1, 65535, 65536, True]) | st.integers()


def is_one_line(text: str) -> bool:
    """Whether it can be logged: no control characters, line ends or lone surrogates."""
    return text.isprintable()


def test_hosts_and_ports(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of a name server: every name and address is this machine's or unknown."""

    async def getaddrinfo(host: bytes | None, port: int, *_: object, **__: object) -> object:
        assert host is None or isinstance(host, bytes)
        assert host is None or host.isascii()
        await trio.lowlevel.checkpoint()
        if host is not None and len(host) % 3 == 0:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("trio._highlevel_open_tcp_stream.getaddrinfo", getaddrinfo)

    async def try_all(clock: trio.testing.MockClock, host: Any, port: Any, how: str) -> None:
        error: Exception | None = None
        try:
            if how == "connect":
                (await trisock.connect(host, port)).abort()
            elif how == "listen":
                (await trisock.listen(port, host)).abort()
            else:
                trisock.listen_nowait(port, host).abort()
        except (OSError, TypeError, ValueError) as exc:
            error = exc
        assert error is None or (str(error) and not isinstance(error, UnicodeError))
        assert is_one_line(str(error))
        if isinstance(host, str) and len(host) > 40 and not host.replace(".", "").isalpha():
            assert host not in str(error)  # it may be a key

    fuzz(
        lambda **drawn: run(try_all, *drawn.values()),
        250,
        host=SOME_HOSTS | st.sampled_from([None, b"localhost", 1]),
        port=SOME_PORTS | st.sampled_from([None, "80", 80.0]),
        how=st.sampled_from(["connect", "listen", "listen_nowait"]),
    )


def test_paths(fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def try_all(clock: trio.testing.MockClock, path: Any, how: str) -> None:
        error: Exception | None = None
        try:
            if how == "connect_unix":
                (await trisock.connect_unix(path)).abort()
            elif how == "listen_unix":
                async with await trisock.listen_unix(path) as listener:
                    texts = [repr(listener), str(listener.addresses[0])]
                    client = await trisock.connect_unix(path)
                    async with closing(client):
                        texts += [repr(client), str(client.getpeer())]
                    assert all("unix:'" in text or 'unix:"' in text for text in texts)
                    assert all(is_one_line(text) for text in texts)
            else:
                trisock.listen_unix_nowait(path).abort()
        except (OSError, TypeError, ValueError) as exc:
            error = exc
        assert error is None or str(error)
        assert is_one_line(str(error))
        assert not list(tmp_path.iterdir())

    names = st.text(max_size=120).map(lambda text: text.replace("/", "\\"))
    fuzz(
        lambda **drawn: run(try_all, *drawn.values()),
        100,
        path=names
        | st.binary(max_size=120).map(lambda data: data.replace(b"/", b"\\"))
        | st.sampled_from(
            ["\0", b"\0a\0b", "\ud800", "a\0b", ".", "..", "no/such/directory", None, 1]
        ),
        how=st.sampled_from(["connect_unix", "listen_unix", "listen_unix_nowait"]),
    )
