"""``trisock demo``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.command import Command
from helpers.pseudo_terminal import trisock


def test_the_demo_shows_both_sides_upgrading_to_tls() -> None:
    done = subprocess.run(trisock("demo"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    before = lines.index(next(line for line in lines if "both sides upgrade to TLSv1.3" in line))
    spoken = [line for line in lines if line.startswith(("server:", "client:"))]
    assert len(spoken) == 9
    assert all("plain text" in line for line in lines[:before] if line in spoken)
    assert all("(TLS_" in line for line in lines[before:] if line in spoken)
    assert "mail.example.org" in done.stdout


def test_the_demo_can_run_inside_the_test_process(command: Command) -> None:
    done = command("demo")
    assert (done.status, done.err) == (0, "")
    assert "221 bye" in done.out


def test_the_demo_without_trustme_says_what_to_install(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    done = command("demo")
    assert (done.status, done.out) == (1, "")
    assert "pip install 'trisock[demo]'" in done.err


@pytest.mark.parametrize(("sink", "status"), [("a pipe without a reader", 141), ("/dev/full", 3)])
def test_the_demo_without_an_output_has_no_traceback(sink: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed, open("/dev/full", "w") as full:
        stdout = full if sink == "/dev/full" else closed
        done = subprocess.run(
            trisock("demo"), stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == status
    assert "Traceback" not in done.stderr
