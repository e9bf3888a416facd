"""The one exception that users are meant to see."""


class UserError(RuntimeError):
    """Something in the user's data, files or settings is wrong.

    The message says what was found, what was expected and what to do about it.
    """
