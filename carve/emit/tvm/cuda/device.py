"""GPUs that TVM compiles for, and how their kernels' source becomes machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carve.emit.tvm.cpu import CPUS, HOST, Cpu
from carve.errors import CarveError, UserError

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
"""Compute capabilities by nvcc's names."""
DEFAULT = "sm_80"
_SECONDS = 900


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA architecture, and the processor of the host that starts its kernels.

    Newer GPUs run what is compiled for an older one: PTX is stored beside the machine code.
    """

    arch: str
    host: Cpu

    @property
    def name(self) -> str:
        """As targets call it."""
        return f"cuda-{self.arch}"

    @property
    def triple(self) -> str:
        """The host's."""
        return self.host.triple

    @property
    def machine(self) -> str:
        """The host's."""
        return self.host.machine

    @property
    def flags(self) -> frozenset[str]:
        """What the host has to be able to do."""
        return self.host.flags

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor number of the least GPU that runs it."""
        digits = self.arch.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])

    def target(self) -> Any:
        """The ``tvm.target.Target``, its host included."""
        from tvm.target import Target  # type: ignore[import-not-found,unused-ignore]

        return Target({"kind": "cuda", "arch": self.arch}, host=self.host.target())

    def runs_here(self) -> bool:
        """Whether a GPU is here that runs what is compiled."""
        from carve_runtime.tvm_memory import has_gpu

        return has_gpu(self.capability)

    @classmethod
    def named(cls, name: str) -> Gpu:
        """The GPU of ``cuda`` or ``cuda-sm_90``.

        Raises:
            UserError: no such architecture.
        """
        arch = name.removeprefix("cuda").removeprefix("-") or DEFAULT
        if arch not in ARCHITECTURES:
            raise UserError(
                "target",
                f"no GPU architecture is called {arch!r:.40}",
                f"one of {', '.join(f'cuda-{a}' for a in ARCHITECTURES)}",
            )
        from carve_runtime.processor import machine

        # The host only starts kernels: the plainest processor of this kind will do.
        hosts = [c for c in CPUS if c.triple.startswith(machine())]
        return cls(arch, hosts[-1] if hosts else Cpu.named(HOST))


def names() -> list[str]:
    """What `Gpu.named` knows."""
    return ["cuda", *(f"cuda-{a}" for a in ARCHITECTURES)]


def nvcc() -> str:
    """The compiler of CUDA's source.

    Raises:
        UserError: there is none.
    """
    found = shutil.which("nvcc")
    if found is None:
        raise UserError(
            "target",
            "no nvcc compiles CUDA's kernels here",
            "install the CUDA toolkit; no GPU is needed",
        )
    return found


def compile_source(source: str, arch: str) -> bytes:
    """A fat binary of CUDA source: machine code for ``arch``, and PTX for what comes after it.

    Raises:
        CarveError: nvcc refuses the source.
    """
    number = arch.removeprefix("sm_")
    codes = [f"arch=compute_{number},code={kind}_{number}" for kind in ("sm", "compute")]
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "kernels.cu"), Path(folder, "kernels.fatbin")
        given.write_text(source, encoding="utf-8")
        command = [nvcc(), "-O3", "-fatbin", *(f"-gencode={c}" for c in codes)]
        done = subprocess.run(
            [*command, "-o", str(made), str(given)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode or not made.is_file():
            error = re.sub(r"\S*kernels\.cu", "kernels.cu", done.stderr)[-400:]
            raise CarveError("emit", f"nvcc could not compile the kernels: {error}")
        return made.read_bytes()
