"""Giving freed memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None


def give_back() -> None:
    """Let the C library return the pages it keeps of freed memory; glibc alone keeps many.

    Its threshold for mapped blocks grows up to 32 MB with what is freed, so tensors of a few
    megabytes come from a heap that is never smaller than it once was, with holes. Lowering the
    threshold instead costs a page fault for every page of every tensor.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
