"""Our database clients with two real servers, OpenLDAP and PostgreSQL (see real_databases.py)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import secrets
import ssl
from collections.abc import AsyncIterator

import pytest

import trisock
from helpers.authority import issue
from helpers.ldap_client import (
    ADMIN,
    CONFIDENTIALITY_REQUIRED,
    ENUMERATED,
    INTEGER,
    SASL_EXTERNAL,
    SEQUENCE,
    SUCCESS,
    ber,
    ber_elements,
    bind,
    ldap,
    ldap_login,
    ldap_receive,
    ldap_send,
    ldap_whoami,
    octet_string,
)
from helpers.postgres_client import (
    message,
    pg_expect,
    pg_logged_in,
    pg_login,
    pg_query,
    pg_receive,
    pg_startup,
)
from helpers.real_servers import PASSWORD, RealServer
from helpers.tls_clients import RefusedError, both_versions, cancelled_often, for_version
from trisock import ClientTLS, Socket, StartTLSError
from trisock.testing import Authority

pytestmark = pytest.mark.interop

# ---- OpenLDAP ----


@contextlib.asynccontextmanager
async def ldap_client(slapd: RealServer, tls: ClientTLS | ssl.SSLContext) -> AsyncIterator[Socket]:
    async with await trisock.connect(
        "127.0.0.1", slapd.ports["ldap"], tls=tls, starttls="ldap"
    ) as sock:
        yield sock


async def test_slapd_refuses_a_password_in_plain_text(
    slapd: RealServer, authority: Authority
) -> None:
    async with await trisock.connect("127.0.0.1", slapd.ports["ldap"]) as sock:
        code, _ = await ldap(sock, bind(ADMIN, PASSWORD.encode()))
        assert code == CONFIDENTIALITY_REQUIRED
        await trisock.starttls.upgrade(sock, "ldap", ClientTLS(ca=authority.ca))
        await ldap_login(sock)
        assert await ldap_whoami(sock) == b"dn:" + ADMIN


async def test_slapd_stores_and_returns_a_large_value(
    slapd: RealServer, authority: Authority
) -> None:
    def attribute(name: bytes, value: bytes) -> bytes:
        return ber(SEQUENCE, octet_string(name), ber(0x31, octet_string(value)))

    large = secrets.token_hex(500_000).encode()
    async with ldap_client(slapd, ClientTLS(ca=authority.ca)) as sock:
        await ldap_login(sock)
        attributes = ber(
            SEQUENCE,
            attribute(b"objectClass", b"organization"),
            attribute(b"o", b"example"),
            attribute(b"description", large),
        )
        add = ber(0x68, octet_string(b"o=example"), attributes)
        code, answer = await ldap(sock, add)
        assert code == SUCCESS, answer
        zero = ber(INTEGER, b"\0")
        whole = [ber(ENUMERATED, b"\0"), ber(ENUMERATED, b"\0"), zero, zero, ber(0x01, b"\0")]
        await ldap_send(
            sock,
            ber(
                0x63,
                octet_string(b"o=example"),
                *whole,
                ber(0x87, b"objectClass"),
                ber(SEQUENCE, octet_string(b"description")),
            ),
        )
        tag, entry = await ldap_receive(sock)
        assert tag == 0x64
        (_, name), (_, attributes) = ber_elements(entry)
        ((_, only),) = ber_elements(attributes)
        (_, kind), (_, values) = ber_elements(only)
        assert (name, kind) == (b"o=example", b"description")
        assert list(ber_elements(values)) == [(0x04, large)]
        tag, done = await ldap_receive(sock)
        assert (tag, next(ber_elements(done))) == (0x65, (ENUMERATED, b"\0"))
        await ldap_send(sock, ber(0x42))  # unbind
        assert await sock.recv() == b""


async def test_slapd_identifies_a_client_by_its_certificate(
    slapd: RealServer, authority: Authority
) -> None:
    certified = issue(authority, "client.example.org", common_name="certified")
    tls = ClientTLS(ca=authority.ca, certificate=certified)
    async with ldap_client(slapd, tls) as sock:
        code, _ = await ldap(sock, SASL_EXTERNAL)
        assert code == SUCCESS
        assert (await ldap_whoami(sock)).startswith(b"dn:cn=certified,")


@both_versions
async def test_slapd_answers_stoptls_and_closes_the_connection(
    version: str, slapd: RealServer, authority: Authority
) -> None:
    """RFC 4511, section 4.14.3.2: a server may continue in plain text or close the connection."""
    async with ldap_client(slapd, for_version(version, authority)) as sock:
        await ldap_login(sock)
        await sock.stoptls()
        assert not sock.istls()
        assert await sock.recv() == b""


# ---- PostgreSQL ----


@contextlib.asynccontextmanager
async def pg_client(
    postgresql: RealServer, tls: ClientTLS | ssl.SSLContext
) -> AsyncIterator[Socket]:
    async with await trisock.connect(
        "127.0.0.1", postgresql.ports["postgres"], tls=tls, starttls="postgres"
    ) as sock:
        yield sock


@both_versions
async def test_postgresql_login_uses_tls_channel_binding(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    tls = for_version(version, authority)
    async with pg_client(postgresql, tls) as sock:
        with pytest.raises(RefusedError, match="SCRAM channel binding check failed"):
            await pg_login(sock, binding=bytes(32))
    async with pg_client(postgresql, tls) as sock:
        await pg_login(sock)
        query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await pg_query(sock, query) == [version.encode()]


async def test_postgresql_allows_plain_text_only_over_a_unix_socket(
    postgresql: RealServer, authority: Authority
) -> None:
    port = postgresql.ports["postgres"]
    async with await trisock.connect("127.0.0.1", port) as sock:
        await pg_startup(sock, b"postgres")
        with pytest.raises(RefusedError, match="no encryption"):
            await pg_receive(sock)
    path = postgresql.directory / f".s.PGSQL.{port}"
    async with await trisock.connect_unix(path) as sock:
        with pytest.raises(StartTLSError, match="does not offer"):
            await trisock.starttls.upgrade(sock, "postgres", authority.client_tls())
    async with await trisock.connect_unix(path) as sock:
        await pg_startup(sock, b"postgres")
        await pg_logged_in(sock)
        assert await pg_query(sock, "SELECT 6 * 7") == [b"42"]


@both_versions
async def test_postgresql_identifies_a_client_by_its_certificate(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """PostgreSQL compares the user's name to the certificate's common name."""
    for common_name, error in [
        (None, "requires a valid client certificate"),
        ("other", "authentication failed"),
        ("certified", None),
    ]:
        context = for_version(version, authority)
        if common_name is not None:
            certified = issue(authority, "client.example.org", common_name=common_name)
            certified.load_into(context)
        async with pg_client(postgresql, context) as sock:
            await pg_startup(sock, b"certified")
            if error is None:
                await pg_logged_in(sock)
            else:
                with pytest.raises(RefusedError, match=error):
                    await pg_receive(sock)


ROWS = 2000


@pytest.mark.parametrize("checkpoints", [None, 1, 2, 5])
async def test_cancelled_reads_of_a_large_result_lose_nothing(
    checkpoints: int | None, postgresql: RealServer, authority: Authority
) -> None:
    """The result has 6 MB. Its messages are not aligned with TLS records."""
    query = f"SELECT repeat(md5(i::text), 100) FROM generate_series(1, {ROWS}) i"
    rows = [hashlib.md5(b"%d" % i).hexdigest().encode() * 100 for i in range(1, ROWS + 1)]
    async with pg_client(postgresql, ClientTLS(ca=authority.ca)) as sock:
        await pg_login(sock)
        if checkpoints is None:
            assert await pg_query(sock, query) == rows
            return
        await sock.send(message(b"Q", query.encode(), b"\0"))
        await pg_expect(sock, b"T")
        for row in rows:
            expected = message(b"D", b"\0\1", len(row).to_bytes(4, "big"), row)
            read = functools.partial(sock.recv_exactly, len(expected))
            assert await cancelled_often(read, checkpoints) == expected
        await pg_expect(sock, b"C", b"SELECT %d" % ROWS)
        await pg_expect(sock, b"Z", b"I")


@both_versions
async def test_one_send_copies_a_table_into_postgresql(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """The send has 10,000 small buffers, 5 MB in all."""
    lines = [b"%d\t%s\n" % (i, secrets.token_hex(250).encode()) for i in range(10_000)]
    digest = hashlib.md5(b"".join(line.split()[1] for line in lines)).hexdigest()
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        await pg_login(sock)
        await pg_query(sock, "CREATE TEMPORARY TABLE copied (number int, line text)")
        await sock.send(message(b"Q", b"COPY copied FROM STDIN\0"))
        await pg_expect(sock, b"G")
        await sock.send(*(message(b"d", line) for line in lines), message(b"c"))
        await pg_expect(sock, b"C", b"COPY 10000")
        await pg_expect(sock, b"Z", b"I")
        query = "SELECT md5(string_agg(line, '' ORDER BY number)) FROM copied"
        assert await pg_query(sock, query) == [digest.encode()]
        await sock.send(message(b"X"))
        assert await sock.recv() == b""
