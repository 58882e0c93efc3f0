"""The training step, its loop, and the evaluation of what was learned."""
