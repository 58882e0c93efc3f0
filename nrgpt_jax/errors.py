"""Errors that are the user's to mend: one line that names the cause and the cure."""


class UserError(ValueError):
    """Shown by the programs as one line, without a traceback; exit code 2."""
