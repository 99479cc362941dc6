"""``trisock check --injection``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.certificates import CertificateAuthority
from helpers.command import Command, Servers
from helpers.injectable_servers import WORDS, Manner, server
from helpers.local_servers import LocalServer, echo, offering, server_tls, serving
from trisock import Socket, starttls
from trisock._command.injected_commands import INJECTED_COMMANDS
from trisock._command.stages import Opening
from trisock._command.urls import Target


def test_every_protocol_but_telnet_has_an_injected_command() -> None:
    assert set(INJECTED_COMMANDS) == set(WORDS) == set(starttls.PROTOCOLS) - {"telnet"}


CheckInjection = Callable[..., tuple[int, Any]]


@pytest.fixture
def check_injection(ca_file: Path, command: Command) -> CheckInjection:
    """Test a server, and return the exit status and its object in JSON."""

    def check(protocol: str, server: LocalServer) -> tuple[int, Any]:
        with serving(server) as [port]:
            url = f"{protocol}://127.0.0.1:{port}"
            done = command("check", "--json", "--injection", "--ca", ca_file, url)
        (result,) = json.loads(done.out)
        return done.status, result

    return check


@pytest.mark.parametrize("protocol", WORDS)
def test_a_server_that_executes_injected_text_is_critical(
    protocol: str, command_ca: CertificateAuthority, check_injection: CheckInjection
) -> None:
    believing = server(protocol, Manner.BELIEVES, server_tls(command_ca))
    status, result = check_injection(protocol, believing)
    assert (status, result["status"], result["injection"]) == (2, 2, True)
    assert result["error"].endswith(
        "an attacker can inject commands (CVE-2011-0411), so update the server"
    )
    assert result["verified"]


def test_an_invalid_certificate_does_not_hide_an_injection(
    command_ca: CertificateAuthority, check_injection: CheckInjection
) -> None:
    believing = server("imap", Manner.BELIEVES, server_tls(command_ca, "other.example"))
    status, result = check_injection("imap", believing)
    assert (status, result["verified"], result["injection"]) == (2, False, True)


@pytest.mark.parametrize("protocol", WORDS)
def test_a_server_that_drops_injected_text_is_good(
    protocol: str, command_ca: CertificateAuthority, check_injection: CheckInjection
) -> None:
    forgetful = server(protocol, Manner.FORGETS, server_tls(command_ca))
    status, result = check_injection(protocol, forgetful)
    assert (status, result["error"], result["injection"]) == (0, None, False)


@pytest.mark.parametrize("manner", [Manner.ANSWERS, Manner.MUTE, Manner.HANGS])
def test_a_server_that_does_not_answer_inside_tls_is_good(
    manner: Manner, command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    timeout = 2 if manner is Manner.HANGS else 10
    with serving(server("smtp", manner, server_tls(command_ca))) as [port]:
        url = f"smtp://127.0.0.1:{port}"
        options = ("--injection", "--timeout", timeout, "--ca", ca_file)
        done = command("check", *options, url)
    assert (done.status, done.out[:3]) == (0, "OK ")
    assert done.out.endswith("; no injection\n")


def test_an_error_from_postgresql_under_tls_is_no_injection() -> None:
    """PostgreSQL 15 sends this error under TLS, and ends the connection."""
    complaint = b"SFATAL\0VFATAL\0C08P01\0Mreceived unencrypted data after SSL request\0\0"
    is_answered = INJECTED_COMMANDS["postgres"].is_answered
    assert not is_answered(b"E\0\0\0\x46" + complaint)
    assert is_answered(b"E\0\0\0\x46" + complaint.replace(b"08P01", b"28000"))


def test_a_server_that_floods_is_good(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = server_tls(command_ca)

    async def handler(sock: Socket) -> None:
        await starttls.accept(sock, "imap", tls)
        while True:
            await sock.send(b"* STATUS\r\n" * 1000)

    with serving(LocalServer(handler)) as [port]:
        # If both checks shared a connection, its clean close would wait for the flood to end.
        url = f"imap://127.0.0.1:{port}"
        done = command("check", "--injection", "--ca", ca_file, url)
    assert done.status == 0


@pytest.mark.parametrize("protocol", ["smtp", "lmtp", "imap", "pop3", "postgres"])
def test_our_own_servers_accept_no_injected_text(
    protocol: str, command_ca: CertificateAuthority, check_injection: CheckInjection
) -> None:
    status, result = check_injection(protocol, offering(protocol, server_tls(command_ca)))
    assert (status, result["injection"]) == (0, False)


def test_a_server_that_refuses_the_second_connection_is_not_tested(
    servers: Servers, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(target: Target, opening: Opening) -> Socket:
        raise ConnectionRefusedError

    monkeypatch.setattr("trisock._command.check.connect_plain", refuse)
    done = command("check", "--json", "--injection", "--ca", servers.ca, servers.soon)
    assert (done.status, json.loads(done.out)[0]["injection"]) == (1, None)


def test_without_starttls_there_is_nothing_to_inject(
    command_ca: CertificateAuthority, check_injection: CheckInjection
) -> None:
    status, result = check_injection("tls", LocalServer(echo, server_tls(command_ca)))
    assert (status, result["injection"]) == (0, None)
