"""The training step, the training loop, and evaluation."""
