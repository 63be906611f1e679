"""What passes that train the whole program share: its loss against the dense one, and the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve import training_state
from carve.calibration import Batch
from carve.config import AT_LEAST_ONE
from carve.passbase import Context
from carve.program import Kind, Program
from carve.retell import tokens_in
from carve.tuning import cosine, short_warmup

LEAST_STEPS = 8
"""Fewer than so many steps are not worth a beginning."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of passes that train the whole program.

    ``tokens``: seen in all at the most. ``rounds``: times that text is repeated at the most.
    ``work``: multiply-accumulates at the most, 0 for no limit, which leaves a large program fewer
    tokens; where they make fewer than 8 steps, nothing is done. ``batch``: tokens a step, as far as
    batches go, which are split and not joined. ``save_seconds``: time between states to go on from.
    ``judge``: keep the pass only where the program's loss gets lower. ``labels``: weight of the
    text's own tokens beside the dense program's predictions, 0 to 1, for decoders.
    """

    RANGES: ClassVar = {"batch": AT_LEAST_ONE, "labels": (0, 1)}

    tokens: int = 1_000_000
    rounds: int = 16
    work: float = 0.0
    batch: int = 4096
    save_seconds: float = 60.0
    judge: bool = True
    labels: float = 0.0

    def tokens_for(self, parameters: int, distinct: int) -> int:
        """Tokens for so many parameters, each in two products forward and two backward.

        ``distinct``: tokens that there are.
        """
        allowed = int(self.work / (4 * parameters)) if self.work else self.tokens
        return min(self.tokens, self.rounds * distinct, allowed)

    def serves(self, program: Program) -> bool:
        """Whether anything is done for a program."""
        return True

    def told(self, dense: Program, given: int) -> int:
        """Distinct tokens to be told for the pass alone, besides the given ones."""
        return 0

    def plan(
        self, program: Program, batches: Sequence[Batch], generator: torch.Generator
    ) -> list[Batch]:
        """A batch for every step; none where there would be fewer than `LEAST_STEPS`."""
        if not self.serves(program):
            return []
        parts = in_parts(batches, self.batch)
        tokens = self.tokens_for(program.num_parameters, tokens_in(parts))
        plan = in_order(parts, tokens, generator)
        return plan if len(plan) >= LEAST_STEPS else []


class _Divergence(torch.autograd.Function):
    """``KL(p || q)`` of logits ``[T, V]``, and of labels ``[T]`` beside; see `divergence`.

    With ``t = (1 - w) p + w e_y`` the gradient is ``(q - t) / T``; a label below 0 is none. Some
    rows at a time, for both distributions and what autograd would keep of them are several times
    the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, want: Tensor, have: Tensor, labels: Tensor | None, weight: float
    ) -> Tensor:
        gradient = torch.empty_like(have)
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(have), 256):
            part = slice(start, start + 256)
            p, q = want[part].float().log_softmax(-1), have[part].float().log_softmax(-1)
            target = p.exp()
            if labels is not None:
                index = labels[part, None]
                share = torch.where(index < 0, 0.0, weight)
                target *= 1.0 - share
                target.scatter_add_(1, index.clamp_min(0), share)
            total += (target * (p - q)).sum()
            gradient[part] = (q.exp() - target) / len(have)
        ctx.save_for_backward(gradient)
        return (total / len(have)).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0], None, None


def divergence(kind: Kind, want: Tensor, have: Tensor, batch: Batch, labels: float = 0.0) -> Tensor:
    """How far a program's first result is from the dense one's, a scalar with a gradient.

    ``E_t (1 - w) KL(p(. | x_<t) || q(. | x_<t)) + w log(p(x_t) / q(x_t))`` in nats for a decoder,
    with ``p`` of the logits ``want`` and ``q`` of ``have`` ``[B, S, V]``, ``x`` the text of
    ``batch`` and ``w`` the weight ``labels``, 0 for text that the dense program told; else
    ``|have - want|^2 / |want|^2`` over tokens that count. Source: Hinton et al. (arXiv 1503.02531),
    temperature 1.
    """
    if kind == "decoder":
        text = None
        if labels and not batch.told:
            text = F.pad(batch.inputs[0][:, 1:], (0, 1), value=-1).flatten()
        rows = (t.flatten(0, 1) for t in (want, have))
        found: Tensor = _Divergence.apply(*rows, text, labels)  # type: ignore[no-untyped-call]
        return found
    want, have = want.float(), have.float()
    if batch.mask is not None and want.ndim == 3:
        want, have = want[batch.mask], have[batch.mask]
    return (have - want).square().sum() / want.square().sum()


def in_parts(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The batches in parts of whole rows, each of about ``tokens`` tokens at the most."""
    found = []
    for batch in batches:
        count = len(batch.inputs[0])
        size = max(1, tokens * count // max(1, batch.tokens))
        found += [batch.rows(i, min(count, i + size)) for i in range(0, count, size)]
    return found


def in_order(batches: Sequence[Batch], tokens: int, generator: torch.Generator) -> list[Batch]:
    """Batches in a new order each time round, as many as ``tokens`` tokens allow."""
    sizes = [b.tokens for b in batches]

    def each() -> Iterator[Batch]:
        left = tokens
        while True:
            for i in torch.randperm(len(sizes), generator=generator).tolist():
                if left < sizes[i]:
                    return
                left -= sizes[i]
                yield batches[i]

    return list(each())


def train(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    loss: Callable[[Batch], Tensor],
    context: Context,
    label: str,
    *,
    save_seconds: float,
    after_step: Callable[[Batch], object] = lambda _: None,
) -> list[float]:
    """A step on each of ``batches``, with a cosine and a bound on the gradient.

    Groups of the optimizers have their step size as ``base``. The state is kept in
    ``context.partial`` every ``save_seconds``, and training goes on from the one that is there.

    Returns:
        The losses, also of steps done before the run was killed.
    """
    losses: list[float] = []
    first = training_state.load(context.partial, model, optimizers, losses)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    warmup = short_warmup(len(batches))
    saved = time.monotonic()
    for step in context.progress(range(first, len(batches)), label):
        value = loss(batches[step])
        model.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * cosine(step, len(batches), warmup)
            optimizer.step()
        after_step(batches[step])
        losses.append(value.item())
        if time.monotonic() - saved > save_seconds:
            training_state.save(context.partial, model, optimizers, step + 1, losses)
            saved = time.monotonic()
    return losses


def quarters(losses: Sequence[float]) -> list[float]:
    """Mean loss over quarters of the steps."""
    ends = [i * len(losses) // 4 for i in range(5)]
    parts = [losses[a:b] for a, b in pairwise(ends)]
    return [sum(p) / len(p) for p in parts if p]
