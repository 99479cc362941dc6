"""What clients of other projects' servers share: contexts of one version, or one session."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from helpers.authority import Authority

CRLF = b"\r\n"


class RefusedError(Exception):
    """The server does not do what was asked of it."""


class ResumingContext(ssl.SSLContext):
    """A client's context whose connections go on with the TLS session of the first.

    FTP servers want it: they know by it that a data connection is from whom they talk to.
    """

    _first: ssl.SSLObject | None = None

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        ssl_object = super().wrap_bio(*args, **options)
        if self._first is None:
            self._first = ssl_object
        else:
            ssl_object.session = self._first.session
        return ssl_object


def for_version(
    version: str, authority: Authority, kind: type[ssl.SSLContext] = ssl.SSLContext
) -> ssl.SSLContext:
    """Return a client's context that speaks one version of TLS only."""
    context = kind(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.pem.decode())
    context.minimum_version = context.maximum_version = {
        "TLSv1.2": ssl.TLSVersion.TLSv1_2,
        "TLSv1.3": ssl.TLSVersion.TLSv1_3,
    }[version]
    return context


both_versions = pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])


async def cancelled_often(read: Callable[[], Awaitable[bytes]], checkpoints: int) -> bytes:
    """Return what a read returns that is cancelled, and tried again, every so many checkpoints."""
    results: list[bytes] = []

    async def once() -> None:
        results.append(await read())

    while not results:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(once)
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    (result,) = results
    return result
