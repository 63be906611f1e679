"""What a cache of experts would find on a trace: hit rates, bounds, and local routing consistency.

A trace is one boolean array ``[T, E_l]`` a layer: which experts each token takes. Requests come
token by token, layer by layer, expert by expert; experts of all layers share one cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Chosen = Sequence[NDArray[np.bool_]]
Policy = Literal["lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "belady")


def requests(chosen: Chosen) -> NDArray[np.int64]:
    """The requests in order, as numbers of experts counted through all layers."""
    numbers: NDArray[np.int64] = np.nonzero(np.concatenate(chosen, 1))[1]
    return numbers


def simulate(asked: Sequence[int], capacity: int, policy: Policy) -> NDArray[np.bool_]:
    """Which of ``asked`` a cache of ``capacity`` experts, empty at first, would hold.

    Every request is admitted. ``lru`` drops what was not asked for longest, ``lfu`` what was asked
    for least often so far, ``belady`` what is not needed for longest: no policy that admits every
    request has more hits (Belady 1966). Ties go to the expert asked for least recently.

    Raises:
        ValueError: no capacity.
    """
    if capacity < 1:
        raise ValueError(f"a cache of {capacity} experts holds none")
    asked = [int(a) for a in asked]
    count = len(asked)
    following = [count] * count
    seen: dict[int, int] = {}
    for t in range(count - 1, -1, -1):
        following[t] = seen.get(asked[t], count)
        seen[asked[t]] = t
    hits = np.zeros(count, bool)
    times: dict[int, int] = {}
    rank: dict[int, tuple[int, int]] = {}
    heap: list[tuple[int, int, int]] = []
    for t, expert in enumerate(asked):
        hits[t] = expert in rank
        times[expert] = times.get(expert, 0) + 1
        if not hits[t] and len(rank) == capacity:
            while True:  # entries of the heap that are no longer true are passed over
                first, last, victim = heapq.heappop(heap)
                if rank.get(victim) == (first, last):
                    del rank[victim]
                    break
        first = {"lru": t, "lfu": times[expert], "belady": -following[t]}[policy]
        rank[expert] = first, t
        heapq.heappush(heap, (first, t, expert))
    return hits


def hit_rate(chosen: Chosen, share: float, policy: Policy) -> float:
    """Share of requests found in a cache for ``share`` of all experts; 0 without requests."""
    hits = simulate(requests(chosen).tolist(), _capacity(chosen, share), policy)
    return float(hits.mean()) if hits.size else 0.0


def bytes_per_token(
    chosen: Chosen, share: float, policy: Policy, sizes: Sequence[Sequence[int]]
) -> float:
    """Bytes of experts read for a token by such a cache; ``sizes`` by layer and expert."""
    asked = requests(chosen)
    hits = simulate(asked.tolist(), _capacity(chosen, share), policy)
    each = np.concatenate([np.asarray(s, np.float64) for s in sizes])
    return float(each[asked[~hits]].sum() / max(1, len(chosen[0])))


def _capacity(chosen: Chosen, share: float) -> int:
    return max(1, round(share * sum(int(c.shape[1]) for c in chosen)))


def _windows(chosen: NDArray[np.bool_], length: int) -> NDArray[np.int64]:
    """``[T - length + 1, E]``: how many tokens of each run of ``length`` take each expert."""
    total = np.cumsum(np.vstack([np.zeros((1, chosen.shape[1]), np.int64), chosen]), 0)
    counts: NDArray[np.int64] = total[length:] - total[:-length]
    return counts


def srp(chosen: Chosen, length: int) -> float:
    """Segment routing best performance.

    How well a fixed group of experts can stand for the routing of a run of ``length`` tokens. With
    ``c`` of a run's tokens taking an expert, the group holds the experts with ``c >= t``; over all
    runs, layers and experts ``F1(t) = 2 sum c / (length |{c >= t}| + sum over all c)``, the first
    sum over ``c >= t``; the result is the largest over ``t``. 1 where all tokens of a run take the
    same experts. Source: arXiv 2505.16056, and its authors' code.
    """
    counts = np.zeros(length + 1, np.int64)
    for c in chosen:
        if len(c) >= length:
            counts += np.bincount(_windows(c, length).ravel(), minlength=length + 1)
    weighted = counts * np.arange(length + 1)
    matches, picked = (np.cumsum(v[::-1])[::-1] for v in (weighted, counts))
    asked = int(weighted.sum())
    if asked == 0:
        return 0.0
    return float((2 * matches / np.maximum(1, length * picked + asked)).max())


def sch(chosen: Chosen, length: int, ratio: float = 2.0) -> float:
    """Segment cache best hit rate.

    The hit rate of the best fixed cache for each run of ``length`` tokens: a layer's cache has
    ``ratio`` times as many experts as a token takes on average (at least one), those that the run
    takes most often. The mean is over the requests of all runs and layers. Source: the definition
    in the first version of arXiv 2505.16056.
    """
    found = asked = 0
    for c in chosen:
        if len(c) < length:
            continue
        size = min(c.shape[1], max(1, round(ratio * c.sum() / len(c))))
        counts = np.sort(_windows(c, length), 1)
        found += int(counts[:, counts.shape[1] - size :].sum())
        asked += int(counts.sum())
    return found / asked if asked else 0.0


def recall(predicted: Chosen, chosen: Chosen) -> float:
    """Share of requests that a prediction of the same shapes holds."""
    asked = sum(int(c.sum()) for c in chosen)
    right = sum(int((p & c).sum()) for p, c in zip(predicted, chosen, strict=True))
    return right / asked if asked else 0.0
