"""What glibc's heap holds. Elsewhere nothing is known, and sizes of files stand in."""

from __future__ import annotations

import ctypes
import gc

_M_MMAP_THRESHOLD = -3
_OWN_PAGES = 64 * 1024


class _Info(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_bytes() -> int:
    """Bytes in use by malloc, 0 where the C library does not tell.

    Collected first, so that what was left behind does not go while something is measured.
    """
    gc.collect()
    try:
        read = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0
    read.restype = _Info
    info = read()
    return int(info.uordblks) + int(info.hblkhd)


def give_back_freed() -> None:
    """Have blocks above 64 KB mapped, so that what is freed leaves the process.

    By default the bound rises to the size of the first such block that is freed, and memory of
    later ones stays with the process for good.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
    except (AttributeError, OSError):
        return
