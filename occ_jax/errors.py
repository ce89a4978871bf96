"""The error for a user's mistake, and a library's message as one line."""


class UserError(Exception):
    """Bad input: the message names the thing, its value and what is allowed.

    The command line prints it as one line.
    """


def one_line(error: BaseException) -> str:
    """The start of a library's message, its line breaks and indentation removed."""
    return " ".join(str(error).split())[:200]
