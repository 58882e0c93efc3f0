"""The figures and tables of the paper, with its numbers beside ours (docs/results/paper.md)."""
