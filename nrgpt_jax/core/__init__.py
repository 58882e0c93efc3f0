"""The mathematics of the paper as pure functions: no Flax, no configuration, no hidden state."""
