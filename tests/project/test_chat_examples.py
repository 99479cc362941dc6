"""The example chat_room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

import trisock
from helpers.examples import Running, running
from helpers.pairs import read_all
from trisock import Socket


async def hear(sock: Socket) -> str:
    return (await sock.recv_until(b"\n")).decode().removesuffix("\n")


@asynccontextmanager
async def chatting(room: Running, name: str) -> AsyncIterator[Socket]:
    """Enter the room under a name, and read the room's announcement."""
    async with await trisock.connect("127.0.0.1", room.port) as sock:
        assert await hear(sock) == "* who are you?"
        await sock.send(f"{name}\r\n".encode())
        assert await hear(sock) == f"* {name} is here"
        yield sock


async def test_chat_room_broadcasts_lines_arrivals_and_departures() -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with chatting(room, "Bob") as bob:
            assert await hear(ann) == "* Bob is here"
            await ann.send(b"hello Bob\n")
            for sock in (ann, bob):
                assert await hear(sock) == "Ann: hello Bob"
            await bob.send("\x1b[31mgr\u00fc\u00df dich\x07\n\n".encode())
            for sock in (ann, bob):
                assert await hear(sock) == "Bob: [31mgr\u00fc\u00df dich"
        assert await hear(ann) == "* Bob has left"


async def test_chat_room_sends_lines_to_all_in_the_same_order() -> None:
    async with (
        running("chat_room") as room,
        chatting(room, "Ann") as ann,
        chatting(room, "Bob") as bob,
    ):
        assert await hear(ann) == "* Bob is here"
        heard: dict[Socket, list[str]] = {ann: [], bob: []}

        async def hear_all(sock: Socket) -> None:
            while len(heard[sock]) < 400:
                heard[sock].append(await hear(sock))

        async with trio.open_nursery() as nursery:
            for sock in (ann, bob):
                nursery.start_soon(hear_all, sock)
                nursery.start_soon(sock.send, b"".join(b"%d\n" % n for n in range(200)))
        assert heard[ann] == heard[bob]
        for name in ("Ann", "Bob"):
            lines = [line for line in heard[ann] if line.startswith(name)]
            assert lines == [f"{name}: {n}" for n in range(200)]


async def test_chat_room_refuses_empty_overlong_and_duplicate_names() -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with await trisock.connect("127.0.0.1", room.port) as sock:
            assert await hear(sock) == "* who are you?"
            for name in (b"Ann", b"", b"\x1b", b"x" * 21):
                await sock.send(name + b"\n")
                assert await hear(sock) == "* empty, too long, or in use. who are you?"
            await sock.send(b"Ann!\n")
            assert await hear(sock) == "* Ann! is here"
        assert await hear(ann) == "* Ann! is here"
        assert await hear(ann) == "* Ann! has left"


async def test_chat_room_frees_the_name_of_a_client_that_left() -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with chatting(room, "Bob"):
            pass
        assert [await hear(ann) for _ in range(2)] == ["* Bob is here", "* Bob has left"]
        async with chatting(room, "Bob"):
            pass


@pytest.mark.parametrize("leave", ["mid-line", "reset", "line too long"])
async def test_chat_room_announces_every_kind_of_departure(leave: str) -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with chatting(room, "Bob") as bob:
            assert await hear(ann) == "* Bob is here"
            if leave == "mid-line":
                await bob.send(b"I wanted to s")
                await bob.send_eof()
            elif leave == "reset":
                bob.abort()
            else:
                await bob.send(b"x" * 10_000)
                assert await hear(bob) == "* a line has at most 512 bytes"
            assert await hear(ann) == "* Bob has left"


async def test_chat_room_says_goodbye_when_it_stops() -> None:
    async with (
        running("chat_room") as room,
        chatting(room, "Ann") as ann,
        await trisock.connect("127.0.0.1", room.port) as nameless,
    ):
        assert await hear(nameless) == "* who are you?"
        room.ask_to_stop()
        for sock in (ann, nameless):
            assert await read_all(sock) == b"* the room is closing\n"
