"""Choose the next token from logits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import CarveRuntimeError, RequestError


class Sampler:
    """Greedy, or temperature sampling restricted by top-k, then by top-p.

    Args:
        temperature: 0 takes the most likely token (the lowest id on a tie).
        top_k: sample from the ``top_k`` most likely tokens; 0 does not restrict.
        top_p: sample from the fewest most likely tokens whose probabilities, after top-k,
            add up to at least ``top_p``; 1 does not restrict.
        seed: makes the draws reproducible; None draws from the operating system's entropy.

    Raises:
        RequestError: ``argument`` when a setting is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RequestError("argument", f"temperature must be finite and >= 0: {temperature}")
        if top_k < 0:
            raise RequestError("argument", f"top_k must be >= 0: {top_k}")
        if not 0 < top_p <= 1:
            raise RequestError("argument", f"top_p must be in (0, 1]: {top_p}")
        if seed is not None and seed < 0:
            raise RequestError("argument", f"seed must be >= 0: {seed}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def candidates(
        self, logits: NDArray[np.floating]
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The tokens that may be drawn and their probabilities, most likely first.

        Args:
            logits: floating [V]; ``-inf`` excludes a token.

        Returns:
            Token ids intp [n] and probabilities float64 [n] that add up to 1.

        Raises:
            CarveRuntimeError: ``non-finite`` when the largest logit is NaN or infinite.
        """
        best = int(np.argmax(logits))  # of the first NaN, if there is one
        if not math.isfinite(logits[best]):
            raise CarveRuntimeError(
                "non-finite", f"the model's logits are not finite (token {best}: {logits[best]})"
            )
        if self.temperature == 0:
            return np.array([best]), np.ones(1)
        ids = np.arange(logits.size)
        if 0 < self.top_k < logits.size:
            ids = np.sort(np.argpartition(logits, -self.top_k)[-self.top_k :])
        with np.errstate(over="ignore"):  # a tiny temperature may send the others to -inf
            scaled = (logits[ids].astype(np.float64) - float(logits[best])) / self.temperature
        weights = np.exp(scaled)
        weights /= weights.sum()
        if self.top_p < 1:
            # n tokens below (1 - p) / n cannot hold more than 1 - p together, so the nucleus is
            # among the others: sort those few, not the whole vocabulary.
            likely = np.flatnonzero(weights >= (1 - self.top_p) / weights.size)
            ids, weights = ids[likely], weights[likely]
        order = np.argsort(-weights, kind="stable")
        ids, weights = ids[order], weights[order]
        if self.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            ids, weights = ids[:keep], weights[:keep]
        return ids, weights / weights.sum()

    def __call__(self, logits: NDArray[np.floating]) -> int:
        """Draw one token id from logits [V]; see `candidates`."""
        ids, probabilities = self.candidates(logits)
        if ids.size == 1:
            return int(ids[0])
        cumulative = np.cumsum(probabilities)
        # side="right" steps over tokens of probability 0.
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), ids.size - 1)])
