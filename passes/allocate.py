"""Allocate: how wide each site's shared expert is, and which experts it has, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from carve.allocate import Option, allocate
from carve.budget import Request, Split, choose_split, cost_of, equal_widths, skip_saving
from carve.calibration import limit_batches
from carve.config import AT_LEAST_ONE
from carve.errors import UserError
from carve.ffn import DenseFFN
from carve.passbase import Context, ContractError, Pass, need_notes
from carve.program import Program
from carve.sites import Block, FFNSite
from carve.skip_cost import SkipCost, measure_skips
from carve.statistics import weights_of_size

MACS = "multiply-accumulates"


@dataclass(frozen=True)
class AllocateConfig:
    """Settings of `Allocate`.

    ``policy``: ``measured``, or ``uniform`` to keep the widths that were planned. ``probe``: share
    of neurons kept, and of tokens skipped, where each site's effect on the whole program is
    measured. ``step``: active shares offered, in steps of it. ``tokens``: calibration tokens for
    the errors. ``narrow``: offer narrower FFNs. ``skip``: offer gates on every block but the last
    layer's. ``skips``: their rates. ``routing``: what routing and training leave of a static
    width's loss, and ``joint``: how much more several gates cost than each alone, both as measured
    on the reference model, so that the two savings are compared as they end up.
    """

    RANGES: ClassVar = {
        "probe": (0.01, 1),
        "step": (0.001, 1),
        "tokens": AT_LEAST_ONE,
        "skips": (0.001, 0.999),
    }

    policy: str = "measured"
    probe: float = 0.5
    step: float = 0.05
    tokens: int = 8192
    narrow: bool = True
    skip: bool = False
    skips: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    routing: float = 0.6
    joint: float = 1.5


@dataclass(frozen=True)
class AllocateMetrics:
    """``active``: chosen active share of neurons by site, 1 where it stays dense.

    ``skips``: chosen share of skipped tokens by gated block. ``sensitivity``: by site, the
    program's measured loss at the probe; ``skip_sensitivity``: the same for gates. ``predicted``:
    sum of the predicted losses of the choice, ``predicted_uniform`` of the uniform one, ``bound``
    the solver's lower bound.
    """

    active: dict[str, float]
    skips: dict[str, float]
    sensitivity: dict[str, float]
    skip_sensitivity: dict[str, float]
    predicted: float
    predicted_uniform: float
    bound: float


class Allocate(Pass[AllocateConfig]):
    """Choose every site's widths so that the predicted loss is least within the budget.

    For site ``l`` with active width ``w`` the loss is ``D_l(w) = L_l e_l(w) / e_l(p)``. ``e_l(w)``
    is the squared error, by token weights, of the best linear reconstruction of the FFN's output
    from its ``w`` neurons of largest energy: with ``G`` the covariance of the hidden activations in
    that order and ``G = C C'`` (Cholesky), ``e(w) = |W_d[:, w:] C[w:, w:]|^2``, so one
    factorization gives all widths. ``L_l`` is the whole program's measured loss (KL, or 1 - cosine)
    with site ``l`` alone reduced to the probe width ``p``. Where gates are offered, a block that
    skips a share ``s`` of its tokens adds ``S_l(s)``, found in the same way (`SkipCost`), and an
    FFN's loss is ``(1 - s) D_l(w) + S_l(s)``. The choice is an integer programme
    (`carve.allocate`). Where an engine holds equal widths only, with the first FFNs dense at most,
    the number of those is chosen.

    Static widths stand for routed ones: routing lowers every site's loss by a similar factor, so
    the order of sites is theirs, while the sum is an upper estimate of the closed forms' loss.
    """

    name = "allocate"

    def requires(self, program: Program, context: Context) -> None:
        """Needs the profile and planned widths."""
        need_notes(program, "profile", self.name)
        if self.config.policy not in ("measured", "uniform"):
            raise UserError(
                "config", f"allocate.policy {self.config.policy!r} is not 'measured' or 'uniform'"
            )
        if context.judge is None:
            raise ContractError("contract", f"{self.name} needs a judge")

    def call(self, program: Program, context: Context) -> AllocateMetrics:
        """Measure, solve, and set the context's widths."""
        judge = context.judge
        assert judge is not None
        errors: dict[str, Tensor] = {}
        sensitivity: dict[str, float] = {}
        for site in context.progress(program.sites, self.name):
            errors[site.name], probe = self.measure(site, program, context)
            sensitivity[site.name] = max(0.0, judge(program, {site.name: probe}))

        def narrow(site: FFNSite, split: Split | None) -> float:
            if split is None:
                return 0.0
            e = errors[site.name]
            at = e[self._probe_size(site)].clamp_min(1e-30)
            gain = self.config.routing if self.config.skip else 1.0
            return gain * sensitivity[site.name] * float(e[split.active_size] / at)

        gates = self._gates(program, context) if self.config.skip else {}

        def carved() -> float:
            return sum(
                (1.0 - context.skips.get(s.name, 0.0)) * narrow(s, context.splits[s.name])
                for s in program.sites
            )

        uniform = carved()
        bound = uniform
        if self.config.policy == "measured":
            choose = self._choose_equal if context.request.form.plain else self._choose
            bound = choose(program, context, narrow, gates)
        return AllocateMetrics(
            {s.name: _share(s, context.splits[s.name]) for s in program.sites},
            dict(context.skips),
            sensitivity,
            {name: g.sensitivity for name, g in gates.items()},
            carved() + sum(gates[n].loss(r) for n, r in context.skips.items() if n in gates),
            uniform,
            bound,
        )

    def _choose(
        self,
        program: Program,
        context: Context,
        narrow: Callable[[FFNSite, Split | None], float],
        gates: Mapping[str, SkipCost],
    ) -> float:
        """Solve, and set the context's widths and gates; the solver's bound."""
        request = context.request
        limit = request.limit

        def skipping(block: Block, rate: float) -> float:
            return gates[block.name].loss(rate) if block.name in gates else 0.0

        options: dict[str, list[Option]] = {}
        for site in program.sites:
            planned = context.skips.get(site.name, 0.0)
            rates = (0.0, *self.config.skips) if site.name in gates else (planned,)
            options[site.name] = [
                Option(
                    (1.0 - r) * narrow(site, v) + skipping(site, r),
                    {MACS: cost_of(site, v, request, r)},
                    (v, r),
                )
                for r in rates
                for v in self._widths(site, request)
            ]
        if request.count_routers and not gates:
            limit += skip_saving(program, context.skips)
        for block in program.attention if request.count_routers else ():
            if block.name in gates:
                limit += block.query_macs
                options[block.name] = [
                    Option(
                        skipping(block, r),
                        {MACS: block.query_macs - skip_saving(program, {block.name: r})},
                        (None, r),
                    )
                    for r in (0.0, *self.config.skips)
                ]
        found = allocate(options, {MACS: limit})
        for name, option in found.chosen.items():
            split, rate = option.value
            if name in context.splits:
                context.splits[name] = split
            if rate:
                context.skips[name] = rate
        return found.bound

    def _choose_equal(
        self,
        program: Program,
        context: Context,
        narrow: Callable[[FFNSite, Split | None], float],
        gates: Mapping[str, SkipCost],
    ) -> float:
        """How many of the first sites stay dense, the others being equal: every choice is tried."""
        form = context.request.form
        least, best = float("inf"), context.splits
        for first in range(1 if form.all_carved else len(program.sites)):
            try:
                widths = equal_widths(program, context.request, first)
            except UserError:  # the others would be narrower than any split
                break
            loss = sum(narrow(s, widths[s.name]) for s in program.sites)
            if loss < least:
                least, best = loss, widths
        context.splits.update(best)
        return least

    def _gates(self, program: Program, context: Context) -> dict[str, SkipCost]:
        """By block, what gates cost."""
        judge = context.judge
        assert judge is not None

        def progress(items: Sequence[Block]) -> Iterator[Block]:
            return context.progress(items, f"{self.name} gates")

        batches = limit_batches(context.batches, self.config.tokens)
        alone = measure_skips(program, batches, judge, self.config.probe, progress)
        return {
            name: replace(c, sensitivity=self.config.joint * c.sensitivity)
            for name, c in alone.items()
        }

    def _probe_size(self, site: FFNSite) -> int:
        return max(1, round(self.config.probe * site.dense.intermediate_size))

    def measure(self, site: FFNSite, program: Program, context: Context) -> tuple[Tensor, DenseFFN]:
        """``e(w)`` for ``w = 0 .. n`` fp32 ``[n + 1]``, and the FFN at the probe width."""
        x = context.inputs.of(site, self.config.tokens)
        order = program.notes["profile"][site.name].energy.argsort(descending=True)
        w = weights_of_size(torch.cat([site.dense(p) for p in torch.split(x, 2048)]))
        w = w / w.sum()
        mean = x.new_zeros(len(order))
        gram = x.new_zeros(len(order), len(order))
        for part, weight in zip(torch.split(x, 2048), torch.split(w, 2048), strict=True):
            h = site.dense.hidden(part).float()[:, order]
            mean += weight @ h
            gram += (h * weight[:, None]).T @ h
        gram -= torch.outer(mean, mean)
        gram.diagonal().add_(1e-3 * gram.diagonal() + 1e-6 * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram.double()).float()
        down = site.dense.down.float()[:, order]
        # C is lower triangular, so column j of W_d C is what neuron j adds to all before it.
        columns = (down @ factor).square().sum(0)
        tail = torch.cat((columns.flip(0).cumsum(0).flip(0), columns.new_zeros(1)))
        size = self._probe_size(site)
        kept, dropped = order[:size], order[size:]
        # Neurons left out, as far as those kept tell them: h_U = mu_U + B (h_S - mu_S).
        b = torch.cholesky_solve(gram[:size, size:], factor[:size, :size]).T
        new = down[:, :size] + down[:, size:] @ b
        bias = down[:, size:] @ (mean[size:] - b @ mean[:size])
        if site.dense.down_bias is not None:
            bias = bias + site.dense.down_bias.float()
        return tail, narrowed(site.dense, kept, new, bias) if len(dropped) else site.dense

    def _widths(self, site: FFNSite, request: Request) -> list[Split | None]:
        """Dense, and the best split for every share."""
        values: list[Split | None] = [None]
        for i in range(1, round(1 / self.config.step)) if self.config.narrow else ():
            try:
                split = choose_split(site, i * self.config.step * site.dense.macs, request)
            except UserError:  # narrower than any split
                continue
            if split not in values:
                values.append(split)
        return values


def _share(site: FFNSite, split: Split | None) -> float:
    return 1.0 if split is None else split.active_size / site.dense.intermediate_size


def narrowed(dense: DenseFFN, kept: Tensor, down: Tensor, bias: Tensor) -> DenseFFN:
    """The FFN of the neurons ``kept`` with another down-projection ``[d_out, len(kept)]``."""

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[kept]

    return replace(
        dense,
        gate=rows(dense.gate),
        gate_bias=rows(dense.gate_bias),
        up=dense.up[kept],
        up_bias=rows(dense.up_bias),
        down=down.to(dense.down.dtype),
        down_bias=bias,
    )
