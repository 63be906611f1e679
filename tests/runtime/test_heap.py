"""Memory that is freed leaves the process where it has grown."""

import ctypes

from carve_runtime.heap import Trimmer, resident_bytes


def test_a_grown_heap_is_trimmed_and_a_steady_one_left_alone() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    trim = Trimmer(grown=64 << 20)
    assert not trim()
    # Blocks too small to be mapped, and one above them that keeps the heap's end where it is.
    blocks = [libc.malloc(100_000) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    above = libc.malloc(100_000)
    full = resident_bytes()
    for block in blocks:
        libc.free(block)
    assert full is not None
    assert full - resident_bytes() < 100 << 20  # type: ignore[operator]
    assert trim()
    assert full - resident_bytes() > 150 << 20  # type: ignore[operator]
    assert not trim()
    libc.free(above)
