"""Cut a graph at marker nodes: segments that run one after another, with values handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external

from carve.emit.graph import given
from carve.errors import CarveError

TRUNK = "trunk.data"
_SMALL = 256
_INT64 = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")
_GRAPH = ir.AttributeType.GRAPH
_BOOL = ("And", "Or", "Not", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


@dataclass
class Segment:
    """The nodes of one segment in order, the values it takes and gives, its initializers."""

    nodes: list[ir.Node]
    inputs: dict[ir.Value, None]
    outputs: dict[ir.Value, None]
    weights: dict[ir.Value, None]


def cut(graph: ir.Graph, markers: Sequence[ir.Node]) -> list[Segment]:
    """One segment more than ``markers``, which are in topological order.

    Every node runs in the first segment that has its inputs: segment ``k`` gives what marker ``k``
    reads, and marker ``k``'s result is an input of the later ones.

    A node with branches is not cut through: it runs in the first segment that has all that they
    read.

    Raises:
        CarveError: a marker stands in a branch.
    """
    number = {m: k for k, m in enumerate(markers)}
    stage: dict[ir.Value, int] = dict.fromkeys(graph.inputs, -1)
    found = [Segment([], {}, {}, {}) for _ in range(len(markers) + 1)]
    results = set(graph.outputs)
    for node in graph:
        read = _reads(node)
        if any(n in number for g in branches(node) for n in g.all_nodes()):
            raise CarveError("emit", f"{node.name}: experts in a branch cannot be split")
        moving = [v for v in read if v.const_value is None or v in stage]
        at = number[node] if node in number else max([0, *(stage[v] for v in moving)])
        segment = found[at]
        for v in moving:
            # What a marker reads is handed on even by the segment before it.
            early = 0 <= stage[v] < at + (node in number)
            if early and v.producer() not in number:
                found[stage[v]].outputs[v] = None
        if node in number:
            stage[node.outputs[0]] = at + 1
            # A marker's result is no node's of the segment that reads it.
            continue
        segment.nodes.append(node)
        segment.weights.update((v, None) for v in read if v not in stage)
        for v in node.outputs:
            stage[v] = at
            if v in results:
                segment.outputs[v] = None
    for segment in found:
        own = {v for n in segment.nodes for v in n.outputs} | segment.weights.keys()
        read = [v for n in segment.nodes for v in _reads(n)]
        segment.inputs.update((v, None) for v in read if v not in own)
    return found


def branches(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds."""
    found: list[ir.Graph] = []
    for a in node.attributes.values():
        if a.type == ir.AttributeType.GRAPH:
            found.append(a.as_graph())
        elif a.type == ir.AttributeType.GRAPHS:
            found += a.as_graphs()
    return found


def _reads(node: ir.Node) -> list[ir.Value]:
    """The values that a node takes, those that its branches take from outside too."""
    found = [v for v in node.inputs if v is not None]
    for graph in branches(node):
        own = {*graph.inputs, *(v for n in graph for v in n.outputs)}
        inner = [v for n in graph for v in _reads(n)]
        found += [v for v in (*inner, *graph.outputs) if v not in own]
    return found


def give_types(graph: ir.Graph) -> None:
    """Element types of values that have none, by what operators do with their inputs'.

    Nodes have to be in order; those of branches get theirs when their node is reached.
    """
    for node in graph:
        branches = [a.as_graph() for a in node.attributes.values() if a.type == _GRAPH]
        for branch in branches:
            give_types(branch)
        if branches:
            for v, told in zip(node.outputs, branches[0].outputs, strict=True):
                v.type = v.type or told.type
            continue
        kinds = [
            v.dtype if v.dtype is not None else (v.const_value.dtype if v.const_value else None)
            for v in node.inputs
            if v is not None
        ]
        first = next((k for k in kinds if k is not None), ir.DataType.FLOAT)
        kind = node.op_type
        if kind == "Cast":
            first = ir.DataType(node.attributes["to"].as_int())
        elif kind in _INT64:
            first = ir.DataType.INT64
        elif kind in _BOOL:
            first = ir.DataType.BOOL
        elif kind == "Where" and len(kinds) > 1 and kinds[1] is not None:
            first = kinds[1]
        elif kind in ("Constant", "ConstantOfShape") and "value" in node.attributes:
            first = node.attributes["value"].as_tensor().dtype
        elif kind in ("GatherBlockQuantized", "ConstantOfShape"):
            first = ir.DataType.FLOAT
        inner = branches(node)
        for i, v in enumerate(node.outputs):
            if inner and v.type is None:
                v.type = inner[0].outputs[i].type
            if v.type is None:
                own = ir.DataType.INT64 if kind == "TopK" and i == 1 else first
                v.type = ir.TensorType(own)


def write_segments(model: ir.Model, segments: Sequence[Segment], folder: Path) -> list[str]:
    """Write each segment as a model, their weights in one file; returns the models' names."""
    large: dict[str, ir.TensorProtocol] = {}
    for s in segments:
        for v in s.weights:
            if v.const_value is not None and v.const_value.nbytes >= _SMALL:
                large[str(v.name)] = v.const_value
    stored = convert_tensors_to_external(
        list(large.values()), folder, TRUNK, max_workers=1, alignment=64
    )
    outside = dict(zip(large, stored, strict=True))
    names = []
    for k, s in enumerate(segments):
        name = f"segment{k}.onnx"
        ir.save(_model(model, s, outside), str(folder / name))
        names.append(name)
    return names


def _model(whole: ir.Model, segment: Segment, outside: dict[str, ir.ExternalTensor]) -> ir.Model:
    """A model of a segment's nodes, which are copied."""
    copies: dict[ir.Value, ir.Value] = {}

    def copy(v: ir.Value) -> ir.Value:
        if v not in copies:
            copies[v] = ir.Value(name=v.name, shape=v.shape, type=v.type)
        return copies[v]

    def attribute(a: ir.Attr) -> ir.Attr:
        if a.type != ir.AttributeType.GRAPH:
            return a
        g = a.as_graph()
        nodes = [node(n) for n in g]
        return ir.AttrGraph(
            a.name, ir.Graph([], [copy(v) for v in g.outputs], nodes=nodes, name=g.name)
        )

    def node(n: ir.Node) -> ir.Node:
        return ir.Node(
            n.domain,
            n.op_type,
            [None if v is None else copy(v) for v in n.inputs],
            [attribute(a) for a in n.attributes.values()],
            outputs=[copy(v) for v in n.outputs],
            name=n.name,
        )

    inputs = [copy(v) for v in segment.inputs]
    weights = []
    # An input with a value of its own stays one.
    for v in (*segment.weights, *(v for v in segment.inputs if v.const_value is not None)):
        value = copy(v)
        value.const_value = outside.get(str(v.name), v.const_value)
        weights.append(value)
    nodes = [node(n) for n in segment.nodes]
    graph = ir.Graph(
        inputs,
        [copy(given(v)) for v in segment.outputs],
        nodes=nodes,
        initializers=weights,
        opset_imports=dict(whole.graph.opset_imports),
        name="segment",
    )
    return ir.Model(graph, ir_version=whole.ir_version or 10, producer_name="carve")
