"""reusePort, enableIPv and preferIPv of hs.socket.udp's objects."""

# ruff: noqa: N802 (tests are named after hs.socket.udp's names)

from __future__ import annotations

from typing import Any

import pytest
import trio

import trisock
from helpers.hammerspoon import LOCALHOST, Calls, Log, errors_in, until
from helpers.hammerspoon_udp import BROADCAST, CLOSED, IPV6_LOCALHOST, port_of, raw_udp, sender
from helpers.resolver import Resolver
from trisock.hammerspoon import UDPSocket, UDPSockets

# ---- reusePort ----


async def test_reusePort_lets_objects_listen_on_one_port(udp: UDPSockets, calls: Calls) -> None:
    first = udp.new(lambda data, addr: calls("first", data))
    assert first.reusePort() is first
    first.listen(0)
    first.receive()
    port = port_of(first)
    second: Any = udp.new(lambda data, addr: calls("second", data))
    assert second.listen(port) is None  # both objects must call reusePort
    assert second.reusePort(True).listen(port) is second
    second.receive()
    client: Any = udp.new().broadcast()
    client.send("to all", BROADCAST, port)
    assert sorted(await calls.take(2)) == [("first", b"to all"), ("second", b"to all")]
    client.send("to one", LOCALHOST, port)
    assert (await calls.next())[1] == b"to one"
    assert await calls.none()
    assert second.close().reusePort(False) is second
    assert second.listen(port) is None


async def test_reusePort_on_an_open_object_returns_None_and_logs(udp: UDPSockets, log: Log) -> None:
    server = udp.server(0)
    assert server.reusePort() is None
    assert "it is not closed" in log.text
    assert udp.new().listen(port_of(server)) is None
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError):
            server.reusePort(wrong)  # type: ignore[arg-type]


# ---- enableIPv, preferIPv ----


@pytest.mark.parametrize(("disabled", "left"), [(4, IPV6_LOCALHOST), (6, LOCALHOST)])
async def test_enableIPv_restricts_a_listening_object(
    udp: UDPSockets, calls: Calls, disabled: int, left: str
) -> None:
    server = udp.new(calls)
    assert server.enableIPv(disabled, False) is server
    server.listen(0)
    server.receive()
    port = port_of(server)
    assert [server.info()["isIPv4"], server.info()["isIPv6"]] == [disabled == 6, disabled == 4]
    for host in (LOCALHOST, IPV6_LOCALHOST):
        with raw_udp(host) as there:
            await there.sendto(host.encode(), (host, port))
    assert (await calls.next())[0] == left.encode()
    assert await calls.none()
    assert server.close().enableIPv(disabled) is server
    server.listen(0)
    assert server.info()["isIPv4"]
    assert server.info()["isIPv6"]


@pytest.mark.parametrize("verb", ["send", "connect"])
@pytest.mark.parametrize("disabled", [4, 6])
async def test_enableIPv_False_makes_addresses_of_that_version_fail(
    udp: UDPSockets, log: Log, verb: str, disabled: int
) -> None:
    host = LOCALHOST if disabled == 4 else IPV6_LOCALHOST
    client: Any = udp.new().enableIPv(disabled, False)
    if verb == "send":
        client.send("lost", host, 9)
    else:
        assert client.connect(host, 9) is client
        assert client.closed()
    await until(
        lambda: f":9: it has only IPv{disabled}, which this object does not use" in log.text
    )


async def test_an_object_with_neither_version_cannot_be_opened(
    udp: UDPSockets, log: Log, calls: Calls
) -> None:
    client: Any = udp.new().enableIPv(4, False).enableIPv(6, False)  # type: ignore[union-attr]
    assert client.listen(0) is None
    assert client.connect(LOCALHOST, 9, calls) is None
    assert client.send("lost", LOCALHOST, 9, calls) is client
    assert client.closed()
    assert len(errors_in(log)) == log.text.count("IPv4 and IPv6 are both disabled") == 3
    assert await calls.none()


async def test_enableIPv_returns_None_for_invalid_versions_and_open_objects(
    udp: UDPSockets, log: Log
) -> None:
    created, server = udp.new(), udp.server(0)
    for version in (0, 5, "4", None, True, 4.0):
        log.clear()
        assert created.enableIPv(version) is None  # type: ignore[arg-type]
        assert "the version must be 4 or 6" in log.text
    for version in (4, 6):
        log.clear()
        assert server.enableIPv(version, False) is None
        assert "it is not closed" in log.text
        assert server.info()[f"isIPv{version}Enabled"]  # type: ignore[literal-required]
    with pytest.raises(TypeError):
        created.enableIPv(4, 0)  # type: ignore[arg-type]
    assert created.info() == CLOSED


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (4, LOCALHOST),
        (6, IPV6_LOCALHOST),
        (None, IPV6_LOCALHOST),  # the first address of the lookup
        (5, IPV6_LOCALHOST),
        ("4", IPV6_LOCALHOST),
        (True, IPV6_LOCALHOST),
    ],
)
async def test_preferIPv_chooses_between_the_addresses_of_a_name(
    udp: UDPSockets, calls: Calls, version: Any, expected: str
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(both=[IPV6_LOCALHOST, LOCALHOST]))
    server = udp.server(0, calls)
    server.receive()
    client: UDPSocket = udp.new().preferIPv(4).preferIPv(6)
    assert client.preferIPv(version) is client
    assert client.info()["isIPVersionNeutral"] == (expected == IPV6_LOCALHOST and version != 6)
    client.send("by send", "both", port_of(server))
    data, sockaddr = await calls.next()
    assert (data, sender(sockaddr)[0]) == (b"by send", expected)
    client.close().connect("both", port_of(server), calls)
    assert await calls.next() == ()
    client.send("by connect")
    data, sockaddr = await calls.next()
    assert (data, sender(sockaddr)[0]) == (b"by connect", expected)


async def test_preferIPv_falls_back_to_the_other_version(udp: UDPSockets, calls: Calls) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(four=[LOCALHOST], six=[IPV6_LOCALHOST]))
    server = udp.server(0, calls)
    server.receive()
    for version, name, expected in [(4, "six", IPV6_LOCALHOST), (6, "four", LOCALHOST)]:
        udp.new().preferIPv(version).send("x", name, port_of(server))
        assert sender((await calls.next())[1])[0] == expected


async def test_a_system_without_IPv6_gives_an_IPv4_socket(
    udp: UDPSockets, log: Log, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(trisock._udp.opening.socket, "has_ipv6", False)
    trio.socket.set_custom_hostname_resolver(Resolver(both=[IPV6_LOCALHOST, LOCALHOST]))
    server = udp.server(0, calls)
    server.receive()
    info = server.info()
    assert (info["isIPv4"], info["isIPv6"], info["isIPv6Enabled"]) == (True, False, True)
    assert (info["localHost_IPv4"], info["localHost_IPv6"]) == ("0.0.0.0", "")
    client = udp.new().preferIPv(6).send("hello", "both", port_of(server))
    assert (await calls.next())[0] == b"hello"
    client.send("lost", IPV6_LOCALHOST, port_of(server))
    await until(lambda: "only IPv6, which this object does not use" in log.text)
