"""A routed FFN in the form that trains fast: all neurons in one product, a mask over experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve.dialect import ACTIVATIONS, select
from carve.engine_form import ANY, EngineForm
from carve.ffn import RoutedFFN


def mixed_precision() -> AbstractContextManager[object]:
    """bf16 products where the processor has them, else fp32."""
    if torch.cpu._is_avx512_bf16_supported():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


_MATRICES = ("gate", "up", "down")


class MaskedFFN(nn.Module):
    """The function of a `RoutedFFN`, computed densely.

    ``y = (a(x) * [1, m(x)]) W_d' + b + m(x) B`` with ``a`` the hidden activations of all neurons,
    the shared expert's first, ``m(x)`` the mask of the chosen experts ``[T, E]``, spread over each
    expert's neurons, ``B`` ``[E, d_out]`` the experts' biases. Three products over all neurons cost
    less than the gathers and scatters of experts do, and the gradient of the mask comes with the
    gradient of ``a``. Where ``straight_through``, the mask passes the gradient of
    ``sigmoid(logits / temperature)`` (Bengio et al., arXiv 1308.3432); else the router is fixed.

    With ``rank`` the matrices stay and get low-rank corrections. Biases that ``form`` has no place
    for are none. Parameters are fp32; `export` gives them back in the dtype they came in.
    """

    def __init__(
        self,
        source: RoutedFFN,
        *,
        straight_through: bool = False,
        rank: int = 0,
        form: EngineForm = ANY,
    ) -> None:
        super().__init__()
        if source.router_gate is not None:
            raise ValueError("a masked FFN takes a linear router")
        self.source, self.straight_through = source, straight_through
        merged = source.merged()

        def parameter(t: Tensor | None) -> nn.Parameter | None:
            return None if t is None else nn.Parameter(t.detach().float().clone())

        self.gate, self.gate_bias = parameter(merged.gate), parameter(merged.gate_bias)
        self.up, self.up_bias = parameter(merged.up), parameter(merged.up_bias)
        self.down = parameter(merged.down)
        self.low_rank = nn.ParameterDict()
        for name in _MATRICES if rank else ():
            w = getattr(self, name)
            if w is not None:
                r = min(rank, *w.shape)
                generator = torch.Generator().manual_seed(r)
                into = torch.randn(r, w.shape[1], generator=generator) * float(w.std())
                self.low_rank[f"{name}_into"] = nn.Parameter(into)
                self.low_rank[f"{name}_out"] = nn.Parameter(torch.zeros(w.shape[0], r))
        experts, out = source.num_experts, merged.down.shape[0]

        def bias(t: Tensor | None, wanted: bool, *shape: int) -> nn.Parameter | None:
            return parameter(torch.zeros(shape) if t is None and wanted else t)

        self.output_bias = bias(source.output_bias, not form.plain, out)
        self.expert_bias = bias(source.expert_bias, not form.plain, experts, out)
        self.router = parameter(source.router)
        self.router_bias = bias(source.router_bias, not form.unbiased_router, experts)
        self.temperature = 0.1
        self.last_logits: Tensor | None = None

    def groups(self, rate: float, router_rate: float) -> list[dict[str, object]]:
        """Parameter groups for an optimizer: the step of a tensor is ``rate`` times its own size.

        The optimizers' steps do not know the scale of what they move; ``rms(W)`` makes one rate
        serve models whose weights differ tenfold. ``matrix`` marks the FFN's own matrices.
        """
        found: list[dict[str, object]] = []
        for name, p in self.named_parameters():
            routing = name.startswith("router")
            fixed = len(self.low_rank) > 0 and name in _MATRICES
            p.requires_grad_(self.straight_through if routing else not fixed)
            if not p.requires_grad:
                continue
            own = p.ndim > 1 and name != "expert_bias" and not name.startswith("low_rank")
            size = p if own else self.down
            assert size is not None
            lr = (router_rate if routing else rate) * float(size.detach().square().mean().sqrt())
            found.append({"params": [p], "lr": lr, "base": lr, "matrix": name in _MATRICES})
        return found

    def weight(self, name: str) -> Tensor:
        """A matrix with its low-rank correction ``W + B A`` (LoRA, arXiv 2106.09685), if any."""
        w: Tensor = getattr(self, name)
        if f"{name}_out" in self.low_rank:
            w = w + self.low_rank[f"{name}_out"] @ self.low_rank[f"{name}_into"]
        return w

    def mask(self, x: Tensor) -> Tensor:
        """The chosen experts ``[T, E]``, fp32 0 and 1."""
        assert self.router is not None
        # Scores in fp32 whatever the products run in: rounding flips a choice.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router, self.router_bias)
        s = self.source
        hard = select(logits.detach(), s.top_k, s.dynamic).float()
        self.last_logits = logits.detach()
        if not self.straight_through or not torch.is_grad_enabled():
            return hard
        offset: Tensor | float = 0.0
        if not s.dynamic and s.top_k < s.num_experts:
            offset = logits.detach().topk(s.top_k + 1, -1).values[:, -2:].mean(-1, keepdim=True)
        soft = torch.sigmoid((logits - offset) / self.temperature)
        return hard + soft - soft.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., d]`` to ``[..., d_out]``."""
        s = self.source
        flat = x.reshape(-1, x.shape[-1])
        mask = self.mask(flat)
        act = ACTIVATIONS[s.activation]
        if self.gate is None:
            h = act(F.linear(flat, self.weight("up"), self.up_bias))
        else:
            gate = F.linear(flat, self.weight("gate"), self.gate_bias)
            h = act(gate) * F.linear(flat, self.weight("up"), self.up_bias)
        experts = h[:, s.shared_size :].unflatten(1, (s.num_experts, s.expert_size))
        routed = (experts * mask[:, :, None].to(h.dtype)).flatten(1)
        y = F.linear(torch.cat((h[:, : s.shared_size], routed), 1), self.weight("down")).float()
        if self.output_bias is not None:
            y = y + self.output_bias
        if self.expert_bias is not None:
            y = y + mask @ self.expert_bias
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def export(self) -> RoutedFFN:
        """The weights as a `RoutedFFN` of the source's sizes."""
        s = self.source
        size, experts, width = s.shared_size, s.num_experts, s.expert_size

        def like(t: Tensor, old: Tensor) -> Tensor:
            return t.detach().to(old.dtype).contiguous()

        new: dict[str, Tensor] = {}
        for name in ("gate", "gate_bias", "up", "up_bias"):
            if getattr(self, name) is None:
                continue
            t, shared = self.weight(name), getattr(s, f"shared_{name}")
            expert = getattr(s, f"expert_{name}")
            new[f"expert_{name}"] = like(t[size:].unflatten(0, (experts, width)), expert)
            if shared is not None:
                new[f"shared_{name}"] = like(t[:size], shared)
        down = self.weight("down")
        if s.shared_down is not None:
            new["shared_down"] = like(down[:, :size], s.shared_down)
        down = down[:, size:].unflatten(1, (experts, width)).transpose(0, 1)
        new["expert_down"] = like(down, s.expert_down)
        for name in ("output_bias", "expert_bias", "router", "router_bias"):
            if getattr(self, name) is not None:
                new[name] = getattr(self, name).detach().clone()
        return replace(s, **new)  # type: ignore[arg-type]


