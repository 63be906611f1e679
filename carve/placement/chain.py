"""Affinity solved exactly: layers form a chain, and its best path can be found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carve.placement.problem import Homes, Problem, one_hot

MOST_STATES = 6_000
"""Placements of one layer up to which the best path through all layers is searched for."""


def states_of(counts: NDArray[np.intp]) -> int:
    """Placements of a layer with so many experts on each device: ``E! / prod_d K_d!``."""
    places = math.factorial(int(counts.sum()))
    return places // math.prod(math.factorial(int(k)) for k in counts)


def best_chain(problem: Problem, counts: Sequence[NDArray[np.intp]]) -> Homes:
    """The placement of fewest hops with these counts, memory not asked (Viterbi).

    A layer's placement is a state; ``together(s, s') = sum_(e, f) w[e, f] [s_e = s'_f]`` between
    neighbours is one matrix product of one-hot states, and what is best up to each state of a layer
    follows from the layer before. Time ``L S^2 E D``, for ``S`` states.
    """
    states = [_placements(tuple(int(k) for k in c)) for c in counts]
    best = np.zeros(len(states[0]))
    back: list[NDArray[np.intp]] = []
    for i, w in enumerate(problem.transitions):
        before, after = (one_hot(s, len(counts[0])) for s in (states[i], states[i + 1]))
        reach = np.einsum("sed,ef->sfd", before, w).reshape(len(before), -1)
        flat = after.reshape(len(after), -1)
        parts = [best[:, None] + reach @ part.T for part in np.array_split(flat, _parts(len(flat)))]
        back.append(np.concatenate([p.argmax(0) for p in parts]))
        best = np.concatenate([p.max(0) for p in parts])
    at = int(best.argmax())
    homes = [states[-1][at]]
    for i in reversed(range(len(back))):
        at = int(back[i][at])
        homes.append(states[i][at])
    return homes[::-1]


def _parts(count: int) -> int:
    return -(-count // 512)


def _placements(counts: tuple[int, ...]) -> NDArray[np.intp]:
    """Every placement ``[S, E]`` with so many experts on each device."""
    size = sum(counts)
    found = np.zeros((1, size), np.intp) - 1
    for d, k in enumerate(counts):
        rows = []
        for row in found:
            free = np.flatnonzero(row < 0)
            for chosen in itertools.combinations(free, k):
                filled = row.copy()
                filled[list(chosen)] = d
                rows.append(filled)
        found = np.array(rows)
    return found
