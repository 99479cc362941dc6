"""A fork inside ``trio.run``: the child has a copy of the run, and shares its epoll set."""

from __future__ import annotations

import contextlib
import os

import trio

# The run of Trio that this process was forked in, if it was. Its tasks wait in the parent.
_inherited: trio.lowlevel.TrioToken | None = None


# How many forks lie between the program's first process and this one. Two processes that go on with
# the same TLS keys encrypt different data under one nonce, and so give both away. A counter and not
# os.getpid(): each read and send compares it, and getpid is a system call.
count = 0


def _notice_fork() -> None:
    global _inherited, count
    count += 1
    with contextlib.suppress(RuntimeError):  # not inside Trio
        _inherited = trio.lowlevel.current_trio_token()


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows has no fork)
    os.register_at_fork(after_in_child=_notice_fork)


def in_copied_run() -> bool:
    """Return whether this is the child of a fork, inside the run that it was forked in."""
    return _inherited is not None and wakes_nobody()


def wakes_nobody() -> bool:
    """Return whether no task of this process can wait here: outside Trio, or in a copied run."""
    try:
        return trio.lowlevel.current_trio_token() is _inherited
    except RuntimeError:
        return True


def notify_closing(descriptor: int) -> None:
    """Wake the tasks of this process that wait for a descriptor.

    In a copied run Trio would take the descriptor out of the parent's epoll set: the parent's
    tasks would wait for good.
    """
    if not wakes_nobody():
        trio.lowlevel.notify_closing(descriptor)
