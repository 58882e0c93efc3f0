"""Text generation, and scores of existing text."""
