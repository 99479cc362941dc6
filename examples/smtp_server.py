"""An SMTP server that offers STARTTLS and prints a line for each message it receives.

Run it with a certificate that it creates, and talk to it:

    python examples/smtp_server.py --port 2525 --write-ca ca.pem
    openssl s_client -starttls smtp -crlf -nocommands -CAfile ca.pem -connect localhost:2525
    curl --ssl-reqd --cacert ca.pem smtp://localhost:2525 \
        --mail-from me@example.org --mail-rcpt you@example.org --upload-file mail.txt

Or use your own certificate: `--cert chain.pem --key key.pem`. On SIGHUP, the
server reads these files again.

An attacker may inject commands after STARTTLS (CVE-2011-0411). The injected commands are never
executed: `starttls` treats every unread byte as part of the handshake, which then fails.
"""

from __future__ import annotations

import argparse
import functools
import re
import socket
import sys
from pathlib import Path

import trio

import trisock
from trisock.testing import Authority

MAX_COMMAND = 512  # bytes in a command, including CRLF (RFC 5321, section 4.5.3.1.4)
MAX_MESSAGE = 4 * 1024 * 1024  # bytes; a connection holds at most one message
MAX_RECIPIENTS = 100  # RFC 5321, section 4.5.3.1.8
TIMEOUT = 600  # seconds for one command, including a message (RFC 5321, section 4.5.3.2)
IDLE_TIMEOUT = 300  # seconds without a byte of the next command (RFC 5321, section 4.5.3.2.7)

CRLF = b"\r\n"
# Only this ends a message. If two servers disagree about where a message ends, an attacker can
# smuggle messages (CVE-2023-51764).
END_OF_MESSAGE = b"\r\n.\r\n"

# The syntax of RFC 5321, section 4.1.1, with only the parameters that EHLO offers.
FROM = re.compile(
    r"FROM:<([!-;=?-~]*)>(?: SIZE=([0-9]{1,18})| BODY=(?:7BIT|8BITMIME))*", re.IGNORECASE
)
TO = re.compile(r"TO:<([!-;=?-~]+)>", re.IGNORECASE)


