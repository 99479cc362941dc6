"""The command on a real pseudo-terminal: colors, width, progress, Ctrl-C."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from helpers.certificates import CertificateAuthority
from helpers.command import Servers
from helpers.local_servers import LocalServer, quiet, server_tls, serving
from helpers.pseudo_terminal import WIDTH, on_terminal, trisock
from trisock import ServerTLS, Socket

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def four_urls(servers: Servers, free_port: int) -> tuple[object, ...]:
    """Arguments of ``check``: one good server, and three with different faults."""
    urls = (servers.good, servers.soon, servers.wrong, f"tls://localhost:{free_port}")
    return ("--ca", servers.ca, *urls)


@pytest.mark.parametrize("width", [200, WIDTH, 74, 73, 60, 40, 20])
def test_check_is_in_color_and_fits_every_width(width: int, four_urls: tuple[object, ...]) -> None:
    with on_terminal(*trisock("check", *four_urls), width=width) as terminal:
        assert terminal.wait() == 2
        shown = terminal.shown
    assert re.search(r"\x1b\[1;32mOK", shown)
    assert re.search(r"\x1b\[1;33mWARNING", shown)
    assert re.search(r"\x1b\[1;31mCRITICAL", shown)
    plain = ESCAPE.sub("", shown)
    lines = plain.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert " ".join(plain.split()).endswith("4 checked: 1 good, 1 soon to expire, 2 bad")
    assert lines[0].startswith("Status") == (width >= 74)
    if width >= 40:  # the name of the cipher fits on a line
        assert plain.count("TLS_AES_256_GCM_SHA384") == 3


def test_a_narrow_terminal_gets_a_block_for_each_url(servers: Servers) -> None:
    command = trisock("check", "--ca", servers.ca, servers.good, servers.soon)
    with on_terminal(*command, width=40) as terminal:
        assert terminal.wait() == 1
        blocks = ESCAPE.sub("", terminal.shown).replace("\r", "").split("\n")
    lines = [line.rstrip() for line in blocks]
    date = next(line.split()[1] for line in lines if "(90 days left)" in line)
    assert lines[:7] == [
        f"OK {servers.good}",
        "  for localhost, 127.0.0.1, ::1",
        "  issued by Example CA",
        "  TLSv1.3 TLS_AES_256_GCM_SHA384",
        f"  expires {date} (90 days left)",
        "",
        f"WARNING {servers.soon}",
    ]
    assert lines[7].startswith("  the certificate expires in 5 days,")


def test_no_color_is_respected(servers: Servers) -> None:
    command = trisock("check", "--ca", servers.ca, servers.good)
    with on_terminal(*command, NO_COLOR="1") as terminal:
        assert terminal.wait() == 0
        assert "OK" in terminal.shown
        assert "\x1b[1;32m" not in terminal.shown


def test_a_pipe_gets_plain_lines_whatever_the_environment_says(servers: Servers) -> None:
    done = subprocess.run(
        trisock("check", "--ca", servers.ca, servers.good, servers.soon),
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["OK", "WARNING"]
    assert "\x1b" not in done.stdout


def test_a_certificate_cannot_control_the_terminal(
    command_ca: CertificateAuthority, ca_file: Path
) -> None:
    tls = ServerTLS(command_ca.issue("\x1b]0;title\x07[red]:boom:"))
    with serving(LocalServer(quiet, tls)) as [port]:
        command = trisock("check", "--ca", ca_file, f"tls://localhost:{port}")
        with on_terminal(*command) as terminal:
            assert terminal.wait() == 2
            shown = re.sub(r"\s+", "", ESCAPE.sub("", terminal.shown))
    assert "\x1b]" not in shown
    assert r"\x1b]0;title\x07[red]:boom:" in shown


def test_a_thousand_urls_show_progress_in_less_than_100_mib(
    command_ca: CertificateAuthority, ca_file: Path, tmp_path: Path
) -> None:
    """The child reports its own peak memory (VmHWM), which excludes that of the test process."""
    peak = tmp_path / "peak"
    program = (
        "import re, sys; from trisock.__main__ import main; status = main(); "
        "kib = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]; "
        f"open({str(peak)!r}, 'w').write(kib); sys.exit(status)"
    )
    with serving(LocalServer(quiet, server_tls(command_ca))) as [port]:
        urls = [f"tls://127.0.0.1:{port}"] * 1000
        arguments = ("check", "--parallel", "100", "--timeout", "60", "--ca", str(ca_file), *urls)
        with on_terminal(sys.executable, "-c", program, *arguments) as terminal:
            progress = terminal.read_until("/1000")
            assert terminal.wait() == 0
            shown = terminal.shown
    assert "checking" in progress
    assert "\x1b[?25h" in shown  # the cursor is visible again
    assert "1000 checked: " in ESCAPE.sub("", shown)
    kib = int(peak.read_text())
    print(f"peak memory: {kib} KiB")
    assert kib < 100 * 1024


@pytest.mark.parametrize("scheme", ["tls", pytest.param("imap", marks=pytest.mark.rare)])
def test_ctrl_c_ends_a_check_at_once(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"] * 2
        with on_terminal(*trisock("check", *urls)) as terminal:
            terminal.read_until("0/2")
            terminal.type("\x03")
            assert terminal.wait() == 130
            assert "Traceback" not in terminal.shown
            assert "\x1b[?25h" in terminal.shown
            assert "interrupted: 0 of 2 checked" in terminal.shown
            assert "Status" not in terminal.shown  # without results, there is no table


def test_ctrl_c_shows_the_results_so_far(servers: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [servers.wrong, f"tls://127.0.0.1:{silent.getsockname()[1]}", servers.good]
        with on_terminal(*trisock("check", "--ca", servers.ca, *urls)) as terminal:
            terminal.read_until("2/3")
            terminal.type("\x03")
            assert terminal.wait() == 130
            shown = ESCAPE.sub("", terminal.shown)
    assert "interrupted: 2 of 3 checked" in shown
    _, _, table = shown.partition("Status")
    assert [line.split()[:2] for line in table.splitlines() if "://" in line] == [
        ["CRITICAL", servers.wrong],
        ["OK", servers.good],
    ]
    assert "2 checked: 1 good, 1 bad" in table


async def describe(sock: Socket) -> None:
    """Send an escape sequence that must not reach a terminal, then echo each chunk's repr."""
    await sock.send(b"* ready\x1b[2J\r\n")
    async for chunk in sock:
        await sock.send(repr(chunk).encode(), b"\r\n")


