"""Weights of a carved program under the names and in the form of published architectures.

Both architectures weigh the chosen experts by their scores; carve's weigh exactly 1. So the routers
are stored times a small power of two: the scores then differ by so little that the weights are
equal to within it, while their order stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from carve.engine_form import GRANITE, HF
from carve.ffn import RoutedFFN
from carve.program import Program

SCALE = 2.0**-11
"""What routers are multiplied by: weights of experts whose scores differ by 1 differ by ``SCALE``
(granite) or half of it (glm4_moe), and scores closer than ``2^-24 / SCALE`` (twice that) tie."""
_PREFIX = "model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.")
Choose = Callable[[Tensor], Tensor]


def layer_of(site_name: str) -> int:
    """Index of the layer of an FFN, by its module path."""
    found = _FFN.match(f"{site_name}.")
    if found is None:
        raise ValueError(f"{site_name} is no FFN of a layer")
    return int(found.group(1))


def arranged(r: RoutedFFN, order: Tensor | None) -> RoutedFFN:
    """The same FFN with its experts in another order: the new ``e`` is the old ``order[e]``."""
    if order is None:
        return r
    names = [f.name for f in fields(r) if f.name.startswith(("expert_", "router"))]
    given = {n: getattr(r, n) for n in names}
    moved: dict[str, Any] = {n: t[order] for n, t in given.items() if t is not None}
    return replace(r, **moved)


def stored_router(r: RoutedFFN, target: str) -> tuple[Tensor, Tensor]:
    """Router ``[E, d]`` and selection bias ``[E]`` (zero in granite) as they are stored, fp32.

    glm4_moe chooses by ``sigmoid(x W') + b'`` and weighs by ``sigmoid(x W')``, whose slope at 0 is
    1/4: with ``W' = SCALE W`` and ``b' = SCALE b / 4`` the order is that of ``x W + b``.
    """
    weight = r.router.float() * SCALE
    bias = r.router_bias
    if bias is None or target != HF:
        return weight, weight.new_zeros(len(weight))
    return weight, bias.float() * (SCALE / 4)


def engine_choice(r: RoutedFFN, target: str) -> Choose:
    """The experts that the architecture chooses, in its own arithmetic: mask ``[T, E]``.

    So ties that the stored precision makes break as they do there.
    """
    weight, bias = stored_router(r, target)

    def choose(x: Tensor) -> Tensor:
        scores = F.linear(x.float(), weight)
        if target == HF:
            scores = scores.sigmoid() + bias
        index = torch.topk(scores, r.top_k, dim=-1, sorted=target != HF).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)

    return choose


def checkpoint_tensors(
    program: Program,
    routed: Mapping[str, RoutedFFN],
    target: str,
    dtype: torch.dtype,
    *,
    tied: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a ``glm4_moe`` or ``granitemoeshared`` checkpoint.

    Everything but routers, which stay fp32, is of ``dtype``. ``routed`` are the carved FFNs by site
    name, their experts in the order that is wanted; a ``tied`` head is left out.
    """
    carved = {layer_of(name) for name in routed}
    biased = has_attention_bias(program)
    # By their use: of tied ones the graph keeps one name.
    yield _EMBEDDING, program.lookups[0].weight.detach().to(dtype)
    if not tied:
        yield _HEAD, program.linears[-1].weight.detach().to(dtype)
    for path, p in program.module.named_parameters(remove_duplicate=False):
        name = path.removeprefix(_PREFIX)
        ffn = _FFN.match(name)
        if path == name or name in (_EMBEDDING, _HEAD) or (ffn and int(ffn.group(1)) in carved):
            continue
        yield name, p.detach().to(dtype)
        # Granite's bias is on the output projection too.
        if biased and target != HF and name.endswith(".self_attn.o_proj.weight"):
            yield name.replace(".weight", ".bias"), torch.zeros(p.shape[0], dtype=dtype)
    tensors = _glm if target == HF else _granite
    for name, r in routed.items():
        for leaf, t in tensors(r):
            fp32 = leaf.startswith(("mlp.gate.", "block_sparse_moe.router."))
            yield f"model.layers.{layer_of(name)}.{leaf}", t.float() if fp32 else t.to(dtype)


def has_attention_bias(program: Program) -> bool:
    """Whether queries, keys and values have biases."""
    names = [n for n, _ in program.module.named_parameters(remove_duplicate=False)]
    return any(n.endswith(".q_proj.bias") for n in names)


def _glm(r: RoutedFFN) -> Iterator[tuple[str, Tensor]]:
    weight, bias = stored_router(r, HF)
    yield "mlp.gate.weight", weight
    yield "mlp.gate.e_score_correction_bias", bias
    for part in ("gate", "up", "down"):
        yield f"mlp.shared_experts.{part}_proj.weight", getattr(r, f"shared_{part}")
        for e, w in enumerate(getattr(r, f"expert_{part}")):
            yield f"mlp.experts.{e}.{part}_proj.weight", w


def _granite(r: RoutedFFN) -> Iterator[tuple[str, Tensor]]:
    assert r.expert_gate is not None
    yield "block_sparse_moe.router.layer.weight", stored_router(r, GRANITE)[0]
    yield "block_sparse_moe.input_linear.weight", torch.cat((r.expert_gate, r.expert_up), 1)
    # The weights of the chosen sum to 1 there, and to k here.
    yield "block_sparse_moe.output_linear.weight", r.expert_down * r.top_k
    if r.shared_gate is not None and r.shared_up is not None and r.shared_down is not None:
        yield "shared_mlp.input_linear.weight", torch.cat((r.shared_gate, r.shared_up))
        yield "shared_mlp.output_linear.weight", r.shared_down
