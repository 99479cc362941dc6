"""``ServerTLS.reload`` reads renewed files. After a failure, the old certificates stay in use."""

from __future__ import annotations

import copy
import datetime
import itertools
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import trisock
from helpers.authority import issue
from helpers.pairs import closing
from helpers.server import echo
from trisock import Certificate, ClientTLS, ServerTLS
from trisock.testing import Authority, serving, socket_pair
from trisock.testing._serving import Serving


class Files:
    """The files of a certificate for localhost, in a directory."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.authority = authority
        self.client_tls = authority.client_tls("localhost")
        self.chain = directory / "chain.pem"
        self.key = directory / "key.pem"
        self.renew()

    def renew(self) -> bytes:
        """Write a new certificate. Return it in DER."""
        certificate = issue(self.authority, "localhost")
        self.chain.write_bytes(certificate._chain)
        self.key.write_bytes(certificate._private_key)
        return ssl.PEM_cert_to_DER_cert(certificate._chain.decode())

    def role(self, **options: object) -> ServerTLS:
        certificate = Certificate.from_files(self.chain, self.key)
        return ServerTLS(certificate, **options)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Files:
    return Files(tmp_path, authority)


async def certificate_of(s: Serving, files: Files) -> bytes:
    """Return the certificate that the server shows to a new client."""
    async with await s.connect(tls=files.client_tls) as client:
        assert client.tls is not None
        assert client.tls.peer_certificate is not None
        return client.tls.peer_certificate


async def test_a_reload_changes_later_connections_only(files: Files, authority: Authority) -> None:
    role = files.role()
    async with serving(echo, tls=role) as s, await s.connect(tls=files.client_tls) as before:
        old = await certificate_of(s, files)
        new = files.renew()
        assert await certificate_of(s, files) == old
        assert role.reload()
        assert await certificate_of(s, files) == new != old
        await before.send(b"still there")
        assert await before.recv() == b"still there"


async def test_a_reload_changes_later_starttls(files: Files, authority: Authority) -> None:
    role = files.role()
    for expected in (None, files.renew()):
        if expected is not None:
            assert role.reload()
        client, server = await socket_pair()
        async with closing(client, server), trio.open_nursery() as nursery:
            nursery.start_soon(server.starttls, role)
            info = await client.starttls(authority.client_tls("localhost"))
            assert (info.peer_certificate == expected) == (expected is not None)


async def test_a_handshake_in_progress_is_not_disturbed(files: Files, authority: Authority) -> None:
    role = files.role()
    client, server = await socket_pair()
    async with closing(client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.starttls, role)
        async with trio.open_nursery() as begun:
            begun.start_soon(client.starttls, authority.client_tls("localhost"))
            while server._connection.tls is None or not hasattr(
                server._connection.tls.engine, "_ssl_object"
            ):
                await trio.lowlevel.checkpoint()
            files.renew()
            assert role.reload()
    assert client.istls()


def test_a_reload_returns_whether_anything_has_changed(files: Files) -> None:
    role = files.role()
    assert not role.reload()
    os.utime(files.chain)
    assert not role.reload()
    files.renew()
    assert role.reload()
    assert not role.reload()


def test_certificates_without_files_do_not_change(authority: Authority) -> None:
    certificate = authority.certificate("localhost")
    assert certificate.reread() is certificate
    assert not authority.server_tls("localhost").reload()


def test_equality_hash_and_fields_stay_those_of_the_arguments(files: Files) -> None:
    role, same = files.role(), files.role()
    before = hash(role), role.certificates, repr(role)
    files.renew()
    assert role.reload()
    assert role == same
    assert (hash(role), role.certificates, repr(role)) == before


def test_a_copy_reloads_with_its_original(files: Files) -> None:
    role = files.role()
    assert copy.copy(role) is copy.deepcopy(role) is role


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGES: dict[str, tuple[Callable[[Files], object], type[Exception]]] = {
    "half a chain": (lambda files: half(files.chain), ValueError),
    "half a key": (lambda files: half(files.key), ValueError),
    "an empty chain": (lambda files: files.chain.write_bytes(b""), ValueError),
    "no certificate": (lambda files: files.chain.write_bytes(b"hello"), ValueError),
    "another key": (
        lambda files: files.key.write_bytes(issue(files.authority, "localhost")._private_key),
        ValueError,
    ),
    "no chain": (lambda files: files.chain.unlink(), FileNotFoundError),
    "no key": (lambda files: files.key.unlink(), FileNotFoundError),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_after_a_failed_reload_the_old_certificate_stays_in_use(
    damage: str, files: Files
) -> None:
    role = files.role()
    destroy, error = DAMAGES[damage]
    async with serving(echo, tls=role) as s:
        old = await certificate_of(s, files)
        destroy(files)
        with pytest.raises(error):
            role.reload()
        assert await certificate_of(s, files) == old
        new = files.renew()
        assert role.reload()
        assert await certificate_of(s, files) == new


@pytest.mark.parametrize("damage", ["half", "missing"])
def test_a_failed_reload_of_client_ca_changes_nothing(
    damage: str, files: Files, tmp_path: Path, authority: Authority
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.ca)
    role = files.role(client_ca=ca)
    contexts = role._built.contexts
    files.renew()
    half(ca) if damage == "half" else ca.unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        role.reload()
    assert role._built.contexts is contexts


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_after_a_stricter_client_ca_no_old_session_is_resumed(
    version: ssl.TLSVersion,
    files: Files,
    tmp_path: Path,
    authority: Authority,
    other_authority: Authority,
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.ca)
    role = files.role(client_ca=ca, require_client_certificate=True)
    context = ssl.create_default_context(cadata=authority.ca.decode())
    context.minimum_version = context.maximum_version = version
    authority.client("me@example.org").load_into(context)
    session = None

    async def visit(server: trisock.Server, session: ssl.SSLSession | None) -> ssl.SSLSession:
        def talk() -> ssl.SSLSession:
            with context.wrap_socket(
                socket.create_connection(("127.0.0.1", server.port)),
                server_hostname="localhost",
                session=session,
            ) as sock:
                sock.sendall(b"hello")
                assert sock.recv(5) == b"hello"
                reused.append(sock.session_reused)
                assert sock.session is not None
                return sock.session

        return await trio.to_thread.run_sync(talk)

    reused: list[bool | None] = []
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, host="127.0.0.1", tls=role)
        session = await visit(server, session)
        session = await visit(server, session)
        assert reused == [False, True]
        ca.write_bytes(other_authority.ca)
        assert role.reload()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await visit(server, session)
        server.stop()


def in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def by_rename(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


numbers = itertools.count()


def by_symlink(path: Path, data: bytes) -> None:
    """Replace a symbolic link, as certbot does in ``live``."""
    archived = path.with_name(f"{path.stem}{next(numbers)}.pem")
    archived.write_bytes(data)
    link = path.with_suffix(".link")
    link.symlink_to(archived)
    link.replace(path)


@pytest.mark.parametrize("write", [in_place, by_rename, by_symlink])
async def test_a_writer_beside_reloads_never_makes_a_handshake_fail(
    write: Callable[[Path, bytes], None], files: Files, authority: Authority
) -> None:
    """The files are replaced one by one, while reloads and handshakes run all the time."""
    role = files.role()
    seen: set[bytes] = set()
    reloaded = failed = 0
    async with serving(echo, tls=role) as s:
        for _ in range(20):
            certificate = issue(authority, "localhost")
            for path, data in (
                (files.chain, certificate._chain),
                (files.key, certificate._private_key),
            ):
                write(path, data)
                try:
                    reloaded += role.reload()
                except ValueError:
                    failed += 1
                seen.add(await certificate_of(s, files))
    assert reloaded == failed == 20
    assert len(seen) == 21
    assert s.server.stats().failed_handshakes == 0


async def test_a_reload_works_in_another_thread(files: Files) -> None:
    role = files.role()
    async with serving(echo, tls=role) as s:
        new = files.renew()
        assert await trio.to_thread.run_sync(role.reload)
        assert await certificate_of(s, files) == new


def test_files_are_found_again_after_a_chdir(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    role = ServerTLS(Certificate.from_files("chain.pem", "key.pem"))
    monkeypatch.chdir("/")
    files.renew()
    assert role.reload()


def test_a_relative_client_ca_is_found_again_after_a_chdir(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca.pem").write_bytes(files.authority.ca)
    monkeypatch.chdir(tmp_path)
    role = files.role(client_ca=Path("ca.pem"))
    monkeypatch.chdir("/")
    assert not role.reload()


def test_a_slow_reload_does_not_undo_a_later_one(
    files: Files, tmp_path: Path, other_authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one reload still reads, a second reload begins and installs newer files."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(files.authority.ca)
    role = files.role(client_ca=ca, require_client_certificate=True)
    reread = Certificate.reread

    def slowly(certificate: Certificate) -> Certificate:
        monkeypatch.setattr(Certificate, "reread", reread)
        ca.write_bytes(other_authority.ca)
        assert role.reload()
        return reread(certificate)

    monkeypatch.setattr(Certificate, "reread", slowly)
    files.renew()
    assert not role.reload()
    newest = role._built.contexts
    assert not role.reload()
    assert role._built.contexts is newest


def test_one_file_with_chain_and_key_is_reloaded(files: Files, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(files.chain.read_bytes() + files.key.read_bytes())
    role = ServerTLS(Certificate.from_files(both))
    files.renew()
    both.write_bytes(files.chain.read_bytes() + files.key.read_bytes())
    assert role.reload()


@pytest.mark.parametrize("name", ["localhost", "*.example.org"])
def test_not_after_is_the_end_of_the_validity(name: str, authority: Authority) -> None:
    end = datetime.datetime(2031, 5, 6, 7, 8, 9, tzinfo=datetime.timezone.utc)
    certificate = issue(authority, name, not_after=end.replace(tzinfo=None))
    assert certificate.not_after == end
    assert certificate.not_after.utcoffset() == datetime.timedelta(0)
    expired = authority.expired(name).not_after
    assert expired < datetime.datetime.now(datetime.timezone.utc)


async def test_ca_can_be_a_path(tmp_path: Path, authority: Authority) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.ca)
    role = ClientTLS("localhost", ca=path)
    assert role == ClientTLS("localhost", ca=authority.ca)
    client, server = await socket_pair()
    async with closing(client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.starttls, authority.server_tls("localhost"))
        await client.starttls(role)


def test_a_path_as_text_is_refused(tmp_path: Path, authority: Authority, files: Files) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.ca)
    with pytest.raises(ValueError, match="ca is not PEM"):
        ClientTLS("localhost", ca=str(path))
    with pytest.raises(ValueError, match="client_ca is not PEM"):
        files.role(client_ca=str(path))
    with pytest.raises(FileNotFoundError):
        ClientTLS("localhost", ca=tmp_path / "none.pem")


def test_roles_with_the_same_path_are_equal(tmp_path: Path, files: Files) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(files.authority.ca)
    assert files.role(client_ca=ca) == files.role(client_ca=ca)
