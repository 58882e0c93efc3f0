"""What becomes of runs that are killed, stopped, damaged and starved: docs/reliability.md."""
