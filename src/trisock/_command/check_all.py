"""Check many URLs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import trio

from .check import Options, Result, check
from .progress import Progress
from .urls import Target

# Trio resolves names in threads, 40 at once. A look-up whose check has timed out holds its thread
# until the resolver gives up.
_LOOKUPS_PER_CHECK = 2


async def check_all(
    targets: Sequence[Target],
    options: Options,
    *,
    parallel: int,
    progress: Progress,
    show: Callable[[Result], None],
) -> list[Result]:
    """Check all URLs, ``parallel`` of them at once. Returns the results in the order of the URLs.

    ``show`` is called with each result as soon as it and all before it are known. What ``show``
    raises ends the checks.
    """
    threads = trio.to_thread.current_default_thread_limiter()
    threads.total_tokens = max(threads.total_tokens, _LOOKUPS_PER_CHECK * parallel)
    results: dict[int, Result] = {}
    shown = 0
    failure: Exception | None = None
    send, receive = trio.open_memory_channel[tuple[int, Result]](0)
    todo = enumerate(targets)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(progress.run)
        for _ in range(min(parallel, len(targets))):
            nursery.start_soon(_work, todo, options, send.clone())
        send.close()
        try:
            async for number, result in receive:
                results[number] = result
                progress.advance()
                while shown in results:
                    shown += 1
                    show(results[shown - 1])
        except Exception as exc:  # bare, and not in a group
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return [results[number] for number in range(len(targets))]


async def _work(
    todo: Iterator[tuple[int, Target]],
    options: Options,
    done: trio.MemorySendChannel[tuple[int, Result]],
) -> None:
    async with done:
        for number, target in todo:
            await done.send((number, await check(target, options)))
