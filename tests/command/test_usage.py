"""Help, wrong usage, missing extras, and outputs that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import trisock
from helpers.command import Command, Servers
from helpers.pseudo_terminal import trisock as command_line
from trisock import starttls
from trisock.__main__ import main
from trisock._command import output


def test_without_arguments_the_command_shows_its_help(command: Command) -> None:
    done = command()
    assert (done.status, done.err) == (0, "")
    assert done.out == command("--help").out == command("-h").out
    for name in ("check", "connect", "demo"):
        assert name in done.out


def test_help_of_check_lists_schemes_and_statuses(command: Command) -> None:
    done = command("check", "--help")
    assert done.status == 0
    for scheme in (*starttls.PROTOCOLS, "imaps", "https", "tls"):
        assert scheme in done.out
    assert "1  a certificate expires soon" in done.out
    assert command("connect", "--help").status == 0


def test_version(command: Command) -> None:
    done = command("--version")
    assert (done.status, done.out) == (0, f"trisock {trisock.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["--bogus"],
        ["check"],
        ["check", "--bogus", "tls://host:1"],
        ["check", "--warn-days", "-1", "tls://host:1"],
        ["check", "--warn-days", "x", "tls://host:1"],
        ["check", "--timeout", "0", "tls://host:1"],
        ["check", "--timeout", "nan", "tls://host:1"],
        ["check", "--timeout", "x", "tls://host:1"],
        ["check", "--parallel", "0", "tls://host:1"],
        ["check", "--ca", "/absent", "tls://host:1"],
        ["check", "--ca", os.devnull, "tls://host:1"],
        ["check", "--name", "host:443", "tls://host:1"],
        ["check", "--name", "", "tls://host:1"],
        ["check", "tls://host:1", "mail.example.org"],
        ["check", "tcp://host:1"],
        ["check", "unix:/run/s"],
        ["check", "tls://host"],
        ["connect"],
        ["connect", "tcp://host:1", "tcp://host:2"],
        ["connect", "tls://me@host:1"],
        ["connect", "--name", "other", "tcp://host:1"],
        ["connect", "--ca", __file__, "unix:/run/s"],
        ["connect", "--ca", __file__, "tls://host:1"],
        ["demo", "now"],
    ],
    ids=" ".join,
)
def test_wrong_usage_of_any_kind_is_3(arguments: list[str], command: Command) -> None:
    done = command(*arguments)
    assert (done.status, done.out) == (3, "")
    assert "Usage: trisock" in done.err
    assert "Error: " in done.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "--timeout", "0", "tls://h:1"], "'--timeout': 0 is not a number of seconds"),
        (["check", "--timeout", "nan", "tls://h:1"], "'--timeout': nan is not a number of seconds"),
        (["check", "--timeout", "soon", "tls://h:1"], "'--timeout': 'soon' is not"),
        (["check", "--warn-days", "x", "tls://h:1"], "'--warn-days': 'x' is not"),
        (["check", "--parallel", "0", "tls://h:1"], "'--parallel': 0 is not"),
        (["check", "--ca", "/absent", "tls://h:1"], "'--ca': File '/absent' does not exist"),
        (["check", "--ca", os.devnull, "tls://h:1"], "'--ca': '/dev/null' is not PEM: "),
        (["connect", "--ca", "/proc/self/mem", "tls://h:1"], "'/proc/self/mem' cannot be read: "),
        (["connect", "--name", "h:1", "tls://h:1"], "'--name': 'h:1' is not a host name: give"),
        (["check", "--name", "a\x1b", "tls://h:1"], r"'--name': 'a\x1b' is not a host name"),
        (["check", "--name", "a" * 99, "tls://h:1"], f"'{'a' * 99}' is not a host name"),
        (["check", f"tls://{'a' * 99}:1"], f"'URL...': 'tls://{'a' * 99}:1': '{'a' * 99}' is not"),
        (["check", "tcp://h:1"], "'URL...': 'tcp://h:1' has no TLS to check"),
        (["connect", "tls://h"], "'URL': 'tls://h' has no port"),
        (["connect", "--name", "other", "tcp://h:1"], "--name is for TLS, which 'tcp://h:1' does"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_an_error_names_the_option_and_quotes_what_was_typed(
    arguments: list[str], text: str, command: Command
) -> None:
    done = command(*arguments)
    assert (done.status, done.out) == (3, "")
    assert text in done.err


def test_all_wrong_urls_are_reported_at_once(command: Command, free_port: int) -> None:
    good = f"tls://127.0.0.1:{free_port}"
    done = command("check", "host", good, "gopher://host", "unix:/run/s", "imap://me:secret@host")
    assert (done.status, done.out) == (3, "")
    _, _, listed = done.err.partition("Invalid value for 'URL...': \n")
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines] == [
        "'host'",
        "'gopher://host':",
        "'unix:/run/s'",
        "'host'",
    ]
    assert "secret" not in done.err
    assert good not in done.err


def test_the_program_and_the_module_are_the_same(command: Command) -> None:
    (found,) = entry_points(group="console_scripts", name="trisock") or (None,)
    if found is not None:  # not installed, if the tests run from the source
        assert found.load() is main
    done = subprocess.run(command_line("--version"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, command("--version").out)


def forget_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next call import the command again, until the test ends."""
    monkeypatch.delattr(trisock, "_command")
    for name in list(sys.modules):
        if name.startswith("trisock._command"):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_the_command_says_what_to_install(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_the_command(monkeypatch)
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    assert main(["--help"]) == 1
    assert capsys.readouterr().err == (
        "the command needs click and rich: pip install 'trisock[cli]'\n"
    )


def test_another_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_the_command(monkeypatch)
    monkeypatch.setitem(sys.modules, "cryptography.x509.oid", None)
    with pytest.raises(ModuleNotFoundError, match="cryptography"):
        main(["--help"])


def test_the_library_imports_neither_click_nor_rich() -> None:
    program = "import sys, trisock; print({'click', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "set()\n"


def test_ctrl_c_during_startup_gives_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupts:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "trisock._command.main":
                raise KeyboardInterrupt

    forget_the_command(monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert main([]) == 130


def test_ctrl_c_during_parsing_gives_no_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(url: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trisock._command.url_list.parse", interrupt)
    assert command("check", "tls://host:1").status == 130


def test_an_ignored_interrupt_stays_ignored(servers: Servers, command: Command) -> None:
    """A shell without job control starts background jobs with SIGINT ignored."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert command("check", "--ca", servers.ca, servers.good).status == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_the_sigint_handler_is_restored(servers: Servers, command: Command) -> None:
    before = signal.getsignal(signal.SIGINT)
    command("check", "--ca", servers.ca, servers.good)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_output_pipe_ends_the_checks_without_a_traceback(servers: Servers) -> None:
    """The reader exits early, like ``head -1``."""
    urls = [servers.good] * 200
    with subprocess.Popen(
        command_line("check", "--parallel", "1", "--ca", servers.ca, *urls),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("OK ")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def test_help_to_a_closed_pipe_gives_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run(
            command_line("--help"), stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_is_explained(servers: Servers) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command_line("check", "--ca", servers.ca, servers.good),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 3
    assert done.stderr == "trisock: input or output failed: [Errno 28] No space left on device\n"


def test_wrong_usage_is_3_although_stderr_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command_line("bogus"), stdout=subprocess.PIPE, stderr=full, timeout=60
        )
    assert (done.returncode, done.stdout) == (3, b"")


def test_wrong_usage_is_not_written_to_stdout_when_stderr_is_closed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    done = command("bogus")
    assert (done.status, done.out) == (3, "")


@pytest.mark.parametrize(
    ("instruction", "shown"),
    [("zsh_source", "_trisock_completion"), ("bash_complete", "plain,check")],
)
def test_a_shell_can_complete_the_command_line(
    instruction: str, shown: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_TRISOCK_COMPLETE", instruction)
    monkeypatch.setenv("COMP_WORDS", "trisock ch")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = command()
    assert (done.status, done.err, shown in done.out) == (0, "", True)


def test_an_encoding_that_lacks_a_character_shows_an_escape() -> None:
    done = subprocess.run(
        command_line("check", "--timeout", "1", "tls://b\u00fccher.invalid:1"),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert done.returncode == 2
    assert rb"tls://b\xfccher.invalid:1" in done.stdout


def test_bytes_in_an_argument_that_are_no_text_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [*map(os.fsencode, command_line("check")), b"tls://h\xff:1"],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


def test_outputs_that_are_closed_are_no_error(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["check", "--ca", str(servers.ca), servers.good]) == 0
    output.say("nobody reads this")
    output.discard(sys.stdout)


def test_the_arguments_come_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trisock", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"trisock {trisock.__version__}\n"
