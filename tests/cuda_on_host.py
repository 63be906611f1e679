"""GPU kernels run on the processor: stand-ins for nvcc and for CUDA's libraries.

Threads of a block take turns, so results are those of a GPU but for what it would do at once: races
are not seen. The libraries have to be loaded into a process of its own.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')


def build_libraries(folder: Path) -> None:
    """``libcudart.so.13`` and ``libcuda.so.1``."""
    versions = folder / "versions.map"
    versions.write_text("libcudart.so.13 { global: *; };")
    for name, more in (
        ("libcudart.so.13", ["-DRUNTIME", f"-Wl,--version-script={versions}"]),
        ("libcuda.so.1", ["-ldl"]),
    ):
        _compile(HERE / "cuda_on_host.cpp", folder / name, f"-Wl,-soname,{name}", *more)


def compile_kernels(source: str, folder: Path) -> bytes:
    """What takes the place of a fat binary: the path of a library with the kernels."""
    source = source.replace("#include <cuda.h>", '#include "cuda_on_host.h"')
    source = source.replace("__shared__ alignas(64)", "alignas(64) static")
    counts = {m[1]: m[2].count(",") + 1 for m in _KERNEL.finditer(source)}
    source += "".join(f'\nextern "C" int {k}_arguments = {n};' for k, n in counts.items())
    given, made = folder / "kernels.cpp", folder / "kernels.so"
    given.write_text(source)
    _compile(given, made, "-w", "-fno-strict-aliasing", f"-I{HERE}")
    return str(made).encode() + b"\0"


def _compile(given: Path, made: Path, *options: str) -> None:
    command = ["g++", "-O1", "-shared", "-fPIC", str(given), "-o", str(made), *options]
    subprocess.run(command, check=True)