class Session:
    """One connection.

    Invariant: ``sender`` is None until the client has greeted, and ``recipients`` is empty until
    there is a sender.
    """

    def __init__(self, sock: trisock.Socket, tls: trisock.ServerTLS) -> None:
        self.sock = sock
        self.tls = tls
        self.host = socket.gethostname()
        self.reset()

    def reset(self) -> None:
        """Discard everything learned from the client (RFC 3207, section 4.2)."""
        self.greeted = False
        self.reset_message()

    def reset_message(self) -> None:
        self.sender: str | None = None
        self.recipients: list[str] = []

    async def run(self) -> None:
        await self.reply(220, f"{self.host} ESMTP")
        await self.serve()

    async def serve(self) -> None:
        """Serve commands, after the client has received its greeting."""
        more = True
        try:
            while more:
                more = False
                with trio.move_on_after(TIMEOUT):
                    more = await self.serve_one_command()
        except (trisock.ServerClosing, trisock.IdleTimeoutError):
            await self.reply(421, f"{self.host} closing the connection")

    async def reply(self, code: int, *lines: str) -> None:
        *first, last = lines
        text = "".join(f"{code}-{line}\r\n" for line in first) + f"{code} {last}\r\n"
        await self.sock.send(text.encode())

    async def serve_one_command(self) -> bool:
        """Read and execute one command. Return whether another command may follow."""
        try:
            try:
                # When the server stops, it need not wait for a client that has sent nothing.
                with self.sock.idle(IDLE_TIMEOUT):
                    line = await self.sock.recv_line(delimiter=CRLF, max_bytes=MAX_COMMAND)
            except trisock.LimitExceededError:
                await self.sock.skip_until(CRLF)
                await self.reply(500, "line too long")
                return True
            verb, _, argument = line.decode("latin-1").partition(" ")
            return await self.do(verb.upper(), argument.strip(" "))
        except trisock.IncompleteReadError:  # the client left without QUIT
            return False

    async def do(self, verb: str, argument: str) -> bool:
        match verb:
            case "EHLO" | "HELO" if not argument:
                await self.reply(501, f"{verb} needs a name")
            case "EHLO":
                self.greet()
                offers = ["PIPELINING", "8BITMIME", f"SIZE {MAX_MESSAGE}"]
                if not self.sock.istls():
                    offers.append("STARTTLS")
                await self.reply(250, self.host, *offers)
            case "HELO":
                self.greet()
                await self.reply(250, self.host)
            case "STARTTLS" | "DATA" | "RSET" | "QUIT" if argument:
                await self.reply(501, f"{verb} takes no parameter")
            case "STARTTLS" if self.sock.istls():
                await self.reply(503, "TLS already active")
            case "STARTTLS":
                await self.reply(220, "go ahead")
                await self.sock.starttls(self.tls)
                self.reset()
            case "MAIL":
                await self.mail(argument)
            case "RCPT":
                await self.rcpt(argument)
            case "DATA":
                await self.data()
            case "RSET":
                self.reset_message()
                await self.reply(250, "ok")
            case "NOOP":
                await self.reply(250, "ok")
            case "VRFY":
                await self.reply(252, "cannot verify the user, but will accept the message")
            case "QUIT":
                await self.reply(221, "goodbye")
                return False
            case _:
                await self.reply(500, "unknown command")
        return True

    def greet(self) -> None:
        self.greeted = True
        self.reset_message()

    async def mail(self, argument: str) -> None:
        path = FROM.fullmatch(argument)
        if not self.greeted or self.sender is not None:
            await self.reply(503, "EHLO first" if not self.greeted else "one message at a time")
        elif path is None:
            await self.reply(501, "MAIL FROM:<address>")
        elif int(path[2] or 0) > MAX_MESSAGE:
            await self.reply(552, "message too large")
        else:
            self.sender = path[1]
            await self.reply(250, "ok")

    async def rcpt(self, argument: str) -> None:
        path = TO.fullmatch(argument)
        if self.sender is None:
            await self.reply(503, "MAIL first")
        elif path is None:
            await self.reply(501, "RCPT TO:<address>")
        elif len(self.recipients) >= MAX_RECIPIENTS:
            await self.reply(452, "too many recipients")
        else:
            self.recipients.append(path[1])
            await self.reply(250, "ok")

    async def data(self) -> None:
        if not self.recipients:
            await self.reply(503, "RCPT first")
            return
        await self.reply(354, "end with a dot on a line of its own")
        # Put back the CRLF of the DATA command: if the message is empty, END_OF_MESSAGE begins with
        # this CRLF.
        self.sock.unrecv(CRLF)
        try:
            received = await self.sock.recv_until(END_OF_MESSAGE, max_bytes=MAX_MESSAGE)
        except trisock.LimitExceededError:
            await self.sock.skip_until(END_OF_MESSAGE)
            await self.reply(552, "message too large")
        else:
            # Undo dot-stuffing (RFC 5321, section 4.5.2).
            text = received.removesuffix(b".\r\n").replace(b"\r\n.", b"\r\n").removeprefix(CRLF)
            self.deliver(text)
            await self.reply(250, "ok")
        self.reset_message()

    def deliver(self, text: bytes) -> None:
        """Deliver a message. Replace this with your own code."""
        to = ", ".join(f"<{recipient}>" for recipient in self.recipients)
        how = self.sock.tls.version if self.sock.tls else "unencrypted"
        print(f"mail from <{self.sender}> to {to}: {len(text)} bytes, {how}", flush=True)


async def handle(tls: trisock.ServerTLS, sock: trisock.Socket) -> None:
    await Session(sock, tls).run()


async def serve(host: str, port: int, tls: trisock.ServerTLS) -> None:
    handler = functools.partial(handle, tls)
    async with trisock.open_service(grace=5, reload=[tls]) as service:
        server = await service.bind(port, handler, host=host, max_connections=100)
        print(f"listening on port {server.port}", flush=True)


def create_test_certificate(ca_file: str | None) -> trisock.Certificate:
    """Create a certificate for localhost. If ``ca_file`` is given, write the CA to this file."""
    try:
        authority = Authority()
    except ImportError:
        sys.exit("no certificate: give --cert and --key, or install trustme to create one")
    if ca_file is not None:
        Path(ca_file).write_bytes(authority.ca)
    return authority.certificate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=2525, help="0 for any free port")
    parser.add_argument("--cert", metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="the private key (PEM), if the --cert file does not contain it",
    )
    parser.add_argument(
        "--write-ca", metavar="FILE", help="write the test certificate's CA to this file"
    )
    args = parser.parse_args()
    if args.cert:
        certificate = trisock.Certificate.from_files(args.cert, args.key)
    else:
        certificate = create_test_certificate(args.write_ca)
    trio.run(serve, args.host, args.port, trisock.ServerTLS(certificate))


if __name__ == "__main__":
    main()
