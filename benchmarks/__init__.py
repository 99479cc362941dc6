"""What trisock costs, next to others: each row is one kind of work, each peer does it in its way.

``python -m benchmarks --help`` runs it; docs/benchmarks.md says how it measures.
"""
