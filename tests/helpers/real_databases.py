"""OpenLDAP and PostgreSQL, as real_servers.py starts them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.authority import Authority
from helpers.real_servers import (
    PASSWORD,
    RealServer,
    _identity,
    reserved_ports,
    started,
    temporary_directory,
    write_certificate,
)

# ---- OpenLDAP ----

SLAPD = """
include /etc/ldap/schema/core.schema
pidfile {directory}/pid
{tls}
security simple_bind=64
database ldif
directory {directory}/data
suffix o=example
rootdn cn=admin,o=example
rootpw {password}
"""

SLAPD_TLS = """
TLSCACertificateFile {directory}/ca.pem
TLSCertificateFile {directory}/server.pem
TLSCertificateKeyFile {directory}/server.key
TLSVerifyClient try
"""


@contextlib.contextmanager
def slapd(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start slapd: LDAP with StartTLS, or without.

    ``cn=admin,o=example`` may do everything, with ``PASSWORD``, and no password is taken
    in the clear.
    """
    with temporary_directory() as directory, reserved_ports("ldap") as ports:
        write_certificate(authority.issue("localhost", "127.0.0.1"), directory, "server")
        (directory / "ca.pem").write_bytes(authority.pem)
        (directory / "data").mkdir()
        configuration = directory / "slapd.conf"
        with_tls = SLAPD_TLS.format(directory=directory) if tls else ""
        configuration.write_text(SLAPD.format(directory=directory, password=PASSWORD, tls=with_tls))
        with started(
            [
                "slapd",
                "-d",
                "stats",
                "-f",
                configuration,
                "-h",
                f"ldap://127.0.0.1:{ports['ldap']}/",
            ],
            ports=ports,
            directory=directory,
        ) as server:
            yield server


# ---- PostgreSQL ----

POSTGRES = """
fsync = off
listen_addresses = '127.0.0.1'
log_connections = on
password_encryption = 'scram-sha-256'
port = {postgres}
ssl_ca_file = '{directory}/ca.pem'
ssl_cert_file = '{directory}/server.pem'
ssl_key_file = '{directory}/server.key'
unix_socket_directories = '{directory}'
"""

# In the clear nobody gets in, but over the Unix socket.
POSTGRES_HBA = """
local   all all                    trust
hostssl all certified 127.0.0.0/8  cert
hostssl all all       127.0.0.0/8  scram-sha-256
"""


@contextlib.contextmanager
def postgresql(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start PostgreSQL: with TLS or without, and in the clear over a Unix socket.

    The user ``postgres`` has ``PASSWORD``. The user ``certified`` needs a certificate of that name.
    """
    newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    with temporary_directory() as directory, reserved_ports("postgres") as ports:
        if os.geteuid() == 0:
            shutil.chown(directory, "postgres")
        data = directory / "data"
        password = directory / "password"
        password.write_text(PASSWORD)
        command: list[str | Path] = [
            newest / "initdb",
            "--no-sync",
            "--no-locale",
            "--encoding=UTF8",
            "-D",
            data,
        ]
        subprocess.run(
            [*command, "--username=postgres", f"--pwfile={password}"],
            check=True,
            cwd=directory,
            capture_output=True,
            **_identity("postgres"),
        )
        write_certificate(
            authority.issue("localhost", "127.0.0.1"), directory, "server", "postgres"
        )
        (directory / "ca.pem").write_bytes(authority.pem)
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write(POSTGRES.format(directory=directory, **ports))
            configuration.write(f"ssl = {tls}\n")
        (data / "pg_hba.conf").write_text(POSTGRES_HBA)
        subprocess.run(
            [newest / "postgres", "--single", "-D", data, "postgres"],
            check=True,
            input=b"CREATE ROLE certified LOGIN",
            capture_output=True,
            **_identity("postgres"),
        )
        with started(
            [newest / "postgres", "-D", data],
            ports=ports,
            directory=directory,
            announced=b"ready to accept connections",
            user="postgres",
            stop=signal.SIGINT,  # SIGTERM would wait for the clients
        ) as server:
            yield server
