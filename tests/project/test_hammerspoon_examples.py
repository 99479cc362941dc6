"""The examples of trisock.hammerspoon, run as programs."""

from __future__ import annotations

import signal
import sys

import pytest
import trio

import trisock
from helpers.documents import ROOT
from helpers.examples import command, running, started
from helpers.hammerspoon_udp import BROADCAST, raw_udp
from helpers.pairs import closing
from helpers.programs import run
from trisock.testing import serving

HEADER = "HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\n"


async def get(answer: bytes) -> tuple[bytes, str]:
    """Run the HTTP client. Its server sends ``answer``. Return the client's request and output."""
    requests = []

    async def handler(sock: trisock.Socket) -> None:
        requests.append(await sock.recv_until(b"\r\n\r\n"))
        await sock.send(answer)

    async with serving(handler) as s:
        result = await run(*command("hammerspoon_http_client", "127.0.0.1", str(s.server.port)))
    assert (result.returncode, result.stderr) == (0, b"")
    [request] = requests
    return request, result.stdout.decode()


async def test_http_client_prints_the_header_and_the_body() -> None:
    request, printed = await get(HEADER.encode() + b"<html>\nhello\n\n")
    assert request == b"GET /index.html HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
    assert printed == f"1 TAG_HTTP_HEADER\n{HEADER}\n2 TAG_HTTP_CONTENT\n<html>\nhello\n\n\n"


async def test_http_client_prints_a_header_without_content_length() -> None:
    header = "HTTP/1.0 204 No Content\r\n\r\n"
    _, printed = await get(header.encode())
    assert printed == f"1 TAG_HTTP_HEADER\n{header}\n"


@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        ("", ""),
        ("HTTP/1.0", ""),
        (HEADER + "too short", f"1 TAG_HTTP_HEADER\n{HEADER}\n"),
    ],
)
async def test_http_client_exits_when_the_connection_ends(answer: str, printed: str) -> None:
    assert (await get(answer.encode()))[1] == printed


async def test_server_greets_clients_and_sends_each_line_to_all() -> None:
    async with running("hammerspoon_server") as server:
        one = await trisock.connect("127.0.0.1", server.port)
        async with closing(one):
            assert await one.recv_until(b"\n") == b"* hello, 1 online\r\n"
            two = await trisock.connect("127.0.0.1", server.port)
            async with closing(two):
                for client in (one, two):
                    assert await client.recv_until(b"\n") == b"* hello, 2 online\r\n"
                for number in range(3):
                    for speaker in (two, one):
                        await speaker.send(b"line %d\r\n" % number)
                        for client in (one, two):
                            assert await client.recv_until(b"\n") == b"> line %d\r\n" % number


async def test_server_continues_when_a_client_leaves() -> None:
    async with running("hammerspoon_server") as server:
        stays = await trisock.connect("127.0.0.1", server.port)
        async with closing(stays):
            assert await stays.recv_until(b"\n") == b"* hello, 1 online\r\n"
            for _ in range(2):
                leaves = await trisock.connect("127.0.0.1", server.port)
                async with closing(leaves):
                    for client in (stays, leaves):
                        assert await client.recv_until(b"\n") == b"* hello, 2 online\r\n"
                    await leaves.send(b"and goodbye\n")
                    await leaves.send_eof()
                    assert await leaves.recv_until(b"\n") == b"> and goodbye\n"
                    assert await leaves.recv() == b""
                assert await stays.recv_until(b"\n") == b"> and goodbye\n"
                assert await stays.recv_until(b"\n") == b"* hello, 1 online\r\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_server_and_ends_its_connections(signum: signal.Signals) -> None:
    async with running("hammerspoon_server") as server:
        client = await trisock.connect("127.0.0.1", server.port)
        async with closing(client):
            await client.recv_until(b"\n")
            server.ask_to_stop(signum)
            await server.stop()
            assert await client.recv() == b""
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", server.port)


