"""OpenLDAP, PostgreSQL and MariaDB servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.real_servers import (
    PASSWORD,
    RealServer,
    _identity,
    prepared,
    started,
)
from trisock.testing import Authority

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
    """Start slapd, an LDAP server, with or without StartTLS.

    The user ``cn=admin,o=example`` has all rights. The password is ``PASSWORD``. The server refuses
    a log-in without TLS.
    """
    with prepared(authority, "ldap") as (directory, ports):
        (directory / "data").mkdir()
        configuration = directory / "slapd.conf"
        with_tls = SLAPD_TLS.format(directory=directory) if tls else ""
        configuration.write_text(SLAPD.format(directory=directory, password=PASSWORD, tls=with_tls))
        command: list[str | Path] = ["slapd", "-d", "stats", "-f", configuration]
        command += ["-h", f"ldap://127.0.0.1:{ports['ldap']}/"]
        with started(command, directory, ports) as server:
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

# A log-in without TLS is possible only on the Unix socket.
POSTGRES_HBA = """
local   all all                    trust
hostssl all certified 127.0.0.0/8  cert
hostssl all all       127.0.0.0/8  scram-sha-256
"""


@contextlib.contextmanager
def postgresql(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start PostgreSQL on a TCP port, with or without TLS, and on a Unix socket without TLS.

    The user ``postgres`` has the password ``PASSWORD``. The user ``certified`` needs a certificate
    with the name "certified".
    """
    newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    with prepared(authority, "postgres", user="postgres") as (directory, ports):
        if os.geteuid() == 0:
            shutil.chown(directory, "postgres")
        data = directory / "data"
        password = directory / "password"
        password.write_text(PASSWORD)
        command: list[str | Path] = [newest / "initdb", "--no-sync", "--no-locale", "-D", data]
        command += ["--encoding=UTF8", "--username=postgres", f"--pwfile={password}"]
        subprocess.run(
            command,
            check=True,
            cwd=directory,
            capture_output=True,
            **_identity("postgres"),
        )
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
            directory,
            ports,
            announced=b"ready to accept connections",
            user="postgres",
            stop=signal.SIGINT,  # SIGTERM would wait until the clients disconnect
        ) as server:
            yield server


# ---- MariaDB ----

MARIADB = """
[mariadbd]
basedir = /usr
bind_address = 127.0.0.1
datadir = {directory}/data
init_file = {directory}/users.sql
max_connect_errors = 1000000
pid_file = {directory}/pid
port = {mysql}
skip_name_resolve
socket = {directory}/socket
{tls}
"""

MARIADB_USERS = """
CREATE USER alice@'127.0.0.%' IDENTIFIED BY '{password}' REQUIRE SSL;
"""

MARIADB_TLS = """
ssl_ca = {directory}/ca.pem
ssl_cert = {directory}/server.pem
ssl_key = {directory}/server.key
"""


@contextlib.contextmanager
def mariadb(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start MariaDB, which speaks the MySQL protocol, with or without TLS.

    The user ``alice`` has the password ``PASSWORD``, and needs TLS to log in.
    """
    with prepared(authority, "mysql", user="mysql") as (directory, ports):
        if os.geteuid() == 0:
            shutil.chown(directory, "mysql")
        configuration = directory / "my.cnf"
        with_tls = MARIADB_TLS.format(directory=directory) if tls else "skip_ssl"
        configuration.write_text(MARIADB.format(directory=directory, tls=with_tls, **ports))
        users = directory / "users.sql"
        users.write_text(MARIADB_USERS.format(password=PASSWORD))
        subprocess.run(
            ["mariadb-install-db", f"--defaults-file={configuration}", "--skip-test-db"],
            check=True,
            cwd=directory,
            capture_output=True,
            **_identity("mysql"),
        )
        command = ["mariadbd", f"--defaults-file={configuration}"]
        with started(command, directory, ports, user="mysql") as server:
            yield server
