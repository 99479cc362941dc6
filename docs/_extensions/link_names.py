"""A Sphinx extension: names in code font link to the reference.

The pages and docstrings say ``Socket.recv_line`` or ``await sock.recv_line()``. This is readable
on GitHub and in a terminal. Here, each such literal becomes a link if the reference has the name.
Trio's names link to Trio's reference.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

NAME = re.compile(r"(?:await |async for \w+ in |async with )*(?:await )?([A-Za-z_][\w.]*)(\(.*\))?")
MAN_PAGE = re.compile(r"\w+\(\d\)")  # such as close(2)
# Without a dot before it, such a name is more often that of a parameter.
ATTRIBUTES = ("attribute", "property")


@dataclasses.dataclass(frozen=True)
class Page:
    """How the names on a page are meant.

    Attributes:
      scopes: the classes and modules in which a name is looked up, in this order.
      variables: the class that a variable of this name holds in the page's snippets.
    """

    scopes: tuple[str, ...] = ("trisock.Socket", "trisock", "trisock.testing")
    variables: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "sock": "trisock.Socket",
            "client": "trisock.Socket",
            "listener": "trisock.Listener",
            "server": "trisock.Server",
            "service": "trisock.Service",
            "udp": "trisock.UDPSocket",
        }
    )


DATAGRAMS = Page(scopes=("trisock.UDPSocket", "trisock"))
STARTTLS = Page(scopes=("trisock.starttls", "trisock.Socket", "trisock"))
PLUTO = Page(
    scopes=("trisock.pluto.socket", "trisock.pluto"),
    variables={
        "s": "trisock.pluto.socket",
        "socket": "trisock.pluto.socket",
        "listener": "trisock.pluto.listener",
        "server": "trisock.pluto.server",
        "scheduler": "trisock.pluto.scheduler",
    },
)
HAMMERSPOON = Page(
    scopes=("trisock.hammerspoon.Socket", "trisock.hammerspoon.Sockets", "trisock.hammerspoon"),
    variables={
        "hs": "trisock.hammerspoon.Sockets",
        "hs.udp": "trisock.hammerspoon.UDPSockets",
        "client": "trisock.hammerspoon.Socket",
        "server": "trisock.hammerspoon.Socket",
    },
)
UDP_SCOPES = ("trisock.hammerspoon.UDPSocket", "trisock.hammerspoon.UDPSockets")
PAGES = {
    "datagrams": DATAGRAMS,
    "api-datagrams": DATAGRAMS,
    "starttls": STARTTLS,
    "pluto": PLUTO,
    "api-pluto": PLUTO,
    "hammerspoon": HAMMERSPOON,
    "api-hammerspoon": HAMMERSPOON,
}
# The pages of Trio's reference. Without a network, intersphinx cannot read the list.
TRIO = {
    "core": """trio.BrokenResourceError trio.BusyResourceError trio.Cancelled trio.CancelScope
        trio.CapacityLimiter trio.ClosedResourceError trio.MemoryReceiveChannel trio.TooSlowError
        trio.fail_after trio.move_on_after trio.open_memory_channel trio.run""",
    "io": """trio.DTLSEndpoint trio.SSLStream trio.SocketStream trio.abc.HalfCloseableStream
        trio.abc.Listener trio.aclose_forcefully trio.open_signal_receiver trio.open_tcp_listeners
        trio.open_tcp_stream trio.open_unix_socket trio.serve_listeners trio.serve_ssl_over_tcp
        trio.serve_tcp""",
    "testing": "trio.testing.memory_stream_pair",
}
TRIO_URLS = {
    name: f"https://trio.readthedocs.io/en/stable/reference-{page}.html#{name}"
    for page, names in TRIO.items()
    for name in names.split()
}
# The names on these pages are tests, and options of the command.
WITHOUT_LINKS = ("dialect-tests", "command")


class LinkNames(SphinxPostTransform):
    """Turn literals that name something in the reference into links."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        """Link the names of one page. Sphinx calls this."""
        if self.env.docname in WITHOUT_LINKS:
            return
        page = PAGES.get(self.env.docname, Page())
        for literal in list(self.document.findall(nodes.literal)):
            if not isinstance(literal.parent, (nodes.reference, nodes.title)):
                self._link(literal, page)

    def _link(self, literal: nodes.literal, page: Page) -> None:
        objects = self.env.domains.python_domain.objects
        match = NAME.fullmatch(literal.astext())
        if not match or MAN_PAGE.fullmatch(literal.astext()):
            return
        if match[1] in TRIO_URLS:
            replace(literal, nodes.reference("", "", refuri=TRIO_URLS[match[1]], internal=False))
            return
        for name in candidates(match[1], page, scopes_around(literal)):
            found = objects.get(name)
            if found and ("." in match[1] or found.objtype not in ATTRIBUTES):
                link = make_refnode(
                    self.app.builder, self.env.docname, found.docname, found.node_id, [], name
                )
                replace(literal, link)
                return


def replace(literal: nodes.literal, link: nodes.reference) -> None:
    """Put the literal into a link, in its place."""
    literal.replace_self(link)
    link += literal


def scopes_around(literal: nodes.literal) -> list[str]:
    """Return the class whose docstring has the literal, and the titles of the sections around it.

    A title may be the name of a module, such as ``trisock.testing``.
    """
    scopes = []
    node = literal.parent
    while node is not None:
        if isinstance(node, addnodes.desc):
            signature = node[0]
            name = signature.get("class") or signature.get("fullname")
            scopes.append(f"{signature.get('module')}.{name}")
        elif isinstance(node, nodes.section):
            title = node[0].astext()
            scopes += UDP_SCOPES if "hs.udp" in title else [title]
        node = node.parent
    return scopes


def candidates(name: str, page: Page, around: list[str]) -> list[str]:
    """Return the full names that ``name`` may stand for, the likeliest first."""
    first, _, rest = name.rpartition(".")
    if first in page.variables:
        return [f"{page.variables[first]}.{rest}"]
    return [name, *(f"{scope}.{name}" for scope in (*around, *page.scopes))]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform. Sphinx calls this."""
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
