"""The one error a command turns into a line for its user instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: names the value, what was expected and what to do."""
