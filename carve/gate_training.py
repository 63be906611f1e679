"""What of a skip gate is trained by gradient: adapters, and scores end to end. Both are options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve.calibration import Batch
from carve.executor import Pauses
from carve.gates import SkipLesson
from carve.program import Program
from carve.sites import AtSite, Gate
from carve.tuning import cosine, mixed_precision, shuffled


def skip_losses(program: Program, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By gated block, what skipping it costs each token at once, ``[T]``, in a lesson's order.

    ``KL(p_t || q_t)`` in nats with ``p`` the next token's distribution with all gates open and
    ``q`` with this block shut for every token; the tokens that always run are left out. An error
    of the stream is cheaper to measure; this one knows what the rest of the model makes of it.
    """
    place = program.inputs.index("position_ids")
    parts: dict[str, list[Tensor]] = {b.name: [] for b in program.gated}
    for batch in batches:
        position = batch.inputs[place]
        with torch.no_grad():
            p = program.run(*batch.inputs, gates=False)[0].flatten(0, 1).log_softmax(-1)
            for block in program.gated:
                assert block.gate is not None
                shut = replace(block.gate, bias=torch.full_like(block.gate.bias, -1e9))
                logits = program.answered(
                    *batch.inputs,
                    pauses=Pauses(after=[block], gates=False),
                    answer=partial(_through, shut, position),
                    only_first=True,
                )[0]
                q = logits.flatten(0, 1).log_softmax(-1)
                late = (position >= shut.always).reshape(-1)
                parts[block.name].append((p.exp() * (p - q)).sum(-1)[late])
    return {name: torch.cat(each) for name, each in parts.items()}


def _through(gate: Gate, position: Tensor, at: AtSite) -> Tensor:
    """The block's result behind ``gate``."""
    assert at.y is not None
    return gate(at.y, at.x, position)


def train_adapter(
    gate: Gate, lesson: SkipLesson, generator: torch.Generator, steps: int = 200, rate: float = 3e-3
) -> Gate:
    """A gated FFN ``C (silu(G x) * A x) + c`` in place of the linear bridge, for what it skips.

    As in FlexiDepth (arXiv 2503.23798), of about a sixteenth of an FFN's width: a quarter of the
    hidden size. Adam on the weighted squared error over the tokens that the gate skips.
    """
    part = lesson.rows((gate.scores(lesson.x) <= 0).nonzero().squeeze(1))
    width, out = part.x.shape[1], part.target.shape[1]
    size = max(8, width // 4)
    scale = float(part.x.square().mean().sqrt().clamp_min(1e-6)) * width**0.5

    def random(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator) / scale)

    into, gating = random(size, width), random(size, width)
    back, bias = nn.Parameter(torch.zeros(out, size)), nn.Parameter(part.target.mean(0))
    optimizer = torch.optim.Adam([into, gating, back, bias], lr=rate)
    for step, pick in enumerate(shuffled(len(part.x), 1024, steps, generator)):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps)
        x = part.x[pick]
        y = F.linear(F.silu(F.linear(x, gating)) * F.linear(x, into), back, bias)
        loss = (part.weight[pick, None] * (y - part.target[pick]).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return replace(
        gate,
        bridge_in=into.detach(),
        bridge_gate=gating.detach(),
        bridge_out=back.detach(),
        bridge_bias=bias.detach(),
    )


def train_scores(
    program: Program,
    batches: Sequence[Batch],
    skips: Mapping[str, float],
    steps: int,
    batch: int,
    rate: float,
    generator: torch.Generator,
    progress: Callable[[Sequence[Any]], Iterator[Any]] = iter,
) -> None:
    """Scores by the gradient of the end-to-end KL through a straight-through mask.

    As in Router-Tuning (arXiv 2410.13184): everything but the scores is frozen. The mask is hard
    going forward and ``sigmoid(s / std s)`` going back; the squared distance of each gate's running
    share from ``1 - skips`` is added to the loss. The caller sets the thresholds anew.

    Args:
        program: with its gates; they are replaced.
        batches: calibration text.
        skips: by gated block, the share of tokens to skip.
        steps: of Adam.
        batch: rows a step.
        rate: step size relative to the size of each gate's weights.
        generator: draws the rows.
        progress: shows the steps.
    """
    blocks = program.gated
    rows = [b.rows(i, i + 1) for b in batches for i in range(len(b.inputs[0]))]
    scores: dict[str, nn.Linear] = {}
    groups: list[dict[str, Any]] = []
    for b in blocks:
        assert b.gate is not None
        linear = nn.Linear(len(b.gate.weight), 1)
        with torch.no_grad():
            linear.weight.copy_(b.gate.weight[None])
            linear.bias.copy_(b.gate.bias)
        scores[b.name] = linear
        lr = rate * float(b.gate.weight.square().mean().sqrt())
        groups.append({"params": list(linear.parameters()), "lr": lr, "base": lr})
    optimizer = torch.optim.Adam(groups)
    want = torch.tensor([1.0 - skips[b.name] for b in blocks])
    place = program.inputs.index("position_ids")
    for step, pick in enumerate(progress([*shuffled(len(rows), batch, steps, generator)])):
        chosen = [rows[int(i)].inputs for i in pick]
        inputs = tuple(torch.cat(parts) for parts in zip(*chosen, strict=True))
        with mixed_precision():
            dense = program.run(*inputs, gates=False)[0].float().log_softmax(-1)
            logits, shares = _forward(program, inputs, scores, inputs[place])
        kl = (dense.exp() * (dense - logits.float().log_softmax(-1))).sum(-1).mean()
        loss = kl + (shares - want).square().sum()
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * cosine(step, steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    for b in blocks:
        assert b.gate is not None
        linear = scores[b.name]
        weight, bias = linear.weight.detach()[0].clone(), linear.bias.detach().clone()
        program.set_gate(b, replace(b.gate, weight=weight, bias=bias))


def _forward(
    program: Program,
    inputs: tuple[Tensor, ...],
    scores: Mapping[str, nn.Linear],
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits, and each gate's share of running tokens, with their gradients."""
    shares: list[Tensor] = []

    def answer(at: AtSite) -> Tensor:
        gate = at.block.gate
        assert gate is not None
        assert at.y is not None
        s = scores[at.site.name](at.x.float()).squeeze(-1)
        soft = torch.sigmoid(s / s.detach().std().clamp_min(1e-6))
        late = position >= gate.always
        hard = (s.detach() > 0) | ~late
        mask = hard.float() + (soft - soft.detach()) * late
        shares.append(mask[late].mean())
        other = gate.bridge(at.x)
        y: Tensor = other + mask[..., None] * (at.y - other)
        return y

    pauses = Pauses(after=program.gated)
    logits = program.answered(*inputs, pauses=pauses, answer=answer, only_first=True)[0]
    return logits, torch.stack(shares)
