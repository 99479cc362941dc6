"""The example key_value, which contains its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.documents import ROOT
from helpers.examples import EXAMPLES, load, started
from helpers.services import systemd
from trisock import ClientTLS

PROGRAM = EXAMPLES / "key_value.py"


def test_the_example_with_its_tests_has_at_most_80_lines() -> None:
    assert PROGRAM.read_text().count("\n") <= 80


def test_the_examples_own_tests_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # options of our own conftest
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(PROGRAM)], cwd=ROOT, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout


async def test_the_server_keeps_values_until_a_signal_stops_it(pem: Path, free_port: int) -> None:
    key_value = load("key_value")
    client_tls = ClientTLS("localhost", ca=(pem / "ca.pem").read_bytes())
    source = (
        f"import runpy; example = runpy.run_path({str(PROGRAM)!r}); "
        f"example['serve'].__globals__['PORT'] = {free_port}; "
        "example['serve'](example['trisock'].Certificate.from_files('chain.pem', 'key.pem'))"
    )
    command = [sys.executable, "-X", "dev", "-c", source]
    with systemd(pem / "notify") as manager:
        environment = {**os.environ, "NOTIFY_SOCKET": manager.path}
        async with started(command, cwd=pem, env=environment) as server:
            assert await manager.receive() == b"READY=1"
            assert await key_value.ask(b"put name value", free_port, client_tls) == b"+"
            assert await key_value.ask(b"get name", free_port, client_tls) == b"+value"
            await server.stop()


def test_without_arguments_the_program_explains_itself() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("A key-value store over TLS")
    assert "python examples/key_value.py serve\n" in done.stderr
