"""Servers of other projects, each configured and started in a directory of its own.

They listen on loopback, take nothing from the system's configuration and write nothing outside
their directory, and at the end none of their processes and none of their files is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trustme import KeyType

from helpers.authority import Authority
from trisock import Certificate

# A server that takes longer to start or to stop has failed.
_PATIENCE = 30

# Where no system looks for a port that nobody has named: below the ephemeral ones.
_PORTS = range(20_000, 30_000)

PASSWORD = "secret"  # everybody's


@dataclass(frozen=True)
class RealServer:
    """A server that is running.

    Attributes:
      ports: its TCP ports, by what is spoken there.
      directory: where its files are.
      log: what it has to say.
      process: its first process.
    """

    ports: dict[str, int]
    directory: Path
    log: Path
    process: subprocess.Popen[bytes]

    def child_called(self, word: str) -> int:
        """Return the one process of it that has a word in its command line."""
        found = []
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        (pid,) = found
        return pid


# ---- what all of them need ----


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a directory that other users can look into: servers give up root's rights.

    Its path is short: a Unix socket's may have 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="trisock-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@contextlib.contextmanager
def reserved_ports(*names: str) -> Iterator[dict[str, int]]:
    """Find free ports and keep everybody off them but a server, for as long as the context lasts.

    A port is bound without ``SO_REUSEADDR``, so it is nobody else's, and only then shared with
    those who have that option, as servers do.
    """
    with contextlib.ExitStack() as stack:
        yield {name: _reserve(stack.enter_context(socket.socket())) for name in names}


def _reserve(sock: socket.socket) -> int:
    while True:
        port = random.choice(_PORTS)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return port


def write_certificate(
    certificate: Certificate, directory: Path, stem: str, user: str | None = None
) -> None:
    """Write a certificate and its key, which only its owner can read."""
    (directory / f"{stem}.pem").write_bytes(certificate._chain)
    key = directory / f"{stem}.key"
    key.touch(mode=0o600)
    key.write_bytes(certificate._private_key)
    if user is not None and os.geteuid() == 0:
        shutil.chown(key, user)


def answers(port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def started(
    command: list[str | Path],
    *,
    ports: dict[str, int],
    directory: Path,
    announced: bytes | None = None,
    user: str | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[RealServer]:
    """Start a server, wait until it is ready, and stop all of it at the end.

    Args:
      command: starts it in the foreground.
      directory: its own. It logs to the file "log" there; what it prints goes there, too.
      announced: what it logs when it serves; by default it does when all its ports answer.
      user: whom to run it as, if it is root who starts it.
      stop: the signal that tells it to stop.
    """
    log = directory / "log"

    def ready() -> bool:
        if announced is not None:
            return announced in log.read_bytes()
        return all(map(answers, ports.values()))

    with log.open("ab") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Postfix stops its whole process group
            **_identity(user),
        )
    try:
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()}")
            time.sleep(0.01)
        yield RealServer(ports, directory, log, process)
    finally:
        _stop(process, stop)


def _identity(user: str | None) -> dict[str, Any]:
    if user is None or os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Stop a server, and make sure that nothing of it goes on."""
    others = []
    for pid in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            others.append(os.pidfd_open(pid))
    left = []
    try:
        process.send_signal(how)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            left.append(process.pid)
            process.kill()
            process.wait()
        for other in others:
            if not select.select([other], [], [], _PATIENCE)[0]:  # readable once it has ended
                left.append(other)
                signal.pidfd_send_signal(other, signal.SIGKILL)
    finally:
        for other in others:
            os.close(other)
    if left:
        raise RuntimeError(f"{len(left)} processes of {process.args!r} had to be killed")


def _descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "1234 (any name) S 1233 ...": the name may hold anything
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for parent in new for child in children.get(parent, ())} - found
        found |= new
    return found


# ---- Postfix ----

POSTFIX_MAIN = """
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mail.example.org
mydestination =
alias_maps =
alias_database =
local_recipient_maps =
local_header_rewrite_clients =
relay_domains = example.org
relay_transport = lmtp:unix:{directory}/arrived
default_transport = lmtp:unix:{directory}/arrived
lmtp_tls_security_level = none
message_size_limit = 20000000
smtpd_peername_lookup = no
smtpd_tls_security_level = may
smtpd_tls_cert_file = {directory}/server.pem
smtpd_tls_key_file = {directory}/server.key
smtpd_tls_CAfile = {directory}/ca.pem
smtpd_tls_ask_ccert = yes
smtpd_tls_received_header = yes
smtpd_tls_session_cache_database =
smtpd_relay_restrictions = permit_tls_all_clientcerts, permit_auth_destination, reject
"""

