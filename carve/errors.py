"""Errors that a user sees: what, where, why, and what to do."""

from __future__ import annotations


class CarveError(Exception):
    """A failure with a stable code, a message and a hint; the command line exits with 1.

    Args:
        code: short identifier that scripts can test, for example ``"parity"``.
        message: what went wrong and where.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class UserError(CarveError):
    """The request itself cannot be served; the command line exits with 2."""

    exit_code = 2
