"""A fake resolver for the host names of a test."""

from __future__ import annotations

import socket

import trio


class Resolver(trio.abc.HostnameResolver):
    """Resolves names to the addresses that the test gives, and records each lookup.

    A lookup in one family gets only the addresses of this family.
    """

    def __init__(self, **names: list[str]) -> None:
        self.names = names
        self.asked: list[bytes | None] = []

    async def getaddrinfo(  # type: ignore[override]
        self, host: bytes | None, port: int, family: int = 0, type: int = 0, *_: int
    ) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
        self.asked.append(host)
        await trio.lowlevel.checkpoint()  # a real lookup lets other tasks run, too
        found: list[tuple[int, int, int, str, tuple[object, ...]]] = [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                type,
                0,
                "",
                (address, port, 0, 0) if ":" in address else (address, port),
            )
            for address in self.names[(host or b"").decode()]
        ]
        return [each for each in found if family in (socket.AF_UNSPEC, each[0])]

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        raise NotImplementedError
