"""Profile: what every neuron of every FFN contributes on the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carve.config import AT_LEAST_ONE
from carve.passbase import Context, Pass
from carve.program import Program
from carve.sites import FFNSite
from carve.statistics import weights_of_size
from carve.storable import storable


@dataclass(frozen=True)
class ProfileConfig:
    """Settings of `Profile`.

    ``activation_fraction``: share of a token's neurons that count as active, by contribution; a
    fraction and not CMoE's ``K_a = 10``, which leaves most neurons of a small model without a mark.
    ``chunk``: tokens at a time.
    """

    RANGES: ClassVar = {"activation_fraction": (0, 1), "chunk": AT_LEAST_ONE}

    activation_fraction: float = 0.1
    chunk: int = 2048


@dataclass(frozen=True)
class ProfileMetrics:
    """``active_mass``: by site, share of the contribution energy in the active neurons."""

    tokens: int
    active_mass: dict[str, float]


@storable
@dataclass(frozen=True)
class NeuronProfile:
    """Statistics of one FFN's neurons, fp32 ``[m]`` each.

    ``rate``: share of tokens where the neuron is active. ``energy``: mean squared contribution
    about its mean, each token weighted (see `carve.statistics.weights_of_size`).
    """

    rate: Tensor
    energy: Tensor


class Profile(Pass[ProfileConfig]):
    """Score neurons by what they write, after CMoE (arXiv 2502.04416), section 3.1, corrected.

    CMoE ranks by ``|h_i|``. Here the contribution is ``c_i(t) = |h_i(t)| * |w_i|`` with ``w_i`` the
    neuron's column of the down-projection (symbols: ``h`` ``[T, m]`` hidden activations; ``w_i``
    ``[d]``). A neuron is active on the ``activation_fraction`` of neurons of largest ``c_i(t)``.
    ``energy_i = sum_t w_t (h_i(t) - mean h_i)^2 |w_i|^2 / T`` is what is lost when the neuron is
    replaced by its mean.

    Leaves ``notes["profile"]``: `NeuronProfile` by site name.
    """

    name = "profile"

    def call(self, program: Program, context: Context) -> ProfileMetrics:
        """Profile every site."""
        notes: dict[str, NeuronProfile] = {}
        mass: dict[str, float] = {}
        for site in context.progress(program.sites, self.name):
            notes[site.name], mass[site.name] = self._profile(site, context)
        program.notes["profile"] = notes
        return ProfileMetrics(context.inputs.tokens, mass)

    def _profile(self, site: FFNSite, context: Context) -> tuple[NeuronProfile, float]:
        x = context.inputs.of(site)
        column = site.dense.down.float().norm(dim=0)
        active = max(1, round(self.config.activation_fraction * column.numel()))
        count, first, second = (torch.zeros_like(column, dtype=torch.float64) for _ in range(3))
        inside = total = weight = 0.0
        for part in torch.split(x, self.config.chunk):
            h = site.dense.hidden(part)
            w = weights_of_size(site.dense(part))[:, None]
            c = h.abs() * column
            marks = c >= c.topk(active, dim=1).values[:, -1:]
            count += marks.sum(0)
            first += (w * h).sum(0)
            second += (w * h.square()).sum(0)
            weight += float(w.sum())
            inside += float((c.square() * marks).sum())
            total += float(c.square().sum())
        mean = first / weight
        energy = (second / weight - mean.square()).clamp_min(0).float() * column.square()
        return NeuronProfile((count / x.shape[0]).float(), energy), inside / max(total, 1e-30)
