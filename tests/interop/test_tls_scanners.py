"""TLS scanners find no fault in an example server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.documents import ROOT
from helpers.tls_axes import Authorities
from helpers.tls_programs import Command, Files

pytestmark = pytest.mark.interop


@pytest.fixture
def scanned(authorities: Authorities, files: Files) -> Iterator[str]:
    """Run an example with a certificate from a private CA. Yield its host and port."""
    certificate = authorities.right.issue(
        "localhost", "127.0.0.1", revocation_list="http://localhost/revoked"
    )
    chain, key = files.certificate("server", certificate)
    example = ROOT / "examples" / "https_server.py"
    command: Command = [sys.executable, example, "--port", "0", "--cert", chain, "--key", key]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"localhost:{int(process.stdout.readline().split()[-1])}"
        finally:
            process.terminate()


@pytest.mark.needs("testssl")
def test_testssl_reports_no_vulnerability(scanned: str, ca: Path, tmp_path: Path) -> None:
    findings = tmp_path / "findings.json"
    command: Command = ["testssl", "--warnings=off", "--quiet", "--color", "0"]
    command += ["--nodns", "none", "--add-ca", ca, "--jsonfile", findings, scanned]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=900)
    found = json.loads(findings.read_text())
    assert len(found) > 100
    assert {"cert_chain_of_trust", "heartbleed", "LUCKY13", "HSTS_time"} <= {
        each["id"] for each in found
    }
    # Severity WARN is not checked: such findings are about the scanner's own OpenSSL.
    severe = ("LOW", "MEDIUM", "HIGH", "CRITICAL", "FATAL")
    assert [each for each in found if each["severity"] in severe] == []


@pytest.mark.needs("sslyze")
def test_sslyze_reports_only_the_two_extra_curves(scanned: str, ca: Path) -> None:
    """The server adds two equally strong curves to Mozilla's "intermediate" profile."""
    command: Command = ["sslyze", "--mozilla_config=intermediate", "--certinfo_ca_file", ca]
    done = subprocess.run(
        [*command, scanned], check=False, capture_output=True, text=True, timeout=300
    )
    _, _, verdict = done.stdout.partition("COMPLIANCE AGAINST TLS CONFIGURATION")
    complaints = re.findall(r"^ +\* (.*)", verdict, re.MULTILINE)
    curves = [each for each in complaints if each.startswith("tls_curves: ")]
    assert verdict
    assert complaints == curves
    assert set(re.findall(r"'(\w+)'", "".join(curves))) <= {"secp521r1", "X448"}
