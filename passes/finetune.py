"""Finetune: the routed FFNs of all layers together, by the dense program's own predictions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carve import training_state
from carve.calibration import Batch, SiteInputs
from carve.passbase import Context, Pass, need_notes, need_routed, unless_worse
from carve.program import Program
from carve.tuning import MaskedFFN, calibrated, cosine, mixed_precision


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `Finetune`.

    ``tokens``: seen in all at the most, text repeated where there is less. ``rate`` and
    ``router_rate``: step sizes of Adam relative to the size of each tensor. ``rank``: of low-rank
    corrections to the matrices; 0 trains the matrices themselves. ``save_seconds``: time between
    states to go on from. ``judge``: keep the pass only where the program's loss gets lower.
    """

    tokens: int = 1_000_000
    rate: float = 0.003
    router_rate: float = 0.001
    rank: int = 0
    save_seconds: float = 60.0
    judge: bool = True


@dataclass(frozen=True)
class FinetuneMetrics:
    """``loss``: training loss over quarters of the steps; ``tokens``: seen; ``distinct``: of them.

    ``kept``: whether the program got better.
    """

    loss: list[float]
    tokens: int
    distinct: int
    kept: bool


class Finetune(Pass[FinetuneConfig]):
    """Short end-to-end distillation (Hinton et al., arXiv 1503.02531), temperature 1.

    ``min E_t KL(p(. | x_<t) || q(. | x_<t))`` over experts, compensation and routers, ``p`` the
    dense program's next-token distribution and ``q`` the routed one's; for encoders the squared
    error of the hidden states relative to their size. Everything else of the program stays. The
    routers learn by a straight-through mask, and their biases hold the mean number of experts a
    token. No label of the text is used, so any text serves.

    A state is kept every ``save_seconds``; a conversion that is resumed goes on from it.
    """

    name = "finetune"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites with linear routers."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> FinetuneMetrics:
        """Train, then set the thresholds anew and keep what is better."""
        batches = [*(context.stream or context.batches)]
        sizes = [_tokens(b) for b in batches]
        losses: list[float] = []
        seen = 0

        def rewrite() -> None:
            nonlocal seen
            models = {
                s.name: MaskedFFN(
                    need_routed(s, self.name),
                    straight_through=True,
                    rank=self.config.rank,
                    form=context.request.form,
                )
                for s in program.carved
            }
            order = list(self._order(sizes, context))
            seen = sum(sizes[i] for i in order)
            self._train(program, models, [batches[i] for i in order], losses, context)
            for site in program.carved:
                program.set_routed(site, models[site.name].export())
                site.tuned = True
            self._calibrate(program, context)

        kept = unless_worse(program, context if self.config.judge else None, rewrite)
        quarter = max(1, len(losses) // 4)
        parts = [losses[i : i + quarter] for i in range(0, len(losses), quarter)][:4]
        return FinetuneMetrics([sum(p) / len(p) for p in parts], seen, min(sum(sizes), seen), kept)

    def _order(self, sizes: list[int], context: Context) -> Iterator[int]:
        """Batches in a new order each time round, until the tokens are seen."""
        generator = context.generator(self.name)
        left = self.config.tokens
        while True:
            for i in torch.randperm(len(sizes), generator=generator).tolist():
                if left < sizes[i]:
                    return
                left -= sizes[i]
                yield i

    def _train(
        self,
        program: Program,
        models: dict[str, MaskedFFN],
        plan: list[Batch],
        losses: list[float],
        context: Context,
    ) -> None:
        """Run all steps that are not done."""
        groups = [
            g for m in models.values() for g in m.groups(self.config.rate, self.config.router_rate)
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        modules = torch.nn.ModuleDict({n.replace(".", "/"): m for n, m in models.items()})
        first = training_state.load(context.partial, modules, optimizer, losses)
        trained = [p for g in groups for p in g["params"]]  # type: ignore[attr-defined]
        saved = time.monotonic()
        for step in context.progress(range(first, len(plan)), self.name):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * cosine(step, len(plan))
            loss = self._loss(program, models, plan[step])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            for site in program.carved:
                models[site.name].hold_mean(context.experts(site), 0.02)
            losses.append(loss.item())
            if time.monotonic() - saved > self.config.save_seconds:
                training_state.save(context.partial, modules, optimizer, step + 1, losses)
                saved = time.monotonic()

    def _loss(self, program: Program, models: dict[str, MaskedFFN], batch: Batch) -> Tensor:
        dense = {s.name: s.dense for s in program.sites}
        with mixed_precision():
            with torch.no_grad():
                want = program.differentiable(
                    *batch.inputs, replace=dense, only_first=True, gates=False
                )[0]
            have = program.differentiable(*batch.inputs, replace=models, only_first=True)[0]
        want, have = want.float(), have.float()
        if program.kind == "decoder":
            p, q = want.flatten(0, 1).log_softmax(-1), have.flatten(0, 1).log_softmax(-1)
            return F.kl_div(q, p, log_target=True, reduction="batchmean")
        if batch.mask is not None and want.ndim == 3:
            want, have = want[batch.mask], have[batch.mask]
        return (have - want).square().sum() / want.square().sum()

    def _calibrate(self, program: Program, context: Context) -> None:
        """Thresholds on the inputs that the trained program brings to its sites."""
        inputs = SiteInputs.collect(program, context.batches[:8])
        for site in program.carved:
            routed = calibrated(
                need_routed(site, self.name), inputs.of(site), context.experts(site)
            )
            program.set_routed(site, routed)


def _tokens(batch: Batch) -> int:
    if batch.mask is not None:
        return int(batch.mask.sum())
    rows = batch.inputs[0]
    return rows.shape[0] * (rows.shape[1] if rows.ndim == 2 else 1)
