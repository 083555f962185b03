"""Errors whose message is one line: what a user can correct, and what ends a process."""


class InputError(ValueError):
    """An input that cannot be used. The message is one line that names file and field and says what to do.

    The CLI prints it to stderr and exits with 2.
    """


class ExchangeError(RuntimeError):
    """Devices lost what they sent each other. All requests end, and the process cannot compute any more.

    The CLI prints it to stderr and exits with 1.
    """
