"""Objects of each public class can be copied and pickled, or refuse both and say why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

import trisock
from helpers.pairs import closing
from trisock.testing import socket_pair

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda it, protocol=protocol: pickle.loads(  # type: ignore[misc]
            pickle.dumps(it, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}

# The tests of these classes are in other files.
ROLES = {"Certificate", "ClientTLS", "ServerTLS"}


@asynccontextmanager
async def one_of_each() -> AsyncIterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield two dicts, which map the names of classes to objects.

    The objects in the first dict refuse to be copied. Those in the second dict can be copied.
    """

    async def handler(sock: object) -> None:
        """Do nothing."""

    client, server_side = await socket_pair(tls=True)
    async with closing(client, server_side), trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        async with (
            await trisock.listen(0, host="127.0.0.1") as listener,
            await trisock.open_udp() as udp,
            trisock.open_service() as service,
        ):
            refusing = {
                "Socket": client,
                "Lines": client.lines(),
                "LineBatches": client.lines().batches(),
                "Frames": client.frames(),
                "Listener": listener,
                "Server": server,
                "Service": service,
                "UDPSocket": udp,
            }
            copied = {
                "Address": client.getpeer(),
                "ConnectionInfo": client.info(),
                "TLSInfo": client.tls,
                "ServerStats": server.stats(),
                "ProxyHeader": trisock.ProxyHeader(tlvs=((4, b""),)),
                "ProxySSL": trisock.ProxySSL(client=1, verify=1),
                "TLSError": trisock.TLSError("no", reason="WHY", verify_code=62),
                "IncompleteReadError": trisock.IncompleteReadError(b"abc", 5),
                "LimitExceededError": trisock.LimitExceededError(9),
                "StartTLSError": trisock.StartTLSError(
                    "no", protocol="imap", offered=False, reply=b"a NO"
                ),
                "IdleTimeoutError": trisock.IdleTimeoutError("no", at_boundary=False),
                "Datagram": trisock.Datagram(b"data", client.getpeer(), None, False),
                "UDPInfo": udp.info(),
                "ServerClosing": trisock.ServerClosing("no"),
            }
            yield refusing, copied
            service.stop()
        server.stop()


async def test_every_public_class_is_tested_here() -> None:
    public = {name for name in trisock.__all__ if isinstance(getattr(trisock, name), type)}
    async with one_of_each() as (refusing, copied):
        assert public == {*refusing, *copied, *ROLES}
        for name, each in {**refusing, **copied}.items():
            assert type(each) is getattr(trisock, name)


@pytest.mark.parametrize("way", WAYS)
async def test_an_object_that_uses_a_socket_refuses_to_be_copied(way: str) -> None:
    async with one_of_each() as (refusing, _):
        for name, each in refusing.items():
            with pytest.raises(
                TypeError, match=f"a {name} cannot be (copied|pickled): a second object"
            ):
                WAYS[way](each)
        await refusing["Socket"].send(b"it still works")


@pytest.mark.parametrize("way", WAYS)
async def test_an_object_that_only_holds_values_can_be_copied(way: str) -> None:
    async with one_of_each() as (_, copied):
        for each in copied.values():
            twin = WAYS[way](each)
            assert type(twin) is type(each)
            assert repr(twin) == repr(each)
            if isinstance(each, BaseException):
                assert vars(twin) == vars(each)
            else:
                assert twin == each
