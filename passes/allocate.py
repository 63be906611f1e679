"""Allocate: how wide each site's shared expert is, and which experts it has, by measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carve.allocate import Option, allocate
from carve.budget import Split, choose_split, cost_of
from carve.errors import UserError
from carve.ffn import DenseFFN
from carve.passbase import Context, ContractError, Pass, need_notes
from carve.program import Program
from carve.sites import FFNSite
from carve.statistics import weights_of_size


@dataclass(frozen=True)
class AllocateConfig:
    """Settings of `Allocate`.

    ``policy``: ``measured``, or ``uniform`` to keep the widths that were planned. ``probe``: share
    of neurons kept where each site's effect on the whole program is measured. ``step``: active
    shares offered, in steps of it. ``tokens``: calibration tokens for the errors.
    """

    policy: str = "measured"
    probe: float = 0.5
    step: float = 0.05
    tokens: int = 8192


@dataclass(frozen=True)
class AllocateMetrics:
    """``active``: chosen active share of neurons by site, 1 where it stays dense.

    ``sensitivity``: by site, the program's measured loss at the probe. ``predicted``: sum of the
    predicted losses of the choice, ``predicted_uniform`` of the uniform one, ``bound`` the
    solver's lower bound.
    """

    active: dict[str, float]
    sensitivity: dict[str, float]
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
    with site ``l`` alone reduced to the probe width ``p``. The choice is an integer programme
    (`carve.allocate`).

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

        def loss(site: FFNSite, split: Split | None) -> float:
            if split is None:
                return 0.0
            e = errors[site.name]
            at = e[self._probe_size(site)].clamp_min(1e-30)
            return sensitivity[site.name] * float(e[split.active_size] / at)

        uniform = sum(loss(s, context.splits[s.name]) for s in program.sites)
        bound = uniform
        if self.config.policy == "measured":
            found = allocate(
                {s.name: self._options(s, loss, context) for s in program.sites},
                {"multiply-accumulates": context.request.limit},
            )
            context.splits.update({name: o.value for name, o in found.chosen.items()})
            bound = found.bound
        planned = [(s, context.splits[s.name]) for s in program.sites]
        return AllocateMetrics(
            {
                s.name: 1.0 if p is None else p.active_size / s.dense.intermediate_size
                for s, p in planned
            },
            sensitivity,
            sum(loss(s, p) for s, p in planned),
            uniform,
            bound,
        )

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

    def _options(
        self, site: FFNSite, loss: Callable[[FFNSite, Split | None], float], context: Context
    ) -> list[Option]:
        """Dense, and the best split for every share."""
        request = context.request
        values: list[Split | None] = [None]
        for i in range(1, round(1 / self.config.step)):
            try:
                split = choose_split(site, i * self.config.step * site.dense.macs, request)
            except UserError:  # narrower than any split
                continue
            if split not in values:
                values.append(split)
        return [
            Option(loss(site, v), {"multiply-accumulates": cost_of(site, v, request)}, v)
            for v in values
        ]


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
