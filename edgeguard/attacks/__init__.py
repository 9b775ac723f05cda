"""The red team: one file per attack, each with its paper's settings, used by the demo, drills and benchmarks."""
