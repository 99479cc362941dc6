"""Benchmarks of trisock and other libraries. Each row is one kind of work; each peer is a library.

Run ``python -m benchmarks --help``. docs/benchmarks.md explains the method.
"""
