"""Exim and Cyrus, which Debian does not install beside Postfix and Dovecot."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from helpers.real_servers import RealServer, prepared, started
from trisock.testing import Authority

# ---- Exim ----

EXIM = """
primary_hostname = mail.example.org
log_file_path = {directory}/%slog
pid_file_path = {directory}/pid
spool_directory = {directory}/spool
tls_advertise_hosts = {advertised}
tls_certificate = {directory}/server.pem
tls_privatekey = {directory}/server.key
host_lookup =
acl_smtp_rcpt = deny
begin routers
begin transports
"""


@contextlib.contextmanager
def exim(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start Exim, an SMTP server that accepts no mail, with or without STARTTLS."""
    with prepared(authority, "smtp", user="Debian-exim") as (directory, ports):
        (directory / "spool").mkdir()
        shutil.chown(directory / "spool", "Debian-exim")
        shutil.chown(directory, "Debian-exim")
        configuration = directory / "exim.conf"
        advertised = "*" if tls else ""
        configuration.write_text(EXIM.format(directory=directory, advertised=advertised))
        command: list[str | Path] = ["exim4", "-C", configuration, "-bdf"]
        command += ["-oX", f"127.0.0.1.{ports['smtp']}"]
        with started(command, directory, ports) as server:
            yield server


# ---- Cyrus ----

CYRUS = """
START {{
}}
SERVICES {{
  imap  cmd="imapd -C {directory}/imapd.conf" listen="127.0.0.1:{imap}"
  pop3  cmd="pop3d -C {directory}/imapd.conf" listen="127.0.0.1:{pop3}"
  sieve cmd="timsieved -C {directory}/imapd.conf" listen="127.0.0.1:{sieve}"
  lmtp  cmd="lmtpd -C {directory}/imapd.conf" listen="127.0.0.1:{lmtp}"
}}
EVENTS {{
}}
"""

IMAPD = """
configdirectory: {directory}/config
proc_path: {directory}/proc
mboxname_lockpath: {directory}/lock
defaultpartition: default
partition-default: {directory}/mail
sievedir: {directory}/sieve
allowplaintext: no
servername: mail.example.org
sasl_pwcheck_method: saslauthd
sasl_mech_list: PLAIN
syslog_prefix: trisock
"""

IMAPD_TLS = """
tls_server_cert: {directory}/server.pem
tls_server_key: {directory}/server.key
tls_client_ca_file: {directory}/ca.pem
"""


@contextlib.contextmanager
def cyrus(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start Cyrus: IMAP, POP3, ManageSieve and LMTP, with or without STARTTLS."""
    names = ("imap", "pop3", "sieve", "lmtp")
    with prepared(authority, *names, user="cyrus") as (directory, ports):
        for name in ("", "config", "config/socket", "config/db", "proc", "lock", "mail", "sieve"):
            (directory / name).mkdir(exist_ok=True)
            shutil.chown(directory / name, "cyrus")
        with_tls = IMAPD_TLS if tls else ""
        imapd = directory / "imapd.conf"
        imapd.write_text((IMAPD + with_tls).format(directory=directory))
        configuration = directory / "cyrus.conf"
        configuration.write_text(CYRUS.format(directory=directory, **ports))
        command: list[str | Path] = ["cyrmaster", "-C", imapd, "-M", configuration]
        command += ["-p", directory / "pid", "-D"]
        environment = {**os.environ, "CYRUS_VERBOSE": "1"}
        with started(command, directory, ports, user="cyrus", env=environment) as server:
            yield server
