"""``Listener.from_systemd`` takes the sockets that systemd passes to a program."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

import trisock
from helpers.examples import started

# Each test runs a separate program as systemd would start it: the sockets are its descriptors
# 3, 4, ..., and LISTEN_PID is its process ID.
PROGRAM = """
import os, sys
pid, *numbers = sys.argv[1:]
high = [os.dup2(int(each), 100 + index) for index, each in enumerate(numbers)]
for index, number in enumerate(high):
    os.dup2(number, 3 + index)
    os.close(number)
os.environ["LISTEN_PID"] = str(os.getpid()) if pid == "own" else pid
import trio, trisock
from trisock import Listener
def attempt(function, *args):
    try:
        return function(*args)
    except (OSError, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}"
def left():
    return [each for each in os.environ if each.startswith("LISTEN_")]
"""

NONE = "systemd has passed no sockets"


def command(source: str, sockets: Sequence[socket.socket | int], pid: str = "own") -> list[str]:
    numbers = [str(each if isinstance(each, int) else each.fileno()) for each in sockets]
    return [sys.executable, "-c", PROGRAM + source, pid, *numbers]


def run(
    source: str, sockets: Sequence[socket.socket | int], *, pid: str = "own", **variables: str
) -> list[str]:
    """Run a program as systemd starts it. Return the lines that it prints."""
    arguments = command(source, sockets, pid)
    done = subprocess.run(
        arguments,
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), **variables},
        pass_fds=list(map(int, arguments[4:])),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def listening(family: int = socket.AF_INET, where: object = ("127.0.0.1", 0)) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(where)
    sock.listen()
    return sock


def test_all_sockets_are_taken_and_the_environment_is_cleared(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        listening() as four,
        listening(socket.AF_INET6, ("::1", 0)) as six,
        listening(socket.AF_UNIX, path) as unix,
    ):
        lines = run(
            """
listener = Listener.from_systemd()
print(*listener.addresses, sep="\\n")
print(left())
listener.abort()
""",
            [four, six, unix],
            LISTEN_FDNAMES="a:b:c",
            LISTEN_PIDFDID="1",
        )
        ports = four.getsockname()[1], six.getsockname()[1]
    assert lines == [f"127.0.0.1:{ports[0]}", f"[::1]:{ports[1]}", path, "[]"]
    assert os.path.exists(path)  # the path belongs to systemd


def test_a_name_selects_sockets_and_leaves_the_others() -> None:
    with listening() as one, listening() as two:
        lines = run(
            """
print(attempt(Listener.from_systemd, "none"))
smtp = Listener.from_systemd("smtp")
print(smtp.port, left())
print(attempt(Listener.from_systemd, "smtp"))
rest = Listener.from_systemd()
print(rest.port)
print(attempt(Listener.from_systemd))
smtp.abort(); rest.abort()
""",
            [one, two],
            LISTEN_FDNAMES="http:smtp",
        )
        ports = one.getsockname()[1], two.getsockname()[1]
    assert lines[0].startswith("FileNotFoundError")
    assert "'none'" in lines[0]
    assert lines[1] == f"{ports[1]} []"
    assert "taken already" in lines[2]
    assert "'smtp'" in lines[2]
    assert lines[3] == str(ports[0])
    assert "taken already" in lines[4]


def test_no_sockets_for_this_process_raises_an_oserror() -> None:
    with listening() as sock:
        lines = run(
            """
own = str(os.getpid())
for pid, count in [("1", "1"), (own, "0"), (own, "x"), ("x", "1"), ("", "1"), (own, "9" * 10)]:
    os.environ.update(LISTEN_PID=pid, LISTEN_FDS=count)
    print(attempt(Listener.from_systemd))
""",
            [sock],
        )
    assert len(lines) == 6
    for line in lines:
        assert NONE in line or re.search(r"is not a number: |descriptor \d+ is not open", line)
    assert re.search(r"this process \(LISTEN_PID is '1', and this process is [0-9]+\)", lines[0])
    assert "LISTEN_FDS is not a number: 'x'" in lines[2]
    assert "LISTEN_PID is not a number: 'x'" in lines[3]


@pytest.mark.parametrize("count", ["", "-1", "+1", " 1", "0_1", "\u0661", "1" * 5000])
def test_a_malformed_number_of_sockets_raises_an_oserror(count: str) -> None:
    with listening() as sock:
        (line,) = run("print(attempt(Listener.from_systemd))", [sock], LISTEN_FDS=count)
    assert "LISTEN_FDS is not a number: " in line


def test_a_program_that_systemd_did_not_start_gets_an_os_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    with pytest.raises(FileNotFoundError, match=NONE):
        trisock.Listener.from_systemd()
    with pytest.raises(TypeError, match="name must be a str or None"):
        trisock.Listener.from_systemd(b"x")  # type: ignore[arg-type]


def test_anything_but_a_listening_stream_socket_is_refused(tmp_path: Path) -> None:
    source = """
print(attempt(Listener.from_systemd, "bad"), left())
good = Listener.from_systemd("good")
print(good.port)
good.abort()
"""
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    with listening() as good, socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        for bad, why in (
            (udp, "open_udp"),
            (idle, "not a listening socket"),
            (file, "not a socket"),
        ):
            lines = run(source, [bad, good], LISTEN_FDNAMES="bad:good")
            assert lines[0].startswith("ValueError")
            assert why in lines[0]
            assert "LISTEN_FDS" in lines[0]  # the variable is still set
            assert lines[1] == str(good.getsockname()[1])
    os.close(file)


def test_children_inherit_neither_sockets_nor_variables() -> None:
    with listening() as one, listening() as two:
        lines = run(
            """
listener = Listener.from_systemd("one")
print(os.get_inheritable(3), flush=True)
child = os.fork()
if not child:
    print(attempt(lambda: Listener.from_systemd("two"))[:17], flush=True)
    os._exit(0)
os.waitpid(child, 0)
listener.abort()
Listener.from_systemd("two").abort()
""",
            [one, two],
            LISTEN_FDNAMES="one:two",
        )
    assert lines == ["False", "FileNotFoundError"]


async def test_a_stop_leaves_waiting_clients_to_systemd() -> None:
    """The sockets are shared: systemd holds them while the program restarts."""
    source = """
listener = Listener.from_systemd()
async def echo(sock):
    async for line in sock.lines(idle=True):
        await sock.send(line, b"\\n")
        if line == b"stop":
            sock.server.stop()
trisock.run(listener, echo)
"""
    with listening() as sock:
        port = sock.getsockname()[1]
        environment = {**os.environ, "LISTEN_FDS": "1"}

        async def serve_one() -> None:
            async with started(
                command(source, [sock]), env=environment, pass_fds=[sock.fileno()]
            ) as running:
                async with await trisock.connect("127.0.0.1", port) as client:
                    await client.send(b"stop\n")
                    assert await client.recv_line() == b"stop"
                await running.process.wait()
                assert running.process.returncode == 0

        await serve_one()
        async with await trisock.connect("127.0.0.1", port) as early:  # nobody serves
            await early.send(b"waiting\n")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_one)
                assert await early.recv_line() == b"waiting"
                await early.send_eof()
