"""Whether a conversion fits into what this machine has left."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

from carve_runtime.heap import resident_bytes

from carve import artifact as art
from carve.budget import plan_widths
from carve.calibration import Batch
from carve.checkpoint import TOKENIZER_FILES
from carve.config import ConvertConfig
from carve.engine_form import FOREIGN
from carve.errors import UserError
from carve.estimate import Room
from carve.lineup import Tokens, request_of
from carve.passbase import peak_rss_mb
from carve.program import Program
from carve.retell import judged_on, missing
from carve.workload import Scene

_TRUST = 0.7
"""Share of the estimated memory that surely is needed: what lies between is the user's to try."""


def scene_of(
    program: Program,
    config: ConvertConfig,
    asked: Tokens,
    batches: Sequence[Batch],
    held: Sequence[Batch],
    folder: Path | None = None,
) -> Scene:
    """The program with uniform widths, as they are before the allocation, and its texts' sizes.

    ``folder`` is the checkpoint, whose tokenizer an artifact takes over.

    Raises:
        UserError: no widths answer the request.
    """
    request, skips = request_of(program, config)
    widths = {} if config.is_dense else plan_widths(program, request, skips)
    seen, final = (sum(b.positions for b in text) for text in (batches, held))
    told = missing(program, batches, asked.calibration, asked.distinct)
    judge = judged_on(batches, asked.judge) if told else min(seen, asked.judge)
    after = min(final, asked.after_pass)
    tokens = Tokens(seen + told, final, after, judge, asked.distinct, told)
    rows = len(batches[0].inputs[0])
    length = round(seen / sum(len(b.inputs[0]) for b in batches))
    copied = 0.0 if folder is None else _tokenizer_size(folder)
    copied *= 1 + sum(t in FOREIGN for t in config.targets)
    return Scene(program, widths, tokens, length, rows, tuple(skips), copied)


def _tokenizer_size(folder: Path) -> float:
    files = [folder / n for n in TOKENIZER_FILES]
    return float(sum(f.stat().st_size for f in files if f.is_file()))


def resident() -> float:
    """Bytes of memory that this process has."""
    found = resident_bytes()
    return peak_rss_mb() * 2**20 if found is None else float(found)


def memory_free() -> float:
    """Bytes of memory that this process may still take, its own counted."""
    pages, own = resource.getpagesize(), resident()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(n.split()[1]) << 10 for n in lines if n.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * pages)
    limits = [free + own]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if Path(name).is_file() else "max"
        if text.isdigit():
            limits.append(float(text))
    return min(limits)


def lacking(found: Room, output: Path, stored: float = 0.0) -> list[str]:
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


def check_room(found: Room, output: Path, stored: float = 0.0) -> None:
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
