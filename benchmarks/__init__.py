"""Measures how long an optimizer step takes, ours beside torch's and DeepSpeed's: ``python -m benchmarks``."""
