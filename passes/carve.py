"""Carve: split every dense FFN into a shared expert and equal routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carve.assign import balanced_assignment
from carve.budget import Split
from carve.config import AT_LEAST_ONE
from carve.ffn import DenseFFN, RoutedFFN
from carve.passbase import Context, ContractError, Pass, need_notes
from carve.program import Program
from carve.sites import FFNSite
from carve.statistics import weights_of_size


@dataclass(frozen=True)
class CarveConfig:
    """Settings of `Carve`.

    ``tokens``: calibration tokens for the grouping. ``iterations``: rounds of assignment and
    centroids at the most.
    """

    RANGES: ClassVar = {"tokens": AT_LEAST_ONE}

    tokens: int = 4096
    iterations: int = 8


@dataclass(frozen=True)
class CarveMetrics:
    """By site: widths, and how alike the members of a group are beside a random grouping."""

    splits: dict[str, dict[str, int]]
    cohesion: dict[str, float]
    cohesion_random: dict[str, float]


class Carve(Pass[CarveConfig]):
    """CMoE's construction (arXiv 2502.04416, section 3.2) with corrections.

    The ``shared_size`` neurons of largest energy (see the profile) become the shared expert. The
    others are grouped by co-activation: with ``c_i(t) = w_t^(1/2) |h_i(t) - mean h_i| |w_i|``
    (``w_t`` the token's weight, ``w_i`` the neuron's column), neuron ``i`` is the vector
    ``f_i(t) = c_i(t) - mean c_i`` on ``tokens`` tokens, scaled to length 1: those go together that
    contribute more than they use to on the same tokens. Groups of equal size maximise
    ``sum_i <f_i, centroid of i's group>`` by alternating exact balanced assignment (a transport
    problem on neurons x groups, `carve.assign`) and centroids.

    Every expert is on after this pass, so the program still equals the dense one; a router pass
    chooses ``top_k``. Leaves ``notes["carve"]``: by site, the neuron indices ``shared`` ``[s]`` and
    ``groups`` ``[E, m]``.
    """

    name = "carve"

    def requires(self, program: Program, context: Context) -> None:
        """Needs the profile and a plan for every site."""
        need_notes(program, "profile", self.name)
        missing = [s.name for s in program.sites if s.name not in context.splits]
        if missing:
            raise ContractError("contract", f"no widths are planned for {', '.join(missing)}")

    def call(self, program: Program, context: Context) -> CarveMetrics:
        """Carve every site that is not to stay dense."""
        profiles = program.notes["profile"]
        program.notes["carve"] = {}
        cohesion, random, splits = {}, {}, {}
        todo = [s for s in program.sites if context.splits[s.name] is not None]
        for site in context.progress(todo, self.name):
            split = context.split(site)
            order = profiles[site.name].energy.argsort(descending=True)
            shared = order[: split.shared_size].sort().values
            rest = order[split.shared_size :]
            features = self._features(site, context, rest)
            groups, cohesion[site.name], random[site.name] = self._group(features, split, context)
            members = rest[groups]
            program.notes["carve"][site.name] = (shared, members)
            program.set_routed(site, assemble(site.dense, shared, members, split.num_experts))
            splits[site.name] = {
                "shared_size": split.shared_size,
                "expert_size": split.expert_size,
                "num_experts": split.num_experts,
                "top_k": split.top_k,
            }
        return CarveMetrics(splits, cohesion, random)

    def ensures(self, program: Program, context: Context) -> None:
        """Every neuron is in exactly one expert."""
        for site in program.carved:
            shared, groups = program.notes["carve"][site.name]
            every = torch.cat((shared, groups.flatten())).sort().values
            if not torch.equal(every, torch.arange(site.dense.intermediate_size)):
                raise ContractError("contract", f"{site.name}: neurons lost or doubled")

    def _features(self, site: FFNSite, context: Context, rest: Tensor) -> Tensor:
        """Unit vectors ``[n, T]`` of the neurons' contributions about their means."""
        x = context.inputs.of(site, self.config.tokens)
        column = site.dense.down.float().norm(dim=0)
        h = site.dense.hidden(x).float()
        weight = weights_of_size(site.dense(x)).sqrt()[:, None]
        c = (h - h.mean(0)).abs() * column * weight
        f: Tensor = (c - c.mean(0))[:, rest].T.contiguous()
        f /= f.norm(dim=1, keepdim=True).clamp_min(1e-20)
        return f

    def _group(self, f: Tensor, split: Split, context: Context) -> tuple[Tensor, float, float]:
        """Equal groups ``[E, m]`` of rows of ``f``, their cohesion, and that of a random split."""
        e, m = split.num_experts, split.expert_size

        def cohesion(groups: Tensor) -> float:
            centroid = f[groups].sum(1)
            return float((centroid.square().sum() - f.shape[0]) / (e * m * max(m - 1, 1)))

        shuffled = torch.randperm(e * m, generator=context.generator("carve")).view(e, m)
        centroid = f[_spread(f, e)]
        groups = shuffled
        best = -1.0
        for _ in range(self.config.iterations):
            owner = balanced_assignment(-(f @ centroid.T), m)
            found = owner.argsort(stable=True).view(e, m)
            score = cohesion(found)
            if score <= best + 1e-9:
                break
            best, groups = score, found
            centroid = f[groups].sum(1)
            centroid = centroid / centroid.norm(dim=1, keepdim=True).clamp_min(1e-20)
        return groups, best, cohesion(shuffled)


def _spread(f: Tensor, count: int) -> Tensor:
    """Rows far from one another, the first the strongest: seeds for the groups."""
    chosen = [0]
    nearest = f @ f[0]
    # A neuron that never moves is like nothing, and so would be far from everything.
    nearest[f.norm(dim=1) == 0] = torch.inf
    for _ in range(count - 1):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, f @ f[chosen[-1]])
    return torch.tensor(chosen)


def assemble(dense: DenseFFN, shared: Tensor, groups: Tensor, top_k: int) -> RoutedFFN:
    """Routed weights from neuron indices ``shared`` ``[s]`` and ``groups`` ``[E, m]``.

    The router is zero and the compensation absent; the dense output bias goes to ``output_bias``.
    """

    def rows(w: Tensor | None, index: Tensor) -> Tensor | None:
        return None if w is None else w[index].contiguous()

    has_shared = shared.numel() > 0
    return RoutedFFN(
        rows(dense.gate, shared) if has_shared else None,
        rows(dense.gate_bias, shared) if has_shared else None,
        rows(dense.up, shared) if has_shared else None,
        rows(dense.up_bias, shared) if has_shared else None,
        dense.down[:, shared].contiguous() if has_shared else None,
        dense.down_bias,
        rows(dense.gate, groups),
        rows(dense.gate_bias, groups),
        dense.up[groups].contiguous(),
        rows(dense.up_bias, groups),
        dense.down.T[groups].transpose(1, 2).contiguous(),
        None,
        torch.zeros(groups.shape[0], dense.up.shape[1]),
        None,
        None,
        dense.activation,
        top_k,
    )
