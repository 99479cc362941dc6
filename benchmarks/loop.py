"""The smallest loop there is over epoll: for the client, and for the server that is the floor.

A job is a generator that serves one descriptor. It yields what it waits for (``READABLE`` or
``WRITABLE``) and is resumed when that has come. There is nothing else: no task, no timer, no
cancellation.
"""

from __future__ import annotations

import select
from collections.abc import Generator

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

Job = Generator[int, None, None]


class Loop:
    """Runs jobs, each on the descriptor that it serves.

    Args:
      patience: how many seconds it waits for something to happen; -1 for ever.
    """

    def __init__(self, patience: float = -1) -> None:
        self._epoll = select.epoll()
        self._patience = patience
        # By descriptor: the job that serves it, and what epoll watches it for. A descriptor that
        # is closed leaves epoll by itself, and its number may be another job's at once.
        self._jobs: dict[int, Job] = {}
        self._watched: dict[int, int] = {}

    def start(self, fd: int, job: Job) -> None:
        """Run a job up to where it waits for the first time. Jobs may start others."""
        wanted = next(job, None)
        if wanted is not None:
            self._epoll.register(fd, wanted)
            self._jobs[fd] = job
            self._watched[fd] = wanted

    def run(self) -> None:
        """Run until no job is left. What a job raises ends the loop.

        Raises:
          TimeoutError: nothing happened for as long as the loop's patience.
        """
        jobs, watched, poll = self._jobs, self._watched, self._epoll.poll
        while jobs:
            ready = poll(self._patience)
            if not ready:
                raise TimeoutError(f"nothing came for {self._patience} seconds")
            for fd, _ in ready:
                job = jobs.get(fd)
                if job is None:
                    raise ValueError("something came that nobody had asked for")
                wanted = next(job, None)
                if wanted is None:
                    if jobs[fd] is job:
                        del jobs[fd]
                elif wanted != watched[fd]:
                    self._epoll.modify(fd, wanted)
                    watched[fd] = wanted

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        """End the jobs that are left, and give the epoll descriptor back."""
        for job in self._jobs.values():
            job.close()
        self._epoll.close()
