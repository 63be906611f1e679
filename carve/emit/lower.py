"""Lowering: every placeholder of a skeleton by what onnxruntime runs best at the chosen width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as onnx_passes
from torch import Tensor

from carve.arithmetic import Precision, fused
from carve.emit.attention import (
    Heads,
    RotaryTables,
    attention_lengths,
    linear_name,
    linear_weights,
    lower_attention,
)
from carve.emit.builder import CONTRIB, Builder, lazy_float
from carve.emit.gates import GateLowering
from carve.emit.graph import given, produced, replace
from carve.emit.skeleton import DOMAIN
from carve.errors import CarveError
from carve.ffn import RoutedFFN
from carve.grid import Grid
from carve.program import Program


def _hidden(
    b: Builder,
    at: ir.Node,
    x: Any,
    name: str,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> Any:
    h = b.linear(at, x, f"{name}.up", up, up_bias)
    if gate is None:
        return b.activate(at, h, activation)
    g = b.activate(at, b.linear(at, x, f"{name}.gate", gate, gate_bias), activation)
    return b.op(at, "Mul", [g, h])


def _router(b: Builder, at: ir.Node, flat: Any, name: str, r: RoutedFFN) -> Any:
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


def _shared(b: Builder, at: ir.Node, x: Any, name: str, r: RoutedFFN) -> Any:
    """The shared expert with the output bias, or None when there is neither."""
    if r.shared_up is None or r.shared_down is None:
        return (
            None if r.output_bias is None else b.float_tensor(f"{name}.output_bias", r.output_bias)
        )
    h = _hidden(
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


def _fused_experts(
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
            _positive(b, at, scores) if r.dynamic else b.ones_like(at, scores, r.num_experts, rows)
        )
        return _qmoe(b, at, x, scores, routes, name, r, range(r.num_experts), grids)
    routes = _routes(b, at, scores, r)
    total = None
    for bits in widths:
        chosen = [e for e, g in enumerate(grids["expert_up"]) if g.bits == bits]
        index = b.const(f"{name}.experts{bits}", np.array(chosen))
        some, taken = (b.op(at, "Gather", [v, index], axis=1) for v in (scores, routes))
        y = _qmoe(b, at, x, some, taken, f"{name}.{bits}bit", r, chosen, grids)
        total = y if total is None else b.op(at, "Add", [total, y])
    return total


def _qmoe(
    b: Builder,
    at: ir.Node,
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
    inputs = [x, scores, w1, s1, first_bias, w2, s2, second_bias, *[None] * 6, routes]
    return b.op(
        at,
        "QMoE",
        inputs,
        domain=CONTRIB,
        k=min(r.top_k, len(experts)),
        normalize_routing_weights=0,
        expert_weight_bits=grid.bits,
        block_size=grid.block,
        accuracy_level=4,
        **attributes,
    )


def _routes(b: Builder, at: ir.Node, scores: Any, r: RoutedFFN) -> Any:
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


def _positive(b: Builder, at: ir.Node, scores: Any) -> Any:
    """1 where a score is positive, else 0."""
    hit = b.op(at, "Greater", [scores, b.const("carve_zero", np.array(0.0, np.float32))])
    return b.op(at, "Cast", [hit], to=ir.DataType.FLOAT)


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
        path = f"{name}.expert{e}"

        def own(t: Tensor | None, e: int = e) -> Tensor | None:
            return None if t is None else t[e]

        h = _hidden(
            b,
            at,
            b.op(at, "Gather", [x, rows], axis=0),
            path,
            own(r.expert_gate),
            own(r.expert_gate_bias),
            r.expert_up[e],
            own(r.expert_up_bias),
            r.activation,
        )
        out = b.linear(at, h, f"{path}.down", r.expert_down[e], own(r.expert_bias))
        y = b.op(at, "ScatterND", [y, b.op(at, "Unsqueeze", [rows, last]), out], reduction="add")
    return y


def _expert_grids(b: Builder, r: RoutedFFN) -> dict[str, list[Grid]] | None:
    """The experts' grids where ``QMoE`` can run them all, else None."""
    found: dict[str, list[Grid]] = {}
    for name in ("expert_gate", "expert_up", "expert_down"):
        weight = getattr(r, name)
        if weight is None:
            continue
        grids = [b.precision.of(w) for w in weight]
        if not fused(r, b.precision.block) or any(g is None for g in grids):
            return None
        found[name] = [g for g in grids if g is not None]
    return found


