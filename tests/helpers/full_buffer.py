"""A kernel that has no room for the datagrams of a UDP socket. (See also test_namespaces.)"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

from trisock._udp import syscalls


@contextlib.contextmanager
def full_buffer(times: int, then: int = 0) -> Iterator[None]:
    """Refuse the first ``times`` sends. If ``then`` is not 0, later sends fail with this errno."""
    real = syscalls.send_to
    left = times

    def send_to(*arguments: object) -> None:
        nonlocal left
        if left or then:
            number = errno.EAGAIN if left else then
            left = max(left - 1, 0)
            raise OSError(number, os.strerror(number))
        real(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trisock._udp.sending.send_to", send_to)
        yield
