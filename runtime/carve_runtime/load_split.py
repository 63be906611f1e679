"""Load a split model: whole, within a memory budget, or over several processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from carve_runtime.engine import ort
from carve_runtime.errors import RequestError
from carve_runtime.experts import ExpertFile, LocalExperts, hottest_first
from carve_runtime.heap import give_back_freed, heap_bytes
from carve_runtime.index import Key, SplitIndex, read_index
from carve_runtime.manifest import Manifest, resolve_inside
from carve_runtime.split import SplitEngine, Trunk

PLACEMENT_NAME = "placement.json"


def load_split(
    root: Path,
    manifest: Manifest,
    model: str,
    *,
    threads: int | None,
    memory: int | None,
    shards: int | str | os.PathLike[str] | None,
    policy: str,
    prefetch: bool,
) -> SplitEngine:
    """See `carve_runtime.load`, whose arguments these are; ``model`` is the index's path.

    Raises:
        ArtifactError: the index, a segment, an expert or a placement is not sound.
        RequestError: ``memory`` when the budget is below the least that works.
        CarveRuntimeError: ``shard`` when a process cannot load its experts.
    """
    index = read_index(root, manifest.files, model)
    if shards is None:
        return open_split(index, threads=threads, memory=memory, policy=policy, prefetch=prefetch)
    from carve_runtime.placement import choose_holders
    from carve_runtime.shards import Limits, ShardedExperts, held_by

    placed = resolve_inside(root, PLACEMENT_NAME) if PLACEMENT_NAME in manifest.files else None
    devices, holders = choose_holders(shards, placed, index)
    trunk, size = _trunk(index, threads, memory)
    file = ExpertFile(index)
    limits = None
    if memory is not None:
        budgets = share_memory(memory, size, file, held_by(index, holders, devices))
        limits = Limits(budgets, policy, prefetch, file.costs())
    # Cores are shared by processes that run at the same time.
    several = max(1, _threads(threads) // devices)
    experts = ShardedExperts(file, root, model, holders, devices, several, limits)
    return SplitEngine(trunk, experts)


def open_split(
    index: SplitIndex,
    *,
    threads: int | None = None,
    memory: int | None = None,
    policy: str = "lfu",
    prefetch: bool = True,
) -> SplitEngine:
    """A split model in this process, see `load_split`."""
    trunk, size = _trunk(index, threads, memory)
    file = ExpertFile(index)
    keys = hottest_first(index)
    budget = None if memory is None else share_memory(memory, size, file, [keys])[0]
    experts = LocalExperts(
        file, keys, budget=budget, policy=policy, prefetch=prefetch, threads=_threads(threads)
    )
    return SplitEngine(trunk, experts)


def _trunk(index: SplitIndex, threads: int | None, memory: int | None) -> tuple[Trunk, int]:
    """The segments and, where memory is limited, the bytes that they take."""
    if memory is not None:
        ort()  # what importing it takes is not the trunk's
        give_back_freed()
    before = heap_bytes()
    trunk = Trunk(index, threads)
    return trunk, heap_bytes() - before


def _threads(threads: int | None) -> int:
    return threads or os.cpu_count() or 1


def share_memory(
    memory: int, trunk: int, file: ExpertFile, held: Sequence[Sequence[Key]]
) -> list[int]:
    """What is left for experts, by device.

    Every device gets what one layer takes of its experts for one token; the rest is shared out in
    proportion to what each would hold beyond that, so that all are equally short.

    Args:
        memory: bytes of all together.
        trunk: bytes of the segments.
        file: the experts.
        held: by device, those that it holds.

    Raises:
        RequestError: ``memory`` when no token could be computed with it.
    """
    least = [file.least(keys) for keys in held]
    rest = memory - trunk - sum(least)
    if rest < 0:
        many = f" in {len(held)} processes" if len(held) > 1 else ""
        raise RequestError(
            "memory",
            f"{memory} bytes do not hold the trunk ({trunk}) and one layer's experts{many} "
            f"({sum(least)})",
            f"give at least {-(-(trunk + sum(least)) // 1_000_000)}MB",
        )
    more = [sum(map(file.cost, keys)) - n for keys, n in zip(held, least, strict=True)]
    return [n + rest * m // max(1, sum(more)) for n, m in zip(least, more, strict=True)]
