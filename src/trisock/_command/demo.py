"""The demo: a conversation over loopback that starts in plain text and upgrades to TLS."""

from __future__ import annotations

import trio
from rich.console import Console
from rich.text import Text

from .. import Certificate, ClientTLS, Server, Socket, bind, connect

_NAME = "mail.example.org"

_STYLES = {"server": "cyan", "client": "magenta"}


class MissingExtraError(Exception):
    """A package is not installed."""


async def demo(console: Console) -> None:
    """Show the conversation. Raises ``MissingExtraError`` if trustme is not installed."""
    try:
        import trustme
    except ImportError:
        raise MissingExtraError(
            "the demo makes certificates with trustme: pip install 'trisock[demo]'"
        ) from None
    authority = trustme.CA()
    issued = authority.issue_cert(_NAME)
    certificate = Certificate(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
    stage = _Stage()
    async with trio.open_nursery() as nursery:
        server = await bind(
            nursery, 0, lambda sock: _serve(sock, certificate, stage), host="127.0.0.1"
        )
        stage.remark(f"a server listens on {server.addresses[0]}")
        await _talk(server, authority.cert_pem.bytes(), stage)
        server.stop()
        await server.wait_closed()
        accepted = server.stats().accepted
        stage.remark(f"the server has served {accepted} connection and is closed")
    for text in stage.texts:  # outside the nursery, which would wrap an error of the output
        console.print(text, soft_wrap=True)


class _Stage:
    """Records who says what, and whether it is encrypted.

    Attributes:
      texts: the lines to show at the end. Until then, no noticeable time passes.
    """

    def __init__(self) -> None:
        self.texts: list[Text] = []

    def remark(self, text: str) -> None:
        self.texts.append(Text(f"        -- {text}", "dim"))

    async def say(self, sock: Socket, who: str, words: str) -> None:
        text = Text(f"{who}: ", _STYLES[who])
        text.append(f"{words:<24} ", "default")
        if sock.tls:
            text.append(f"({sock.tls.cipher})", "green")
        else:
            text.append("(plain text)", "yellow")
        self.texts.append(text)
        await sock.send(words.encode(), b"\r\n")


async def _serve(sock: Socket, certificate: Certificate, stage: _Stage) -> None:
    await stage.say(sock, "server", "220 ready")
    while (command := await sock.recv_line(delimiter=b"\r\n")) != b"QUIT":
        if command == b"STARTTLS":
            await stage.say(sock, "server", "220 go ahead")
            await sock.starttls([certificate])
        else:
            await stage.say(sock, "server", f"250 you said {command.decode()!r}")
    await stage.say(sock, "server", "221 bye")


async def _talk(server: Server, ca: bytes, stage: _Stage) -> None:
    async with await connect("127.0.0.1", server.port) as sock:
        await sock.recv_line()
        for command in ("HELLO", "STARTTLS", "HELLO", "QUIT"):
            await stage.say(sock, "client", command)
            await sock.recv_line()
            if command == "STARTTLS":
                tls = await sock.starttls(ClientTLS(_NAME, ca=ca))
                stage.remark(f"both sides upgrade to {tls.version}, {tls.cipher};")
                stage.remark(f"the client has verified {tls.server_hostname}")
