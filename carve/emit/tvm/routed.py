"""Routed FFNs: router scores by a product, the rest by one kernel for each width of experts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tvm import relax, te, tirx
from tvm.relax import op

from carve.emit.tvm.kernels import Format, RoutedSpec
from carve.emit.tvm.products import Products, matrix, widest
from carve.ffn import RoutedFFN
from carve.grid import Grid

_SHARED_IN, _EXPERT_IN = ("shared_gate", "shared_up"), ("expert_gate", "expert_up")
_EXPERTS = (*_EXPERT_IN, "expert_down")
_MATRICES = (*_SHARED_IN, "shared_down", *_EXPERTS)
_SHARED_BIASES = ("shared_gate_bias", "shared_up_bias", "output_bias")
_SHARED = (*_SHARED_IN, "shared_down", *_SHARED_BIASES)
_BIASES = (
    *_SHARED_BIASES,
    "expert_gate_bias",
    "expert_up_bias",
    "expert_bias",
)


def routed(products: Products, x: relax.Expr, name: str, r: RoutedFFN) -> relax.Expr:
    """``y`` of `carve.dialect.routed_ffn` for ``x`` ``[..., d]``.

    One product for every width that experts have, the shared expert in the first.
    """
    grids = {m: _grids(products, getattr(r, m)) for m in _MATRICES}
    scores = _scores(products, x, name, r)
    groups = _alike(r, grids)
    if len(groups) == 1:
        return _product(products, x, scores, name, r, grids)
    parts = []
    for i, experts in enumerate(groups):
        chosen = _chosen(products, scores, f"{name}.{i}", r, experts)
        without: dict[str, Any] = dict.fromkeys(_SHARED if i else ())
        part = replace(r, **without)
        # Its scores are positive for the experts that a token takes.
        part = replace(part, top_k=min(r.top_k, len(experts)), dynamic=True)
        parts.append(_product(products, x, chosen, f"{name}.{i}", part, grids, experts))
    return functools.reduce(lambda a, b: products.bb.emit(op.add(a, b)), parts)


def _alike(r: RoutedFFN, grids: Mapping[str, Sequence[Grid | None]]) -> list[list[int]]:
    """The experts by the widths of their weights, the wider ones first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for e in range(r.num_experts):
        mine = [g[e] for m, g in grids.items() if m in _EXPERTS and g]
        found.setdefault(tuple(32 if g is None else g.bits for g in mine), []).append(e)
    return [found[k] for k in sorted(found, reverse=True)]


def _chosen(
    products: Products, scores: relax.Expr, name: str, r: RoutedFFN, experts: list[int]
) -> relax.Expr:
    """Scores ``[n, len(experts)]``: 1 where a token takes an expert, else -1."""
    index = products.params.tensor(f"{name}.experts", torch.tensor(experts))

    def ahead(s: te.Tensor, index: te.Tensor) -> te.Tensor:
        other = te.reduce_axis((0, r.num_experts), "other")

        def rank(i: Any, j: Any) -> Any:
            mine, rival = s[i, index[j]], s[i, other]
            tie = tirx.And(rival == mine, other < index[j])
            return te.sum(tirx.Cast("int32", tirx.Or(rival > mine, tie)), axis=other)

        return te.compute((s.shape[0], len(experts)), rank, name="ahead")

    def signs(ahead: te.Tensor, s: te.Tensor, index: te.Tensor) -> te.Tensor:
        def sign(i: Any, j: Any) -> Any:
            taken = ahead[i, j] < r.top_k
            if r.dynamic:
                taken = tirx.And(taken, s[i, index[j]] > tirx.const(0.0, "float32"))
            return tirx.Select(taken, tirx.const(1.0, "float32"), tirx.const(-1.0, "float32"))

        return te.compute(ahead.shape, sign, name="chosen")

    before = products.bb.emit_te(ahead, scores, index)
    return products.bb.emit_te(signs, before, scores, index)


def _product(
    products: Products,
    x: relax.Expr,
    scores: relax.Expr,
    name: str,
    r: RoutedFFN,
    grids: Mapping[str, Sequence[Grid | None]],
    experts: Sequence[int] | None = None,
) -> relax.Expr:
    """One call of the kernel, with all experts or some."""
    some = range(r.num_experts) if experts is None else experts

    def grids_of(m: str) -> list[Grid | None]:
        if getattr(r, m) is None:
            return []
        return [grids[m][e] for e in some] if m in _EXPERTS else list(grids[m])

    def form(*names: str) -> Format:
        return widest([g for n in names for g in grids_of(n)])

    spec = RoutedSpec(
        hidden_size=int(r.expert_up.shape[-1]),
        shared_size=r.shared_size,
        expert_size=r.expert_size,
        num_experts=len(some),
        top_k=r.top_k,
        dynamic=r.dynamic,
        activation=r.activation,
        gated=r.expert_gate is not None,
        shared_in=form(*_SHARED_IN),
        shared_down=form("shared_down"),
        expert_in=form(*_EXPERT_IN),
        expert_down=form("expert_down"),
        shared_in_bias=r.shared_gate_bias is not None or r.shared_up_bias is not None,
        expert_in_bias=r.expert_gate_bias is not None or r.expert_up_bias is not None,
        output_bias=r.output_bias is not None,
        expert_bias=r.expert_bias is not None,
        out_features=int(r.expert_down.shape[1]),
    )
    forms = {
        **dict.fromkeys(_SHARED_IN, spec.shared_in),
        "shared_down": spec.shared_down,
        **dict.fromkeys(_EXPERT_IN, spec.expert_in),
        "expert_down": spec.expert_down,
    }

    def pack() -> dict[str, Any]:
        given: dict[str, Any] = {}
        for m in _MATRICES:
            w = getattr(r, m)
            if w is None:
                given[m] = None
            elif m in _EXPERTS:
                given[m] = matrix([w[e] for e in some], grids_of(m), forms[m], stack=True)
            else:
                given[m] = matrix([w], grids_of(m), forms[m])
        for b in _BIASES:
            bias = getattr(r, b)
            if bias is not None and b.startswith("expert_"):
                bias = bias[list(some)]
            given[b] = None if bias is None else bias.float().numpy()
        return given

    return products.routed(spec, x, scores, name, pack)


def _scores(products: Products, x: relax.Expr, name: str, r: RoutedFFN) -> relax.Expr:
    """Router scores ``[n, E]``, always fp32."""
    scores = products.full(x, f"{name}.router", r.router, r.router_bias)
    if r.router_gate is not None:
        gate = products.full(x, f"{name}.router_gate", r.router_gate, None)
        scores = products.bb.emit(op.multiply(products.activate(gate, r.activation), scores))
    return products.flat(scores)


def _grids(products: Products, weight: Tensor | None) -> list[Grid | None]:
    if weight is None:
        return []
    return [products.precision.of(w) for w in (weight if weight.ndim == 3 else [weight])]
