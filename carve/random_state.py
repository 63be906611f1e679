"""The global random generators. Passes use `Context.generator`; what they call may not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Where the generators of torch, numpy and Python stand."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys, np.int64), *rest),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators where `random_states` saw them."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.astype(np.uint32), *rest))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generators at ``seed`` in the block, and afterwards where they were."""
    before = random_states()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        set_random_states(before)
