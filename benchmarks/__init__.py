"""
How fast the service is, over baselines that the benchmark starts itself: `python -m benchmarks --help`.

Ratios, not absolute figures: ours and a baseline take turns on the same machine, and the medians are compared.
"""