async def test_server_reports_a_port_in_use() -> None:
    async with await trisock.listen(0) as listener:
        result = await run(*command("hammerspoon_server", "--port", str(listener.port)))
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"cannot listen" in result.stderr
    assert result.stderr.count(b"\n") == 1


# ---- Wake-on-LAN ----


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", BROADCAST])
@pytest.mark.parametrize("mac", ["00:11:22:aa:BB:ff", "00-11-22-aa-bb-ff", "001122AABBFF"])
async def test_wake_on_lan_sends_a_magic_packet(host: str, mac: str) -> None:
    with raw_udp(host) as there:
        arguments = [mac, "--host", host, "--port", str(there.getsockname()[1])]
        result = await run(*command("hammerspoon_wake_on_lan", *arguments))
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        address = b"\x00\x11\x22\xaa\xbb\xff"
        assert await there.recv(1000) == b"\xff" * 6 + address * 16


async def test_wake_on_lan_reports_a_packet_that_cannot_be_sent() -> None:
    arguments = ["00:11:22:33:44:55", "--host", "127.0.0.1", "--port", "0"]
    result = await run(*command("hammerspoon_wake_on_lan", *arguments))
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"cannot send to 127.0.0.1:0" in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("mac", ["00:11:22:33:44", "00:11:22:33:44:55:66", "name"])
async def test_wake_on_lan_reports_a_bad_address(mac: str) -> None:
    result = await run(*command("hammerspoon_wake_on_lan", mac))
    assert result.returncode == 2
    assert b"invalid magic_packet value" in result.stderr


# ---- SSDP ----


async def test_ssdp_prints_each_device_that_answers_once() -> None:
    with raw_udp() as device, raw_udp("127.0.0.2") as other:
        port = str(device.getsockname()[1])
        arguments = command("hammerspoon_ssdp", "--host", "127.0.0.1", "--port", port)
        async with started([*arguments, "--target", "ssdp:all", "--seconds", "600"]) as client:
            request, address = await device.recvfrom(2000)
            assert request == (
                b"M-SEARCH * HTTP/1.1\r\n"
                b"HOST: 239.255.255.250:1900\r\n"
                b'MAN: "ssdp:discover"\r\n'
                b"MX: 5\r\n"
                b"ST: ssdp:all\r\n"
                b"\r\n"
            )
            for answer in [
                b"",
                b"NOTIFY * HTTP/1.1\r\nLOCATION: http://announced/\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nST: without a location\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nLOCATION: http://one/\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nLOCATION: http://one/\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nST: x\r\nlocation:http://two/\x1b[2J\r\n\r\n",
            ]:
                await device.sendto(answer, address)
            await other.sendto(b"HTTP/1.1 200 OK\r\nLocation: http://one/\r\n\r\n", address)
            printed = [await client.line() for _ in range(3)]
            assert printed == [
                "127.0.0.1 http://one/",
                "127.0.0.1 http://two/",
                "127.0.0.2 http://one/",
            ]
            assert client._read_stderr() == b""


async def test_ssdp_ends_after_some_seconds() -> None:
    with raw_udp() as silent:
        port = str(silent.getsockname()[1])
        arguments = ["--host", "127.0.0.1", "--port", port, "--seconds", "1"]
        result = await run(*command("hammerspoon_ssdp", *arguments))
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        assert b"\r\nMX: 1\r\n" in await silent.recv(1000)


@pytest.mark.needs("unshare", "ip")
async def test_ssdp_finds_a_device_by_multicast() -> None:
    if (await trio.run_process(["unshare", "-rn", "true"], check=False)).returncode:
        pytest.skip("this system does not let us make a network")
    network = "ip link set lo up && ip addr add 10.0.0.1 dev lo && ip route add 239.0.0.0/8 dev lo"
    program = [sys.executable, str(ROOT / "tests/helpers/ssdp_responder.py")]
    arguments = command("hammerspoon_ssdp", "--seconds", "2")
    shell = ["unshare", "-rn", "sh", "-c", f'{network} && exec "$@"', "sh"]
    result = await run(*shell, *program, *arguments)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"10.0.0.1 http://device/\n"
