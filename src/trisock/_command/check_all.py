"""Check many URLs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from .check import Options, Result, check
from .progress import Progress
from .stages import note_look_ups
from .urls import Target

# By default, Trio runs at most 40 threads, and each name look-up uses one. A look-up keeps its
# thread until the resolver gives up, even if the check has timed out. So allow more threads.
_LOOKUPS_PER_CHECK = 2


class Finished:
    """The results of the finished checks, in the order of the URLs.

    Args:
      show: called with each result, once all results before it are known.

    Invariant: the first ``_shown`` URLs have results, and these were shown.
    """

    def __init__(self, show: Callable[[Result], None]) -> None:
        self._show = show
        self._shown = 0
        self._results: dict[int, Result] = {}

    def add(self, number: int, result: Result) -> None:
        """Add the result of a URL, and show all results whose turn has come."""
        self._results[number] = result
        while self._shown in self._results:
            self._shown += 1
            self._show(self._results[self._shown - 1])

    def show_rest(self) -> None:
        """Show the results that are still held back, because an earlier check was cancelled."""
        for number in sorted(self._results):
            if number >= self._shown:
                self._show(self._results[number])

    def results(self) -> list[Result]:
        """Return the results."""
        return [self._results[number] for number in sorted(self._results)]


async def check_all(
    targets: Sequence[Target],
    options: Options,
    finished: Finished,
    *,
    parallel: int,
    progress: Progress,
) -> None:
    """Check all URLs, ``parallel`` of them at once, and add the results to ``finished``.

    An exception of ``finished`` ends the checks. If cancelled, ``finished`` has the results so far.
    """
    note_look_ups()
    threads = trio.to_thread.current_default_thread_limiter()
    threads.total_tokens = max(threads.total_tokens, _LOOKUPS_PER_CHECK * parallel)
    todo = enumerate(targets)
    failure: Exception | None = None

    async def work() -> None:
        nonlocal failure
        for number, target in todo:
            result = await check(target, options)
            progress.advance()
            try:
                finished.add(number, result)
            except Exception as exc:  # raised below, because a nursery would wrap it in a group
                failure = exc
                workers.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(progress.run)
        async with trio.open_nursery() as workers:
            for _ in range(min(parallel, len(targets))):
                workers.start_soon(work)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
