"""Load a split model: whole, within a memory budget, or over several processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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
    if memory is not None and shards is not None:
        raise RequestError("argument", "give memory or shards, not both")
    index = read_index(root, manifest.files, model)
    if shards is not None:
        return _sharded(root, manifest, model, index, shards, threads)
    return open_split(index, threads=threads, memory=memory, policy=policy, prefetch=prefetch)


def open_split(
    index: SplitIndex,
    *,
    threads: int | None = None,
    memory: int | None = None,
    policy: str = "lfu",
    prefetch: bool = True,
) -> SplitEngine:
    """A split model in this process, see `load_split`."""
    if memory is not None:
        give_back_freed()
    before = heap_bytes()
    trunk = Trunk(index, threads)
    file = ExpertFile(index)
    keys = hottest_first(index)
    budget = None
    if memory is not None:
        budget = _budget(memory, heap_bytes() - before, file, keys, index)
    experts = LocalExperts(
        file, keys, budget=budget, policy=policy, prefetch=prefetch, threads=_threads(threads)
    )
    return SplitEngine(trunk, experts)


def _threads(threads: int | None) -> int:
    return threads or os.cpu_count() or 1


def _budget(
    memory: int, trunk: int, file: ExpertFile, keys: Sequence[Key], index: SplitIndex
) -> int:
    """What is left for experts.

    Raises:
        RequestError: ``memory`` when no token could be computed with it.
    """
    least = 0
    for number, layer in enumerate(index.layers):
        costs = sorted((file.cost(key) for key in keys if key[0] == number), reverse=True)
        least = max(least, sum(costs[: layer.top_k]))
    if memory < trunk + least:
        raise RequestError(
            "memory",
            f"{memory} bytes do not hold the trunk ({trunk}) and one layer's experts ({least})",
            f"give at least {-(-(trunk + least) // 1_000_000)}MB",
        )
    return memory - trunk


def _sharded(
    root: Path,
    manifest: Manifest,
    model: str,
    index: SplitIndex,
    shards: int | str | os.PathLike[str],
    threads: int | None,
) -> SplitEngine:
    from carve_runtime.placement import contiguous, load_placement, shard_count
    from carve_runtime.shards import ShardedExperts

    if isinstance(shards, int):
        devices, homes = shard_count(shards), contiguous(index, shards)
        if PLACEMENT_NAME in manifest.files:
            placed = load_placement(resolve_inside(root, PLACEMENT_NAME), index)
            if placed[0] == devices:
                homes = placed[1]
    else:
        devices, homes = load_placement(Path(shards), index)
    trunk = Trunk(index, threads)
    # Cores are shared by processes that run at the same time.
    experts = ShardedExperts(
        index, root, model, homes, devices, max(1, _threads(threads) // devices)
    )
    return SplitEngine(trunk, experts)
