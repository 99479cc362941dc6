"""An hour of conversations of all kinds: what is open, and what is held, must not grow.

    python -X dev -W error tests/campaigns/soak.py --minutes 60

Servers and clients are in this one process, so that ``tracemalloc`` sees both. In each round
the servers start, clients talk to them in all kinds of ways (``conversations.py``) and check every
answer, and the servers stop. Then nothing is going on, garbage is collected, and it is counted
what is left. After a warm-up, which fills the caches,

- descriptors, tasks and threads have to be the same after each round;
- traced memory, objects and what ``malloc`` has given out (to OpenSSL, too) may have grown, from
  the median of the first third of the rounds to that of the last, by no more than ``BOUNDS``;
- and nothing else may have gone wrong: an answer, a count, a log entry that is an error, a warning,
  an exception that nobody has caught.

It ends with a table, and with 1 where that is not so. Ctrl-C ends it early, with the same.
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

sys.path.append(str(Path(__file__).parents[1]))  # for helpers, when this is run as a program

from conversation_site import Conversation, Site
from conversations import KINDS
from helpers.memory import allocated
from trisock.pluto.blocking import background

# How many clients talk at a time.
CLIENTS = 6

# Seconds that a conversation may take at most; none needs them.
PATIENCE = 60

# How much of the time is warm-up, and how long it is at least; how many rounds there are, and how
# long one is (in seconds).
WARM_UP = 0.2
LEAST_WARM_UP = 20
ROUNDS = 60
ROUND = (2, 20)

# The caches of trisock have room for so many contexts: they are filled before anything is measured.
CACHED = 32

# What may be added between the first third and the last, as a median. It is for noise: how many
# worker threads Trio has kept, how full its free lists are. 100 bytes lost with each socket are
# more after one minute.
BOUNDS = {"traced": 64 * 1024, "objects": 500, "allocated": 1024 * 1024}

ROWS = 12


@dataclass(frozen=True)
class Sample:
    """What there was when nothing was going on."""

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
        groups = {
            group: sum(self.conversations.get(each.__name__, 0) for each in kinds)
            for group, kinds in KINDS.items()
        }
        return [
            f"{self.seconds / 60:.1f}",
            *(f"{each:,}" for each in (self.total, *groups.values())),
            str(self.descriptors),
            str(self.tasks),
            str(self.threads),
            f"{self.objects:,}",
            f"{self.traced / 1024:,.0f}",
            f"{self.peak / 1024:,.0f}",
            f"{self.allocated / 1024:,.0f}",
            f"{self.resident / 1024:,.0f}",
        ]


HEAD = [
    *("min", "conversations", *KINDS),
    *(
        "descriptors",
        "tasks",
        "threads",
        "objects",
        "traced KiB",
        "peak KiB",
        "malloc KiB",
        "RSS KiB",
    ),
]


class Soak:
    """One run.

    Attributes:
      failures: what has gone wrong, as text.
    """

    def __init__(self, site: Site, seconds: float, seed: int) -> None:
        self.site = site
        # One sample a line, for each round after the warm-up. Kept here, they would be growth.
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

    def catch_what_nobody_catches(self) -> None:
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
        """At the first Ctrl-C let the conversations come to their end; the second is one."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print(f"ended by {signal.Signals(await anext(signals)).name}", file=sys.stderr)
            self.ended = True
        await trio.sleep_forever()  # the number of tasks is the same

    def is_over(self) -> bool:
        return self.ended or bool(self.failures) or self.elapsed >= self.seconds

    async def rounds(self) -> None:
        length = min(max(self.seconds / ROUNDS, ROUND[0]), ROUND[1])
        for _ in range(CACHED):
            self.site.new_tls()
        warm_up = max(WARM_UP * self.seconds, LEAST_WARM_UP)
        told = 0.0
        while not self.is_over():
            await self.round(length)
            sample = self.sample()
            if self.elapsed > warm_up:
                if self.warm is None:
                    self.warm = tracemalloc.take_snapshot()
                else:
                    with self.record.open("a") as record:
                        print(json.dumps(asdict(sample)), file=record)
            if self.elapsed - told > 60 or not told:
                told = self.elapsed
                facts = zip(HEAD, sample.cells(), strict=True)
                print(", ".join(f"{name} {value}" for name, value in facts), file=sys.stderr)

    async def round(self, length: float) -> None:
        """Start the servers, talk to them, and stop them."""
        site = self.site
        async with site.open(grace=self.rng.choice([None, 0, 10])):
            async with trio.open_nursery() as nursery:
                end = trio.current_time() + length
                for _ in range(CLIENTS):
                    nursery.start_soon(self.talk, random.Random(self.rng.random()), end)
        background.stop()
        if site.log.faults != site.faults:
            self.fail(f"{site.faults} handlers have raised, {site.log.faults} were logged")
        for each in site.log.errors:
            self.fail(f"logged: {each}")

    async def talk(self, rng: random.Random, end: float) -> None:
        kinds: list[Conversation] = []
        while trio.current_time() < end and not self.is_over():
            if not kinds:  # all in turn, in another order each time
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
        for _ in range(3):  # what a finaliser lets go is garbage of the next one
            gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        traced, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return Sample(
            seconds=self.elapsed,
            conversations=dict(self.conversations),
            descriptors=len(os.listdir("/proc/self/fd")) - 1,  # the one that lists them
            tasks=trio.lowlevel.current_statistics().tasks_living,
            # Trio keeps its workers for 10 seconds.
            threads=sum("Trio thread" not in each.name for each in threading.enumerate()),
            objects=len(gc.get_objects()),
            traced=traced,
            peak=peak,
            allocated=allocated(),
            resident=resident * os.sysconf("SC_PAGE_SIZE"),
        )

    # ---- what came of it ----

    def judge(self) -> None:
        """Fail where something has grown."""
        self.samples = [Sample(**json.loads(line)) for line in self.record.read_text().splitlines()]
        if len(self.samples) < 3:
            print("too short to tell whether anything grows", file=sys.stderr)
            return
        for name in ("descriptors", "tasks", "threads"):
            values = [getattr(each, name) for each in self.samples]
            if len(set(values)) > 1:
                self.fail(f"the number of {name} changes: {values}")
        grown = {name: growth for name in BOUNDS if (growth := self.growth(name)) > BOUNDS[name]}
        for name, growth in grown.items():
            self.fail(f"{name}: grown by {growth:,.0f}, and {BOUNDS[name]:,} is the bound")
        if grown:
            self.show_what_grew()

    def growth(self, name: str) -> float:
        values = [getattr(each, name) for each in self.samples]
        third = math.ceil(len(values) / 3)
        return float(statistics.median(values[-third:]) - statistics.median(values[:third]))

    def show_what_grew(self) -> None:
        if self.warm is not None:
            differences = tracemalloc.take_snapshot().compare_to(self.warm, "lineno")
            for each in differences[:15]:
                print(each, file=sys.stderr)

    def show(self) -> None:
        """Print the tables, as Markdown."""
        step = max(1, math.ceil((len(self.samples) - 1) / (ROWS - 1)))
        shown = [*self.samples[::-step][::-1]]
        show_row(HEAD)
        show_row(["---:"] * len(HEAD))
        for each in shown:
            show_row(each.cells())
        print()
        show_row(["conversation", "held"])
        show_row(["---", "---:"])
        for name, count in sorted(self.conversations.items()):
            show_row([name.replace("_", " "), f"{count:,}"])
        print()
        if len(self.samples) >= 3:
            print(
                f"From the first third to the last: traced memory {self.growth('traced'):+,.0f} "
                f"bytes, objects {self.growth('objects'):+,.0f}, "
                f"malloc {self.growth('allocated') / 1024:+,.0f} KiB, "
                f"RSS {self.growth('resident') / 1024:+,.0f} KiB, in "
                f"{self.samples[-1].total - self.samples[0].total:,} conversations."
            )
        print("Flat." if not self.failures else f"{len(self.failures)} failures.")


def show_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    warnings.simplefilter("error")
    # Trio says so of the generators that handlers leave in the middle of a timeout.
    warnings.filterwarnings("ignore", "Async generator", ResourceWarning)
    print(f"seed {args.seed}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # what was imported stays, and need not be looked at in each collection
    with tempfile.TemporaryDirectory() as directory:
        tracemalloc.start()
        soak = Soak(Site(Path(directory)), args.minutes * 60, args.seed)
        soak.catch_what_nobody_catches()
        soak.site.log.attach()
        trio.run(soak.run)
        soak.judge()
        soak.show()
    return bool(soak.failures)


if __name__ == "__main__":
    sys.exit(main())
