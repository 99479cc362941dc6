"""A process forked inside ``trio.run`` has a copy of the run, but shares the parent's epoll set."""

from __future__ import annotations

import contextlib
import os

import trio

# The copied run, if this process was forked inside a run of Trio.
_inherited: trio.lowlevel.TrioToken | None = None


# The number of forks between the program's first process and this one. TLS checks that this number
# has not changed, because after a fork, two processes have the same keys. The two processes would
# encrypt different data with the same nonce, and an attacker could decrypt the data of both. Every
# read and send checks the number, so we count forks: os.getpid() would be a system call each time.
count = 0


# The number of forks that this process and its ancestors have seen. If this number has changed
# since a descriptor was opened, another process may hold a copy of the descriptor.
forks = 0


def _notice_child() -> None:
    global forks
    forks += 1


def _notice_fork() -> None:
    global _inherited, count, forks
    count += 1
    forks += 1
    with contextlib.suppress(RuntimeError):  # if not inside Trio
        _inherited = trio.lowlevel.current_trio_token()


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows has no fork)
    os.register_at_fork(after_in_parent=_notice_child, after_in_child=_notice_fork)


def in_copied_run() -> bool:
    """Return whether this process was forked inside a run of Trio, and is in no run of its own."""
    return _inherited is not None and not can_wake_tasks()


def can_wake_tasks() -> bool:
    """Return whether the caller is inside a run of Trio that was not copied by a fork."""
    try:
        return trio.lowlevel.current_trio_token() is not _inherited
    except RuntimeError:
        return False


def notify_closing(descriptor: int) -> None:
    """Wake the tasks of this process that wait for a descriptor.

    Do nothing in a copied run: Trio would remove the descriptor from the parent's epoll set, and
    the parent's tasks would hang.
    """
    if can_wake_tasks():
        trio.lowlevel.notify_closing(descriptor)
