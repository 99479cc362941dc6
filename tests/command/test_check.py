"""``trisock check`` against servers on loopback."""

from __future__ import annotations

import datetime
import json
import re
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from helpers.certificates import EXPIRED, NOT_YET_VALID, CertificateAuthority
from helpers.command import Command, Servers
from helpers.local_servers import LocalServer, offering, quiet, server_tls, serving
from trisock import Certificate, ServerTLS, Socket
from trisock._command import check as check_module

KEYS = [
    "url", "status", "error", "verified", "version", "cipher", "alpn", "names", "issuer",
    "not_before", "not_after", "days_left", "injection",
]  # fmt: skip

RESOLVER = "trio._highlevel_open_tcp_stream.getaddrinfo"


def test_three_servers_give_0_1_and_2(servers: Servers, command: Command) -> None:
    """A good server, one whose certificate expires in 5 days, and one with the wrong name."""
    good = command("check", "--ca", servers.ca, servers.good)
    assert (good.status, good.err) == (0, "")
    assert re.fullmatch(
        rf"OK {servers.good}: expires \d{{4}}-\d\d-\d\d \(90 days left\); "
        r"for localhost, 127\.0\.0\.1, ::1; issued by Example CA; TLSv1\.3 TLS_\w+\n",
        good.out,
    )
    soon = command("check", "--ca", servers.ca, servers.soon)
    assert soon.status == 1
    assert f"WARNING {servers.soon}: the certificate expires in 5 days, on " in soon.out
    assert "renew it" in soon.out
    wrong = command("check", "--ca", servers.ca, servers.wrong)
    assert wrong.status == 2
    assert (
        f"CRITICAL {servers.wrong}: the certificate is for other.example, not for localhost: get "
        "one that also names it" in wrong.out
    )
    assert "issued by Example CA, not verified" in wrong.out


def test_exit_status_is_the_worst_result_and_order_is_kept(
    servers: Servers, command: Command
) -> None:
    urls = [servers.wrong, servers.good, servers.soon]
    done = command("check", "--ca", servers.ca, "--parallel", 3, *urls)
    assert done.status == 2
    assert [line.split()[:2] for line in done.out.splitlines()] == [
        ["CRITICAL", f"{servers.wrong}:"],
        ["OK", f"{servers.good}:"],
        ["WARNING", f"{servers.soon}:"],
    ]


def test_json_has_these_keys(servers: Servers, command: Command) -> None:
    done = command("check", "--json", "--ca", servers.ca, servers.good, servers.wrong)
    good, wrong = json.loads(done.out)
    assert (list(good), list(wrong)) == (KEYS, KEYS)
    assert (done.status, good["status"], wrong["status"]) == (2, 0, 2)
    assert (good["error"], good["verified"], wrong["verified"]) == (None, True, False)
    assert (good["version"], good["alpn"], good["injection"]) == ("TLSv1.3", None, None)
    assert (good["names"], wrong["names"]) == (["localhost", "127.0.0.1", "::1"], ["other.example"])
    assert (good["issuer"], good["days_left"], wrong["days_left"]) == ("Example CA", 90, 90)
    for name in ("not_before", "not_after"):
        date = datetime.datetime.fromisoformat(good[name])
        assert date.utcoffset() == datetime.timedelta(0)


def test_a_server_that_cannot_be_reached_is_critical(command: Command, free_port: int) -> None:
    done = command("check", "--json", f"tls://127.0.0.1:{free_port}")
    (result,) = json.loads(done.out)
    assert done.status == 2
    assert result["error"] == (
        f"cannot connect to 127.0.0.1:{free_port}: Connection refused: nothing listens there, or a "
        "firewall refuses: check the host and the port"
    )
    assert not result["verified"]
    assert result["names"] == []
    assert all(result[key] is None for key in (*KEYS[4:7], *KEYS[8:]))
    line = command("check", f"tls://127.0.0.1:{free_port}").out
    assert line == f"CRITICAL tls://127.0.0.1:{free_port}: {result['error']}\n"


def test_warn_days_sets_which_expiry_is_soon(servers: Servers, command: Command) -> None:
    for days, status in ((5, 0), (6, 1)):
        options = ("--ca", servers.ca, "--warn-days", days)
        assert command("check", *options, servers.soon).status == status


