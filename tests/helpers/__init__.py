"""Shared by the tests; one idea per module. Tests import from here, and never from each other."""
