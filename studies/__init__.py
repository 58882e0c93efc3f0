"""What produces the pages of docs/: rates with a guarantee, energy as a signal, depth."""
