"""The command ``trisock``: ``check``, ``connect`` and ``demo``. Needs the extra ``cli``."""
