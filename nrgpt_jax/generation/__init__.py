"""The making of text, and scores of given text."""