def test_a_terminal_sends_crlf_and_ends_at_ctrl_d() -> None:
    with serving(LocalServer(describe)) as [port]:
        with on_terminal(*trisock("connect", f"tcp://127.0.0.1:{port}")) as terminal:
            terminal.read_until(r"* ready\x1b[2J")
            terminal.type("hello\n")
            terminal.read_until(r"b'hello\r\n'")
            terminal.type("\x04")
            assert terminal.wait() == 0
            assert f"connected to 127.0.0.1:{port}, in plain text" in terminal.shown
            assert "the peer has ended the connection" in terminal.shown
            assert os.get_blocking(terminal.slave)


def test_a_terminal_sends_lf_if_asked_to(command_ca: CertificateAuthority, ca_file: Path) -> None:
    with serving(LocalServer(describe, server_tls(command_ca))) as [port]:
        url = f"tls://localhost:{port}"
        with on_terminal(*trisock("connect", "--lf", "--ca", ca_file, url)) as terminal:
            terminal.read_until("* ready")
            terminal.type("hello\n")
            terminal.read_until(r"b'hello\n'")
            terminal.type("\x04")
            terminal.read_until("end of the input; waiting for the peer to close")
            terminal.type("\x03")
            assert terminal.wait() == 130
            assert "Traceback" not in terminal.shown
            assert "TLSv1.3 TLS_AES_256_GCM_SHA384 with localhost" in terminal.shown


def test_ctrl_c_ends_connect_at_once() -> None:
    with serving(LocalServer(describe)) as [port]:
        with on_terminal(*trisock("connect", f"tcp://127.0.0.1:{port}")) as terminal:
            terminal.read_until("* ready")
            terminal.type("\x03")
            assert terminal.wait() == 130
            assert "Traceback" not in terminal.shown
            assert os.get_blocking(terminal.slave)


def test_the_demo_is_in_color() -> None:
    with on_terminal(*trisock("demo")) as terminal:
        assert terminal.wait() == 0
        assert "\x1b[36mserver: " in terminal.shown
        assert "\x1b[32m(TLS_AES_256_GCM_SHA384)" in terminal.shown
