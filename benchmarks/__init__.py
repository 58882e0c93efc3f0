"""Speed and memory of training and of making text, beside the authors' PyTorch code."""
