"""Processors that TVM compiles for: what LLVM is told, and what the kernels may count on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from carve.errors import UserError

Dot = Literal["vnni", "maddubs", "sdot", "smull", "portable"]
"""How sums of four int8 products are formed, see `carve.emit.tvm.kernels.dot`."""

HOST = "host"
_X86, _ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"


@dataclass(frozen=True)
class Cpu:
    """One instruction set.

    ``lanes``: fp32 or int32 values in a vector; ``registers``: how many vectors there are;
    ``flags``: what ``/proc/cpuinfo`` must list.
    """

    name: str
    triple: str
    mcpu: str
    features: tuple[str, ...]
    lanes: int
    registers: int
    dot: Dot
    flags: frozenset[str]

    @property
    def signed_levels(self) -> bool:
        """Whether 8-bit weights are stored as signed numbers: only VNNI wants unsigned ones."""
        return self.dot != "vnni"

    @property
    def machine(self) -> str:
        """The architecture, as `carve_runtime.processor.machine` names it."""
        return self.triple.partition("-")[0]

    def runs_on(self, other: Cpu) -> bool:
        """Whether ``other`` can do all that this one can."""
        return self.triple == other.triple and self.flags <= other.flags

    def runs_here(self) -> bool:
        """Whether this machine can do all that it can."""
        return self.runs_on(Cpu.named(HOST))

    def target(self) -> Any:
        """The ``tvm.target.Target``."""
        from tvm.target import Target  # type: ignore[import-not-found,unused-ignore]

        options: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu}
        if self.features:
            options["mattr"] = list(self.features)
        return Target(options)

    @classmethod
    def named(cls, name: str) -> Cpu:
        """The processor of a name in `names`, or the best one that this machine is (``host``).

        Raises:
            UserError: no such name, or a host that no entry describes.
        """
        if name == HOST:
            return _host()
        for cpu in CPUS:
            if cpu.name == name:
                return cpu
        raise UserError(
            "target", f"no processor is called {name!r}", f"one of {', '.join(names())}"
        )


def names() -> list[str]:
    """What `Cpu.named` knows."""
    return [HOST, *(c.name for c in CPUS)]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}

CPUS = (
    Cpu(
        name="x86_64-avx512-vnni",
        triple=_X86,
        mcpu="x86-64-v4",
        features=("+avx512vnni",),
        lanes=16,
        registers=32,
        dot="vnni",
        flags=_AVX512 | {"avx512_vnni"},
    ),
    Cpu(
        name="x86_64-avx512",
        triple=_X86,
        mcpu="x86-64-v4",
        features=(),
        lanes=16,
        registers=32,
        dot="maddubs",
        flags=_AVX512,
    ),
    Cpu(
        name="x86_64-avx-vnni",
        triple=_X86,
        mcpu="x86-64-v3",
        features=("+avxvnni",),
        lanes=8,
        registers=16,
        dot="vnni",
        flags=_AVX2 | {"avx_vnni"},
    ),
    Cpu(
        name="x86_64-avx2",
        triple=_X86,
        mcpu="x86-64-v3",
        features=(),
        lanes=8,
        registers=16,
        dot="maddubs",
        flags=_AVX2,
    ),
    Cpu(
        name="x86_64",
        triple=_X86,
        mcpu="x86-64-v2",
        features=(),
        lanes=4,
        registers=16,
        dot="portable",
        flags=frozenset({"sse4_1", "ssse3"}),
    ),
    Cpu(
        name="aarch64-dotprod",
        triple=_ARM,
        mcpu="generic",
        features=("+neon", "+dotprod"),
        lanes=4,
        registers=32,
        dot="sdot",
        flags=frozenset({"asimd", "asimddp"}),
    ),
    Cpu(
        name="aarch64",
        triple=_ARM,
        mcpu="generic",
        features=("+neon",),
        lanes=4,
        registers=32,
        dot="smull",
        flags=frozenset({"asimd"}),
    ),
)
"""Best first within an architecture."""


def _host() -> Cpu:
    from carve_runtime.processor import flags, machine

    seen = flags() or frozenset()
    for cpu in CPUS:
        if cpu.triple.startswith(machine()) and cpu.flags <= seen:
            return cpu
    raise UserError(
        "target",
        f"no entry describes this machine ({machine()})",
        f"name the processor: {', '.join(names()[1:])}",
    )