def _lower_routed(
    b: Builder, node: ir.Node, name: str, r: RoutedFFN, rows: ir.Value | None
) -> None:
    """One routed FFN; ``rows`` are its inputs where a gate stands before it."""
    d = r.expert_up.shape[-1]
    x = node.inputs[0]
    flat = b.op(node, "Reshape", [x, b.const(f"carve_rows{d}", np.array([-1, d]))])
    scores = _router(b, node, flat, name, r)
    grids = _expert_grids(b, r)
    if grids is not None:
        y = _fused_experts(b, node, x, scores, name, r, grids, rows)
        shared = _shared(b, node, x, name, r)
        replace(node, [y if shared is None else b.op(node, "Add", [shared, y])])
        return
    shared = _shared(b, node, flat, name, r)
    if shared is None or r.shared_up is None:
        blank = b.const("carve_zero", np.array(0.0, np.float32)) if shared is None else shared
        shared = b.op(node, "Expand", [blank, b.op(node, "Shape", [flat])])
    y = _grouped_experts(b, node, flat, scores, shared, name, r)
    replace(node, [b.op(node, "Reshape", [y, b.op(node, "Shape", [x])])])


def _lower_lookup(b: Builder, node: ir.Node, weights: Mapping[str, Tensor]) -> None:
    """An embedding whose table is on a grid, row by row as it is read."""
    table = weights.get(str(given(node.inputs[0]).name))
    grid = None if table is None else b.precision.known(table)
    if table is None or grid is None:
        return
    levels, scales = b.quantized(linear_name(node, 0), [(table, grid)], blocked=False)
    row = b.op(
        node,
        "GatherBlockQuantized",
        [levels, node.inputs[1], scales],
        domain=CONTRIB,
        bits=grid.bits,
        block_size=grid.block,
        gather_axis=0,
        quantize_axis=1,
    )
    replace(node, [row])


def _fuse_norms(b: Builder) -> None:
    """``RMSNormalization`` of a sum, with the sum used again, as one node."""
    for node in [n for n in b.graph if n.op_type == "RMSNormalization" and n.domain == ""]:
        add = produced(node.inputs[0], "Add")
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if add is None or axis not in (-1, 2) or not _same_shape(add):
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        norm, _, _, total = b.op(
            add,
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, node.inputs[1]],
            outputs=4,
            domain=CONTRIB,
            epsilon=epsilon,
        )
        replace(node, [norm])
        replace(add, [total])


def _same_shape(add: ir.Node) -> bool:
    """Whether an addition joins two streams ``[B, S, d]``, neither broadcast."""
    shapes = [None if v is None else v.shape for v in add.inputs]
    return all(s is not None and len(s) == 3 for s in shapes) and shapes[0] == shapes[1]


def lower(
    model: ir.Model, weights: dict[str, Tensor], program: Program, precision: Precision
) -> None:
    """Replace every placeholder by operators of onnxruntime, in place."""
    graph = model.graph
    b = Builder(model, precision)
    # Equal cosines and sines become one value, which tells equal rotary embeddings.
    onnx_passes.CommonSubexpressionEliminationPass()(model)
    placeholders: dict[str, list[ir.Node]] = {
        kind: [] for kind in ("Attention", "RoutedFFN", "Linear", "Gated")
    }
    for node in graph:
        if node.domain == DOMAIN:
            placeholders[node.op_type].append(node)
    gates = GateLowering(b, program, placeholders["Gated"])
    gates.open_ffns()
    operators: dict[int, ir.Node] = {}
    if placeholders["Attention"]:
        lengths = attention_lengths(b, model, graph[0])
        _, kv, _, width = program.example[2].shape
        tables = RotaryTables(b, program.max_length, width)
        gated = gates.attention()
        for node in placeholders["Attention"]:
            count = int(given(node.inputs[0]).shape[1])  # type: ignore[index, arg-type]
            rows, block, output = gated.get(node, (None, None, None))
            heads = Heads(count, kv, width)
            operator = lower_attention(b, node, lengths, heads, weights, tables, rows)
            if rows is not None and block is not None and output is not None:
                wide = rows.take(output, given(output.inputs[0]), count * width)
                output.replace_input_with(0, wide)
                operators[block] = operator
        onnx_passes.RemoveUnusedNodesPass()(model)
    for node in placeholders["RoutedFFN"]:
        index = node.attributes["site"].as_int()
        site = program.sites[index]
        if site.routed is None:
            raise CarveError("emit", f"{site.name}: a routed placeholder without routed weights")
        rows_of = None if site.gate is None else node.inputs[0]
        _lower_routed(b, node, site.name, site.routed, rows_of)
    for node in placeholders["Linear"]:
        if node.graph is None:  # packed with its neighbours
            continue
        weight, bias = linear_weights(node, weights)
        x = given(node.inputs[0])
        replace(node, [b.linear(node, x, linear_name(node), weight, bias)])
    for node in [n for n in graph if n.op_type == "Gather" and n.domain == ""]:
        _lower_lookup(b, node, weights)
    gates.close(operators)
    _fuse_norms(b)
    onnx_passes.CommonSubexpressionEliminationPass()(model)
    onnx_passes.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if v.name == "position_ids" and not v.uses()]:
        graph.inputs.remove(value)
    for name, value in graph.initializers.items():
        if name in weights:
            value.const_value = lazy_float(name, weights[name])
    model.opset_imports[CONTRIB] = 1
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name = "carve"
