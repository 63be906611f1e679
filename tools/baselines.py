"""Peers to compare with: other ways to make a dense FFN cheaper, without training.

`flap` and `magnitude` look at a whole program and give what to run in place of its FFNs. Each of
the others takes a `DenseFFN` and the inputs that calibration text brings to it, ``x``
``[T, d]``, and gives a `RoutedFFN` of ``num_slices`` slices of ``m = intermediate_size //
num_slices`` neurons: the shared expert holds ``num_shared`` slices and the remainder of the
division, each of the ``num_slices - num_shared`` routed experts one slice. The experts have weight
exactly 1 and nothing makes up for those that are left out: ``output_bias`` is the dense output
bias, ``expert_bias`` is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from carve.calibration import SiteInputs
from carve.dialect import linear
from carve.ffn import DenseFFN, RoutedFFN
from carve.passes.allocate import narrowed
from carve.program import Program

CHUNK = 2048
"""Tokens handled at once: bounds the dense markers in memory to ``CHUNK x intermediate_size``."""


def cmoe(
    dense: DenseFFN,
    x: Tensor,
    *,
    num_slices: int,
    num_shared: int,
    top_k: int,
    k_a: int = 10,
    seed: int = 0,
    normalize: bool = False,
) -> RoutedFFN:
    """CMoE as published, without its fine-tuning (arXiv 2502.04416).

    1. Markers: ``A[t, i] = 1`` where ``|h_i|`` is among the token's ``k_a`` largest; the rate of a
       neuron is the mean of its column.
    2. Shared expert: the neurons with the highest rates.
    3. Routed experts: the other neurons, assigned to equally large clusters by the L1 distance of
       their columns to the centroids, once. The centroids are the columns of the ``E``
       highest-rate neurons among them; the assignment is the optimal one (`scipy` in place of
       Jonker-Volgenant; every centroid stands ``m`` times in an ``n x n`` cost matrix).
    4. Router: each expert's score is the hidden activation of its representative, the neuron
       nearest to the mean of the expert's columns.

    The paper does not say how ties are broken (with ``k_a = 10`` many neurons have rate 0): here
    by a random order drawn from ``seed``.

    The authors' code (JarvisPei/CMoE) differs from the paper: the profile uses
    inputs and weight rows of length 1, the router weight rows of length 1 (``normalize=True``), and
    it ranks the experts by the absolute value of the scores, which the dialect cannot express.

    Args:
        dense: the FFN to split.
        x: its inputs on calibration text ``[T, d]``.
        num_slices: slices in all.
        num_shared: slices in the shared expert.
        top_k: routed experts a token.
        k_a: neurons marked a token; 10 in the paper, of 11,008.
        seed: order of neurons that tie.
        normalize: profile and route with rows of length 1, as the authors' code does.

    Returns:
        The routed FFN; its router is fp32.
    """
    if dense.gate is not None and dense.gate_bias is not None:
        # The representatives' gate bias has no place in the dialect's router.
        raise ValueError("cmoe: a gated FFN with a gate bias is not supported")
    shared_size, experts, m = _sizes(dense, num_slices, num_shared, top_k)
    profiled = _normalized(dense) if normalize else dense
    marked = []
    for rows in x.split(CHUNK):
        rows = torch.nn.functional.normalize(rows, dim=-1) if normalize else rows
        h = profiled.hidden(rows).float().abs()
        marked.append(h.topk(min(k_a, h.shape[-1]), dim=-1).indices)
    counts = torch.bincount(torch.cat(marked).flatten(), minlength=dense.intermediate_size).float()

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(dense.intermediate_size, generator=generator)
    order = order[counts[order].argsort(descending=True, stable=True)]
    shared, rest = order[:shared_size], order[shared_size:]

    # The columns are binary: |a - c| sums to |a| + |c| - 2 a.c for a binary centroid c. The rest
    # is ordered by rate, so the first E columns are the centroids.
    overlap = torch.zeros(len(rest), experts)
    for markers in _markers(marked, dense.intermediate_size):
        overlap += markers[:, rest].T @ markers[:, rest[:experts]]
    cost = counts[rest][:, None] + counts[rest[:experts]] - 2 * overlap
    _, column = linear_sum_assignment(cost.repeat_interleave(m, 1).numpy())
    cluster = torch.from_numpy(column) // m

    # |a - c| sums to |c| + a.(1 - 2c) for a centroid c with entries in [0, 1].
    distance = torch.zeros(len(rest))
    member = torch.nn.functional.one_hot(cluster, experts).float()
    for markers in _markers(marked, dense.intermediate_size):
        columns = markers[:, rest]
        centroids = columns @ member / m
        distance += (columns * (1 - 2 * centroids[:, cluster])).sum(0)
    groups = torch.stack([(cluster == e).nonzero().squeeze(1) for e in range(experts)])
    nearest = distance[groups].argmin(1)
    chosen = rest[groups[torch.arange(experts), nearest]]

    # For a plain FFN the dialect's scores are the representatives' pre-activations, not their
    # activations. Under ReLU the order is the same (but for ties at 0). GELU falls below about
    # -0.75, so the order differs from CMoE's among experts whose scores are all negative; the
    # paper defines the router for gated FFNs only.
    return _split(
        dense,
        shared,
        rest[groups],
        router=profiled.up[chosen].float(),
        router_bias=_rows(profiled.up_bias, chosen, torch.float32),
        router_gate=_rows(profiled.gate, chosen, torch.float32),
        top_k=top_k,
    )


def random_split(
    dense: DenseFFN,
    x: Tensor,
    *,
    num_slices: int,
    num_shared: int,
    top_k: int,
    seed: int,
) -> RoutedFFN:
    """Random experts under a random router: what any method has to beat.

    The router is ``(x W - mean) / std`` with a Gaussian ``W`` ``[E, d]`` and the mean and standard
    deviation of each column on the calibration inputs, so that every expert is chosen at about the
    same rate, ``top_k / E``.

    Args:
        dense: the FFN to split.
        x: its inputs on calibration text ``[T, d]``.
        num_slices: slices in all.
        num_shared: slices in the shared expert.
        top_k: routed experts a token.
        seed: of the split and the router.
    """
    shared_size, experts, m = _sizes(dense, num_slices, num_shared, top_k)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(dense.intermediate_size, generator=generator)
    router = torch.randn(experts, x.shape[-1], generator=generator)
    scores = x.float() @ router.T
    mean, std = scores.mean(0), scores.std(0, correction=0).clamp_min(1e-6)
    return _split(
        dense,
        order[:shared_size],
        order[shared_size:].view(experts, m),
        router=router / std[:, None],
        router_bias=-mean / std,
        router_gate=None,
        top_k=top_k,
    )


def flap(
    program: Program, inputs: SiteInputs, share: float, *, adaptive: bool = True
) -> dict[str, DenseFFN]:
    """FLAP (An et al., arXiv 2312.11983) on the FFNs only: fewer neurons, their means kept.

    Score of a neuron: ``Var(h_i) |w_i|^2`` (WIFV, the fluctuation that a constant cannot replace).
    ``adaptive``: scores are standardised within each layer and one threshold over all layers keeps
    ``share`` of the neurons, so layers get widths of their own (its AL-MM); else ``share`` of
    every layer. What is dropped leaves ``W_d[:, dropped] E[h]`` in the output bias.
    """
    scores, means = {}, {}
    for site in program.sites:
        x = inputs.of(site)
        count = len(x)
        first = torch.zeros(site.dense.intermediate_size, dtype=torch.float64)
        second = torch.zeros_like(first)
        for rows in x.split(CHUNK):
            h = site.dense.hidden(rows).double()
            first += h.sum(0)
            second += h.square().sum(0)
        means[site.name] = (first / count).float()
        variance = (second / count - (first / count).square()).clamp_min(0).float()
        score = variance * site.dense.down.float().square().sum(0)
        scores[site.name] = (score - score.mean()) / score.std() if adaptive else score
    every = torch.cat(list(scores.values()))
    bar = every.sort(descending=True).values[max(0, round(share * len(every)) - 1)]
    found = {}
    for site in program.sites:
        dense, score = site.dense, scores[site.name]
        own = score.sort(descending=True).values[max(0, round(share * len(score)) - 1)]
        keep = score >= (bar if adaptive else own)
        if not keep.any():  # a layer never goes away whole
            keep[score.argmax()] = True
        down = dense.down.float()
        bias = down[:, ~keep] @ means[site.name][~keep]
        if dense.down_bias is not None:
            bias = bias + dense.down_bias.float()
        kept = keep.nonzero().squeeze(1)
        found[site.name] = narrowed(dense, kept, down[:, kept], bias)
    return found


def magnitude(
    program: Program, inputs: SiteInputs, share: float
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What no router reaches: each token keeps its own neurons of largest contribution.

    TEAL's thresholding (Liu et al., arXiv 2408.14690) on the hidden activations, weighted by the
    columns' norms: one threshold a layer, set so that ``share`` of the activations pass on
    calibration text. All in-projections are computed, so it is an upper reference and no method.
    """
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for site in program.sites:
        column = site.dense.down.float().norm(dim=0)
        c = (site.dense.hidden(inputs.of(site, CHUNK)).float().abs() * column).flatten()
        bar = c.kthvalue(max(1, round((1 - share) * c.numel()))).values

        def ffn(
            x: Tensor, dense: DenseFFN = site.dense, column: Tensor = column, bar: Tensor = bar
        ) -> Tensor:
            h = dense.hidden(x)
            return linear(h * (h.abs() * column > bar), dense.down, dense.down_bias)

        found[site.name] = ffn
    return found


