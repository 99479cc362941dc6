"""A trisock client of OpenLDAP and PostgreSQL (real_databases.py starts them)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import secrets
import ssl
from collections.abc import AsyncIterator

import pytest

import trisock
from helpers.authority import Authority, certificate
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
    ldap_starttls,
    ldap_whoami,
    octet_string,
)
from helpers.postgres_client import (
    OK,
    message,
    pg_expect,
    pg_login,
    pg_query,
    pg_receive,
    pg_starttls,
    pg_startup,
)
from helpers.real_servers import PASSWORD, RealServer
from helpers.tls_clients import RefusedError, both_versions, cancelled_often, for_version
from trisock import ClientTLS, Socket

pytestmark = pytest.mark.interop

# ---- OpenLDAP ----


@contextlib.asynccontextmanager
async def ldap_client(slapd: RealServer, tls: ClientTLS | ssl.SSLContext) -> AsyncIterator[Socket]:
    async with await trisock.connect("127.0.0.1", slapd.ports["ldap"]) as sock:
        await ldap_starttls(sock)
        await sock.starttls(tls)
        yield sock


@pytest.mark.needs("slapd")
async def test_slapd_takes_no_password_in_the_clear(
    slapd: RealServer, authority: Authority
) -> None:
    async with await trisock.connect("127.0.0.1", slapd.ports["ldap"]) as sock:
        code, _ = await ldap(sock, bind(ADMIN, PASSWORD.encode()))
        assert code == CONFIDENTIALITY_REQUIRED
        await ldap_starttls(sock)
        await sock.starttls(ClientTLS(ca=authority.pem))
        await ldap_login(sock)
        assert await ldap_whoami(sock) == b"dn:" + ADMIN


@pytest.mark.needs("slapd")
async def test_slapd_keeps_a_large_value(slapd: RealServer, authority: Authority) -> None:
    def attribute(name: bytes, value: bytes) -> bytes:
        return ber(SEQUENCE, octet_string(name), ber(0x31, octet_string(value)))

    large = secrets.token_hex(500_000).encode()
    async with ldap_client(slapd, ClientTLS(ca=authority.pem)) as sock:
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


@pytest.mark.needs("slapd")
async def test_slapd_knows_a_client_by_its_certificate(
    slapd: RealServer, authority: Authority
) -> None:
    leaf = authority.ca.issue_cert("client.example.org", common_name="certified")
    tls = ClientTLS(ca=authority.pem, certificate=certificate(leaf))
    async with ldap_client(slapd, tls) as sock:
        code, _ = await ldap(sock, SASL_EXTERNAL)
        assert code == SUCCESS
        assert (await ldap_whoami(sock)).startswith(b"dn:cn=certified,")


@pytest.mark.needs("slapd")
@both_versions
async def test_slapd_answers_the_end_of_tls_and_goes(
    version: str, slapd: RealServer, authority: Authority
) -> None:
    """RFC 4511, section 4.14.3.2, lets a server go on in the clear, or close; slapd closes."""
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
    async with await trisock.connect("127.0.0.1", postgresql.ports["postgres"]) as sock:
        await pg_starttls(sock)
        await sock.starttls(tls)
        yield sock


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_postgresql_sees_tls(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        await pg_login(sock)
        query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await pg_query(sock, query) == [version.encode()]


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_postgresql_refuses_the_binding_to_another_connection(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """So that the log-ins of the other tests say something about the binding."""
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        with pytest.raises(RefusedError, match="SCRAM channel binding check failed"):
            await pg_login(sock, binding=bytes(32))


@pytest.mark.needs("pg_ctlcluster")
async def test_postgresql_without_tls_over_the_unix_socket_only(
    postgresql: RealServer,
) -> None:
    port = postgresql.ports["postgres"]
    async with await trisock.connect("127.0.0.1", port) as sock:
        await pg_startup(sock, b"postgres")
        with pytest.raises(RefusedError, match="no encryption"):
            await pg_receive(sock)
    path = postgresql.directory / f".s.PGSQL.{port}"
    async with await trisock.connect_unix(path) as sock:
        with pytest.raises(RefusedError, match="no TLS"):
            await pg_starttls(sock)
        await pg_startup(sock, b"postgres")
        await pg_expect(sock, b"R", OK)
        await pg_expect(sock, b"Z", b"I")
        assert await pg_query(sock, "SELECT 6 * 7") == [b"42"]


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_postgresql_knows_a_client_by_its_certificate(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """``clientcert=verify-full``: the certificate's common name is the user's."""
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        await pg_startup(sock, b"certified")
        with pytest.raises(RefusedError, match="requires a valid client certificate"):
            await pg_receive(sock)
    for name in ("other", "certified"):
        context = for_version(version, authority)
        leaf = authority.ca.issue_cert("client.example.org", common_name=name)
        certificate(leaf).load_into(context)
        async with pg_client(postgresql, context) as sock:
            await pg_startup(sock, b"certified")
            if name == "other":
                with pytest.raises(RefusedError, match="authentication failed"):
                    await pg_receive(sock)
            else:
                await pg_expect(sock, b"R", OK)
                await pg_expect(sock, b"Z", b"I")


ROWS = 2000


@pytest.mark.needs("pg_ctlcluster")
@pytest.mark.parametrize("checkpoints", [None, 1, 2, 5])
async def test_a_large_result_whose_reading_is_cancelled(
    checkpoints: int | None, postgresql: RealServer, authority: Authority
) -> None:
    """6 MB, in messages that begin and end anywhere in records."""
    query = f"SELECT repeat(md5(i::text), 100) FROM generate_series(1, {ROWS}) i"
    expected = [hashlib.md5(b"%d" % i).hexdigest().encode() * 100 for i in range(1, ROWS + 1)]
    async with pg_client(postgresql, ClientTLS(ca=authority.pem)) as sock:
        await pg_login(sock)
        if checkpoints is None:
            assert await pg_query(sock, query) == expected
            return
        await sock.send(message(b"Q", query.encode(), b"\0"))
        await pg_expect(sock, b"T")
        for row in expected:
            wanted = message(b"D", b"\0\1", len(row).to_bytes(4, "big"), row)
            read = functools.partial(sock.recv_exactly, len(wanted))
            assert await cancelled_often(read, checkpoints) == wanted
        await pg_expect(sock, b"C", b"SELECT %d" % ROWS)
        await pg_expect(sock, b"Z", b"I")


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_copying_a_table_into_postgresql(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """5 MB, as many small buffers of one send."""
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
