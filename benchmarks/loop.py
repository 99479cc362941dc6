"""A minimal epoll loop, for the client and for the epoll server (``peers/epoll.py``).

A job is a generator that serves one descriptor. The job yields the event it waits for (``READABLE``
or ``WRITABLE``). The loop resumes the job when that event occurs. There are no tasks, no timers and
no cancellation.
"""

from __future__ import annotations

import select
from collections.abc import Generator

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

Job = Generator[int, None, None]


class Loop:
    """Runs jobs, each on one descriptor.

    Args:
      patience: how many seconds to wait for the next event, or -1 to wait forever.
    """

    def __init__(self, patience: float = -1) -> None:
        self._epoll = select.epoll()
        self._patience = patience
        # For each descriptor: its job, and the event that the job waits for. The kernel removes a
        # closed descriptor from epoll, and another job may reuse the number immediately.
        self._jobs: dict[int, Job] = {}
        self._watched: dict[int, int] = {}

    def start(self, fd: int, job: Job) -> None:
        """Run a job up to its first wait. Jobs may start other jobs."""
        wanted = next(job, None)
        if wanted is not None:
            self._epoll.register(fd, wanted)
            self._jobs[fd] = job
            self._watched[fd] = wanted

    def run(self) -> None:
        """Run until all jobs are done. An exception in a job propagates.

        Raises:
          TimeoutError: no event occurred for ``patience`` seconds.
        """
        jobs, watched, poll = self._jobs, self._watched, self._epoll.poll
        while jobs:
            ready = poll(self._patience)
            if not ready:
                raise TimeoutError(f"no event for {self._patience} seconds")
            for fd, _ in ready:
                job = jobs.get(fd)
                if job is None:
                    raise ValueError("epoll reported an event on a descriptor that has no job")
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
        """Close the remaining jobs and the epoll descriptor."""
        for job in self._jobs.values():
            job.close()
        self._epoll.close()