def test_a_name_can_be_given(servers: Servers, command: Command) -> None:
    options = ("--ca", servers.ca, "--name", "other.example")
    assert command("check", *options, servers.wrong).status == 0
    done = command("check", *options, servers.good)
    assert done.status == 2
    assert "not for other.example" in done.out


def test_an_untrusted_certificate_is_shown(servers: Servers, command: Command) -> None:
    done = command("check", servers.good)
    assert done.status == 2
    assert (
        "the certificate was issued by Example CA, which is not trusted here: make the server send "
        "its intermediate certificates too, or trust the authority with --ca FILE" in done.out
    )
    assert "for localhost, 127.0.0.1, ::1; issued by Example CA, not verified" in done.out


def test_expired_and_future_certificates_are_explained(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    old = ServerTLS(command_ca.issue("localhost", dates=EXPIRED))
    early = ServerTLS(command_ca.issue("localhost", dates=NOT_YET_VALID))
    with serving(LocalServer(quiet, old), LocalServer(quiet, early)) as ports:
        urls = [f"tls://localhost:{port}" for port in ports]
        done = command("check", "--ca", ca_file, *urls)
    first, second = done.out.splitlines()
    assert done.status == 2
    assert f"the certificate expired on {EXPIRED[1]:%Y-%m-%d}: renew it" in first
    assert "(expired)" in first
    assert f"the certificate is not valid before {NOT_YET_VALID[0]:%Y-%m-%d %H:%M} UTC" in second


def test_an_expired_intermediate_has_its_own_error(command: Command, tmp_path: Path) -> None:
    root = CertificateAuthority("Root")
    expired = CertificateAuthority("Expired", issuer=root, dates=EXPIRED)
    path = tmp_path / "ca.pem"
    path.write_bytes(root.pem)
    with serving(LocalServer(quiet, ServerTLS(expired.issue("localhost")))) as [port]:
        done = command("check", "--ca", path, f"tls://localhost:{port}")
    assert done.status == 2
    assert "a certificate of the chain has expired: replace it" in done.out


def test_a_self_signed_certificate_is_explained(command: Command, ca_file: Path) -> None:
    with serving(LocalServer(quiet, ServerTLS(self_signed("localhost")))) as [port]:
        url = f"tls://localhost:{port}"
        done = command("check", "--ca", ca_file, url)
    assert (done.status, "the certificate is self-signed" in done.out) == (2, True)


def self_signed(name: str) -> Certificate:
    return CertificateAuthority(name).own_certificate()


@pytest.mark.parametrize("names", [(), ("127.0.0.1",)], ids=["no names", "an address only"])
def test_a_certificate_with_a_common_name_only_is_explained(
    names: tuple[str, ...], command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = ServerTLS(command_ca.issue(*names, common_name="localhost"))
    with serving(LocalServer(quiet, tls)) as [port]:
        url = f"tls://localhost:{port}"
        done = command("check", "--json", "--ca", ca_file, url)
    (result,) = json.loads(done.out)
    assert (done.status, result["names"]) == (2, list(names))
    assert result["error"] == (
        "the certificate is for 127.0.0.1, not for localhost: get one that also names it, or check "
        "the name that clients use (--name)"
        if names
        else "the certificate has no subjectAltName with a host name, and clients ignore a common "
        "name: get one that has localhost in its subjectAltName"
    )


def test_a_certificate_for_another_purpose_is_explained_by_openssl(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    from helpers.certificates import CLIENTS_ONLY

    tls = ServerTLS(command_ca.issue("localhost", purpose=CLIENTS_ONLY))
    with serving(LocalServer(quiet, tls)) as [port]:
        done = command("check", "--ca", ca_file, f"tls://localhost:{port}")
    assert (done.status, "the certificate was refused: " in done.out) == (2, True)


def test_alpn_is_offered_and_shown(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = server_tls(command_ca, alpn=("imap", "http/1.1"))
    with serving(LocalServer(quiet, tls)) as [port]:
        urls = [f"{scheme}://localhost:{port}" for scheme in ("imaps", "https", "tls")]
        done = command("check", "--json", "--ca", ca_file, *urls)
    assert [each["alpn"] for each in json.loads(done.out)] == ["imap", "http/1.1", None]


@pytest.mark.parametrize("scheme", ["imaps", "tls"])
def test_a_server_that_refuses_our_alpn_is_retried_without_alpn(
    scheme: str, command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    """The scheme tls offers no ALPN protocol, so there is no retry."""
    tls = server_tls(command_ca)
    hellos: list[bytes] = []

    async def refuse_once(sock: Socket) -> None:
        hellos.append(await sock.peek(wait=True) or b"")
        if len(hellos) == 1:
            await sock.recv()
            await sock.send(b"\x15\x03\x03\0\x02\x02\x78")  # the alert no_application_protocol
            return
        await sock.starttls(tls)
        await quiet(sock)

    with serving(LocalServer(refuse_once)) as [port]:
        done = command("check", "--ca", ca_file, f"{scheme}://localhost:{port}")
    assert done.status == (0 if scheme == "imaps" else 2)
    assert [b"\x04imap" in hello for hello in hellos] == (
        [True, False] if not done.status else [False]
    )


def test_an_alpn_refusal_does_not_hide_an_invalid_certificate(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = server_tls(command_ca, "other.example")

    async def refuse_alpn(sock: Socket) -> None:
        if b"\x04imap" in (await sock.peek(wait=True) or b""):
            await sock.recv()
            await sock.send(b"\x15\x03\x03\0\x02\x02\x78")  # the alert no_application_protocol
            return
        await sock.starttls(tls)

    with serving(LocalServer(refuse_alpn)) as [port]:
        done = command("check", "--ca", ca_file, f"imaps://localhost:{port}")
    assert done.status == 2
    assert "the certificate is for other.example, not for localhost" in done.out


def test_a_server_that_resets_after_the_handshake_is_good(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    async def reset(sock: Socket) -> None:
        sock.abort()

    with serving(LocalServer(reset, server_tls(command_ca))) as [port]:
        done = command("check", "--ca", ca_file, f"tls://localhost:{port}")
    assert done.status == 0


def saying(greeting: bytes, *replies: bytes) -> LocalServer:
    """Return a server in plain text that answers each line with the next reply."""

    async def handler(sock: Socket) -> None:
        await sock.send(greeting)
        for reply in replies:
            await sock.recv_line()
            await sock.send(reply)
        await quiet(sock)

    return LocalServer(handler)


@pytest.mark.parametrize(
    ("scheme", "server", "texts"),
    [
        (
            "imaps",
            saying(b"* OK ready\r\n"),
            ["if its protocol begins in plain text, name the protocol, as in imap://HOST"],
        ),
        (
            "imap",
            saying(
                b"* OK [red]\x1b]0;title\x07 :boom:\r\n",
                b"* CAPABILITY IMAP4rev1\r\na1 OK \x1b[2J\r\n",
            ),
            [
                "the server does not offer STARTTLS",
                "turn it on in the server, or check the port",
            ],
        ),
        ("pop3", saying(b"+OK ready\r\n", b"-ERR \x1b[2Jno\r\n"), [r"-ERR \x1b[2Jno"]),
    ],
    ids=["in plain text", "without STARTTLS", "refuses STARTTLS"],
)
def test_a_server_without_starttls_is_explained_in_escaped_text(
    scheme: str, server: LocalServer, texts: list[str], ca_file: Path, command: Command
) -> None:
    with serving(server) as [port]:
        done = command("check", "--ca", ca_file, f"{scheme}://localhost:{port}")
    assert done.status == 2
    assert [text for text in texts if text not in done.out] == []
    assert "\x1b" not in done.out


@pytest.mark.parametrize(
    ("scheme", "implicit"), [("ldap", "ldaps"), ("xmpp", "xmpps"), ("postgres", "tls")]
)
def test_a_server_with_tls_from_the_start_is_explained(
    scheme: str, implicit: str, command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    """The server ends the connection, because the client's bytes are not TLS."""
    with serving(LocalServer(quiet, server_tls(command_ca))) as [port]:
        done = command("check", "--ca", ca_file, f"{scheme}://localhost:{port}")
    assert done.status == 2
    assert f"check the port, or write {implicit}:// if it expects TLS from the start" in done.out


@pytest.mark.parametrize(
    ("number", "words", "advice"),
    [
        (socket.EAI_NONAME, "Name or service not known", "check the name\n"),
        (
            socket.EAI_AGAIN,
            "Temporary failure in name resolution",
            "check the name, and the resolver of this machine\n",
        ),
    ],
)
def test_a_failed_look_up_is_explained(
    number: int,
    words: str,
    advice: str,
    ca_file: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(number, words)

    monkeypatch.setattr(RESOLVER, unknown)
    done = command("check", "--ca", ca_file, "tls://host.invalid:1")
    assert done.status == 2
    assert done.out.endswith(f"host.invalid:1: {words}: {advice}")


def test_json_is_ascii_so_that_every_encoding_can_write_it(
    ca_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(RESOLVER, unknown)
    url = "tls://bücher.invalid:1"
    done = command("check", "--json", "--ca", ca_file, url)
    assert done.out.isascii()
    assert json.loads(done.out)[0]["url"] == url


def test_the_second_connection_may_fail(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    """Without the second connection, the certificate's names are unknown."""
    tls = server_tls(command_ca, "other.example")
    looks = 0

    async def serve_once(sock: Socket) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            await sock.starttls(tls)
        sock.abort()

    with serving(LocalServer(serve_once)) as [port]:
        done = command("check", "--ca", ca_file, f"tls://localhost:{port}")
    assert (done.status, looks) == (2, 2)
    assert "the certificate is not for localhost: get one that also names it" in done.out


def test_names_of_a_certificate_are_escaped(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = ServerTLS(command_ca.issue("a\x1b]0;title\x07\nCRITICAL", "[red]b[/red]"))
    with serving(LocalServer(quiet, tls)) as [port]:
        url = f"tls://localhost:{port}"
        plain = command("check", "--ca", ca_file, url)
        as_json = command("check", "--json", "--ca", ca_file, url)
    assert r"for a\x1b]0;title\x07\nCRITICAL, [red]b[/red]" in plain.out
    assert (len(plain.out.splitlines()), "\x1b" in plain.out) == (1, False)
    assert json.loads(as_json.out)[0]["names"] == [
        r"a\x1b]0;title\x07\nCRITICAL",
        "[red]b[/red]",
    ]


def test_the_issuer_is_escaped(ca_file: Path, command: Command) -> None:
    stranger = CertificateAuthority("a\x1b]0;title\x07\nOK")
    with serving(LocalServer(quiet, server_tls(stranger))) as [port]:
        url = f"tls://localhost:{port}"
        plain = command("check", "--ca", ca_file, url)
        as_json = command("check", "--json", "--ca", ca_file, url)
    assert plain.out.count(r"issued by a\x1b]0;title\x07\nOK, ") == 2
    assert len(plain.out.splitlines()) == 1
    assert json.loads(as_json.out)[0]["issuer"] == r"a\x1b]0;title\x07\nOK"


def test_many_names_are_shortened(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = server_tls(command_ca, "localhost", *(f"{n}.example" for n in range(9)))
    with serving(LocalServer(quiet, tls)) as [port]:
        done = command("check", "--ca", ca_file, f"tls://localhost:{port}")
    assert "for localhost, 0.example, 1.example and 7 more; " in done.out


def test_long_names_are_shortened(
    command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    tls = server_tls(command_ca, "localhost", "a" * 300)
    with serving(LocalServer(quiet, tls)) as [port]:
        done = command("check", "--json", "--ca", ca_file, f"tls://localhost:{port}")
    assert json.loads(done.out)[0]["names"] == ["localhost", "a" * 255 + "..."]


def test_unreadable_dates_are_critical(
    servers: Servers, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = check_module.read_certificate(b"no certificate")
    monkeypatch.setattr(check_module, "read_certificate", lambda der: nothing)
    done = command("check", "--ca", servers.ca, servers.good)
    assert done.status == 2
    assert (
        "the dates of the certificate cannot be read: replace it; for no name; TLSv1.3" in done.out
    )


def test_too_few_descriptors_are_explained(
    ca_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exhausted(*args: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(trio, "open_tcp_stream", exhausted)
    done = command("check", "--ca", ca_file, "tls://127.0.0.1:1")
    assert (done.status, "use a lower --parallel" in done.out) == (2, True)


def test_a_programming_error_is_not_reported_as_a_bad_server(
    ca_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wrong(*args: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(trio, "open_tcp_stream", wrong)
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="a bug"), flatten_subgroups=True):
        command("check", "--ca", ca_file, "tls://127.0.0.1:1")


@pytest.mark.parametrize("protocol", ["smtp", "lmtp", "imap", "pop3", "postgres"])
def test_starttls_of_our_own_servers_is_good(
    protocol: str, command_ca: CertificateAuthority, ca_file: Path, command: Command
) -> None:
    with serving(offering(protocol, server_tls(command_ca))) as [port]:
        assert command("check", "--ca", ca_file, f"{protocol}://127.0.0.1:{port}").status == 0
