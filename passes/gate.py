"""Gate: which tokens run through a block, and what the others get instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from carve.budget import BRIDGE_RANK
from carve.calibration import limit_batches
from carve.config import AT_LEAST_ONE
from carve.errors import UserError
from carve.gate_training import skip_losses, train_adapter, train_scores
from carve.gates import BRIDGES, SkipLesson, fit_gate, skipped_error, with_rate
from carve.passbase import Context, ContractError, Pass
from carve.program import Program
from carve.sites import Block, Gate
from carve.walk import set_gates

TRAINING = ("labels", "straight_through")
LABELS = ("error", "loss")


@dataclass(frozen=True)
class GateConfig:
    """Settings of `SkipGates`.

    ``bridge``: one of `carve.gates.BRIDGES`; ``adapter`` is a gated FFN of a sixteenth of the
    width. ``rank``: of a low-rank bridge. ``always``: the first tokens of a sequence that always
    run. ``tokens``: calibration tokens. ``strength``: ridge strength of the scores. ``label``: what
    scores are fitted to, ``error`` of the stream or ``loss`` of the next token. ``training``:
    ``labels`` (closed form) or ``straight_through``, which then trains the scores end to end.
    ``steps``: of that training. ``batch``: rows a step. ``rate``: of Adam, relative to the scores'
    size.
    """

    RANGES: ClassVar = {"tokens": AT_LEAST_ONE, "batch": AT_LEAST_ONE}

    bridge: str = "auto"
    rank: int = BRIDGE_RANK
    always: int = 2
    tokens: int = 32_768
    strength: float = 1e-2
    label: str = "error"
    training: str = "labels"
    steps: int = 80
    batch: int = 4
    rate: float = 0.02


@dataclass(frozen=True)
class GateMetrics:
    """By block: share of tokens asked to skip and skipped on calibration text, and the bridge.

    ``error``: squared error that skipping adds, of the block's squared output, on that text.
    """

    asked: dict[str, float]
    skipped: dict[str, float]
    bridge: dict[str, str]
    error: dict[str, float]
    tokens: int


class SkipGates(Pass[GateConfig]):
    """Gates that let a share of the tokens pass round a block.

    For each planned block in order: a bridge ``b(x) = C A x + c`` for tokens that skip, and scores
    ``s(x) = g x + t`` that order tokens by what skipping costs them,
    ``w |target - b(x)|^2 - w |target - y|^2``; ``target``, ``x`` and ``w`` are those of
    `carve.walk.walk_blocks`, so that a gate undoes what it can of those before it. Closed forms
    (`carve.gates.fit_gate`); the model itself is not trained. The threshold is a quantile of the
    scores on tokens that did not fit them, in a stream where all gates before are heard, so the
    asked share is the realised one. Keys and values stand outside the gate.

    Sources: FlexiDepth (arXiv 2503.23798) for gates on a frozen model and adapters, Router-Tuning
    (arXiv 2410.13184) for straight-through training, FiRST (arXiv 2410.12513).
    """

    name = "gate"

    def requires(self, program: Program, context: Context) -> None:
        """Needs a decoder where gates are planned, and known settings."""
        c = self.config
        for value, known, key in (
            (c.bridge, BRIDGES, "bridge"),
            (c.training, TRAINING, "training"),
            (c.label, LABELS, "label"),
        ):
            if value not in known:
                raise UserError("config", f"gate.{key} {value!r} is none of {', '.join(known)}")
        if context.skips and program.kind != "decoder":
            raise ContractError("contract", "gates need a causal decoder")

    def call(self, program: Program, context: Context) -> GateMetrics:
        """Fit every planned gate."""
        c = self.config
        blocks = [b for b in program.blocks if context.skips.get(b.name)]
        batches = limit_batches(context.batches, c.tokens)
        errors: dict[str, float] = {}
        count = 0

        def fit(labels: Mapping[str, Tensor]) -> None:
            def choose(block: Block, lesson: SkipLesson) -> Gate:
                nonlocal count
                gate = self._fit(block, lesson, labels.get(block.name), context)
                errors[block.name], count = skipped_error(gate, lesson), len(lesson.x)
                return gate

            def progress(items: Sequence[Block]) -> Iterator[Block]:
                return context.progress(items, self.name)

            set_gates(program, batches, blocks, c.always, choose, progress)

        fit({})
        if c.label == "loss":
            fit(skip_losses(program, batches))
        if c.training == "straight_through" and blocks:
            train_scores(
                program,
                batches,
                context.skips,
                c.steps,
                c.batch,
                c.rate,
                context.generator("gate"),
                lambda steps: context.progress(steps, f"{self.name} training"),
            )
            self.calibrate(program, context)
        names = [b.name for b in blocks]
        found = {b.name: b.gate for b in blocks if b.gate is not None}
        return GateMetrics(
            {n: context.skips[n] for n in names},
            {n: g.skip for n, g in found.items()},
            {n: _kind(g) for n, g in found.items()},
            errors,
            count,
        )

    def _fit(
        self, block: Block, lesson: SkipLesson, label: Tensor | None, context: Context
    ) -> Gate:
        c = self.config
        gate = fit_gate(
            lesson,
            context.skips[block.name],
            kind=c.bridge,
            rank=c.rank,
            always=c.always,
            strength=c.strength,
            label=label,
        )
        if c.bridge == "adapter":
            gate = train_adapter(gate, lesson, context.generator(f"adapter {block.name}"))
        return gate

    def calibrate(self, program: Program, context: Context) -> None:
        """Set all thresholds anew, each in the stream that the gates before it leave."""

        def choose(block: Block, lesson: SkipLesson) -> Gate:
            assert block.gate is not None
            return with_rate(block.gate, lesson.x, context.skips[block.name])

        batches = limit_batches(context.batches, self.config.tokens)
        set_gates(program, batches, program.gated, self.config.always, choose)

    def ensures(self, program: Program, context: Context) -> None:
        """Every planned block has its gate."""
        missing = [b.name for b in program.blocks if context.skips.get(b.name) and b.gate is None]
        if missing:
            raise ContractError("contract", f"no gate on {', '.join(missing)}")


def _kind(gate: Gate) -> str:
    if gate.bridge_gate is not None:
        return "adapter"
    if gate.bridge_in is not None:
        return "low_rank"
    return "identity" if gate.bridge_bias is None else "mean"
