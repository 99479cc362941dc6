"""A server whose listening sockets come from systemd."""

from __future__ import annotations

import os
import sys

import pytest

import trisock
from helpers.programs import running

pytestmark = pytest.mark.needs("systemd-socket-activate")

PROGRAM = """
import os, trisock
listener = trisock.Listener.from_systemd("echo")
async def echo(sock):
    await sock.send(repr([each for each in os.environ if each[:7] == "LISTEN_"]).encode(), b"\\n")
    async for line in sock.lines(idle=True):
        await sock.send(line, b"\\n")
trisock.run(listener, echo)
"""


async def test_systemd_socket_activate_starts_a_server(free_port: int) -> None:
    command = [sys.executable, "-c", PROGRAM]
    where = f"127.0.0.1:{free_port}"
    # Without --setenv, the program gets only PATH and a few other variables.
    options = [f"--setenv=PYTHONPATH={os.environ.get('PYTHONPATH', '')}", "--fdname=echo"]
    async with running("systemd-socket-activate", f"--listen={where}", *options, *command):
        while True:
            try:
                sock = await trisock.connect("127.0.0.1", free_port)
                break
            except ConnectionRefusedError:
                continue
        async with sock:
            assert await sock.recv_line() == b"[]"
            await sock.send(b"hello\n")
            assert await sock.recv_line() == b"hello"
