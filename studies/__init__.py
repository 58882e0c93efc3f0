"""Studies that write the result pages of docs/: guaranteed rates, energy as a signal, depth."""
