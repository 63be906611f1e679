"""Caches on traces, beside brute force and the definitions."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carve.placement.locality import (
    POLICIES,
    bytes_per_token,
    hit_rate,
    recall,
    requests,
    sch,
    simulate,
    srp,
)


def best(asked: tuple[int, ...], capacity: int) -> int:
    """Most hits of any policy that admits every request."""

    @cache
    def hits(t: int, held: frozenset[int]) -> int:
        if t == len(asked):
            return 0
        if asked[t] in held:
            return 1 + hits(t + 1, held)
        if len(held) < capacity:
            return hits(t + 1, held | {asked[t]})
        return max(hits(t + 1, (held - {victim}) | {asked[t]}) for victim in held)

    return hits(0, frozenset())


def plain(asked: list[int], capacity: int, policy: str) -> list[bool]:
    """LRU and LFU word for word."""
    held: list[int] = []
    found = []
    for t, expert in enumerate(asked):
        found.append(expert in held)
        if expert not in held:
            if len(held) == capacity:
                past = asked[:t]

                def last(e: int, past: list[int] = past) -> int:
                    return max(i for i, p in enumerate(past) if p == e)

                counts = {e: past.count(e) if policy == "lfu" else 0 for e in held}
                held.remove(min(held, key=lambda e: (counts[e], last(e))))
            held.append(expert)
    return found


SEQUENCES = st.lists(st.integers(0, 5), max_size=14)


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, st.integers(1, 4))
def test_belady_is_the_best_there_is(asked: list[int], capacity: int) -> None:
    assert simulate(asked, capacity, "belady").sum() == best(tuple(asked), capacity)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 6))
def test_policies_are_their_definitions_and_below_belady(asked: list[int], capacity: int) -> None:
    bound = simulate(asked, capacity, "belady").sum()
    for policy in ("lru", "lfu"):
        hits = simulate(asked, capacity, policy)
        assert hits.tolist() == plain(asked, capacity, policy)
        assert hits.sum() <= bound
    first = {a: asked.index(a) for a in asked}
    for policy in POLICIES:
        hits = simulate(asked, len(first) + 1, policy)
        assert hits.tolist() == [t != first[a] for t, a in enumerate(asked)]


def trace(seed: int, tokens: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((tokens, e)) < p for e, p in ((4, 0.5), (8, 0.2))]


def test_requests_go_token_by_token() -> None:
    chosen = [np.array([[0, 1], [1, 1]], bool), np.array([[1, 0, 1], [0, 0, 0]], bool)]
    assert requests(chosen).tolist() == [1, 2, 4, 0, 1]


def test_rates_of_a_trace() -> None:
    chosen = trace(0)
    asked = requests(chosen)
    for share, policy in product((0.25, 0.5, 0.75), POLICIES):
        hits = simulate(asked.tolist(), round(share * 12), policy)
        assert hit_rate(chosen, share, policy) == hits.mean()
        sizes = [[10] * 4, [1000] * 8]
        each = np.where(asked < 4, 10, 1000)
        assert bytes_per_token(chosen, share, policy, sizes) == each[~hits].sum() / 40
    nothing = [np.zeros((5, 3), bool)]
    assert hit_rate(nothing, 0.5, "lru") == srp(nothing, 2) == sch(nothing, 2) == 0.0
    with pytest.raises(ValueError, match="holds none"):
        simulate([1], 0, "lru")


@pytest.mark.parametrize("seed", range(3))
def test_local_routing_consistency_by_brute_force(seed: int) -> None:
    chosen, length = trace(seed, 12), 4
    pairs = [
        int(c[t : t + length, e].sum())
        for c in chosen
        for t in range(len(c) - length + 1)
        for e in range(c.shape[1])
    ]
    f1 = []
    for threshold in range(length + 1):
        picked = [p for p in pairs if p >= threshold]
        f1.append(2 * sum(picked) / (length * len(picked) + sum(pairs)))
    assert srp(chosen, length) == pytest.approx(max(f1))
    found = asked = 0
    for c in chosen:
        size = max(1, round(2 * c.sum() / len(c)))
        for t in range(len(c) - length + 1):
            counts = sorted(c[t : t + length].sum(0), reverse=True)
            found, asked = found + sum(counts[:size]), asked + sum(counts)
    assert sch(chosen, length) == pytest.approx(found / asked)


def test_one_group_for_all_tokens_is_perfectly_consistent() -> None:
    steady = [np.tile([True, True, False, False, False], (20, 1))]
    assert srp(steady, 8) == sch(steady, 8, 1.0) == 1.0
    turning = [np.eye(4, dtype=bool)[np.arange(32) % 4]]
    assert sch(turning, 8, 1.0) == 0.25
    assert srp(turning, 8) < 0.5


def test_recall() -> None:
    chosen = [np.array([[1, 1, 0]], bool)]
    assert recall([np.array([[1, 0, 1]], bool)], chosen) == 0.5
    assert recall(chosen, chosen) == 1.0
