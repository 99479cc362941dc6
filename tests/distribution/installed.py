"""Check an installed trisock. This runs in an environment that has the wheel and one extra.

    python -I tests/distribution/installed.py [EXTRA]

Without the packages of an extra, its part of trisock must say what to install.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from importlib import import_module, resources

import trio

import trisock
import trisock.hammerspoon
import trisock.pluto
import trisock.testing

# The packages that each extra must bring, by their import names.
PACKAGES = {
    "": set[str](),
    "testing": {"trustme"},
    "cli": {"click", "rich"},
    "demo": {"trustme", "click", "rich"},
    "gunicorn": {"gunicorn"},
}


def main(extra: str) -> None:
    optional = set[str]().union(*PACKAGES.values())
    found = {name for name in optional if importlib.util.find_spec(name) is not None}
    assert found >= PACKAGES[extra], f"{extra}: {found}"
    assert trisock.__version__ == importlib.metadata.version("trisock")
    assert resources.files("trisock").joinpath("py.typed").is_file()
    trio.run(converse, "trustme" in found)
    check_gunicorn("gunicorn" in found)
    check_command("click" in found, "trustme" in found)


async def converse(tls: bool) -> None:
    async def echo(sock: trisock.Socket) -> None:
        async for line in sock.lines():
            await sock.send(line, b"\n")

    async with trisock.testing.serving(echo) as served:
        async with await served.connect() as client:
            await client.send(b"hello\n")
            assert await client.recv_line() == b"hello"
    failure = ""
    try:
        a, b = await trisock.testing.socket_pair(tls=True)
    except ImportError as exc:
        failure = str(exc)
    else:
        async with a, b:
            await a.send(b"hello")
            assert await b.recv() == b"hello"
    assert failure == "" if tls else "trisock[testing]" in failure, failure


def check_gunicorn(installed: bool) -> None:
    missing = ""
    try:
        import_module("trisock.gunicorn")
    except ModuleNotFoundError as exc:
        missing = str(exc.name)
    assert missing == ("" if installed else "gunicorn")


def check_command(installed: bool, demo: bool) -> None:
    status, output = run_command("--help")
    if not installed:
        assert status == 1, output
        assert "trisock[cli]" in output
        return
    assert status == 0, output
    assert "check" in output
    if demo:
        status, output = run_command("demo")
        assert status == 0, output


def run_command(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-I", "-m", "trisock", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
