"""STARTTLS with peers that lie, stall, flood, inject or disconnect, at every step.

Whatever the peer does, a negotiation ends in TLS or in a documented error, within its deadline. A
negotiation buffers a bounded number of bytes. No read under TLS returns a byte from before TLS, and
nothing follows the negotiation in plain text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import strategies as st

from helpers.fuzzing import SOME_CHANGES, Change, Fuzz, changed
from helpers.pairs import closing, unix_pair
from helpers.starttls_conversations import (
    CLIENT_CONVERSATIONS,
    MYSQL_REQUEST,
    SERVER_CONVERSATIONS,
    Conversation,
    Heard,
    said_by_us,
)
from trisock import ClientTLS, ServerTLS, Socket, TLSArgument, TLSError
from trisock.starttls import accept, upgrade

TIMEOUT = 60

# The documented maximum, plus one more read.
MAX_HELD = 65536 + 131072

CANARY = b"CANARY"
REAL = b"only this is real"

ATTACKS = ["none", "lie", "swap", "inject", "inject before", "stall", "flood", "end", "reset"]

CANARIES = [
    CANARY,
    CANARY + b"\r\n",
    b"220 " + CANARY + b"\r\n",
    b"* " + CANARY + b"\r\n",
    b"a2 OK " + CANARY + b"\r\n",
    b"a NOOP " + CANARY + b"\r\n",
    b"NOOP " + CANARY + b"\r\n",
    b"PING :" + CANARY + b"\r\n",
    b"<" + CANARY + b"/>",
    b"\xff\xfb\x01" + CANARY,
    b"\x16\x03\x01\x40\x00" + CANARY,
    b"\x15\x03\x03\x00\x02\x01\x00" + CANARY,
    b"\x17\x03\x03\x00\x06" + CANARY,
]

FLOODS = [
    b"x" * 1000,
    b"220-x\r\n" * 100,
    b"* x\r\n" * 100,
    b"* x {4000}\r\n" + b"x" * 4000,
    b":x PING\r\n" * 100,
    b"PING :x\r\n" * 100,
    b"\xff\xfb\x01" * 300,
    b"\xff\xfa" + b"x" * 999,
    b"<a>" * 300,
    b"<a b='" + b">" * 900,
    bytes(1000),
]

MESSAGES = sorted(
    {
        each
        for table in (CLIENT_CONVERSATIONS, SERVER_CONVERSATIONS)
        for conversation in table.values()
        for each in conversation
        if isinstance(each, bytes)
    }
)

# What our side may send in reply to a lie: answers to pings, and refusals of options.
REACTIONS = {"irc": re.compile(rb"PONG[^\n]*\n"), "telnet": re.compile(rb"\xff[\xfc\xfe].", re.S)}


class HostilePeer:
    """Plays one side of a conversation, with one attack.

    ``heard`` holds the plain text from our side.
    """

    def __init__(
        self,
        sock: Socket,
        ours: Socket,
        conversation: Conversation,
        attack: str,
        step: int,
        canary: bytes,
        flood: bytes,
        swapped: bytes,
        changes: list[Change],
    ) -> None:
        self._sock = sock
        self._ours = ours
        self._conversation = conversation
        self._attack = attack
        said = [number for number, each in enumerate(conversation) if isinstance(each, bytes)]
        self._step = said[step % len(said)]
        self._canary = canary
        self._flood = flood
        self._swapped = swapped
        self._changes = changes
        self.heard = b""

    async def run(self, tls: TLSArgument) -> None:
        sock = self._sock
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            try:
                if not await self._converse() or not await self._hears_tls():
                    return
                await sock.starttls(tls)
                await sock.send(REAL)
                await sock.close()
            finally:
                await self._drain()

    async def _converse(self) -> bool:
        """Return whether the conversation reaches TLS."""
        for number, each in enumerate(self._conversation):
            if isinstance(each, Heard):
                await self._hear(len(each.data))
            elif number == self._step:
                if not await self._attack_at(each):
                    return False
            else:
                await self._sock.send(each)
        return True

    async def _attack_at(self, message: bytes) -> bool:
        send = self._sock.send
        half = message[: len(message) // 2]
        if self._attack == "lie":
            await send(changed(message, self._changes))
        elif self._attack == "swap":
            await send(self._swapped)
        elif self._attack == "inject":
            await send(message + self._canary)
        elif self._attack == "inject before":
            await send(self._canary + message)
        elif self._attack == "flood":
            await send(half)
            for _ in range(600):
                await send(self._flood)
                assert self._ours.info().buffered <= MAX_HELD
            return False
        elif self._attack == "none":
            await send(message)
        else:
            await send(half)
            if self._attack == "stall":
                await trio.sleep(2 * TIMEOUT)
            elif self._attack == "reset":
                self._sock.abort()
            return False
        return True

    async def _hear(self, size: int) -> None:
        """Receive ``size`` bytes from our side, or fewer if our side waits for the peer."""
        end = len(self.heard) + size
        with trio.move_on_after(1):
            while len(self.heard) < end and (chunk := await self._sock.recv(end - len(self.heard))):
                self.heard += chunk

    async def _hears_tls(self) -> bool:
        with trio.move_on_after(1):
            return (await self._sock.peek(wait=True))[:1] == b"\x16"
        return True

    async def _drain(self) -> None:
        if self._sock.istls() or self._sock.fileno() == -1:
            return
        await self._sock.send_eof()
        async for chunk in self._sock:
            self.heard += chunk


def check_plain_text(protocol: str, heard: bytes, conversation: Conversation) -> None:
    """Check that a client sent the start of a good conversation, or a whole one and TLS records."""
    expected = said_by_us(conversation)
    if pattern := REACTIONS.get(protocol):
        heard, expected = pattern.sub(b"", heard), pattern.sub(b"", expected)
    elif protocol == "mysql" and len(heard) >= 8:  # our flags depend on the peer's flags
        heard = heard[:4] + MYSQL_REQUEST[4:8] + heard[8:]
    if not expected.startswith(heard):
        assert heard.startswith(expected)
        assert heard[len(expected) :][:1] in (b"\x15", b"\x16")


def check_server_text(heard: bytes, conversation: Conversation) -> None:
    """Check that only TLS records follow a server's go-ahead."""
    go_ahead = conversation[-1]
    assert isinstance(go_ahead, Heard)
    if len(go_ahead.data) > 1:
        _, _, after = heard.partition(go_ahead.data)
        assert after[:1] in (b"", b"\x15", b"\x16")


