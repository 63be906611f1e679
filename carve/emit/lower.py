"""Lowering: every placeholder of a skeleton by what onnxruntime runs best at the chosen width."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes
from torch import Tensor

from carve.arithmetic import Precision
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
from carve.emit.routed import LowerRouted, lower_routed
from carve.emit.skeleton import DOMAIN
from carve.errors import CarveError
from carve.program import Program


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
    model: ir.Model,
    weights: dict[str, Tensor],
    program: Program,
    precision: Precision,
    routed: LowerRouted = lower_routed,
    *,
    router_weights: bool = True,
) -> None:
    """Replace every placeholder by operators of onnxruntime, in place.

    ``routed`` does it for the routed FFNs; one that leaves experts out needs them in no branch.
    ``router_weights``: see `carve.emit.builder.Builder`.
    """
    graph = model.graph
    b = Builder(model, precision, router_weights=router_weights)
    # Equal cosines and sines become one value, which tells equal rotary embeddings.
    onnx_passes.CommonSubexpressionEliminationPass()(model)
    placeholders: dict[str, list[ir.Node]] = {
        kind: [] for kind in ("Attention", "RoutedFFN", "Linear", "Gated")
    }
    for node in graph:
        if node.domain == DOMAIN:
            placeholders[node.op_type].append(node)
    gates = GateLowering(b, program, placeholders["Gated"], apart=routed is not lower_routed)
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
        routed(b, node, site.name, site.routed, rows_of)
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
