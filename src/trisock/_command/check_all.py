"""Check many URLs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from .check import Options, Result, check
from .progress import Progress
from .stages import note_look_ups
from .urls import Target

# Trio resolves names in threads, 40 at once. A look-up whose check has timed out holds its thread
# until the resolver gives up.
_LOOKUPS_PER_CHECK = 2


class Finished:
    """The results of the finished checks, in the order of the URLs.

    Args:
      show: called with each result, once all before it are known.

    Invariant: the first ``_shown`` URLs have results, and these were shown.
    """

    def __init__(self, show: Callable[[Result], None]) -> None:
        self._show = show
        self._shown = 0
        self._results: dict[int, Result] = {}

    def add(self, number: int, result: Result) -> None:
        """Add the result of a URL, and show those whose turn it is."""
        self._results[number] = result
        while self._shown in self._results:
            self._shown += 1
            self._show(self._results[self._shown - 1])

    def show_rest(self) -> None:
        """Show the results that wait for a check that was cancelled."""
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

    What ``finished`` raises ends the checks. If cancelled, ``finished`` has the results so far.
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
