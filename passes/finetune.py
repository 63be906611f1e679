"""Finetune: the routed FFNs of all layers together, by the dense program's own predictions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from carve import training_state
from carve.calibration import Batch
from carve.dialect import select
from carve.passbase import Context, Pass, need_notes, need_routed, unless_worse
from carve.program import Program
from carve.tuning import Balance, MaskedFFN, cosine, mixed_precision


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `Finetune`.

    ``tokens``: seen in all at the most, text repeated where there is less. ``batch``: tokens a
    step. ``rate`` and ``router_rate``: step sizes relative to the size of each tensor. ``rank``: of
    low-rank corrections to the matrices; 0 trains the matrices themselves. ``save_seconds``: time
    between states to go on from. ``judge``: keep the pass only where the program's loss gets lower.
    """

    tokens: int = 1_000_000
    batch: int = 4096
    rate: float = 0.01
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
    routers learn by a straight-through mask, and their biases hold what all experts together cost a
    token; how the sites share it is learnt too (`carve.tuning.Balance`). No label of the text is
    used, so any text serves. Matrices take the steps of Muon (Jordan et al., 2024), which wins
    about a tenth of the loss over Adam's; all else takes Adam's.

    A state is kept every ``save_seconds``; a conversion that is resumed goes on from it.
    """

    name = "finetune"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites with linear routers."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> FinetuneMetrics:
        """Train, then set the thresholds anew and keep what is better."""
        whole = context.stream or context.batches
        batches = [part for b in whole for part in _parts(b, self.config.batch)]
        sizes = [b.tokens for b in batches]
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
            balance = Balance(models, {s.name: context.experts(s) for s in program.carved})
            self._train(program, models, balance, [batches[i] for i in order], losses, context)
            means = self._settle(program, models, balance, context)
            for site in program.carved:
                routed = models[site.name].export()
                program.set_routed(site, replace(routed, mean_top_k=means.get(site.name)))
                site.tuned = True

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
        balance: Balance,
        plan: list[Batch],
        losses: list[float],
        context: Context,
    ) -> None:
        """Run all steps that are not done."""
        groups = [
            g for m in models.values() for g in m.groups(self.config.rate, self.config.router_rate)
        ]
        optimizers = _optimizers(groups)
        modules = torch.nn.ModuleDict({n.replace(".", "/"): m for n, m in models.items()})
        first = training_state.load(context.partial, modules, optimizers, losses)
        trained = [p for g in groups for p in g["params"]]  # type: ignore[attr-defined]
        saved = time.monotonic()
        for step in context.progress(range(first, len(plan)), self.name):
            loss = self._loss(program, models, plan[step])
            modules.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * cosine(step, len(plan))
                optimizer.step()
            balance.hold(balance.last(), 0.02)
            losses.append(loss.item())
            if time.monotonic() - saved > self.config.save_seconds:
                training_state.save(context.partial, modules, optimizers, step + 1, losses)
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

    @torch.no_grad()
    def _settle(
        self,
        program: Program,
        models: dict[str, MaskedFFN],
        balance: Balance,
        context: Context,
    ) -> dict[str, float]:
        """Set the biases on more text than one batch; gives the mean experts a token by site."""
        found: dict[str, list[Tensor]] = {n: [] for n, m in models.items() if m.source.dynamic}
        for batch in context.batches[:8]:
            program.differentiable(*batch.inputs, replace=models, only_first=True)
            for name, parts in found.items():
                logits = models[name].last_logits
                assert logits is not None
                parts.append(batch.counted(logits))
        scores = {n: torch.cat(parts) for n, parts in found.items()}
        shift = balance.hold([*scores.values()])
        chosen = {n: select(x - shift, models[n].source.top_k, True) for n, x in scores.items()}
        return {n: float(mask.sum(1).float().mean()) for n, mask in chosen.items()}


def _optimizers(groups: Sequence[dict[str, object]]) -> list[torch.optim.Optimizer]:
    """Muon for matrices, Adam for all else."""
    matrices = [g for g in groups if g["matrix"]]
    others = [g for g in groups if not g["matrix"]]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(
            torch.optim.Muon(
                matrices, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    if others:
        found.append(torch.optim.Adam(others, betas=(0.9, 0.95)))
    return found


def _parts(batch: Batch, tokens: int) -> Iterator[Batch]:
    """A batch in parts of whole rows, each of about ``tokens`` at the most."""
    count = len(batch.inputs[0])
    size = max(1, tokens * count // max(1, batch.tokens))
    return (batch.rows(i, min(count, i + size)) for i in range(0, count, size))