POSTFIX_MASTER = """
127.0.0.1:{smtp}  inet n - n - - smtpd
127.0.0.1:{smtps} inet n - n - - smtpd -o smtpd_tls_wrappermode=yes
127.0.0.1:{plain} inet n - n - - smtpd -o smtpd_tls_security_level=none
cleanup unix  n - n -     0 cleanup
qmgr    unix  n - n 300   1 qmgr
tlsmgr  unix  - - n 1000? 1 tlsmgr
rewrite unix  - - n -     - trivial-rewrite
bounce  unix  - - n -     0 bounce
defer   unix  - - n -     0 bounce
trace   unix  - - n -     0 bounce
error   unix  - - n -     - error
retry   unix  - - n -     - error
lmtp    unix  - - n -     - lmtp
anvil   unix  - - n -     1 anvil
proxymap unix - - n -     - proxymap
postlog unix-dgram n - n - 1 postlogd
"""


@contextlib.contextmanager
def postfix(authority: Authority) -> Iterator[RealServer]:
    """Start Postfix: SMTP with STARTTLS, wrapped in TLS, and without any.

    Mail for example.org, and that of clients who show a certificate for anybody, goes to
    the LMTP server at the Unix socket ``arrived``.
    """
    with temporary_directory() as directory, reserved_ports("smtp", "smtps", "plain") as ports:
        write_certificate(authority.issue("localhost", "127.0.0.1"), directory, "server")
        (directory / "ca.pem").write_bytes(authority.pem)
        (directory / "main.cf").write_text(POSTFIX_MAIN.format(directory=directory))
        (directory / "master.cf").write_text(POSTFIX_MASTER.format(**ports))
        (directory / "data").mkdir()
        queue = directory / "queue"
        for name in (
            *("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming"),
            *("maildrop", "pid", "private", "public", "saved", "trace"),
        ):
            (queue / name).mkdir(parents=True)
            if name not in ("pid",):
                shutil.chown(queue / name, "postfix")
        shutil.chown(directory / "data", "postfix")
        with started(
            ["/usr/lib/postfix/sbin/master", "-d", "-c", directory],
            ports=ports,
            directory=directory,
        ) as server:
            yield server


# ---- Dovecot ----

DOVECOT = """
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/log
instance_name = {directory.name}
listen = 127.0.0.1
protocols = imap pop3 lmtp
ssl = required
ssl_cert = <{directory}/server.pem
ssl_key = <{directory}/server.key
ssl_dh =
local_name imap.example.org {{
  ssl_cert = <{directory}/named.pem
  ssl_key = <{directory}/named.key
}}
mail_location = maildir:~/mail
first_valid_uid = 1
passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home={directory}/home/%u
}}
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = {imaps}
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    port = {lmtp}
  }}
  unix_listener {directory}/lmtp {{
    mode = 0666
  }}
}}
protocol lmtp {{
  postmaster_address = postmaster@example.org
  auth_username_format = %n
}}
remote 127.0.0.3 {{
  ssl = no
}}
"""


@contextlib.contextmanager
def dovecot(authority: Authority) -> Iterator[RealServer]:
    """Start Dovecot: IMAP and POP3 with STARTTLS, IMAP wrapped in TLS, and LMTP.

    ``PASSWORD`` is the one of every user there may be. Who asks for imap.example.org by SNI gets a
    certificate of that name.
    """
    with (
        temporary_directory() as directory,
        reserved_ports("imap", "imaps", "pop3", "lmtp") as ports,
    ):
        write_certificate(authority.issue("localhost", "127.0.0.1"), directory, "server")
        write_certificate(authority.issue("imap.example.org"), directory, "named")
        (directory / "home").mkdir()
        shutil.chown(directory / "home", "nobody")
        configuration = directory / "dovecot.conf"
        configuration.write_text(DOVECOT.format(directory=directory, password=PASSWORD, **ports))
        with started(
            ["dovecot", "-F", "-c", configuration],
            ports=ports,
            directory=directory,
        ) as server:
            yield server


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


# ---- ProFTPD ----

