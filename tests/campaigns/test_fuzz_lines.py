"""Fuzzing of lines and their limits."""

from __future__ import annotations

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
                try:
                    while True:
                        if method == "lines":
                            got.append(await anext(lines))
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
        method=st.sampled_from(["lines", "recv_until"]),
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
