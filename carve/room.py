"""Whether a conversion fits into what this machine has left."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from carve import artifact as art
from carve.budget import plan_widths
from carve.config import ConvertConfig
from carve.errors import UserError
from carve.estimate import Estimate
from carve.lineup import default_tokens, request_of
from carve.program import Program
from carve.workload import Scene

_TRUST = 0.7
"""Share of the estimated memory that surely is needed: what lies between is the user's to try."""


def scene_of(program: Program, config: ConvertConfig) -> Scene:
    """The program with uniform widths, as they are before the allocation.

    Raises:
        UserError: no widths answer the request.
    """
    request, skips = request_of(program, config)
    widths = {} if config.is_dense else plan_widths(program, request, skips)
    parameters = sum(p.numel() for p in program.module.parameters())
    tokens = default_tokens(config, parameters)
    return Scene(program, widths, tokens, min(config.length, program.max_length))


def memory_free() -> float:
    """Bytes of memory that this process may still take, its own counted."""
    pages = resource.getpagesize()
    try:
        own = int(Path("/proc/self/statm").read_text().split()[1]) * pages
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(n.split()[1]) << 10 for n in lines if n.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * pages)
    limits = [float(free + own)]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if Path(name).is_file() else "max"
        if text.isdigit():
            limits.append(float(text))
    return min(limits)


def lacking(found: Estimate, output: Path, stored: float = 0.0) -> list[str]:
    """What is too little, in words; ``stored`` bytes of the state are there already."""
    reasons = []
    free, disk = memory_free(), art.disk_free(output)
    if found.memory * _TRUST > free:
        reasons.append(
            f"about {found.memory / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are free"
        )
    if (needed := found.disk - stored) > disk:
        reasons.append(
            f"about {needed / 1e6:.0f} MB are needed beside {output}, {disk / 1e6:.0f} MB are free"
        )
    return reasons


def check_room(found: Estimate, output: Path, stored: float = 0.0) -> None:
    """Refuse to start what will not fit.

    Raises:
        UserError: naming what is too little.
    """
    reasons = lacking(found, output, stored)
    if reasons:
        memory = "memory" in reasons[0]
        raise UserError(
            "memory" if memory else "disk",
            "; ".join(reasons),
            "give fewer --set convert.tokens, or a larger machine"
            if memory
            else "free some room or choose another -o",
        )