PROFTPD = """
ServerName "{directory.name}"
ServerType standalone
DefaultServer on
DefaultAddress 127.0.0.1
Port {ftp}
User nobody
Group nogroup
UseIPv6 off
UseReverseDNS off
ModulePath /usr/lib/proftpd
LoadModule mod_tls.c
PidFile {directory}/pid
ScoreboardFile {directory}/scoreboard
SystemLog {directory}/log
ControlsSocket {directory}/controls
DelayTable {directory}/delay
<Global>
  AllowOverwrite on
  AuthOrder mod_auth_file.c
  DelayEngine off
  TransferLog none
  WtmpLog off
  AuthUserFile {directory}/users
  RequireValidShell off
  TLSEngine on
  TLSLog {directory}/log
  TLSProtocol TLSv1.2 TLSv1.3
  TLSRSACertificateFile {directory}/server.pem
  TLSRSACertificateKeyFile {directory}/server.key
  TLSRequired auth+data
</Global>
TLSOptions NoSessionReuseRequired
<VirtualHost 127.0.0.1>
  Port {reuse}
</VirtualHost>
<VirtualHost 127.0.0.1>
  Port {plain}
  TLSEngine off
</VirtualHost>
"""

# PASSWORD, as crypt(3) keeps it.
PASSWORD_HASH = (
    "$6$trisock$9lQ05kj3fga.eowxwcBxruLmEUaNnkDSjXdElGLHBIoXsPYEQ"
    "dPlRINJbk4RS8xZ8FQlBYowPPH2Zkt/E2euo/"
)


@contextlib.contextmanager
def proftpd(authority: Authority) -> Iterator[RealServer]:
    """Start ProFTPD: with TLS, with TLS whose session data connections must reuse, and without.

    The users ``alice`` and ``bob`` have ``PASSWORD``, and one directory, ``home``.
    """
    with temporary_directory() as directory, reserved_ports("ftp", "reuse", "plain") as ports:
        write_certificate(
            authority.issue("localhost", "127.0.0.1", key_type=KeyType.RSA), directory, "server"
        )
        home = directory / "home"
        home.mkdir()
        shutil.chown(home, "nobody")
        users = directory / "users"
        users.touch(mode=0o600)
        nobody = pwd.getpwnam("nobody")
        rest = f"{PASSWORD_HASH}:{nobody.pw_uid}:{nobody.pw_gid}::{home}:/bin/sh"
        users.write_text(f"alice:{rest}\nbob:{rest}\n")
        configuration = directory / "proftpd.conf"
        configuration.write_text(PROFTPD.format(directory=directory, **ports))
        with started(
            ["proftpd", "-n", "-c", configuration],
            ports=ports,
            directory=directory,
        ) as server:
            yield server


# ---- vsftpd ----

VSFTPD = """
background=NO
listen=YES
listen_address=127.0.0.1
listen_port={ftp}
anonymous_enable=YES
anon_root={directory}/home
anon_upload_enable=YES
anon_umask=022
anon_world_readable_only=NO
write_enable=YES
ftp_username=daemon
nopriv_user=nobody
secure_chroot_dir={directory}/empty
seccomp_sandbox=NO
connect_from_port_20=NO
xferlog_enable=YES
syslog_enable=NO
vsftpd_log_file={directory}/log
log_ftp_protocol=YES
ssl_enable=YES
allow_anon_ssl=YES
debug_ssl=YES
ssl_ciphers=HIGH
rsa_cert_file={directory}/server.pem
rsa_private_key_file={directory}/server.key
require_ssl_reuse=YES
strict_ssl_read_eof=YES
strict_ssl_write_shutdown=YES
"""


@contextlib.contextmanager
def vsftpd(authority: Authority) -> Iterator[RealServer]:
    """Start vsftpd: data connections must reuse the TLS session, as it has it by default."""
    with temporary_directory() as directory, reserved_ports("ftp") as ports:
        write_certificate(
            authority.issue("localhost", "127.0.0.1", key_type=KeyType.RSA), directory, "server"
        )
        for name in ("home", "home/upload", "empty"):
            (directory / name).mkdir()
        shutil.chown(directory / "home/upload", "daemon")
        configuration = directory / "vsftpd.conf"
        configuration.write_text(VSFTPD.format(directory=directory, **ports))
        with started(
            ["vsftpd", configuration],
            ports=ports,
            directory=directory,
        ) as server:
            yield server
