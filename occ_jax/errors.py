"""The one exception that stands for a user's mistake; the command line prints it as one line."""


class UserError(Exception):
    """Bad input: the message names the thing, its value and what is allowed."""
