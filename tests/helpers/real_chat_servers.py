"""Prosody and InspIRCd."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from helpers.real_servers import RealServer, prepared, started
from trisock.testing import Authority

# ---- Prosody ----

PROSODY = """
pidfile = "{directory}/pid"
data_path = "{directory}/data"
log = {{ debug = "{directory}/log" }}
interfaces = {{ "127.0.0.1" }}
c2s_ports = {{ {xmpp} }}
s2s_ports = {{ {xmpp-server} }}
c2s_direct_tls_ports = {{ }}
s2s_direct_tls_ports = {{ }}
http_ports = {{ }}
https_ports = {{ }}
modules_enabled = {{ "saslauth", {modules} "disco", "s2s", "c2s", "dialback" }}
modules_disabled = {{ "http", "admin_shell", "s2s_auth_certs" }}
allow_unencrypted_plain_auth = {without_tls}
c2s_require_encryption = {with_tls}
s2s_require_encryption = {with_tls}
ssl = {{ certificate = "{directory}/server.pem", key = "{directory}/server.key" }}
VirtualHost "localhost"
VirtualHost "example.net"
"""


@contextlib.contextmanager
def prosody(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start Prosody, an XMPP server for clients and for servers, with or without STARTTLS."""
    with prepared(authority, "xmpp", "xmpp-server", user="prosody") as (directory, ports):
        shutil.chown(directory, "prosody")
        modules = '"tls",' if tls else ""
        configuration = directory / "prosody.cfg.lua"
        required = {"with_tls": str(tls).lower(), "without_tls": str(not tls).lower()}
        configuration.write_text(
            PROSODY.format(directory=directory, modules=modules, **required, **ports)
        )
        command: list[str | Path] = ["prosody", "-F", "--config", configuration]
        with started(command, directory, ports, user="prosody") as server:
            yield server


# ---- InspIRCd ----

INSPIRCD = """
<server name="localhost" description="test" network="Test">
<admin name="test" nick="test" email="test@example.org">
<bind address="127.0.0.1" port="{irc}" type="clients">
<connect allow="*" timeout="60" pingfreq="120" resolvehostnames="no" useident="no">
<pid file="{directory}/pid">
<log method="file" type="*" level="default" target="{directory}/inspircd.log">
<path configdir="{directory}" datadir="{directory}" logdir="{directory}">
<dns server="127.0.0.1" timeout="1">
<module name="ssl_gnutls">
<module name="sslinfo">
<sslprofile name="test" provider="gnutls" certfile="{directory}/server.pem"
 keyfile="{directory}/server.key" cafile="{directory}/ca.pem">
{modules}
"""

INSPIRCD_TLS = """
<module name="starttls">
<starttls sslprofile="test">
"""


@contextlib.contextmanager
def inspircd(authority: Authority, *, tls: bool = True) -> Iterator[RealServer]:
    """Start InspIRCd, an IRC server, with or without the command STARTTLS."""
    with prepared(authority, "irc", user="irc") as (directory, ports):
        shutil.chown(directory, "irc")
        modules = INSPIRCD_TLS if tls else ""
        configuration = directory / "inspircd.conf"
        configuration.write_text(INSPIRCD.format(directory=directory, modules=modules, **ports))
        command = ["inspircd", "--nofork", f"--config={configuration}"]
        with started(command, directory, ports, user="irc") as server:
            yield server
