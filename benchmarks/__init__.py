"""Speed and memory of training and generation, beside the authors' PyTorch code."""
