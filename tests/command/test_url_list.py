"""``trisock check -``: URLs from standard input."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from helpers.command import Command, Servers
from helpers.pseudo_terminal import on_terminal, trisock
from trisock._command.url_list import parse_all


def parsed(text: bytes, *urls: str) -> list[str]:
    """Return the URLs of ``urls``, or of standard input."""
    stdin = io.TextIOWrapper(io.BytesIO(text), "utf-8")
    return [target.url for target in parse_all(urls or ("-",), stdin)]


@pytest.mark.parametrize(
    "text",
    [
        b"imap://host\ntls://host:1\n",
        b"imap://host\r\ntls://host:1\r\n",
        b"imap://host\ntls://host:1",
        b"\xef\xbb\xbfimap://host\n\ntls://host:1\n",
        b"# mail\n  imap://host\t\n \n\t# others # here\ntls://host:1 # moved\n",
    ],
)
def test_each_line_is_a_url_and_comments_do_not_count(text: bytes) -> None:
    assert parsed(text) == ["imap://host", "tls://host:1"]


def test_urls_from_standard_input_replace_the_dash_in_order() -> None:
    urls = ("tls://first:1", "-", "tls://last:1")
    assert parsed(b"imap://host\n", *urls) == ["tls://first:1", "imap://host", "tls://last:1"]
    assert parsed(b"", *urls) == ["tls://first:1", "tls://last:1"]


@pytest.mark.parametrize("text", [b"", b"\n", b"# nothing\n"])
def test_an_empty_list_of_urls_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="standard input has no URLs"):
        parsed(text)


def test_all_errors_are_listed_with_their_lines() -> None:
    text = b"# comment\nimap://host\nimap://h\xff\nhttps://host#part\ntcp://host:1\n-\n"
    with pytest.raises(ValueError, match=r".+") as caught:
        parsed(text, "imap", "-")
    first, *lines = str(caught.value).splitlines()
    assert first == ""
    assert [" ".join(line.split()[:3]) for line in lines] == [
        "'imap' has no",
        r"line 3: 'imap://h\udcff':",
        "line 4: 'https://host#part'",
        "line 5: 'tcp://host:1'",
        "line 6: '-'",
    ]
    with pytest.raises(ValueError, match=r"^line 2: 'host' has no scheme"):
        parsed(b"\nhost\n")


def test_a_pipe_of_urls_is_checked(servers: Servers) -> None:
    done = subprocess.run(
        trisock("check", "--ca", servers.ca, "-"),
        input=f"# ours\n{servers.good}\n\n{servers.soon}\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")
    shown = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    assert shown == [f"OK {servers.good}", f"WARNING {servers.soon}"]


@pytest.mark.parametrize(
    ("stdin", "text"),
    [
        (io.StringIO("\nhost\n"), "Invalid value for 'URL...': line 2: 'host' has no scheme"),
        (io.StringIO(""), "standard input has no URLs"),
        (None, "'-' means standard input, which is closed"),
    ],
)
def test_an_invalid_list_exits_with_3(
    stdin: object, text: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    done = command("check", "-")
    assert (done.status, done.out) == (3, "")
    assert text in done.err


def test_completion_does_not_read_standard_input(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setenv("_TRISOCK_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "trisock check - --par")
    monkeypatch.setenv("COMP_CWORD", "3")
    done = command()
    assert (done.status, "--parallel" in done.out) == (0, True)


def test_urls_can_be_typed(servers: Servers) -> None:
    with on_terminal(*trisock("check", "--ca", servers.ca, "-")) as terminal:
        terminal.type(f"{servers.good}\n\x04")
        assert terminal.wait() == 0
        assert "1 checked: " in terminal.shown


def test_ctrl_c_while_urls_are_read_gives_no_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupts(io.StringIO):
        def __next__(self) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupts())
    done = command("check", "-")
    assert (done.status, done.out, done.err.strip()) == (130, "", "")
