"""Fuzzing of lines and frames, and of their limits."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import strategies as st

import trisock
from helpers.fuzzing import Fuzz
from helpers.mutants import SOME_CUTS, mutant_pair
from helpers.peers import alongside

TEXTS = st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"\0"]), max_size=60).map(b"".join)
DELIMITERS = TEXTS.map(lambda data: data[:3]).filter(len)


def test_lines_lose_nothing_and_stay_within_the_limit(fuzz: Fuzz) -> None:
    async def read(
        clock: trio.testing.MockClock,
        data: bytes,
        delimiter: bytes,
        limit: int,
        cuts: list[int],
        method: str,
    ) -> None:
        got: list[bytes] = []
        error: Exception | None = None
        async with mutant_pair(cuts) as (sock, mutant):
            mutant.send(data)
            async with alongside(mutant.conversing(clock, "ended")):
                lines = sock.lines(delimiter=delimiter, keep_ends=True, max_bytes=limit)
                batches = lines.batches()
                try:
                    while True:
                        if method == "lines":
                            got.append(await anext(lines))
                        elif method == "batches":
                            got += await anext(batches)
                        elif method == "recv_line":
                            line = await sock.recv_line(delimiter=delimiter, max_bytes=limit)
                            got.append(line + delimiter)
                        else:
                            got.append(await sock.recv_until(delimiter, max_bytes=limit))
                except StopAsyncIteration:
                    pass
                except (trisock.LimitExceededError, trisock.IncompleteReadError) as exc:
                    error = exc
                rest = b"".join([chunk async for chunk in sock])
        assert b"".join(got) + rest == data
        for line in got:
            assert line.endswith(delimiter)
            assert line.index(delimiter) + len(delimiter) == len(line) <= limit
        if isinstance(error, trisock.LimitExceededError):
            assert error.limit == limit <= len(rest)
            assert delimiter not in rest[:limit]
        elif isinstance(error, trisock.IncompleteReadError):
            assert error.partial == rest
            assert len(rest) < limit
            assert delimiter not in rest
        else:
            assert not rest

    fuzz.run_async(
        read,
        150,
        data=TEXTS,
        delimiter=DELIMITERS,
        limit=st.integers(1, 70),
        cuts=SOME_CUTS,
        method=st.sampled_from(["lines", "batches", "recv_until", "recv_line"]),
    )


def test_a_caller_can_skip_a_line_over_the_limit(fuzz: Fuzz) -> None:
    """Read the first part of the line, push back half of that part, and search again."""

    async def read(
        clock: trio.testing.MockClock, data: bytes, delimiter: bytes, limit: int, cuts: list[int]
    ) -> None:
        part = max(1, limit - len(delimiter) + 1)
        kept = part // 2
        expected, got = [], []
        unread = data
        while True:  # compute the expected result by a plain search
            end = unread.find(delimiter) + len(delimiter)
            if len(delimiter) <= end <= limit:
                expected.append(unread[:end])
                unread = unread[end:]
            elif len(unread) >= limit:
                unread = unread[part - kept :]
            else:
                break
        async with mutant_pair(cuts) as (sock, mutant):
            mutant.send(data)
            async with alongside(mutant.conversing(clock, "ended")):
                while True:
                    try:
                        got.append(await sock.recv_until(delimiter, max_bytes=limit))
                    except trisock.LimitExceededError:
                        skipped = await sock.recv_exactly(part)
                        sock.unrecv(skipped[part - kept :])
                    except trisock.IncompleteReadError as exc:
                        rest = exc.partial
                        break
        assert (got, rest) == (expected, unread)

    fuzz.run_async(
        read,
        150,
        data=TEXTS,
        delimiter=DELIMITERS,
        limit=st.integers(1, 40),
        cuts=SOME_CUTS,
    )


def test_skip_until_drops_each_line_over_the_limit(fuzz: Fuzz) -> None:
    async def read(
        clock: trio.testing.MockClock, data: bytes, delimiter: bytes, limit: int, cuts: list[int]
    ) -> None:
        *lines, rest = data.split(delimiter)
        sizes = [len(line) + len(delimiter) for line in lines]
        expected = [
            line if size <= limit else size for line, size in zip(lines, sizes, strict=True)
        ]
        got: list[bytes | int] = []
        async with mutant_pair(cuts) as (sock, mutant):
            mutant.send(data)
            async with alongside(mutant.conversing(clock, "ended")):
                with pytest.raises(trisock.IncompleteReadError) as caught:
                    while True:
                        try:
                            got.append(await sock.recv_line(delimiter=delimiter, max_bytes=limit))
                        except trisock.LimitExceededError:
                            got.append(await sock.skip_until(delimiter))
                assert await sock.recv_exactly(sock.info().buffered) == caught.value.partial
        assert got == expected
        assert caught.value.at_boundary == (not rest)
        assert caught.value.partial == (rest if len(rest) < limit else b"")

    fuzz.run_async(
        read,
        150,
        data=TEXTS,
        delimiter=DELIMITERS,
        limit=st.integers(1, 40),
        cuts=SOME_CUTS,
    )


def test_frames_lose_nothing_and_stay_within_the_limit(fuzz: Fuzz) -> None:
    """The bytes after the frames are arbitrary: a cut frame, a frame over the limit, or nothing."""

    async def read(
        clock: trio.testing.MockClock,
        bodies: list[bytes],
        header: int,
        rest: bytes,
        limit: int,
        cuts: list[int],
        method: str,
    ) -> None:
        frames = [len(body).to_bytes(header, "big") + body for body in bodies]
        data = b"".join(frames) + rest
        got: list[bytes] = []
        error: Exception | None = None
        async with mutant_pair(cuts) as (sock, mutant):
            mutant.send(data)
            async with alongside(mutant.conversing(clock, "ended")):
                items = sock.frames(header, max_bytes=limit)
                try:
                    while True:
                        if method == "frames":
                            got.append(await anext(items))
                        else:
                            got.append(await sock.recv_frame(header, max_bytes=limit))
                except StopAsyncIteration:
                    pass
                except (trisock.LimitExceededError, trisock.IncompleteReadError) as exc:
                    error = exc
                unread = b"".join([chunk async for chunk in sock])
        again = b"".join(len(body).to_bytes(header, "big") + body for body in got)
        assert again + unread == data
        assert max(map(len, got), default=0) <= limit
        assert got[: len(bodies)] == bodies[: len(got)]
        length = int.from_bytes(unread[:header], "big")
        if isinstance(error, trisock.LimitExceededError):
            assert (error.limit, error.frame_length) == (limit, length)
            assert limit < length
        elif isinstance(error, trisock.IncompleteReadError):
            assert error.partial == unread
            assert len(unread) < (error.expected or 0)
            assert error.expected == (header if len(unread) < header else header + length)
            assert error.at_boundary == (not unread)
        else:
            assert not unread

    fuzz.run_async(
        read,
        150,
        bodies=st.lists(st.binary(max_size=20), max_size=8),
        header=st.sampled_from([1, 2, 3, 4, 8]),
        rest=st.binary(max_size=12),
        limit=st.integers(1, 25),
        cuts=SOME_CUTS,
        method=st.sampled_from(["frames", "recv_frame"]),
    )
