"""Runs that are killed, stopped, damaged and out of disk space: docs/reliability.md."""
