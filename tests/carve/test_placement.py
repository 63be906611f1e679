"""What placing promises: memory is kept, bounds hold, and small problems are solved exactly."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carve.errors import UserError
from carve.placement.affinity import affinity, improve, matching_bound
from carve.placement.chain import best_chain
from carve.placement.counts import counts_by_speed, equal_counts
from carve.placement.devices import Device, Devices, Link
from carve.placement.layered import LAYERED
from carve.placement.oracle import Oracle
from carve.placement.place import METHODS, PlaceSettings, place
from carve.placement.problem import OBJECTIVES, Homes, Problem, hops, layer_latency
from carve.placement.result import Placement
from carve.placement.search import LayeredSearch
from carve.placement.solver import GAP
from carve.placement.trace import Trace


def trace_of(experts: list[int], tokens: int, seed: int) -> Trace:
    g = np.random.default_rng(seed)
    chosen = []
    for e in experts:
        likes = g.dirichlet(np.ones(e)) * min(e, 2)
        mask = g.random((tokens, e)) < likes
        mask[np.arange(tokens), g.integers(0, e, tokens)] = True
        chosen.append(mask)
    return Trace(tuple(f"layers.{i}" for i in range(len(experts))), tuple(chosen))


def problem_of(
    experts: list[int], devices: int, room: float, seed: int = 0, tokens: int = 64
) -> Problem:
    """Unequal devices with ``room`` times the memory that all experts need."""
    g = np.random.default_rng(seed)
    nbytes = [g.choice([1e6, 2e6], e) for e in experts]
    need = sum(float(b.sum()) for b in nbytes)
    share = g.dirichlet(np.full(devices, 3.0))
    described = tuple(
        Device(f"d{i}", float(np.ceil(need * room * s)), 10.0 ** g.uniform(9, 11), 1e10 * (i + 1))
        for i, s in enumerate(share)
    )
    links = {frozenset(("d0", f"d{i}")): Link(1e9, 1e-5) for i in range(1, devices)}
    return Problem(
        Devices(described, links),
        trace_of(experts, tokens, seed),
        nbytes,
        [2 * b for b in nbytes],
        4_096.0,
        host_macs=[1e6] * len(experts),
        host_reads=[1e6] * len(experts),
        batch=4,
    )


def every_placement(problem: Problem) -> list[Homes]:
    """All placements that fit."""
    shapes = [len(b) for b in problem.nbytes]
    found = []
    for flat in itertools.product(range(len(problem.devices)), repeat=sum(shapes)):
        homes = [np.array(h) for h in np.split(np.array(flat), np.cumsum(shapes)[:-1])]
        if problem.fits(homes):
            found.append(homes)
    return found


def homes_of(placed: Placement) -> Homes:
    return placed.homes


@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    experts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    devices=st.integers(1, 3),
    room=st.floats(0.7, 1.6),
    seed=st.integers(0, 10_000),
    objective=st.sampled_from(["throughput", "latency", "affinity"]),
)
def test_memory_is_never_exceeded(
    experts: list[int], devices: int, room: float, seed: int, objective: str
) -> None:
    problem = problem_of(experts, devices, room, seed)
    try:
        placed = place(problem, PlaceSettings(objective, 1.0))
    except UserError as e:
        assert e.code == "infeasible"
        assert "memory" in e.message or "room" in e.message
        return
    homes = homes_of(placed)
    assert (problem.used(homes) <= problem.caps + 1e-6).all()
    assert [len(h) for h in homes] == experts
    assert placed.value == pytest.approx(OBJECTIVES[objective](problem, homes))
    assert placed.bound <= placed.value * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("seed", range(6))
def test_small_problems_are_solved_to_the_gap(objective: str, seed: int) -> None:
    problem = problem_of([4, 3], 2, 1.15, seed)
    possible = every_placement(problem)
    if not possible:
        with pytest.raises(UserError, match="memory"):
            place(problem, PlaceSettings(objective, 5.0))
        return
    best = min(OBJECTIVES[objective](problem, h) for h in possible)
    placed = place(problem, PlaceSettings(objective, 5.0))
    assert placed.bound <= best * (1 + 1e-9)
    assert placed.value <= best * 1.1  # columns of two layers leave a little; many layers less
    assert placed.gap == pytest.approx(1 - placed.bound / placed.value)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_a_layers_programme_finds_what_trying_all_finds(objective: str, solver: str) -> None:
    problem = problem_of([5], 3, 3.0, seed=4)
    oracle = Oracle(problem, objective, solver)
    prices = np.array([0.0, 1e-7, 3e-7])
    tried, least = oracle.best(0, prices, 5.0)
    searched, bound = oracle._search(0, prices, 5.0, None, None)
    assert tried is not None
    assert searched is not None
    assert searched.value + searched.used @ prices == pytest.approx(least, rel=2 * GAP)
    assert bound == pytest.approx(least, rel=2 * GAP)
    assert set(LAYERED) == {"throughput", "latency"}


def test_one_placement_costs_what_it_costs_among_others() -> None:
    problem = problem_of([5, 5], 3, 1.3)
    many = np.random.default_rng(0).integers(0, len(problem.devices), (7, 5))
    for layer in range(2):
        together = layer_latency(problem, layer, many)
        assert [layer_latency(problem, layer, one) for one in many] == pytest.approx(together)


def test_programmes_take_over_where_placements_are_too_many() -> None:
    problem = problem_of([24, 24], 4, 1.2, seed=2)
    found = LayeredSearch(problem, "throughput", 8.0)()
    assert problem.fits(found.homes)
    assert 0 < found.bound <= found.value
    assert 1 - found.bound / found.value < 0.1


def test_the_chain_is_the_best_of_all_and_the_programme_agrees() -> None:
    problem = problem_of([4, 4, 4], 2, 4.0, seed=3)
    counts = equal_counts(problem)
    homes = best_chain(problem, counts)
    even = [
        h for h in every_placement(problem) if all(np.bincount(x, minlength=2)[0] == 2 for x in h)
    ]
    best = min(hops(problem, h) for h in even)
    assert 0 < matching_bound(problem, counts) <= best
    assert hops(problem, homes) == pytest.approx(best)
    assert hops(problem, improve(problem, even[0], counts)) >= best - 1e-9
    # One device too small for what the chain would put there: the programme has to step in.
    tight = replace(problem, nbytes=[np.array([1e6, 1e6, 1e6, 3e6])] * 3)
    found = affinity(tight, counts, 10.0)
    assert found.bound <= found.value
    assert tight.fits(found.homes)


def test_affinity_programme_proves_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of([4, 4, 4], 2, 4.0, seed=3)
    counts = equal_counts(problem)
    exact = hops(problem, best_chain(problem, counts))
    monkeypatch.setattr("carve.placement.affinity.MOST_STATES", 0)
    found = affinity(problem, counts, 20.0)
    assert found.value == pytest.approx(exact)
    assert found.bound == pytest.approx(exact, rel=2 * GAP)


def test_counts_follow_speed_and_memory() -> None:
    problem = problem_of([8, 8], 2, 4.0, seed=1)
    counts = counts_by_speed(problem)
    speed = [d.bandwidth for d in problem.devices.devices]
    assert speed[1] > speed[0]
    assert all(c[1] > c[0] and c.sum() == 8 for c in counts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_places_every_expert(method: str) -> None:
    problem = problem_of([4, 4], 2, 6.0, seed=7)
    placed = place(problem, PlaceSettings(method, 4.0))
    assert problem.fits(homes_of(placed))
    assert placed.as_dict()["assignment"].keys() == set(problem.trace.layers)
    assert placed.value > 0


def test_replicas_save_time_within_memory() -> None:
    problem = problem_of([6, 6], 3, 3.0, seed=5)
    one = place(problem, PlaceSettings("throughput", 3.0))
    many = place(problem, PlaceSettings("throughput", 3.0, replicas=3))
    assert many.value < one.value
    assert many.bound <= many.value
    used = np.zeros(3)
    for size, layer in zip(problem.nbytes, many.assignment, strict=True):
        for b, held in zip(size, layer, strict=True):
            assert len(set(held)) == len(held) <= 3
            used[list(held)] += b
    assert (used <= problem.caps + 1e-6).all()
    with pytest.raises(UserError, match="throughput only"):
        PlaceSettings("latency", replicas=2)


def test_what_is_infeasible_is_named() -> None:
    problem = problem_of([4, 4], 2, 2.0)
    full = replace(problem, host_bytes=1e12)
    with pytest.raises(UserError, match="memory of 'd0': attention"):
        place(full, PlaceSettings())
    small = problem_of([4, 4], 2, 0.8)
    with pytest.raises(UserError, match="memory of all devices together"):
        place(small, PlaceSettings())
    # Two experts of 3 MB do not fit into three devices of 2.5 MB, whole as they are.
    devices = tuple(replace(d, memory=2.5e6) for d in problem_of([2], 3, 1.0).devices.devices)
    whole = replace(
        problem_of([2], 3, 1.0), devices=Devices(devices, problem_of([2], 3, 1.0).devices.links)
    )
    with pytest.raises(UserError, match="largest room on one device"):
        place(replace(whole, nbytes=[np.array([3e6, 3e6])]), PlaceSettings())
    with pytest.raises(UserError, match="not whole ones"):
        place(
            replace(
                whole, trace=trace_of([4], 32, 0), nbytes=[np.full(4, 1.5e6)], macs=[np.ones(4)]
            ),
            PlaceSettings(),
        )


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'latency'"):
        PlaceSettings("latancy")
    with pytest.raises(UserError, match="did you mean 'highs'"):
        PlaceSettings(solver="high")


def test_solvers_keep_standard_output_clean() -> None:
    code = (
        "import pulp; from carve.placement.solver import solve\n"
        "m = pulp.LpProblem('a', pulp.LpMinimize); x = pulp.LpVariable('x', cat='Binary')\n"
        "m += x >= 1; m += x\n"
        "for s in ('highs', 'cbc'):\n"
        "    assert solve(m, 5.0, solver=s).value == 1.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
