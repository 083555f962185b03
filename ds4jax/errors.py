"""The error that a user can correct."""


class InputError(ValueError):
    """An input that cannot be used. The message is one line that names file and field and says what to do.

    The CLI prints it to stderr and exits with 2.
    """
