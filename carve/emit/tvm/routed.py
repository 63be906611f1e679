"""Routed FFNs: router scores by a product, the rest by one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tvm import relax
from tvm.relax import op

from carve.emit.tvm.kernels import Format, RoutedSpec
from carve.emit.tvm.products import Products, matrix, widest
from carve.emit.tvm.weights import Matrix
from carve.ffn import RoutedFFN
from carve.grid import Grid

_SHARED_IN, _EXPERT_IN = ("shared_gate", "shared_up"), ("expert_gate", "expert_up")
_MATRICES = (*_SHARED_IN, "shared_down", *_EXPERT_IN, "expert_down")
_BIASES = (
    "shared_gate_bias",
    "shared_up_bias",
    "output_bias",
    "expert_gate_bias",
    "expert_up_bias",
    "expert_bias",
)


def routed(products: Products, x: relax.Expr, name: str, r: RoutedFFN) -> relax.Expr:
    """``y`` of `carve.dialect.routed_ffn` for ``x`` ``[..., d]``."""
    grids = {m: _grids(products, getattr(r, m)) for m in _MATRICES}

    def form(*names: str) -> Format:
        return widest([g for n in names for g in grids[n]])

    spec = RoutedSpec(
        hidden_size=int(r.expert_up.shape[-1]),
        shared_size=r.shared_size,
        expert_size=r.expert_size,
        num_experts=r.num_experts,
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
        given: dict[str, Any] = {m: _matrix(getattr(r, m), grids[m], forms[m]) for m in _MATRICES}
        for b in _BIASES:
            bias = getattr(r, b)
            given[b] = None if bias is None else bias.float().numpy()
        return given

    return products.routed(spec, x, _scores(products, x, name, r), name, pack)


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


def _matrix(weight: Tensor | None, grids: Sequence[Grid | None], form: Format) -> Matrix | None:
    if weight is None:
        return None
    if weight.ndim == 2:
        return matrix([weight], grids, form)
    return matrix(list(weight), grids, form, stack=True)
