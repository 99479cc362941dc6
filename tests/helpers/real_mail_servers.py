"""Postfix and Dovecot."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from helpers.real_servers import (
    PASSWORD,
    RealServer,
    prepared,
    started,
    write_certificate,
)
from trisock.testing import Authority

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
    """Start Postfix on three ports: with STARTTLS, with implicit TLS (RFC 8314), and without TLS.

    Postfix relays mail to the Unix socket ``arrived`` over LMTP. It accepts mail for example.org
    from all clients, and mail for any domain from clients with a certificate.
    """
    with prepared(authority, "smtp", "smtps", "plain") as (directory, ports):
        main = directory / "main.cf"
        main.write_text(POSTFIX_MAIN.format(directory=directory))
        os.utime(main, (0, 0))  # make main.cf look old: Postfix waits until it is 2 s old
        (directory / "master.cf").write_text(POSTFIX_MASTER.format(**ports))
        (directory / "data").mkdir()
        queue = directory / "queue"
        for name in (
            *("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming"),
            *("maildrop", "pid", "private", "public", "saved", "trace"),
        ):
            (queue / name).mkdir(parents=True)
            if name != "pid":
                shutil.chown(queue / name, "postfix")
        shutil.chown(directory / "data", "postfix")
        command: list[str | Path] = ["/usr/lib/postfix/sbin/master", "-d", "-c", directory]
        with started(command, directory, ports) as server:
            yield server


# ---- Dovecot ----

DOVECOT = """
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/log
instance_name = {directory.name}
listen = 127.0.0.1
protocols = imap pop3 lmtp sieve
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
service managesieve-login {{
  inet_listener sieve {{
    port = {sieve}
  }}
  inet_listener sieve_deprecated {{
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
    """Start Dovecot: IMAP, POP3, LMTP and ManageSieve with STARTTLS, IMAP with implicit TLS.

    Every user name is valid, with the password ``PASSWORD``. If SNI is imap.example.org, the server
    sends the certificate for that name.
    """
    with prepared(authority, "imap", "imaps", "pop3", "sieve", "lmtp") as (directory, ports):
        write_certificate(authority.certificate("imap.example.org"), directory, "named")
        (directory / "home").mkdir()
        shutil.chown(directory / "home", "nobody")
        configuration = directory / "dovecot.conf"
        configuration.write_text(DOVECOT.format(directory=directory, password=PASSWORD, **ports))
        with started(["dovecot", "-F", "-c", configuration], directory, ports) as server:
            yield server
