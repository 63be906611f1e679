"""Half precision for CUDA: the graph as it is for onnxruntime's CPU, with fp16 between its nodes.

onnxruntime's ``QMoE`` and ``GroupQueryAttention`` take nothing wider on CUDA. Its integer experts
have a layout of their own there, so the plain one that is written has to be named
(``weights_prepacked = 0``), and they read no weights of routes (`carve.emit.builder.Builder`);
products see activations as they are, not rounded to int8.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from carve.emit.graph import given, produced
from carve.emit.segments import give_types

_WIDE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_ROUTERS = (".router", ".router_gate")
_CACHE = ("past_key_values.", "present.")
# Their means and deviations, which nothing reads, are fp32 whatever they norm.
_NORMS = frozenset({"SkipSimplifiedLayerNormalization", "SkipLayerNormalization"})
_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: ir.Model) -> None:
    """Turn an fp32 model into one with fp16 activations, weights and cache, in place.

    In fp32 stay the routers, whose near ties decide which experts run, the angles of rotary
    embeddings, for positions above 2,048 are no fp16 numbers, and all that goes in or out but the
    cache.
    """
    graphs = [model.graph, *model.graph.subgraphs()]
    onnx_passes.TopologicalSortPass()(model)
    give_types(model.graph)
    wide = _routing(graphs) | _angles(graphs) | _sums(graphs)
    converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    kinds = {v: _kind(v, wide) for v in _values(graphs) if v.dtype == _WIDE}
    for graph in graphs:
        for node in list(graph):
            want = _WIDE if node in wide else _HALF
            _attributes(node, want)
            for i, v in enumerate(node.inputs):
                if v is not None and v in kinds and kinds[v] != want:
                    node.replace_input_with(i, _cast(v, want, node, converted))
    for v, kind in kinds.items():
        if kind == _HALF:
            v.type = ir.TensorType(_HALF)
            if v.const_value is not None:
                v.const_value = _narrow(v.const_value)
    for graph in graphs:
        top = graph is model.graph
        for i, v in enumerate(graph.outputs):
            keeps = top and not str(v.name).startswith(_CACHE)
            if v in kinds and kinds[v] != (_WIDE if keeps else _HALF):
                _cast_output(graph, i, _WIDE if keeps else _HALF)


def _values(graphs: list[ir.Graph]) -> Iterator[ir.Value]:
    for graph in graphs:
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _kind(v: ir.Value, wide: set[ir.Node]) -> ir.DataType:
    """The precision that a float value has in the new model."""
    maker = v.producer()
    if maker is not None:
        statistic = maker.op_type in _NORMS and v in maker.outputs[1:3]
        return _WIDE if maker in wide or statistic else _HALF
    if v.is_graph_input():
        return _HALF if str(v.name).startswith(_CACHE) else _WIDE
    return _WIDE if any(user in wide for user, _ in v.uses()) else _HALF


def _routing(graphs: list[ir.Graph]) -> set[ir.Node]:
    """Routers, and what decides by their scores."""
    found: set[ir.Node] = set()
    for graph in graphs:
        for node in graph:
            router = node.op_type == "Gemm" and str(given(node.inputs[1]).name).endswith(_ROUTERS)
            # Where routing ends: what reads router scores and gives activations.
            ends = node.op_type == "QMoE" or any(produced(v, "QMoE") for v in node.inputs)
            follows = not ends and any(
                v is not None and v.producer() in found and v.dtype == _WIDE for v in node.inputs
            )
            if router or follows:
                found.add(node)
    return found


def _sums(graphs: list[ir.Graph]) -> set[ir.Node]:
    """Where the results of one expert after another are added: few kernels do that in fp16."""
    return {n for graph in graphs for n in graph if n.op_type == "ScatterND"}


def _angles(graphs: list[ir.Graph]) -> set[ir.Node]:
    """Sines and cosines that are computed in the graph, with what they are computed from."""
    found: set[ir.Node] = set()
    left = [n for graph in graphs for n in graph if n.op_type in ("Cos", "Sin")]
    while left:
        node = left.pop()
        if node in found:
            continue
        found.add(node)
        makers = [v.producer() for v in node.inputs if v is not None and v.dtype == _WIDE]
        left += [m for m in makers if m is not None]
    return found


def _attributes(node: ir.Node, want: ir.DataType) -> None:
    """Attributes that name a precision, and those of the operators that CUDA runs another way."""
    if node.op_type == "QMoE":
        node.attributes["weights_prepacked"] = ir.AttrInt64("weights_prepacked", 0)
    if node.op_type in ("QMoE", "MatMulNBits"):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    if want != _HALF:
        return
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _WIDE:
        node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, np.float16)))
    elif node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes:
        value = node.attributes["value"].as_tensor()
        if value.dtype == _WIDE:
            node.attributes["value"] = ir.AttrTensor("value", _narrow(value))


def _narrow(value: ir.TensorProtocol) -> ir.LazyTensor:
    """A tensor in fp16, made as it is written; what fp16 cannot hold becomes its largest."""

    def make() -> ir.TensorProtocol:
        whole = value.numpy()
        held = np.where(np.isfinite(whole), np.clip(whole, -_LARGEST, _LARGEST), whole)
        return ir.Tensor(held.astype(np.float16), name=value.name)

    shape = ir.Shape(value.shape.numpy())
    return ir.LazyTensor(make, dtype=_HALF, shape=shape, name=value.name)


def _new_cast(v: ir.Value, want: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [v], [ir.AttrInt64("to", int(want))], name=f"{v.name}_to_{want}")
    made = node.outputs[0]
    made.name, made.type = f"{v.name}_{want}", ir.TensorType(want)
    return node


def _cast(
    v: ir.Value,
    want: ir.DataType,
    reader: ir.Node,
    converted: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    """``v`` in another precision, converted once, where it is made."""
    if (v, want) not in converted:
        node = _new_cast(v, want)
        maker = v.producer()
        if maker is not None:
            maker.append(node)
        else:
            graph = v.graph or reader.graph
            assert isinstance(graph, ir.Graph)
            next(iter(graph)).prepend(node)
        converted[v, want] = node.outputs[0]
    return converted[v, want]


def _cast_output(graph: ir.Graph, at: int, want: ir.DataType) -> None:
    """A graph output in another precision under its own name."""
    v = graph.outputs[at]
    name = v.name
    v.name = f"{name}_inner"
    node = _new_cast(v, want)
    node.outputs[0].name = name
    maker = v.producer()
    assert maker is not None
    maker.append(node)
    graph.outputs[at] = node.outputs[0]
