"""A placement as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from carve.report import table

SHOWN = {"throughput": 1e6, "latency": 1e6, "affinity": 1.0}
"""Times which an objective is shown: seconds as microseconds."""
_UNIT = {"throughput": "us a token", "latency": "us a token", "affinity": "hops a token"}


def value_line(objective: str, value: float, bound: float, gap: float) -> str:
    """The objective, with how far from the best it can be."""
    scale = SHOWN[objective]
    return (
        f"placement: {objective} {value * scale:.3f} {_UNIT[objective]}, no placement is under "
        f"{bound * scale:.3f} (gap {100 * gap:.1f} %)"
    )


def memory_table(
    memory: Mapping[str, Sequence[float]], load: Mapping[str, float] | None = None
) -> str:
    """By device, bytes of experts, room for them, and experts a token."""
    head = ["device", "experts MB", "room MB", *(["experts a token"] if load else [])]
    rows = [
        [n, f"{u / 1e6:.2f}", f"{m / 1e6:.2f}", *([f"{load[n]:.2f}"] if load else [])]
        for n, (u, m) in memory.items()
    ]
    return table([head, *rows])


def scores_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Placements by every objective, on text that placed none of them."""
    names = list(next(iter(scores.values()), {}))
    rows = [[who, *(f"{by[n] * SHOWN[n]:.2f}" for n in names)] for who, by in scores.items()]
    return table([["other half of the trace", *(f"{n}, {_UNIT[n]}" for n in names)], *rows])
