"""Cancellation at every moment: each public async method, cancelled wherever it can be.

A call is made again and again, on fresh connections; the n-th time it is cancelled at its n-th
moment, until there is none that has not been tried. A moment is whatever lets a cancellation in:

- a task of the call is about to go on (what it has waited for has come, and now the cancel too);
- it has stopped, to wait or to let others run;
- it asks whether it is cancelled (``checkpoint_if_cancelled``).

After each attempt what the docs say about the state is checked, and that no descriptor and no task
is left. The peer is no task: it does its next step when every task is blocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import io
import itertools
import math
import os
import re
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.pairs import clog, closing, raw_pair, raw_unix_pair
from helpers.peers import Peer, Script, alongside
from trisock import ClientTLS, ServerTLS, Socket, hammerspoon, pluto
from trisock.pluto.blocking import current_run

Call = Callable[[], Awaitable[Any]]


class Attempt(trio.abc.Instrument):
    """One call, cancelled at its n-th moment if it has so many.

    Attributes:
      reached: how many moments there were.
      cancelled: whether the call has ended by its cancellation.
      value: what it has returned, if it has.
      error: what it has raised, if that was anything else.
    """

    def __init__(self, moment: int) -> None:
        self.moment = moment
        self.reached = 0
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._tasks: set[trio.lowlevel.Task] = set()

    async def __call__(self, call: Call, script: Script | None = None) -> None:
        """Make the call, alongside what the peer does; the first step of that comes before."""
        trio.lowlevel.add_instrument(self)
        try:
            async with alongside(script or iter(())):
                with self._asked():
                    async with trio.open_nursery() as self._nursery:
                        self._nursery.start_soon(self._run, call)
        finally:
            trio.lowlevel.remove_instrument(self)
        self.cancelled = self._scope.cancelled_caught

    async def _run(self, call: Call) -> None:
        with self._scope:
            try:
                self.value = await call()
            except Exception as exc:
                self.error = exc
        self._tasks.clear()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        ask = trio.lowlevel.checkpoint_if_cancelled

        async def checkpoint_if_cancelled() -> None:
            self._pass_moment(trio.lowlevel.current_task())
            await ask()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trio.lowlevel, "checkpoint_if_cancelled", checkpoint_if_cancelled)
            yield

    def _pass_moment(self, task: trio.lowlevel.Task) -> None:
        if task in self._tasks:
            self.reached += 1
            if self.reached == self.moment:
                self._scope.cancel()

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        if nursery is not None and (nursery is self._nursery or nursery.parent_task in self._tasks):
            self._tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass_moment(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._pass_moment(task)


async def at_every_moment(scenario: Callable[[Attempt], Awaitable[None]]) -> None:
    """Run a scenario, which makes one attempt, until the call has no moment more."""
    for moment in itertools.count(1):
        descriptors, tasks = os.listdir("/proc/self/fd"), _living_tasks()
        attempt = Attempt(moment)
        await scenario(attempt)
        assert os.listdir("/proc/self/fd") == descriptors, f"left open at moment {moment}"
        assert _living_tasks() == tasks
        assert attempt.cancelled or moment > 1, "cancelled from the start, it did not look"
        if attempt.reached < moment:
            return


def _living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


COVERED: set[str] = set()


def covers(*names: str) -> Callable[[Any], Any]:
    """Say which public names a test is about."""
    COVERED.update(names)
    return lambda test: test


def grid(usual: Callable[..., bool], *axes: Iterable[object]) -> list[Any]:
    """Return all combinations, for ``parametrize``; those that are not ``usual`` in long runs only.

    Of cases that go the same way through the core, the usual run tries one.
    """
    return [
        pytest.param(*each, marks=() if usual(*each) else pytest.mark.interop)
        for each in itertools.product(*axes)
    ]


# ---- connections ----

UNIX, TCP = "unix", "tcp"
TLS = ["TLSv1_2 client", "TLSv1_3 client", "TLSv1_3 server"]
LAYERS = [UNIX, TCP, *TLS]
CLEAR = "clear"
SERVERS = ["TLSv1_2 server", "TLSv1_3 server"]


@dataclass(frozen=True)
class Kit:
    """What connections are made of."""

    client_tls: ClientTLS
    server_tls: ServerTLS
    peer_contexts: dict[str, ssl.SSLContext]

    def role_of(self, layer: str) -> ClientTLS | ServerTLS:
        return self.client_tls if layer.endswith("client") else self.server_tls

    def turn_to_tls(self, peer: Peer, layer: str, **options: int) -> None:
        """Let the peer of a layer's client, or server, speak TLS."""
        server_side = layer.endswith("client")
        peer.turn_to_tls(
            self.peer_contexts[layer],
            server_side=server_side,
            server_hostname=None if server_side else "example.org",
            **options,
        )

    @contextlib.asynccontextmanager
    async def pair(self, layer: str, greeting: bytes = b"") -> AsyncIterator[tuple[Socket, Peer]]:
        sock, raw = raw_pair() if layer == TCP else raw_unix_pair()
        async with closing(sock):
            with Peer(raw) as peer:
                peer.greeting = greeting
                if layer in TLS:
                    self.turn_to_tls(peer, layer)
                    async with alongside(peer.acting()):
                        await sock.starttls(self.role_of(layer))
                    peer.act()
                    peer.greeting = b""
                yield sock, peer


@pytest.fixture(scope="session")
def kit(authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS) -> Kit:
    contexts = {}
    for version, side in itertools.product(["TLSv1_2", "TLSv1_3"], ["client", "server"]):
        if side == "client":  # so the peer is the server
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue("example.org").load_into(context)
        else:
            context = ssl.create_default_context(cadata=authority.pem.decode())
        context.maximum_version = ssl.TLSVersion[version]
        contexts[f"{version} {side}"] = context
    return Kit(client_tls, server_tls, contexts)


