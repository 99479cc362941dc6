"""Scanners that look for what is wrong with a TLS server; they find nothing."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.documents import ROOT
from helpers.tls_axes import (
    Authorities,
)
from helpers.tls_programs import Command, Files


@pytest.fixture
def scanned_example(authorities: Authorities, files: Files) -> Command:
    """Give the example with a certificate that is as good as one can be on a private network."""
    certificate = authorities.right.issue(
        "localhost", "127.0.0.1", revocation_list="http://localhost/revoked"
    )
    chain, key = files.certificate("server", certificate)
    example = ROOT / "examples" / "https_server.py"
    return [sys.executable, example, "--port", "0", "--cert", chain, "--key", key]


@pytest.mark.interop
@pytest.mark.needs("testssl")
def test_testssl_finds_nothing(
    scanned_example: Command, authorities: Authorities, files: Files, tmp_path: Path
) -> None:
    findings = tmp_path / "findings.json"
    with example(scanned_example) as port:
        command: Command = ["testssl", "--warnings=off", "--quiet", "--color", "0"]
        command += ["--nodns", "none", "--add-ca", files.ca(authorities.right.pem)]
        command += ["--jsonfile", findings, f"localhost:{port}"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=900)
    found = json.loads(findings.read_text())
    assert len(found) > 100
    assert {"cert_chain_of_trust", "heartbleed", "LUCKY13", "HSTS_time"} <= {
        each["id"] for each in found
    }
    # (WARN is about the scanner itself: what its OpenSSL cannot do.)
    severe = ("LOW", "MEDIUM", "HIGH", "CRITICAL", "FATAL")
    assert [each for each in found if each["severity"] in severe] == []


@pytest.mark.interop
@pytest.mark.needs("sslyze")
def test_sslyze_finds_nothing(
    scanned_example: Command, authorities: Authorities, files: Files
) -> None:
    """Mozilla's "intermediate" configuration, but for two more curves that are as good."""
    with example(scanned_example) as port:
        command: Command = ["sslyze", "--mozilla_config=intermediate"]
        command += ["--certinfo_ca_file", files.ca(authorities.right.pem), f"localhost:{port}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    _, _, verdict = done.stdout.partition("COMPLIANCE AGAINST TLS CONFIGURATION")
    complaints = re.findall(r"^ +\* (.*)", verdict, re.MULTILINE)
    curves = [each for each in complaints if each.startswith("tls_curves: ")]
    assert verdict
    assert complaints == curves
    assert set(re.findall(r"'(\w+)'", "".join(curves))) <= {"secp521r1", "X448"}


@contextlib.contextmanager
def example(command: Command) -> Iterator[int]:
    """Run an example that says on which port it listens."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[-1])
        finally:
            process.terminate()
