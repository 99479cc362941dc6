"""``python -m trisock demo``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trisock.__main__ import main


def test_the_demo_shows_both_sides_upgrading_to_tls() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trisock", "demo"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    before = lines.index(next(line for line in lines if "both sides upgrade to TLSv1.3" in line))
    spoken = [line for line in lines if line.startswith(("server:", "client:"))]
    assert len(spoken) == 9
    assert all("plain text" in line for line in lines[:before] if line in spoken)
    assert all("(TLS_" in line for line in lines[before:] if line in spoken)
    assert "mail.example.org" in done.stdout


def test_the_demo_can_run_inside_the_test_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    assert "221 bye" in capsys.readouterr().out


def test_the_demo_without_trustme_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    assert main(["demo"]) == 1
    assert "pip install 'trisock[demo]'" in capsys.readouterr().err


def test_the_program_requires_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
