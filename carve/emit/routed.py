"""Lowering of routed FFNs: router, shared expert and routed experts as onnxruntime's nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from carve.arithmetic import Precision, fused
from carve.emit.builder import CONTRIB, Builder, Place
from carve.emit.graph import replace
from carve.ffn import RoutedFFN
from carve.grid import Grid

LowerRouted = Callable[[Builder, ir.Node, str, RoutedFFN, "ir.Value | None"], None]
"""Puts nodes in place of a routed placeholder, see `lower_routed`."""
_NEVER = -1e4
"""A score whose exponential is 0, and which fp16 has."""


def hidden(
    b: Builder,
    at: Place,
    x: Any,
    name: str,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> Any:
    """Hidden activations of an FFN, see `carve.dialect.hidden`."""
    h = b.linear(at, x, f"{name}.up", up, up_bias)
    if gate is None:
        return b.activate(at, h, activation)
    g = b.activate(at, b.linear(at, x, f"{name}.gate", gate, gate_bias), activation)
    return b.op(at, "Mul", [g, h])


def router_scores(b: Builder, at: ir.Node, flat: Any, name: str, r: RoutedFFN) -> Any:
    """Router scores ``[n, E]`` of ``flat`` ``[n, d]``, always fp32."""

    def product(weight: Tensor, suffix: str, bias: Tensor | None = None) -> Any:
        inputs = [flat, b.float_tensor(f"{name}.{suffix}", weight)]
        if bias is not None:
            inputs.append(b.float_tensor(f"{name}.{suffix}_bias", bias))
        return b.op(at, "Gemm", inputs, transB=1)

    scores = product(r.router, "router", r.router_bias)
    if r.router_gate is not None:
        gate = b.activate(at, product(r.router_gate, "router_gate"), r.activation)
        scores = b.op(at, "Mul", [gate, scores])
    return scores


def shared_expert(b: Builder, at: ir.Node, x: Any, name: str, r: RoutedFFN) -> Any:
    """The shared expert with the output bias, or None when there is neither."""
    if r.shared_up is None or r.shared_down is None:
        return (
            None if r.output_bias is None else b.float_tensor(f"{name}.output_bias", r.output_bias)
        )
    h = hidden(
        b,
        at,
        x,
        f"{name}.shared",
        r.shared_gate,
        r.shared_gate_bias,
        r.shared_up,
        r.shared_up_bias,
        r.activation,
    )
    return b.linear(at, h, f"{name}.shared.down", r.shared_down, r.output_bias)


def fused_experts(
    b: Builder,
    at: ir.Node,
    x: Any,
    scores: Any,
    name: str,
    r: RoutedFFN,
    grids: Mapping[str, Sequence[Grid]],
    rows: ir.Value | None,
) -> Any:
    """The routed experts, ``x`` ``[..., d]``, every weight exactly 1: a ``QMoE`` node a width."""
    widths = sorted({g.bits for g in grids["expert_up"]})
    if len(widths) == 1:
        # Routes of weight 0 are skipped by the kernel, which makes k dynamic.
        routes = (
            positive(b, at, scores) if r.dynamic else b.ones_like(at, scores, r.num_experts, rows)
        )
        return qmoe(b, at, x, scores, routes, name, r, range(r.num_experts), grids)
    routes = routes_of(b, at, scores, r)
    total = None
    for bits in widths:
        chosen = [e for e, g in enumerate(grids["expert_up"]) if g.bits == bits]
        index = b.const(f"{name}.experts{bits}", np.array(chosen))
        some, taken = (b.op(at, "Gather", [v, index], axis=1) for v in (scores, routes))
        y = qmoe(b, at, x, some, taken, f"{name}.{bits}bit", r, chosen, grids)
        total = y if total is None else b.op(at, "Add", [total, y])
    return total


def qmoe(
    b: Builder,
    at: Place,
    x: Any,
    scores: Any,
    routes: Any,
    name: str,
    r: RoutedFFN,
    experts: Sequence[int],
    grids: Mapping[str, Sequence[Grid]],
) -> Any:
    """One ``QMoE`` node over some of the experts, all of one width."""
    gated = r.expert_gate is not None
    attributes: dict[str, Any] = {"activation_type": "swiglu" if gated else r.activation}
    if gated:
        attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    pick = torch.tensor(list(experts))
    first_bias = second_bias = None
    if r.expert_up_bias is not None:
        bias = r.expert_up_bias[pick]
        if r.expert_gate_bias is not None:
            bias = torch.stack((r.expert_gate_bias[pick], bias), -1).flatten(1)
        first_bias = b.float_tensor(f"{name}.fc1_bias", bias)
    if r.expert_bias is not None:
        second_bias = b.float_tensor(f"{name}.fc2_bias", r.expert_bias[pick])
    fields = ["expert_gate", "expert_up"] if gated else ["expert_up"]
    w1, s1 = b.stacked(
        f"{name}.fc1", [[(getattr(r, f)[e], grids[f][e]) for f in fields] for e in experts]
    )
    w2, s2 = b.stacked(
        f"{name}.fc2", [[(r.expert_down[e], grids["expert_down"][e])] for e in experts]
    )
    grid = grids["expert_up"][experts[0]]
    k, count = min(r.top_k, len(experts)), None
    if not b.router_weights:
        scores, count = _equal_scores(b, at, scores, routes, k)
    more = [*[None] * 6, routes] if b.router_weights else []
    inputs = [x, scores, w1, s1, first_bias, w2, s2, second_bias, *more]
    y = b.op(
        at,
        "QMoE",
        inputs,
        domain=CONTRIB,
        k=k,
        normalize_routing_weights=int(not b.router_weights),
        expert_weight_bits=grid.bits,
        block_size=grid.block,
        accuracy_level=4,
        **attributes,
    )
    if count is None:
        return y
    # Counts are by token, results by row and position.
    one = b.const("carve_i1", np.array([1]))
    shape = b.op(at, "Concat", [b.op(at, "Shape", [y], end=-1), one], axis=0)
    return b.op(at, "Mul", [y, b.op(at, "Reshape", [count, shape])])


def _equal_scores(b: Builder, at: Place, scores: Any, routes: Any, k: int) -> tuple[Any, Any]:
    """Scores ``[n, E]`` whose softmax weighs routes alike, and by how much: counts ``[n, 1]``.

    A ``QMoE`` that reads no ``router_weights`` takes the ``k`` greatest of ``router_probs`` and
    weighs them by their softmax. Scores of 0 for the ``c`` experts that are to run and of -10,000
    for the others give each ``1 / c``, so its result is to be times ``c``; where none is to run,
    ``c`` is 0.
    """
    never = b.const("carve_never", np.array(_NEVER, np.float32))
    size = b.const(f"carve_k{k}", np.array([k]))
    _, best = b.op(at, "TopK", [scores, size], outputs=2)
    taken = b.op(at, "GatherElements", [routes, best], axis=1)
    less = b.op(at, "Sub", [b.const("carve_unit", np.array(1.0, np.float32)), taken])
    own = b.op(at, "Mul", [less, never])
    blank = b.op(at, "Expand", [never, b.op(at, "Shape", [scores])])
    last = b.const("carve_last", np.array([-1]))
    count = b.op(at, "ReduceSum", [taken, last], keepdims=1)
    return b.op(at, "ScatterElements", [blank, best, own], axis=1), count


def routes_of(b: Builder, at: ir.Node, scores: Any, r: RoutedFFN) -> Any:
    """1 for the experts that a token takes, ``[n, E]``: nodes with some of them cannot rank all."""
    k = b.const(f"carve_k{r.top_k}", np.array([r.top_k]))
    least, _ = b.op(at, "TopK", [scores, k], outputs=2)
    last = b.op(
        at, "Gather", [least, b.const(f"carve_last{r.top_k}", np.array([r.top_k - 1]))], axis=1
    )
    hit = b.op(at, "GreaterOrEqual", [scores, last])
    if r.dynamic:
        zero = b.const("carve_zero", np.array(0.0, np.float32))
        hit = b.op(at, "And", [hit, b.op(at, "Greater", [scores, zero])])
    return b.op(at, "Cast", [hit], to=ir.DataType.FLOAT)


def positive(b: Builder, at: ir.Node, scores: Any) -> Any:
    """1 where a score is positive, else 0."""
    hit = b.op(at, "Greater", [scores, b.const("carve_zero", np.array(0.0, np.float32))])
    return b.op(at, "Cast", [hit], to=ir.DataType.FLOAT)


def one_expert(b: Builder, at: Place, x: Any, name: str, r: RoutedFFN, e: int) -> Any:
    """Expert ``e`` on rows ``[n, d]`` with a product a weight."""

    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[e]

    h = hidden(
        b,
        at,
        x,
        name,
        own(r.expert_gate),
        own(r.expert_gate_bias),
        r.expert_up[e],
        own(r.expert_up_bias),
        r.activation,
    )
    return b.linear(at, h, f"{name}.down", r.expert_down[e], own(r.expert_bias))


def _grouped_experts(
    b: Builder, at: ir.Node, x: Any, scores: Any, y: Any, name: str, r: RoutedFFN
) -> Any:
    """Each expert on the rows that chose it, added to ``y`` ``[n, d]``.

    Products of zero rows cost next to nothing, so the work follows the active share for any
    number of tokens, any activation and any width.
    """
    value, index = b.op(
        at, "TopK", [scores, b.const(f"carve_k{r.top_k}", np.array([r.top_k]))], outputs=2
    )
    if r.dynamic:  # no expert has the number -1
        bar = b.const("carve_zero", np.array(0.0, np.float32))
        none = b.const("carve_none", np.array(-1))
        index = b.op(at, "Where", [b.op(at, "Greater", [value, bar]), index, none])
    zero, last = b.const("carve_i0", np.array(0)), b.const("carve_i1", np.array([1]))
    for e in range(r.num_experts):
        hit = b.op(at, "Equal", [index, b.const(f"carve_i{e}_", np.array(e))])
        rows = b.op(at, "Gather", [b.op(at, "NonZero", [hit]), zero], axis=0)
        rows_of = b.op(at, "Gather", [x, rows], axis=0)
        out = one_expert(b, at, rows_of, f"{name}.expert{e}", r, e)
        y = b.op(at, "ScatterND", [y, b.op(at, "Unsqueeze", [rows, last]), out], reduction="add")
    return y


def expert_grids(precision: Precision, r: RoutedFFN) -> dict[str, list[Grid]] | None:
    """The experts' grids where ``QMoE`` can run them all, else None."""
    found: dict[str, list[Grid]] = {}
    for name in ("expert_gate", "expert_up", "expert_down"):
        weight = getattr(r, name)
        if weight is None:
            continue
        grids = [precision.of(w) for w in weight]
        if not fused(r, precision.block) or any(g is None for g in grids):
            return None
        found[name] = [g for g in grids if g is not None]
    return found


def lower_routed(b: Builder, node: ir.Node, name: str, r: RoutedFFN, rows: ir.Value | None) -> None:
    """One routed FFN; ``rows`` are its inputs where a gate stands before it."""
    d = r.expert_up.shape[-1]
    x = node.inputs[0]
    flat = b.op(node, "Reshape", [x, b.const(f"carve_rows{d}", np.array([-1, d]))])
    scores = router_scores(b, node, flat, name, r)
    grids = expert_grids(b.precision, r)
    if grids is not None:
        y = fused_experts(b, node, x, scores, name, r, grids, rows)
        shared = shared_expert(b, node, x, name, r)
        replace(node, [y if shared is None else b.op(node, "Add", [shared, y])])
        return
    shared = shared_expert(b, node, flat, name, r)
    if shared is None or r.shared_up is None:
        blank = b.const("carve_zero", np.array(0.0, np.float32)) if shared is None else shared
        shared = b.op(node, "Expand", [blank, b.op(node, "Shape", [flat])])
    y = _grouped_experts(b, node, flat, scores, shared, name, r)
    replace(node, [b.op(node, "Reshape", [y, b.op(node, "Shape", [x])])])