Ours = Callable[[Socket], Awaitable[object]]


async def converse(
    ours: Ours, tls: TLSArgument, conversation: Conversation, **attack: object
) -> bytes:
    """Run one conversation. Return the plain text that the peer has received."""
    a, b = unix_pair()
    peer = HostilePeer(b, a, conversation, **attack)  # type: ignore[arg-type]
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(peer.run, tls)
        start = trio.current_time()
        failure: TLSError | None = None
        try:
            await ours(a)
        except TLSError as exc:
            failure = exc
        if failure is not None:
            assert a.fileno() == -1
            assert str(failure).isprintable()
            assert attack["attack"] != "none"
        else:
            assert a.istls()
            received = b""
            with contextlib.suppress(TLSError):
                async for chunk in a:
                    received += chunk
            assert received == REAL
            await a.close()
        assert trio.current_time() <= start + TIMEOUT
        nursery.cancel_scope.deadline = trio.current_time() + 3 * TIMEOUT
    assert not nursery.cancel_scope.cancelled_caught
    return peer.heard


STRATEGIES = {
    "attack": st.sampled_from(ATTACKS),
    "step": st.integers(0, 5),
    "canary": st.sampled_from(CANARIES),
    "flood": st.sampled_from(FLOODS),
    "swapped": st.sampled_from(MESSAGES) | st.binary(max_size=40),
    "changes": SOME_CHANGES,
}


def conversations(times: int) -> int:
    """Return the number of conversations per protocol and round (more in ``nox -s chance``)."""
    return 500 if times >= 20 else 80


@pytest.mark.parametrize("protocol", CLIENT_CONVERSATIONS)
def test_a_client_survives_every_server(
    protocol: str, fuzz: Fuzz, times: int, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    conversation = CLIENT_CONVERSATIONS[protocol]

    async def check(clock: trio.testing.MockClock, **attack: object) -> None:
        clock.autojump_threshold = 0
        heard = await converse(
            lambda sock: upgrade(sock, protocol, client_tls, timeout=TIMEOUT),
            server_tls,
            conversation,
            **attack,
        )
        check_plain_text(protocol, heard, conversation)

    fuzz.run_async(check, conversations(times), **STRATEGIES)


@pytest.mark.parametrize("protocol", SERVER_CONVERSATIONS)
def test_a_server_survives_every_client(
    protocol: str, fuzz: Fuzz, times: int, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    conversation = SERVER_CONVERSATIONS[protocol]

    async def check(clock: trio.testing.MockClock, **attack: object) -> None:
        clock.autojump_threshold = 0
        heard = await converse(
            lambda sock: accept(sock, protocol, server_tls, hostname="localhost", timeout=TIMEOUT),
            client_tls,
            conversation,
            **attack,
        )
        check_server_text(heard, conversation)

    fuzz.run_async(check, conversations(times), **STRATEGIES)
