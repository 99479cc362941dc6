"""ProFTPD and vsftpd."""

from __future__ import annotations

import contextlib
import pwd
import shutil
from collections.abc import Iterator

from helpers.real_servers import (
    RealServer,
    prepared,
    started,
)
from trisock.testing import Authority

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

# The hash of PASSWORD (crypt(3)).
PASSWORD_HASH = (
    "$6$trisock$9lQ05kj3fga.eowxwcBxruLmEUaNnkDSjXdElGLHBIoXsPYEQ"
    "dPlRINJbk4RS8xZ8FQlBYowPPH2Zkt/E2euo/"
)


@contextlib.contextmanager
def proftpd(authority: Authority) -> Iterator[RealServer]:
    """Start ProFTPD on three ports: ``ftp`` and ``reuse`` with TLS, ``plain`` without TLS.

    On the port ``reuse``, data connections must reuse the TLS session. The users ``alice`` and
    ``bob`` have the password ``PASSWORD``, and share the directory ``home``.
    """
    names = ("ftp", "reuse", "plain")
    with prepared(authority, *names, rsa=True) as (directory, ports):
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
        with started(["proftpd", "-n", "-c", configuration], directory, ports) as server:
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
    """Start vsftpd. Data connections must reuse the TLS session (vsftpd's default)."""
    with prepared(authority, "ftp", rsa=True) as (directory, ports):
        for name in ("home", "home/upload", "empty"):
            (directory / name).mkdir()
        shutil.chown(directory / "home/upload", "daemon")
        configuration = directory / "vsftpd.conf"
        configuration.write_text(VSFTPD.format(directory=directory, **ports))
        with started(["vsftpd", configuration], directory, ports) as server:
            yield server
