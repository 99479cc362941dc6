"""The deadline of each test."""

from __future__ import annotations

# Seconds. A hang fails a test, and does not stop the run. No passing test takes that long.
DEADLINE = 60
