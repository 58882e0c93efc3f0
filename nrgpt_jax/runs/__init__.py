"""The contents of a run directory: configuration, checkpoints, metrics, tokenizer."""