def threshold(logits: Tensor, top_k: int, mean: float) -> float:
    """The score above which ``mean`` experts a token lie, of the ``top_k`` largest of each.

    Shapes: ``logits`` ``[T, E]``.
    """
    scores = logits.topk(top_k, dim=-1).values.flatten()
    count = min(len(scores), max(1, round(mean * len(logits))))
    # Between two scores, so that exactly `count` are above.
    high = scores.kthvalue(len(scores) - count + 1).values
    if count == len(scores):
        return float(high) - 1e-3 * (1.0 + abs(float(high)))
    low = scores.kthvalue(len(scores) - count).values
    return float((high + low) / 2)


def common_threshold(
    logits: Sequence[Tensor], top_k: Sequence[int], costs: Sequence[float], wanted: float
) -> float:
    """The score above which the experts of several sites cost ``wanted`` a token in all.

    Of each token's scores at site ``i`` the ``top_k[i]`` largest count, each for ``costs[i]``.

    Shapes: ``logits[i]`` ``[T, E_i]``.
    """
    scores = [x.topk(k, dim=-1).values.flatten() for x, k in zip(logits, top_k, strict=True)]
    every = torch.cat(scores)
    each = torch.cat([torch.full_like(s, c) for s, c in zip(scores, costs, strict=True)])
    order = every.argsort(descending=True)
    spent = each[order].cumsum(0, dtype=torch.float64) / len(logits[0])
    count = int((spent <= wanted).sum())
    ranked = every[order]
    if count == len(ranked):
        return float(ranked[-1]) - 1e-3 * (1.0 + abs(float(ranked[-1])))
    above = ranked[max(0, count - 1)]
    return float((above + ranked[count]) / 2)