# ---- reading ----

SAID = b"one\ntwo\nthree\n"


async def recv(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv())


async def recv_a_part(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv(2))


async def recv_exactly(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv_exactly(9))


async def recv_until(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv_until(b"two\n"))


async def receive_some(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.receive_some())


async def next_chunk(sock: Socket, got: list[bytes]) -> None:
    got.append(await anext(sock, b""))


async def all_chunks(sock: Socket, got: list[bytes]) -> None:
    async for chunk in sock:
        got.append(chunk)


async def one_line(sock: Socket, got: list[bytes]) -> None:
    got.append(await anext(sock.lines(keep_ends=True)))


async def all_lines(sock: Socket, got: list[bytes]) -> None:
    async for line in sock.lines(keep_ends=True):
        got.append(line)


async def peek(sock: Socket, got: list[bytes]) -> None:
    assert SAID.startswith(await sock.peek() or b"")


async def pluto_recv(sock: Socket, got: list[bytes]) -> None:
    got.append(await pluto_socket(sock).recv() or b"")


async def pluto_peek(sock: Socket, got: list[bytes]) -> None:
    assert SAID.startswith(await pluto_socket(sock).peek() or b"")


def pluto_socket(sock: Socket) -> pluto.async_socket:
    return pluto.async_socket(sock, current_run(), owned=False)


READS = {
    recv: "Socket.recv",
    recv_a_part: "Socket.recv",
    recv_exactly: "Socket.recv_exactly",
    recv_until: "Socket.recv_until",
    receive_some: "Socket.receive_some",
    next_chunk: "Socket.__anext__",
    all_chunks: "Socket.__anext__",
    one_line: "Lines.__anext__",
    all_lines: "Lines.__anext__",
    peek: "Socket.peek",
    pluto_recv: "pluto.socket.recv",
    pluto_peek: "pluto.socket.peek",
}


# What a state does up to its first yield is there before the read begins.