def _sizes(dense: DenseFFN, slices: int, shared: int, top_k: int) -> tuple[int, int, int]:
    """Neurons of the shared expert, number of routed experts, neurons of one of them."""
    experts, m = slices - shared, dense.intermediate_size // slices
    if not (0 <= shared < slices and m > 0 and 0 < top_k <= experts):
        raise ValueError(
            f"{slices} slices, {shared} shared, top {top_k} do not fit "
            f"{dense.intermediate_size} neurons"
        )
    return dense.intermediate_size - experts * m, experts, m


def _normalized(dense: DenseFFN) -> DenseFFN:
    """The FFN with in-projection rows of length 1 (biases scaled alike), in fp32."""
    up, gate = dense.up.float(), None if dense.gate is None else dense.gate.float()
    norm = up.norm(dim=1).clamp_min(1e-12)
    return replace(
        dense,
        gate=None if gate is None else torch.nn.functional.normalize(gate, dim=1),
        up=up / norm[:, None],
        up_bias=None if dense.up_bias is None else dense.up_bias.float() / norm,
    )


def _markers(marked: list[Tensor], size: int) -> Iterator[Tensor]:
    """Dense fp32 markers ``[CHUNK, size]`` of the marked neurons ``[CHUNK, k_a]``."""
    for indices in marked:
        yield torch.zeros(len(indices), size).scatter_(1, indices, 1.0)