class Balance:
    """Holds what the experts of several sites cost together, and lets the sites trade.

    One shift for the biases of all routers: where the loss gains more from an expert than the
    others pay for it, the gradient keeps that router's bias up and the shift takes the cost back
    everywhere. Sites with a fixed number of experts take no part.

    Args:
        models: the FFNs in training, by site.
        experts: experts a token that each was planned with.
    """

    def __init__(self, models: Mapping[str, MaskedFFN], experts: Mapping[str, float]) -> None:
        self.models = [m for m in models.values() if m.source.dynamic]
        planned = [experts[n] for n, m in models.items() if m.source.dynamic]
        self.top_k = [m.source.top_k for m in self.models]
        self.costs = [float(m.source.expert_macs) for m in self.models]
        self.wanted = sum(c * e for c, e in zip(self.costs, planned, strict=True))

    @torch.no_grad()
    def hold(self, logits: Sequence[Tensor], speed: float = 1.0) -> float:
        """Move the biases by ``speed`` of what would make ``logits`` of all models cost as wanted.

        Shapes: ``logits[i]`` ``[T, E_i]``, in the order of ``models``.

        Returns:
            What was taken from all of them.
        """
        if not self.models:
            return 0.0
        shift = speed * common_threshold(logits, self.top_k, self.costs, self.wanted)
        for m in self.models:
            assert m.router_bias is not None
            m.router_bias.sub_(shift)
        return shift

    def last(self) -> list[Tensor]:
        """The scores of the last batch."""
        found = [m.last_logits for m in self.models]
        return [t for t in found if t is not None]


def calibrated(routed: RoutedFFN, x: Tensor, mean: float) -> RoutedFFN:
    """The same FFN with its router's bias moved so that ``mean`` experts a token are on over ``x``.

    A fixed k is left as it is.
    """
    if not routed.dynamic:
        return routed
    logits = torch.cat([routed.logits(part) for part in torch.split(x, 8192)])
    bias = routed.router_bias
    shift = threshold(logits, routed.top_k, mean)
    bias = torch.full((routed.num_experts,), -shift) if bias is None else bias - shift
    chosen = select(logits - shift, routed.top_k, True)
    return replace(routed, router_bias=bias, mean_top_k=float(chosen.sum(1).float().mean()))


def cosine(step: int, steps: int, warmup: int = 20) -> float:
    """Share of the learning rate at ``step``: a short rise, then half a cosine down to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def short_warmup(steps: int) -> int:
    """Steps of the rise where there may be few: an eighth, 20 at the most."""
    return max(1, min(20, steps // 8))


def shuffled(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` batches of ``size`` indices below ``count``, each pass over them in a new order."""
    order, at = torch.randperm(count, generator=generator), 0
    size = min(size, count)
    for _ in range(steps):
        if at + size > count:
            order, at = torch.randperm(count, generator=generator), 0
        yield order[at : at + size]
        at += size
