"""Figures and tables of the paper, its numbers beside ours (docs/results/paper.md)."""
