"""Fuzzing of lines and of their limits."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import strategies as st

import trisock
from helpers.fuzzing import Fuzz
from helpers.mutants import SOME_CUTS, Mutant, run
from helpers.pairs import closing, raw_unix_pair
from helpers.peers import alongside


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
