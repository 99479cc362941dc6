"""Hold conversations of all kinds for an hour, and check that nothing leaks.

    python -X dev -W error tests/campaigns/soak.py --minutes 60

Servers and clients share this process, so that ``tracemalloc`` sees both. In each round the servers
start, clients hold conversations with them (``conversations.py``) and check every response, and the
servers stop. Then the program collects garbage and takes a sample. After a warm-up, which fills
caches, these limits apply:

- the numbers of descriptors, tasks and threads must not change between rounds;
- traced memory, the number of objects, and memory from ``malloc`` (which OpenSSL uses too) may grow
  by at most ``BOUNDS``: for each of the three, the median of the last third of the rounds is
  compared with the median of the first third;
- there must be no wrong response, no missing or unexpected error in the log, no warning, and no
  uncaught exception.

The program prints tables, and exits with status 1 after a failure. Ctrl-C ends the run early and
prints the result so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

sys.path.append(str(Path(__file__).parents[1]))  # a program needs this to import tests/helpers

from conversation_site import Conversation, Site
from conversations import KINDS
from helpers.memory import allocated
from trisock.pluto.blocking import background

CLIENTS = 6  # How many at a time.
PATIENCE = 60  # Seconds until a conversation counts as failed.
WARM_UP, LEAST_WARM_UP = 0.2, 20  # A fraction of the whole time, and a minimum in seconds.
ROUNDS = 60
ROUND = (2, 20)  # Minimum and maximum length of a round, in seconds.
CACHED = 32  # Size of trisock's context caches, which are filled before the first sample.

# The bounds allow for noise, such as the worker threads and free lists that Trio keeps. A leak of
# 100 bytes in each socket exceeds the bounds after one minute.
BOUNDS = {"traced": 64 * 1024, "objects": 500, "allocated": 1024 * 1024}

ROWS = 12


@dataclass(frozen=True)
class Sample:
    """The resources of the process between two rounds."""

    seconds: float
    conversations: dict[str, int]
    descriptors: int
    tasks: int
    threads: int
    objects: int
    traced: int
    peak: int
    allocated: int
    resident: int

    @property
    def total(self) -> int:
        return sum(self.conversations.values())

    def cells(self) -> list[str]:
        groups = [
            sum(self.conversations.get(each.__name__, 0) for each in kinds)
            for kinds in KINDS.values()
        ]
        counts = (self.total, *groups, self.descriptors, self.tasks, self.threads, self.objects)
        memory = (self.traced, self.peak, self.allocated, self.resident)
        return [
            f"{self.seconds / 60:.1f}",
            *(f"{each:,}" for each in counts),
            *(f"{each / 1024:,.0f}" for each in memory),
        ]


HEAD = [
    *("min", "conversations", *KINDS, "descriptors", "tasks", "threads", "objects"),
    *("traced KiB", "peak KiB", "malloc KiB", "RSS KiB"),
]


class Soak:
    """One run of the soak, and its failures."""

    def __init__(self, site: Site, seconds: float, seed: int) -> None:
        self.site = site
        # A file with one line for the sample of each round after the warm-up. In memory, the
        # samples would look like a leak.
        self.record = site.directory / "samples"
        self.record.touch()
        self.seconds = seconds
        self.rng = random.Random(seed)
        self.ended = False
        self.failures: list[str] = []
        self.conversations: Counter[str] = Counter()
        self.warm: tracemalloc.Snapshot | None = None
        self.begin = time.monotonic()

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILED: {what}", *self.site.log.last, sep="\n", file=sys.stderr, flush=True)

    def catch_uncaught_exceptions(self) -> None:
        sys.unraisablehook = lambda args: self.fail(
            f"{args.err_msg or 'unraisable'}: {args.object!r:.100}: "
            + "".join(traceback.format_exception(args.exc_value))
        )
        threading.excepthook = lambda args: self.fail(
            f"in {args.thread}: " + "".join(traceback.format_exception(args.exc_value))
        )

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.end_early)
            await self.rounds()
            nursery.cancel_scope.cancel()

    async def end_early(self) -> None:
        """At the first Ctrl-C, let the conversations finish. A second Ctrl-C stops immediately."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print(f"ended by {signal.Signals(await anext(signals)).name}", file=sys.stderr)
            self.ended = True
        await trio.sleep_forever()  # keep the number of tasks constant

    def is_over(self) -> bool:
        return self.ended or bool(self.failures) or self.elapsed >= self.seconds

    async def rounds(self) -> None:
        length = min(max(self.seconds / ROUNDS, ROUND[0]), ROUND[1])
        for _ in range(CACHED):
            self.site.new_tls()
        warm_up = max(WARM_UP * self.seconds, LEAST_WARM_UP)
        reported = 0.0
        while not self.is_over():
            await self.round(length)
            sample = self.sample()
            if self.elapsed > warm_up:
                if self.warm is None:
                    self.warm = tracemalloc.take_snapshot()
                else:
                    with self.record.open("a") as record:
                        print(json.dumps(asdict(sample)), file=record)
            if self.elapsed - reported > 60 or not reported:
                reported = self.elapsed
                facts = zip(HEAD, sample.cells(), strict=True)
                print(", ".join(f"{name} {value}" for name, value in facts), file=sys.stderr)

    async def round(self, length: float) -> None:
        """Start the servers, hold conversations with them, and stop them."""
        site = self.site
        async with site.open(grace=self.rng.choice([None, 0, 10])):
            async with trio.open_nursery() as nursery:
                end = trio.current_time() + length
                for _ in range(CLIENTS):
                    nursery.start_soon(self.client, random.Random(self.rng.random()), end)
        background.stop()
        if site.log.faults != site.faults:
            self.fail(f"{site.faults} handlers raised, {site.log.faults} errors were logged")
        for each in site.log.errors:
            self.fail(f"logged: {each}")

    async def client(self, rng: random.Random, end: float) -> None:
        kinds: list[Conversation] = []
        while trio.current_time() < end and not self.is_over():
            if not kinds:  # every kind of conversation once more, in random order
                kinds = [each for group in KINDS.values() for each in group]
                rng.shuffle(kinds)
            conversation = kinds.pop()
            try:
                with trio.fail_after(PATIENCE):
                    await conversation(self.site, rng)
            except Exception:
                self.fail(f"{conversation.__name__}: {traceback.format_exc()}")
            self.conversations[conversation.__name__] += 1

    def sample(self) -> Sample:
        for _ in range(3):  # finalisers may create more garbage
            gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        traced, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return Sample(
            seconds=self.elapsed,
            conversations=dict(self.conversations),
            descriptors=len(os.listdir("/proc/self/fd")) - 1,  # minus the descriptor of listdir
            tasks=trio.lowlevel.current_statistics().tasks_living,
            # Do not count Trio's worker threads: Trio keeps idle ones for 10 seconds.
            threads=sum("Trio thread" not in each.name for each in threading.enumerate()),
            objects=len(gc.get_objects()),
            traced=traced,
            peak=peak,
            allocated=allocated(),
            resident=pages * os.sysconf("SC_PAGE_SIZE"),
        )

    # ---- the result ----

    def judge(self) -> None:
        """Record a failure for each resource that changed or grew too much."""
        self.samples = [Sample(**json.loads(line)) for line in self.record.read_text().splitlines()]
        if len(self.samples) < 3:
            print("the run was too short to detect growth", file=sys.stderr)
            return
        for name in ("descriptors", "tasks", "threads"):
            values = [getattr(each, name) for each in self.samples]
            if len(set(values)) > 1:
                self.fail(f"the number of {name} changes: {values}")
        grown = {name: growth for name in BOUNDS if (growth := self.growth(name)) > BOUNDS[name]}
        for name, growth in grown.items():
            self.fail(f"{name} grew by {growth:,.0f}; the bound is {BOUNDS[name]:,}")
        if grown and self.warm is not None:
            differences = tracemalloc.take_snapshot().compare_to(self.warm, "lineno")
            print(*differences[:15], sep="\n", file=sys.stderr)

    def growth(self, name: str) -> float:
        values = [getattr(each, name) for each in self.samples]
        third = math.ceil(len(values) / 3)
        return float(statistics.median(values[-third:]) - statistics.median(values[:third]))

    def show(self) -> None:
        """Print the tables, as Markdown."""
        step = max(1, math.ceil((len(self.samples) - 1) / (ROWS - 1)))
        show_table(HEAD, [each.cells() for each in self.samples[::-step][::-1]])
        counts = sorted(self.conversations.items())
        rows = [[name.replace("_", " "), f"{count:,}"] for name, count in counts]
        show_table(["conversation", "held"], rows)
        if len(self.samples) >= 3:
            print(
                f"From the first third to the last: traced memory {self.growth('traced'):+,.0f} "
                f"bytes, objects {self.growth('objects'):+,.0f}, "
                f"malloc {self.growth('allocated') / 1024:+,.0f} KiB, "
                f"RSS {self.growth('resident') / 1024:+,.0f} KiB, in "
                f"{self.samples[-1].total - self.samples[0].total:,} conversations."
            )
        print("No failures." if not self.failures else f"{len(self.failures)} failures.")


def show_table(head: list[str], rows: list[list[str]]) -> None:
    for row in [head, ["---:"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    warnings.simplefilter("error")
    # Some handlers abandon a generator inside a timeout, and Trio warns about the generator.
    warnings.filterwarnings("ignore", "Async generator", ResourceWarning)
    print(f"seed {args.seed}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # exclude imported modules, which are never freed, from garbage collections
    with tempfile.TemporaryDirectory() as directory:
        tracemalloc.start()
        soak = Soak(Site(Path(directory)), args.minutes * 60, args.seed)
        soak.catch_uncaught_exceptions()
        soak.site.log.attach()
        trio.run(soak.run)
        soak.judge()
        soak.show()
    return bool(soak.failures)


if __name__ == "__main__":
    sys.exit(main())
