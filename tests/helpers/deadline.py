"""How long a test may take."""

from __future__ import annotations

# Every test is bounded: a hang is a failure and not a stuck run. No test waits so long when it
# passes.
DEADLINE = 60
