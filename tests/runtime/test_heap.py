"""Memory that is freed leaves the process where it has grown."""

import subprocess
import sys

_GROW_AND_TRIM = """
import ctypes
from carve_runtime.heap import Trimmer, resident_bytes

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
assert full - resident_bytes() < 100 << 20
assert trim()
assert full - resident_bytes() > 150 << 20
assert not trim()
libc.free(above)
"""


def test_a_grown_heap_is_trimmed_and_a_steady_one_left_alone() -> None:
    # A process of its own: what other tests have made and freed, and the bound that
    # `give_back_freed` sets for good, decide where a block of this size comes from.
    ran = subprocess.run([sys.executable, "-c", _GROW_AND_TRIM], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
