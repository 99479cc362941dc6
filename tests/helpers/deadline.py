"""The deadline of each test."""

from __future__ import annotations

# In seconds. After this time, a hanging test fails, and the run continues.
DEADLINE = 60
