"""Functions that run in a forked child, perhaps as another user."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator

NOBODY = 65534


@contextlib.contextmanager
def child(function: Callable[[], object], *, user: int | None = None) -> Iterator[int]:
    """Run a function in a forked child. When the block ends, kill the child.

    The child's exit status is 0 if the function returns.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork() warns if there are threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def run_in_child(function: Callable[[], object], *, user: int | None = None) -> None:
    """Run a function in a forked child, and check that it returns."""
    with child(function, user=user) as pid:
        assert os.waitpid(pid, 0)[1] == 0


@contextlib.contextmanager
def after_nobody(act: Callable[[], object]) -> Iterator[None]:
    """Call a function as the user ``nobody``, in a child that lives until the block ends."""
    reading, writing = os.pipe()

    def act_and_stay() -> None:
        act()
        os.write(writing, b"x")
        signal.pause()

    with open(reading, "rb") as done, child(act_and_stay, user=NOBODY):
        os.close(writing)
        assert done.read(1) == b"x"
        yield
