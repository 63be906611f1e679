"""Errors that the runtime raises: a stable code, what went wrong, and what to do."""

from __future__ import annotations


class CarveRuntimeError(Exception):
    """A failure with a stable code, a message and a hint.

    Args:
        code: short identifier that callers can test, for example ``"hash-mismatch"``.
        message: what went wrong and where.
        hint: what the user can do about it.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.code, self.message, self.hint = code, message, hint


class ArtifactError(CarveRuntimeError):
    """The artifact directory is missing, damaged, unsafe, or not for this runtime.

    Codes: ``not-found``, ``bad-manifest``, ``schema``, ``unsafe-path``, ``unlisted-file``,
    ``hash-mismatch``, ``target``, ``model``, ``placement`` and ``tokenizer``.
    """


class RequestError(CarveRuntimeError, ValueError):
    """The artifact is sound, but it cannot serve this request.

    Codes: ``kind``, ``context-length``, ``empty-prompt``, ``token-id``, ``no-tokenizer``,
    ``no-pooling``, ``inputs``, ``memory`` and ``argument``.
    """


def out_of_memory(what: str, error: MemoryError) -> CarveRuntimeError:
    """Code ``memory``: ``what`` does not fit."""
    return CarveRuntimeError(
        "memory", f"{what} does not fit in memory: {error}", "use a larger machine, or memory="
    )
