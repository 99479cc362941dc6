"""The three interfaces in one program, and the tables of the pages about the dialects."""

from __future__ import annotations

import re

import pytest
import trio

import trisock
from helpers.documents import ROOT, all_tests
from helpers.pairs import all_served
from trisock import ClientTLS, ServerTLS, Socket, hammerspoon, pluto

# ---- one process, three interfaces ----


async def test_one_program_can_mix_the_three_interfaces(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """Each interface runs a STARTTLS server. Clients of the other two interfaces upgrade to TLS."""

    async def serve_trisock(sock: Socket) -> None:
        assert await sock.recv_until(b"\n") == b"STARTTLS\n"
        await sock.send(b"go ahead\n")
        await sock.starttls(server_tls)
        await sock.send(b"trisock: " + await sock.recv_until(b"\n"))

    async def serve_pluto(s: pluto.async_socket) -> None:
        assert await s.recv() == b"STARTTLS\n"
        await s.send("go ahead\n")
        assert await s.starttls(server_tls)
        await s.send(b"pluto: " + (await s.recv() or b""))

    def serve_hammerspoon(data: bytes, tag: int) -> None:
        if data == b"STARTTLS\n":
            hs_server.write("go ahead\n").startTLS(server_tls).read("\n")
        else:
            hs_server.write(b"hammerspoon: " + data)

    async def use_trisock(port: int) -> bytes:
        async with await trisock.connect("127.0.0.1", port) as sock:
            await sock.send(b"STARTTLS\n")
            assert await sock.recv_until(b"\n") == b"go ahead\n"
            await sock.starttls(client_tls)
            await sock.send(b"hello\n")
            return await sock.recv_until(b"\n")

    def use_pluto(port: int) -> bytes | None:  # blocks
        s = pluto.socket.connect("127.0.0.1", port)
        s.send("STARTTLS\n")
        assert s.recv() == b"go ahead\n"
        assert s.starttls(client_tls)
        s.send("hello\n")
        answer = s.recv()
        s.close()
        return answer

    async def use_pluto_in_trio(port: int) -> bytes | None:
        s = await pluto.socket.connect("127.0.0.1", port)
        assert s is not None
        await s.send("STARTTLS\n")
        assert await s.recv() == b"go ahead\n"
        assert await s.starttls(client_tls)
        await s.send("hello\n")
        answer = await s.recv()
        await s.close()
        return answer

    async def use_hammerspoon(port: int) -> bytes:
        answers, answered = trio.open_memory_channel[bytes](1)

        def callback(data: bytes, tag: int) -> None:
            if data == b"go ahead\n":
                client.startTLS(client_tls).write("hello\n").read("\n")
            else:
                answers.send_nowait(data)

        client = hs.new(callback).connect("127.0.0.1", port)
        assert client is not None
        client.write("STARTTLS\n").read("\n")
        answer = await answered.receive()
        client.disconnect()
        return answer

    async def read_when_there_is_a_client() -> None:
        while not hs_server.connections():
            await trio.lowlevel.checkpoint()
        hs_server.read("\n")

    async with hammerspoon.open_sockets() as hs, trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, serve_trisock, host="127.0.0.1")
        sched = pluto.scheduler()
        listener = pluto.socket.bind(sched, 0, serve_pluto)
        nursery.start_soon(sched.run)
        hs_server = hs.server(0, serve_hammerspoon)
        hs_port = hs_server.info()["localPort"]

        assert await trio.to_thread.run_sync(use_pluto, server.port) == b"trisock: hello\n"
        assert await use_pluto_in_trio(server.port) == b"trisock: hello\n"
        assert await use_hammerspoon(server.port) == b"trisock: hello\n"
        assert await use_trisock(listener.port) == b"pluto: hello\n"
        assert await use_hammerspoon(listener.port) == b"pluto: hello\n"
        for use in (use_trisock, use_pluto_in_trio):
            async with trio.open_nursery() as reading:
                reading.start_soon(read_when_there_is_a_client)
                assert await use(hs_port) == b"hammerspoon: hello\n"
            while hs_server.connections():
                await trio.lowlevel.checkpoint()

        await all_served(server, 3)
        server.stop()
        listener.close()


