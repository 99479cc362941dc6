"""The example key_value, which contains its own tests."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import trio

from helpers.documents import ROOT
from helpers.examples import EXAMPLES, load
from trisock import ClientTLS
from trisock.testing import Authority

PROGRAM = EXAMPLES / "key_value.py"


def test_the_example_with_its_tests_has_at_most_80_lines() -> None:
    assert PROGRAM.read_text().count("\n") <= 80


def test_the_examples_own_tests_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # options of our own conftest
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(PROGRAM)], cwd=ROOT, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout


async def test_the_server_keeps_values_until_a_signal_stops_it(
    monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    key_value = load("key_value")
    monkeypatch.setattr(key_value, "PORT", free_port)
    authority = Authority()
    client_tls = authority.client_tls()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(key_value.serve, authority.certificate())
        await _until_served(key_value, free_port, client_tls)
        assert await key_value.ask(b"put name value", free_port, client_tls) == b"+"
        assert await key_value.ask(b"get name", free_port, client_tls) == b"+value"
        signal.raise_signal(signal.SIGTERM)


async def _until_served(key_value: object, port: int, client_tls: ClientTLS) -> None:
    while True:
        try:
            await key_value.ask(b"get nothing", port, client_tls)  # type: ignore[attr-defined]
            return
        except ConnectionRefusedError:
            await trio.lowlevel.checkpoint()


def test_without_arguments_the_program_explains_itself() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "Key-value store over TLS. Run python -m trustme, then this: serve"
    )
