"""Sweeps of many runs: training locally or on a cluster, progress, and summaries."""