# ---- the tables ----


def tables(*pages: str) -> dict[str, list[list[str]]]:
    """Return the rows of the tables under "Names of `dialect`", grouped by dialect."""
    found: dict[str, list[list[str]]] = {}
    for page in pages:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for section in text.split("\n## Names of `")[1:]:
            dialect, _, rest = section.partition("`\n")
            lines = rest.partition("\n## ")[0].splitlines()
            found[dialect] = [
                [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
                for line in lines
                if line.startswith("| `")
            ]
    return found


USER_TABLES = tables("pluto.md", "hammerspoon.md")
TEST_TABLES = tables("dialect-tests.md")


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("dialect", ["trisock.pluto", "trisock.hammerspoon", "hs.udp"])
def test_each_row_of_the_tables_names_existing_tests(dialect: str) -> None:
    known = all_tests()
    for there, tests in TEST_TABLES[dialect]:
        assert names(there), there
        assert names(tests), there
        unknown = [test for test in names(tests) if test not in known]
        assert not unknown, there


@pytest.mark.parametrize("dialect", ["trisock.pluto", "trisock.hammerspoon", "hs.udp"])
def test_each_row_for_users_has_a_row_of_tests(dialect: str) -> None:
    rows = USER_TABLES[dialect]
    assert all(names(here) for _, here, _ in rows)
    assert [row[0] for row in rows] == [row[0] for row in TEST_TABLES[dialect]]


def test_each_name_of_plutos_pages_has_a_table_row() -> None:
    rows = USER_TABLES["trisock.pluto"]
    there = {name.partition("(")[0] for row in rows for name in names(row[0])}
    assert there >= {
        *("socket.connect", "socket.listen", "socket.bind", "socket.udpserver", "socket.send"),
        *("socket.recv", "socket.peek", "socket.unrecv", "socket.starttls", "socket.close"),
        *("socket.getpeer", "socket.setpeer", "socket.getside", "socket.istls", "socket.isudp"),
        *("socket.isopen", "accept", "hasconnection"),
        *("alpn", "early_data", "require_ecdhe"),
        *("scheduler", "add", "addloop", "run", "yieldfunc", "errorfunc"),
    }


def test_each_public_name_of_trisock_pluto_is_in_the_tables() -> None:
    here = " ".join(row[1] for row in USER_TABLES["trisock.pluto"])
    known = {"port"}  # not Pluto's: the rows of listen, bind and udpserver explain it
    for thing in (pluto.socket, pluto.listener, pluto.scheduler):
        for name in vars(thing):
            assert name.startswith("_") or name in known or f"{name}" in here, name


def test_each_name_of_hs_socket_has_a_table_row() -> None:
    rows = USER_TABLES["trisock.hammerspoon"]
    there = {name.partition("(")[0] for row in rows for name in names(row[0])}
    assert there >= {
        *("timeout", "parseAddress", "new", "server", "setLogLevel"),
        *("connect", "connected", "connections", "disconnect", "info", "listen", "read"),
        *("receive", "send", "setCallback", "setTimeout", "startTLS", "write"),
    }
    assert there >= set(hammerspoon.Info.__annotations__)
    assert len(hammerspoon.Info.__annotations__) == 19


def test_each_name_of_hs_socket_udp_has_a_table_row() -> None:
    rows = USER_TABLES["hs.udp"]
    there = [name.partition("(")[0] for row in rows for name in names(row[0])]
    keys = [*hammerspoon.UDPInfo.__annotations__]
    assert len(keys) == 25
    assert sorted(there) == sorted(
        [
            *("timeout", "parseAddress", "new", "server", "tostring", *keys),
            *("broadcast", "close", "closed", "connect", "connected", "enableIPv", "info"),
            *("listen", "pause", "preferIPv", "receive", "read", "receiveOne", "readOne"),
            *("reusePort", "send", "write", "setBufferSize", "setCallback", "setTimeout"),
        ]
    )
    members = {name for name in vars(hammerspoon.UDPSocket) if not name.startswith("_")}
    assert members <= {*there}
