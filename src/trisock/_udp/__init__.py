"""Datagrams (UDP). Private: the public names are in ``trisock``."""