def _rows(tensor: Tensor | None, index: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """Rows of a tensor that may be absent."""
    return None if tensor is None else tensor[index].to(dtype or tensor.dtype).contiguous()


def _split(
    dense: DenseFFN,
    shared: Tensor,
    groups: Tensor,
    *,
    router: Tensor,
    router_bias: Tensor | None,
    router_gate: Tensor | None,
    top_k: int,
) -> RoutedFFN:
    """Slice the dense FFN: ``shared`` ``[s]`` and ``groups`` ``[E, m]`` are neuron indices."""
    some = len(shared) > 0
    return RoutedFFN(
        shared_gate=_rows(dense.gate, shared) if some else None,
        shared_gate_bias=_rows(dense.gate_bias, shared) if some else None,
        shared_up=_rows(dense.up, shared) if some else None,
        shared_up_bias=_rows(dense.up_bias, shared) if some else None,
        shared_down=dense.down[:, shared].contiguous() if some else None,
        output_bias=dense.down_bias,
        expert_gate=_rows(dense.gate, groups),
        expert_gate_bias=_rows(dense.gate_bias, groups),
        expert_up=dense.up[groups].contiguous(),
        expert_up_bias=_rows(dense.up_bias, groups),
        expert_down=dense.down[:, groups].transpose(0, 1).contiguous(),
        expert_bias=None,
        router=router,
        router_bias=router_bias,
        router_gate=router_gate,
        activation=dense.activation,
        top_k=top_k,
    )
