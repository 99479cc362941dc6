"""Helpers for clients of third-party servers: TLS contexts, and cancelled reads."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from trisock.testing import Authority

CRLF = b"\r\n"


class RefusedError(Exception):
    """The server refused a command."""


class ResumingContext(ssl.SSLContext):
    """A client context. All its connections resume the TLS session of the first one.

    An FTP server may require resumption. Resumption proves that the control connection and
    the data connection belong to the same client.
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
    """Return a client's context for one TLS version."""
    context = kind(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.ca.decode())
    only = ssl.TLSVersion[version.replace(".", "_")]
    context.minimum_version = context.maximum_version = only
    return context


both_versions = pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
usually_the_newest = pytest.mark.parametrize(
    "version", [pytest.param("TLSv1.2", marks=pytest.mark.rare), "TLSv1.3"]
)


async def cancelled_often(read: Callable[[], Awaitable[bytes]], checkpoints: int) -> bytes:
    """Cancel a read after a number of checkpoints, and retry the read until it returns."""
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
