"""What a run directory holds: configuration, checkpoints, metrics, tokenizer."""
