"""What glibc's heap holds, and giving it back. Elsewhere nothing is known or done."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3
_OWN_PAGES = 64 * 1024
_GROWN = 1 << 28
"""Bytes that a process may grow by before a `Trimmer` does anything."""


class _Info(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _function(name: str) -> Any | None:
    """One of the C library's functions, None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None


def heap_bytes() -> int:
    """Bytes in use by malloc, 0 where the C library does not tell.

    Collected first, so that what was left behind does not go while something is measured.
    """
    gc.collect()
    read = _function("mallinfo2")
    if read is None:
        return 0
    read.restype = _Info
    info = read()
    return int(info.uordblks) + int(info.hblkhd)


def give_back_freed() -> None:
    """Have blocks above 64 KB mapped, so that what is freed leaves the process.

    By default the bound rises to the size of the first such block that is freed, and memory of
    later ones stays with the process for good.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)


def trim_heap() -> None:
    """Return the pages that are kept of freed memory now.

    The bound of `give_back_freed` rises up to 32 MB, and tensors below it come from a heap that
    is never smaller than it once was, with holes. Where they are made and freed all the time, a
    low bound costs a page fault for every page of every tensor; this costs nothing in between.
    """
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def resident_bytes() -> int | None:
    """Bytes of memory that this process has, None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError, IndexError):
        return None


class Trimmer:
    """Trims the heap of a process that has grown since it was last trimmed.

    Tensors of ever other sizes leave holes behind, and the heap grows although as much is freed as
    is made: experts' shares of a batch, say. Trimming each time would cost a page fault for every
    page of what is made next.
    """

    def __init__(self, grown: int = _GROWN) -> None:
        self._grown = grown
        self._least: int | None = None

    def __call__(self) -> bool:
        """Trim if there is reason to; whether there was."""
        now = resident_bytes()
        if now is None:
            return False
        if self._least is None or now < self._least:
            self._least = now
        if now - self._least < self._grown:
            return False
        trim_heap()
        self._least = resident_bytes()
        return True
