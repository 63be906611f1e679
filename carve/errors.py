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


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a failure, or what caused it, is that there was no memory."""
    # torch and onnxruntime have no class of their own for it.
    words = ("can't allocate memory", "bad_alloc", "bad alloc", "Cannot allocate memory")
    while error is not None:
        if isinstance(error, MemoryError) or any(w in str(error) for w in words):
            return True
        error = error.__cause__ or error.__context__
    return False


class UserError(CarveError):
    """The request itself cannot be served; the command line exits with 2."""

    exit_code = 2
