"""Errors of libraries, told in one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank; without one, the name of the error's class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
