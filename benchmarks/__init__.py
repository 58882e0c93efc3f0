"""What measures speed and memory: `make bench`, with `RELEASE=path/to/clone` beside the authors'
PyTorch code."""
