"""The deadline of each test."""

from __future__ import annotations

# Seconds. A test that hangs fails, and the run goes on. Passing tests take less time.
DEADLINE = 60
