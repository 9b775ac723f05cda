"""Measurements, each a command: ``python -m benchmarks.NAME``. What they write stands in ``benchmarks/results``."""
