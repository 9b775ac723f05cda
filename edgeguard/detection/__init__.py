"""Runs a guarded model on a TFLite runtime and turns its scores into a verdict. NumPy and a runtime only."""
