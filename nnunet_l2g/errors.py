"""The error that a command prints as one message, without a traceback."""


class UserError(Exception):
    """Something that the user can correct. The message names the value, what was expected and what to do."""
