"""Fuzzing: any input from outside leads to a documented result.

The inputs are random bytes, and real conversations with mutations: flipped bits; removed, inserted
or repeated parts; changed record types, versions or lengths; moved records. A normal run tries half
of the examples, always the same ones. ``--times N`` tries N times as many examples, and different
ones in each run.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from helpers.client_hellos import records_of

Check = Callable[..., None]
AsyncCheck = Callable[..., Awaitable[None]]


def number_of(examples: int, times: int) -> int:
    """Return half of ``examples`` for a normal run, and N times as many for ``--times N``."""
    return examples // 2 if times == 1 else examples * times


class Fuzz:
    """Runs a check on many examples."""

    def __init__(self, times: int) -> None:
        self._times = times
        self.examples = 0

    def __call__(self, check: Check, examples: int, **strategies: st.SearchStrategy[Any]) -> None:
        """Run ``check(**drawn)`` on as many examples as ``number_of(examples, times)`` returns."""

        def counted(**drawn: Any) -> None:
            self.examples += 1
            check(**drawn)

        self._settings(examples)(given(**strategies)(counted))()

    def run_async(
        self, check: AsyncCheck, examples: int, **strategies: st.SearchStrategy[Any]
    ) -> None:
        """Run ``await check(clock, **drawn)``, with a clock that only the check advances."""

        def run(**drawn: Any) -> None:
            clock = trio.testing.MockClock()
            trio.run(functools.partial(check, clock, **drawn), clock=clock)

        self(run, examples, **strategies)

    def run_machine(
        self, machine: type[RuleBasedStateMachine], examples: int, *, steps: int
    ) -> None:
        """Run a state machine like a check, but on different examples in every run."""
        self.examples += number_of(examples, self._times)
        tuned = settings(self._settings(examples), derandomize=False, stateful_step_count=steps)
        run_state_machine_as_test(machine, settings=tuned)

    def _settings(self, examples: int) -> settings:
        return settings(
            max_examples=number_of(examples, self._times),
            derandomize=self._times == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )


Change = tuple[str, int, bytes]


def header_changed(at: int, part: slice, what: bytes, data: bytes) -> bytes:
    records = records_of(data)
    if records:
        record = bytearray(records[at % len(records)])
        record[part] = what[: len(record[part])]
        records[at % len(records)] = bytes(record)
    return b"".join(records)


def records_moved(at: int, how: Callable[[list[bytes], int], object], data: bytes) -> bytes:
    records = records_of(data)
    if records:
        how(records, at % len(records))
    return b"".join(records)


def split_record(data: bytes, at: int, what: bytes) -> bytes:
    """Split the last record in two. TLS allows this for an unencrypted handshake record."""
    records = records_of(data)
    if not records:
        return data
    header, body = records[-1][:3], records[-1][5:]
    cut = at % (len(body) + 1)
    records[-1:] = [
        header + len(part).to_bytes(2, "big") + part for part in (body[:cut], body[cut:])
    ]
    return b"".join(records)


def flip(data: bytes, at: int, what: bytes) -> bytes:
    end = at + len(what)
    flipped = bytes(a ^ b for a, b in zip(data[at:end], what, strict=False))
    return data[:at] + flipped + data[end:]


CHANGES: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "flip": flip,
    "cut off": lambda data, at, what: data[:at],
    "cut out": lambda data, at, what: data[:at] + data[at + 1 + len(what) :],
    "insert": lambda data, at, what: data[:at] + what + data[at:],
    "double": lambda data, at, what: data[:at] + data[max(0, at - 8 * len(what)) :],
    "type": lambda data, at, what: header_changed(at, slice(0, 1), what, data),
    "version": lambda data, at, what: header_changed(at, slice(1, 3), what, data),
    "length": lambda data, at, what: header_changed(at, slice(3, 5), what, data),
    "drop a record": lambda data, at, what: records_moved(at, list.pop, data),
    "repeat a record": lambda data, at, what: records_moved(
        at, lambda records, index: records.insert(index, records[index]), data
    ),
    "move a record": lambda data, at, what: records_moved(
        at, lambda records, index: records.append(records.pop(index)), data
    ),
    "split a record": split_record,
}

# Half of the mutations are near the beginning.
AN_OFFSET = st.integers(0, 100) | st.integers(0, 5000)
A_CHANGE = st.tuples(st.sampled_from(sorted(CHANGES)), AN_OFFSET, st.binary(min_size=1, max_size=8))
SOME_CHANGES = st.lists(A_CHANGE, min_size=1, max_size=3)


def changed(data: bytes, changes: list[Change]) -> bytes:
    for kind, at, what in changes:
        data = CHANGES[kind](data, at % (len(data) + 1), what)
    return data
