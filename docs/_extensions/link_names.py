"""A Sphinx extension: names in code font link to the reference.

The pages and docstrings say ``Socket.recv_line`` or ``await sock.recv_line()``. This is readable
on GitHub and in a terminal. Here, each such literal becomes a link if the reference has the name.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

# What a variable with this name holds, in all snippets.
CLASSES = {
    "sock": "Socket",
    "client": "Socket",
    "listener": "Listener",
    "server": "Server",
    "service": "Service",
    "udp": "UDPSocket",
}
NAME = re.compile(r"(?:await |async for \w+ in |async with )*(?:await )?([A-Za-z_][\w.]*)(\(.*\))?")
# Without a dot before it, such a name is more often that of a parameter.
ATTRIBUTES = ("attribute", "property")
# The dialects have names such as ``connect`` too, which are other functions.
DIALECTS = ("pluto", "hammerspoon", "api-pluto", "api-hammerspoon", "dialect-tests", "command")
MAN_PAGE = re.compile(r"\w+\(\d\)")  # such as close(2)


class LinkNames(SphinxPostTransform):
    """Turn literals that name something in the reference into links."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        """Link the names of one page. Sphinx calls this."""
        if self.env.docname.startswith(DIALECTS):
            return
        for literal in list(self.document.findall(nodes.literal)):
            if not isinstance(literal.parent, (nodes.reference, nodes.title)):
                self._link(literal)

    def _link(self, literal: nodes.literal) -> None:
        objects = self.env.domains.python_domain.objects
        match = NAME.fullmatch(literal.astext())
        if not match or MAN_PAGE.fullmatch(literal.astext()):
            return
        for name in candidates(match[1], self._class_around(literal)):
            found = objects.get(name)
            if found and ("." in match[1] or found.objtype not in ATTRIBUTES):
                link = make_refnode(
                    self.app.builder, self.env.docname, found.docname, found.node_id, [], name
                )
                literal.replace_self(link)
                link += literal
                return

    def _class_around(self, literal: nodes.literal) -> str:
        """Return the class whose method a name without a dot is."""
        node = literal.parent
        while node is not None:
            if isinstance(node, addnodes.desc):
                signature = node[0]
                name = signature.get("class") or signature.get("fullname")
                return f"{signature.get('module')}.{name}"
            node = node.parent
        return "trisock.UDPSocket" if "datagrams" in self.env.docname else "trisock.Socket"


def candidates(name: str, class_around: str) -> list[str]:
    """Return the full names that ``name`` may stand for, the likeliest first."""
    first, _, rest = name.partition(".")
    if first in CLASSES and rest:
        name = f"{CLASSES[first]}.{rest}"
    return [name, f"{class_around}.{name}", f"trisock.{name}", f"trisock.testing.{name}"]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform. Sphinx calls this."""
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
