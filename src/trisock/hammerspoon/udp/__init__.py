"""Hammerspoon's ``hs.socket.udp``. The public names are in ``trisock.hammerspoon``."""