def pushed_back(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(SAID)
    yield
    peer.end()


def arrived(sock: Socket, peer: Peer) -> Script:
    peer.say(SAID)
    yield
    peer.end()


def arrived_with_the_end(sock: Socket, peer: Peer) -> Script:
    for line in SAID.splitlines(keepends=True):
        peer.say(line)
    peer.end()
    yield


def not_there_yet(sock: Socket, peer: Peer) -> Script:
    yield
    peer.say(SAID)
    yield
    peer.end()


def a_part_of_each(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(SAID[:2])
    peer.say(SAID[2:5])
    yield
    for start in range(5, len(SAID), 3):
        peer.say(SAID[start : start + 3])
        yield
    peer.end()


def in_pieces_of_records(sock: Socket, peer: Peer) -> Script:
    wire = peer.encrypt(SAID[:6]) + peer.encrypt(SAID[6:])
    cuts = [0, 3, 6, len(wire) // 2, len(wire) - 1, len(wire)]  # a record's header has 5 bytes
    for start, end in itertools.pairwise(cuts):
        yield
        peer.send(wire[start:end])
    yield
    peer.end()


def ended_too_early(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(SAID[:2])
    peer.say(SAID[2:3])
    yield
    peer.end()


STATES_OF_READS = [
    pushed_back,
    arrived,
    arrived_with_the_end,
    not_there_yet,
    a_part_of_each,
    in_pieces_of_records,
    ended_too_early,
]


def usual_read(layer: str, read: object, state: object) -> bool:
    if read in (pluto_recv, pluto_peek, next_chunk, receive_some) or state is pushed_back:
        return layer == UNIX
    if layer == TCP:
        return state in (arrived, not_there_yet)
    return layer == UNIX or state in (
        (in_pieces_of_records, arrived_with_the_end, ended_too_early)
        if layer == "TLSv1_3 client"
        else (a_part_of_each,)
    )


@covers(*READS.values())
@pytest.mark.parametrize(
    ("layer", "read", "state"), grid(usual_read, LAYERS, READS, STATES_OF_READS)
)
async def test_a_cancelled_read_has_consumed_nothing(
    layer: str,
    read: Callable[[Socket, list[bytes]], Awaitable[None]],
    state: Callable[[Socket, Peer], Script],
    kit: Kit,
) -> None:
    said = SAID[:3] if state is ended_too_early else SAID

    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            script, got = state(sock, peer), []
            await attempt(lambda: read(sock, got), script)
            if state is ended_too_early and read in (recv_exactly, recv_until, one_line, all_lines):
                assert attempt.cancelled or isinstance(attempt.error, trisock.IncompleteReadError)
            else:
                assert attempt.error is None
            if read in (peek, pluto_peek):
                assert not got
            elif not attempt.cancelled and attempt.error is None:
                assert got
            for _ in script:
                pass
            while chunk := await sock.recv():
                got.append(chunk)
            assert b"".join(got) == said

    await at_every_moment(scenario)


# In the others the peer speaks last, but waits for us before it does.
@pytest.mark.parametrize("layer", ["TLSv1_2 client", "TLSv1_3 server"])
@pytest.mark.parametrize("read", [recv, recv_exactly, recv_until, receive_some, all_lines, peek])
async def test_a_cancelled_read_of_what_came_with_the_handshake_has_consumed_nothing(
    layer: str, read: Callable[[Socket, list[bytes]], Awaitable[None]], kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer, greeting=SAID) as (sock, peer):
            got: list[bytes] = []
            peer.end()
            await attempt(lambda: read(sock, got))
            assert attempt.error is None
            while chunk := await sock.recv():
                got.append(chunk)
            assert b"".join(got) == SAID

    await at_every_moment(scenario)


# ---- sending ----

SMALL = b"some, to be sent"
LARGE = bytes(range(256)) * 1200  # more than the kernel takes at once


async def send_parts(sock: Socket, data: bytes) -> None:
    await sock.send(data[:3], b"", bytearray(data[3:7]), memoryview(data)[7:])


async def send_file(sock: Socket, data: bytes) -> None:
    sizes: list[int] = []
    descriptor = os.memfd_create("a file")
    with open(descriptor, "w+b") as file:
        file.write(data)
        assert await sock.send_file(file, progress=sizes.append) == len(data)
    assert sizes[-1] == len(data)


async def send_file_by_chunks(sock: Socket, data: bytes) -> None:
    assert await sock.send_file(io.BytesIO(data)) == len(data)


class Unknown:
    """A file of which nothing is known: it is read, and sought in, in a thread."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.seek, self.read = self._file.seek, self._file.read


async def send_unknown_file(sock: Socket, data: bytes) -> None:
    assert await sock.send_file(Unknown(data)) == len(data)  # type: ignore[arg-type]


async def send_shared_file(sock: Socket, data: bytes) -> None:
    """Somebody moves in the file all the time."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        assert await sock.send_file(file, progress=lambda _: file.seek(3)) == len(data)  # type: ignore[arg-type]


async def pluto_send(sock: Socket, data: bytes) -> None:
    assert await pluto_socket(sock).send(data) is True


async def wait_and_send(sock: Socket, data: bytes) -> None:
    await sock.wait_send_all_might_not_block()
    await sock.send(data)


SENDS = {
    Socket.send: "Socket.send",
    send_parts: "Socket.send",
    Socket.send_all: "Socket.send_all",
    send_file: "Socket.send_file",
    send_file_by_chunks: "Socket.send_file",
    send_unknown_file: "Socket.send_file",
    send_shared_file: "Socket.send_file",
    pluto_send: "pluto.socket.send",
    wait_and_send: "Socket.wait_send_all_might_not_block",
}


def usual_send(layer: str, send: object, state: str) -> bool:
    if send in (Socket.send_all, pluto_send):
        return layer == UNIX
    return layer in (UNIX, "TLSv1_3 server") or (send is Socket.send and layer in TLS)


@covers(*SENDS.values())
@pytest.mark.parametrize(
    ("layer", "send", "state"),
    grid(usual_send, [UNIX, *TLS], SENDS, ["room", "clogged", "room for a part"]),
)
async def test_a_cancelled_send_has_changed_nothing_or_ends_sending(
    layer: str,
    send: Callable[[Socket, bytes], Awaitable[None]],
    state: str,
    kit: Kit,
) -> None:
    data = LARGE if state == "room for a part" else SMALL

    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            if state == "clogged":
                await clog(sock)
            before = peer.arrived()
            await attempt(lambda: send(sock, data), itertools.chain([None], peer.acting()))
            assert attempt.error is None
            went_out = peer.arrived() - before
            peer.act()
            heard = bytes(peer.heard).lstrip(b"x")  # which it was clogged with
            if not attempt.cancelled:
                assert heard == data
            elif not went_out:
                async with alongside(peer.acting()):
                    await sock.send(b"after it")
                peer.act()
                assert bytes(peer.heard).lstrip(b"x") == b"after it"
            else:
                assert data.startswith(heard)
                with pytest.raises(trio.BrokenResourceError, match="cut off"):
                    await sock.send(b"after it")
                peer.say(b"more")
                try:
                    assert await sock.recv() == b"more"
                except trio.BrokenResourceError:
                    assert layer in TLS
                else:  # between two pieces of a file the records are whole
                    assert layer == UNIX or SENDS[send] == "Socket.send_file"
                peer.act()
                assert bytes(peer.heard).lstrip(b"x") == heard

    await at_every_moment(scenario)


@covers("Socket.send_file")
@pytest.mark.parametrize("state", ["room", "clogged", "silent"])
@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("layer", [UNIX, *TLS])
async def test_a_cancelled_send_of_a_pipe_has_taken_nothing_or_ends_sending(
    layer: str, buffering: int, state: str, kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=buffering) as pipe, open(writing, "wb", 0) as end:
            async with kit.pair(layer) as (sock, peer):
                if state == "clogged":
                    await clog(sock)

                left = [SMALL]

                def write() -> None:
                    while left:
                        end.write(left.pop())
                    end.close()

                def script() -> Script:
                    if state != "silent":
                        write()
                    for _ in peer.acting():
                        yield
                        write()

                await attempt(lambda: sock.send_file(pipe), script())
                assert attempt.error is None
                write()
                rest = pipe.read()
                if not attempt.cancelled:
                    assert (attempt.value, rest) == (len(SMALL), b"")
                elif rest:
                    async with alongside(peer.acting()):
                        await sock.send(rest)
                else:
                    with pytest.raises(trio.BrokenResourceError, match="cut off"):
                        await sock.send(b"after it")
                peer.act()
                heard = bytes(peer.heard).lstrip(b"x")
                if rest or not attempt.cancelled:
                    assert heard == SMALL
                else:
                    assert SMALL.startswith(heard)

    await at_every_moment(scenario)


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("layer", [UNIX, *TLS])
async def test_a_send_to_a_peer_that_has_left_takes_nothing_from_reading_when_it_is_cancelled(
    layer: str, send: Callable[[Socket, bytes], Awaitable[None]], kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            peer.say(b"good")
            peer.say(b"bye")
            peer.raw.close()
            await attempt(lambda: send(sock, SMALL))
            assert attempt.cancelled or isinstance(
                attempt.error, AssertionError if send is pluto_send else trio.BrokenResourceError
            )
            assert await sock.recv_exactly(7) == b"goodbye"

    await at_every_moment(scenario)


@covers("Socket.send_eof")
@pytest.mark.parametrize("layer", [UNIX, TCP])
async def test_a_cancelled_send_eof_has_changed_nothing(layer: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            await attempt(sock.send_eof)
            if attempt.cancelled:
                await sock.send(SMALL)
                await sock.send_eof()
            peer.say(b"answer")
            assert await sock.recv() == b"answer"
            peer.act()
            assert peer.heard == (SMALL if attempt.cancelled else b"")
            assert peer.gone

    await at_every_moment(scenario)


# ---- TLS begins and ends ----


async def assert_closed(sock: Socket, peer: Peer) -> None:
    """Check that a socket is closed here, for every method, and over for the peer."""
    assert sock.fileno() == -1
    assert not sock.isopen()
    for call in (
        sock.recv,
        sock.peek,
        sock.receive_some,
        sock.send_eof,
        sock.stoptls,
        sock.wait_send_all_might_not_block,
        sock.lines().__anext__,
        lambda: sock.send(b"x"),
        lambda: sock.send_file(io.BytesIO(b"x")),
        lambda: sock.recv_exactly(1),
        lambda: sock.recv_until(b"\n"),
        lambda: sock.starttls("example.org"),
    ):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    await sock.close()
    peer.act()
    assert peer.gone


def is_tls(wire: bytes) -> bool:
    """Return whether bytes are records of TLS, of which the last may be cut off."""
    while wire:
        if not re.match(rb"[\x14-\x17](\x03|$)", wire):
            return False
        wire = wire[5 + int.from_bytes(wire[3:5], "big") :]
    return True


async def hello_has_arrived(sock: Socket, peer: Peer) -> None:
    peer.act()


async def hello_was_peeked_at(sock: Socket, peer: Peer) -> None:
    peer.act()
    await sock.peek()  # as a client it hears nothing before it has spoken


async def nothing_has_arrived(sock: Socket, peer: Peer) -> None:
    pass


async def the_peer_has_left(sock: Socket, peer: Peer) -> None:
    peer.raw.close()


async def sending_is_clogged(sock: Socket, peer: Peer) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await clog(sock)


STATES_OF_STARTTLS = [
    nothing_has_arrived,
    hello_has_arrived,
    hello_was_peeked_at,
    the_peer_has_left,
    sending_is_clogged,
]


@covers("Socket.starttls", "pluto.socket.starttls")
@pytest.mark.parametrize(
    ("layer", "face", "state"),
    grid(
        lambda layer, face, state: face == "trisock" or state is nothing_has_arrived,
        TLS,
        ["trisock", "pluto"],
        STATES_OF_STARTTLS,
    ),
)
async def test_a_cancelled_starttls_has_closed_the_socket(
    layer: str,
    face: str,
    state: Callable[[Socket, Peer], Awaitable[None]],
    kit: Kit,
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(UNIX) as (sock, peer):
            starttls = sock.starttls if face == "trisock" else pluto_socket(sock).starttls
            if state is not sending_is_clogged:
                kit.turn_to_tls(peer, layer)
            await state(sock, peer)

            def script() -> Script:
                yield
                if state is the_peer_has_left:
                    return
                if state is sending_is_clogged:
                    yield
                    peer.act()
                    kit.turn_to_tls(peer, layer)
                yield from peer.acting()

            await attempt(lambda: starttls(kit.role_of(layer)), script())
            if state is the_peer_has_left:
                assert attempt.cancelled or face == "pluto" or attempt.error is not None
                assert sock.fileno() == -1
                return
            if not attempt.cancelled:
                assert attempt.error is None
                assert sock.istls()
                await sock.send(b"confidential")
                peer.act()
                assert peer.heard.lstrip(b"x") == b"confidential"
            else:
                await assert_closed(sock, peer)
                assert not peer.heard.strip(b"x")
            assert is_tls(bytes(peer.wire).lstrip(b"x"))

    await at_every_moment(scenario)


@pytest.mark.parametrize("layer", TLS)
async def test_a_starttls_that_is_cancelled_behind_a_broadcast_has_closed_the_socket(
    layer: str, kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(UNIX) as (sock, peer):

            def script() -> Script:
                yield
                while len(peer.heard) < len(LARGE) and not peer.gone:
                    peer.act()
                    yield
                kit.turn_to_tls(peer, layer, after=len(LARGE))
                yield from peer.acting()

            async with trio.open_nursery() as nursery:

                async def broadcast() -> None:
                    with contextlib.suppress(trio.ClosedResourceError):
                        await sock._connection.broadcast(
                            LARGE, sock._connection.generation, math.inf
                        )

                nursery.start_soon(broadcast)
                await trio.testing.wait_all_tasks_blocked()
                await attempt(lambda: sock.starttls(kit.role_of(layer)), script())
            if attempt.cancelled:
                await assert_closed(sock, peer)
            assert LARGE.startswith(peer.wire[: len(LARGE)])
            assert is_tls(bytes(peer.wire[len(LARGE) :]))

    await at_every_moment(scenario)


@covers("Socket.stoptls")
@pytest.mark.parametrize("first", ["we", "the peer"])
@pytest.mark.parametrize("layer", TLS)
async def test_a_cancelled_stoptls_has_closed_the_socket(layer: str, first: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            if first == "the peer":
                peer.end()
            await attempt(sock.stoptls, itertools.chain([None], peer.acting()))
            if attempt.cancelled:
                await assert_closed(sock, peer)
            else:
                assert attempt.error is None
                peer.act()
                await sock.send(b"in the clear")
                peer.act()
            assert is_tls(bytes(peer.wire).removesuffix(b"in the clear"))
            assert peer.heard == (b"" if attempt.cancelled else b"in the clear")

    await at_every_moment(scenario)


# ---- closing ----


async def leave(sock: Socket) -> None:
    async with sock:
        await trio.lowlevel.checkpoint()


async def pluto_close(sock: Socket) -> None:
    await pluto_socket(sock).close()


CLOSES = {
    Socket.close: "Socket.close",
    Socket.aclose: "Socket.aclose",
    leave: "Socket.__aexit__",
    pluto_close: "pluto.socket.close",
}


async def bytes_are_unread(sock: Socket, peer: Peer) -> None:
    peer.say(b"unread")
    await trio.lowlevel.wait_readable(sock.fileno())


async def something_was_said(sock: Socket, peer: Peer) -> None:
    await sock.send(b"said")


STATES_OF_CLOSES = [something_was_said, bytes_are_unread, sending_is_clogged, the_peer_has_left]


@covers(*CLOSES.values())
@pytest.mark.parametrize(
    ("layer", "close", "state"),
    grid(
        lambda layer, close, state: close is Socket.close or layer == UNIX,
        LAYERS,
        CLOSES,
        STATES_OF_CLOSES,
    ),
)
async def test_a_cancelled_close_has_closed(
    layer: str,
    close: Callable[[Socket], Awaitable[None]],
    state: Callable[[Socket, Peer], Awaitable[None]],
    kit: Kit,
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            await state(sock, peer)

            def script() -> Script:
                yield
                while state is not the_peer_has_left:
                    peer.act()
                    if peer.gone:
                        peer.end()
                    yield

            await attempt(lambda: close(sock), script())
            assert attempt.error is None
            assert sock.fileno() == -1
            if state is the_peer_has_left:
                return
            await assert_closed(sock, peer)
            if state is something_was_said:
                assert peer.heard == b"said"  # the kernel had it
            assert peer.finished or attempt.cancelled or state is bytes_are_unread

    await at_every_moment(scenario)


@pytest.mark.parametrize("layer", LAYERS)
async def test_a_cancelled_close_wakes_a_reader_and_a_second_closer(layer: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer), trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await sock.recv()
                await sock.close()

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await attempt(sock.close, itertools.chain([None], peer.acting()))
            assert sock.fileno() == -1

    await at_every_moment(scenario)


# ---- connecting ----


class Acceptor:
    """A listening socket without Trio, and the peers that it has accepted."""

    def __init__(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        self.listening = listening
        self.peers: list[Peer] = []
        self.secure: Callable[[Peer], None] = lambda peer: None

    def act(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                peer = Peer(self.listening.accept()[0])
                self.peers.append(peer)
                self.secure(peer)
        for peer in self.peers:
            peer.act()

    def acting(self) -> Script:
        while True:
            yield
            self.act()

    def close(self) -> None:
        for peer in self.peers:
            peer.raw.close()
        self.listening.close()


@contextlib.contextmanager
def accepting(address: str | tuple[str, int], secure: Callable[[Peer], None]) -> Iterator[Acceptor]:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind(address)
        listening.listen()
        acceptor = Acceptor(listening)
        acceptor.secure = secure
        yield acceptor
        acceptor.close()


def jumping(clock: trio.testing.MockClock, script: Script) -> Script:
    """Let a script's time go on, too: what waits for nothing else has waited for that."""
    for _ in script:
        clock.jump(0.1)
        yield
    while True:
        clock.jump(0.1)
        yield


async def assert_connected_or_nothing_left(
    attempt: Attempt, sock: Socket | None, acceptor: Acceptor
) -> None:
    """Check what connect has left, or not: a connection that works, or none."""
    assert attempt.error is None
    acceptor.act()
    if attempt.cancelled:
        assert all(peer.gone and not peer.heard for peer in acceptor.peers)
        return
    assert sock is not None
    async with closing(sock):
        await sock.send(b"hello")
        acceptor.act()
        assert [bytes(peer.heard) for peer in acceptor.peers] == [b"hello"]


@covers("connect", "connect_unix", "pluto.socket.connect")
@pytest.mark.parametrize(
    ("how", "layer"),
    [
        ("pluto", CLEAR),
        *itertools.product(
            ["connect", "connect_unix"], [CLEAR, "TLSv1_2 client", "TLSv1_3 client"]
        ),
    ],
)
async def test_a_cancelled_connect_leaves_nothing(
    how: str, layer: str, kit: Kit, tmp_path: Path
) -> None:
    tls = None if layer == CLEAR else kit.client_tls

    def secure(peer: Peer) -> None:
        if tls is not None:
            kit.turn_to_tls(peer, layer)

    async def connect(acceptor: Acceptor) -> Any:
        address = acceptor.listening.getsockname()
        if how == "connect_unix":
            return await trisock.connect_unix(address, tls=tls)
        if how == "connect":
            return await trisock.connect(*address, tls=tls)
        return await pluto.socket.connect(*address)

    async def scenario(attempt: Attempt) -> None:
        path = tmp_path / "socket"
        path.unlink(missing_ok=True)
        with accepting(
            str(path) if how == "connect_unix" else ("127.0.0.1", 0), secure
        ) as acceptor:
            await attempt(lambda: connect(acceptor), acceptor.acting())
            connected = getattr(attempt.value, "_sock", attempt.value)
            await assert_connected_or_nothing_left(attempt, connected, acceptor)

    await at_every_moment(scenario)


class Resolver(trio.abc.HostnameResolver):
    """Gives a name several addresses."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    async def getaddrinfo(self, host: object, port: object, *_: object) -> Any:
        await trio.lowlevel.checkpoint()
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (each, port)) for each in self.hosts]

    async def getnameinfo(self, *_: object) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("tls", [False, True])
async def test_a_cancelled_connect_to_several_addresses_leaves_nothing(
    tls: bool, kit: Kit, mock_clock: trio.testing.MockClock
) -> None:
    """One refuses, one does not answer, and one does when the others have had their time."""

    def secure(peer: Peer) -> None:
        if tls:
            kit.turn_to_tls(peer, "TLSv1_3 client")

    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2", "127.0.0.3"))

    async def scenario(attempt: Attempt) -> None:
        with accepting(("127.0.0.3", 0), secure) as acceptor, contextlib.ExitStack() as stack:
            port = acceptor.listening.getsockname()[1]
            full = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
            for _ in range(2):  # as many as its backlog holds: the next gets no answer
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            await attempt(
                lambda: trisock.connect("example.org", port, tls=kit.client_tls if tls else None),
                jumping(mock_clock, acceptor.acting()),
            )
            await assert_connected_or_nothing_left(attempt, attempt.value, acceptor)

    await at_every_moment(scenario)


async def test_a_cancelled_connect_that_nobody_accepts_leaves_nothing() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2"))
    with socket.create_server(("127.0.0.3", 0)) as elsewhere:
        port = elsewhere.getsockname()[1]

        async def scenario(attempt: Attempt) -> None:
            await attempt(lambda: trisock.connect("example.org", port))
            assert attempt.cancelled or isinstance(attempt.error, ConnectionRefusedError)

        await at_every_moment(scenario)


async def test_a_cancelled_connect_unix_behind_a_full_backlog_leaves_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async def scenario(attempt: Attempt) -> None:
        path = tmp_path / "socket"
        path.unlink(missing_ok=True)
        with (
            accepting(str(path), lambda peer: None) as acceptor,
            socket.socket(socket.AF_UNIX) as first,
        ):
            acceptor.listening.listen(0)
            first.connect(str(path))

            def script() -> Script:
                yield
                yield
                yield from acceptor.acting()

            await attempt(lambda: trisock.connect_unix(path), jumping(mock_clock, script()))
            first.close()
            acceptor.act()
            acceptor.peers.pop(0).raw.close()
            await assert_connected_or_nothing_left(attempt, attempt.value, acceptor)

    await at_every_moment(scenario)


# ---- listening, accepting ----


@covers("listen")
@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
async def test_a_cancelled_listen_leaves_the_port_free(host: str | None) -> None:
    async with await trisock.listen(0, host) as listener:
        port = listener.port

    async def scenario(attempt: Attempt) -> None:
        await attempt(lambda: trisock.listen(port, host))
        assert attempt.error is None
        if not attempt.cancelled:
            attempt.value.abort()
        async with await trisock.listen(port, host):
            pass

    await at_every_moment(scenario)


@covers("listen_unix")
@pytest.mark.parametrize("state", ["free", "stale", "locked"])
async def test_a_cancelled_listen_unix_leaves_no_path_and_no_lock(
    state: str, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "socket"

    async def scenario(attempt: Attempt) -> None:
        if state == "stale":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        lock = os.open(tmp_path, os.O_RDONLY)
        if state == "locked":
            fcntl.flock(lock, fcntl.LOCK_EX)

        def script() -> Script:
            yield
            yield
            fcntl.flock(lock, fcntl.LOCK_UN)

        await attempt(lambda: trisock.listen_unix(path), jumping(mock_clock, script()))
        os.close(lock)
        assert attempt.error is None
        if attempt.cancelled:
            assert os.listdir(tmp_path) == (["socket"] if state == "stale" else [])
        else:
            attempt.value.abort()
        trisock.listen_unix_nowait(path).abort()
        assert not os.listdir(tmp_path)

    await at_every_moment(scenario)


# A method keeps its listener alive: one of pluto's closes when it is dropped.
ACCEPTS: dict[str, Callable[[trisock.Listener], Call]] = {
    "Listener.accept": lambda listener: listener.accept,
    "Listener.__anext__": lambda listener: listener.__anext__,
    "pluto.listener.accept": lambda listener: pluto.listener(listener, current_run()).accept,
}


async def listen_on(where: str, path: Path) -> trisock.Listener:
    if where == "unix":
        return await trisock.listen_unix(path)
    return await trisock.listen(0, None if where == "both" else "127.0.0.1")


def connect_to(listener: trisock.Listener) -> socket.socket:
    host, port = listener.addresses[-1]
    if not port:
        with contextlib.ExitStack() as on_error:
            client = on_error.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(host)
            on_error.pop_all()
        return client
    return socket.create_connection(("::1" if ":" in host else "127.0.0.1", port))


@covers(*ACCEPTS)
@pytest.mark.parametrize("state", ["waiting", "late", "found by hasconnection"])
@pytest.mark.parametrize("name", ACCEPTS)
@pytest.mark.parametrize("where", ["unix", "IPv4", "both"])
async def test_a_cancelled_accept_has_lost_no_connection(
    where: str, name: str, state: str, tmp_path: Path
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with await listen_on(where, tmp_path / "socket") as listener:
            clients: list[socket.socket] = []

            def script() -> Script:
                if state == "late":
                    yield
                clients.append(connect_to(listener))
                if state == "found by hasconnection":
                    assert listener.hasconnection()
                yield

            steps, accept = script(), ACCEPTS[name](listener)
            await attempt(accept, steps)
            assert attempt.error is None
            for _ in steps:
                pass
            accepted = attempt.value or await listener.accept()
            assert not listener.hasconnection()
            with clients[0] as client:
                async with closing(getattr(accepted, "_sock", accepted)):
                    client.sendall(b"hello")
                    assert await accepted.recv() == b"hello"

    await at_every_moment(scenario)


async def leave_listener(listener: trisock.Listener) -> None:
    async with listener:
        pass


async def pluto_close_listener(listener: trisock.Listener) -> None:
    await pluto.listener(listener, current_run()).close()


LISTENER_CLOSES = {
    trisock.Listener.close: "Listener.close",
    trisock.Listener.aclose: "Listener.aclose",
    leave_listener: "Listener.__aexit__",
    pluto_close_listener: "pluto.listener.close",
}


@covers(*LISTENER_CLOSES.values())
@pytest.mark.parametrize("close", LISTENER_CLOSES)
@pytest.mark.parametrize("where", ["unix", "both"])
async def test_a_cancelled_close_of_a_listener_has_closed_it_and_woken_who_accepts(
    where: str, close: Callable[[trisock.Listener], Awaitable[None]], tmp_path: Path
) -> None:
    async def scenario(attempt: Attempt) -> None:
        listener = await listen_on(where, tmp_path / "socket")
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await listener.accept()

            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            await attempt(lambda: close(listener))
        assert not list(tmp_path.iterdir())
        with pytest.raises(trio.ClosedResourceError):
            listener.hasconnection()
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            connect_to(listener)

    await at_every_moment(scenario)


# ---- servers ----


async def greet(sock: Socket) -> None:
    await sock.send(b"hello")
    while line := await sock.recv():
        await sock.send(line)


@covers("bind")
@pytest.mark.parametrize("given", ["port", "listener"])
async def test_a_cancelled_bind_leaves_nothing_that_listens(given: str) -> None:
    async def scenario(attempt: Attempt) -> None:
        listener = trisock.listen_nowait(0)
        port = listener.port
        if given == "port":
            listener.abort()
        async with trio.open_nursery() as nursery:
            await attempt(
                lambda: trisock.bind(nursery, port if given == "port" else listener, greet)
            )
            assert attempt.error is None
            if not attempt.cancelled:
                attempt.value.stop()
        trisock.listen_nowait(port).abort()

    await at_every_moment(scenario)


@covers("bind")
@pytest.mark.parametrize(
    ("layer", "max_connections"),
    grid(
        lambda layer, max_connections: layer == CLEAR or max_connections is None,
        [CLEAR, *SERVERS],
        [None, 1],
    ),
)
async def test_a_cancelled_server_leaves_no_connection_and_no_listener(
    layer: str, max_connections: int | None, kit: Kit
) -> None:
    """Its own task is cancelled, and so are those of the handlers, wherever they are."""

    async def scenario(attempt: Attempt) -> None:
        listener = trisock.listen_nowait(0, "127.0.0.1")
        peers = []
        servers = []

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                server = await trisock.bind(
                    nursery,
                    listener,
                    greet,
                    tls=None if layer == CLEAR else kit.server_tls,
                    max_connections=max_connections,
                )
                servers.append(server)

        def script() -> Script:
            for _ in range(2):
                peers.append(Peer(connect_to(listener)))
                if layer != CLEAR:
                    kit.turn_to_tls(peers[-1], layer)
            yield
            for peer in peers:
                while not peer.heard:
                    peer.act()
                    yield
                peer.say(b"line")
                while peer.heard != b"helloline":
                    peer.act()
                    yield
                peer.end()
                yield
                if not peer.gone:  # it waits for both directions to end
                    peer.act()
                    peer.raw.close()
                    peer.gone = True
            servers[0].stop()

        await attempt(serve, script())
        assert attempt.error is None
        for server in servers:
            await server.wait_closed()
            assert not server.connections
            assert server.stats().active == 0
            assert server.stats().handler_errors == 0
        trisock.listen_nowait(listener.port, "127.0.0.1").abort()
        for peer in peers:
            if not peer.gone:
                peer.raw.setblocking(True)
                with contextlib.suppress(ConnectionError):
                    while peer.raw.recv(65536):
                        pass
            peer.raw.close()

    await at_every_moment(scenario)


@covers("Server.wait_closed")
async def test_a_cancelled_wait_closed_leaves_the_server_as_it_is() -> None:
    async def scenario(attempt: Attempt) -> None:
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, greet)

            def script() -> Script:
                yield
                yield
                server.stop()

            await attempt(server.wait_closed, script())
            if attempt.cancelled:
                client = await trisock.connect("127.0.0.1", server.port)
                assert await client.recv() == b"hello"
                await client.close()
                server.stop()
                await server.wait_closed()

    await at_every_moment(scenario)


@covers("Server.broadcast")
@pytest.mark.parametrize("layer", grid(lambda layer: "1_2" not in layer, [CLEAR, *SERVERS]))
async def test_a_cancelled_broadcast_ends_sending_only_where_a_part_was_sent(
    layer: str, kit: Kit, tmp_path: Path
) -> None:
    """To one client that takes it all, and one that does not."""

    async def scenario(attempt: Attempt) -> None:
        listener = trisock.listen_unix_nowait(tmp_path / "socket")
        answers = []

        async def handler(sock: Socket) -> None:
            await sock.send(b"hello")
            await sock.recv()
            try:
                await sock.send(b"after it")
            except trio.BrokenResourceError:
                answers.append("broken")
            else:
                answers.append("sent")

        async with trio.open_nursery() as nursery:
            server = await trisock.bind(
                nursery, listener, handler, tls=None if layer == CLEAR else kit.server_tls
            )
            peers = [Peer(connect_to(listener)) for _ in range(2)]
            slow, fast = peers
            for peer in peers:
                if layer != CLEAR:
                    kit.turn_to_tls(peer, layer)
                while peer.heard != b"hello":
                    peer.act()
                    await trio.lowlevel.checkpoint()

            def script() -> Script:
                yield
                while len(fast.heard) < len(LARGE):
                    fast.act()
                    yield
                yield from slow.acting()

            await attempt(lambda: server.broadcast(LARGE), script())
            assert attempt.error is None
            assert attempt.cancelled or attempt.value == 2
            for peer in peers:
                peer.act()
                peer.say(b"go on")
            while len(answers) < 2:
                await trio.lowlevel.checkpoint()
                for peer in peers:
                    peer.act()
            server.stop()
        for peer in peers:
            while not peer.gone:
                peer.act()
            peer.raw.close()
            said = bytes(peer.heard).removeprefix(b"hello")
            if said.endswith(b"after it"):
                assert said.removesuffix(b"after it") in (b"", LARGE)
            else:
                assert attempt.cancelled
                assert LARGE.startswith(said)
        assert sum(peer.heard.endswith(b"after it") for peer in peers) == answers.count("sent")

    await at_every_moment(scenario)


# ---- hs.socket ----


@covers("hammerspoon.open_sockets")
async def test_cancelled_open_sockets_leave_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def scenario(attempt: Attempt) -> None:
        async def converse() -> None:
            async with hammerspoon.open_sockets() as hs:
                over = trio.Event()
                server = hs.server(path, lambda data, tag: server.write(data))
                client = hs.new(lambda data, tag: over.set()).connect(path)
                client.write(b"line\n").read(5)
                while not server.connections():
                    await trio.lowlevel.checkpoint()
                server.read(b"\n")
                await over.wait()

        await attempt(converse)
        assert attempt.error is None
        assert not list(tmp_path.iterdir())

    await at_every_moment(scenario)


@pytest.mark.parametrize("kind", ["unread", "write fails", "slow callback"])
async def test_cancelled_open_sockets_leave_nothing_of_peers_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What waits for a hangup, for two seconds, or for a callback, holds descriptors too."""
    monkeypatch.setattr("trisock.hammerspoon.queues.UNREAD_SECONDS", 0, raising=False)
    monkeypatch.setattr("trisock.hammerspoon.queues._SETTLE_SECONDS", 0, raising=False)
    monkeypatch.setattr("trisock.hammerspoon.callbacks.MAX_HELD", 0, raising=False)
    path = str(tmp_path / "socket")
    descriptors = len(os.listdir("/proc/self/fd"))

    async def scenario(attempt: Attempt) -> None:
        async def converse() -> None:
            async with hammerspoon.open_sockets() as hs:

                async def slow(data: bytes, tag: int) -> None:
                    await trio.lowlevel.checkpoint()
                    server.read(1)

                server = hs.server(path, slow)
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(path)
                    while not server.connections():
                        await trio.lowlevel.checkpoint()
                    if kind == "slow callback":
                        server.read(1)
                        server.read(1)
                    peer.send(b"unread")
                if kind == "write fails":
                    server.write(b"x")
                while server.connections():
                    await trio.lowlevel.checkpoint()

        await attempt(converse)
        assert attempt.error is None
        assert not list(tmp_path.iterdir())
        assert len(os.listdir("/proc/self/fd")) == descriptors

    await at_every_moment(scenario)


@covers("pluto.scheduler.run")
async def test_a_cancelled_scheduler_has_ended_its_tasks_and_can_run_again() -> None:
    async def scenario(attempt: Attempt) -> None:
        scheduler = pluto.scheduler()
        listener = pluto.socket.bind(scheduler, 0, lambda s: s.send(b"hello"))

        def script() -> Script:
            yield
            with Peer(connect_to(listener._listening)) as peer:
                while peer.heard != b"hello":
                    peer.act()
                    yield
            listener._server.stop()

        await attempt(scheduler.run, script())
        assert attempt.error is None
        trisock.listen_nowait(listener.port).abort()
        scheduler.add(trio.lowlevel.checkpoint)
        await scheduler.run()

    await at_every_moment(scenario)


# ---- all of them ----


def public_async_names() -> set[str]:
    """Return what is public and awaited, or iterated over or entered asynchronously."""
    names = {"pluto.socket.connect", "pluto.scheduler.run"}  # plain, but return an awaitable
    for module, prefix in (trisock, ""), (pluto, "pluto."), (hammerspoon, "hammerspoon."):
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing):
                if is_async(thing):
                    names.add(f"{prefix}{name}")
                continue
            for attribute in dir(thing):
                if is_public(attribute) and is_async(getattr(thing, attribute)):
                    names.add(f"{prefix}{name}.{attribute}")
    # The same function as socket's; and Trio's own, which does nothing.
    return {
        name
        for name in names
        if not name.startswith("pluto.async_socket.") and not name.endswith(".__aenter__")
    }


def is_public(name: str) -> bool:
    return not name.startswith("_") or name.startswith("__a")


def is_async(thing: object) -> bool:
    if not callable(thing):
        return False
    function = inspect.unwrap(thing)
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def test_each_public_async_name_is_covered() -> None:
    assert public_async_names() == COVERED


@pytest.mark.parametrize("layer", LAYERS)
async def test_the_methods_of_trio_abc_are_full_checkpoints(layer: str, kit: Kit) -> None:
    async with kit.pair(layer) as (sock, peer):
        for call in (
            sock.wait_send_all_might_not_block,
            lambda: sock.send_all(b""),
            lambda: sock.send_all(b"x"),
        ):
            with trio.testing.assert_checkpoints():
                await call()
        sock.unrecv(b"pushed back")
        peer.say(b"arrived")
        peer.end()
        for expected in (b"pushed back", b"arrived", b"", b""):
            with trio.testing.assert_checkpoints():
                assert await sock.receive_some() == expected
        if layer not in TLS:
            with trio.testing.assert_checkpoints():
                await sock.send_eof()
        for close in (sock.aclose, sock.aclose, lambda: sock.__aexit__(None, None, None)):
            with trio.testing.assert_checkpoints():
                await close()


async def test_the_methods_of_a_listener_are_full_checkpoints() -> None:
    listener = trisock.listen_nowait(0)
    with connect_to(listener), connect_to(listener):
        for accept in (listener.accept, lambda: anext(listener)):
            with trio.testing.assert_checkpoints():
                sock = await accept()
            sock.abort()
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await listener.aclose()
