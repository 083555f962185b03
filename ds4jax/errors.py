"""The error that a user can do something about."""


class InputError(ValueError):
    """Something given from outside cannot be used; one line that names the file and field and says what to do.

    The CLI prints it to stderr and exits with 2.
    """
