"""Skip gates at run time: which mode they are in, and what they really skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import RequestError
from carve_runtime.manifest import GateInfo

SHIFT, SCORES, BARS = "gate_shift", "gate_scores", "gate_bars"
"""Names of the graph's input that moves all thresholds, [G], and of its outputs [B, S, G]: a token
runs through a block where its score is above its bar."""
Mode = Literal["token", "sequence", "off"]
MODES = ("token", "sequence", "off")
# Larger than any score, and small enough that the graph's own mark for tokens that always run,
# 1e30, outweighs it in float32.
_BEYOND = 1e20


@dataclass(frozen=True, slots=True)
class GateStats:
    """What the gates of one sequence skipped.

    Attributes:
        names: the gated blocks.
        asked: share of tokens that each was calibrated to skip.
        skipped: share of all tokens that each skipped.
        by_position: share of the gated blocks that each position skipped, [tokens].
        prompt: share over all gates of the prompt's tokens, and ``generated`` of the others.
        generated: see ``prompt``; 0 where none was generated.
    """

    names: tuple[str, ...]
    asked: tuple[float, ...]
    skipped: tuple[float, ...]
    by_position: NDArray[np.float32]
    prompt: float
    generated: float

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "blocks": {
                n: {"asked": a, "skipped": s}
                for n, a, s in zip(self.names, self.asked, self.skipped, strict=True)
            },
            "by_position": [round(float(v), 4) for v in self.by_position],
            "prompt": self.prompt,
            "generated": self.generated,
        }


class Gates:
    """The gates of one sequence.

    In mode ``token`` every token decides for itself. In mode ``sequence`` (FiRST, arXiv
    2410.12513) the prompt does, and then its tokens decide together: of the ``G`` gates the
    ``sum of the asked shares`` with the lowest mean score, relative to the others', are shut for
    all that is generated; the condition of every branch is then known before a step begins. ``off``
    leaves all open.

    Raises:
        RequestError: ``argument`` for another mode.
    """

    def __init__(self, infos: Sequence[GateInfo], mode: str) -> None:
        if mode not in MODES:
            raise RequestError("argument", f"gates {mode!r} is none of {', '.join(MODES)}")
        self.infos, self.mode = tuple(infos), cast("Mode", mode)
        self.shift = np.zeros(len(infos), np.float32)
        if mode == "off":
            self.shift[:] = _BEYOND
        self._scores: list[NDArray[np.bool_]] = []
        self._prompt = 0
        self._planned = False

    def __bool__(self) -> bool:
        return bool(self.infos)

    def feeds(self) -> Mapping[str, NDArray[np.float32]]:
        """What the graph needs to be told; nothing where it does what it does by itself."""
        return {SHIFT: self.shift} if self.infos and self.shift.any() else {}

    def seen(self, scores: NDArray[np.float32], bars: NDArray[np.float32]) -> None:
        """Take note of a step's scores and bars [1, S, G]; several tokens at once are a prompt."""
        runs = scores[0] > bars[0]
        self._scores.append(runs)
        if len(runs) > 1:
            self._prompt = sum(len(r) for r in self._scores)
        if self.mode == "sequence" and not self._planned:
            self._plan((scores - bars)[0])

    def _plan(self, scores: NDArray[np.float32]) -> None:
        late = scores[(scores < _BEYOND).all(1)]
        if not len(late):  # nothing but tokens that always run
            return
        spread = late.std(0) + 1e-6 * np.abs(late).max() + 1e-12
        order = np.argsort(late.mean(0) / spread, kind="stable")
        count = round(sum(i.skip for i in self.infos))
        self.shift[:] = _BEYOND
        self.shift[order[:count]] = -_BEYOND
        self._planned = True

    def stats(self) -> GateStats:
        """What was skipped so far."""
        runs = np.concatenate(self._scores) if self._scores else np.ones((0, len(self.infos)), bool)
        skipped = 1.0 - runs.astype(np.float32)

        def mean(part: NDArray[np.float32]) -> float:
            return float(part.mean()) if part.size else 0.0

        return GateStats(
            tuple(i.name for i in self.infos),
            tuple(i.skip for i in self.infos),
            tuple(mean(skipped[:, g]) for g in range(len(self.infos))),
            skipped.mean(1) if len(self.infos) else np.zeros(len(skipped), np.float32),
            mean(skipped[: self._prompt]),
            mean(skipped[self._prompt :]),
        )
