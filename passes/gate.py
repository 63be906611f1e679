"""Gate: which tokens run through a block, and what the others get instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve.budget import BRIDGE_RANK
from carve.calibration import Batch, limit_batches
from carve.errors import UserError
from carve.executor import Pauses
from carve.gates import BRIDGES, SkipLesson, fit_gate, skipped_error, with_rate
from carve.passbase import Context, ContractError, Pass
from carve.program import Program
from carve.sites import Block, Gate
from carve.tuning import cosine, mixed_precision, shuffled
from carve.walk import walk_blocks

TRAINING = ("labels", "straight_through")


@dataclass(frozen=True)
class GateConfig:
    """Settings of `SkipGates`.

    ``bridge``: one of `carve.gates.BRIDGES`; ``adapter`` is a gated FFN of a sixteenth of the
    width. ``rank``: of a low-rank bridge. ``always``: the first tokens of a sequence that always
    run. ``tokens``: calibration tokens. ``strength``: ridge strength of the scores. ``training``:
    ``labels`` (closed form) or ``straight_through``, which then trains the scores end to end for
    ``steps`` steps of ``batch`` rows at Adam's ``rate`` relative to their size.
    """

    bridge: str = "auto"
    rank: int = BRIDGE_RANK
    always: int = 2
    tokens: int = 32_768
    strength: float = 1e-2
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
        gates: dict[str, Gate] = {}
        errors: dict[str, float] = {}
        count = 0
        steps = walk_blocks(
            program, batches, blocks, c.always, lambda b: context.progress(b, self.name)
        )
        sent: Gate | None = None
        try:
            block, lesson = next(steps)
            while True:
                sent = self._fit(block, lesson, context)
                gates[block.name], errors[block.name] = sent, skipped_error(sent, lesson)
                count = len(lesson.x)
                block, lesson = steps.send(sent)
        except StopIteration:
            pass
        for block in blocks:
            program.set_gate(block, gates[block.name])
        if c.training == "straight_through" and blocks:
            self._train(program, context, batches)
            self._calibrate(program, context, batches)
        names = [b.name for b in blocks]
        found = {b.name: b.gate for b in blocks if b.gate is not None}
        return GateMetrics(
            {n: context.skips[n] for n in names},
            {n: g.skip for n, g in found.items()},
            {n: _kind(g) for n, g in found.items()},
            errors,
            count,
        )

    def _fit(self, block: Block, lesson: SkipLesson, context: Context) -> Gate:
        c = self.config
        rate = context.skips[block.name]
        gate = fit_gate(
            lesson, rate, kind=c.bridge, rank=c.rank, always=c.always, strength=c.strength
        )
        if c.bridge == "adapter":
            gate = self._adapter(gate, lesson, context.generator(f"adapter {block.name}"))
        return gate

    def _adapter(self, gate: Gate, lesson: SkipLesson, generator: torch.Generator) -> Gate:
        """A gated FFN ``C (silu(G x) * A x) + c`` in place of the linear bridge, for what it skips.

        As in FlexiDepth, of a sixteenth of the model's FFN width, here four times the hidden size
        over sixteen; Adam on the tokens that the gate skips.
        """
        rows = (gate.scores(lesson.x) <= 0).nonzero().squeeze(1)
        part = lesson.rows(rows)
        width, out = part.x.shape[1], part.target.shape[1]
        size = max(8, width // 4)
        scale = part.x.square().mean().sqrt().clamp_min(1e-6) * width**0.5

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / scale)

        a, g = random(size, width), random(size, width)
        low, c = nn.Parameter(torch.zeros(out, size)), nn.Parameter(part.target.mean(0))
        parameters = [a, g, low, c]
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        steps = 200
        for step, pick in enumerate(shuffled(len(part.x), 1024, steps, generator)):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * cosine(step, steps)
            x = part.x[pick]
            y = F.linear(F.silu(F.linear(x, g)) * F.linear(x, a), low, c)
            loss = (part.weight[pick, None] * (y - part.target[pick]).square()).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return replace(
            gate,
            bridge_in=a.detach(),
            bridge_gate=g.detach(),
            bridge_out=low.detach(),
            bridge_bias=c.detach(),
        )

    def _train(self, program: Program, context: Context, batches: list[Batch]) -> None:
        """Scores by the gradient of the end-to-end KL through a straight-through mask.

        The mask is hard going forward and ``sigmoid(s / temperature)`` going back, with scores
        scaled to unit deviation; a penalty holds each gate's share of running tokens.
        """
        c = self.config
        blocks = program.gated
        rows = [b.rows(i, i + 1) for b in batches for i in range(len(b.inputs[0]))]
        scores: dict[str, nn.Linear] = {}
        for b in blocks:
            assert b.gate is not None
            linear = nn.Linear(len(b.gate.weight), 1)
            with torch.no_grad():
                linear.weight.copy_(b.gate.weight[None])
                linear.bias.copy_(b.gate.bias)
            scores[b.name] = linear
        groups = [
            {"params": [p], "lr": c.rate * float(s.weight.detach().square().mean().sqrt())}
            for s in scores.values()
            for p in (s.weight, s.bias)
        ]
        base = [float(g["lr"]) for g in groups]  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(groups)
        generator = context.generator("gate")
        picks = [*shuffled(len(rows), c.batch, c.steps, generator)]
        place = program.inputs.index("position_ids")
        for step, pick in enumerate(context.progress(picks, f"{self.name} training")):
            chosen = [rows[int(i)].inputs for i in pick]
            inputs = tuple(torch.cat(parts) for parts in zip(*chosen, strict=True))
            with mixed_precision():
                dense = program.run(*inputs, gates=False)[0].float().log_softmax(-1)
                logits, rates = self._forward(program, inputs, scores, inputs[place])
            kl = (dense.exp() * (dense - logits.float().log_softmax(-1))).sum(-1).mean()
            want = torch.tensor([context.skips[b.name] for b in blocks])
            loss = kl + (rates - (1.0 - want)).square().sum()
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * cosine(step, c.steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        for b in blocks:
            assert b.gate is not None
            linear = scores[b.name]
            weight, bias = linear.weight.detach()[0].clone(), linear.bias.detach().clone()
            program.set_gate(b, replace(b.gate, weight=weight, bias=bias))

    def _forward(
        self,
        program: Program,
        inputs: tuple[Tensor, ...],
        scores: dict[str, nn.Linear],
        position: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits, and each gate's share of running tokens (with its gradient)."""
        steps = program.steps(*inputs, pauses=Pauses(after=program.gated), only_first=True)
        rates: list[Tensor] = []
        try:
            at = next(steps)
            while True:
                gate = at.site.gate
                assert gate is not None
                assert at.y is not None
                s = scores[at.site.name](at.x.float()).squeeze(-1)
                soft = torch.sigmoid(s / s.detach().std().clamp_min(1e-6))
                late = position >= gate.always
                hard = (s.detach() > 0) | ~late
                mask = hard.float() + (soft - soft.detach()) * late
                rates.append(mask[late].mean())
                other = gate.bridge(at.x)
                at = steps.send(other + mask[..., None] * (at.y - other))
        except StopIteration as stop:
            return stop.value[0], torch.stack(rates)

    def _calibrate(self, program: Program, context: Context, batches: list[Batch]) -> None:
        """Set all thresholds anew, each in the stream that the gates before it leave."""
        blocks = program.gated
        moved: dict[str, Gate] = {}
        steps = walk_blocks(program, batches, blocks, self.config.always)
        try:
            block, lesson = next(steps)
            while True:
                assert block.gate is not None
                moved[block.name] = with_rate(block.gate, lesson.x, context.skips[block.name])
                block, lesson = steps.send(moved[block.name])
        except StopIteration:
            pass
        for block in blocks:
            program.set_gate(block, moved[block.name])

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
