"""The deadline of each test."""

from __future__ import annotations

# In seconds. A test that hangs fails after this time, and the run continues.
DEADLINE = 60
