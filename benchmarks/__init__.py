"""What measures for docs/: speed and memory (`make bench`, `make bench-generation`, with
`RELEASE=path/to/clone` beside the authors' PyTorch code), depth, rates, energy as a signal."""
